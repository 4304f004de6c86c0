"""Recipes of type D on a tiny base and a random codec: they train, draw, and leave words bit-equal."""

from dataclasses import replace

import pytest
import torch
from contracts.table import share_left, trained, twenty_steps
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from PIL import Image

from xfusion.data.mixture import MixtureConfig
from xfusion.data.sequence import XFusionError
from xfusion.modalities.codecs.causal_queries import CausalQueries, Shape
from xfusion.recipes.base import find

RECIPES = ("teal", "dall_e", "dall_e(rank=None)", "cm3leon", "seed")


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """A random VQModel of 12 codes per 4 x 4 pixels."""
    torch.manual_seed(0)
    model = VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=12,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        latents = model.encode(torch.rand(64, 3, 16, 16) * 2 - 1).latents.movedim(1, -1).flatten(0, 2)
        model.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[:12]])
    folder = tmp_path_factory.mktemp("codec") / "vq"
    model.save_pretrained(folder)
    return str(folder)


def tiny(name, base, codec):
    """A recipe on the tiny base, with the small mixture of the contract tests."""
    recipe = find(f"{name.rstrip(')')}{', ' if '(' in name else '('}codec={codec!r}, entries=12, size=16)")()
    stage = twenty_steps(MixtureConfig(draw=6, caption=6, pack=2))
    backbone = replace(recipe.model.backbone, source=base.source)
    return replace(recipe, stages=(stage,), data="noise").with_model(backbone=backbone)


@pytest.fixture(scope="module")
def causal_codec(tmp_path_factory):
    """A random causal query codec of 4 x 4 codes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("causal")
    AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
    ).save_pretrained(folder / "kl")
    shape = Shape(base=str(folder / "kl"), size=16, entries=12, code_width=4, width=16, layers=2, heads=2)
    CausalQueries(shape).save(folder / "seed")
    return str(folder / "seed")


@pytest.mark.parametrize("name", RECIPES)
def test_twenty_steps(bases, codec, causal_codec, name, tmp_path):
    base, codec = bases["llama"], causal_codec if name == "seed" else codec
    model, losses = trained(tiny(name, base, codec), base, tmp_path / "run")
    assert set(losses[0]) == {"next_token", "next_code"} and share_left(losses, "next_code") < 0.8
    assert model.fusion.preserves_text
    assert model.capabilities == {"text", "caption", "draw"}
    (picture,) = model.draw(["a tree"])
    assert picture.size == (16, 16)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 8))
    changed = model.inpaint(picture, mask, "a cat", seed=1)
    assert changed.size == (16, 16)
    assert all(isinstance(text, str) for text in model.caption([picture], max_tokens=3))


def test_what_the_pages_say(codec):
    page = {name: find(name)(codec=codec, entries=12, size=16).model for name in ("teal", "dall_e", "cm3leon")}
    assert page["teal"].text.weight == page["teal"].media.weight == 1
    assert page["cm3leon"].port.sentinels == 2 and page["cm3leon"].media.infill == 0.5
    assert all(model.image.order == "causal" for model in page.values())
    with pytest.raises(XFusionError, match="codec 'nowhere' is no folder, no shipped codec"):
        find("teal")(codec="nowhere").model.image.build()
