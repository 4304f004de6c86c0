"""Every recipe on the shape of a base alone: what `xfusion show` says of it needs no weights."""

import pytest
from rich.console import Console

from xfusion import backbone
from xfusion.apps.commands.show import Show, memory_on_shape
from xfusion.backbone import Backbone
from xfusion.model import build
from xfusion.recipes.base import find, names

SHAPE = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 1536,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


QUICK = ("audiopalm", "xfusion")
"""One of sounds, one of pictures; all others, and the one without a trained base, are of the full tier."""
ALL = (*names(), "xfusion.recipes.mot:from_scratch")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in ALL if name not in QUICK)]
)
def test_a_recipe_is_shown_on_a_shape(name, monkeypatch):
    layers = 4 if name in QUICK else 30  # of 30 costs are counted for ten seconds
    monkeypatch.setitem(backbone.SHAPES, "small", SHAPE | {"num_hidden_layers": layers})
    shown = Show(name=name, backbone="small").run(Console(quiet=True))
    assert shown.data["new_parameters"] > 0 and f"{name} on the shape of small" in shown.text
    for flops in shown.data["flops_per_sample"].values():
        assert flops["training"] > flops["forward"] > 0
    memory = shown.data["memory"]
    if memory["activations"]:
        assert memory["activations_with_checkpointing"] > 0


@pytest.mark.parametrize("shape", ["Llama-3.2-1B", "Llama-3.1-8B"])
def test_training_a_low_rank_tower_holds_at_most_a_fifth_more_than_a_large_base(shape):
    """Weights, gradients, optimizer and average, from shapes alone; a tower of copied layers holds more."""
    held = {}
    for recipe in ("xfusion_lora", "xfusion"):
        model = build(find(recipe)().model, Backbone.of_shape(shape))
        memory = memory_on_shape(model)
        frozen = sum(parameter.numel() for parameter in model.backbone.model.parameters())
        assert memory["base"] == 2 * frozen and memory["total"] == 2 * frozen + 5 * 4 * model.num_new_parameters
        held[recipe] = memory["total"] / memory["base"]
    assert 1 < held["xfusion_lora"] <= 1.2 < held["xfusion"]
