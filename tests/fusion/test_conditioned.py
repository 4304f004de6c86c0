"""The denoiser beside the base: diffusers' own block and thresholding, the whole by its equation, and the recipe in the loop."""

import math
from dataclasses import replace

import pytest
import torch
from contracts.table import Noise, exact, float64_model, make_model, picture, view, words
from diffusers import DDPMScheduler
from diffusers.models.attention import BasicTransformerBlock
from PIL import ImageChops
from torch.nn import functional

import xfusion
from xfusion.data.mixture import MixtureConfig
from xfusion.data.sequence import Sequence, XFusionError
from xfusion.fusion import conditioned
from xfusion.fusion.conditioned import Block, positions_of_items
from xfusion.modalities.port import sinusoids
from xfusion.model import BackboneConfig
from xfusion.objectives.diffusion import Diffusion
from xfusion.recipes.base import find
from xfusion.training.loop import train

NAMES = {
    "norm": "norm1",
    "words_norm": "norm2",
    "mlp_norm": "norm3",
    "own": "attn1",
    "cross": "attn2",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
}


@torch.no_grad()
def test_a_block_is_that_of_diffusers():
    torch.manual_seed(0)
    own = Block(32, 24, 2).eval()
    theirs = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24, activation_fn="gelu").eval()
    found = {}
    for name, value in own.state_dict().items():
        if name.startswith("modulation"):  # zero at first
            continue
        value.copy_(0.3 * torch.randn(value.shape))
        first, *rest = name.split(".")
        if first == "mlp":
            key = f"ff.net.0.proj.{rest[1]}" if rest[0] == "0" else f"ff.net.2.{rest[1]}"
        else:
            key = ".".join([NAMES[first], *(NAMES.get(part, part) for part in rest)])
        found[key] = value
    theirs.load_state_dict(found)
    x, words = torch.randn(3, 7, 32), torch.randn(3, 5, 24)
    read = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    expected = theirs(x, encoder_hidden_states=words, encoder_attention_mask=read)
    level = torch.randn(3, 32)
    reads, alike = read[:, None].expand(3, 7, 5), torch.ones(3, 7, 7, dtype=torch.bool)
    torch.testing.assert_close(
        own(x, level, alike, own.cross.keys_values(words), reads), expected, rtol=1e-5, atol=1e-5
    )
    # Where no word stands before a picture, cross-attention adds nothing.
    nothing = own(x, level, alike, own.cross.keys_values(words), torch.zeros_like(reads))
    torch.testing.assert_close(nothing, own(x, level, alike, None, reads), rtol=0, atol=1e-6)
    assert float((nothing - expected).abs().max()) > 1e-2
    # The noise level and the pooled text scale and shift what attention and MLP read, once they have learned to.
    own.modulation.weight.copy_(0.3 * torch.randn(128, 32))
    scale, shift, mlp_scale, mlp_shift = (level @ own.modulation.weight.T)[:, None].split(32, dim=-1)
    h = x + theirs.attn1(theirs.norm1(x) * (1 + scale) + shift)
    h = h + theirs.attn2(theirs.norm2(h), encoder_hidden_states=words, attention_mask=(~read * -1e9)[:, None])
    h = h + theirs.ff(theirs.norm3(h) * (1 + mlp_scale) + mlp_shift)
    modulated = own(x, level, alike, own.cross.keys_values(words), reads)
    torch.testing.assert_close(modulated, h, rtol=1e-5, atol=1e-5)


