"""The only training loop: stages, budgets, previews, checkpoints that a crash cannot break."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast, get_args

import torch
from PIL import Image as PILImage
from rich.console import Console

from xfusion import checkpoint
from xfusion.backbone import Backbone
from xfusion.data.mixture import Ahead, Mixture
from xfusion.data.sequence import Batch, Unreadable, XFusionError
from xfusion.data.sources import Source, open_source, stated_licence, too_many
from xfusion.modalities.image import ImageModality
from xfusion.model import TEXT_STATES_BYTES, Model, build, choose_attention, choose_compute_dtype, compiled_graphs
from xfusion.storage import named_in_errors, whole_file
from xfusion.training import states
from xfusion.training.memory import keep_freed_memory
from xfusion.training.optimizer import Optimizer
from xfusion.training.pace import Pace
from xfusion.training.processes import Processes, Shard, is_divided, num_bytes
from xfusion.training.stages import Recipe, Stage
from xfusion.training.stopping import Interrupted, Stop, stopping
from xfusion.training.track import Listener, Track

if TYPE_CHECKING:
    from xfusion.training.sharding import Sharding

LATEST_PLAN = 0.75
"""Share of a wall-clock budget behind which no further stretch is waited for."""
LARGEST_STEPS = 10_000_000
TEXT_ROOM = 4
"""Times `TEXT_STATES_BYTES` that the states of all prompts may take and still be kept for when they come back."""
REMEMBERED = 0.98
"""Share of the mean loss that stays at each step: it looks back over some fifty. Its lowest value is the best state's."""
T = TypeVar("T")
logger = logging.getLogger(__name__)


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
        dtype: compute type; None chooses by device and says why.
        attention: what layers attend by, of `xfusion.model.ATTENTIONS`; None chooses by device.
        preview_prompts: what previews draw (None: the first captions of the data).
        preview_every: seconds between previews; 0 makes none.
        checkpoint_every: seconds between checkpoints.
        keep: newest checkpoints that stay; besides stays the best, by the mean training loss of some fifty steps.
        shard: what several processes divide: nothing, the new weights, or the frozen ones too (`training.sharding`).
        decoders: threads of each process that read and decode pictures; None takes four, or as many as there are cores.
        console: where progress is shown; None is silent.
        listener: called with every event.

    Raises:
        XFusionError: bad data, a loss that is not finite, a resumed run of another recipe, a folder that takes no more.
        Interrupted: Ctrl-C or SIGTERM; the step was finished, state and pack were written.
    """
    if data is not None:
        recipe = replace(recipe, data=data, data_licence=None)
    if steps is not None:
        recipe = replace(recipe, stages=(*recipe.stages[:-1], replace(recipe.stages[-1], steps=steps)))
    if minutes is not None and len(recipe.stages) != 1:
        raise XFusionError(
            f"--minutes takes a recipe of one stage, this one has {len(recipe.stages)}: give steps instead"
        )
    if keep < 1:
        raise XFusionError(f"keep is {keep}: at least 1 checkpoint stays")
    if recipe.licence is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", recipe.licence):
        raise XFusionError(f"licence {recipe.licence!r} is no name of a licence on a hub: write it as in cc-by-sa-4.0")
    if decoders is not None and decoders < 1:
        raise XFusionError(f"decoders is {decoders}: at least 1 thread decodes")
    if shard not in get_args(Shard):
        raise XFusionError(f"shard {shard!r} is not one of {', '.join(get_args(Shard))}")
    run = _Run(
        recipe=recipe,
        out=Path(out),
        opened=source,
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
    with run.closing:
        run.prepare()
        with run.processes.noticing(lambda: run.step):
            return run.go()


@dataclass(kw_only=True, eq=False)
class _Run:
    """One training run: what `train` was asked for, and where it stands."""

    recipe: Recipe
    out: Path
    opened: Source | None
    """An opened source instead of the recipe's data."""
    allow_bad: float
    minutes: float | None
    resume: bool
    from_pack: str | None
    backbone: Backbone | None
    """An already loaded base."""
    device: torch.device | str
    compile: bool
    dtype: torch.dtype | None
    attention: str | None
    """What layers attend by, where the device does not choose."""
    preview_prompts: tuple[str, ...] | None
    preview_every: float
    checkpoint_every: float
    keep: int
    shard: Shard
    decoders: int | None
    """Threads that decode pictures, where it is not as many as usual."""
    console: Console | None
    listener: Listener | None

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.closing = ExitStack()
        self.sharding: Sharding | None = None
        self.step = 0
        self.saved_step: int | None = None
        self._known_examples: list[Any] | None = None
        self.samples = 0
        self.recent = (0.0, 0.0)
        """Sum and weight of the mean loss; `REMEMBERED`."""
        self.seconds_before = 0.0
        self.left_out: dict[int, str] = {}
        """Examples that turned out unreadable in mid-run, and what is wrong with each."""
        self.preview_seconds = 3.0
        """What the last preview took; a guess before the first."""
        self.totals = [stage.steps for stage in self.recipe.stages]
        self.planned = self.minutes is None

    # -- before the first step

    def prepare(self) -> None:
        self.processes = processes = Processes(self.device if self.backbone is None else self.backbone.device)
        self.attends = choose_attention(processes.device, self.attention)
        if processes.count == 1:
            self.shard = "none"
        chosen, reason = processes.same(self._precision())
        if self.shard == "none":
            with processes.first_alone():
                self._prepare()
        else:
            from xfusion.training.sharding import Sharding, mesh

            row = mesh(processes.device)
            with processes.one_by_one():  # each holds all new weights until it has divided them
                self._prepare()
                self.sharding = Sharding(self.model, self.shard, row, chosen, self.attends)
        self._share(chosen, reason)

    def _precision(self) -> tuple[torch.dtype, str]:
        """The compute type with the reason: what was asked for, what a resumed run had, or what is fastest here."""
        if self.dtype is not None:
            return self.dtype, "as asked"
        if self.resume and states.found(self.out / "state"):
            kept = states.newest_plan(self.out / "state").get("dtype")
            if kept is not None:
                return getattr(torch, kept), f"{kept}: as before"
        return choose_compute_dtype(self.processes.device)

    def _prepare(self) -> None:
        """Model and data; the first process goes through it alone, so that the others find its indexes and files."""
        state = self.out / "state"
        if self.resume and not states.found(state):
            raise XFusionError(
                f"{self.out} holds no run to resume (nothing in state/); leave --resume out to start one"
            )
        if not self.resume and states.found(state):
            raise XFusionError(f"{self.out} already holds a run: pass --resume to go on, or name another folder")
        self._check_folder()
        states.remove_rests(self.out)
        base = self.recipe.model.backbone
        # A base that will be divided stays where it is mapped: in the file.
        device = "cpu" if self.shard == "all" else self.processes.device
        backbone = self.backbone or Backbone.load(base.source, revision=base.revision, device=device)
        self.model = model = self._model(backbone)
        self._check_losses()
        if (source := self.opened) is None:
            tokens = backbone.special_tokens
            plan = states.newest_plan(state) if self.resume else {}
            known = plan.get("left_out", {}) | plan.get("broken", {})
            groups = {identity: facts["group"] for identity, facts in known.items()}
            source = open_source(self.recipe.data, allow_bad=self.allow_bad, special_tokens=tokens, unreadable=groups)
        self.data_licence = stated_licence(source.licence, self.recipe.data_licence, source.spec)
        self.source = source
        drawn = "draw" in model.capabilities and isinstance(model.modality, ImageModality)
        if not drawn or (self.shard == "none" and not self.processes.first):
            self.preview_every = 0.0

    def _check_losses(self) -> None:
        """Losses over a whole batch take neither parts of one nor, some of them, parts of it in other processes."""
        for number, stage in enumerate(self.recipe.stages):
            together = [o.name for o in self.model.objectives if o.scope == "batch"]
            if together and stage.accumulate > 1:
                raise XFusionError(
                    f"stage {number} accumulates {stage.accumulate} batches, but the loss {together[0]} compares the items of"
                    f" one: set --stages.{number}.accumulate 1 and read more samples per step"
                )
            alone = [o.name for o in self.model.objectives if o.scope == "batch" and not o.across_processes]
            if alone and self.processes.count > 1:
                raise XFusionError(
                    f"the loss {alone[0]} compares the items of one batch, which {self.processes.count} processes would"
                    " divide: train it with one process"
                )
            pairs = [o.name for o in self.model.objectives if {"text", "media"} <= set(o.needs)]
            if pairs and stage.mixture.shots and stage.mixture.caption:
                raise XFusionError(
                    f"the loss {pairs[0]} sets each picture against the words of its sample, but stage {number} puts"
                    f" {stage.mixture.shots} solved examples into each: set --stages.{number}.mixture.shots 0"
                )
            if together and self.shard != "none":
                raise XFusionError(
                    f"the loss {together[0]} compares the items of all processes, which walk through divided layers in step:"
                    f" --shard {self.shard} cannot have it, take none"
                )

    def _share(self, chosen: torch.dtype, reason: str) -> None:
        """What all processes do together: equal weights, the state, batches, and what the first one tells."""
        model, first, sharding = self.model, self.processes.first, self.sharding
        add = None if sharding is None else self.processes.total
        self.processes.same_weights([p for p in model.new_parameters() if not is_divided(p)])
        self.optimizer = Optimizer(model.named_new_parameters(), add)
        if self.resume:
            self._load(self.out / "state")
        self.track = Track(self.out if first else None, self.console if first else None, self.listener, self.step)
        self.closing.callback(self.track.close)
        self.keeps_memory = self.processes.device.type == "cpu" and keep_freed_memory()
        divided = None if sharding is None else sharding.backbone
        self.engine = model.training_engine(chosen, reason, self.attends, self.compile, divided)
        self.mixtures = [
            Mixture(
                self.source,
                model.modality,
                model.modality.sizes,
                model.backbone.encode,
                model.backbone.begin_ids,
                model.backbone.end_ids[0],
                stage.mixture,
                self.recipe.seed,
                self.processes.share,
                self.left_out,
                self.decoders,
            )
            for stage in self.recipe.stages
        ]
        self.engine.keep_text &= self._texts_come_back()
        self.ahead = Ahead(self._batches, in_thread=self.processes.device.type != "cpu")
        self.closing.callback(self.ahead.close)
        self._announce(reason, chosen)

    def _texts_come_back(self) -> bool:
        """Whether states of prompts are worth keeping: where a quarter of the data's texts has room. Else most would be gone
        when they are asked for again, and each had been computed by itself. It depends on data and settings alone, so that a
        resumed run does the same.
        """
        examples = self.source.examples
        some = [examples[i] for i in range(0, len(examples), max(1, len(examples) // 200))]
        words = [caption for example in some for caption in example.captions]
        tokens = sum(len(self.model.backbone.encode(caption)) for caption in words) / max(1, len(words))
        self.num_texts = len(examples) * len(words) // max(1, len(some))
        self.text_bytes = self.model.text_bytes(tokens, self.engine.dtype) * self.num_texts
        return not self.model.fusion.prefix_is_constant or self.text_bytes <= TEXT_ROOM * TEXT_STATES_BYTES

    def _check_folder(self) -> None:
        """A folder that cannot be written to is found now, not when the base is loaded and the first step done."""
        with named_in_errors(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.out).close()
        checkpoint.refuse_other_files(self.out / "pack")  # or the pack would be refused when all is learned

    def _model(self, backbone: Backbone) -> Model:
        wanted = self.recipe.model
        if self.from_pack is None:
            return build(wanted, backbone, fresh=not self.resume)
        model = checkpoint.load(self.from_pack, backbone=backbone)
        kept = replace(model.config, text=wanted.text, media=wanted.media.adapted(model.config.media))
        if (difference := _difference(kept, wanted)) is not None:
            raise XFusionError(
                f"the pack {self.from_pack} was built otherwise than this recipe: {difference}; give the same settings to"
                " adapt it"
            )
        model.set_objectives(wanted.text, wanted.media)
        return model

    def _announce(self, reason: str, dtype: torch.dtype) -> None:
        model, stage, say = self.model, self.recipe.stages[0], self.track.say
        frozen = model.backbone.num_parameters
        say(
            f"base      {model.backbone.source}, {frozen / 1e6:.1f} M weights, frozen, {model.backbone.fingerprint[:16]}"
        )
        say(
            f"new       {model.num_new_parameters / 1e6:.1f} M weights ({100 * model.num_new_parameters / frozen:.1f} %)"
        )
        for index, taken in model.fusion.taken.items():
            say(f"start     layer {index}: " + ", ".join(f"{own} <- {name}" for own, name in taken.items()))
        tokens = ", ".join(str(math.prod(model.modality.grid(size))) for size in model.modality.sizes)
        say(f"data      {self.source.spec}: {len(self.source.examples)} {model.modality.described}, {tokens} tokens")
        solved = f" behind {stage.mixture.shots} solved examples each" if stage.mixture.shots else ""
        say(
            f"step      {stage.mixture.draw} to draw, {stage.mixture.caption} to caption{solved}, times {stage.accumulate}"
        )
        say(f"compute   {reason}, {torch.get_num_threads()} threads")
        if any(stage.activation_checkpointing for stage in self.recipe.stages):
            say("memory    layers are computed once more in the backward pass (activation checkpointing)")
        if not self.engine.keep_text and self.sharding is None:
            say(
                f"text      states of some {self.num_texts} prompts would take {self.text_bytes / 1e9:.1f} GB: computed in each"
                " step instead of kept"
            )
        if self.keeps_memory:
            say("memory    freed blocks stay with the process: mapping them again costs more than filling them")
        if self.processes.count > 1:
            held = {
                "none": "each with all weights",
                "new": "the new weights divided among them, the base whole in each",
                "all": "new weights and base divided among them",
            }
            say(f"processes {self.processes.count}, {held[self.shard]}, and each with its share of every step")
            new = num_bytes(self.optimizer.list)
            for line in self.processes.memory(self._memory({"gradients": new, "moments": 2 * new, "average": new})):
                say(line)
        self.track.event(
            event="start",
            step=self.step,
            processes=self.processes.count,
            shard=self.shard,
            new_parameters=model.num_new_parameters,
            pictures=len(self.source.examples),
            dtype=str(dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            resumed=self.step > 0,
            taken={str(index): dict(taken) for index, taken in model.fusion.taken.items()},
        )

    def _memory(self, training: dict[str, int]) -> dict[str, int]:
        """Bytes in this process: of weights, and what training needs beside them."""
        base, copy = self.model.backbone, self.engine.backbone
        parts = {"base": num_bytes((copy if self.shard == "all" else base).model.parameters())}
        if self.shard != "all" and copy.dtype != base.dtype:
            parts["base copy"] = num_bytes(copy.model.parameters())
        return parts | {"new weights": num_bytes(self.optimizer.list), **training}

    def _tell_memory(self) -> None:
        """What the processes hold behind a step; gradients are gone by then."""
        parts = {"moments": num_bytes(self.optimizer.moments), "average": num_bytes(self.optimizer.average)}
        self.track.say(f"memory behind step {self.step}")
        for line in self.processes.memory(self._memory(parts)):
            self.track.say(line)

    # -- the walk

    def go(self) -> Model:
        self.track.start_bar(sum(self.totals) if self.planned else 0, self.step)
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
            self._pack(wait=together)
        if stop.signal is not None:
            self.track.say(f"stopped at step {self.step}; go on with --resume")
            raise Interrupted(f"training stopped at step {self.step}; go on with --resume", stop.code)
        if self.preview_every:
            self.preview()
        seconds = self.seconds_before + time.perf_counter() - self.started
        self.track.event(event="end", step=self.step, samples=self.samples, seconds=seconds, graphs=compiled_graphs())
        return self.model

    def _stopped(self, stop: Stop) -> bool:
        stop.signal = self.processes.largest(stop.signal or 0)[0] or None
        return stop.signal is not None

    def _walk(self, stop: Stop) -> None:
        """Steps, previews and checkpoints until the run is done or asked to stop."""
        last_checkpoint = last_preview = time.perf_counter()
        pace = Pace(self.step)
        if not self.step:
            self._try_largest()
        # All processes stop behind the same step, whichever of them the signal reached.
        while not self._stopped(stop) and (not self.planned or self.step < sum(self.totals)):
            self._one_step()
            now = time.perf_counter()
            if not self.planned:  # the first process's clock says when: all plan behind the same step
                per_step = self.processes.same(pace.seconds_per_step(self.step, now, self._ends()))
                if per_step is not None:
                    self._plan(per_step, now)
            due = [
                bool(self.preview_every) and now - last_preview >= self.preview_every,
                now - last_checkpoint >= self.checkpoint_every,
            ]
            if self.sharding is not None:  # all draw and write together
                due = self.processes.largest(*map(int, due))
            if due[0]:
                self.preview()
                last_preview = time.perf_counter()
            if due[1]:
                self.save()
                last_checkpoint = time.perf_counter()

    def _try_largest(self) -> None:
        """The widest step of every stage forth and back, thrown away: what does not fit in memory fails now, not at night."""
        # Not compiled: that needs the more memory, and a graph that nobody uses again would take half a minute.
        engine = replace(self.engine, compiled=False)
        with self.model.using(engine):
            for number, mixture in enumerate(self.mixtures):
                engine.activation_checkpointing = self.recipe.stages[number].activation_checkpointing
                batches = self._readable(mixture.largest)
                try:
                    for batch in batches:
                        found, zero = self._losses(batch, torch.Generator().manual_seed(0))
                        loss = sum((value for value, _ in found.values()), zero)
                        if isinstance(loss, torch.Tensor):
                            loss.backward()
                except RuntimeError as error:
                    if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                        raise
                    positions = ", ".join(
                        f"{b.num_sequences} samples of {b.text.count} text positions" for b in batches
                    )
                    raise XFusionError(
                        f"the largest step of stage {number} ({positions}) does not fit in the memory of"
                        f" {self.processes.device}: lower --stages.{number}.mixture.draw and .caption, and raise"
                        f" --stages.{number}.accumulate by as much, or set --stages.{number}.activation-checkpointing"
                    ) from error
                finally:
                    self.optimizer.forget_gradients()

    def _losses(
        self, batch: Batch, generator: torch.Generator
    ) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], torch.Tensor | int]:
        """Losses of this process's rows, and a 0 that belongs into their sum."""

        def work() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
            with torch.autocast(self.processes.device.type, self.engine.dtype, enabled=bool(self.engine.autocast)):
                return self.model.losses(batch, generator, self.processes.share(len(batch.text_ids)))

        return (work(), 0) if self.sharding is None else self.sharding.losses(work)

    def _stage(self, step: int) -> tuple[int, int, int]:
        """Stage of a step, the step within it, and the stage's steps."""
        for number, total in enumerate(self.totals):
            if step < total:
                return number, step, total
            step -= total
        return len(self.totals) - 1, step, self.totals[-1]

    def _batches(self, step: int) -> list[Batch]:
        """What a step reads; nothing behind the last one."""
        if self.planned and step >= sum(self.totals):
            return []
        number, inside, _ = self._stage(step)
        times = self.recipe.stages[number].accumulate
        return [b for k in range(times) for b in self.mixtures[number].batches(inside * times + k)]

    def _readable(self, make: Callable[[], T]) -> T:
        """What is made of examples that can be read: those that cannot are left out first, in all processes alike.

        Raises:
            XFusionError: there are more of them than allowed, or the data fails as a whole. No weight has moved since the last
                step; its state is written.
        """
        while True:
            made, broken, failed = None, {}, None
            try:
                made = make()
            except Unreadable as error:
                broken, failed = error.examples, None if error.examples else str(error)
            except XFusionError as error:
                failed = str(error)
            if not self.processes.largest(bool(broken or failed))[0]:
                return cast("T", made)
            self.ahead.forget()
            found = self.processes.gather((broken, failed))
            new = {i: what for one, _ in found for i, what in one.items() if i not in self.left_out}
            new = dict(sorted(new.items()))
            why = next((failed for _, failed in found if failed), None)
            why = why or too_many(self.source, self.left_out | new, self.allow_bad)
            if why is not None:
                self._stop_with_state(why, new)
            self.left_out |= new
            for index, what in new.items():
                if self.processes.first:
                    logger.warning("%s: left out from step %d on; another takes its place", what, self.step)
                example = self.source.examples[index].id
                self.track.event(event="left_out", step=self.step, example=example, reason=what)

    def _stop_with_state(self, why: str, broken: dict[int, str]) -> NoReturn:
        """End the run between two steps, by what all processes know; these examples may be mended, or allowed, meanwhile."""
        if not self.step:
            raise XFusionError(why)
        self.saved_step = None  # what the state of this step says may be there without them
        self.save(broken)
        self.processes.meet()  # or a launcher that sees one process end would end the one that writes
        raise XFusionError(
            f"{why}; training stopped behind step {self.step}, its state is written: go on with --resume"
        )

    def _one_step(self) -> None:
        begun = time.perf_counter()
        number, inside, total = self._stage(self.step)
        stage: Stage = self.recipe.stages[number]
        batches = self._readable(lambda: self.ahead.take(self.step))
        counts: dict[str, int] = {}
        for batch in batches:
            for objective in self.model.objectives:
                for name, count in objective.count(batch).items():
                    counts[name] = counts.get(name, 0) + count
        weights = {name: weight for o in self.model.objectives for name, weight in o.weights.items()}
        digest = hashlib.sha256(f"{self.recipe.seed}/noise/{self.step}".encode()).digest()
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
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise XFusionError(
                f"the loss {bad[0]} is {losses[bad[0]]} at step {self.step}: training stopped; the last checkpoint in"
                f" {self.out / 'state'} is intact, try a lower --stages.{number}.rate than {stage.rate}"
            )
        # A run whose length is not planned yet is still warming up.
        steps = total if self.planned else LARGEST_STEPS
        rate = stage.rate_at(inside, steps)
        norm = self.optimizer.step(rate, stage.clip, stage.ema_at(inside), stage.weight_decay)
        if not norm < float("inf"):
            raise XFusionError(
                f"the gradient's norm is {norm} at step {self.step}, although the loss is finite: training stopped; the"
                f" last checkpoint in {self.out / 'state'} is intact, try a lower --stages.{number}.rate than {stage.rate}"
            )
        samples = sum(batch.num_sequences for batch in batches)
        self.samples += samples
        total_before, weight_before = self.recent if inside else (0.0, 0.0)  # another stage is another loss
        objective = sum(weights[name] * value for name, value in losses.items())
        self.recent = (
            REMEMBERED * total_before + (1 - REMEMBERED) * objective,
            REMEMBERED * weight_before + (1 - REMEMBERED),
        )
        self.step += 1  # counted before anybody is told: whoever listens may end the run here
        self.track.event(
            event="step",
            step=self.step - 1,
            seconds=round(self.seconds_before + time.perf_counter() - self.started, 3),
            losses=losses,
            rate=rate,
            gradient_norm=norm,
            samples=samples,
            samples_per_second=samples / (time.perf_counter() - begun),
        )

    def _ends(self) -> float:
        """When a plan has to be there: three quarters into the wall-clock budget."""
        assert self.minutes is not None
        return self.started - self.seconds_before + LATEST_PLAN * 60 * self.minutes

    def _plan(self, seconds_per_step: float, now: float) -> None:
        assert self.minutes is not None
        left = self.minutes * 60 - (now - self.started) - self.seconds_before
        previews = left / self.preview_every * self.preview_seconds if self.preview_every else 0.0
        total = self.processes.same(self.step + max(1, int((left - previews) / seconds_per_step)))
        self.totals, self.planned = [total], True
        self.track.set_total(total)
        self.track.event(event="plan", step=self.step, steps=total, seconds_per_step=seconds_per_step)
        self.track.say(f"plan      {total} steps in {self.minutes:g} minutes at {seconds_per_step:.3f} s per step")

    # -- what is written

    def preview(self) -> None:
        """Draw some prompts with the averaged weights by the very same `generate` that users call."""
        begun = time.perf_counter()
        prompts = self.preview_prompts or tuple(e.captions[0] for e in self.source.examples[:8])
        with self.optimizer.averaged():
            pictures = self._drawn(list(prompts))
        self.preview_seconds = time.perf_counter() - begun
        if not self.processes.first:
            return
        size = self.model.image.sizes[0]
        sheet = PILImage.new("RGB", (size * len(pictures), size), "white")
        for i, picture in enumerate(pictures):
            sheet.paste(picture, (i * size, 0))
        path = self.out / "previews" / f"step_{self.step:06d}.png"
        with named_in_errors(path), whole_file(path) as so_far:
            sheet.save(so_far, format="PNG")
        self.track.image(sheet, self.step)
        self.track.event(event="preview", step=self.step, path=str(path), prompts=list(prompts))

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
        if self.saved_step == self.step or (self.sharding is None and not self.processes.first):
            return
        total, weight = self.recent
        plan = {
            "recipe": checkpoint.to_json(self.recipe),
            "base_fingerprint": self.model.backbone.fingerprint,
            "step": self.step,
            "stage": self._stage(max(0, self.step - 1))[0],
            "samples": self.samples,
            "totals": self.totals,
            "planned": self.planned,
            "minutes": self.minutes,
            "seconds": self.seconds_before + time.perf_counter() - self.started,
            "threads": torch.get_num_threads(),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "recent": self.recent,
            "loss": total / weight if weight else None,
            "examples": self._examples(),
            "left_out": self._by_id(self.left_out),
            "broken": self._by_id(broken or {}),
        }
        self.track.to_disk()
        if self.sharding is None:
            states.write(self.out / "state", self.optimizer.state(), plan, self.keep)
        else:
            states.write_divided(self.out / "state", self.optimizer.state(), plan, self.keep, self.processes)
        self.saved_step = self.step

    def _examples(self) -> list[Any]:
        """How many examples there are, and a hash over which: the order of a run goes over all of them."""
        if self._known_examples is None:
            ids = "\n".join(example.id for example in self.source.examples)
            digest = hashlib.sha256(ids.encode(errors="surrogatepass")).hexdigest()
            self._known_examples = [len(self.source.examples), digest]
        return self._known_examples

    def _by_id(self, unreadable: dict[int, str]) -> dict[str, dict[str, str]]:
        """Group of examples, and what is wrong with them, by their ids; in the order in which they were found."""
        chosen = ((self.source.examples[index], what) for index, what in unreadable.items())
        return {example.id: {"group": example.group, "reason": what} for example, what in chosen}

    def _load(self, folder: Path) -> None:
        plan, tensors = self._read(folder)
        if plan["base_fingerprint"] != self.model.backbone.fingerprint:
            raise XFusionError(
                f"{self.out} was trained on the base {plan['base_fingerprint'][:16]}, this one is"
                f" {self.model.backbone.fingerprint[:16]}: resume with the same base"
            )
        saved = checkpoint.from_json(plan["recipe"], trust=True, where=str(folder))
        if (difference := _difference(saved, self.recipe)) is not None:
            raise XFusionError(f"{self.out} was started otherwise: {difference}; give the same settings to resume")
        if plan["threads"] != torch.get_num_threads():
            logger.warning(
                "%s ran on %d threads and goes on with %d: sums round otherwise, so its losses agree but not to the bit",
                *(self.out, plan["threads"], torch.get_num_threads()),
            )
        self.step, self.samples, self.totals = plan["step"], plan["samples"], plan["totals"]
        self.planned, self.seconds_before = plan["planned"], plan["seconds"]
        self.minutes = plan["minutes"] if self.minutes is None else self.minutes
        self.recent = tuple(plan.get("recent", self.recent))
        if (known := plan.get("left_out")) is not None:
            numbers = {example.id: index for index, example in enumerate(self.source.examples) if example.id in known}
            self.left_out |= {numbers[i]: facts["reason"] for i, facts in known.items() if i in numbers}
        if (before := plan.get("examples")) is not None and before != self._examples():
            logger.warning(
                "%s held %d examples when %s began and holds %d, not all the same, now: its batches from here on are others",
                *(self.source.spec, before[0], self.out, len(self.source.examples)),
            )
        self.optimizer.load(tensors)
        self.saved_step = self.step

    def _read(self, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The newest intact state, divided as the run's weights are."""
        if self.sharding is None:
            return states.newest(folder)
        state, plan = self.processes.same(states.newest_intact(folder) if self.processes.first else (Path(), {}))
        tensors = self.optimizer.state_like(states.entries(state))
        states.fill(state, tensors)
        return plan, tensors

    def _pack(self, *, wait: bool) -> None:
        """Write the pack; the other processes wait for it, unless they may have been stopped elsewhere."""
        stage = self.recipe.stages[-1]
        facts = {
            "recipe": checkpoint.to_json(self.recipe),
            "training": {
                "steps": self.step,
                "samples": self.samples,
                "seconds": round(self.seconds_before + time.perf_counter() - self.started, 1),
                "data": self.source.spec,
                "data_licence": self.data_licence,
                "pictures": len(self.source.examples),
                "averaged": stage.ema > 0,
            },
        }
        if self.recipe.licence is not None:
            facts["licence"] = self.recipe.licence
        if stage.ema > 0:
            self.optimizer.use_average()  # the model that is returned and saved holds the averaged weights
        pack, first = self.out / "pack", self.processes.first
        if self.sharding is None:
            if first:
                checkpoint.save(self.model, pack, **facts)
            if wait:
                self.processes.meet()
            return
        from xfusion.training.sharding import whole_state

        weights = whole_state(self.model, keep=first)
        if first:
            checkpoint.save(self.model, pack, weights=weights, **facts)
        self.processes.meet()
        self.sharding = None
        self.model = checkpoint.load(pack, backbone=self.model.backbone, trust=True)
        if not first:
            self.preview_every = 0.0


def _difference(one: Any, other: Any) -> str | None:
    """The first field in which two configurations differ, with both values; None where there is none."""
    for where, was, now in checkpoint.differing(*map(checkpoint.to_json, (one, other))):
        return f"{where} was {was!r} and is now {now!r}"
    return None
