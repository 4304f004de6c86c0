"""Runs functions in several processes of this machine that are imported once: forked, each with its rank."""

import gc
import importlib
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from contracts.table import Noise, make_base, model_config
from rich.console import Console

from xfusion.backbone import Backbone
from xfusion.data.mixed import Mixed
from xfusion.data.mixture import MixtureConfig
from xfusion.data.sequence import XFusionError
from xfusion.data.templates import Templates
from xfusion.objectives.contrastive import Contrastive
from xfusion.objectives.flow_matching import FlowMatching
from xfusion.training import loop, processes, setup, states
from xfusion.training.pace import Pace
from xfusion.training.stages import Recipe, Stage
from xfusion.training.stopping import Interrupted
from xfusion.training.track import Track

GOES_ON = (
    ("new_on_2", "new", 2, "new"),
    ("all_on_2", "all", 2, "all"),
    ("all_on_4", "all", 4, "new"),
    ("new_on_4_whole", "new", 4, "none"),
    ("whole_on_2", "none", 2, "all"),
)
"""Name of a run, what had been divided when it died, and how many processes go on dividing what."""
KILLS = 5
"""Runs of each way to divide of which a process is killed."""
WRITES_OF_A_RUN = 30
"""About as many times the first process writes in six steps with a state each."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def together(count: int, function, *, dies: int | None = None) -> None:
    """Call ``function`` in ``count`` processes and wait for all; a failure, but of the one that dies, ends this program."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    children = []
    for rank in range(count):
        if child := os.fork():
            children.append(child)
            continue
        os.environ["RANK"] = str(rank)
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    for rank, child in enumerate(children):
        if rank != dies and os.waitpid(child, 0)[1]:
            sys.exit(f"a process of {count} failed")
    if dies is not None:
        os.kill(children[dies], signal.SIGKILL)  # it may stand still
        os.waitpid(children[dies], 0)


def killed_together(count: int, function, rng: random.Random, seconds: float, writes: int) -> bool:
    """Call ``function`` in ``count`` processes of which one kills itself by SIGKILL: at a moment of the clock that a run
    of ``seconds`` has, or in one of its first ``writes``. The others notice and end by themselves. Returns whether one was killed
    before all were done.
    """
    from training.test_kills import kill_at

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    dies_writing, victim = rng.random() < 0.5, rng.randrange(count)
    write_number, delay, children = rng.randint(1, writes), rng.uniform(0.2 * seconds, seconds), {}
    for rank in range(count):
        if child := os.fork():
            children[child] = rank
            continue
        os.environ["RANK"] = str(rank)
        try:
            if dies_writing and rank == victim:
                kill_at(write_number, rng)
            function()
        except BaseException:
            os._exit(1)
        os._exit(0)
    start, killed, is_sent = time.monotonic(), False, False
    while children:
        assert time.monotonic() - start < 180, "a process waits for one that was killed"
        if not dies_writing and not is_sent and time.monotonic() - start > delay:
            is_sent = True
            for child, rank in children.items():
                if rank == victim:
                    os.kill(child, signal.SIGKILL)
        for child in list(children):
            finished_child, status = os.waitpid(child, os.WNOHANG)
            if finished_child:
                killed |= os.WIFSIGNALED(status)
                del children[child]
        time.sleep(0.01)
    return killed


def run(
    folder: Path,
    name: str,
    *,
    resume=False,
    steps=12,
    exit_step=None,
    sigterm_at=None,
    shard="none",
    fusion="dual tower",
    preview=False,
    dtype=torch.float32,
    compile=False,
    activation_checkpointing=False,
    always_save=False,
    minutes=None,
    lost_by=None,
    patience=30.0,
    skip_nonfinite=0,
    extra=(),
    data=None,
    mixed=(),
    allow_bad=0.0,
    **mixture,
) -> None:
    base = Backbone.load(str(folder / "base"))
    config = MixtureConfig(**{"draw": 6, "caption": 4, "pack": 2, **mixture})
    stage = Stage(steps=steps, warmup=3, mixture=config, activation_checkpointing=activation_checkpointing)
    recipe = Recipe(model=replace(model_config(base, fusion), extra=extra), data=data or "noise", stages=(stage,))

    def listen(event):
        if event["event"] == "step" and event["step"] == exit_step:
            os._exit(0)  # as kill -9 would
        if lost_by and event["event"] == "step" and (event["step"], int(os.environ["RANK"])) == (3, 1):
            os.kill(os.getpid(), lost_by)
        if event["event"] == "step" and (event["step"], int(os.environ["RANK"])) == sigterm_at:
            os.kill(os.getpid(), signal.SIGTERM)

    source = Mixed("many+few", [Noise(6), Noise(4)], [*map(Fraction, mixed)]) if mixed else Noise()
    fingerprint = base.compute_fingerprint()
    model = loop.train(
        recipe,
        out=folder / name,
        source=None if data else source,
        allow_bad=allow_bad,
        backbone=base,
        compile=compile,
        dtype=dtype,
        preview_every=1e-6 if preview else 0,
        preview_prompts=("a red square",) if preview else None,
        checkpoint_every=0 if exit_step or always_save else 300,
        resume=resume,
        minutes=minutes,
        shard=shard,
        patience=patience,
        skip_nonfinite=skip_nonfinite,
        listener=listen,
        console=Console(file=(folder / f"{name}.{os.environ['RANK']}.txt").open("w"), width=200),
    )
    # Whatever was divided: the base and its storage are as they were, and words go through it to the bit as before.
    assert base.compute_fingerprint() == fingerprint and model.backbone is base
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model.text_logits(ids, stack="fused"), base.model(ids).logits)


