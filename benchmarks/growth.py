"""How the cost of a drawing step grows: tokens per picture, batch, depth of the base, pictures per sequence.

    python benchmarks/growth.py

Random pictures and words on a base of SmolLM2-135M's layer (width 576, MLP 1536, 9 heads to 3 keys) with random weights,
media blocks as in the demo at every fifth layer with an MLP of 512, the training precision, compiled; states of the texts
are computed once. One setting is varied at a time from 16 tokens, batch 32, 30 layers, one picture; the points of a curve are
measured in turn. Writes benchmarks/results/growth.json, which `python docs/pages.py speed` draws.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from transformers import LlamaConfig, LlamaForCausalLM

from xfusion.backbone import Backbone
from xfusion.backbone.attention import choose_attention
from xfusion.data.pack import pack
from xfusion.data.sequence import Batch, Sequence, Text
from xfusion.evaluation.machine import origin
from xfusion.fusion.dual_tower import DualTower
from xfusion.modalities.image import ImageModality
from xfusion.model import Model, ModelConfig, build, compiled_graphs
from xfusion.storage import write_json
from xfusion.training.memory import keep_freed_memory
from xfusion.training.optimizer import Optimizer
from xfusion.training.precision import choose_compute_dtype

RESULT = Path(__file__).parent / "results" / "growth.json"
PATCH, WORDS = 8, 12


@dataclass(frozen=True)
class Point:
    """A step."""

    tokens: int = 16
    batch: int = 32
    depth: int = 30
    pictures: int = 1


@dataclass(frozen=True)
class Settings:
    """What is varied."""

    tokens: tuple[int, ...] = (16, 64, 256, 576, 1024)
    """Tokens of a picture, squares."""
    batch: tuple[int, ...] = (1, 4, 16, 32, 64, 128)
    """Sequences per step."""
    depth: tuple[int, ...] = (5, 10, 20, 30)
    """Layers of the base."""
    pictures: tuple[int, ...] = (1, 2, 4, 8)
    """Pictures of a sequence, each behind words."""
    start: Point = Point()
    """What stays while one thing is changed."""
    width: int = 576
    """Of the base."""
    rounds: int = 5
    """Turns of each point, behind two steps of each."""
    seconds: float = 1.0
    """Length of a turn at least, of whole steps."""
    compile: bool = True
    """Compile the per-layer work, as training does."""
    most: int = 16_384
    """Picture tokens of a step at most: a curve whose largest point has more has fewer sequences at all of its points."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = RESULT
    """Where the result goes."""

    def curves(self) -> dict[str, list[Point]]:
        """The points by what is varied."""
        curves = {}
        for name in ("tokens", "batch", "depth", "pictures"):
            points = [replace(self.start, **{name: value}) for value in getattr(self, name)]
            batch = max(1, self.most // max(point.tokens * point.pictures for point in points))
            curves[name] = points if name == "batch" else [replace(p, batch=min(p.batch, batch)) for p in points]
        return curves


def base_of(depth: int, width: int) -> Backbone:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,  # drawing never reads the head
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=depth,
        num_attention_heads=max(3, width // 64),
        num_key_value_heads=max(3, width // 64) // 3,
        max_position_embeddings=16_384,
    )
    return Backbone(LlamaForCausalLM(config), None, f"random, {depth} layers of width {width}")


def batch_of(model: Model, point: Point) -> Batch:
    side, generator = math.isqrt(point.tokens), torch.Generator().manual_seed(0)

    def sample() -> Sequence:
        segments = []
        for _ in range(point.pictures):
            ids = torch.randint(3, 1000, (WORDS,), generator=generator).tolist()
            tokens = torch.randn(point.tokens, model.image.token_width, generator=generator)
            segment = model.image.segment(tokens, (side, side), state="noised", has_loss=True)
            segments += [Text(ids=tuple(ids)), segment]
        return Sequence(segments=tuple(segments))

    return pack([[sample()] for _ in range(point.batch)])


class Step:
    """A training step of drawing at a point."""

    def __init__(self, point: Point, base: Backbone, *, compile: bool):
        side, mlp = math.isqrt(point.tokens), min(512, base.config.intermediate_size)
        image = ImageModality.Config(patch=PATCH, sizes=(PATCH * side,))
        fusion = DualTower.Config(stride=min(5, base.num_layers), mlp=mlp)
        self.point, self.model = point, build(ModelConfig(fusion=fusion, image=image), base)
        self.dtype, reason = choose_compute_dtype(base.device)
        self.engine = self.model.training_engine(self.dtype, reason, choose_attention(base.device)[0], compile)
        self.optimizer = Optimizer(self.model.named_new_parameters())
        self.batch, self.timings = batch_of(self.model, point), list[float]()

    def __call__(self) -> float:
        """Take it; returns its seconds."""
        start = time.perf_counter()
        with self.model.using(self.engine), torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            ((value, count),) = self.model.losses(self.batch, torch.Generator().manual_seed(0)).values()
        (value / count).backward()
        self.optimizer.step(1e-4, 1.0, 0.999)
        return time.perf_counter() - start

    def turn(self, seconds: float) -> None:
        """Steps for at least so long."""
        end = time.perf_counter() + seconds
        while True:
            self.timings.append(self())
            if time.perf_counter() >= end:
                return

    def row(self) -> dict:
        """What was measured."""
        point, seconds = self.point, statistics.median(self.timings)
        tokens = point.batch * point.pictures * point.tokens
        return vars(point) | {
            "step_seconds": round(seconds, 5),
            "samples_per_second": round(point.batch / seconds, 3),
            "tokens_per_second": round(tokens / seconds),
            "steps": len(self.timings),
        }


def main(settings: Settings) -> None:
    """Measure and write. The points of a curve take turns, so that what else the machine does meets all of them."""
    provenance, rows = origin("benchmarks"), []
    keep_freed_memory()  # as training does
    for name, points in settings.curves().items():
        torch.compiler.reset()
        bases = {depth: base_of(depth, settings.width) for depth in {point.depth for point in points}}
        steps = [Step(point, bases[point.depth], compile=settings.compile) for point in points]
        for step in steps:
            step(), step()
        graphs = compiled_graphs()
        for _ in range(settings.rounds):
            for step in steps:
                step.turn(settings.seconds)
        for step in steps:
            rows.append({"varied": name} | step.row())
            print(json.dumps(rows[-1]), flush=True)
        if compiled_graphs() != graphs:
            raise SystemExit(f"{name}: {compiled_graphs() - graphs} graphs were compiled behind the warm-up")
    write_json(settings.out, provenance | {"rounds": settings.rounds, "seconds": settings.seconds, "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Settings))
