"""Costs of a recipe: executed FLOPs, parameters, tokens, memory, time.

FLOPs of a step and of a sample are those of the model alone. They exclude the frozen encoder or codec, which runs once per
picture: pictures are encoded before counting, or are blank. The encoder's cost is the same for all recipes that use it, and
may exceed all others (`flops_of_encoder`).
"""

from __future__ import annotations

import math
import os
import re
import statistics
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from xfusion.backbone import Backbone
from xfusion.data.mixture import Mixture
from xfusion.data.pack import pack
from xfusion.data.sequence import IGNORE, Audio, Batch, Text
from xfusion.data.sequence import Sequence as Sample
from xfusion.data.sources import Sounds, Source
from xfusion.evaluation.suites.emoji import chosen
from xfusion.model import Engine, Model, ModelConfig
from xfusion.text_states import TEXT_STATES_BYTES
from xfusion.training.precision import choose_compute_dtype
from xfusion.training.speed import short_run
from xfusion.training.stages import Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Executed FLOPs of a stage's step, by torch's counter on a real forward and backward pass, uncompiled.

    The frozen picture encoder is excluded (`flops_of_encoder`). Compilation removes unused work (queries of rows that only
    provide keys and values), so a compiled step executes a little less.
    """

    step: int
    """One optimizer step, if the cached hidden states of texts are available."""
    training: dict[str, int]
    """Task -> forward and backward, per sample."""
    forward: dict[str, int]
    """Task -> forward only, per sample."""
    text: int
    """The frozen hidden states of one text, if they are computed once and cached."""
    texts: Callable[[int], int]
    """Number of steps -> number of texts computed in them."""

    def total(self, steps: int) -> int:
        """FLOPs of this many steps."""
        return steps * self.step + (self.texts(steps) * self.text if self.text else 0)


def count_flops(model: Model, stage: Stage, source: Source, seed: int = 0) -> StageCost:
    """Count one step of a stage.

    Args:
        model: the model to train; its weights are unchanged.
        stage: the stage, with its mixture.
        source: the pictures.
        seed: seed of the mixture.
    """
    dtype, reason = choose_compute_dtype(model.backbone.device)
    # The counter does not know the CPU's fused attention; training uses eager attention there anyway.
    engine = model.training_engine(dtype, reason, "eager", False)
    base, media = model.backbone, model.modality
    made = Mixture(source, media, media.sizes, base.encode, base.begin_ids, base.end_ids[0], stage.mixture, seed)
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
            with _without_gradients(model):
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
        texts=lambda steps: _texts_computed(
            made, steps * stage.accumulate, lambda n: model.text_bytes(n, engine.dtype)
        ),
    )


def flops_of_shape(model: Model, words: int = 12) -> dict[str, dict[str, int]]:
    """FLOPs of one sample of each task that a model can learn, on a base that may have no weights, without caching.

    Args:
        model: built on `Backbone.of_shape` or on a real base.
        words: text positions of the prompt, and of the answer.

    Returns:
        Task (``draw``, ``caption``) -> ``forward`` and ``training`` (forward and backward). A task that none of the
        model's objectives provides is left out. Losses over pairs and the frozen encoder (`flops_of_encoder`) are not counted.
    """
    samples = {task: made(words) for task, made in _samples(model).items()}
    found: dict[str, dict[str, int]] = {}
    with model.using(model.training_engine(torch.float32, "counted", "eager", False)):
        for task, sample in samples.items():
            if task not in model.capabilities:
                continue
            batch = pack([[sample]]).to(model.backbone.device)
            ends: list[Tensor] = []

            def forward(batch: Batch = batch, task: str = task, ends: list[Tensor] = ends) -> None:
                hidden, run = model.run_pass(batch)
                if task == "draw":
                    ends.append(model.port.readout(run.states[model.modality.name]).sum())
                else:
                    ends.append(model.engine.backbone.logits(hidden[:, run.slices["text"]]).sum())

            ahead = _flops(forward)
            found[task] = {"forward": ahead, "training": ahead + _flops(lambda ends=ends: ends[0].backward())}
    for parameter in model.new_parameters():
        parameter.grad = None
    return found


def flops_of_encoder(config: ModelConfig) -> int | None:
    """FLOPs of the frozen encoder or codec for one picture of the largest size, which all other counts exclude. None for
    sounds, whose encoder is loaded on first use.
    """
    if config.audio is not None:
        return None
    image = config.image.build()
    size = max(image.sizes)
    return _flops(lambda: image.encode(torch.zeros(1, 3, size, size), size))


def _samples(model: Model) -> dict[str, Callable[[int], Sample]]:
    """Task -> a sample with the given number of text tokens and a blank picture, or sound, of the largest size."""
    image = model.modality
    grid = image.grid(max(image.sizes))
    tokens = torch.zeros(math.prod(grid), image.token_width)

    def draw(words: int) -> Sample:
        noised = image.segment(tokens, grid, state="noised", has_loss=True)
        return Sample(segments=(Text(ids=tuple(range(3, 3 + words))), noised))

    def caption(words: int) -> Sample:
        return Sample(segments=(image.segment(tokens, grid), Text(ids=tuple(range(3, 3 + words)), has_loss=True)))

    return {"draw": draw, "caption": caption}


class LiveBytes(TorchDispatchMode):
    """Bytes of the live tensors that were allocated inside the block; existing tensors do not count.

    It counts requested sizes, also on meta tensors: without allocator rounding and buffers inside kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and record its inputs and outputs."""
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._seen.setdefault(given.untyped_storage(), True)
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and (storage := made.untyped_storage()) not in self._seen:
                size = storage.nbytes()
                self._seen[storage] = True
                weakref.finalize(storage, self._freed, size)
                self.now += size
                self.most = max(self.most, self.now)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def activation_memory(
    model: Model, stage: Stage, dtype: torch.dtype, *, words: int = 12, checkpointing: bool | None = None
) -> int | None:
    """Peak bytes of a stage's step besides weights, gradients, optimizer states and average.

    Predicted by an uncompiled forward and backward pass of the same model without weights (`Backbone.without_weights`), with
    pictures of the largest size. A step computes its batches one after another, so the largest one counts. Unlike in training,
    layers are not compiled, which would need less, the frozen hidden states of texts are computed rather than looked up, and
    rows that a mechanism skips by their values are counted.

    Args:
        model: the model to train; it is unchanged.
        stage: the stage, with its samples per step.
        dtype: the training precision.
        words: text positions of a prompt, and of an answer.
        checkpointing: whether to use activation checkpointing; None uses the stage's setting.

    Returns:
        the bytes; None for a model that learns neither to draw nor to caption.
    """
    shape = Model(model.config, model.backbone.without_weights(), fresh=False).to(dtype)
    frozen = shape.backbone.working_copy(dtype, "eager")
    recompute = stage.activation_checkpointing if checkpointing is None else checkpointing
    engine = Engine(backbone=frozen, autocast=None, reason="counted", activation_checkpointing=recompute)
    mixture, most = stage.mixture, 0
    rows = {"draw": (mixture.draw, 1), "caption": (mixture.caption // mixture.pack, mixture.pack)}
    for parameter in shape.new_parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients are counted with the weights
    with shape.using(engine):
        for task, made in _samples(shape).items():
            count, per_row = rows[task]
            if count and task in shape.capabilities:
                before = mixture.shots if task == "caption" else 0
                sample = Sample(segments=made(words).segments * (1 + before))
                batch = pack([[sample] * per_row] * count).to("meta")
                with LiveBytes() as live:
                    _loss(shape, batch, task).backward()
                most = max(most, live.most)
    return most or None


def _loss(model: Model, batch: Batch, task: str) -> Tensor:
    """A loss of a task with the shapes of training, on tensors that may have no values."""
    hidden, run = model.run_pass(batch)
    if task == "draw":
        return model.port.readout(run.states[model.modality.name]).float().square().mean()
    learned = batch.num_sequences * (batch.text.count // (batch.num_sequences // len(batch.text_ids)) - 1)
    states = hidden[:, run.slices["text"]].flatten(0, 1)[:learned]
    scores = model.engine.backbone.logits(states[None])[0].float()
    return functional.cross_entropy(scores, torch.zeros(learned, dtype=torch.int64, device=scores.device))


@contextmanager
def _without_gradients(model: Model) -> Iterator[None]:
    """Disable gradients of all weights in the block: the counter mistakes a view of one that requires them for a node."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with torch.no_grad():
            for parameter in learned:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def _flops(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def _texts_computed(mixture: Mixture, reads: int, text_bytes: Callable[[int], int]) -> int:
    """Number of cache misses for texts of drawing samples, if the oldest are evicted first.

    Args:
        mixture: provides the samples.
        reads: how often it is read.
        text_bytes: bytes cached for a text of a given number of tokens.
    """
    known: OrderedDict[tuple[int, ...], int] = OrderedDict()
    computed = kept = 0
    for read in range(reads):
        for sample in mixture.drawings(read):  # its pictures are blank: nothing is encoded
            text = sample.segments[0]
            if isinstance(text, Text) and text.ids not in known:
                known[text.ids] = text_bytes(len(text.ids))
                computed, kept = computed + 1, kept + known[text.ids]
                while kept > TEXT_STATES_BYTES and len(known) > 1:
                    kept -= known.popitem(last=False)[1]
    return computed


def samples_per_step(stage: Stage) -> int:
    """Drawing and captioning samples of one optimizer step."""
    return (stage.mixture.draw + stage.mixture.caption) * stage.accumulate


def trainable_parameters(model: Model) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.new_parameters() if p.requires_grad)


