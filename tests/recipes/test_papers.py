"""What the recipes' pages call faithful, held to numbers of the papers; and sizes of mechanisms by the papers' formulas."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest

from xfusion import backbone
from xfusion.backbone import Backbone
from xfusion.fusion.gated_tower import GatedTower
from xfusion.fusion.modality_experts import PARTS
from xfusion.fusion.prefix import Prefix
from xfusion.fusion.shared_decoder import SharedDecoder
from xfusion.modalities.codecs.pixels import Pixels
from xfusion.objectives.base import NoObjective
from xfusion.recipes.base import find

LAYERS, WIDTH, HEADS, KEYS, MLP = 30, 576, 9, 192, 1536
SHAPE = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS * HEADS // WIDTH,
}
"""SmolLM2-135M's."""


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbone.SHAPES, "small", SHAPE)
        yield Backbone.of_shape("small")


READS: dict[str, Any] = {
    "model.fusion": Prefix.Config(),
    "model.media": NoObjective.Config(),
    "model.text.weight": 1.0,
    "stages.0.mixture.draw": 0,
}
"""A frozen language model behind a connector, with a loss on answers alone."""
FAITHFUL: dict[str, dict[str, Any]] = {
    # Section 2.4 and figure 4 of Flamingo: i % n = 0, squared ReLU, media normed too, gates shut, 64 latents of 6 layers.
    "flamingo(every=4, latents=64, depth=6, gate=0.0)": {
        "model.fusion.norm": "layer",
        "model.fusion.media_norm": True,
        "model.fusion.head_norm": False,
        "model.fusion.activation": "squared relu",
        "model.fusion.connector.activation": "squared relu",
        "model.fusion.connector.latents": 64,
        "model.fusion.connector.depth": 6,
        "model.fusion.connector.head_norm": False,
        "model.fusion.mlp": None,
        "model.fusion.mask": "immediate",
        "model.fusion.gate": 0.0,
        "model.fusion.text_only": "skip",
        "model.text.weight": 1.0,
        "model.image.behind_begin": True,
        "placed": tuple(range(0, LAYERS, 4)),
    },
    # open_flamingo/src/helpers.py: GELU, norms of words alone, 8 heads of 64 whatever the width; (i + 1) % n = 0.
    "openflamingo(every=4, gate=0.0)": {
        "model.fusion.norm": "layer",
        "model.fusion.media_norm": False,
        "model.fusion.head_norm": False,
        "model.fusion.activation": "gelu",
        "model.fusion.heads": 8,
        "model.fusion.head_width": 64,
        "model.fusion.key_heads": None,
        "model.fusion.mlp": None,
        "model.fusion.connector.activation": "gelu",
        "model.fusion.connector.heads": 8,
        "model.fusion.connector.head_width": 64,
        "model.fusion.connector.mlp": 4,
        "model.fusion.mask": "immediate",
        "model.fusion.gate": 0.0,
        "placed": tuple(range(3, LAYERS, 4)),
    },
    # IdeficsConfig: as many heads and as wide an MLP as the Llama, norms per head, ReLU in the resampler; i % n = 0.
    "idefics(every=4, gate=0.0)": {
        "model.fusion.norm": "rms",
        "model.fusion.head_norm": True,
        "model.fusion.activation": "swiglu",
        "model.fusion.heads": HEADS,
        "model.fusion.head_width": WIDTH // HEADS,
        "model.fusion.mlp": MLP,
        "model.fusion.connector.activation": "relu",
        "model.fusion.connector.head_norm": True,
        "model.fusion.mask": "immediate",
        "model.fusion.gate": 0.0,
        "placed": tuple(range(0, LAYERS, 4)),
    },
    # Ten rows in all layers but two, gates shut, one vector of the picture, rate 9e-3.
    "llama_adapter": {
        "model.fusion.prompts": 10,
        "model.fusion.gate": 0.0,
        "model.fusion.picture": "added",
        "model.fusion.affine": False,
        "model.fusion.connector.latents": 1,
        "stages.0.rate": 9e-3,
        "placed": tuple(range(2, LAYERS)),
    },
    "llama_adapter_v2(early=1, gate=0.0)": {
        "model.fusion.prompts": 20,
        "model.fusion.gate": 0.0,
        "model.fusion.picture": "early",
        "model.fusion.early": 1,
        "model.fusion.affine": True,
        "model.fusion.connector.latents": 20,
        "placed": tuple(range(LAYERS)),
    },
    "llama_adapter_v2(released=True)": {"model.fusion.picture": "added", "placed": tuple(range(1, LAYERS))},
    # Two of four experts at every second layer, balance 0.01.
    "moe_llava(every=2, experts=4, paper=True)": {
        "model.fusion.active": 2,
        "model.fusion.experts": 4,
        "model.fusion.frozen_expert": False,
        "model.extra.0.weight": 0.01,
        "placed": tuple(range(0, LAYERS, 2)),
    },
    "moe_llava": {"model.fusion.frozen_expert": True, "model.fusion.active": 2},
    "cogvlm": {
        "model.fusion.own": ("query", "key", "value", "output", "mlp"),
        "model.image.position": "shared",
        "model.image.order": "causal",
        "placed": tuple(range(LAYERS)),
    },
    "mplug_owl2": {
        "model.fusion.own": ("norm", "key", "value"),
        "model.image.position": "running",
        "placed": tuple(range(LAYERS)),
    },
    "llava": {"model.image.order": "causal", "model.text.weight": 1.0, "stages.0.rate": 2e-3},
    "llava_1_5(encoder='some/clip')": {"model.image.order": "causal", "model.image.codec.encoder.layer": -2},
    # The dual tower's paper: 0.2 and 1, two drawings to a caption, clean pictures to read, a block at every layer.
    "xfusion(stride=1, mlp=None)": {
        "model.text.weight": 0.2,
        "model.media.weight": 1.0,
        "stages.0.mixture.draw": 64,
        "stages.0.mixture.caption": 32,
        "stages.0.mixture.largest_noise": 0.0,
        "model.fusion.fuse": None,
        "placed": tuple(range(LAYERS)),
    },
    "xfuse": {"model.fusion.fuse": "both"},
    "dual_projection": {"model.fusion.noised_only": False},
    # Five times the weight of the text loss, a cosine schedule; pictures before their words noised by half at most.
    "lmfusion": {
        "model.media.weight": 5 * 0.2,
        "model.text.weight": 0.2,
        "model.media.schedule": "cosine",
        "model.fusion.own": PARTS,
        "model.image.order": "both ways",
        "placed": tuple(range(LAYERS)),
    },
    "transfusion": {
        "model.media.weight": 5 * 0.2,
        "model.text.weight": 0.2,
        "model.media.schedule": "cosine",
        "stages.0.mixture.largest_noise": 0.5,
        "model.image.order": "both ways",
        "placed": tuple(range(LAYERS)),
    },
    "bagel": {"model.fusion.own": PARTS, "model.fusion.noised_only": True, "model.port.time": "add"},
    "xfusion.recipes.mot:from_scratch": {"model.fusion.post_norm": True, "model.fusion.own": PARTS},
    "blip": {
        "model.text.weight": 1.0,
        "model.extra.0.weight": 1.0,
        "model.extra.0.matching": 1.0,
        "model.fusion.mask": "immediate",
    },
    "lxmert(depth=5, picture_depth=5, width=768)": {
        "model.extra.0.share": 0.15,
        "model.extra.0.weight": 1.0,
        "model.extra.0.matching": 1.0,
        "model.extra.0.depth": 5,
        "model.extra.0.mlp": 3072,
        "model.port.depth": 5,
        "model.port.mlp": 3072,
        "model.text.weight": 0.0,
    },
    "clip": {"stages.0.mixture.templates.caption_dropout": 0.0, "model.extra.0.weight": 1.0},
    # Section 3 of X-Fusion: what its two baselines with whole blocks train at every layer.
    "single_tower(stride=1)": {"model.fusion": SharedDecoder.Config(), "placed": tuple(range(LAYERS))},
    "gated_tower(stride=1)": {"model.fusion": GatedTower.Config(), "placed": tuple(range(LAYERS))},
    "mot": {
        "model.fusion.own": PARTS,
        "model.fusion.noised_only": False,
        "model.fusion.post_norm": False,
        "placed": tuple(range(LAYERS)),
    },
    # A denoising loss alone, of pixels on a cosine schedule.
    "imagen": {
        "model.image.codec": Pixels.Config(),
        "model.media.schedule": "cosine",
        "model.text.weight": 0.0,
        "stages.0.mixture.caption": 0,
    },
    # The released configuration: mappers of 8 heads, with an MLP of twice the width.
    "pengi": {"model.port.heads": 8, "model.port.mlp": 2, **READS},
    "slm": {"model.port.depth": 2, **READS},
    "qwen_audio": {"model.audio.order": "causal", **READS},
    # 256 queries of one cross-attention layer, on a map of as many places.
    "qwen_vl(queries=256, map_side=16)": {
        "model.port.queries": 256,
        "model.port.map": (16, 16),
        "model.port.cells": 1,
        "model.image.patch_width": 1,
        **READS,
    },
    "blip2": READS,
    # Three losses of equal weight on pairs that all have words, 32 tokens at most; then the decoder's alone.
    "blip2(first_stage=2000)": {
        "model.port.words": True,
        "model.extra.0.length": 32,
        "model.extra.0.weight": 1.0,
        "model.extra.0.matching": 1.0,
        "model.extra.0.generation": 1.0,
        "stages.0.steps": 2000,
        "stages.0.mixture.caption": 0,
        "stages.0.mixture.templates.caption_dropout": 0.0,
        "stages.1.mixture.draw": 0,
        "model.fusion": Prefix.Config(),
        "model.text.weight": 1.0,
    },
}
"""Recipe, with the papers' sizes where they are arguments -> settings by path; ``placed`` are its layers with something new."""

