"""Every recipe as it stands, on a narrow random base and with few samples in a step."""

import inspect
from dataclasses import replace
from importlib import import_module

from xfusion.backbone import SCRATCH
from xfusion.model import BackboneConfig
from xfusion.recipes.base import find, names
from xfusion.training.stages import Recipe

SAMPLES = 4
"""Of each task in a step: enough for losses that compare pairs."""
LAYERS = 9
"""Of the base, where a recipe does not say for how many it is: all places of blocks lie below."""


def every() -> list[str]:
    """All functions of the recipes' files that return a recipe, and the forms of papers that an argument asks for."""
    found = ["moe_llava(paper=True)"]
    for name in names():
        module = import_module(f"xfusion.recipes.{name}")
        for called, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__
            if own and inspect.signature(function).return_annotation in (Recipe, "Recipe"):
                found.append(name if called == name else f"{module.__name__}:{called}")
    return found


def narrowed(name, bases_of, whisper, codes, steps):
    """A recipe of so many steps per stage, and its base; what it would take from a hub is a random one of the same shape."""
    taken = inspect.signature(find(name)).parameters
    local = {key: value for key, value in {"encoder": whisper, "codes": codes}.items() if key in taken}
    recipe = find(name)(**{key: value for key, value in local.items() if isinstance(taken[key].default, str)})
    layers = taken["num_layers"].default if "num_layers" in taken else LAYERS
    base = bases_of(layers, recipe.model.backbone.source.startswith(SCRATCH))
    stages = []
    for stage in recipe.stages:
        few = {task: min(getattr(stage.mixture, task), SAMPLES) for task in ("draw", "caption")}
        stages.append(replace(stage, steps=steps, mixture=replace(stage.mixture, **few)))
    return replace(recipe, stages=tuple(stages)).with_model(backbone=BackboneConfig(source=base.source)), base