def tokens_added(model: Model) -> int:
    """Positions that one picture, or sound, adds to a text sequence, boundaries included."""
    grid = model.modality.grid(model.modality.sizes[0])
    blank = model.modality.segment(torch.zeros(grid[0] * grid[1], model.modality.token_width), grid)
    words = Text(ids=model.backbone.end_ids[:1])
    batch = pack([[Sample(segments=(blank, words))]])
    tables = [batch.text, *(media.rows for media in batch.media.values())]
    return sum(int((table.order >= 0).sum()) for table in tables) - len(words.ids)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, Any]]:
    """Peak memory inside the block: ``bytes`` (None if unknown) and ``what`` it measures."""
    found: dict[str, Any] = {"bytes": None, "what": "not measured on this system"}
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            reset.write_text("5", encoding="ascii")  # resets the high-water mark
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
    """Seconds of a training step and of sampling, by a `short_run`; for sounds, ``_per_picture`` means per sound.

    Args:
        recipe: the recipe, whose last stage is measured.
        source: the pictures, or sounds.
        backbone: the base.
        steps: Euler steps per drawing.
        compile: compile as in training.
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
    shown: list[Any]
    if isinstance(source, Sounds):
        shown, made = [source.sound(i) for i in indices], lambda: model.generate([[name, Audio()] for name in prompts])
    else:
        shown, made = (
            [source.picture(i, model.image.sizes[0]) for i in indices],
            lambda: model.draw(prompts, steps=steps),
        )
    asked = {"draw": made, "caption": lambda: model.caption(shown)}
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
