"""Runs that are killed by SIGKILL at random moments, also while they write, go on as if nothing had been."""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from training.runs import StopAt, pack_of, same, state_of, step_records, train

import xfusion
from xfusion import checkpoint
from xfusion.data.sequence import XFusionError
from xfusion.training import states
from xfusion.training.stopping import Interrupted

STEPS = 8
WRITES = (
    (states, "save_file"),
    (checkpoint, "save_file"),
    (Path, "write_text"),
    (Path, "rename"),
    (Path, "replace"),
    (os, "fsync"),
    (shutil, "rmtree"),
)
"""All that a run writes by, apart from lines of its log."""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a process that uses torch is forked safely on Linux alone"
)


class Straight(NamedTuple):
    """The run that nobody killed."""

    out: Path
    seconds: float
    num_writes: int


def run(base, out, **settings):
    return train(base, out, steps=STEPS, checkpoint_every=0, **settings)


@pytest.fixture(scope="module")
def straight(bases, tmp_path_factory):
    out, calls = tmp_path_factory.mktemp("straight"), []
    run(bases["llama"], tmp_path_factory.mktemp("warm"))  # what is imported and looked up once does not count
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in WRITES:
            patch.setattr(owner, name, counted(getattr(owner, name), calls))
        begun = time.perf_counter()
        run(bases["llama"], out, keep=STEPS)
        seconds = time.perf_counter() - begun
    assert len(states.list_states(out / "state")) == STEPS
    return Straight(out, seconds, len(calls))


def counted(function, calls):
    def call(*args, **kwargs):
        calls.append(function)
        return function(*args, **kwargs)

    return call


def kill_at(number, rng):
    """Let this process kill itself at its write ``number``: before it, behind it, or when half of the bytes are there."""
    calls, when = [], rng.choice(["before", "half", "behind"])

    def dying(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) < number:
                return function(*args, **kwargs)
            if when != "before":
                function(*args, **kwargs)
            if when == "half" and (file := written(function, args)):
                os.truncate(file, int(rng.random() * os.path.getsize(file)))
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    for owner, name in WRITES:
        setattr(owner, name, dying(getattr(owner, name)))


def written(function, args):
    """The file that a call has written, where it has."""
    return {"save_file": args[-1], "write_text": args[0]}.get(function.__name__)


def forked(work) -> int:
    """A child of this process that does some work; why it failed, if it does, is in what pytest captured."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # makes torch's pool anew; of threads that did so at once, one would find none
            work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)  # nothing of pytest shall go on here
    return child


def killed(base, out, straight, rng, kind) -> None:
    """Start a run and kill it: by the clock, or in the middle of a write."""
    for _ in range(5):
        delay, number = rng.uniform(0, straight.seconds), rng.randint(1, straight.num_writes)

        def work(number=number):
            if kind == "writing":
                kill_at(number, rng)
            run(base, out)

        child = forked(work)
        if kind == "clock":
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(waited(child)):
            return
        shutil.rmtree(out)  # the run was faster than the clock
    pytest.fail("five runs in a row were over before they could be killed")


def waited(child, seconds=120.0) -> int:
    """The status of a child that ends in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the run hangs")


def check_what_is_left(base, out, straight) -> None:
    """Each folder, hidden ones too, is what the straight run wrote, or is refused."""
    for folder in [path for path in out.rglob("*") if path.is_dir()]:
        try:
            plan, tensors = states.read(folder)
        except XFusionError:
            pass
        else:
            assert same(tensors, states.read(straight.out / "state" / f"step_{plan['step']:08d}")[1])
        try:
            model = xfusion.load(folder, backbone=base)
        except XFusionError:
            continue
        assert same(model.learned_state(), pack_of(straight.out))
    for state in states.list_states(out / "state"):  # what has its name is whole
        states.read(state)


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        pytest.param(kind, seed, marks=() if seed == 0 else pytest.mark.full)
        for seed in range(10)
        for kind in ("clock", "writing")
    ],
)
def test_a_killed_run_goes_on_to_the_same_losses(bases, straight, tmp_path, kind, seed):
    base, out = bases["llama"], tmp_path / "run"
    killed(base, out, straight, random.Random(f"{kind}/{seed}"), kind)
    check_what_is_left(base, out, straight)
    run(base, out, resume=bool(states.list_states(out / "state")))
    assert step_records(out) == step_records(straight.out)
    assert same(state_of(out), state_of(straight.out))
    assert same(pack_of(out), pack_of(straight.out))
    assert [path for path in out.rglob(".*") if path.is_dir()] == []


def test_a_kill_between_two_packs_loses_neither(bases, straight, tmp_path):
    """The run of a pack goes on, and is killed when the old pack has lost its name and the new one has none."""
    base, out = bases["llama"], tmp_path / "run"
    with pytest.raises(Interrupted):
        run(base, out, listener=StopAt(3))
    before = pack_of(out)

    def work():
        rename = Path.rename

        def dying(self, target):
            rename(self, target)
            if self == out / "pack":
                os.kill(os.getpid(), signal.SIGKILL)

        Path.rename = dying
        run(base, out, resume=True)

    child = forked(work)
    assert os.WIFSIGNALED(waited(child)) and not (out / "pack").exists()
    assert same(xfusion.load(out, backbone=base).learned_state(), before)
    run(base, out, resume=True)
    assert step_records(out) == step_records(straight.out) and same(pack_of(out), pack_of(straight.out))
    assert [path for path in out.rglob(".*") if path.is_dir()] == []
