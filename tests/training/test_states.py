"""What a run keeps: the newest states and the best, read only as they were written; what stops it, in one line."""

import json
import logging
import os
import random
import select
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from training.runs import StopAt, log, pack_of, plan_of, recipe, same, state_of, step_records, train

import xfusion
from xfusion import checkpoint
from xfusion.data.sequence import XFusionError
from xfusion.training import loop, optimizer, outputs, progress, states
from xfusion.training.stopping import Interrupted, stopping

resource = pytest.importorskip("resource")
linux = pytest.mark.skipif(sys.platform != "linux", reason="a process that uses torch is forked safely on Linux alone")
TENSORS = {"weight.a": torch.arange(6.0), "average.a": torch.ones(6)}


def write(folder, step, *, loss=1.0, stage=0, keep=2, **settings):
    return states.write(folder, TENSORS, {"step": step, "stage": stage, "loss": loss}, keep, **settings)


def steps(folder):
    return [int(state.name.removeprefix("step_")) for state in states.list_states(folder)]


def flip(path, place, bit):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


# --------------------------------------------------------------------------------------------------------------- kept


@pytest.mark.parametrize(
    ("keep", "losses", "kept"),
    [
        (1, [3, 2, 1], [3]),
        (1, [1, 2, 3], [3, 1]),
        (2, [3, 1, 2, 4, 5], [5, 4, 2]),
        (2, [1, 1, 1], [3, 2, 1]),  # of equals the first
        (9, [3, 2, 1], [3, 2, 1]),
        (1, [None, None], [2]),  # nothing was measured
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, keep, losses, kept):
    for step, loss in enumerate(losses, start=1):
        write(tmp_path, step, loss=loss, keep=keep)
    assert steps(tmp_path) == kept
    assert list(tmp_path.glob(".*")) == []


def test_the_best_is_of_the_furthest_stage(tmp_path):
    for step, (stage, loss) in enumerate([(0, 1.0), (1, 5.0), (1, 6.0)], start=1):
        write(tmp_path, step, stage=stage, loss=loss, keep=1)
    assert steps(tmp_path) == [3, 2]
    assert states.best(tmp_path).name == "step_00000002"


@pytest.mark.parametrize(
    ("keep", "losses", "kept"),
    [
        (1, [3.0, 1.0, 2.0], [450]),  # the damaged one was the best
        (1, [1.0, 3.0, 2.0], [450, 300]),
        (2, [3.0, 1.0, 2.0], [450, 300]),
        (2, [1.0, 3.0, 2.0], [450, 300]),
        (2, [None, None, None], [450, 300]),
    ],
)
def test_states_that_were_left_out_count_for_nothing(tmp_path, keep, losses, kept):
    """600 is damaged, the run goes on from 300 and writes 450: what is intact stays."""
    for step, loss in zip((300, 600), losses, strict=False):
        write(tmp_path, step, loss=loss)
    damaged = tmp_path / "step_00000600" / "state.safetensors"
    flip(damaged, damaged.stat().st_size - 1, 0)
    went_on_from = states.newest(tmp_path)[0]["step"]
    write(tmp_path, 450, loss=losses[2], keep=keep, previous_step=went_on_from)
    assert steps(tmp_path) == kept and states.newest(tmp_path)[0]["step"] == 450


def test_one_flipped_bit_is_refused_and_the_state_before_is_taken(tmp_path, caplog):
    for step in (1, 2):
        write(tmp_path, step)
    newest, rng = tmp_path / "step_00000002", random.Random(0)
    for name in ("state.json", "state.safetensors"):
        path = newest / name
        size = path.stat().st_size
        for place, bit in [(rng.randrange(size), rng.randrange(8)) for _ in range(40)]:
            flip(path, place, bit)
            with pytest.raises(XFusionError) as error:
                states.read(newest)
            assert str(path) in str(error.value) and "\n" not in str(error.value), (name, place, bit)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                plan, tensors = states.newest(tmp_path)
            assert plan["step"] == 1 and torch.equal(tensors["weight.a"], TENSORS["weight.a"])
            (said,) = caplog.messages
            assert str(path) in said and said.endswith("left out, the run goes on from step 1")
            flip(path, place, bit)
    assert states.newest(tmp_path)[0]["step"] == 2


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("share", [None, 0.0, 0.5, 0.99])
def test_half_a_state_is_never_loaded(tmp_path, name, share):
    path = write(tmp_path, 1) / name
    content = path.read_bytes()
    path.unlink()
    if share is not None:
        path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(XFusionError, match=f"holds no intact state: .*{name} cannot be read: .*; start the run again"):
        states.newest(tmp_path)


def test_a_hash_that_is_gone_is_missed(tmp_path):
    path = write(tmp_path, 1) / "state.json"
    plan = json.loads(path.read_text())
    for gone in ({"sha256"}, {"state_sha256"}, {"sha256", "state_sha256"}):
        left = {name: value for name, value in plan.items() if name not in gone}
        path.write_text(json.dumps(left if "sha256" in gone else checkpoint.sealed(left)))
        with pytest.raises(XFusionError, match="state.json was altered: a state has hashes, this has none"):
            states.newest(tmp_path)


# ---------------------------------------------------------------------------------------------------------- in a run


def test_a_run_keeps_what_it_says(bases, tmp_path):
    base = bases["llama"]
    train(base, tmp_path, steps=6, checkpoint_every=0, keep=3)
    kept = steps(tmp_path / "state")
    assert kept[:3] == [6, 5, 4] and len(kept) <= 4
    losses, recent = [], []
    for event in log(tmp_path):
        losses.append(sum(o.weight * event["losses"][o.name] for o in objectives(base)))
        shares = [progress.LOSS_DECAY**back for back in range(len(losses))]
        recent.append(sum(s * x for s, x in zip(shares, reversed(losses), strict=True)) / sum(shares))
    for step in kept:
        assert states.read_plan(tmp_path / "state" / f"step_{step:08d}")["loss"] == pytest.approx(recent[step - 1])
    assert 1 + recent.index(min(recent)) in kept
    with pytest.raises(XFusionError, match="keep is 0: at least 1"):
        train(base, tmp_path / "none", keep=0)


def test_the_log_is_on_the_disk_before_the_state_of_its_step(bases, tmp_path, monkeypatch):
    """Else a power cut may leave a state whose steps the log does not tell of."""
    path, told_of, kept, sync, rename = tmp_path / "log.jsonl", {}, [0], os.fsync, Path.rename

    def synced(handle):
        sync(handle)
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            kept[0] = os.fstat(handle).st_size

    def named(self, target):
        if target.name.startswith("step_"):
            lines = path.read_bytes()[: kept[0]].splitlines()
            told_of[target.name] = sum(json.loads(line)["event"] == "step" for line in lines)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", named)
    train(bases["llama"], tmp_path, steps=2, checkpoint_every=0)
    assert told_of == {"step_00000001": 1, "step_00000002": 2}


def objectives(base):
    config = recipe(base).model
    return [part.build() for part in (config.text, config.media)]


def test_a_damaged_state_is_named_and_the_run_goes_on_from_the_one_before(bases, tmp_path, caplog):
    base = bases["llama"]
    train(base, tmp_path / "straight", steps=8)
    with pytest.raises(Interrupted):
        train(base, tmp_path / "run", steps=8, checkpoint_every=0, listener=StopAt(5))
    damaged = tmp_path / "run" / "state" / "step_00000006" / "state.safetensors"
    flip(damaged, damaged.stat().st_size // 2, 3)
    with caplog.at_level(logging.WARNING):
        train(base, tmp_path / "run", steps=8, checkpoint_every=0, resume=True)
    assert f"{damaged} was altered" in caplog.text and "goes on from step 5" in caplog.text
    assert step_records(tmp_path / "run") == step_records(tmp_path / "straight")
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "straight"))
    for state in states.list_states(tmp_path / "run" / "state"):  # the damaged one was written again, or has gone
        states.read(state)
    for state in states.list_states(tmp_path / "run" / "state"):
        flip(state / "state.json", 40, 0)
    with pytest.raises(XFusionError, match="holds no intact state: .*; start the run again") as error:
        train(base, tmp_path / "run", steps=8, resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_went_on_before_a_damaged_state_keeps_what_it_writes(bases, tmp_path, monkeypatch, keep):
    """It dies again before it is as far as the damaged state was."""
    base, out, save = bases["llama"], tmp_path / "run", loop._Run.save
    train(base, tmp_path / "straight", steps=8)
    for saved, dies, kept, resume in (((3, 6), 6, 2, False), ((5,), 5, keep, True)):
        monkeypatch.setattr(loop._Run, "save", lambda self, saved=saved: self.progress.step in saved and save(self))
        listener = StopAt(dies, RuntimeError("power cut"))
        with pytest.raises(RuntimeError, match="power cut"):
            train(base, out, steps=8, checkpoint_every=0, keep=kept, resume=resume, listener=listener)
        if not resume:
            assert steps(out / "state") == [6, 3]
            damaged = out / "state" / "step_00000006" / "state.safetensors"
            flip(damaged, damaged.stat().st_size // 2, 3)
    monkeypatch.undo()
    found = states.list_states(out / "state")
    assert [states.read(state)[0]["step"] for state in found] == steps(out / "state") and steps(out / "state")[0] == 5
    train(base, out, steps=8, resume=True)
    assert step_records(out) == step_records(tmp_path / "straight")
    assert same(state_of(out), state_of(tmp_path / "straight"))


@linux
@pytest.mark.parametrize("every", [0.0, 300.0])
def test_a_folder_is_of_one_run_at_a_time(bases, tmp_path, every):
    """Whoever comes second changes nothing; who is killed holds nothing."""
    base, out = bases["llama"], tmp_path / "run"
    reading, writing = os.pipe()

    def wait(event):
        if event["event"] == "step" and event["step"] == 2:
            os.write(writing, b".")
            time.sleep(600)

    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # as in `in_a_child`
            train(base, out, steps=4, checkpoint_every=every, listener=wait)
        finally:
            os._exit(1)
    try:
        assert select.select([reading], [], [], 120)[0], "it hangs"
        half, before = out / "state" / ".step_00000003-abcdefgh", (out / "log.jsonl").read_bytes()
        half.mkdir(parents=True)
        for resume in (False, True):
            with pytest.raises(XFusionError) as error:
                train(base, out, steps=4, resume=resume)
            assert str(error.value) == (
                f"{out} is being written by another run (run.lock is held): wait for its end, stop it, or name another folder"
            )
        assert half.is_dir() and (out / "log.jsonl").read_bytes() == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    train(base, out, steps=4, resume=not every)
    assert [event["step"] for event in log(out)] == [0, 1, 2, 3]
    assert not half.exists()


def test_a_folder_that_was_made_for_a_run_that_is_refused_goes_again(bases, tmp_path):
    with pytest.raises(XFusionError, match="there is no pack"):
        train(bases["llama"], tmp_path / "run", from_pack=str(tmp_path / "nothing"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(XFusionError, match="holds no run to resume"):
        train(bases["llama"], tmp_path / "mine", resume=True)
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_run_of_an_earlier_xfusion_goes_on(bases, tmp_path):
    """It had one state, without hashes, in the folder itself."""
    base = bases["llama"]
    train(base, tmp_path / "straight", steps=6)
    with pytest.raises(Interrupted):
        train(base, tmp_path / "run", steps=6, listener=StopAt(2))
    folder = tmp_path / "run" / "state"
    (state,) = states.list_states(folder)
    plan = json.loads((state / "state.json").read_text())
    for name in ("sha256", "state_sha256", "stage", "recent", "loss"):
        del plan[name]
    (folder / "state.json").write_text(json.dumps(plan))
    shutil.move(state / "state.safetensors", folder)
    shutil.rmtree(state)
    train(base, tmp_path / "run", steps=6, resume=True)
    assert step_records(tmp_path / "run") == step_records(tmp_path / "straight")
    assert [path.name for path in folder.iterdir()] == ["step_00000006"]


def test_another_number_of_threads_is_said(bases, tmp_path, caplog, monkeypatch):
    train(bases["llama"], tmp_path, steps=2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with caplog.at_level(logging.WARNING):
        train(bases["llama"], tmp_path, steps=2, resume=True)
    assert "goes on with 7: sums round otherwise" in caplog.text


def test_a_log_that_was_cut_off_is_mended(bases, tmp_path):
    """A line may end in a brace and be half a line all the same."""
    with pytest.raises(Interrupted):
        train(bases["llama"], tmp_path / "run", steps=4, listener=StopAt(1))
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 1, "losses": {"next_token": 1.0}')
    train(bases["llama"], tmp_path / "run", steps=4, resume=True)
    train(bases["llama"], tmp_path / "straight", steps=4)
    assert step_records(tmp_path / "run") == step_records(tmp_path / "straight")


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_of_a_step_waits_for_its_end(bases, tmp_path, monkeypatch, number, code):
    """The weights are the next step's and the average is not: a state of that moment could not go on as the run did."""
    base, steps, real = bases["llama"], [], optimizer.get_ema_multi_avg_fn

    def average(decay):
        steps.append(decay)
        if len(steps) == 3:
            os.kill(os.getpid(), number)
        return real(decay)

    monkeypatch.setattr(optimizer, "get_ema_multi_avg_fn", average)
    monkeypatch.setattr(
        signal, "getsignal", lambda n: signal.default_int_handler
    )  # pytest's own shell may ignore Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Interrupted, match="stopped at step 3; go on with --resume") as stopped:
            train(base, tmp_path / "run", steps=6)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == code
    assert plan_of(tmp_path / "run")["step"] == 3
    train(base, tmp_path / "run", steps=6, resume=True)
    train(base, tmp_path / "straight", steps=6)
    assert step_records(tmp_path / "run") == step_records(tmp_path / "straight")
    assert same(state_of(tmp_path / "run"), state_of(tmp_path / "straight"))
    assert same(pack_of(tmp_path / "run"), pack_of(tmp_path / "straight"))


def test_a_second_signal_stops_at_once_and_leaves_the_last_checkpoint(bases, tmp_path):
    def twice(event):
        if event["event"] == "step" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(bases["llama"], tmp_path, steps=6, checkpoint_every=0, listener=twice)
    assert not isinstance(stopped.value, Interrupted)
    assert steps(tmp_path / "state")[0] == 2
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("when", ["save_file", "write_pack"])
def test_a_signal_behind_the_last_step_finds_the_run_finished(bases, tmp_path, monkeypatch, when):
    """State and pack are being written; what follows them is done, too: the last preview and the end of the log."""
    module = states if when == "save_file" else outputs
    real = getattr(module, when)
    monkeypatch.setattr(
        module, when, lambda *args, **more: (os.kill(os.getpid(), signal.SIGTERM), real(*args, **more))[1]
    )
    train(bases["llama"], tmp_path, steps=3, preview_every=300, preview_prompts=("a red square",))
    assert [e["step"] for e in log(tmp_path, "end")] == [3] and (tmp_path / "previews" / "step_000003.png").is_file()
    assert xfusion.load(tmp_path / "pack", backbone=bases["llama"]).recorded


def test_only_the_main_thread_listens_to_signals():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def elsewhere():
        with stopping(announce=False) as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.signal))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


# ------------------------------------------------------------------------------------------- what takes no more bytes


def in_a_child(work) -> str:
    """What stopped `work` in a process of its own, whose limits and rights may be spoilt; at most two minutes."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # makes torch's pool anew; of threads that did so at once, one would find none
            work()
            told = "nothing"
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(writing, told.encode())
        os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], 120)
    try:
        assert ready, "it hangs"
        return os.read(reading, 10_000).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)


@linux
@pytest.mark.parametrize(
    ("limit", "every", "named"), [(500, 300.0, "run/log.jsonl"), (20_000, 0.0, "run/state/step_00000001")]
)
def test_a_disk_that_takes_no_more_stops_in_one_line(bases, tmp_path, limit, every, named):
    """A limit on the size of a file is what a test may set without a disk of its own; the writes fail for real."""
    base, out = bases["llama"], tmp_path / "run"

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        train(base, out, steps=60, checkpoint_every=every)

    said = in_a_child(work)
    assert said.startswith(f"XFusionError: {tmp_path}/{named} cannot be written: ") and "File too large" in said, said
    assert said.endswith("; make room, or name another folder") and "\n" not in said
    assert not list(out.rglob(".step*")) and not (out / "pack").exists()
    assert states.list_states(out / "state") == []
    train(base, out, steps=2)  # room was made
    assert plan_of(out)["step"] == 2


@linux
def test_a_disk_that_fills_up_later_keeps_the_last_state_and_the_pack(bases, tmp_path):
    base, out = bases["llama"], tmp_path / "run"
    with pytest.raises(Interrupted):
        train(base, out, steps=4, listener=StopAt(1))
    before = pack_of(out)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        train(base, out, steps=4, resume=True)

    said = in_a_child(work)
    assert "run/state/step_00000004 cannot be written: " in said and "File too large" in said, said
    assert plan_of(out)["step"] == 2 and same(pack_of(out), before)
    assert [path.name for path in out.rglob(".*")] == []
    xfusion.load(out / "pack", backbone=base)
    train(base, out, steps=4, resume=True)
    assert [event["step"] for event in log(out)] == [0, 1, 2, 3]


@linux
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_is_read_only_is_named(bases, tmp_path, resume):
    base, out = bases["llama"], tmp_path / "run"
    if resume:
        train(base, out, steps=2)
    else:
        out.mkdir()
    out.chmod(0o555)

    def work():
        if not os.geteuid():  # whom no folder is read-only for
            for folder in (tmp_path, *tmp_path.parents[:3]):  # a worker's own folder is among them
                folder.chmod(0o755)
            os.seteuid(65534)
        train(base, out, steps=2, resume=resume)

    said = in_a_child(work)
    out.chmod(0o755)
    assert said == f"XFusionError: {out} cannot be written: Permission denied; make room, or name another folder"


def test_a_file_is_no_folder_of_a_run(bases, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(XFusionError, match="run cannot be written: a file stands where a folder is needed; make room"):
        loop.train(recipe(bases["llama"]), out=tmp_path / "run")
