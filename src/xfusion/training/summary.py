"""The summary that a run prints before its first step, and the memory that each process holds."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from xfusion.data.sources import Source
from xfusion.model import Engine, Model
from xfusion.training.optimizer import Optimizer
from xfusion.training.processes import Processes, Shard, num_bytes
from xfusion.training.setup import Prompts
from xfusion.training.stages import Recipe

DIVIDED = {
    "none": "each with all weights",
    "new": "the new weights divided among them, the base whole in each",
    "all": "new weights and base divided among them",
}
"""What processes hold, by what they shard."""


def lines(
    model: Model, recipe: Recipe, source: Source, engine: Engine, prompts: Prompts | None, *, keeps_memory: bool
) -> Iterator[str]:
    """Lines about base, new weights, data, step, and what was chosen with its reason.

    Args:
        model: what is trained.
        recipe: how.
        source: on what.
        engine: how it computes.
        prompts: the texts whose states are computed in each step instead of kept; None where there are none such.
        keeps_memory: whether freed blocks stay with the process.
    """
    frozen, stage = model.backbone.num_parameters, recipe.stages[0]
    yield f"base      {model.backbone.source}, {frozen / 1e6:.1f} M weights, frozen, {model.backbone.fingerprint[:16]}"
    yield f"new       {model.num_new_parameters / 1e6:.1f} M weights ({100 * model.num_new_parameters / frozen:.1f} %)"
    for index, taken in model.fusion.taken.items():
        yield f"start     layer {index}: " + ", ".join(f"{own} <- {name}" for own, name in taken.items())
    tokens = ", ".join(str(math.prod(model.modality.grid(size))) for size in model.modality.sizes)
    yield f"data      {source.spec}: {len(source.examples)} {model.modality.described}, {tokens} tokens"
    solved = f" behind {stage.mixture.shots} solved examples each" if stage.mixture.shots else ""
    yield f"step      {stage.mixture.draw} to draw, {stage.mixture.caption} to caption{solved}, times {stage.accumulate}"
    yield f"compute   {engine.reason}, {torch.get_num_threads()} threads"
    if any(stage.activation_checkpointing for stage in recipe.stages):
        yield "memory    layers are computed once more in the backward pass (activation checkpointing)"
    if prompts is not None:
        yield (
            f"text      states of some {prompts.number} prompts would take {prompts.num_bytes / 1e9:.1f} GB: computed in each"
            " step instead of kept"
        )
    if keeps_memory:
        yield "memory    freed blocks stay with the process: mapping them again costs more than filling them"


def expected_memory(
    processes: Processes, shard: Shard, model: Model, engine: Engine, optimizer: Optimizer
) -> list[str]:
    """What several processes will hold, weights and what training needs beside them; all call it together."""
    new = num_bytes(optimizer.list)
    needed = {"gradients": new, "moments": 2 * new, "average": new}
    return [
        f"processes {processes.count}, {DIVIDED[shard]}, and each with its share of every step",
        *processes.memory(_weights(shard, model, engine, optimizer) | needed),
    ]


def held_memory(processes: Processes, shard: Shard, model: Model, engine: Engine, optimizer: Optimizer) -> list[str]:
    """What several processes hold behind a step; gradients are gone by then. All call it together."""
    held = {"moments": num_bytes(optimizer.moments), "average": num_bytes(optimizer.average)}
    return processes.memory(_weights(shard, model, engine, optimizer) | held)


def _weights(shard: Shard, model: Model, engine: Engine, optimizer: Optimizer) -> dict[str, int]:
    """Bytes of weights in this process."""
    base, copy = model.backbone, engine.backbone
    parts = {"base": num_bytes((copy if shard == "all" else base).model.parameters())}
    if shard != "all" and copy.dtype != base.dtype:
        parts["base copy"] = num_bytes(copy.model.parameters())
    return parts | {"new weights": num_bytes(optimizer.list)}