def run_told(folder: Path, name: str, step: int = 4, **settings) -> None:
    """The second process alone gets a signal, behind a step."""
    try:
        run(folder, name, sigterm_at=(step, 1), **settings)
    except Interrupted as stop:
        (folder / f"{name}.{os.environ['RANK']}.code").write_text(str(stop.code))


class LatePace(Pace):
    """A clock by which the speed is known a few steps later than by the others'; what else the machine does is not on it."""

    def seconds_per_step(self, step, now, deadline):
        own_step = step - 3 * int(os.environ["RANK"])
        return super().seconds_per_step(own_step, 0.05 * own_step, float("inf"))


def run_late(folder: Path, name: str) -> None:
    """A wall-clock budget where the processes' clocks disagree."""
    loop.Pace = LatePace
    run(folder, name, minutes=0.05, draw=1, caption=2)


def run_lost(folder: Path, name: str, **settings) -> None:
    """A process is lost; each other one says so."""
    processes.ROLL_CALL = timedelta(seconds=3)
    try:
        run(folder, name, **settings)
    except XFusionError as error:
        (folder / f"{name}.{os.environ['RANK']}.said").write_text(str(error))


def run_lost_early(folder: Path, name: str) -> None:
    """The second process is killed while it opens the data."""
    if os.environ["RANK"] == "1":
        setup.open_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    run_lost(folder, name)


def run_skipping(folder: Path, name: str, **settings) -> None:
    """The losses of steps 3 and 8 are not finite in the last process."""
    losses = loop._Run._losses

    def broken_losses(self, batch, generator):
        found, zero = losses(self, batch, generator)
        if self.progress.step in (3, 8) and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            found = {name: (total * float("nan"), count) for name, (total, count) in found.items()}
        return found, zero

    loop._Run._losses = broken_losses
    run(folder, name, skip_nonfinite=2, **settings)


def run_twice(folder: Path, name: str, shard: str) -> None:
    """A folder that holds a run is refused by the first process, and the second says nothing else."""
    try:
        run(folder, name, shard=shard)
    except XFusionError as error:
        (folder / f"{name}.{os.environ['RANK']}.said").write_text(f"{error.reported_elsewhere} {error}")


def run_spoilt(folder: Path, name: str, spoil, rank: int, **settings) -> None:
    """A run of which one process is spoilt; what each says when it stops."""
    own_rank = int(os.environ["RANK"])
    if own_rank == rank:
        spoil(folder / name)
    try:
        run(folder, name, steps=6, always_save=True, **settings)
    except XFusionError as error:
        (folder / f"{name}.{own_rank}.said").write_text(f"{error.reported_elsewhere} {error}")


