"""Every recipe on the shape of a base alone: what `xfusion show` says of it needs no weights."""

import pytest
from rich.console import Console

from xfusion import backbone
from xfusion.apps.commands.show import Show
from xfusion.recipes.base import names

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
    layers = 10 if name in QUICK else 30  # of 30 costs are counted for ten seconds
    monkeypatch.setitem(backbone.SHAPES, "small", SHAPE | {"num_hidden_layers": layers})
    shown = Show(name=name, backbone="small").run(Console(quiet=True))
    assert shown.data["new_parameters"] > 0 and f"{name} on the shape of small" in shown.text
    for flops in shown.data["flops_per_sample"].values():
        assert flops["training"] > flops["forward"] > 0
    memory = shown.data["memory"]
    if memory["activations"]:
        assert memory["activations_with_checkpointing"] > 0
