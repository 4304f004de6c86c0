"""Time to the same loss: our joint step against that of transfusion-pytorch at the LLM's shape, in one run.

    python benchmarks/time_to_loss.py

Both train on the same samples in the same order, 64 drawings and 32 names a step, in turns of some seconds, so that what
disturbs the machine disturbs both; each is warm before its clock starts. The loss is that of next tokens: nats per token of 64
fixed names behind their pictures. The pictures are among the trained ones, so it is memory. Losses of drawing are other
quantities in the two and are not compared. The peer is trained at two rates, and the one with the lower last loss stands.
Writes benchmarks/results/time_to_loss.json, which `python docs/pages.py speed` draws.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from xfusion.apps.bench.base import Bench, Step
from xfusion.apps.bench.transfusion import Peer, peer_of
from xfusion.comparison.machine import commit, machine
from xfusion.data.mixture import Mixture
from xfusion.recipes.xfusion import demo
from xfusion.storage import write_json

RESULT = Path(__file__).parent / "results" / "time_to_loss.json"
WARMUP = 30
"""Steps over which a rate rises."""


@dataclass(frozen=True)
class Settings:
    """What is trained, and how long."""

    data: str = "emoji:128"
    """The pictures."""
    seconds: float = 150.0
    """Training of each."""
    turn: float = 10.0
    """Training of each in a turn."""
    rates: tuple[float, ...] = (3e-4, 1e-3)
    """The peer's; ours is the demo's own."""
    names: int = 64
    """Names that the loss is taken on."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = RESULT
    """Where the result goes."""


def names_of(bench: Bench, step: Step, count: int) -> Mixture:
    """A mixture whose step 0 is so many names."""
    base, mixture = step.model.backbone, replace(bench.stage.mixture, draw=0, caption=count)
    image = step.model.image
    return Mixture(bench.source, image, image.sizes, base.encode, base.begin_ids, base.end_ids[0], mixture, 1)


@torch.no_grad()
def our_loss(step: Step, names: Mixture) -> float:
    """Nats per token."""
    total, count, generator = 0.0, 0, torch.Generator().manual_seed(0)
    with step.model.using(step.engine):
        for batch in names.batches(0):
            found, number = step.model.losses(batch, generator)["next_token"]
            total, count = total + float(found), count + int(number)
    return total / count


def train(step: Step | Peer, done: int, rate: float, seconds: float) -> tuple[int, float]:
    """Steps behind ``done`` others: how many there are then, and how long they took."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        done += 1
        step.rate = rate * min(1.0, done / WARMUP)
        step()
    return done, time.perf_counter() - begun


def main(settings: Settings) -> None:
    """Train in turns, write."""
    bench = Bench.of(None, settings.data)
    ours = Step(bench, bench.model())
    names = names_of(bench, ours, settings.names)
    works: dict[str, tuple[Step | Peer, float, Callable[[], float]]] = {
        "xfusion": (ours, demo().stages[0].rate, lambda: our_loss(ours, names))
    }
    for rate in settings.rates:
        peer = peer_of(bench, ours, bench.backbone.hidden_size)
        works[f"transfusion-pytorch, rate {rate:g}"] = (peer, rate, lambda peer=peer: peer.nats(names.samples(0)))
    curves: dict[str, list[tuple[float, float]]] = {}
    steps: dict[str, int] = {}
    for name, (step, _, loss) in works.items():
        step.warm()
        step.period, steps[name] = None, 0
        curves[name] = [(0.0, loss())]
    while min(curve[-1][0] for curve in curves.values()) < settings.seconds:
        for name, (step, rate, loss) in works.items():
            steps[name], taken = train(step, steps[name], rate, settings.turn)
            curves[name].append((curves[name][-1][0] + taken, loss()))
            print(
                json.dumps({"name": name, "seconds": round(curves[name][-1][0], 1), "loss": curves[name][-1][1]}),
                flush=True,
            )
    peer = min((name for name in curves if name != "xfusion"), key=lambda name: curves[name][-1][1])
    seconds, reached = curves[peer][-1]
    first = next((at for at, loss in curves["xfusion"] if loss <= reached), None)
    result = {
        "command": "python benchmarks/time_to_loss.py",
        "commit": commit(),
        "machine": machine(),
        "data": settings.data,
        "peer": peer,
        "loss_reached_by_the_peer": reached,
        "seconds_of_the_peer": seconds,
        "our_seconds_to_that_loss": first,
        "curves": curves,
        "steps": steps,
    }
    write_json(settings.out, result)


if __name__ == "__main__":
    main(tyro.cli(Settings))
