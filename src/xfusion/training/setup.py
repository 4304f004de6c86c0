"""Preparation of a run before its first step: folder, model and data, and checks that they fit together."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from xfusion import checkpoint
from xfusion.backbone import Backbone
from xfusion.data.mixture import Mixture
from xfusion.data.sequence import Batch, XFusionError
from xfusion.data.sources import Source, open_source
from xfusion.model import Model, build
from xfusion.storage import named_in_errors
from xfusion.text_states import TEXT_STATES_BYTES
from xfusion.training import states
from xfusion.training.processes import Processes, Shard
from xfusion.training.resuming import difference
from xfusion.training.settings import Settings
from xfusion.training.stages import Stage
from xfusion.training.unreadable import LeftOut

LOCK = "run.lock"
"""Lock file in a run's folder, held while the run is alive; a leftover file without a holder means nothing."""
CACHEABLE_RATIO = 4
"""Prompt states are cached if those of all prompts take at most this many times `TEXT_STATES_BYTES`."""


@contextmanager
def locked_folder(out: Path, *, resume: bool) -> Iterator[None]:
    """Hold the lock on a run's folder inside the block; the system releases it if the process dies.

    The checks run before the base is loaded. A folder is refused if another run is writing it, if it already has a run, if it
    has none to resume, or if it cannot be written. What a killed run left half written is removed. A folder that was created
    here is removed again if the run is refused.

    Raises:
        XFusionError: the folder is refused.
    """
    created = not out.exists()
    no_run = f"{out} holds no run to resume (nothing in state/); leave --resume out to start one"
    if resume and not (out / "state").is_dir():  # it may belong to something else, so write nothing into it
        raise XFusionError(no_run)
    with named_in_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        lock = FileLock(out / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise XFusionError(
                f"{out} is being written by another run ({LOCK} is held): wait for its end, stop it, or name another folder"
            ) from None
    try:
        states.remove_leftovers(out)
        existing = states.list_states(out / "state")
        if resume and not existing:
            raise XFusionError(no_run)
        if not resume and existing:
            raise XFusionError(f"{out} already holds a run: pass --resume to go on, or name another folder")
        checkpoint.refuse_other_files(out / "pack")  # or the pack would be refused after training
        yield
    finally:
        with suppress(OSError):
            if created and [path.name for path in out.iterdir()] == [LOCK]:
                (out / LOCK).unlink()
                out.rmdir()
        lock.release()


def open_model(settings: Settings, backbone: Backbone) -> tuple[Model, int]:
    """The recipe's model, with fresh weights or those of the pack that it starts from, and how many tensors the pack gave.

    Raises:
        XFusionError: the pack was built otherwise than the recipe, or cannot do what the recipe trains.
    """
    config = settings.recipe.model
    if settings.from_pack is None:
        return build(config, backbone, fresh=not settings.resume), 0
    model = checkpoint.load(settings.from_pack, backbone=backbone)
    pack_config = replace(model.config, text=config.text, media=config.media.adapted(model.config.media))
    if (mismatch := difference(pack_config, config)) is not None:
        raise XFusionError(
            f"the pack {settings.from_pack} was built otherwise than this recipe: {mismatch}; give the same settings to adapt it"
        )
    pack_capabilities, pack_state = model.capabilities, model.learned_state()
    model.set_objectives(config.text, config.media)
    if "draw" in model.capabilities - pack_capabilities:  # it has no head that draws
        raise XFusionError(
            f"the pack {settings.from_pack} can {', '.join(sorted(pack_capabilities))}, the recipe draws: name the recipe that"
            " trained the pack, or start without it"
        )
    state = model.learned_state()
    return model, sum(name in pack_state and torch.equal(pack_state[name], value) for name, value in state.items())


def check_losses(model: Model, stages: Sequence[Stage], num_processes: int, shard: Shard) -> None:
    """Check that losses over a whole batch are not combined with settings that divide a batch.

    Raises:
        XFusionError: a stage accumulates gradients or weighs losses by source, several processes or shards divide the batch, or
            samples have shots.
    """
    for stage_number, stage in enumerate(stages):
        batch_losses = [o.name for o in model.objectives if o.scope == "batch"]
        if batch_losses and stage.accumulate > 1:
            raise XFusionError(
                f"stage {stage_number} accumulates {stage.accumulate} batches, but the loss {batch_losses[0]} compares the items"
                f" of one: set --stages.{stage_number}.accumulate 1 and read more samples per step"
            )
        if batch_losses and stage.mixture.loss_weights:  # only samples of equal weight are a batch of their own
            raise XFusionError(
                f"stage {stage_number} weighs the losses of each source, but the loss {batch_losses[0]} compares the items of"
                f" all: leave --stages.{stage_number}.mixture.loss-weights out, or weigh the sources by their samples"
                " (--data a:weight=2+b)"
            )
        local_losses = [o.name for o in model.objectives if o.scope == "batch" and not o.across_processes]
        if local_losses and num_processes > 1:
            raise XFusionError(
                f"the loss {local_losses[0]} compares the items of one batch, which {num_processes} processes would divide: train"
                " it with one process"
            )
        pair_losses = [o.name for o in model.objectives if {"text", "media"} <= set(o.needs)]
        if pair_losses and stage.mixture.shots and stage.mixture.caption:
            raise XFusionError(
                f"the loss {pair_losses[0]} sets each picture against the words of its sample, but stage {stage_number} puts"
                f" {stage.mixture.shots} solved examples into each: set --stages.{stage_number}.mixture.shots 0"
            )
        if batch_losses and shard != "none":
            raise XFusionError(
                f"the loss {batch_losses[0]} compares the items of all processes, which walk through divided layers in step:"
                f" --shard {shard} cannot have it, take none"
            )


def check_learned(stage_number: int, stage: Stage, model: Model, batches: Sequence[Batch]) -> None:
    """Check that a step of a stage teaches something.

    Raises:
        XFusionError: no objective of the recipe has a loss of any weight in its batches.
    """
    counts = [objective.count(batch) for objective in model.objectives for batch in batches]
    weighted = [name for objective in model.objectives for name, weight in objective.weights.items() if weight]
    if not any(by_name.get(name) for by_name in counts for name in weighted):
        mixture, names = stage.mixture, ", ".join(weighted) or "none"
        raise XFusionError(
            f"stage {stage_number} would teach nothing: the recipe's losses ({names}) have no part in {mixture.draw} drawing and"
            f" {mixture.caption} captioning samples; set --stages.{stage_number}.mixture.draw or .caption"
        )


def open_data(settings: Settings, special_tokens: tuple[str, ...]) -> Source:
    """Open the run's source. Examples that were unreadable before a resume keep their place among the examples."""
    if settings.source is not None:
        return settings.source
    plan = states.newest_plan(settings.out / "state") if settings.resume else {}
    unreadable = plan.get("left_out", {}) | plan.get("broken", {})
    return open_source(
        settings.recipe.data, allow_bad=settings.allow_bad, special_tokens=special_tokens, unreadable=unreadable
    )


def mixture(
    number: int, source: Source, model: Model, settings: Settings, processes: Processes, left_out: LeftOut
) -> Mixture:
    """The batches of a stage, by its number; this process reads the pictures of its own rows only.

    Every stage has its own order and wordings: with those of the first, a second one would meet the same examples again and
    leave out the same ones.
    """
    seed = settings.recipe.seed
    if number:
        seed = int.from_bytes(hashlib.sha256(f"{seed}/stage {number}".encode()).digest()[:7])
    return Mixture(
        source,
        model.modality,
        model.modality.sizes,
        model.backbone.encode,
        model.backbone.begin_ids,
        model.backbone.end_id,
        settings.recipe.stages[number].mixture,
        seed,
        processes.row_slice,
        left_out,
        settings.decoders,
        model.backbone.context_length,
    )


@contextmanager
def naming_out_of_memory(stage_number: int, batches: Sequence[Batch], device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error of a stage's step inside the block into one that names the settings to change.

    Raises:
        XFusionError: it does not fit in memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        positions = ", ".join(
            f"{batch.num_sequences} samples of {batch.text.count} text positions" for batch in batches
        )
        raise XFusionError(
            f"the largest step of stage {stage_number} ({positions}) does not fit in the memory of {device}: lower"
            f" --stages.{stage_number}.mixture.draw and .caption, and raise --stages.{stage_number}.accumulate by as much, or set"
            f" --stages.{stage_number}.activation-checkpointing"
        ) from error


@dataclass(frozen=True)
class Prompts:
    """Number of texts of a source, and the memory that caching the hidden states of all of them would need."""

    number: int
    num_bytes: int

    @classmethod
    def of(cls, source: Source, model: Model, dtype: torch.dtype) -> Prompts:
        """Estimate both from some two hundred examples, in the precision of training."""
        examples = source.examples
        sampled = [examples[i] for i in range(0, len(examples), max(1, len(examples) // 200))]
        captions = [caption for example in sampled for caption in example.captions]
        mean_tokens = sum(len(model.backbone.encode(caption)) for caption in captions) / max(1, len(captions))
        mean_tokens += len(model.backbone.begin_ids)  # before the words of every prompt
        number = len(examples) * len(captions) // max(1, len(sampled))
        return cls(number, model.text_bytes(mean_tokens, dtype) * number)

    @property
    def worth_caching(self) -> bool:
        """Whether to cache the hidden states of texts: if the cache has room for at least a quarter of them.

        Otherwise most would be evicted before they are used again. It depends only on data and settings, so a resumed run
        decides the same.
        """
        return self.num_bytes <= CACHEABLE_RATIO * TEXT_STATES_BYTES

    @property
    def kept_bytes(self) -> int:
        """Bytes of cached states once a run has read all texts. Other wordings of the same examples add to this, up to
        `TEXT_STATES_BYTES` in total.
        """
        return min(self.num_bytes, TEXT_STATES_BYTES) if self.worth_caching else 0
