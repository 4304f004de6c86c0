"""The only training loop: stages, budgets, previews, checkpoints that a crash cannot break.

A run is asked for (`settings`), set up (`setup`), prints its `summary` and walks: each step reads its batches, of which what
turns out unreadable is left out (`unreadable`), takes all losses, and moves the weights (`optimizer`). Between two steps it may
plan its length (`progress`), draw a preview, write a state (`states`), or be stopped (`stopping`). A preview and the pack are its
`outputs`.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image as PILImage
from rich.console import Console

from xfusion import checkpoint
from xfusion.backbone import Backbone
from xfusion.backbone.attention import choose_attention
from xfusion.data.mixture import Ahead
from xfusion.data.sequence import Batch, XFusionError
from xfusion.data.sources import Source, stated_licence
from xfusion.modalities.image import ImageModality
from xfusion.model import Model, compiled_graphs
from xfusion.training import outputs, resuming, setup, states, summary
from xfusion.training.memory import keep_freed_memory
from xfusion.training.optimizer import Optimizer
from xfusion.training.pace import Pace
from xfusion.training.precision import check_compute_dtype, choose_compute_dtype
from xfusion.training.processes import Processes, Shard, is_divided
from xfusion.training.progress import Progress, all_examples
from xfusion.training.settings import Settings
from xfusion.training.stages import Recipe
from xfusion.training.stopping import Interrupted, Stop, stopping
from xfusion.training.track import Listener, Track
from xfusion.training.unreadable import LeftOut, TooManyUnreadable

if TYPE_CHECKING:
    from xfusion.training.sharding import Sharding

T = TypeVar("T")


def train(
    recipe: Recipe,
    *,
    out: str | os.PathLike[str],
    data: str | None = None,
    source: Source | None = None,
    allow_bad: float = 0.0,
    steps: int | None = None,
    minutes: float | None = None,
    resume: bool = False,
    from_pack: str | None = None,
    backbone: Backbone | None = None,
    device: torch.device | str = "cpu",
    compile: bool = True,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    preview_prompts: tuple[str, ...] | None = None,
    preview_every: float = 60.0,
    checkpoint_every: float = 300.0,
    keep: int = 2,
    shard: Shard = "none",
    decoders: int | None = None,
    console: Console | None = None,
    listener: Listener | None = None,
) -> Model:
    """Train a recipe; the result is a pack in ``out/pack``. Under torchrun the processes share every step's samples.

    Args:
        recipe: what to build and how to train it.
        out: the run's folder: ``log.jsonl``, ``tensorboard/``, ``previews/``, ``state/``, ``pack/``.
        data: overrides the recipe's data.
        source: an opened source instead of ``data``.
        allow_bad: share of unreadable pictures that is left out instead of stopping; it counts those that turn out so in
            mid-run, too, whose places other examples take, in all processes alike. One more stops the run with its state.
        steps: overrides the number of steps of the last stage.
        minutes: wall-clock budget, compiling included: once steps get no faster it fixes their number, writes it down, and
            everything after is by step. Takes one stage.
        resume: go on where the run of this folder stopped, with the next batch.
        from_pack: start from this pack's weights.
        backbone: an already loaded base; its device is the run's.
        device: where the base is loaded to, where none is given.
        compile: compile the per-layer work.
        dtype: compute type, any but torch.float16; None chooses by device and says why.
        attention: what layers attend by, of `xfusion.backbone.attention.ATTENTIONS`; None chooses by device.
        preview_prompts: what previews draw (None: the first captions of the data).
        preview_every: seconds between previews; 0 makes none.
        checkpoint_every: seconds between checkpoints.
        keep: newest checkpoints that stay; besides stays the best, by the mean training loss of some fifty steps.
        shard: what several processes divide: nothing, the new weights, or the frozen ones too (`training.sharding`).
        decoders: threads of each process that read and decode pictures; None takes four, or as many as there are cores.
        console: where progress is shown; None is silent.
        listener: called with every event.

    Raises:
        XFusionError: bad data, a precision without gradients, a loss that is not finite, a resumed run of another recipe, a
            folder that takes no more.
        Interrupted: Ctrl-C or SIGTERM; the step was finished, state and pack were written.
    """
    if data is not None:
        recipe = replace(recipe, data=data, data_licence=None)
    if steps is not None:
        recipe = replace(recipe, stages=(*recipe.stages[:-1], replace(recipe.stages[-1], steps=steps)))
    settings = Settings(
        recipe=recipe,
        out=Path(out),
        source=source,
        allow_bad=allow_bad,
        minutes=minutes,
        resume=resume,
        from_pack=from_pack,
        backbone=backbone,
        device=device,
        compile=compile,
        dtype=dtype,
        attention=attention,
        preview_prompts=preview_prompts,
        preview_every=preview_every,
        checkpoint_every=checkpoint_every,
        keep=keep,
        shard=shard,
        decoders=decoders,
        console=console,
        listener=listener,
    )
    run = _Run(settings)
    with run.closing:
        run.prepare()
        with run.processes.noticing(lambda: run.progress.step):
            return run.go()


class _Run:
    """One training run."""

    def __init__(self, settings: Settings):
        self.settings, self.recipe, self.out = settings, settings.recipe, settings.out
        self.progress = Progress(self.recipe.stages, settings.minutes)
        self.closing = ExitStack()
        self.sharding: Sharding | None = None
        self.saved_step: int | None = None
        self.preview_every = settings.preview_every
        self.preview_seconds = 3.0
        """What the last preview took; a guess before the first."""

    # -- before the first step

    def prepare(self) -> None:
        settings = self.settings
        device = settings.device if settings.backbone is None else settings.backbone.device
        self.processes = processes = Processes(device)
        self.shard: Shard = settings.shard if processes.count > 1 else "none"
        self.attends = choose_attention(processes.device, settings.attention)
        with processes.first_alone():  # rates are measured where nothing else computes, and what is wrong is told once
            own = self._precision()
        chosen, reason = processes.same(own)
        if self.shard == "none":
            with processes.first_alone():
                self._open()
        else:
            from xfusion.training.sharding import Sharding, mesh

            row = mesh(processes.device)
            with processes.one_by_one():  # each holds all new weights until it has divided them
                self._open()
                self.sharding = Sharding(self.model, self.shard, row, chosen, self.attends)
        self._share(chosen, reason)

    def _precision(self) -> tuple[torch.dtype, str]:
        """The compute type with the reason: what was asked for, what a resumed run had, or what is fastest here."""
        if self.settings.dtype is not None:
            return check_compute_dtype(self.settings.dtype), "as asked"
        if self.settings.resume and states.found(self.out / "state"):
            kept = states.newest_plan(self.out / "state").get("dtype")
            if kept is not None:
                return getattr(torch, kept), f"{kept}: as before"
        return choose_compute_dtype(self.processes.device)

    def _open(self) -> None:
        """Model and data; the first process goes through it alone, so that the others find its indexes and files."""
        settings, base = self.settings, self.recipe.model.backbone
        if not self.out.exists():
            self.closing.callback(setup.leave_no_empty, self.out)
        setup.take_folder(self.out, resume=settings.resume)
        # A base that will be divided stays where it is mapped: in the file.
        device = "cpu" if self.shard == "all" else self.processes.device
        backbone = settings.backbone or Backbone.load(base.source, revision=base.revision, device=device)
        self.model = model = setup.open_model(settings, backbone)
        setup.check_losses(model, self.recipe.stages, self.processes.count, self.shard)
        self.source = source = setup.open_data(settings, backbone.special_tokens)
        self.data_licence = stated_licence(source.licence, self.recipe.data_licence, source.spec)
        drawn = "draw" in model.capabilities and isinstance(model.modality, ImageModality)
        if not drawn or (self.shard == "none" and not self.processes.first):
            self.preview_every = 0.0

    def _share(self, chosen: torch.dtype, reason: str) -> None:
        """What all processes do together: equal weights, the state, batches, and what the first one tells."""
        settings, model, processes, sharding = self.settings, self.model, self.processes, self.sharding
        processes.same_weights([p for p in model.new_parameters() if not is_divided(p)])
        self.optimizer = Optimizer(model.named_new_parameters(), None if sharding is None else processes.total)
        self.left_out = LeftOut(self.source, settings.allow_bad)
        if settings.resume:
            self._resume()
        told = (self.out, settings.console) if processes.first else (None, None)
        self.track = Track(*told, settings.listener, self.progress.step)
        self.closing.callback(self.track.close)
        keeps_memory = processes.device.type == "cpu" and keep_freed_memory()
        divided = None if sharding is None else sharding.backbone
        self.engine = model.training_engine(chosen, reason, self.attends, settings.compile, divided)
        self.mixtures = [
            setup.mixture(stage, self.source, model, settings, processes, self.left_out) for stage in self.recipe.stages
        ]
        prompts = setup.Prompts.of(self.source, model, self.engine)
        self.engine.keep_text &= not model.fusion.prefix_is_constant or prompts.come_back
        self.ahead = Ahead(self._batches, in_thread=processes.device.type != "cpu")
        self.closing.callback(self.ahead.close)
        computed = None if self.engine.keep_text or sharding is not None else prompts
        self.track.say(
            *summary.lines(model, self.recipe, self.source, self.engine, computed, keeps_memory=keeps_memory)
        )
        if self.progress.step:
            self.track.say(f"resumed   behind step {self.progress.step}, {self.progress.samples} samples")
        if processes.count > 1:
            self.track.say(*summary.expected_memory(processes, self.shard, model, self.engine, self.optimizer))
        self.track.event(
            event="start",
            step=self.progress.step,
            processes=processes.count,
            shard=self.shard,
            new_parameters=model.num_new_parameters,
            pictures=len(self.source.examples),
            dtype=str(chosen).removeprefix("torch."),
            threads=torch.get_num_threads(),
            resumed=self.progress.step > 0,
            taken={str(index): dict(taken) for index, taken in model.fusion.taken.items()},
        )

    # -- the walk

    def go(self) -> Model:
        progress = self.progress
        first = "compiling ..." if self.settings.compile else "first step ..."
        self.track.start_bar(progress.total if progress.planned else 0, progress.step, first)
        with stopping(tell=self.track.console is not None and self.processes.first) as stop:
            together = True
            try:
                self._walk(stop)
            except KeyboardInterrupt:  # by a listener, between two steps
                if stop.signal is not None:  # the second signal, in the middle of anything
                    raise
                if self.sharding is not None:  # what is divided cannot be written by one
                    raise
                stop.signal, together = signal.SIGINT, False
            if together and self.processes.count > 1:
                self._tell_memory()
            self.save()
            self._leave_pack(wait=together)
        if stop.signal is not None:
            self.track.say(f"stopped at step {progress.step}; go on with --resume")
            raise Interrupted(f"training stopped at step {progress.step}; go on with --resume", stop.code)
        if self.preview_every:
            self.preview()
        facts = {"step": progress.step, "samples": progress.samples, "seconds": progress.seconds}
        self.track.event(event="end", **facts, graphs=compiled_graphs())
        return self.model

    def _walk(self, stop: Stop) -> None:
        """Steps, previews and checkpoints until the run is done or asked to stop."""
        last_checkpoint = last_preview = time.perf_counter()
        pace = Pace(self.progress.step)
        if not self.progress.step:
            self._try_largest()
        # All processes stop behind the same step, whichever of them the signal reached.
        while not self._stopped(stop) and not self.progress.over:
            self._one_step()
            now = time.perf_counter()
            if not self.progress.planned:  # the first process's clock says when: all plan behind the same step
                measured = pace.seconds_per_step(self.progress.step, now, self.progress.planned_by())
                if (per_step := self.processes.same(measured)) is not None:
                    self._plan(per_step, now)
            due = [
                bool(self.preview_every) and now - last_preview >= self.preview_every,
                now - last_checkpoint >= self.settings.checkpoint_every,
            ]
            if self.sharding is not None:  # all draw and write together
                due = self.processes.largest(*map(int, due))
            if due[0]:
                self.preview()
                last_preview = time.perf_counter()
            if due[1]:
                self.save()
                last_checkpoint = time.perf_counter()

    def _stopped(self, stop: Stop) -> bool:
        stop.signal = self.processes.largest(stop.signal or 0)[0] or None
        return stop.signal is not None

    def _plan(self, seconds_per_step: float, now: float) -> None:
        progress = self.progress
        total = progress.steps_in_budget(seconds_per_step, now, self.preview_every, self.preview_seconds)
        progress.plan(self.processes.same(total))
        self.track.set_total(progress.total)
        self.track.event(event="plan", step=progress.step, steps=progress.total, seconds_per_step=seconds_per_step)
        self.track.say(
            f"plan      {progress.total} steps in {progress.minutes:g} minutes at {seconds_per_step:.3f} s per step"
        )

    def _try_largest(self) -> None:
        """The widest step of every stage forth and back, thrown away: what does not fit in memory fails now, not at night."""
        # Not compiled: that needs the more memory, and a graph that nobody uses again would take half a minute.
        engine = replace(self.engine, compiled=False)
        with self.model.using(engine):
            for number, mixture in enumerate(self.mixtures):
                engine.activation_checkpointing = self.recipe.stages[number].activation_checkpointing
                batches = self._readable(mixture.largest)
                try:
                    with setup.fitting(number, batches, self.processes.device):
                        for batch in batches:
                            found, zero = self._losses(batch, torch.Generator().manual_seed(0))
                            loss = sum((value for value, _ in found.values()), zero)
                            if isinstance(loss, torch.Tensor):
                                loss.backward()
                finally:
                    self.optimizer.forget_gradients()

    # -- one step

    def _one_step(self) -> None:
        begun, progress = time.perf_counter(), self.progress
        step = progress.step
        number, inside, _ = progress.stage(step)
        stage = self.recipe.stages[number]
        batches = self._readable(lambda: self.ahead.take(step))
        counts: dict[str, int] = {}
        for batch in batches:
            for objective in self.model.objectives:
                for name, count in objective.count(batch).items():
                    counts[name] = counts.get(name, 0) + count
        weights = {name: weight for o in self.model.objectives for name, weight in o.weights.items()}
        digest = hashlib.sha256(f"{self.recipe.seed}/noise/{step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        losses = dict.fromkeys(counts, 0.0)
        self.engine.activation_checkpointing = stage.activation_checkpointing
        with self.model.using(self.engine):
            for batch in batches:
                found, zero = self._losses(batch, generator)
                objective_sum = sum((weights[name] * value / counts[name] for name, (value, _) in found.items()), zero)
                if isinstance(objective_sum, torch.Tensor):
                    objective_sum.backward()
                for name, (value, _) in found.items():
                    losses[name] += float(value.detach()) / counts[name]
        losses = self.processes.add(losses, self.optimizer.whole)
        for name, value in losses.items():
            if not math.isfinite(value):
                raise self._diverged(f"the loss {name} is {value} at step {step}", number)
        rate = progress.rate()
        norm = self.optimizer.step(rate, stage.clip, stage.ema_at(inside), stage.weight_decay)
        if not norm < float("inf"):
            raise self._diverged(f"the gradient's norm is {norm} at step {step}, although the loss is finite", number)
        samples = sum(batch.num_sequences for batch in batches)
        # Counted before anybody is told: whoever listens may end the run here.
        progress.take(sum(weights[name] * value for name, value in losses.items()), samples)
        self.track.event(
            event="step",
            step=step,
            seconds=round(progress.seconds, 3),
            losses=losses,
            rate=rate,
            gradient_norm=norm,
            samples=samples,
            samples_per_second=samples / (time.perf_counter() - begun),
        )

    def _diverged(self, what: str, number: int) -> XFusionError:
        return self._of_all(
            f"{what}: training stopped; the last checkpoint in {self.out / 'state'} is intact, try a lower"
            f" --stages.{number}.rate than {self.recipe.stages[number].rate}"
        )

    def _of_all(self, message: str) -> XFusionError:
        """An error that all processes raise together, and the first one tells."""
        error = XFusionError(message)
        error.told_elsewhere = not self.processes.first
        return error

    def _batches(self, step: int) -> list[Batch]:
        """What a step reads; nothing behind the last one."""
        if self.progress.planned and step >= self.progress.total:
            return []
        number, inside, _ = self.progress.stage(step)
        times = self.recipe.stages[number].accumulate
        return [b for k in range(times) for b in self.mixtures[number].batches(inside * times + k)]

    def _readable(self, make: Callable[[], T]) -> T:
        """What is made of examples that can be read.

        Raises:
            XFusionError: too many cannot. No weight has moved since the last step; its state is written.
        """
        step = self.progress.step
        try:
            return self.left_out.read(make, step, self.ahead, self.processes, self.track)
        except TooManyUnreadable as error:
            if not step:
                raise self._of_all(str(error)) from error
            self.saved_step = None  # what the state of this step says may be there without them
            self.save(error.broken)
            self.processes.meet()  # or a launcher that sees one process end would end the one that writes
            stopped = f"{error}; training stopped behind step {step}, its state is written: go on with --resume"
            raise self._of_all(stopped) from error

    def _losses(
        self, batch: Batch, generator: torch.Generator
    ) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], torch.Tensor | int]:
        """Losses of this process's rows, and a 0 that belongs into their sum."""

        def work() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
            with torch.autocast(self.processes.device.type, self.engine.dtype, enabled=bool(self.engine.autocast)):
                return self.model.losses(batch, generator, self.processes.share(len(batch.text_ids)))

        return (work(), 0) if self.sharding is None else self.sharding.losses(work)

    # -- what is written

    def preview(self) -> None:
        """Draw some prompts with the averaged weights by the very same `generate` that users call."""
        begun = time.perf_counter()
        prompts = list(self.settings.preview_prompts or (e.captions[0] for e in self.source.examples[:8]))
        with self.optimizer.averaged():
            pictures = self._drawn(prompts)
        self.preview_seconds = time.perf_counter() - begun
        if self.processes.first:
            path = self.out / "previews" / f"step_{self.progress.step:06d}.png"
            self.track.image(outputs.write_sheet(path, pictures, self.model.image.sizes[0]), self.progress.step)
            self.track.event(event="preview", step=self.progress.step, path=str(path), prompts=prompts)

    def _drawn(self, prompts: list[str]) -> list[PILImage.Image]:
        if self.sharding is None:
            return self.model.draw(prompts, seed=0)
        with self.model.using(replace(self.engine, compiled=False)):
            return self.sharding.passes(lambda: self.model.draw(prompts, seed=0))

    def save(self, broken: dict[int, str] | None = None) -> None:
        """The state that `resume` needs; it appears whole or not at all, and the old one stays until then.

        Args:
            broken: examples that cannot be read and are not left out: a resumed run keeps their places, and tries them again.
        """
        if self.saved_step == self.progress.step or (self.sharding is None and not self.processes.first):
            return
        plan = {
            "recipe": checkpoint.to_json(self.recipe),
            "base_fingerprint": self.model.backbone.fingerprint,
            **self.progress.state_dict(),
            "threads": torch.get_num_threads(),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "examples": self._examples,
            "left_out": self.left_out.state_dict(),
            "broken": self.left_out.by_id(broken or {}),
        }
        self.track.to_disk()
        folder, tensors, keep = self.out / "state", self.optimizer.state_dict(), self.settings.keep
        if self.sharding is None:
            states.write(folder, tensors, plan, keep)
        else:
            states.write_divided(folder, tensors, plan, keep, self.processes)
        self.saved_step = self.progress.step

    @cached_property
    def _examples(self) -> list[Any]:
        return all_examples(self.source)

    def _resume(self) -> None:
        """Go on from the newest intact state."""
        divided = self.sharding is not None
        plan, tensors = resuming.read(self.out / "state", self.optimizer, self.processes, divided=divided)
        fingerprint = self.model.backbone.fingerprint
        resuming.check(plan, self.out, self.recipe, fingerprint, self.source.spec, self._examples)
        self.progress.load_state_dict(plan)
        self.left_out.load_state_dict(plan.get("left_out", {}))
        self.optimizer.load_state_dict(tensors)
        self.saved_step = self.progress.step

    def _leave_pack(self, *, wait: bool) -> None:
        if self.recipe.stages[-1].ema > 0:
            self.optimizer.use_average()  # the model that is returned and saved holds the averaged weights
        facts = outputs.pack_facts(self.recipe, self.progress, self.source, self.data_licence)
        self.model = outputs.write_pack(self.out / "pack", self.model, facts, self.sharding, self.processes, wait=wait)
        if self.sharding is not None and not self.processes.first:
            self.preview_every = 0.0
        self.sharding = None

    def _tell_memory(self) -> None:
        """What the processes hold behind the last step."""
        held = summary.held_memory(self.processes, self.shard, self.model, self.engine, self.optimizer)
        self.track.say(f"memory behind step {self.progress.step}", *held)
