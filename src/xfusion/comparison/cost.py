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
from xfusion.engine import Engine
from xfusion.evaluation.suites.emoji import choose_examples
from xfusion.model import Model, ModelConfig
from xfusion.objectives.next_token import sum_of_nats
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
    # The counter does not know fused attention. Training on a CPU uses the grouped one, of as many products as the eager one.
    engine = model.training_engine(dtype, reason, "eager", False)
    backbone, modality = model.backbone, model.modality
    mixture = Mixture(
        source, modality, modality.sizes, backbone.encode, backbone.begin_ids, backbone.end_id, stage.mixture, seed
    )
    training: dict[str, int] = {}
    forward: dict[str, int] = {}
    samples: dict[str, int] = {}
    text_flops = num_texts = 0

    def total_loss(batch: Batch) -> Tensor | float:
        with torch.autocast(model.backbone.device.type, engine.dtype, enabled=bool(engine.autocast)):
            losses_by_name = model.losses(batch, torch.Generator().manual_seed(0))
        return sum(value for value, _ in losses_by_name.values())

    def forward_and_backward(batch: Batch) -> None:
        loss = total_loss(batch)
        if isinstance(loss, Tensor):
            loss.backward()

    with model.using(engine):
        for batch in mixture.batches(0):
            task = "caption" if bool((batch.labels != IGNORE).any()) else "draw"
            num_known = len(engine.text_states)
            first_flops = _flops(lambda b=batch: forward_and_backward(b))
            training_flops = _flops(lambda b=batch: forward_and_backward(b))
            with _without_gradients(model):
                forward_flops = _flops(lambda b=batch: total_loss(b))
            text_flops += first_flops - training_flops
            num_texts += len(engine.text_states) - num_known
            training[task] = training.get(task, 0) + training_flops
            forward[task] = forward.get(task, 0) + forward_flops
            samples[task] = samples.get(task, 0) + batch.num_sequences
    for parameter in model.new_parameters():
        parameter.grad = None
    return StageCost(
        step=sum(training.values()) * stage.accumulate,
        training={task: value // samples[task] for task, value in training.items()},
        forward={task: value // samples[task] for task, value in forward.items()},
        text=text_flops // num_texts if num_texts else 0,
        texts=lambda steps: _count_cache_misses(
            mixture, steps * stage.accumulate, lambda n: model.text_bytes(n, engine.dtype)
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
    samples = {task: make_sample(words) for task, make_sample in _sample_makers(model).items()}
    flops: dict[str, dict[str, int]] = {}
    with model.using(model.training_engine(torch.float32, "counted", "eager", False)):
        for task, sample in samples.items():
            if task not in model.capabilities:
                continue
            batch = pack([[sample]]).to(model.backbone.device)
            outputs: list[Tensor] = []

            def forward(batch: Batch = batch, task: str = task, outputs: list[Tensor] = outputs) -> None:
                hidden, run = model.run_pass(batch)
                if task == "draw":
                    outputs.append(model.port.readout(run.states[model.modality.name]).sum())
                else:
                    outputs.append(model.engine.backbone.logits(hidden[:, run.slices["text"]]).sum())

            forward_flops = _flops(forward)
            flops[task] = {
                "forward": forward_flops,
                "training": forward_flops + _flops(lambda outputs=outputs: outputs[0].backward()),
            }
    for parameter in model.new_parameters():
        parameter.grad = None
    return flops


def flops_of_encoder(config: ModelConfig) -> int | None:
    """FLOPs of the frozen encoder or codec for one picture of the largest size, which all other counts exclude. None for
    sounds, whose encoder is loaded on first use.
    """
    if config.audio is not None:
        return None
    image = config.image.build()
    size = max(image.sizes)
    return _flops(lambda: image.encode(torch.zeros(1, 3, size, size), size))


def _sample_makers(model: Model) -> dict[str, Callable[[int], Sample]]:
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
        self.current = self.peak = 0
        self._storages = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and record its inputs and outputs."""
        for argument in tree_leaves((args, kwargs)):
            if isinstance(argument, Tensor):
                self._storages.setdefault(argument.untyped_storage(), True)
        out = func(*args, **(kwargs or {}))
        for result in tree_leaves(out):
            if isinstance(result, Tensor) and (storage := result.untyped_storage()) not in self._storages:
                num_bytes = storage.nbytes()
                self._storages[storage] = True
                weakref.finalize(storage, self._subtract, num_bytes)
                self.current += num_bytes
                self.peak = max(self.peak, self.current)
        return out

    def _subtract(self, num_bytes: int) -> None:
        self.current -= num_bytes


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
    meta_model = Model(model.config, model.backbone.without_weights(), fresh=False).to(dtype)
    meta_backbone = meta_model.backbone.working_copy(dtype, "eager")
    recompute = stage.activation_checkpointing if checkpointing is None else checkpointing
    engine = Engine(backbone=meta_backbone, autocast=None, reason="counted", activation_checkpointing=recompute)
    mixture, peak = stage.mixture, 0
    rows = {"draw": (mixture.draw, 1), "caption": (mixture.caption // mixture.pack, mixture.pack)}
    for parameter in meta_model.new_parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients are counted with the weights
    with meta_model.using(engine):
        for task, make_sample in _sample_makers(meta_model).items():
            count, per_row = rows[task]
            if count and task in meta_model.capabilities:
                num_shots = mixture.shots if task == "caption" else 0
                sample = Sample(segments=make_sample(words).segments * (1 + num_shots))
                batch = pack([[sample] * per_row] * count).to("meta")
                with LiveBytes() as live_bytes:
                    _loss(meta_model, batch, task).backward()
                peak = max(peak, live_bytes.peak)
    return peak or None


def _loss(model: Model, batch: Batch, task: str) -> Tensor:
    """A loss of a task with the shapes of training, on tensors that may have no values."""
    hidden, run = model.run_pass(batch)
    if task == "draw":
        return model.port.readout(run.states[model.modality.name]).float().square().mean()
    num_targets = batch.num_sequences * (batch.text.count // (batch.num_sequences // len(batch.text_ids)) - 1)
    states = hidden[:, run.slices["text"]].flatten(0, 1)[:num_targets]
    places, base = torch.arange(num_targets, device=states.device), model.engine.backbone
    labels = torch.zeros_like(places)
    return sum_of_nats(lambda chosen: base.logits(states[chosen][None])[0], places, labels, base.config.vocab_size)


@contextmanager
def _without_gradients(model: Model) -> Iterator[None]:
    """Disable gradients of all weights in the block: the counter mistakes a view of one that requires them for a node."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with torch.no_grad():
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _flops(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def _count_cache_misses(mixture: Mixture, num_reads: int, text_bytes: Callable[[int], int]) -> int:
    """Number of cache misses for texts of drawing samples, if the oldest are evicted first.

    Args:
        mixture: provides the samples.
        num_reads: how often it is read.
        text_bytes: bytes cached for a text of a given number of tokens.
    """
    cached: OrderedDict[tuple[int, ...], int] = OrderedDict()
    num_computed = cached_bytes = 0
    for read in range(num_reads):
        for sample in mixture.drawings(read):  # its pictures are blank: nothing is encoded
            text = sample.segments[0]
            if isinstance(text, Text) and text.ids not in cached:
                cached[text.ids] = text_bytes(len(text.ids))
                num_computed, cached_bytes = num_computed + 1, cached_bytes + cached[text.ids]
                while cached_bytes > TEXT_STATES_BYTES and len(cached) > 1:
                    cached_bytes -= cached.popitem(last=False)[1]
    return num_computed


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
    text = Text(ids=model.backbone.end_ids[:1])
    return pack([[Sample(segments=(blank, text))]]).num_positions - len(text.ids)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, Any]]:
    """Peak memory inside the block: ``bytes`` (None if unknown) and ``what`` it measures."""
    memory: dict[str, Any] = {"bytes": None, "what": "not measured on this system"}
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            reset.write_text("5", encoding="ascii")  # resets the high-water mark
        except OSError:
            yield memory
            return
    yield memory
    if device.type == "cuda":
        memory |= {"bytes": torch.cuda.max_memory_allocated(device), "what": "allocated on the GPU in training"}
        return
    line = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))
    if line:
        what = "resident in the whole process in training, the frozen base included; the mark is reset before"
        memory |= {"bytes": 1024 * int(line[1]), "what": what}


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
    model, speed = short_run(recipe, source=source, backbone=backbone, compile=compile)
    result: dict[str, Any] = {
        "load_before": load,
        "threads": torch.get_num_threads(),
        "step_seconds": speed and samples_per_step(recipe.stages[-1]) / speed,
    }
    indices = choose_examples(source.examples, 8)
    prompts = [source.examples[i].captions[0] for i in indices]
    media: list[Any]
    if isinstance(source, Sounds):
        media, draw = [source.sound(i) for i in indices], lambda: model.generate([[name, Audio()] for name in prompts])
    else:
        media, draw = (
            [source.picture(i, model.image.sizes[0]) for i in indices],
            lambda: model.draw(prompts, steps=steps),
        )
    functions = {"draw": draw, "caption": lambda: model.caption(media)}
    for task in sorted(set(functions) & model.capabilities):
        result[f"{task}_seconds_per_picture"] = _median_seconds(functions[task]) / len(indices)
    return result


def _median_seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    function()
    durations = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        durations.append(time.perf_counter() - started)
    return statistics.median(durations)
