"""What stands before the first step of a run: its folder, its model, its data, and what of these does not go together."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from xfusion import checkpoint
from xfusion.backbone import Backbone
from xfusion.data.mixture import Mixture
from xfusion.data.sequence import Batch, XFusionError
from xfusion.data.sources import Source, open_source
from xfusion.model import Engine, Model, build
from xfusion.storage import named_in_errors
from xfusion.text_states import TEXT_STATES_BYTES
from xfusion.training import states
from xfusion.training.processes import Processes, Shard
from xfusion.training.resuming import difference
from xfusion.training.settings import Settings
from xfusion.training.stages import Stage
from xfusion.training.unreadable import LeftOut

TEXT_ROOM = 4
"""Times `TEXT_STATES_BYTES` that the states of all prompts may take and still be kept for when they come back."""


def take_folder(out: Path, *, resume: bool) -> None:
    """Refuse a folder that holds a run, or none to resume, and one that cannot be written to: now, not when the base is
    loaded and the first step done. What a killed run had half written is removed.
    """
    found = states.found(out / "state")
    if resume and not found:
        raise XFusionError(f"{out} holds no run to resume (nothing in state/); leave --resume out to start one")
    if not resume and found:
        raise XFusionError(f"{out} already holds a run: pass --resume to go on, or name another folder")
    with named_in_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    checkpoint.refuse_other_files(out / "pack")  # or the pack would be refused when all is learned
    states.remove_rests(out)


def leave_no_empty(folder: Path) -> None:
    """Remove the folder that `take_folder` made for a run that was then refused: it holds nothing."""
    with suppress(OSError):
        folder.rmdir()


def open_model(settings: Settings, backbone: Backbone) -> Model:
    """The recipe's model, with fresh weights or those of the pack that it starts from."""
    wanted = settings.recipe.model
    if settings.from_pack is None:
        return build(wanted, backbone, fresh=not settings.resume)
    model = checkpoint.load(settings.from_pack, backbone=backbone)
    kept = replace(model.config, text=wanted.text, media=wanted.media.adapted(model.config.media))
    if (said := difference(kept, wanted)) is not None:
        raise XFusionError(
            f"the pack {settings.from_pack} was built otherwise than this recipe: {said}; give the same settings to adapt it"
        )
    had = model.capabilities
    model.set_objectives(wanted.text, wanted.media)
    if "draw" in model.capabilities - had:  # it has no head that draws
        raise XFusionError(
            f"the pack {settings.from_pack} can {', '.join(sorted(had))}, the recipe draws: name the recipe that trained the"
            " pack, or start without it"
        )
    return model


def check_losses(model: Model, stages: Sequence[Stage], num_processes: int, shard: Shard) -> None:
    """Losses over a whole batch take neither parts of one nor, some of them, parts of it in other processes."""
    for number, stage in enumerate(stages):
        together = [o.name for o in model.objectives if o.scope == "batch"]
        if together and stage.accumulate > 1:
            raise XFusionError(
                f"stage {number} accumulates {stage.accumulate} batches, but the loss {together[0]} compares the items of"
                f" one: set --stages.{number}.accumulate 1 and read more samples per step"
            )
        alone = [o.name for o in model.objectives if o.scope == "batch" and not o.across_processes]
        if alone and num_processes > 1:
            raise XFusionError(
                f"the loss {alone[0]} compares the items of one batch, which {num_processes} processes would divide: train"
                " it with one process"
            )
        pairs = [o.name for o in model.objectives if {"text", "media"} <= set(o.needs)]
        if pairs and stage.mixture.shots and stage.mixture.caption:
            raise XFusionError(
                f"the loss {pairs[0]} sets each picture against the words of its sample, but stage {number} puts"
                f" {stage.mixture.shots} solved examples into each: set --stages.{number}.mixture.shots 0"
            )
        if together and shard != "none":
            raise XFusionError(
                f"the loss {together[0]} compares the items of all processes, which walk through divided layers in step:"
                f" --shard {shard} cannot have it, take none"
            )


def open_data(settings: Settings, special_tokens: tuple[str, ...]) -> Source:
    """The run's source. What an earlier part of it found unreadable keeps its place among the examples."""
    if settings.source is not None:
        return settings.source
    plan = states.newest_plan(settings.out / "state") if settings.resume else {}
    known = plan.get("left_out", {}) | plan.get("broken", {})
    return open_source(
        settings.recipe.data, allow_bad=settings.allow_bad, special_tokens=special_tokens, unreadable=known
    )


def mixture(
    stage: Stage, source: Source, model: Model, settings: Settings, processes: Processes, left_out: LeftOut
) -> Mixture:
    """The batches of a stage, of which this process reads its share."""
    return Mixture(
        source,
        model.modality,
        model.modality.sizes,
        model.backbone.encode,
        model.backbone.begin_ids,
        model.backbone.end_ids[0],
        stage.mixture,
        settings.recipe.seed,
        processes.share,
        left_out,
        settings.decoders,
    )


@contextmanager
def fitting(number: int, batches: Sequence[Batch], device: torch.device) -> Iterator[None]:
    """A block that a step of a stage is computed in.

    Raises:
        XFusionError: it does not fit in memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        positions = ", ".join(f"{b.num_sequences} samples of {b.text.count} text positions" for b in batches)
        raise XFusionError(
            f"the largest step of stage {number} ({positions}) does not fit in the memory of {device}: lower"
            f" --stages.{number}.mixture.draw and .caption, and raise --stages.{number}.accumulate by as much, or set"
            f" --stages.{number}.activation-checkpointing"
        ) from error


@dataclass(frozen=True)
class Prompts:
    """The texts of a source, and what keeping the states of all of them would take."""

    number: int
    num_bytes: int

    @classmethod
    def of(cls, source: Source, model: Model, engine: Engine) -> Prompts:
        """Estimated from some two hundred examples."""
        examples = source.examples
        some = [examples[i] for i in range(0, len(examples), max(1, len(examples) // 200))]
        words = [caption for example in some for caption in example.captions]
        tokens = sum(len(model.backbone.encode(caption)) for caption in words) / max(1, len(words))
        number = len(examples) * len(words) // max(1, len(some))
        return cls(number, model.text_bytes(tokens, engine.dtype) * number)

    @property
    def come_back(self) -> bool:
        """Whether states are worth keeping: where a quarter of them has room. Else most would be gone when they are asked for
        again, and each had been computed by itself. It depends on data and settings alone, so that a resumed run does the same.
        """
        return self.num_bytes <= TEXT_ROOM * TEXT_STATES_BYTES
