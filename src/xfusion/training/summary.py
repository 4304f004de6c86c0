"""The summary that a run prints before its first step, and tables of the memory that each process uses."""

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

TEXT_OF = {
    "strictly frozen": "unchanged (bit for bit)",
    "LoRA": "will change: low-rank deltas lie on the base's layers, and without them it is the base's",
    "as in the paper": "will change: the recipe trains parts that words pass through (as in the paper)",
}
"""What becomes of the base's text, by regime."""
SHARD_TEXT = {
    "none": "each with all weights",
    "new": "the new weights divided among them, the base whole in each",
    "all": "new weights and base divided among them",
}
"""Description of which weights each process stores, by the ``--shard`` policy."""


def lines(
    model: Model,
    recipe: Recipe,
    source: Source,
    engine: Engine,
    attention: tuple[str, str],
    prompts: Prompts | None,
    *,
    keeps_memory: bool,
) -> Iterator[str]:
    """Lines about the base, the new weights, the data, the step, and the choices made for this machine with their reasons.

    Args:
        model: the model to train.
        recipe: its recipe.
        source: the training data.
        engine: the compute settings of training.
        attention: the attention implementation of training, and the reason (`Backbone.supported_attention`).
        prompts: the prompts, if their hidden states are computed in every step instead of cached; None otherwise.
        keeps_memory: whether the process keeps freed memory instead of returning it to the system.

    Yields:
        one line of text at a time, without a newline.
    """
    frozen, stage = model.backbone.num_parameters, recipe.stages[0]
    yield f"base      {model.backbone.source}, {frozen / 1e6:.1f} M weights, frozen, {model.backbone.fingerprint[:16]}"
    yield f"new       {model.num_new_parameters / 1e6:.1f} M weights ({100 * model.num_new_parameters / frozen:.1f} %)"
    for index, origins in model.fusion.taken.items():
        yield f"start     layer {index}: " + ", ".join(f"{new_name} <- {name}" for new_name, name in origins.items())
    yield f"text      {TEXT_OF[model.regime]}"
    tokens = ", ".join(str(math.prod(model.modality.grid(size))) for size in model.modality.sizes)
    yield f"data      {source.spec}: {len(source.examples)} {model.modality.described}, {tokens} tokens"
    shots = f" behind {stage.mixture.shots} solved examples each" if stage.mixture.shots else ""
    yield f"step      {stage.mixture.draw} to draw, {stage.mixture.caption} to caption{shots}, times {stage.accumulate}"
    yield f"compute   {engine.reason}, {torch.get_num_threads()} threads"
    yield "attention {}: {}".format(*attention)
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
    """A table of the memory that each process will need: weights, gradients, moments and average, in MB.

    All processes call it together, before the first step.

    Returns:
        a line about the sharding, then the lines of the table (`Processes.memory`).
    """
    new_bytes = num_bytes(optimizer.shards)
    training_bytes = {"gradients": new_bytes, "moments": 2 * new_bytes, "average": new_bytes}
    return [
        f"processes {processes.count}, {SHARD_TEXT[shard]}, and each with its share of every step",
        *processes.memory(_weights(shard, model, engine, optimizer) | training_bytes),
    ]


def measured_memory(
    processes: Processes, shard: Shard, model: Model, engine: Engine, optimizer: Optimizer
) -> list[str]:
    """A table of the memory that each process uses after a step, when there are no gradients: weights, moments and average.

    All processes call it together.

    Returns:
        the lines of the table (`Processes.memory`).
    """
    training_bytes = {"moments": num_bytes(optimizer.moments), "average": num_bytes(optimizer.average)}
    return processes.memory(_weights(shard, model, engine, optimizer) | training_bytes)


def _weights(shard: Shard, model: Model, engine: Engine, optimizer: Optimizer) -> dict[str, int]:
    """Bytes of the weights in this process, by kind: the base, its copy in the compute dtype, and the new weights."""
    backbone, compute_copy = model.backbone, engine.backbone
    num_bytes_by_part = {"base": num_bytes((compute_copy if shard == "all" else backbone).model.parameters())}
    if shard != "all" and compute_copy.dtype != backbone.dtype:
        num_bytes_by_part["base copy"] = num_bytes(compute_copy.model.parameters())
    return num_bytes_by_part | {"new weights": num_bytes(optimizer.shards)}
