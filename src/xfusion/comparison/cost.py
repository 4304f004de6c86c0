"""What a recipe costs: executed FLOPs, parameters, tokens, memory, time."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xfusion.backbone import Backbone
from xfusion.data.mixture import Mixture
from xfusion.data.pack import pack
from xfusion.data.sequence import IGNORE, Batch, Media, Text
from xfusion.data.sequence import Sequence as Sample
from xfusion.data.sources import Source
from xfusion.evaluation.suites.emoji import chosen
from xfusion.model import TEXT_STATES_KEPT, Model, choose_compute_dtype
from xfusion.training.speed import short_run
from xfusion.training.stages import Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Executed FLOPs of a stage's step, by torch's counter on a real forward and backward pass, uncompiled.

    Compiling drops work whose result nobody reads (queries of rows that only give keys and values), so that a compiled
    step executes a little less.
    """

    step: int
    """One optimiser step, with the states of texts at hand that are computed once."""
    training: dict[str, int]
    """Task -> forward and backward, per sample."""
    forward: dict[str, int]
    """Task -> forward alone, per sample."""
    text: int
    """The frozen states of one text, where they are computed once and looked up later."""
    texts: Callable[[int], int]
    """Steps -> how many texts are computed in them."""

    def total(self, steps: int) -> int:
        """FLOPs of so many steps."""
        return steps * self.step + (self.texts(steps) * self.text if self.text else 0)


