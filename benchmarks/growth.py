"""How the cost of a drawing step grows: tokens per picture, batch, depth of the base, pictures per sequence.

    python benchmarks/growth.py

Random pictures and words on a base of SmolLM2-135M's layer (width 576, MLP 1536, 9 heads to 3 keys) with random weights,
media blocks as in the demo at every fifth layer with an MLP of 512, the training precision, compiled; states of the texts
are computed once. One setting is varied at a time from 16 tokens, batch 32, 30 layers, one picture. Writes
benchmarks/results/growth.json, which `python docs/pages.py speed` draws.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator
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
    steps: int = 5
    """Measured steps, behind two."""
    compile: bool = True
    """Compile the per-layer work, as training does."""
    most: int = 16_384
    """Picture tokens of a step at most: the batch is cut to them, and the figure says so."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = RESULT
    """Where the result goes."""

    def points(self) -> Iterator[tuple[str, Point]]:
        """What is varied, and the step."""
        for name in ("tokens", "batch", "depth", "pictures"):
            for value in getattr(self, name):
                point = replace(self.start, **{name: value})
                tokens_per_sequence = point.tokens * point.pictures
                yield name, replace(point, batch=max(1, min(point.batch, self.most // tokens_per_sequence)))


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


def measure(point: Point, base: Backbone, settings: Settings) -> dict:
    side = math.isqrt(point.tokens)
    mlp = min(512, base.config.intermediate_size)
    stride = min(5, base.num_layers)
    image = ImageModality.Config(patch=PATCH, sizes=(PATCH * side,))
    model = build(ModelConfig(fusion=DualTower.Config(stride=stride, mlp=mlp), image=image), base)
    dtype, reason = choose_compute_dtype(base.device)
    engine = model.training_engine(dtype, reason, choose_attention(base.device), settings.compile)
    optimizer = Optimizer(model.named_new_parameters())
    batch, timings, graphs = batch_of(model, point), [], 0
    for step_index in range(2 + settings.steps):
        start = time.perf_counter()
        with model.using(engine), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            ((value, count),) = model.losses(batch, torch.Generator().manual_seed(0)).values()
        (value / count).backward()
        optimizer.step(1e-4, 1.0, 0.999)
        if step_index >= 2:
            timings.append(time.perf_counter() - start)
        else:
            graphs = compiled_graphs()
    seconds = statistics.median(timings)
    rates = {"step_seconds": round(seconds, 5), "samples_per_second": round(point.batch / seconds, 3)}
    tokens = point.batch * point.pictures * point.tokens
    return (
        vars(point) | rates | {"tokens_per_second": round(tokens / seconds), "new_graphs": compiled_graphs() - graphs}
    )


def main(settings: Settings) -> None:
    """Measure and write."""
    provenance, rows, bases = origin("benchmarks"), [], {}
    keep_freed_memory()  # as training does
    for name, point in settings.points():
        if point.depth not in bases:
            bases[point.depth] = base_of(point.depth, settings.width)
        torch.compiler.reset()
        rows.append({"varied": name} | measure(point, bases[point.depth], settings))
        print(json.dumps(rows[-1]), flush=True)
    write_json(settings.out, provenance | {"rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Settings))
