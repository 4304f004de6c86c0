"""Time to the same loss: our joint step against that of transfusion-pytorch at the LLM's shape, in one run.

    python benchmarks/time_to_loss.py

Both train on the same samples in the same order, 4 drawings and 2 names a step, in turns of some seconds, so that other load
affects both; each is warm before its clock starts. The loss is the next-token loss in nats per token on 32 fixed names of
held-out pictures, whose groups were never trained on. The drawing losses of the two are different quantities and are not
compared. The peer is trained at two rates, one after the other to save memory, each in turns with a new run of ours, and the
one with the lower final loss is kept. Writes benchmarks/results/time_to_loss.json, which `python docs/pages.py speed` draws.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from xfusion.apps.bench.base import Bench, Step
from xfusion.apps.bench.transfusion import Peer, build_peer
from xfusion.data.mixture import Mixture
from xfusion.data.sources import open_source
from xfusion.evaluation.machine import origin
from xfusion.recipes.xfusion import demo
from xfusion.storage import write_json

RESULT = Path(__file__).parent / "results" / "time_to_loss.json"
WARMUP = 10
"""Steps over which a rate rises."""


@dataclass(frozen=True)
class Settings:
    """What is trained, and how long."""

    data: str = "emoji:128"
    """The pictures."""
    seconds: float = 150.0
    """Training of each."""
    turn: float = 20.0
    """Training of each in a turn."""
    rates: tuple[float, ...] = (1e-4, 3e-4)
    """The peer's; ours is the demo's own."""
    draw: int = 4
    """Drawings of a step, half as many names beside them: as few as leave the peer a hundred steps."""
    names: int = 32
    """Names of held-out pictures that the loss is taken on."""
    compile: bool = True
    """Compile the per-layer work, as training does."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = RESULT
    """Where the result goes."""


def names_of(bench: Bench, step: Step, count: int) -> Mixture:
    """A mixture whose step 0 is so many names of held-out pictures."""
    base, mixture = step.model.backbone, replace(bench.stage.mixture, draw=0, caption=count)
    image, held_out = step.model.image, open_source(bench.source.spec, split="held")
    return Mixture(held_out, image, image.sizes, base.encode, base.begin_ids, base.end_id, mixture, 1)


@torch.no_grad()
def our_loss(step: Step, names: Mixture) -> float:
    """Nats per token."""
    total, count, generator = 0.0, 0, torch.Generator().manual_seed(0)
    with step.model.using(step.engine):
        for batch in names.batches(0):
            loss, number = step.model.losses(batch, generator)["next_token"]
            total, count = total + float(loss), count + int(number)
    return total / count


def train(step: Step | Peer, num_steps: int, rate: float, seconds: float) -> tuple[int, float]:
    """Train for some seconds, after ``num_steps`` earlier steps; returns the steps so far and the seconds that it took."""
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        num_steps += 1
        step.rate = rate * min(1.0, num_steps / WARMUP)
        step()
    return num_steps, time.perf_counter() - start


Curve = list[tuple[float, float]]
"""Seconds of training and the loss there."""


def in_turns(bench: Bench, settings: Settings, rate: float) -> dict[str, tuple[Curve, int]]:
    """Ours and the peer at a rate: the curve and the steps of each."""
    ours = Step(bench, bench.model(), draw=settings.draw, caption=settings.draw // 2)
    names = names_of(bench, ours, settings.names)
    peer = build_peer(bench, ours, bench.backbone.hidden_size)
    works: dict[str, tuple[Step | Peer, float, Callable[[], float]]] = {
        "xfusion": (ours, demo().stages[0].rate, lambda: our_loss(ours, names)),
        "transfusion-pytorch": (peer, rate, lambda: peer.nats(names.samples(0))),
    }
    curves: dict[str, Curve] = {}
    steps = dict.fromkeys(works, 0)
    for name, (step, _, loss) in works.items():
        step.rate = 0.0  # warm, and nothing learned
        step.warm()
        step.period = None
        curves[name] = [(0.0, loss())]
    while min(curve[-1][0] for curve in curves.values()) < settings.seconds:
        for name, (step, own_rate, loss) in works.items():
            steps[name], elapsed = train(step, steps[name], own_rate, settings.turn)
            curves[name].append((curves[name][-1][0] + elapsed, loss()))
            seconds, last_loss = curves[name][-1]
            print(
                json.dumps({"name": name, "rate": own_rate, "seconds": round(seconds, 1), "loss": last_loss}),
                flush=True,
            )
    return {name: (curves[name], steps[name]) for name in works}


def main(settings: Settings) -> None:
    """Train in turns, write."""
    provenance, bench, runs = origin("benchmarks"), Bench.of(None, settings.data, compile=settings.compile), {}
    for rate in settings.rates:
        runs[rate] = in_turns(bench, settings, rate)
        gc.collect()
    rate = min(runs, key=lambda rate: runs[rate]["transfusion-pytorch"][0][-1][1])
    curves = {name: curve for name, (curve, _) in runs[rate].items()}
    seconds, peer_loss = curves["transfusion-pytorch"][-1]
    first = next((at for at, loss in curves["xfusion"] if loss <= peer_loss), None)
    result = {
        **provenance,
        "data": settings.data,
        "samples_per_step": settings.draw + settings.draw // 2,
        "peer": f"transfusion-pytorch, rate {rate:g}",
        "loss_reached_by_the_peer": peer_loss,
        "seconds_of_the_peer": seconds,
        "our_seconds_to_that_loss": first,
        "curves": {"xfusion": curves["xfusion"]}
        | {f"transfusion-pytorch, rate {r:g}": run["transfusion-pytorch"][0] for r, run in runs.items()},
        "steps": {name: count for name, (_, count) in runs[rate].items()},
    }
    write_json(settings.out, result)


if __name__ == "__main__":
    main(tyro.cli(Settings))
