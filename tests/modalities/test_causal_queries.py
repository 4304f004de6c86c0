"""SEED's tokenizer: each code knows only those before it; a folder is a codec."""

import json

import pytest
import torch
from diffusers import AutoencoderKL

from xfusion.data.sequence import XFusionError
from xfusion.modalities.codecs.causal_queries import CausalQueries, Shape


@pytest.fixture
def codec(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=3,
    ).save_pretrained(tmp_path / "kl")
    shape = Shape(base=str(tmp_path / "kl"), size=16, side=2, entries=9, code_width=5, width=16, layers=3, heads=2)
    return CausalQueries(shape)


def images(count=2):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_a_query_sees_the_picture_and_the_queries_before_it(codec):
    tokenizer, features = codec.tokenizer.double(), codec.features(images()).double()
    before = tokenizer.encode(features).flatten(2)
    for query in range(4):
        moved = tokenizer.queries[query].clone()
        tokenizer.queries[query] += torch.randn(16)  # a constant would be lost in the norm
        change = (tokenizer.encode(features).flatten(2) - before).abs().amax((0, 1))
        tokenizer.queries[query] = moved
        assert float(change[:query].sum()) == 0
        assert float(change[query:].min()) > 1e-6, "it and all behind it hear of it"
    other = tokenizer.encode(codec.features(images().flip(0)).double()).flatten(2)
    assert float((other - before).abs().amax((0, 1)).min()) > 1e-6


def attended(attention, x, y, causal=False):
    """Rows of x read rows of y, head by head; with ``causal`` each only those up to its own."""
    size = attention.embed_dim // attention.num_heads
    matrices, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (z @ w.T + b for z, w, b in zip((x, y, y), matrices, biases, strict=True))
    heads = []
    for at in (slice(h * size, (h + 1) * size) for h in range(attention.num_heads)):
        scores = q[:, at] @ k[:, at].T / size**0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, at])
    return torch.cat(heads, -1) @ attention.out_proj.weight.T + attention.out_proj.bias


def perceptron(layer, x):
    return layer.linear2(torch.nn.functional.gelu(layer.linear1(x)))


@torch.no_grad()
def test_the_tokenizer_is_its_equation_in_float64(codec):
    """Causal queries that read the features in every second layer, Linear-Tanh-Linear, and ordinals on the way back."""
    tokenizer, features = codec.tokenizer.double().eval(), codec.features(images(1)).double()
    for parameter in tokenizer.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64))
    shown = features[0] @ tokenizer.read.weight.T + tokenizer.read.bias + tokenizer.places
    x, reads = tokenizer.queries, []
    for layer in tokenizer.encoder:
        x = x + attended(layer.self_attn, layer.norm1(x), layer.norm1(x), causal=True)
        reads.append(hasattr(layer, "multihead_attn"))
        if reads[-1]:
            x = x + attended(layer.multihead_attn, layer.norm2(x), shown)
        x = x + perceptron(layer, (layer.norm3 if reads[-1] else layer.norm2)(x))
    assert reads == [True, False, True]
    down, up = tokenizer.down, tokenizer.up
    z = down[2](torch.tanh(down[0](tokenizer.norm(x))))
    torch.testing.assert_close(tokenizer.encode(features)[0].flatten(1).T, z, rtol=0, atol=1e-10)
    x = torch.cat([up[2](torch.tanh(up[0](z))) + tokenizer.ordinals, tokenizer.asked])
    for layer in tokenizer.decoder:
        x = x + attended(layer.self_attn, layer.norm1(x), layer.norm1(x))
        x = x + perceptron(layer, layer.norm2(x))
    expected = tokenizer.said(tokenizer.last_norm(x[4:]))
    vectors = z.T.unflatten(-1, (2, 2))[None]
    torch.testing.assert_close(tokenizer.decode(vectors)[0], expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_codes_are_the_nearest_entries_of_the_table(codec):
    codes = codec.encode(images())
    z = codec.tokenizer.encode(codec.features(images())).movedim(1, -1)
    for n, i, j in ((0, 0, 0), (0, 1, 0), (1, 0, 1)):
        distance = (codec.tokenizer.table.double() - z[n, i, j].double()).square().sum(-1)
        assert int(codes[n, 0, i, j]) == int(distance.argmin())
    assert (codec.channels, codec.entries, codec.factor) == (1, 9, 8) and codes.shape == (2, 1, 2, 2)


@torch.no_grad()
def test_what_is_saved_is_loaded_and_errors_are_lines(codec, tmp_path):
    codec.save(tmp_path / "seed")
    loaded = CausalQueries.Config(source=str(tmp_path / "seed"), licence="mine").build()
    half = {name: value.half().float() for name, value in codec.tokenizer.state_dict().items()}
    codec.tokenizer.load_state_dict(half)
    assert torch.equal(loaded.encode(images()), codec.encode(images())) and loaded.licence == "mine"
    assert torch.equal(loaded.decode(loaded.encode(images())), codec.decode(codec.encode(images())))
    assert loaded.decode(loaded.encode(images())).shape == (2, 3, 16, 16)
    assert not loaded.train().training and not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(XFusionError, match="of 32x32 pixels: this codec knows 16 pixels alone"):
        loaded.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(XFusionError, match="are not 2 x 2 codes"):
        loaded.decode(torch.zeros(1, 1, 4, 4))
    with pytest.raises(XFusionError, match="9 is none of the codec's codes, 0 to 8"):
        loaded.decode(torch.full((1, 1, 2, 2), 9.0))
    config = json.loads((tmp_path / "seed" / "config.json").read_text())
    (tmp_path / "seed" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "side"}))
    with pytest.raises(XFusionError, match="config.json lacks side: take an intact copy"):
        CausalQueries.Config(source=str(tmp_path / "seed")).build()
    (tmp_path / "seed" / "config.json").write_text(json.dumps(config | {"entries": 10}))
    with pytest.raises(XFusionError, match="does not fit CausalQueries"):
        CausalQueries.Config(source=str(tmp_path / "seed")).build()
