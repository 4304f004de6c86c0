"""The training loop: stages, wall-clock budgets, previews, and checkpoints that survive a crash.

A run checks its `settings`, is prepared (`setup`) and prints its `summary`. Each step reads its batches, skips unreadable
examples (`unreadable`), computes all losses and updates the weights (`optimizer`). Between steps the run may plan its length
(`progress`), draw a preview, write a state (`states`), or be stopped (`stopping`). Previews and the pack are its `outputs`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image as PILImage
from rich.console import Console

from xfusion import checkpoint
from xfusion.backbone import Backbone
from xfusion.backbone.attention import choose_attention
from xfusion.card import training_runs
from xfusion.data.mixture import Prefetcher, WeightedBatch
from xfusion.data.sequence import Batch, XFusionError
from xfusion.data.sources import Source, stated_licence
from xfusion.modalities.image import ImageModality
from xfusion.model import Model
from xfusion.training import outputs, resuming, setup, states, summary, trackers
from xfusion.training.memory import keep_freed_memory
from xfusion.training.optimizer import Optimizer
from xfusion.training.pace import FEW_STEPS, LARGE_PREVIEWS, SMALL_STEP, WARM_STEPS, Graphs, Pace
from xfusion.training.precision import check_compute_dtype, choose_compute_dtype
from xfusion.training.processes import Processes, Shard, is_sharded
from xfusion.training.progress import Progress, all_examples
from xfusion.training.settings import Settings
from xfusion.training.stages import Recipe
from xfusion.training.stopping import Interrupted, Stop, stopping
from xfusion.training.track import Listener, Track
from xfusion.training.unreadable import LeftOut, TooManyUnreadable

if TYPE_CHECKING:
    from xfusion.training.sharding import Sharding

T = TypeVar("T")
logger = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    *,
    out: str | os.PathLike[str],
    data: str | None = None,
    source: Source | None = None,
    allow_bad: float = 0.0,
    skip_nonfinite: int = 0,
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
    patience: float = 30.0,
    decoders: int | None = None,
    track: tuple[str, ...] = (),
    command: str | None = None,
    console: Console | None = None,
    listener: Listener | None = None,
) -> Model:
    """Train a recipe and write a pack to ``out/pack``. Under torchrun the processes share the samples of every step.

    Args:
        recipe: what to build and how to train it.
        out: the run's folder: ``log.jsonl``, ``tensorboard/``, ``previews/``, ``state/``, ``pack/``.
        data: overrides the recipe's data.
        source: an opened source instead of ``data``.
        allow_bad: share of unreadable examples that is skipped. It includes those that become unreadable during the run, which
            other examples replace, in all processes alike. One more stops the run and writes its state.
        skip_nonfinite: how many steps of the run may have a loss or a gradient that is not finite. These are skipped: weights,
            moments and average stay as they are. One more stops the run.
        steps: overrides the number of steps of the last stage.
        minutes: wall-clock budget, compilation included. Once the pace is steady the number of steps is fixed and logged. Only
            for recipes with one stage.
        resume: continue the run in this folder with its next batch. Of its settings only those that each step reads anew may be
            others (`xfusion.training.resuming.CHANGEABLE`); these are printed, logged and recorded in the pack.
        from_pack: start from this pack's weights.
        backbone: an already loaded base; its device is the run's.
        device: where to load the base, if none is given.
        compile: compile the work of each layer.
        dtype: compute type, torch.bfloat16 or torch.float32; None chooses by device and says why.
        attention: one of `xfusion.backbone.attention.ATTENTIONS`; None chooses by device.
        preview_prompts: prompts of the previews (None: the first captions of the data).
        preview_every: seconds between previews; 0 makes none.
        checkpoint_every: seconds between checkpoints.
        keep: how many of the newest checkpoints to keep, besides the best by the mean training loss of some fifty steps.
        shard: what the processes shard: nothing, the new weights, or also the frozen ones (`training.sharding`).
        patience: minutes that a process waits for another between two steps or within one; it is then lost, as if it had died.
            A preview or a state must not take longer. Before the first step they wait for hours.
        decoders: threads per process that read and decode pictures; None uses four, or one per core if there are fewer.
        track: the trackers that curves and previews are copied to, of wandb and trackio.
        command: how the run was asked for, recorded in the pack and on its card; a resumed run keeps the first one.
        console: where to show progress; None is silent.
        listener: called with every event.

    Raises:
        XFusionError: bad data, a dtype that cannot train, another recipe on resume, or a folder that cannot be written.
        Diverged: a loss or a gradient is not finite, and `skip_nonfinite` steps were skipped before.
        Interrupted: Ctrl-C or SIGTERM; the step was finished, and state and pack were written. Behind the last step the run is
            finished instead.
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
        skip_nonfinite=skip_nonfinite,
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
        patience=patience,
        decoders=decoders,
        track=track,
        command=command,
        console=console,
        listener=listener,
    )
    run = _Run(settings)
    with run.exit_stack, run.processes.naming_lost_process(lambda: (run.progress.step, run.saved_step)):
        run.prepare()
        return run.train()