def full(out: Path) -> None:
    """No file may become large: what a test may set without a disk of its own; the writes fail for real."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def full_log(out: Path) -> None:
    """The disk of the log takes nothing."""
    Track._open = lambda *_: Path("/dev/full").open("a", buffering=1)  # noqa: SIM115 - as the log is


def blocked(out: Path) -> None:
    """No folder of states can be made."""
    out.mkdir()
    (out / "state").touch()


def not_finite(out: Path) -> None:
    """From step 3 on."""
    loss, calls = FlowMatching.loss, []

    def broken_loss(self, run, batch):
        losses = loss(self, run, batch)
        calls.append(1)
        is_late = len(calls) > 2 * (1 + 3)  # one more: the largest step was tried
        return {name: (total * float("nan"), n) for name, (total, n) in losses.items()} if is_late else losses

    FlowMatching.loss = broken_loss


def whole(folder: Path) -> None:
    """Every process holds all weights."""
    make_base("llama", folder / "base")
    for count in (1, 2, 4):
        together(count, lambda count=count: run(folder, f"of_{count}"))
    # One row of captioning and one drawing: of four processes, two or three hold nothing at all.
    for count in (1, 4):
        together(count, lambda count=count: run(folder, f"few_{count}", draw=1, caption=2, pack=2, steps=4))
    # Five pairs in three rows: each is contrasted with those of all processes, and of four one has none.
    pairs = {"draw": 5, "caption": 0, "pack": 2, "steps": 4, "templates": Templates(caption_dropout=0.0)}
    for count in (1, 2, 4):
        name, extra = f"pairs_{count}", (Contrastive.Config(width=16),)
        together(count, lambda count=count, name=name, extra=extra: run(folder, name, extra=extra, **pairs))
    # Each source of a mixture has losses of its own weight: of four processes, some have no row of one of them.
    for count in (1, 2, 4):
        weights = {"mixed": (2, 1), "loss_weights": (1.0, 0.2), "steps": 4}
        together(count, lambda count=count, weights=weights: run(folder, f"weights_{count}", **weights))
    together(2, lambda: run(folder, "again_2", activation_checkpointing=True))
    shutil.copytree(folder / "of_2", folder / "of_2_twice")
    together(2, lambda: run_twice(folder, "of_2_twice", "none"))
    together(2, lambda: run_late(folder, "late_2"))
    together(2, lambda: run_lost(folder, "lost_2", lost_by=signal.SIGKILL), dies=1)
    together(3, lambda: run_lost(folder, "stalled_3", lost_by=signal.SIGSTOP, patience=0.15, always_save=True), dies=1)
    together(2, lambda: run_lost_early(folder, "lost_early_2"), dies=1)
    together(1, lambda: run_skipping(folder, "skipping_1"))
    together(2, lambda: run_skipping(folder, "skipping_2", exit_step=5))
    together(2, lambda: run_skipping(folder, "skipping_2", resume=True))
    together(2, lambda: run_told(folder, "told_last_2", 11))
    together(2, lambda: run_told(folder, "told_2"))
    shutil.copytree(folder / "told_2", folder / "told_2_on_1")
    together(1, lambda: run(folder, "told_2_on_1", resume=True))
    for name, spoil, rank in SPOILT:
        together(2, partial(run_spoilt, folder, name, spoil, rank))
    # All of them die at step 7; others go on.
    together(2, lambda: run(folder, "died_2", exit_step=6))
    for count in (1, 4):
        shutil.copytree(folder / "died_2", folder / f"died_2_on_{count}")
        together(count, lambda count=count: run(folder, f"died_2_on_{count}", resume=True))


def some_divided(folder: Path) -> None:
    """The little that every change is tested by."""
    make_base("llama", folder / "base")
    together(1, lambda: run(folder, "of_1"))
    together(2, lambda: run_told(folder, "all_2", 2, shard="all"))
    shutil.copytree(folder / "all_2", folder / "all_2_twice")
    together(2, lambda: run_twice(folder, "all_2_twice", "all"))
    together(2, lambda: run_lost(folder, "lost_2", lost_by=signal.SIGKILL, shard="all"), dies=1)
    together(2, lambda: run_skipping(folder, "skipping_2", shard="new"))
    for name, spoil, rank in SPOILT_DIVIDED:
        together(2, partial(run_spoilt, folder, name, spoil, rank, shard="new"))
    shutil.copytree(folder / "all_2", folder / "all_2_on_1")
    together(1, lambda: run(folder, "all_2_on_1", resume=True))
    few_samples = {"draw": 1, "caption": 2, "pack": 2, "steps": 2}
    together(1, lambda: run(folder, "few_1", **few_samples))
    together(2, lambda: run(folder, "few_2", shard="new", **few_samples))
    # The one drawing of the second source and a filler row are a batch of their own: one process has the filler alone.
    rare = {"mixed": (31, 1), "loss_weights": (1.0, 0.5), "draw": 32, "caption": 0, "pack": 1, "steps": 2}
    together(1, lambda: run(folder, "rare_1", **rare))
    together(2, lambda: run(folder, "rare_2", shard="new", **rare))


SPOILT = (
    ("full_2", full, 0),
    ("full_log_2", full_log, 0),
    ("blocked_2", blocked, 0),
    ("not_finite_2", not_finite, 1),
)
"""Name of a run, what spoils a process of it, and which."""
SPOILT_DIVIDED = (("full_2", full, 1), ("blocked_2", blocked, 0))


def often(folder: Path) -> None:
    """What the default tier asks for, in one program."""
    for part in (whole, some_divided):
        part_folder = folder / part.__name__
        part_folder.mkdir()
        part(part_folder)


def divided(folder: Path) -> None:
    """Both ways to divide, by two and four, with states that go over to the other."""
    make_base("llama", folder / "base")
    gates = {"steps": 2, "fusion": "flamingo", "draw": 0}  # single numbers among its weights
    few_samples = {"draw": 1, "caption": 2, "pack": 2, "steps": 2, "preview": True}
    together(1, lambda: run(folder, "of_1", steps=6))
    together(1, lambda: run(folder, "gates_1", **gates))
    together(1, lambda: run(folder, "few_1", **few_samples))
    for shard in ("new", "all"):
        together(2, lambda shard=shard: run(folder, f"{shard}_2", steps=6, shard=shard))
        together(2, lambda shard=shard: run(folder, f"{shard}_died", steps=6, shard=shard, exit_step=3))
        together(2, lambda shard=shard: run(folder, f"{shard}_gates", shard=shard, **gates))
        together(4, lambda shard=shard: run(folder, f"{shard}_few", shard=shard, **few_samples))
    together(2, lambda: run(folder, "none_died", steps=6, exit_step=3))
    for name, first_shard, count, next_shard in GOES_ON:
        shutil.copytree(folder / f"{first_shard}_died", folder / name)
        together(
            count,
            lambda name=name, next_shard=next_shard: run(folder, name, steps=6, shard=next_shard, resume=True),
        )


def killed(folder: Path) -> None:
    """Two processes that divide weights; one dies by SIGKILL at a random moment, and the same command goes on."""
    make_base("llama", folder / "base")
    for shard in ("new", "all"):
        start = time.monotonic()
        together(2, partial(run, folder, f"{shard}_straight", shard=shard, steps=6, always_save=True))
        seconds = time.monotonic() - start
        for number in range(KILLS):
            name, rng = f"{shard}_killed_{number}", random.Random(f"{shard}/{number}")
            command = partial(run, folder, name, shard=shard, steps=6, always_save=True)
            # The first process writes most, the others a file of shares at a time: who was done tries an earlier write.
            for writes in (WRITES_OF_A_RUN, WRITES_OF_A_RUN, 12, 6, 3, 1):
                if killed_together(2, command, rng, seconds, writes):
                    break
                shutil.rmtree(folder / name)
            else:
                sys.exit(f"{name}: six runs were over before one could be killed")
            together(2, partial(command, resume=bool(states.list_states(folder / name / "state"))))


def killed_writing(folder: Path) -> None:
    """A single process that is killed when half of its third state is on the disk."""
    from training.test_kills import waited

    make_base("llama", folder / "base")
    together(1, partial(run, folder, "straight", steps=6))
    child = os.fork()
    if not child:
        paths, save = [], states.save_file

        def save_and_die(tensors, path):
            save(tensors, path)
            paths.append(path)
            if len(paths) == 3:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        states.save_file = save_and_die
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
        run(folder, "run", steps=6, always_save=True)
        os._exit(1)
    assert os.WIFSIGNALED(waited(child))


def resumed(folder: Path) -> None:
    """One of the processes that go on from there."""
    run(folder, "run", steps=6, resume=True)


def unreadable(folder: Path) -> None:
    """A picture that turns out broken in the rows of one process, and is left out by both; and one too many for both."""
    make_base("llama", folder / "base")
    data = str(folder / "shards.parquet")
    for count in (1, 2):
        together(count, lambda count=count: run(folder, f"of_{count}", steps=6, data=data, allow_bad=0.1))
    together(2, lambda: run_refused(folder, "refused_2", data))
    shutil.copytree(folder / "refused_2", folder / "refused_2_on_1")
    together(1, lambda: run(folder, "refused_2_on_1", steps=6, data=data, allow_bad=0.1, resume=True))


def run_refused(folder: Path, name: str, data: str) -> None:
    """A run that allows nothing bad."""
    try:
        run(folder, name, steps=6, data=data)
    except XFusionError as error:
        (folder / f"{name}.{os.environ['RANK']}.said").write_text(str(error))


def compiled(folder: Path) -> None:
    """Compiled layers in the precision of GPUs and of processors that have it."""
    make_base("llama", folder / "base")
    for count, shard in ((1, "none"), (2, "new"), (2, "all")):
        together(
            count,
            lambda shard=shard: run(folder, shard, steps=3, shard=shard, compile=True, dtype=torch.bfloat16),
        )


if __name__ == "__main__":
    # Here and not in each of the processes that are forked; nor need they look over what is imported, page by page.
    for module in ("torch.distributed.checkpoint", "torch.utils.tensorboard", "xfusion.training.sharding"):
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    works = (often, divided, killed, killed_writing, resumed, unreadable, compiled)
    {f.__name__: f for f in works}[sys.argv[2]](Path(sys.argv[1]))
