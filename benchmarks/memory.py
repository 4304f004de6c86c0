"""Memory that a tower takes in training beside its base: held between steps and at the peak, measured and predicted.

    python benchmarks/memory.py

Each recipe trains two joint steps in a process of its own, the embedded base in bfloat16 as the checkpoints of larger ones are.
Held are the pages that are the process's own (Linux's RssAnon) once freed blocks were given back: weights, moments and average,
without gradients, and kept states of prompts. What Python and the libraries hold is subtracted: all of it was done once before,
and dropped. The prediction is that of `xfusion show`; for larger bases there is the prediction alone, from their shapes. Writes
benchmarks/results/memory.json, which `python docs/pages.py speed` reads.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from xfusion.apps.bench.base import Bench, Step
from xfusion.apps.commands.show import training_memory
from xfusion.backbone import Backbone
from xfusion.comparison.cost import activation_memory, peak_memory
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Source, open_source
from xfusion.evaluation.machine import origin
from xfusion.model import build
from xfusion.recipes.base import find
from xfusion.recipes.xfusion import demo
from xfusion.storage import write_json
from xfusion.training.memory import give_back_freed_memory
from xfusion.training.processes import anonymous_bytes

RESULT = Path(__file__).parent / "results" / "memory.json"
SHAPES = ("Llama-3.2-1B", "Llama-3.1-8B")


@dataclass(frozen=True)
class Settings:
    """What is trained."""

    recipes: tuple[str, ...] = ("xfusion_lora", "xfusion", "xfusion(stride=1, mlp=None)")
    """Recipes with arguments."""
    data: str = "emoji:128"
    """Pictures with captions."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = RESULT
    """Where the result goes."""


def resident_bytes() -> int:
    """Bytes of this process's own pages."""
    gc.collect()
    give_back_freed_memory()
    pages = anonymous_bytes()
    if pages is None:
        raise XFusionError("this system does not tell a process's own pages from files': measure on Linux")
    return pages


def train_two_steps(recipe: str, source: Source, base: Backbone | None = None) -> Step:
    """A recipe behind two steps."""
    base = base or Backbone.load(dtype=torch.bfloat16)
    bench = Bench(backbone=base, source=source, compile=False, report=lambda _: None)
    step = Step(bench, build(find(recipe)().model, base))
    step()
    step()
    return step


def measure(recipe: str, data: str) -> dict[str, Any]:
    """A recipe on the embedded base, by a process that did nothing else before."""
    source = open_source(data)
    train_two_steps(recipe, source)
    empty_bytes = resident_bytes()
    base = Backbone.load(dtype=torch.bfloat16)
    base_bytes = resident_bytes()
    step = train_two_steps(recipe, source, base)
    resident = resident_bytes() - empty_bytes
    with peak_memory(base.device) as peak:
        step()
    predicted = training_memory(step.model, source)
    model = step.model
    return {
        "base": base_bytes - empty_bytes,
        "held": resident,
        "held_over_base": round(resident / (base_bytes - empty_bytes), 3),
        "held_predicted": predicted["total"] - predicted["gradients"],
        "peak_of_a_step": peak["bytes"],
        "activations_predicted": activation_memory(model, demo().stages[0], torch.bfloat16),
        "new_weights": model.num_new_parameters,
    }


def predict(recipe: str, shape: str) -> dict[str, Any]:
    """The same from shapes alone."""
    base = Backbone.of_shape(shape)
    model = build(find(recipe)().model, base)
    memory = training_memory(model)
    predicted = memory["base"] + 4 * memory["new_weights"]  # computed with in the checkpoint's own precision
    return {
        "base": memory["base"],
        "held_predicted": predicted,
        "held_over_base": round(predicted / memory["base"], 3),
        "new_weights": model.num_new_parameters,
    }


def main(settings: Settings) -> None:
    """Measure each recipe in its own process, predict the larger ones, write."""
    rows, context = [], multiprocessing.get_context("spawn")
    for recipe in settings.recipes:
        with context.Pool(1) as pool:
            rows.append(
                {"base_model": "SmolLM2-135M", "recipe": recipe, **pool.apply(measure, (recipe, settings.data))}
            )
        print(json.dumps(rows[-1]), flush=True)
    for shape in SHAPES:
        rows += [{"base_model": shape, "recipe": recipe, **predict(recipe, shape)} for recipe in settings.recipes]
    write_json(settings.out, {**origin("benchmarks"), "data": settings.data, "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Settings))
