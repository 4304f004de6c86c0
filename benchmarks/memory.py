"""Memory that a tower takes in training beside its base: held between steps and at the peak, measured and predicted.

    python benchmarks/memory.py

Each recipe trains two joint steps in a process of its own, with the embedded base in bfloat16, as the checkpoints of larger
bases are. *Held* counts the process's own pages (Linux's RssAnon) after freed blocks were returned: weights, moments and
average, without gradients, and kept states of prompts. What Python and the libraries hold is subtracted: a first run, whose
results are dropped, loads it. The prediction is that of `xfusion show`. `--measured` names larger shapes that are trained
too, with random weights and the embedded tokenizer, by those recipes whose prediction fits into half of this machine's
memory; for the others there is the prediction alone. Writes benchmarks/results/memory.json, which `python docs/pages.py
speed` reads.
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
    measured: tuple[str, ...] = ("Llama-3.2-1B",)
    """Shapes of larger bases that are trained, with random weights."""
    samples: int = 8
    """Samples per step on larger bases, a third of them captions. What is held does not depend on it."""
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


def load_base(shape: str | None) -> Backbone:
    """The embedded base in bfloat16, or a random one of a larger shape with the embedded tokenizer."""
    embedded = Backbone.load(dtype=torch.bfloat16)
    if shape is None:
        return embedded
    return Backbone(Backbone.of_shape(shape, "cpu").model, embedded.tokenizer, shape, pretrained=False)


def train_two_steps(recipe: str, source: Source, base: Backbone, samples: int | None = None) -> Step:
    """A recipe behind two steps.

    Args:
        recipe: name and arguments.
        source: pictures with captions.
        base: the base.
        samples: samples per step; None means the demo's.
    """
    bench = Bench(backbone=base, source=source, compile=False, report=lambda _: None)
    captions = None if samples is None else samples // 3
    drawn = None if samples is None or captions is None else samples - captions
    step = Step(bench, build(find(recipe)().model, base), draw=drawn, caption=captions)
    step()
    step()
    return step


def measure(recipe: str, data: str, shape: str | None = None, samples: int | None = None) -> dict[str, Any]:
    """A recipe on a base, by a process that did nothing else before."""
    source = open_source(data)
    train_two_steps(recipe, source, load_base(None), samples)
    empty_bytes = resident_bytes()
    base = load_base(shape)
    base_bytes = resident_bytes()
    step = train_two_steps(recipe, source, base, samples)
    resident = resident_bytes() - empty_bytes
    with peak_memory(base.device) as peak:
        step()
    model = step.model
    predicted = training_memory(model, source)
    if samples is None:
        batch_facts = {"activations_predicted": activation_memory(model, demo().stages[0], torch.bfloat16)}
    else:  # the prediction is for the demo's batch
        batch_facts = {"samples": samples}
    return {
        "base": base_bytes - empty_bytes,
        "held": resident,
        "held_over_base": round(resident / (base_bytes - empty_bytes), 3),
        "held_predicted": predicted["total"] - predicted["gradients"],
        "peak_of_a_step": peak["bytes"],
        **batch_facts,
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

    def add(base_model: str, recipe: str, *arguments: Any) -> None:
        with context.Pool(1) as pool:
            row = pool.apply(measure, (recipe, settings.data, *arguments))
        rows.append({"base_model": base_model, "recipe": recipe, **row})
        print(json.dumps(rows[-1]), flush=True)

    for recipe in settings.recipes:
        add("SmolLM2-135M", recipe)
    provenance = origin("benchmarks")
    half = provenance["machine"]["memory_gb"] * 1e9 / 2
    for shape in dict.fromkeys([*SHAPES, *settings.measured]):
        for recipe in settings.recipes:
            predicted = predict(recipe, shape)
            if shape in settings.measured and predicted["held_predicted"] < half:
                add(shape, recipe, shape, settings.samples)
            else:
                rows.append({"base_model": shape, "recipe": recipe, **predicted})
    write_json(settings.out, {**provenance, "data": settings.data, "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Settings))