def count_flops(model: Model, stage: Stage, source: Source, seed: int = 0) -> StageCost:
    """Count one step of a stage.

    Args:
        model: what is trained; its weights stay.
        stage: whose mixture is read.
        source: the pictures.
        seed: of the mixture.
    """
    dtype, reason = choose_compute_dtype(model.backbone.device)
    # The counter does not know the CPU's fused attention; plain products are what training takes there anyway.
    engine = model.training_engine(dtype, reason, "eager", False)
    made = _mixture(model, stage, source, seed)
    training: dict[str, int] = {}
    forward: dict[str, int] = {}
    samples: dict[str, int] = {}
    text = texts = 0

    def losses(batch: Batch) -> Tensor | float:
        with torch.autocast(model.backbone.device.type, engine.dtype, enabled=bool(engine.autocast)):
            found = model.losses(batch, torch.Generator().manual_seed(0))
        return sum(value for value, _ in found.values())

    def both(batch: Batch) -> None:
        loss = losses(batch)
        if isinstance(loss, Tensor):
            loss.backward()

    with model.using(engine):
        for batch in made.batches(0):
            task = "caption" if bool((batch.labels != IGNORE).any()) else "draw"
            known = len(engine.text_states)
            cold, warm = _flops(lambda b=batch: both(b)), _flops(lambda b=batch: both(b))
            with torch.no_grad():
                ahead = _flops(lambda b=batch: losses(b))
            text, texts = text + cold - warm, texts + len(engine.text_states) - known
            training[task] = training.get(task, 0) + warm
            forward[task] = forward.get(task, 0) + ahead
            samples[task] = samples.get(task, 0) + batch.num_sequences
    for parameter in model.new_parameters():
        parameter.grad = None
    return StageCost(
        step=sum(training.values()) * stage.accumulate,
        training={task: value // samples[task] for task, value in training.items()},
        forward={task: value // samples[task] for task, value in forward.items()},
        text=text // texts if texts else 0,
        texts=lambda steps: _texts_computed(made, steps * stage.accumulate),
    )


def flops_of_shape(model: Model, words: int = 12) -> dict[str, dict[str, int]]:
    """FLOPs of one sample of each task that a model can learn, on a base that may have no weights; nothing is looked up.

    Args:
        model: built on `Backbone.of_shape` or on a real base.
        words: text positions of the prompt, and of the answer.

    Returns:
        Task (``draw``, ``caption``) -> ``forward`` and ``training`` (forward and backward). A task that none of the
        model's objectives gives is left out; a loss over pairs is not counted.
    """
    image, ids = model.image, tuple(range(3, 3 + words))
    rows, columns = image.grid(image.sizes[0])
    tokens, grid = torch.zeros(rows * columns, image.token_width), (rows, columns)
    samples = {
        "draw": (Text(ids=ids), image.segment(tokens, grid, state="noised", has_loss=True)),
        "caption": (image.segment(tokens, grid), Text(ids=ids, has_loss=True)),
    }
    found: dict[str, dict[str, int]] = {}
    with model.using(model.training_engine(torch.float32, "counted", "eager", False)):
        for task, segments in samples.items():
            if task not in model.capabilities:
                continue
            batch = pack([[Sample(segments=segments)]]).to(model.backbone.device)
            ends: list[Tensor] = []

            def forward(batch: Batch = batch, task: str = task, ends: list[Tensor] = ends) -> None:
                hidden, run = model.run_pass(batch)
                if task == "draw":
                    ends.append(model.port.readout(run.states["image"]).sum())
                else:
                    ends.append(model.engine.backbone.logits(hidden[:, run.slices["text"]]).sum())

            ahead = _flops(forward)
            found[task] = {"forward": ahead, "training": ahead + _flops(lambda ends=ends: ends[0].backward())}
    for parameter in model.new_parameters():
        parameter.grad = None
    return found


def _flops(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


class _Words(Mixture):
    """A mixture whose pictures nobody looks at."""

    def tokens(self, index: int, size: int) -> Tensor:
        del index
        return self._blank[size]


def _mixture(model: Model, stage: Stage, source: Source, seed: int, kind: type[Mixture] = Mixture) -> Mixture:
    base = model.backbone
    return kind(
        source, model.image, model.image.sizes, base.encode, base.begin_ids, base.end_ids[0], stage.mixture, seed
    )


def _texts_computed(mixture: Mixture, reads: int) -> int:
    """How many texts of drawing samples are not at hand when they are asked for: the oldest go first."""
    words = _Words(
        mixture.source,
        mixture.image,
        mixture.sizes,
        mixture.encode,
        mixture.begin,
        mixture.end,
        mixture.config,
        mixture.seed,
    )
    known: OrderedDict[tuple[int, ...], None] = OrderedDict()
    computed = 0
    for read in range(reads):
        for sample in words.drawings(read):
            text = sample.segments[0]
            if isinstance(text, Text) and text.ids not in known:
                known[text.ids] = None
                computed += 1
                if len(known) > TEXT_STATES_KEPT:
                    known.popitem(last=False)
    return computed


def samples_per_step(stage: Stage) -> int:
    """Drawing and naming samples of one optimiser step."""
    return (stage.mixture.draw + stage.mixture.caption) * stage.accumulate


def trainable_parameters(model: Model) -> int:
    """How many numbers training may change."""
    return sum(p.numel() for p in model.new_parameters() if p.requires_grad)


def tokens_added(model: Model) -> int:
    """Positions that one picture adds to a sequence of words, boundaries included."""
    grid = model.image.grid(model.image.sizes[0])
    blank = Media(tokens=torch.zeros(grid[0] * grid[1], model.image.token_width), grid=(grid[0], grid[1]))
    words = Text(ids=model.backbone.end_ids[:1])
    batch = pack([[Sample(segments=(blank, words))]])
    tables = [batch.text, *(media.rows for media in batch.media.values())]
    return sum(int((table.order >= 0).sum()) for table in tables) - len(words.ids)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, Any]]:
    """Largest memory inside the block: ``bytes`` (None where it cannot be known) and ``what`` it is."""
    found: dict[str, Any] = {"bytes": None, "what": "not measured on this system"}
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            reset.write_text("5", encoding="ascii")  # the high-water mark starts anew
        except OSError:
            yield found
            return
    yield found
    if device.type == "cuda":
        found |= {"bytes": torch.cuda.max_memory_allocated(device), "what": "allocated on the GPU in training"}
        return
    line = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))
    if line:
        what = "resident in the whole process in training, the frozen base included; the mark is reset before"
        found |= {"bytes": 1024 * int(line[1]), "what": what}


def measure_time(recipe: Recipe, source: Source, backbone: Backbone, *, steps: int, compile: bool) -> dict[str, Any]:
    """Seconds of a training step and of sampling, by a `short_run`.

    Args:
        recipe: its last stage is measured.
        source: the pictures.
        backbone: the base.
        steps: Euler steps of a drawing.
        compile: as in training.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    model, rate = short_run(recipe, source=source, backbone=backbone, compile=compile)
    out: dict[str, Any] = {
        "load_before": load,
        "threads": torch.get_num_threads(),
        "step_seconds": rate and samples_per_step(recipe.stages[-1]) / rate,
    }
    indices = chosen(source.examples, 8)
    prompts = [source.examples[i].captions[0] for i in indices]
    pictures = [source.picture(i, model.image.sizes[0]) for i in indices]
    asked = {"draw": lambda: model.draw(prompts, steps=steps), "caption": lambda: model.caption(pictures)}
    for task in sorted(set(asked) & model.capabilities):
        out[f"{task}_seconds_per_picture"] = _median_seconds(asked[task]) / len(indices)
    return out


def _median_seconds(function: Callable[[], Any], times: int = 3) -> float:
    function()
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)