OWN_CHOICES: dict[str, dict[str, Any]] = {
    "xfusion": {"model.image.order": "both ways", "model.port.time": "add"},
    "xfuse": {"model.fusion.fuse_by": "layer"},
    "dual_projection": {"model.fusion.own": PARTS},
    "llava_1_5": {"stages.0.rate": 1e-3},
    "dall_e": {"model.text.weight": 1 / 8, "model.media.weight": 7 / 8},
    "imagen": {"model.media.threshold": 0.995, "stages.0.mixture.templates.caption_dropout": 0.1},
}
"""The same of what pages call adapted: the paper leaves it open, or we read its number without having confirmed it."""


def hold_to_table(name: str, settings: dict[str, Any]) -> None:
    recipe = find(name)()
    for path, expected in settings.items():
        value: Any = recipe
        for part in path.split(".") if path != "placed" else ():
            value = value[int(part)] if part.isdigit() else getattr(value, part)
        found = tuple(recipe.model.fusion.placed(LAYERS)) if path == "placed" else value
        assert found == pytest.approx(expected) if isinstance(expected, float) else found == expected, path


@pytest.mark.parametrize("name", FAITHFUL)
def test_what_a_page_calls_faithful(name):
    hold_to_table(name, FAITHFUL[name])


@pytest.mark.parametrize("name", OWN_CHOICES)
def test_what_we_chose_where_a_paper_leaves_it_open(name):
    hold_to_table(name, OWN_CHOICES[name])


