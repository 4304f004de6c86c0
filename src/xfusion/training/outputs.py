"""What a run writes beside its states: previews on the way, and the pack of its learned weights at the end."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image as PILImage

from xfusion import checkpoint
from xfusion.data.pictures import png_facts
from xfusion.data.sources import Source
from xfusion.evaluation.machine import commit, machine
from xfusion.evaluation.run import finite
from xfusion.evaluation.verify import text_keeping
from xfusion.model import Model
from xfusion.storage import atomic_file
from xfusion.training.processes import Processes
from xfusion.training.progress import Progress
from xfusion.training.stages import Recipe
from xfusion.training.track import Track

if TYPE_CHECKING:
    from xfusion.training.sharding import Sharding


PREVIEW_SEED, PREVIEW_STEPS = 0, 25
"""Seed of the first picture of a preview, and steps of each: the defaults of `draw`."""


def write_sheet(path: Path, pictures: Sequence[PILImage.Image], size: int, facts: Mapping[str, Any]) -> PILImage.Image:
    """Write the pictures of a preview in a row, with how they were drawn as text chunks, and return that picture."""
    sheet = PILImage.new("RGB", (size * len(pictures), size), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * size, 0))
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=png_facts(facts))
    return sheet


def preview_facts(recipe: Recipe, progress: Progress, guidance: float) -> dict[str, Any]:
    """How a preview behind the last step is drawn; picture i has the seed ``seed + i``."""
    stage_number = progress.stage(max(0, progress.step - 1))[0]
    return {
        "step": progress.step,
        "averaged": recipe.stages[stage_number].ema > 0,
        "steps": PREVIEW_STEPS,
        "guidance": guidance,
        "seed": PREVIEW_SEED,
    }


def pack_facts(
    recipe: Recipe,
    progress: Progress,
    source: Source,
    data_licence: str,
    *,
    data_fingerprint: str,
    command: str | None = None,
    teachers: Collection[str] = (),
    earlier: Sequence[dict[str, Any]] = (),
    changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Facts about the training of a pack, for its config and card, with the commit of the code and the machine.

    Args:
        recipe: how it was trained.
        progress: how long.
        source: on what.
        data_licence: licence of the data.
        data_fingerprint: `xfusion.data.sources.content_fingerprint` of the source; a pack has no folders of this machine, so its
            spec alone may name other data elsewhere.
        command: how the run was asked for.
        teachers: fingerprints of the encoders that it learned from.
        earlier: `xfusion.card.training_runs` of the pack that the run started from.
        changes: settings that were others before a resume, with both values; the recipe has the later one.
    """
    training = {
        **({"command": command} if command else {}),
        "steps": progress.step,
        "samples": progress.samples,
        **({} if progress.tokens is None else {"tokens": progress.tokens}),
        **({"skipped_steps": progress.skipped} if progress.skipped else {}),
        **({"changes": "; ".join(changes)} if changes else {}),
        "seconds": round(progress.seconds, 1),
        "data": source.spec,
        "data_fingerprint": data_fingerprint,
        "data_licence": data_licence,
        "pictures": len(source.examples),
        "averaged": recipe.stages[-1].ema > 0,
        "commit": commit(),
        "machine": machine(),
        **({"teachers": sorted(teachers)} if teachers else {}),
        **({"earlier": list(earlier)} if earlier else {}),
    }
    licence = {} if recipe.licence is None else {"licence": recipe.licence}
    return {"recipe": checkpoint.to_json(recipe), "training": training, **licence}


def write_pack(
    folder: Path,
    model: Model,
    facts: dict[str, Any],
    sharding: Sharding | None,
    processes: Processes,
    *,
    collective: bool,
) -> Model:
    """Write the pack in the first process; the others wait for it.

    Args:
        folder: the pack's.
        model: the trained model.
        facts: from `pack_facts`.
        sharding: how its weights are sharded, if they are.
        processes: the run's.
        collective: whether all processes call it, as they must with sharded weights.

    Returns:
        the model with unsharded weights, in every process.

    Raises:
        XFusionError: it cannot be written; raised in all processes.
    """
    is_first = processes.is_first
    if sharding is None:
        with processes.first_alone() if collective else nullcontext():
            if is_first:
                checkpoint.save(model, folder, **facts)
        if collective:  # `evaluate` reads the record in every process
            model.recorded = processes.broadcast(model.recorded)
        return model
    from xfusion.training.sharding import gathered_state

    weights = gathered_state(model, keep=is_first)
    with processes.first_alone():
        if is_first:
            checkpoint.save(model, folder, weights=weights, **facts)
    return checkpoint.load(folder, backbone=model.backbone, trust=True)


def record_text(pack: Path, model: Model, processes: Processes, track: Track) -> dict[str, Any] | None:
    """Measure in the first process what the run made of the base's text, and record it in the pack; None if the fusion
    preserves it.
    """
    if model.fusion.preserves_text:
        return None
    text_kept: dict[str, Any] | None = None
    with processes.first_alone():
        if processes.is_first:
            measured = text_keeping(model)
            text_kept = finite(measured)
            checkpoint.add_facts(pack, model, text_keeping=text_kept)
            track.print(
                "text      perplexity of the bundled prompts: {text_perplexity_base:.4g} (base),"
                " {text_perplexity_fused:.4g} (trained)".format_map(measured)
            )
    model.recorded = processes.broadcast(model.recorded)
    return text_kept