class Diverged(XFusionError):
    """A loss or a gradient was not finite; the last checkpoint is intact."""


class _Run:
    """One training run."""

    def __init__(self, settings: Settings):
        self.settings, self.recipe, self.out = settings, settings.recipe, settings.out
        self.progress = Progress(self.recipe.stages, settings.minutes)
        self.exit_stack = ExitStack()
        self.processes = Processes(settings.device if settings.backbone is None else settings.backbone.device)
        self.exit_stack.callback(self.processes.close)
        self.sharding: Sharding | None = None
        self.command = settings.command
        self.earlier: list[dict[str, Any]] = []
        """Records of the runs behind the pack that this run started from."""
        self.changes: list[str] = []
        """The settings that were changed when the run was resumed, in the order of their steps."""
        self.saved_step: int | None = None
        """Step of the newest intact state, which was written last or resumed from."""
        self.preview_every = settings.preview_every
        self.preview_seconds, self.save_seconds = 3.0, 0.0
        """Durations of the last preview, a guess before the first, and of the last checkpoint."""

    # -- before the first step

    def prepare(self) -> None:
        settings, processes = self.settings, self.processes
        self.shard: Shard = settings.shard if processes.count > 1 else "none"
        self.attention, self.attention_reason = choose_attention(processes.device, settings.attention)
        with processes.first_alone():  # product rates need an idle machine, and an error is reported once
            if processes.is_first:
                self.exit_stack.enter_context(setup.locked_folder(self.out, resume=settings.resume))
            precision = self._precision()
        dtype, reason = processes.broadcast(precision)
        if self.shard == "none":
            with processes.first_alone():
                self._open_model_and_data()
        else:
            from xfusion.training.sharding import Sharding, mesh

            device_mesh = mesh(processes.device)
            with processes.one_by_one():  # each process holds all new weights until it has sharded them
                self._open_model_and_data()
                self.sharding = Sharding(self.model, self.shard, device_mesh, dtype, self.attention)
        self._prepare_together(dtype, reason)
        processes.wait_at_most(settings.patience)

    def _precision(self) -> tuple[torch.dtype, str]:
        """The compute dtype and the reason: as requested, as before the resume, or the fastest here."""
        if self.settings.dtype is not None:
            return check_compute_dtype(self.settings.dtype), "as asked"
        if self.settings.resume and states.list_states(self.out / "state"):
            dtype_name = states.newest_plan(self.out / "state").get("dtype")
            if dtype_name is not None:
                return getattr(torch, dtype_name), f"{dtype_name}: as before"
        return choose_compute_dtype(self.processes.device)

    def _open_model_and_data(self) -> None:
        """Open model and data; the first process does so alone, so that the others find its indexes and files."""
        settings, base = self.settings, self.recipe.model.backbone
        # A base that will be sharded stays memory-mapped.
        device = "cpu" if self.shard == "all" else self.processes.device
        backbone = settings.backbone or Backbone.load(base.source, revision=base.revision, device=device)
        self.model, self.num_loaded = setup.open_model(settings, backbone)
        model = self.model
        self.earlier = [] if settings.from_pack is None else training_runs(model.recorded.facts)
        setup.check_losses(model, self.recipe.stages, self.processes.count, self.shard)
        self.source = source = setup.open_data(settings, backbone.special_tokens)
        self.data_licence = stated_licence(source.licence, self.recipe.data_licence, source.spec)
        if "draw" not in model.capabilities or not isinstance(model.modality, ImageModality):
            self.preview_every = 0.0

    def _prepare_together(self, dtype: torch.dtype, reason: str) -> None:
        """What all processes prepare together: equal weights, the resumed state, batches, and the log of the first process."""
        settings, model, processes, sharding = self.settings, self.model, self.processes, self.sharding
        processes.broadcast_weights([p for p in model.new_parameters() if not is_sharded(p)])
        all_reduce = None if sharding is None else processes.all_reduce
        self.optimizer = Optimizer(model.named_new_parameters(), all_reduce, model.embedding_tables)
        self.left_out = LeftOut(self.source, settings.allow_bad)
        changed = self._resume() if settings.resume else {}
        # A mixture may refuse its settings: before the folder gets a log.
        self.mixtures = [
            setup.mixture(number, self.source, model, settings, processes, self.left_out)
            for number in range(len(self.recipe.stages))
        ]
        self.graphs = Graphs(self.progress.step)
        destination = (self.out, settings.console) if processes.is_first else (None, None)
        with processes.first_alone():
            self.track = Track(*destination, settings.listener, self.progress.step, self.left_out.state_dict())
            self.exit_stack.callback(self.track.close)
            if processes.is_first:
                facts = {"recipe": checkpoint.to_json(self.recipe), "command": self.command}
                self.track.trackers = trackers.start(settings.track, self.out, facts, resume=settings.resume)
        keeps_memory = processes.device.type == "cpu" and keep_freed_memory()
        sharded_base = None if sharding is None else sharding.backbone
        self.engine = model.training_engine(dtype, reason, self.attention, settings.compile, sharded_base)
        prompts = setup.Prompts.of(self.source, model, self.engine.dtype)
        self.engine.keep_text &= not model.fusion.prefix_is_constant or prompts.worth_caching
        self.prefetcher = Prefetcher(self._batches, in_thread=processes.device.type != "cpu")
        self.exit_stack.callback(self.prefetcher.close)
        uncached_prompts = None if self.engine.keep_text or sharding is not None else prompts
        attention = model.backbone.supported_attention(self.attention, self.attention_reason)
        stage_number, stage_step, _ = self.progress.stage(self.progress.step)
        accumulate = self.recipe.stages[stage_number].accumulate
        self.track.print(
            *summary.lines(
                model,
                self.recipe,
                self.source,
                self.engine,
                attention,
                uncached_prompts,
                keeps_memory=keeps_memory,
                loaded=(settings.from_pack, self.num_loaded),
            ),
            *summary.first_step(
                model,
                self.mixtures[stage_number],
                range(stage_step * accumulate, (stage_step + 1) * accumulate),
                settings.console.width if settings.console else summary.WIDTH,
            ),
        )
        if self.progress.step:
            self.track.print(f"resumed   behind step {self.progress.step}, {self.progress.samples} samples")
        if processes.count > 1:
            self.track.print(*summary.expected_memory(processes, self.shard, model, self.engine, self.optimizer))
        self.track.event(
            event="start",
            step=self.progress.step,
            processes=processes.count,
            shard=self.shard,
            new_parameters=model.num_new_parameters,
            pictures=len(self.source.examples),
            dtype=str(dtype).removeprefix("torch."),
            attention=attention[0],
            attention_reason=attention[1],
            threads=torch.get_num_threads(),
            resumed=self.progress.step > 0,
            taken={str(index): dict(origins) for index, origins in model.fusion.taken.items()},
        )
        for setting, (before, now) in changed.items():
            self.track.print(f"changed   {setting} {before} -> {now}")
            self.track.event(event="changed", step=self.progress.step, setting=setting, before=before, now=now)

    # -- the steps

    def train(self) -> Model:
        progress = self.progress
        first_text = "compiling ..." if self.settings.compile else "first step ..."
        self.track.start_bar(progress.total if progress.planned else 0, progress.step, first_text)
        with stopping(announce=self.track.console is not None and self.processes.is_first) as stop:
            collective = True
            try:
                self._run_steps(stop)
            except KeyboardInterrupt:  # raised by a listener, between two steps
                if stop.signal is not None:  # a second signal may come at any point
                    raise
                if self.sharding is not None:  # one process cannot write sharded weights
                    raise
                stop.signal, collective = signal.SIGINT, False
            if collective and self.processes.count > 1:
                self._log_memory()
            self.save(collective=collective)
            self._write_pack(collective=collective)
            if not (progress.finished and collective):
                self.track.print(f"stopped at step {progress.step}; go on with --resume")
                raise Interrupted(f"training stopped at step {progress.step}; go on with --resume", stop.code)
            self._finish()  # a signal behind the last step has nothing left to stop
        return self.model

    def _finish(self) -> None:
        """What follows when all steps are done and state and pack are written."""
        progress = self.progress
        text_kept = outputs.record_text(self.out / "pack", self.model, self.processes, self.track)
        if self.preview_every:
            self.preview()
        if progress.skipped:
            self.track.print(f"skipped   {progress.skipped} steps whose loss or gradient was not finite")
        facts: dict[str, Any] = {"samples": progress.samples, "tokens": progress.tokens, "seconds": progress.seconds}
        facts |= {"skipped": progress.skipped} | ({} if text_kept is None else {"text": text_kept})
        self.track.event(event="end", step=progress.step, **facts, **self.graphs.facts())
        self._check_track()

    def _run_steps(self, stop: Stop) -> None:
        """Take steps, draw previews and write checkpoints until the run is finished or stopped."""
        last_checkpoint = last_preview = time.perf_counter()
        pace, due, previews_weighed = Pace(self.progress.step), (False, False), False
        if not self.progress.step:
            self._try_largest_step()
        stage_number = -1
        while True:
            if (current_stage := self.progress.stage(self.progress.step)[0]) != stage_number:
                stage_number = current_stage
                self._compile_wide_steps(stage_number)
            # One message per step: all processes stop, draw or write after the same step, whichever of them asks.
            requests = stop.signal or 0, *due, self.track.failure is not None
            signal_number, preview, write_state, log_failed = self.processes.largest(*map(int, requests))
            if log_failed:
                self._check_track()
            paused = time.perf_counter()
            if preview:
                self.preview()
                last_preview = time.perf_counter()
                if not previews_weighed:
                    previews_weighed = True
                    self._hint_at_previews()
            if write_state:
                self.save()
                last_checkpoint = time.perf_counter()
            if preview or write_state:
                pace.pause(time.perf_counter() - paused)
                due = False, False
                continue  # a signal may have arrived in the meantime
            stop.signal = signal_number or stop.signal  # a later one is shared with the next step
            if signal_number or self.progress.finished:
                return
            self._train_step()
            now, planned = time.perf_counter(), self.progress.planned
            if not planned:  # by the first process's clock, so that all plan after the same step
                measured_seconds = pace.seconds_per_step(self.progress.step, now, self.progress.planned_by())
                if (seconds_per_step := self.processes.broadcast(measured_seconds)) is not None:
                    self._plan(seconds_per_step, now)
            due = (
                bool(self.preview_every) and now - last_preview >= self.preview_every,
                # A plan is stored at once: a run that is killed would measure another pace, and make another.
                self.progress.planned != planned or now - last_checkpoint >= self.settings.checkpoint_every,
            )

    def _check_track(self) -> None:
        """Raise in all processes what kept the first one from writing the log."""
        with self.processes.first_alone():
            if self.track.failure is not None:
                raise self.track.failure

    def _plan(self, seconds_per_step: float, now: float) -> None:
        progress = self.progress
        previews, checkpoints = (
            (self.preview_every, self.preview_seconds),
            (self.settings.checkpoint_every, self.save_seconds),
        )
        total = progress.steps_in_budget(seconds_per_step, now, previews, checkpoints)
        progress.plan(self.processes.broadcast(total))
        self.track.set_total(progress.total)
        self.track.event(event="plan", step=progress.step, steps=progress.total, seconds_per_step=seconds_per_step)
        self.track.print(
            f"plan      {progress.total} steps in {progress.minutes:g} minutes at {seconds_per_step:.3f} s per step"
        )
        mixture = self.recipe.stages[0].mixture
        if progress.total < FEW_STEPS and mixture.draw + mixture.caption > SMALL_STEP:
            self.track.print(
                f"hint      so few steps often teach nothing (docs/training_log.md): give more --minutes, or smaller steps by"
                f" --stages.0.mixture.draw and .caption, now {mixture.draw} and {mixture.caption} samples"
            )

    def _hint_at_previews(self) -> None:
        """Say it if previews take much of the run: minutes given where seconds are meant make nearly every step a preview."""
        share = self.preview_seconds / (self.preview_seconds + self.preview_every)
        if share > LARGE_PREVIEWS:
            self.track.print(
                f"hint      a preview took {self.preview_seconds:.1f} s, and --preview-every is {self.preview_every:g} s:"
                f" {share:.0%} of the run goes to previews"
            )

    def _try_largest_step(self) -> None:
        """Run the widest step of every stage forward and backward and discard it: what does not fit in memory fails now."""
        # Uncompiled: this needs more memory, and compiling a graph that is not used again would take half a minute.
        engine = replace(self.engine, compiled=False)
        with self.model.using(engine):
            for stage_number, mixture in enumerate(self.mixtures):
                engine.activation_checkpointing = self.recipe.stages[stage_number].activation_checkpointing
                batches = self._skip_unreadable(mixture.largest)
                # With sharding there are messages in between; a failed process is then noticed when it exits.
                failing_together = self.processes.all_or_none() if self.sharding is None else nullcontext()
                setup.check_learned(stage_number, self.recipe.stages[stage_number], self.model, batches)
                with failing_together, setup.naming_out_of_memory(stage_number, batches, self.processes.device):
                    self._rehearse(batches)

    def _compile_wide_steps(self, stage_number: int) -> None:
        """Compile what rare longer texts of a stage need (`Mixture.wide_batches`), so that no later step waits for it; not if
        the steps that are left are a warm-up at most.
        """
        progress = self.progress
        if not self.settings.compile or (progress.planned and progress.total - progress.step <= WARM_STEPS):
            return
        self.engine.activation_checkpointing = self.recipe.stages[stage_number].activation_checkpointing
        with self.model.using(self.engine):
            for batch in self.mixtures[stage_number].wide_batches():
                failing_together = self.processes.all_or_none() if self.sharding is None else nullcontext()
                with failing_together, setup.naming_out_of_memory(stage_number, [batch], self.processes.device):
                    self._rehearse([batch])

    def _rehearse(self, batches: list[Batch]) -> None:
        """Run batches forward and backward, and discard the result."""
        try:
            for batch in batches:
                losses, zero = self._losses(batch, torch.Generator().manual_seed(0))
                loss = sum((value for value, _ in losses.values()), zero)
                if isinstance(loss, torch.Tensor):
                    loss.backward()
        finally:
            self.optimizer.forget_gradients()

    # -- one step

    def _train_step(self) -> None:
        started, progress = time.perf_counter(), self.progress
        step = progress.step
        stage_number, stage_step, _ = progress.stage(step)
        stage = self.recipe.stages[stage_number]
        batches = self._skip_unreadable(lambda: self.prefetcher.take(step))
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
                batch_losses, zero = self._losses(batch, generator)
                loss = sum((weights[name] * value / counts[name] for name, (value, _) in batch_losses.items()), zero)
                if isinstance(loss, torch.Tensor):
                    loss.backward()
                for name, (value, _) in batch_losses.items():
                    losses[name] += float(value.detach()) / counts[name]
        losses = self.processes.reduce_gradients(losses, self.optimizer.unsharded)
        learning_rate, gradient_norm, problem = progress.rate(), math.nan, None
        if broken := [name for name, value in losses.items() if not math.isfinite(value)]:
            problem = f"the loss {broken[0]} is {losses[broken[0]]} at step {step}"
        else:
            gradient_norm = self.optimizer.step(learning_rate, stage.clip, stage.ema_at(stage_step), stage.weight_decay)
            if not math.isfinite(gradient_norm):
                problem = f"the gradient's norm is {gradient_norm} at step {step}, although the loss is finite"
        if problem is not None:  # in all processes alike, whose losses and gradients were summed
            self._skip_step(problem, stage_number)
            return
        # Every process lays out the whole step, so its counts are those of all.
        samples = sum(batch.num_sequences for batch in batches)
        tokens = sum(batch.num_positions for batch in batches)
        # Recorded before the event is sent: a listener may end the run there.
        progress.record(sum(weights[name] * value for name, value in losses.items()), samples, tokens)
        self.graphs.record(step, stage_step)
        self.track.event(
            event="step",
            step=step,
            seconds=round(progress.seconds, 3),
            losses=losses,
            counts=counts,
            rate=learning_rate,
            gradient_norm=gradient_norm,
            samples=samples,
            samples_per_second=samples / (time.perf_counter() - started),
        )

    def _skip_step(self, problem: str, stage_number: int) -> None:
        """Pass over a step that is not finite, which changed nothing.

        Raises:
            Diverged: as many as allowed were skipped before.
        """
        progress, allowed = self.progress, self.settings.skip_nonfinite
        if progress.skipped >= allowed:
            raise self._divergence_error(problem, stage_number)
        self.optimizer.forget_gradients()
        progress.skip()
        if self.processes.is_first:
            logger.warning("%s: skipped, %d of at most %d such steps", problem, progress.skipped, allowed)
        self.track.event(event="skipped", step=progress.step - 1, reason=problem)

    def _divergence_error(self, problem: str, stage_number: int) -> XFusionError:
        skipped = f" behind {self.progress.skipped} skipped ones" if self.progress.skipped else ""
        lower = f"a lower --stages.{stage_number}.rate than {self.recipe.stages[stage_number].rate}"
        left = (
            f"before the first checkpoint, try {lower}"
            if self.saved_step is None
            else f"the last checkpoint in {self.out / 'state'}, behind step {self.saved_step}, is intact: go on with --resume and"
            f" {lower}"
        )
        return self._shared_error(f"{problem}{skipped}: training stopped; {left}", Diverged)

    def _shared_error(self, message: str, kind: type[XFusionError] = XFusionError) -> XFusionError:
        """An error that all processes raise together and the first one reports."""
        error = kind(message)
        error.reported_elsewhere = not self.processes.is_first
        return error

    def _batches(self, step: int) -> list[Batch]:
        """Batches of a step; none after the last one."""
        if self.progress.planned and step >= self.progress.total:
            return []
        stage_number, stage_step, _ = self.progress.stage(step)
        reads = self.recipe.stages[stage_number].accumulate
        return [
            batch for read in range(reads) for batch in self.mixtures[stage_number].batches(stage_step * reads + read)
        ]

    def _skip_unreadable(self, make: Callable[[], T]) -> T:
        """The result of ``make`` over readable examples.

        Raises:
            XFusionError: too many are unreadable. No weight has changed since the last step, whose state is written.
        """
        step = self.progress.step
        try:
            return self.left_out.read(make, step, self.prefetcher, self.processes, self.track)
        except TooManyUnreadable as error:
            if not step:
                raise self._shared_error(str(error)) from error
            self.save(error.unreadable)
            message = f"{error}; training stopped behind step {step}, its state is written: go on with --resume"
            raise self._shared_error(message) from error

    def _losses(
        self, batch: Batch, generator: torch.Generator
    ) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], torch.Tensor | int]:
        """Losses of this process's rows, and a 0 to add to their sum."""

        def compute_losses() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
            with torch.autocast(self.processes.device.type, self.engine.dtype, enabled=bool(self.engine.autocast)):
                losses = self.model.losses(batch, generator, self.processes.row_slice(len(batch.text_ids)))
            if not isinstance(batch, WeightedBatch):
                return losses
            return {name: (batch.loss_weight * total, count) for name, (total, count) in losses.items()}

        return (compute_losses(), 0) if self.sharding is None else self.sharding.losses(compute_losses)

    # -- what is written

    def preview(self) -> None:
        """Draw some prompts with the averaged weights, by the same `draw` that users call."""
        started, is_first = time.perf_counter(), self.processes.is_first
        prompts = list(self.settings.preview_prompts or (e.captions[0] for e in self.source.examples[:8]))
        pictures = [] if self.sharding is None else self._draw_previews(prompts)
        with self.processes.first_alone():
            if is_first and self.sharding is None:
                pictures = self._draw_previews(prompts)
            self.preview_seconds = time.perf_counter() - started
            if is_first:
                path = self.out / "previews" / f"step_{self.progress.step:06d}.png"
                facts = outputs.preview_facts(self.recipe, self.progress, self.model.guidance)
                stored = {"prompts": "\n".join(prompts), **facts}
                sheet = outputs.write_sheet(path, pictures, self.model.image.sizes[0], stored)
                self.track.image(sheet, self.progress.step)
                self.track.event(event="preview", path=str(path), prompts=prompts, **facts)

    def _draw_previews(self, prompts: list[str]) -> list[PILImage.Image]:
        draw = partial(self.model.draw, prompts, seed=outputs.PREVIEW_SEED, steps=outputs.PREVIEW_STEPS)
        with self.optimizer.averaged():
            if self.sharding is None:
                return draw()
            with self.model.using(replace(self.engine, compiled=False)):
                return self.sharding.run_without_gradients(draw)

    def save(self, unreadable: dict[int, str] | None = None, *, collective: bool = True) -> None:
        """Write the state that a resumed run needs, atomically.

        Args:
            unreadable: number of an unreadable example -> what is wrong with it, for those that are not skipped: a resumed run
                keeps their places and tries them again. An existing state of this step is written again with them.
            collective: whether all processes call it; otherwise only this one does, with unsharded weights.

        Raises:
            XFusionError: it cannot be written; raised in all processes.
        """
        if self.saved_step == self.progress.step and unreadable is None:
            return
        folder, keep, previous_step = self.out / "state", self.settings.keep, self.saved_step
        started = time.perf_counter()
        with self.processes.first_alone() if collective else nullcontext():
            if self.processes.is_first:
                self.track.sync()
                if self.sharding is None:
                    states.write(folder, self.optimizer.state_dict(), self._state_plan(unreadable), keep, previous_step)
        if self.sharding is not None:
            plan = self._state_plan(unreadable)
            states.write_sharded(folder, self.optimizer.state_dict(), plan, keep, self.processes, previous_step)
        self.saved_step, self.save_seconds = self.progress.step, time.perf_counter() - started

    def _state_plan(self, unreadable: dict[int, str] | None) -> dict[str, Any]:
        """The plan of a state: the facts about its run."""
        return {
            "recipe": checkpoint.to_json(self.recipe),
            "base_fingerprint": self.model.backbone.fingerprint,
            **self.progress.state_dict(),
            "threads": torch.get_num_threads(),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "examples": self._examples,
            "earlier": self.earlier,
            "changes": self.changes,
            "command": self.command,
            "left_out": self.left_out.state_dict(),
            "broken": self.left_out.by_id(unreadable or {}),
        }

    @cached_property
    def _examples(self) -> list[Any]:
        return all_examples(self.source)

    def _resume(self) -> dict[str, tuple[Any, Any]]:
        """Restore the newest intact state; returns the settings that are others from here on, with both values."""
        sharded = self.sharding is not None
        plan, tensors = resuming.read(self.out / "state", self.optimizer, self.processes, sharded=sharded)
        fingerprint = self.model.backbone.fingerprint
        with self.processes.first_alone():
            changed = resuming.check(plan, self.out, self.recipe, fingerprint, self.source.spec, self._examples)
        self.progress.load_state_dict(plan)
        self.left_out.load_state_dict(plan.get("left_out", {}))
        self.command = plan.get("command")  # not the one that continues the run
        self.earlier = plan.get("earlier", self.earlier)  # a run is resumed without the pack that it started from
        self.optimizer.load_state_dict(tensors)
        self.saved_step = step = self.progress.step
        new_changes = [f"{name} {before} -> {now} behind step {step}" for name, (before, now) in changed.items()]
        self.changes = [*plan.get("changes", ()), *new_changes]
        return changed

    def _write_pack(self, *, collective: bool) -> None:
        if self.recipe.stages[-1].ema > 0:
            self.optimizer.use_average()  # the returned and saved model has the averaged weights
        facts = outputs.pack_facts(
            self.recipe,
            self.progress,
            self.source,
            self.data_licence,
            data_fingerprint=self._examples[-1],
            command=self.command,
            teachers=self.model.teachers,
            earlier=self.earlier,
            changes=self.changes,
        )
        pack = self.out / "pack"
        self.model = outputs.write_pack(pack, self.model, facts, self.sharding, self.processes, collective=collective)
        self.sharding = None

    def _log_memory(self) -> None:
        """Log the memory that the processes hold after the last step."""
        memory_table = summary.measured_memory(self.processes, self.shard, self.model, self.engine, self.optimizer)
        self.track.print(f"memory behind step {self.progress.step}", *memory_table)
