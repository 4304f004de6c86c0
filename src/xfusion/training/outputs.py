"""What a run writes beside its states: previews on the way, and the pack of its learned weights at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image as PILImage

from xfusion import checkpoint
from xfusion.data.sources import Source
from xfusion.model import Model
from xfusion.storage import whole_file
from xfusion.training.processes import Processes
from xfusion.training.progress import Progress
from xfusion.training.stages import Recipe

if TYPE_CHECKING:
    from xfusion.training.sharding import Sharding


def write_sheet(path: Path, pictures: Sequence[PILImage.Image], size: int) -> PILImage.Image:
    """Pictures of a preview in a row, as a file; returns the row."""
    sheet = PILImage.new("RGB", (size * len(pictures), size), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * size, 0))
    with whole_file(path) as so_far:
        sheet.save(so_far, format="PNG")
    return sheet


def pack_facts(recipe: Recipe, progress: Progress, source: Source, data_licence: str) -> dict[str, Any]:
    """How a pack was trained, for its config and card."""
    training = {
        "steps": progress.step,
        "samples": progress.samples,
        "seconds": round(progress.seconds, 1),
        "data": source.spec,
        "data_licence": data_licence,
        "pictures": len(source.examples),
        "averaged": recipe.stages[-1].ema > 0,
    }
    licence = {} if recipe.licence is None else {"licence": recipe.licence}
    return {"recipe": checkpoint.to_json(recipe), "training": training, **licence}


def write_pack(
    folder: Path, model: Model, facts: dict[str, Any], sharding: Sharding | None, processes: Processes, *, wait: bool
) -> Model:
    """Write the pack; the other processes wait for it, unless they may have been stopped elsewhere.

    Args:
        folder: of the pack.
        model: what was trained.
        facts: as `pack_facts`.
        sharding: how its weights are divided, if they are.
        processes: all of which call it, where weights are divided or they ``wait``.
        wait: until it is written.

    Returns:
        the model, with all its weights in every process.
    """
    first = processes.first
    if sharding is None:
        if first:
            checkpoint.save(model, folder, **facts)
        if wait:
            processes.meet()
        return model
    from xfusion.training.sharding import whole_state

    weights = whole_state(model, keep=first)
    if first:
        checkpoint.save(model, folder, weights=weights, **facts)
    processes.meet()
    return checkpoint.load(folder, backbone=model.backbone, trust=True)
