"""Recipes that read pictures: each as its page builds it, with a tiny encoder and a tiny base, trained for some steps."""

import json
from dataclasses import replace

import pytest
import torch
from contracts.table import Noise, trained
from transformers import CLIPVisionConfig, CLIPVisionModel

import xfusion
from xfusion.modalities.codecs.autoencoder_kl import AutoencoderKL
from xfusion.model import BackboneConfig, Model
from xfusion.recipes.base import find

RECIPES = {
    "llava": {},
    "llava_1_5": {},
    "blip2": {"queries": 8, "cells": 16},
    "qwen_vl": {"queries": 4, "map_side": 4},
    "flamingo": {"every": 3, "latents": 3, "depth": 1},
    "openflamingo": {"every": 2, "latents": 3, "depth": 1},
    "idefics": {"every": 2, "latents": 3, "depth": 1, "heads": 4, "mlp": 64},
    "llama_adapter": {"prompts": 3, "first": 1},
    "llama_adapter_v2": {"prompts": 3},
    "moe_llava": {"every": 2},
}
LOSSES = {"moe_llava": {"next_token", "load_balance"}}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny CLIP vision tower with a map of 4 x 4."""
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=4)).save_pretrained(folder)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 16}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_reads_and_comes_back_from_its_pack(name, bases, encoder, tmp_path):
    base = bases["llama"]
    recipe = find(name)(encoder=encoder, side=16, **RECIPES[name])
    recipe = replace(recipe, model=replace(recipe.model, backbone=BackboneConfig(source=base.source)))
    model, losses = trained(recipe, base, tmp_path / "run", steps=5)
    assert [set(step) for step in losses] == [LOSSES.get(name, {"next_token"})] * 5
    assert model.capabilities == {"text", "caption"}
    assert model.teachers == {f"{encoder}@None#-2"}
    loaded = xfusion.load(tmp_path / "run" / "pack", backbone=base)
    shown = [Noise().picture(i, 32) for i in range(2)]
    assert loaded.caption(shown, max_tokens=3) == model.caption(shown, max_tokens=3)
    assert model.fusion.preserves_text


def test_blip2s_second_stage_goes_on_with_the_query_transformer_of_the_first(bases, encoder, tmp_path):
    """Both in one run of the real loop; a second stage that moves nothing shows what it starts from."""
    base = bases["llama"]
    recipe = find("blip2(first_stage=3)")(encoder=encoder, side=16, **RECIPES["blip2"])
    recipe = recipe.with_model(backbone=BackboneConfig(source=base.source))
    first, second = (replace(stage, warmup=1, ema=0.0) for stage in recipe.stages)
    assert [stage.steps for stage in (first, second)] == [3, 2000]
    pretrained, losses = trained(replace(recipe, stages=(first,)), base, tmp_path / "first")
    learned = {"contrastive", "matching", "generation"}
    assert [set(step) for step in losses] == [learned] * 3

    stages = (first, replace(second, steps=2, rate=0.0))
    resting, losses = trained(replace(recipe, stages=stages), base, tmp_path / "resting")
    assert [set(step) for step in losses] == [learned] * 3 + [{"next_token"}] * 2
    assert resting.fingerprint == pretrained.fingerprint

    stages = (first, replace(second, steps=2))
    model, losses = trained(replace(recipe, stages=stages), base, tmp_path / "run")
    assert [set(step) for step in losses] == [learned] * 3 + [{"next_token"}] * 2
    fresh, before, after = (m.named_new_parameters() for m in (Model(recipe.model, base), pretrained, model))
    queries = {name for name in after if name.startswith("port.transformer.")}
    for_words = {name for name in queries if ".word_" in name} | {name for name in after if name.startswith("extra.")}
    into_the_model = {"port.begin", "port.end", "port.project.weight", "port.project.bias"}
    assert len(for_words) > 20 and queries | for_words | into_the_model == set(after)
    assert {name for name in after if not torch.equal(fresh[name], before[name])} == queries | for_words
    assert {name for name in after if not torch.equal(before[name], after[name])} == (
        queries - for_words
    ) | into_the_model

    loaded = xfusion.load(tmp_path / "run" / "pack", backbone=base)
    assert loaded.fingerprint == model.fingerprint and loaded.capabilities == {"text", "caption"}
    shown = [Noise().picture(i, 32) for i in range(2)]
    assert loaded.caption(shown, max_tokens=3) == model.caption(shown, max_tokens=3)
    plain = find("blip2")(encoder=encoder, side=16, **RECIPES["blip2"])
    assert len(plain.stages) == 1 and not plain.model.extra and not plain.model.port.words


def test_a_prefix_reads_the_latents_of_our_own_codec(bases, tmp_path):
    """As ``--model.image.codec autoencoder_kl:emoji-kl --model.image.sizes 32`` asks for: a token is one cell of 8 numbers."""
    base, recipe = bases["llama"], find("llava")()
    image = replace(recipe.model.image, codec=AutoencoderKL.Config(source="emoji-kl"), sizes=(32,))
    recipe = recipe.with_model(image=image, backbone=BackboneConfig(source=base.source))
    stage = replace(recipe.stages[0], mixture=replace(recipe.stages[0].mixture, caption=8))
    model, losses = trained(replace(recipe, stages=(stage,)), base, tmp_path / "run", steps=4)
    assert [set(step) for step in losses] == [{"next_token"}] * 4
    assert model.image.grid(32) == (8, 8) and model.port.project.weight.shape == (base.hidden_size, 8)
    assert model.capabilities == {"text", "caption"} and model.fusion.preserves_text and not model.teachers
    shown = [Noise().picture(i, 32) for i in range(2)]
    latents = model.image.codec.encode(model.image.from_pil(shown, 32))
    assert torch.equal(model.image.encode(shown, 32), latents.flatten(2).transpose(1, 2))
    loaded = xfusion.load(tmp_path / "run" / "pack", backbone=base)
    assert loaded.caption(shown, max_tokens=3) == model.caption(shown, max_tokens=3)


def test_clip_trains_embeds_and_comes_back_from_its_pack(bases, encoder, tmp_path):
    base = bases["llama"]
    recipe = find("clip(stride=2, mlp=40, batch=4, pooled=4)")(encoder=encoder, side=16)
    recipe = replace(recipe, model=replace(recipe.model, backbone=BackboneConfig(source=base.source)))
    model, losses = trained(recipe, base, tmp_path / "run", steps=5)
    assert [set(step) for step in losses] == [{"contrastive"}] * 5
    assert model.capabilities == {"text", "embed"} and model.teachers == {f"{encoder}@None#-2"}
    items = [Noise().picture(0, 32), "red apple"]
    assert torch.equal(xfusion.load(tmp_path / "run" / "pack", backbone=base).embed(items), model.eval().embed(items))


def test_lxmert_trains_matches_fills_and_comes_back_from_its_pack(bases, encoder, tmp_path):
    base = bases["llama"]
    recipe = find("lxmert(width=32, pairs=4)")(encoder=encoder, side=16)
    recipe = replace(recipe, model=replace(recipe.model, backbone=BackboneConfig(source=base.source)))
    model, losses = trained(recipe, base, tmp_path / "run", steps=5)
    assert [set(step) for step in losses] == [{"masked_words", "matching"}] * 5
    assert model.capabilities == {"text", "fill", "match"} and model.teachers == {f"{encoder}@None#-2"}
    loaded, shown = xfusion.load(tmp_path / "run" / "pack", backbone=base), Noise().picture(0, 32)
    for asked in (lambda m: m.match(shown, ["red apple", "tree"]), lambda m: m.fill(shown, ["red ___"])):
        assert asked(loaded) == asked(model.eval())


@pytest.mark.parametrize("name", ["blip2", "qwen_vl"])
def test_a_recipe_with_queries_has_as_many_tokens(name, encoder):
    recipe = find(name)(encoder=encoder, side=16, **RECIPES[name])
    rows, columns = recipe.model.image.build().grid(16)
    assert rows * columns == RECIPES[name]["queries"]
