"""The drawings of the recipe pages say what the models are."""

import importlib.util
from pathlib import Path

import pytest
import torch

from xfusion.backbone import Backbone
from xfusion.model import build
from xfusion.recipes.base import find, names

spec = importlib.util.spec_from_file_location("diagrams", Path(__file__).parents[2] / "docs" / "diagrams.py")
diagrams = importlib.util.module_from_spec(spec)
spec.loader.exec_module(diagrams)


@pytest.fixture(scope="module")
def base():
    return Backbone.of_shape("Llama-3.2-1B")


@pytest.fixture(scope="module")
def deep():
    return Backbone.of_shape("Llama-3.1-8B")


DEEP = ("hybrid",)
"""They name layers that only a deeper base has."""


KINDS = ("xfusion", "dual_projection", "flamingo", "llava", "llama_adapter", "moe_llava", "teal", "clip", "lora")
"""One of each kind; all others are of the full tier."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in KINDS else pytest.mark.full) for n in names()])
def test_every_new_weight_stands_in_one_place(name, request):
    base = request.getfixturevalue("deep" if name in DEEP else "base")
    model = build(find(name)().model, base)
    blocks, others = diagrams.weights(model)
    assert sum(blocks.values()) + others.total() == model.num_new_parameters
    assert set(blocks) <= set(range(base.num_layers))


@pytest.mark.parametrize(
    ("name", "layers"),
    [("xfusion", (2, 7, 12)), ("xfuse", (2, 7, 12)), ("gated_tower", (2, 7, 12)), ("llava", ()), ("clip", (7,))],
)
def test_layers_are_those_of_the_fusion(name, layers, base):
    blocks, _ = diagrams.weights(build(find(name)().model, base))
    assert tuple(sorted(blocks)) == layers


def test_a_drawing_names_its_numbers(base):
    model = build(find("llava")().model, base)
    svg = diagrams.diagram("llava", model)
    assert "2.63 M weights trained, text stays bit-identical" in svg
    assert "no layer is trained" in svg and "picture out" not in svg
    assert all(parameter.device == torch.device("meta") for parameter in base.model.parameters())


def test_what_stands_beside_the_base_is_not_drawn_into_its_layers(base):
    lxmert, imagen = (diagrams.diagram(name, build(find(name)().model, base)) for name in ("lxmert", "imagen"))
    assert "no picture passes one" in lxmert and "reads both" in lxmert and "of objectives" not in lxmert
    assert "6 blocks beside the base" in imagen and "new beside layers" in imagen and "trained in" not in imagen