def normed(x, norm):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def attended(attention, x, context):
    """Attention by plain sums: biases on the output alone."""
    parts = ((x, attention.query), (context, attention.key), (context, attention.value))
    q, k, v = (rows @ part.weight.T for rows, part in parts)
    size, heads = q.shape[1] // attention.heads, []
    for part in (slice(h * size, (h + 1) * size) for h in range(attention.heads)):
        heads.append((q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(-1) @ v[:, part])
    return torch.cat(heads, -1) @ attention.out.weight.T + attention.out.bias


def affine(x, linear):
    return x @ linear.weight.T + linear.bias


def denoised(model, x, time, text_states):
    """The denoiser at one picture's states ``[M, D]``, by Imagen's section 2: without words nothing is pooled or read."""
    own = model.fusion
    tokens = affine(normed(x, own.media_norm), own.into)
    read = normed(text_states, own.words_norm)
    level = affine(functional.silu(affine(sinusoids(time[None])[0], own.time[0])), own.time[2])
    if len(read):
        level = level + affine(read, own.pooled).mean(0)
    for block in own.denoiser:
        scale, shift, mlp_scale, mlp_shift = affine(functional.silu(level), block.modulation).chunk(4)
        h = (1 + scale) * normed(tokens, block.norm) + shift
        tokens = tokens + attended(block.own, h, h)
        if len(read):
            tokens = tokens + attended(block.cross, normed(tokens, block.words_norm), read)
        h = (1 + mlp_scale) * normed(tokens, block.mlp_norm) + mlp_shift
        tokens = tokens + affine(functional.gelu(affine(h, block.mlp[0])), block.mlp[2])
    return affine(tokens, own.out)


@torch.no_grad()
def test_the_whole_denoiser_is_its_equation_in_float64(bases, monkeypatch):
    """It reads the base's own penultimate states of the words before a picture, and [BOI] is no part of it."""
    with exact(monkeypatch):
        model = float64_model(bases["llama"], "conditioned denoiser")
        said = [words(5, 1), words(2, 2)]
        shown = [picture(grid, seed, noised=True) for seed, grid in enumerate(((4, 4), (2, 3), (2, 2)))]
        rows = [[Sequence(segments=pair) for pair in zip(said, shown, strict=False)], [Sequence(segments=(shown[2],))]]
        batch = view(rows, model)
        media = batch.media["image"]
        states = model.port(media)
        expected = states.clone()
        for number, item in enumerate(shown):
            context = states.new_empty(0, states.shape[-1])
            if number < len(said):
                ids = torch.tensor([said[number].ids])
                context = model.backbone.model(ids, output_hidden_states=True).hidden_states[-2][0]
            place = media.item == number
            assert int(place.sum()) == len(item.tokens)
            expected[place] = denoised(model, states[place], media.time[number], context)
        for engine in (model.plain_engine(), model.reference_engine()):
            with model.using(engine):
                found = model.run_pass(batch)[1].states["image"]
            is_row = media.rows.order >= 0
            torch.testing.assert_close(found[is_row], expected[is_row], rtol=0, atol=1e-9)
        assert float((expected - states).abs().max()) > 0.1


@pytest.mark.parametrize("asked", ["grouped", "eager", "sdpa"])
@torch.no_grad()
def test_the_denoiser_computes_with_the_attention_that_is_asked_for(bases, monkeypatch, asked):
    model = make_model(bases["llama"], "conditioned denoiser")
    batch = view([[Sequence(segments=(words(4, 1), picture((4, 4), 1, noised=True)))]], model)
    expected, calls = model.run_pass(batch)[1].states["image"], []
    grouped, fused = conditioned.grouped_attention, functional.scaled_dot_product_attention
    monkeypatch.setattr(conditioned, "grouped_attention", lambda *a: calls.append("products") or grouped(*a))
    monkeypatch.setattr(
        conditioned.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append("sdpa") or fused(*a, **k)
    )
    backbone = model.backbone.working_copy(torch.float32, asked)
    with model.using(replace(model.plain_engine(), backbone=backbone)):
        run = model.run_pass(batch)[1]
    own = [call for call in calls if call != "sdpa"] if asked != "sdpa" else calls
    assert run.attention == asked and set(own) == {"sdpa" if asked == "sdpa" else "products"}
    torch.testing.assert_close(run.states["image"], expected, rtol=0, atol=1e-5)


def test_tokens_are_sorted_by_item_wherever_they_stand():
    item = torch.tensor([[-1, 2, 2, -1, 0], [0, 3, 3, 3, -1]])
    positions, is_token = positions_of_items(item, 5)  # items 1 and 4 have no token in this pass
    found = [row[kept].tolist() for row, kept in zip(positions, is_token, strict=True)]
    assert found == [[4, 5], [], [1, 2], [6, 7, 8], []]
    assert positions.shape == (5, 3) and int(positions.min()) >= 0 and int(positions.max()) < item.numel()
    assert positions_of_items(torch.full((2, 3), -1), 4)[0].shape == (4, 0)


@pytest.mark.parametrize("percentile", [0.9, 0.995])
def test_dynamic_thresholding_is_that_of_diffusers(percentile):
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=1e6)
    scale = torch.tensor([0.3, 1.5, 4.0])[:, None, None]
    x = scale * torch.randn(3, 16, 12, generator=torch.Generator().manual_seed(0))
    own = Diffusion.Config(threshold=percentile).build()
    torch.testing.assert_close(own.bounded(x), scheduler._threshold_sample(x), rtol=0, atol=1e-6)
    assert torch.equal(own.bounded(x)[0], x[0].clamp(-1, 1))  # within 1: left as it is
    wide = Diffusion.Config(threshold=percentile, largest_value=2.0).build().bounded(2 * x)
    torch.testing.assert_close(wide, 2 * own.bounded(x), rtol=0, atol=1e-6)
    assert torch.equal(Diffusion.Config().build().bounded(x), x.clamp(-1, 1))
    with pytest.raises(XFusionError, match=r"threshold 2 with largest_value 1.0: a percentile within \(0, 1\]"):
        Diffusion.Config(threshold=2.0).build()


def test_a_hundred_steps_of_the_recipe(bases, tmp_path):
    base, losses = bases["llama"], []
    before = base.compute_fingerprint()
    recipe = find("imagen(width=64, depth=2, patch=2, size=16)")()
    stage = replace(
        recipe.stages[0],
        steps=100,
        warmup=2,
        rate=3e-3,
        schedule="constant",
        ema=0,
        mixture=MixtureConfig(draw=12, caption=0),
    )
    recipe = replace(recipe, data="noise", stages=(stage,))
    model = train(
        recipe.with_model(backbone=BackboneConfig(source=base.source)),
        out=tmp_path / "run",
        source=Noise(),
        backbone=base,
        compile=False,
        dtype=torch.float32,
        preview_every=0,
        listener=lambda e: losses.append(e["losses"]["diffusion"]) if e["event"] == "step" else None,
    )
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])
    assert model.capabilities == {"text", "draw"} and model.regime == "strictly frozen"
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(model.text_logits(ids, stack="fused"), base.model(ids).logits)
    assert base.compute_fingerprint() == before
    loaded = xfusion.load(tmp_path / "run" / "pack", backbone=base)
    one, other = loaded.draw(["a tree", "red apple"], seeds=[1, 1], steps=4)
    assert one.size == (16, 16) and one.tobytes() != other.tobytes()  # the words are heard
    (alone,) = loaded.draw(["a tree"], seeds=[1], steps=4)
    assert max(high for _, high in ImageChops.difference(one, alone).getextrema()) <= 1
