"""Runs functions in several processes of this machine that are imported once: forked, each with its rank."""

import os
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
from contracts.table import Noise, make_base, model_config
from rich.console import Console

from xfusion.backbone import Backbone
from xfusion.data.mixture import MixtureConfig
from xfusion.training import loop
from xfusion.training.stages import Recipe, Stage
from xfusion.training.stopping import Interrupted


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(count: int, function) -> None:
    """Call ``function`` in ``count`` processes and wait for all; the first failure ends this program."""
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
    for child in children:
        if os.waitpid(child, 0)[1]:
            sys.exit(f"a process of {count} failed")


def run(folder: Path, name: str, *, resume=False, steps=12, stop=None, told=None, shard="none", **mixture) -> None:
    base = Backbone.load(str(folder / "base"))
    config = MixtureConfig(**{"draw": 6, "caption": 4, "pack": 2, **mixture})
    stage = Stage(steps=steps, warmup=3, mixture=config)
    recipe = Recipe(model=model_config(base), data="noise", stages=(stage,))

    def listen(event):
        if event["event"] == "step" and event["step"] == stop:
            os._exit(0)  # as kill -9 would
        if event["event"] == "step" and (event["step"], int(os.environ["RANK"])) == told:
            os.kill(os.getpid(), signal.SIGTERM)

    loop.train(
        recipe,
        out=folder / name,
        source=Noise(),
        backbone=base,
        compile=False,
        dtype=torch.float32,
        preview_every=0,
        checkpoint_every=0 if stop else 300,
        resume=resume,
        shard=shard,
        listener=listen,
        console=Console(file=(folder / f"{name}.{os.environ['RANK']}.txt").open("w"), width=200),
    )


def run_told(folder: Path, name: str) -> None:
    """The second process alone gets a signal, behind step 4."""
    try:
        run(folder, name, told=(4, 1))
    except Interrupted as stop:
        (folder / f"{name}.{os.environ['RANK']}.code").write_text(str(stop.code))


def main(folder: Path) -> None:
    make_base("llama", folder / "base")
    for count in (1, 2, 4):
        together(count, lambda count=count: run(folder, f"of_{count}"))
    # One row of captioning and one drawing: of four processes, two or three hold nothing at all.
    for count in (1, 4):
        together(count, lambda count=count: run(folder, f"few_{count}", draw=1, caption=2, pack=2, steps=4))
    together(2, lambda: run_told(folder, "told_2"))
    shutil.copytree(folder / "told_2", folder / "told_2_on_1")
    together(1, lambda: run(folder, "told_2_on_1", resume=True))
    # All of them die at step 7; others go on.
    together(2, lambda: run(folder, "died_2", stop=6))
    for count in (1, 4):
        shutil.copytree(folder / "died_2", folder / f"died_2_on_{count}")
        together(count, lambda count=count: run(folder, f"died_2_on_{count}", resume=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
