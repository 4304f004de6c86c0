"""Training speed of a recipe: a short run of the training loop, whose files are deleted afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Source
from xfusion.model import Model
from xfusion.training.loop import train
from xfusion.training.pace import WARM_STEPS
from xfusion.training.stages import Recipe
from xfusion.training.track import Event

TIMED_STEPS = 20
"""Steps over which the training speed is measured, after the warm-up."""


def samples_per_second(steps: Iterable[Event], *, warm: int = WARM_STEPS) -> float | None:
    """Samples trained per second of the steps themselves: compiling, previews and checkpoints do not count.

    Args:
        steps: "step" events of one run.
        warm: steps at the beginning that do not count.

    Returns:
        None where there are no more steps than that.
    """
    counted = list(steps)[warm:]
    seconds = sum(event["samples"] / event["samples_per_second"] for event in counted)
    return sum(event["samples"] for event in counted) / seconds if counted else None


def short_run(
    recipe: Recipe,
    *,
    source: Source | None = None,
    backbone: Backbone | None = None,
    steps: int = TIMED_STEPS,
    compile: bool = True,
) -> tuple[Model, float | None]:
    """Train for a few steps, by the same loop, batch, precision and compiled blocks as a real run; no file stays.

    Args:
        recipe: its last stage is run.
        source: an opened source instead of the recipe's data.
        backbone: an already loaded base.
        steps: measured steps, behind the warm-up.
        compile: compile the per-layer work, as `train` does.

    Returns:
        the model and its `samples_per_second`.
    """
    stage = replace(recipe.stages[-1], steps=WARM_STEPS + steps)
    events: list[Event] = []
    with tempfile.TemporaryDirectory(prefix="xfusion-speed-") as folder:
        model = train(
            replace(recipe, stages=(stage,)),
            out=folder,
            source=source,
            backbone=backbone,
            compile=compile,
            preview_every=0,
            checkpoint_every=float("inf"),
            listener=events.append,
        )
    return model, samples_per_second(event for event in events if event["event"] == "step")


def drawing_speed(
    recipe: Recipe,
    *,
    source: Source | None = None,
    backbone: Backbone | None = None,
    steps: int = TIMED_STEPS,
    compile: bool = True,
) -> dict[str, Any]:
    """How fast drawing alone trains, by a `short_run`.

    Args:
        recipe: its last stage is run without captioning samples.
        source: an opened source instead of the recipe's data.
        backbone: an already loaded base.
        steps: measured steps, behind the warm-up.
        compile: compile the per-layer work, as `train` does.

    Returns:
        ``samples_per_second``, ``batch`` (drawings per optimiser step) and ``steps``.

    Raises:
        XFusionError: the recipe does not draw.
    """
    stage = recipe.stages[-1]
    if not stage.mixture.draw:
        raise XFusionError("the recipe's mixture has draw 0: there is no drawing to measure")
    alone = replace(recipe, stages=(replace(stage, mixture=replace(stage.mixture, caption=0)),))
    _, rate = short_run(alone, source=source, backbone=backbone, steps=steps, compile=compile)
    return {"samples_per_second": rate, "batch": stage.mixture.draw * stage.accumulate, "steps": steps}