def size(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        # Flamingo's block with norms of media; OpenFlamingo's; Idefics' with its norms per head. A = heads x width.
        ("flamingo", 4 * WIDTH * 512 + 8 * WIDTH**2 + 4 * WIDTH + 2 + 2 * WIDTH),
        ("openflamingo", 4 * WIDTH * 512 + 8 * WIDTH**2 + 4 * WIDTH + 2),
        ("idefics", 4 * WIDTH**2 + 3 * WIDTH * MLP + 2 * WIDTH + 2 + 2 * WIDTH // HEADS),
        ("llama_adapter", 10 * WIDTH + HEADS),
        # A scale and a bias for every output of the seven matrices, and two norms.
        ("llama_adapter_v2(released=True)", 20 * WIDTH + HEADS + 2 * (3 * WIDTH + 2 * KEYS + 2 * MLP) + 2 * WIDTH),
        ("cogvlm", 2 * WIDTH**2 + 2 * WIDTH * KEYS + 3 * WIDTH * MLP),
        ("mplug_owl2", 2 * WIDTH * KEYS + 2 * WIDTH),
        ("lmfusion", 2 * WIDTH**2 + 2 * WIDTH * KEYS + 3 * WIDTH * MLP + 2 * WIDTH),
        ("xfusion(mlp=None)", 2 * WIDTH**2 + 2 * WIDTH * KEYS + 3 * WIDTH * MLP + 2 * WIDTH),
        ("moe_llava(experts=4, paper=True)", 4 * 3 * WIDTH * MLP + 4 * WIDTH),
        ("moe_llava(experts=4)", 3 * 3 * WIDTH * MLP + 4 * WIDTH),
        # r (in + out) of each matrix: queries, keys, values and output.
        pytest.param(
            "lora(rank=16, targets=('query', 'key', 'value', 'output'))",
            16 * (2 * (WIDTH + WIDTH) + 2 * (WIDTH + KEYS)),
            marks=pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed (extra lora)"),
        ),
    ],
)
def test_a_layers_new_weights_are_as_many_as_the_paper_says(small, name, formula):
    fusion = find(name)().model.fusion.build()
    fusion.install(small)
    assert {size(block) for block in fusion.blocks.values()} == {formula}


@pytest.mark.parametrize(("offset", "layers"), [(None, range(2, LAYERS, 4)), (0, range(0, LAYERS, 4))])
def test_cogvlms_slim_form_has_the_papers_count_from_the_first_layer_on(small, offset, layers):
    """ceil(30 / 4) experts of 2 d^2 + 2 d d_kv + 3 d f each; the default begins in the middle of a stride, with one less."""
    fusion = replace(find("cogvlm(stride=4)")().model.fusion, offset=offset).build()
    fusion.install(small)
    assert fusion.state_layers == tuple(layers)
    assert size(fusion) == {7: 24_772_608, 8: 28_311_552}[len(layers)]


@pytest.mark.parametrize("name", ["flamingo(latents=64, depth=6)", "openflamingo(latents=64, depth=6)"])
def test_a_resampler_is_as_large_as_the_paper_says(small, name):
    fusion = find(name)().model.fusion.build()
    fusion.install(small)
    assert size(fusion.connector) == 6 * (4 * WIDTH * 512 + 8 * WIDTH**2 + 6 * WIDTH) + 64 * WIDTH + 2 * WIDTH
