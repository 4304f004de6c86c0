"""Measure the training speed of a recipe by a short run of the training loop; its files are deleted afterwards."""

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
    """Training samples per second, over the duration of the steps alone, without previews and checkpoints.

    Args:
        steps: the "step" events of one run, in order.
        warm: number of first steps to ignore, in which layers are compiled.

    Returns:
        the mean rate; None if there are not more than ``warm`` steps.
    """
    timed = list(steps)[warm:]
    seconds = sum(event["samples"] / event["samples_per_second"] for event in timed)
    return sum(event["samples"] for event in timed) / seconds if timed else None


def short_run(
    recipe: Recipe,
    *,
    source: Source | None = None,
    backbone: Backbone | None = None,
    steps: int = TIMED_STEPS,
    compile: bool = True,
) -> tuple[Model, float | None]:
    """Train for a few steps with the loop, batches, precision and compilation of a real run, in a temporary folder.

    Args:
        recipe: the recipe, whose last stage is run.
        source: an opened source instead of the recipe's data.
        backbone: an already loaded base.
        steps: number of measured steps, after `WARM_STEPS` of warm-up.
        compile: whether to compile the work of each layer.

    Returns:
        the trained model, and its `samples_per_second`.
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
    """Measure the training speed of drawing alone by a `short_run`.

    Args:
        recipe: the recipe, whose last stage is run without captioning samples.
        source: an opened source instead of the recipe's data.
        backbone: an already loaded base.
        steps: number of measured steps, after `WARM_STEPS` of warm-up.
        compile: whether to compile the work of each layer.

    Returns:
        ``samples_per_second``, ``batch`` (drawing samples per optimizer step) and ``steps``.

    Raises:
        XFusionError: the recipe's last stage has no drawing samples.
    """
    stage = recipe.stages[-1]
    if not stage.mixture.draw:
        raise XFusionError("the recipe's mixture has draw 0: there is no drawing to measure")
    drawing_recipe = replace(recipe, stages=(replace(stage, mixture=replace(stage.mixture, caption=0)),))
    _, speed = short_run(drawing_recipe, source=source, backbone=backbone, steps=steps, compile=compile)
    return {"samples_per_second": speed, "batch": stage.mixture.draw * stage.accumulate, "steps": steps}
