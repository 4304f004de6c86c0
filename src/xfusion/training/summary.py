"""The summary that a run prints before its first step, and tables of the memory that each process uses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby

import torch

from xfusion.data.mixture import Mixture
from xfusion.data.pack import media_length, pack, text_length
from xfusion.data.report import one_line
from xfusion.data.sequence import IGNORE, Sequence, Text
from xfusion.data.sources import Source
from xfusion.engine import Engine
from xfusion.model import Model
from xfusion.training.optimizer import Optimizer
from xfusion.training.processes import Processes, Shard, num_bytes
from xfusion.training.setup import Prompts
from xfusion.training.stages import Recipe

WIDTH = 120
"""Columns of a line about a sample where no terminal says its own."""
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
    loaded: tuple[str | None, int],
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
        loaded: the pack that the run starts from, and how many tensors it gave; None if there is none.

    Yields:
        one line of text at a time, without a newline.
    """
    base, stage = model.backbone, recipe.stages[0]
    frozen = base.num_parameters
    revision = f"@{base.revision}" if base.revision else ""
    yield f"base      {base.source}{revision}, {frozen / 1e6:.1f} M weights, frozen, {base.fingerprint[:16]}"
    yield f"new       {model.num_new_parameters / 1e6:.1f} M weights ({100 * model.num_new_parameters / frozen:.1f} %)"
    start, num_loaded = loaded
    if start is not None:
        num_new = len(model.learned_state()) - num_loaded
        yield f"start     {num_loaded} tensors of the pack {start}, and {num_new} new ones"
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


def first_step(model: Model, mixture: Mixture, reads: range, width: int) -> Iterator[str]:
    """Lines about a step: its positions, and a sample of each task with its trained parts between » and «.

    Args:
        model: the model to train.
        mixture: the batches of the step's stage.
        reads: the numbers of the mixture's steps that make up the step.
        width: columns at which a sample is cut.

    Yields:
        one line of text at a time, without a newline.
    """
    tasks = [[mixture.drawings(read) for read in reads], [mixture.captionings(read) for read in reads]]
    samples = [[sample for read in task for sample in read] for task in tasks]
    text, media = (sum(map(length, samples[0] + samples[1])) for length in (text_length, media_length))
    yield f"tokens    {text:,} text and {media:,} {model.modality.name} positions in this step, padding aside"
    for task in samples:
        if task:
            # A prompt may be dropped, and a question is rare.
            sample = next((s for s in task if any(isinstance(part, Text) for part in s.segments)), task[0])
            line = one_line(f"sample    {sample_text(model, sample)}")
            yield line if len(line) <= width else f"{line[: width - 1]}…"


def sample_text(model: Model, sample: Sequence) -> str:
    """A sample in reading order: its text as the tokens are decoded, its media as their number of tokens, and what the model is
    trained to produce between » and «, by the labels of a batch.
    """
    batch = pack([[sample]])
    order, ids, labels = (table[0].tolist() for table in (batch.text.order, batch.text_ids, batch.labels))
    at = dict(zip(order, ids, strict=True))
    words_are_trained, media_are_trained = model.text_objective.weight > 0, "draw" in model.capabilities
    parts: list[tuple[float, bool, int | str]] = []
    trained = {place + 1 for place, label in zip(order, labels, strict=True) if label != IGNORE}
    parts += [(place, place in trained, token) for place, token in at.items() if token >= 0]
    # The end of an answer is a label only, without a place of its own.
    ends = ((place, label) for place, label in zip(order, labels, strict=True) if label != IGNORE)
    parts += [(place + 0.5, True, label) for place, label in ends if at.get(place + 1) != label]
    for name, rows in batch.media.items():
        for item, has_loss in enumerate(rows.has_loss.tolist()):
            places = rows.rows.order[0][rows.item[0] == item]
            parts.append((int(places.min()), has_loss and media_are_trained, f"<{len(places)} {name} tokens>"))
    pieces = []
    by_kind = groupby(sorted(parts), key=lambda part: (part[1], isinstance(part[2], str)))
    for (is_trained, is_media), run in by_kind:
        contents = [content for _, _, content in run]
        text = " ".join(map(str, contents)) if is_media else model.backbone.tokenizer.decode(contents)
        marked = is_trained and (is_media or words_are_trained)
        pieces.append(f"»{text}«" if marked else text)
    return " ".join(pieces)


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
