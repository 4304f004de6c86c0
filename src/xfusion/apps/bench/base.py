"""What all questions share: a training step as in the training loop, the matrix products of a work, and taking turns."""

from __future__ import annotations

import gc
import json
import math
import pkgutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xfusion.backbone import Backbone
from xfusion.backbone.attention import choose_attention
from xfusion.data.mixture import Mixture
from xfusion.data.sources import Source, open_source
from xfusion.engine import Engine
from xfusion.model import Model, ModelConfig, build
from xfusion.recipes.xfusion import demo
from xfusion.training.memory import keep_freed_memory
from xfusion.training.optimizer import Optimizer
from xfusion.training.precision import choose_compute_dtype
from xfusion.training.stages import Stage

Work = Callable[[], object]
Report = Callable[[str], None]
PERIOD = 8
"""Batches that steps repeat: few, so that texts and pictures are soon cached."""
TURN = 1.0
"""Minimum seconds of a turn of a work."""
SQUARE = 4096
"""Side of the matrices in the reference product."""


def names() -> list[str]:
    """The questions: the modules of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.name != "base")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, and for how long."""

    backbone: Backbone
    source: Source
    compile: bool = True
    quick: bool = False
    """A few small rounds: for tests, the figures mean nothing."""
    report: Report = print
    """Called with what is being measured."""

    @classmethod
    def of(cls, base: str | None, data: str, **settings: Any) -> Bench:
        """Load a base and open pictures."""
        keep_freed_memory()  # as training and the verbs do; applies to the peers of this run, too
        backbone = Backbone.load(base) if base else Backbone.load()
        return cls(backbone=backbone, source=open_source(data, special_tokens=backbone.special_tokens), **settings)

    @property
    def stage(self) -> Stage:
        """Samples per step: the demo's."""
        stage = demo().stages[0]
        return replace(stage, mixture=replace(stage.mixture, draw=8, caption=4)) if self.quick else stage

    def model(self, *, full: bool = False) -> Model:
        """The demo's model, or the same with a full copy of every layer, as in the paper."""
        config: ModelConfig = demo().model
        stride = max(1, min(config.fusion.stride, self.backbone.num_layers // 2))
        fusion: Any = replace(config.fusion, stride=1 if full else stride)
        limit = getattr(self.backbone.config, "intermediate_size", None) or 4 * self.backbone.hidden_size
        fusion = replace(fusion, mlp=None if full else min(fusion.mlp, limit))
        return build(replace(config, fusion=fusion), self.backbone)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The precision of training on this machine."""
        return choose_compute_dtype(self.backbone.device)[0]

    @cached_property
    def rounds(self) -> int:
        """Turns of each work."""
        return 2 if self.quick else 7

    def in_turn(self, works: dict[str, Work], *, warm: int = 2, rounds: int | None = None) -> dict[str, float]:
        """Median seconds of each work; all take turns, A B A B, so that disturbances of the machine affect all.

        A turn repeats its work until `TURN` has passed, as training repeats its step: a single call after another work
        would find the CPU cache full of that work's matrices.
        """
        for name, work in works.items():
            self.report(f"warming up {name}")
            for _ in range(warm):
                work()
        timings: dict[str, list[float]] = {name: [] for name in works}
        for round_index in range(rounds or self.rounds):
            self.report(f"round {round_index + 1} of {rounds or self.rounds}: {', '.join(works)}")
            for name, work in works.items():
                gc.collect()
                start, calls = time.perf_counter(), 0
                while not calls or (time.perf_counter() - start < TURN and not self.quick):
                    work()
                    calls += 1
                timings[name].append((time.perf_counter() - start) / calls)
        return {name: statistics.median(seconds) for name, seconds in timings.items()}

    def matrix_product(self) -> tuple[Work, float]:
        """A product of two square matrices in the training precision, and its FLOPs."""
        side = 256 if self.quick else SQUARE
        left, right = (torch.randn(side, side).to(self.dtype) for _ in range(2))
        output = torch.empty_like(left)
        return lambda: torch.mm(left, right, out=output), 2.0 * side**3


# ------------------------------------------------------------------------------------------------------ a training step


class Step:
    """Successive optimiser steps as in `xfusion.training.loop`: batches, losses, gradients, AdamW, average.

    Args:
        bench: base, pictures, samples per step.
        model: the model to train.
        draw: drawing samples per step; None is the stage's.
        caption: captioning samples per step; None is the stage's.
        keep_text: whether the frozen states of texts before pictures are cached.
        activation_checkpointing: whether layers are recomputed in the backward pass.
    """

    def __init__(
        self,
        bench: Bench,
        model: Model,
        *,
        draw: int | None = None,
        caption: int | None = None,
        keep_text: bool = True,
        activation_checkpointing: bool = False,
    ):
        self.model, mixture = model, bench.stage.mixture
        captions = mixture.caption if caption is None else caption
        mixture = replace(
            mixture,
            draw=mixture.draw if draw is None else draw,
            caption=captions,
            pack=math.gcd(mixture.pack, captions),  # captions are packed into rows: fewer captions, shorter rows
        )
        backbone = model.backbone
        self.mixture = Mixture(
            bench.source,
            model.image,
            model.image.sizes,
            backbone.encode,
            backbone.begin_ids,
            backbone.end_id,
            mixture,
            0,
        )
        self.engine: Engine = model.training_engine(
            bench.dtype, "measured", choose_attention(backbone.device)[0], bench.compile
        )
        self.engine.keep_text, self.engine.activation_checkpointing = keep_text, activation_checkpointing
        self.optimizer = Optimizer(model.named_new_parameters())
        self.numbers, self.rate = count(), 1e-4
        self.period: int | None = PERIOD
        self.samples = mixture.draw + mixture.caption
        self.weights = {name: weight for objective in model.objectives for name, weight in objective.weights.items()}

    def __call__(self) -> None:
        """Run the next step."""
        step_number = next(self.numbers)
        batches = self.mixture.batches(step_number % self.period if self.period else step_number)
        counts: Counter[str] = Counter()
        for batch in batches:
            for objective in self.model.objectives:
                counts.update(objective.count(batch))
        generator = torch.Generator().manual_seed(0)
        with self.model.using(self.engine):
            for batch in batches:
                with torch.autocast(
                    self.model.backbone.device.type, self.engine.dtype, enabled=bool(self.engine.autocast)
                ):
                    losses = self.model.losses(batch, generator)
                loss = sum(self.weights[name] * value / counts[name] for name, (value, _) in losses.items())
                if isinstance(loss, Tensor):
                    loss.backward()
                for value, _ in losses.values():
                    float(value.detach())
        self.optimizer.step(self.rate, 1.0, 0.999)

    def warm(self) -> None:
        """Run every batch once: texts are then cached and all shapes compiled."""
        for _ in range(PERIOD):
            self()

    def run_unseen(self, steps: int) -> None:
        """Run steps on unread batches: other examples with other wordings, as in a real run."""
        self.period, period = None, self.period
        for _ in range(steps):
            self()
        self.period = period


# --------------------------------------------------------------------------------------------------- matrix products

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


@dataclass(frozen=True)
class Product:
    """An executed matrix product: ``[.., m, k] @ [.., k, n]``."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    strides: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype
    places: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] = ((-1, 0), (-2, 0), (-3, 0))
    """Location of both operands and the result: the number of the storage, and the offset in elements."""

    @property
    def flops(self) -> int:
        (*batch, rows, inner), (*_, columns) = self.shapes
        return 2 * (batch[0] if batch else 1) * rows * inner * columns

    @property
    def extents(self) -> tuple[int, int, int]:
        """Elements spanned by both operands and the result."""
        left, right = (
            1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
            for shape, stride in zip(self.shapes, self.strides, strict=True)
        )
        return left, right, math.prod(self.shapes[0][:-1]) * self.shapes[1][-1]


def products(work: Work) -> list[Product]:
    """The matrix products that a call executes, in order, including compiled code.

    Products that compilation removed are not included; sums that a product adds to are not counted.
    """
    with tempfile.TemporaryDirectory(prefix="xfusion-bench-") as folder:
        file = str(Path(folder) / "trace.json")
        observer: Any = torch.profiler.ExecutionTraceObserver()
        observer.register_callback(file)
        observer.start()
        try:
            work()
        finally:
            observer.stop()
            observer.unregister_callback()
        nodes = json.loads(Path(file).read_text(encoding="utf-8"))["nodes"]
    executed, product_ids = [], set()
    for node in sorted(nodes, key=lambda n: n["id"]):
        kind = node["name"].removeprefix("aten::")
        if node["ctrl_deps"] in product_ids:  # a product called by another product
            product_ids.add(node["id"])
        elif kind in PRODUCTS:
            product_ids.add(node["id"])
            executed.append(_product(node, first=int(kind.endswith("addmm") or kind == "baddbmm")))
    return executed


_DTYPES = {"BFloat16": torch.bfloat16, "float": torch.float32, "Half": torch.float16, "double": torch.float64}


def _product(node: dict[str, Any], first: int) -> Product:
    inputs, pair = node["inputs"], slice(first, first + 2)
    kind = inputs["types"][first].removeprefix("Tensor(").rstrip(")").removeprefix("c10::")
    shapes, strides = (tuple(map(tuple, inputs[name][pair])) for name in ("shapes", "strides"))
    # A tensor of a trace: its number, its storage's number, its offset in elements, and more.
    places = tuple((value[1], value[2]) for value in (*inputs["values"][pair], node["outputs"]["values"][0]))
    return Product(shapes, strides, _DTYPES[kind], places)  # type: ignore[arg-type]


def replay(executed: list[Product]) -> Work:
    """The same products alone: same shapes, strides, precision and order, with memory shared as in the work.

    Layers have separate weight matrices, queries and keys read the same states, and each product finds in the CPU cache
    what the previous one left there.
    """
    sizes: dict[tuple[int, torch.dtype], int] = {}
    for product in executed:
        for (memory, offset), extent in zip(product.places, product.extents, strict=True):
            sizes[memory, product.dtype] = max(sizes.get((memory, product.dtype), 0), offset + extent)
    buffers = {key: torch.randn(size).to(key[1]) for key, size in sizes.items()}
    operands = []
    for product in executed:
        left, right, output = (buffers[memory, product.dtype][offset:] for memory, offset in product.places)
        (first, second), (first_strides, second_strides) = product.shapes, product.strides
        result = output[: product.extents[2]].view(*first[:-1], second[-1])
        operands.append((left.as_strided(first, first_strides), right.as_strided(second, second_strides), result))

    def work() -> None:
        for left, right, output in operands:
            torch.matmul(left, right, out=output)

    return work


@contextmanager
def count_new_graphs() -> Iterator[Callable[[], int]]:
    """Count the graphs that are compiled inside the block; once it is over, the count stays."""
    from xfusion.model import compiled_graphs

    graphs_before, graphs_after = compiled_graphs(), None
    yield lambda: (compiled_graphs() if graphs_after is None else graphs_after) - graphs_before
    graphs_after = compiled_graphs()
