"""Every recipe as it stands trains through the real loop on a narrow base, and keeps what it says it keeps.

Recipes are found, not listed, so that a new one is held to this by being there. Models, objectives and schedules are the recipes'
own; a step has four samples of each task, always the same ones under the same noise, so that a loss that falls was learned. What
a recipe would take from a hub is a random one of the same shape.
"""

import inspect
import math
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from contracts.table import VOCABULARY, Noise, tokenizer, trained
from transformers import LlamaConfig, LlamaForCausalLM

from xfusion.backbone import SCRATCH, Backbone
from xfusion.data.mixture import Mixture
from xfusion.data.sources import open_source
from xfusion.model import BackboneConfig, Model, build
from xfusion.recipes.base import find, names
from xfusion.training.stages import Recipe

SAMPLES = 4
"""Of each task in a step: enough for losses that compare pairs."""
STEPS = 3
"""What stands behind a closed gate or a head of zeros moves in the second step, what stands behind both in the third."""
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


BEGIN, END = {"port.begin"}, {"port.end"}
STILL = {
    # Words read what stands behind [BOI], by attention of their own.
    **dict.fromkeys(("blip", "flamingo", "openflamingo", "idefics", "llama_adapter", "llama_adapter_v2"), BEGIN),
    "clip": END,  # no word stands behind a picture
    "imagen": BEGIN | END,
}
"""Weights that a recipe has and does not train, by name; of all others every one moves."""
EXPERT = re.compile(r"fusion\.blocks\.(\d+)\.experts\.(\d+)\.")


@pytest.fixture(scope="module")
def bases_of(tmp_path_factory):
    """A random base of so many layers, wide enough for the MLPs of which recipes keep a part; as trained, or from scratch."""
    folder, made = tmp_path_factory.mktemp("bases"), {}

    def base(layers, scratch):
        if not (folder / str(layers)).exists():
            shape = LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=512,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.12,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
            torch.manual_seed(0)
            LlamaForCausalLM(shape).save_pretrained(folder / str(layers))
            tokenizer().save_pretrained(folder / str(layers))
        source = f"{SCRATCH if scratch else ''}{folder / str(layers)}"
        if source not in made:
            made[source] = Backbone.load(source)
        return made[source]

    return base


@pytest.fixture(scope="module")
def codes(whisper, tmp_path_factory):
    """As many clusters of sounds as the recipe has, anywhere."""
    folder = tmp_path_factory.mktemp("clusters") / "codes"
    recipe = find("audiopalm")(codes=str(folder), encoder=whisper)
    codec = recipe.model.audio.codec.build()
    codec.clusters = torch.randn(recipe.model.port.entries, codec.features.width)
    codec.save(Path(folder))
    return str(folder)


@pytest.fixture
def same_step(monkeypatch):
    """Every step reads what the first one reads, and meets the same noise."""
    batches, losses = Mixture.batches, Model.losses
    monkeypatch.setattr(Mixture, "batches", lambda mixture, _: batches(mixture, 0))
    monkeypatch.setattr(
        Model, "losses", lambda model, batch, generator, *rows: losses(model, batch, generator.manual_seed(0), *rows)
    )


@pytest.mark.parametrize("name", every())
def test_a_recipe_trains_as_it_stands(name, bases_of, tones, whisper, codes, same_step, tmp_path):
    taken = inspect.signature(find(name)).parameters
    local = {key: value for key, value in {"encoder": whisper, "codes": codes}.items() if key in taken}
    recipe = find(name)(**{key: value for key, value in local.items() if isinstance(taken[key].default, str)})
    layers = taken["num_layers"].default if "num_layers" in taken else LAYERS
    base = bases_of(layers, recipe.model.backbone.source.startswith(SCRATCH))
    stages = []
    for stage in recipe.stages:
        few = {task: min(getattr(stage.mixture, task), SAMPLES) for task in ("draw", "caption")}
        stages.append(replace(stage, steps=STEPS, mixture=replace(stage.mixture, **few)))
    recipe = replace(recipe, stages=tuple(stages)).with_model(backbone=BackboneConfig(source=base.source))
    source = open_source(tones) if recipe.model.audio else Noise()
    model, losses = trained(recipe, base, tmp_path / "run", source=source)  # text as the fusion declares it

    weights = {loss: weight for objective in model.objectives for loss, weight in objective.weights.items()}
    first, *_, last = (sum(weights[loss] * value for loss, value in step.items()) for step in losses)
    start, moved = build(recipe.model, base).named_new_parameters(), model.named_new_parameters()
    still = {part for part, weight in start.items() if torch.equal(weight, moved[part])}
    assert losses[0] and len({tuple(step) for step in losses}) == 1
    assert math.isfinite(last) and last < first
    idle = {match.groups() for part in still if (match := EXPERT.match(part))}
    assert {part for part in still if not EXPERT.match(part)} == STILL.get(name, set())
    assert len({layer for layer, _ in idle}) == len(
        idle
    )  # of three experts each token takes two: one of a layer may get none
