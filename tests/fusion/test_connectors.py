"""Connectors: equal to transformers' where it has them, to their equations where it has not, and to the port's contract."""

import math
from dataclasses import replace

import pytest
import torch
from contracts.table import (
    LAYERS,
    PATCH,
    SIDE,
    Noise,
    exact,
    float64_base,
    look,
    mixed_sequences,
    model_config,
    picture,
    randomise,
    share_left,
    trained,
    twenty_steps,
    view,
    words,
)
from contracts.test_paths import FLOAT32, FLOAT64, incremental
from contracts.test_probes import apart
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    CLIPVisionConfig,
    InstructBlipQFormerConfig,
    LlamaConfig,
    LlavaConfig,
    LxmertConfig,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
)
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.lxmert.modeling_lxmert import LxmertLayer, LxmertVisualFeatureEncoder
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioMultiModalProjector

import xfusion
from xfusion.data.mixture import MixtureConfig
from xfusion.data.pack import pack
from xfusion.data.sequence import Media, Sequence, XFusionError
from xfusion.data.templates import Templates
from xfusion.fusion.connectors.frame_transformer import FrameTransformer
from xfusion.fusion.connectors.linear import Linear
from xfusion.fusion.connectors.mlp import MLP
from xfusion.fusion.connectors.object_encoder import ObjectEncoder
from xfusion.fusion.connectors.pooling import Pooling
from xfusion.fusion.connectors.positional_resampler import PositionalResampler, sincos_positions
from xfusion.fusion.connectors.prefix_mapper import PrefixMapper
from xfusion.fusion.connectors.query_transformer import Queries, QueryTransformer, attention_pattern
from xfusion.fusion.prefix import Prefix
from xfusion.model import Model
from xfusion.objectives.base import NoObjective
from xfusion.objectives.next_token import NextToken
from xfusion.training.stages import Recipe

PARITY = 1e-5
SMALL = {"query_width": 16, "heads": 2, "depth": 3, "mlp": 24}
CONNECTORS = {
    "linear": Linear.Config(),
    "mlp": MLP.Config(),
    "pooling": Pooling.Config(cells=PATCH * PATCH),
    "queries": Queries.Config(queries=16, cells=PATCH * PATCH, **SMALL),
    "positional resampler": PositionalResampler.Config(queries=16, cells=PATCH * PATCH, map=(16, 16), heads=2),
    "frame transformer": FrameTransformer.Config(cells=PATCH * PATCH, inner_width=16, heads=2, mlp=24),
    "object encoder": ObjectEncoder.Config(inner_width=16, heads=2, mlp=24),
    "prefix mapper": PrefixMapper.Config(rows=16, cells=PATCH * PATCH, heads=2, depth=1, mlp=1),
}
"""Of tokens that hold 4 x 4 features of 3 numbers; items have up to 16 rows."""


def make(base, name, *, randomised=True, exactly=False):
    base = float64_base(base) if exactly else base
    text = NextToken.Config(weight=1.0)
    config = replace(model_config(base, "prefix"), port=CONNECTORS[name], media=NoObjective.Config(), text=text)
    model = Model(config, base)
    if randomised:
        randomise(model)
    return (model.double() if exactly else model).eval()


def read_only(name):
    """Every way in which words and pictures stand together, with pictures to read alone; of one size where a connector has places
    of one map.
    """

    def shown(s, number):
        s = picture((4, 4), number) if name == "positional resampler" else s
        return replace(s, state="clean", has_loss=False)

    return [
        Sequence(segments=tuple(shown(s, i) if isinstance(s, Media) else s for i, s in enumerate(q)))
        for q in (sequence.segments for sequence in mixed_sequences().values())
    ]


def shown(features, grid, **how):
    """Rows of one item with these features ``[K, cells, F]`` as tokens, channels first."""
    tokens = features.transpose(1, 2).flatten(1)
    return pack([[Sequence(segments=(Media(tokens=tokens, grid=grid, **how),))]]).media["image"]


# ------------------------------------------------------------------------------------------------------------- parity


@torch.no_grad()
def test_a_perceptron_is_llavas_projector():
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    text = {**sizes, "hidden_size": 20, "vocab_size": 9}
    config = LlavaConfig(vision_config=CLIPVisionConfig(**sizes), text_config=LlamaConfig(**text))
    torch.manual_seed(0)
    theirs = LlavaMultiModalProjector(config)
    own = MLP.Config().build(20, 12, 0.1, 1)
    own.into.load_state_dict(theirs.linear_1.state_dict())
    own.out.load_state_dict(theirs.linear_2.state_dict())
    features = torch.randn(6, 1, 12)
    found = own(shown(features, (2, 3)))
    torch.testing.assert_close(found[0, 1:], theirs(features[:, 0]), rtol=0, atol=PARITY)
    assert torch.equal(found[0, 0], own.begin)


@torch.no_grad()
def test_pooled_frames_are_qwen_audios_pooling_and_projector():
    audio = Qwen2AudioEncoderConfig(d_model=12, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=8)
    text = {"model_type": "qwen2", "hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    torch.manual_seed(0)
    theirs = Qwen2AudioMultiModalProjector(Qwen2AudioConfig(audio_config=audio, text_config=text))
    own = Pooling.Config(cells=2).build(20, 24, 0.1, 1)
    own.project.load_state_dict(theirs.linear.state_dict())
    frames = torch.randn(10, 12)
    expected = theirs(nn.AvgPool1d(2, stride=2)(frames.T).T)  # as Qwen2AudioEncoder pools
    found = own(shown(frames.unflatten(0, (5, 2)), (5, 1)))
    torch.testing.assert_close(found[0, 1:], expected, rtol=0, atol=PARITY)


@torch.no_grad()
def test_an_object_encoder_is_lxmerts():
    """Its features and boxes, and its object-relationship layers; 1 to 7 regions of two pictures are there."""
    torch.manual_seed(0)
    config = LxmertConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=24, visual_feat_dim=10, visual_pos_dim=4
    )
    enters, layers = perturbed(LxmertVisualFeatureEncoder(config)), [perturbed(LxmertLayer(config)) for _ in range(2)]
    own = ObjectEncoder.Config(inner_width=16, heads=2, depth=2, mlp=24).build(20, 10, 0.1, 1).eval()
    for ours, theirs in (("into", "visn_fc"), ("norm", "visn_layer_norm")):
        getattr(own, ours).load_state_dict(getattr(enters, theirs).state_dict())
        getattr(own, f"box_{ours}").load_state_dict(getattr(enters, theirs.replace("visn", "box")).state_dict())
    for ours, theirs in zip(own.layers, layers, strict=True):
        parts = [getattr(theirs.attention.self, name) for name in ("query", "key", "value")]
        ours.self_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        ours.self_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        ours.self_attn.out_proj.load_state_dict(theirs.attention.output.dense.state_dict())
        ours.norm1.load_state_dict(theirs.attention.output.LayerNorm.state_dict())
        ours.linear1.load_state_dict(theirs.intermediate.dense.state_dict())
        ours.linear2.load_state_dict(theirs.output.dense.state_dict())
        ours.norm2.load_state_dict(theirs.output.LayerNorm.state_dict())
    features, places = torch.randn(2, 7, 10), torch.rand(2, 7, 4)
    there = torch.arange(7) < torch.tensor([[7], [1]])
    expected = enters(features, places)
    for layer in layers:
        (expected,) = layer(expected, torch.where(there, 0.0, -1e9)[:, None, None])
    for train in (False, True):  # attention has a kernel of its own for each
        found = own.train(train).read(features, places, there)
        torch.testing.assert_close(found[there], expected[there], rtol=0, atol=PARITY)


QFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "encoder_hidden_size": 10,
    "cross_attention_frequency": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def copied(own, theirs):
    """The weights of transformers' Q-Former in ours."""

    def attention(to, source, output):
        parts = [getattr(source, name) for name in ("query", "key", "value")]
        if to.in_proj_weight is None:
            for name, part in zip("qkv", parts, strict=True):
                getattr(to, f"{name}_proj_weight").copy_(part.weight)
        else:
            to.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        to.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        to.out_proj.load_state_dict(output.dense.state_dict())

    def mlp(to, norm, into, out):
        to[0].load_state_dict(into.dense.state_dict())
        to[2].load_state_dict(out.dense.state_dict())
        norm.load_state_dict(out.LayerNorm.state_dict())

    own.norm.load_state_dict(theirs.layernorm.state_dict())
    for block, layer in zip(own.blocks, theirs.encoder.layer, strict=True):
        attention(block.attention, layer.attention.attention, layer.attention.output)
        block.norm.load_state_dict(layer.attention.output.LayerNorm.state_dict())
        assert block.has_cross_attention == layer.has_cross_attention
        if block.has_cross_attention:
            attention(block.cross, layer.crossattention.attention, layer.crossattention.output)
            block.cross_norm.load_state_dict(layer.crossattention.output.LayerNorm.state_dict())
        mlp(block.query_mlp, block.query_norm, layer.intermediate_query, layer.output_query)
        if hasattr(block, "word_mlp"):
            mlp(block.word_mlp, block.word_norm, layer.intermediate, layer.output)
    return own


def query_transformer(words_too):
    return QueryTransformer(queries=5, width=16, heads=2, layers=4, mlp=24, feature_width=10, words=words_too)


def perturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


@torch.no_grad()
def test_queries_are_blip2s_query_transformer():
    torch.manual_seed(0)
    theirs = perturbed(Blip2QFormerModel(Blip2QFormerConfig(**QFORMER, use_qformer_text_input=False)))
    own = copied(query_transformer(False), theirs)
    features, there = torch.randn(3, 7, 10), torch.rand(3, 7) > 0.3
    queries = own.queries.expand(3, -1, -1)
    expected = theirs(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
    torch.testing.assert_close(own(features), expected, rtol=0, atol=PARITY)
    masked = theirs(query_embeds=queries, encoder_hidden_states=features, encoder_attention_mask=there.long())
    torch.testing.assert_close(own(features, there), masked.last_hidden_state, rtol=0, atol=PARITY)


@pytest.mark.parametrize("kind", ["apart", "causal", "together"])
@torch.no_grad()
def test_queries_beside_words_are_blip2s_under_each_of_the_three_masks(kind):
    torch.manual_seed(0)
    theirs = perturbed(Blip2QFormerModel(Blip2QFormerConfig(**QFORMER, use_qformer_text_input=True)))
    own = copied(query_transformer(True), theirs)
    features, read = torch.randn(2, 7, 10), torch.randn(2, 4, 16)
    seen = attention_pattern(kind, 5, 4)
    both = torch.cat([own.queries.expand(2, -1, -1), read], dim=1)
    # A ready 4-D mask is taken as it is: added to the scores.
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None].expand(2, 1, -1, -1)
    expected = theirs(query_embeds=both, query_length=5, attention_mask=added, encoder_hidden_states=features)
    torch.testing.assert_close(own(features, words=read, visible=seen), expected.last_hidden_state, rtol=0, atol=PARITY)


@torch.no_grad()
def test_queries_beside_an_instruction_are_instructblips():
    torch.manual_seed(0)
    theirs = perturbed(InstructBlipQFormerModel(InstructBlipQFormerConfig(**QFORMER, vocab_size=20)))
    own = query_transformer(True)
    own.norm.load_state_dict(theirs.embeddings.layernorm.state_dict())
    theirs.layernorm = theirs.embeddings.layernorm
    copied(own, theirs)
    ids, features = torch.randint(0, 20, (2, 4)), torch.randn(2, 7, 10)
    mask = torch.ones(2, 9, dtype=torch.long)
    expected = theirs(
        input_ids=ids,
        attention_mask=mask,
        query_embeds=own.queries.expand(2, -1, -1),
        encoder_hidden_states=features,
    ).last_hidden_state
    table = theirs.embeddings
    read = table.word_embeddings(ids) + table.position_embeddings(torch.arange(4))
    torch.testing.assert_close(own(features, words=read), expected, rtol=0, atol=PARITY)


def test_the_three_masks_written_out():
    """Two queries, three words: rows see columns."""
    apart = [[1, 1, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 1]] * 3
    causal = [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    for kind, rows in {"apart": apart, "causal": causal, "together": [[1] * 5] * 5}.items():
        assert torch.equal(attention_pattern(kind, 2, 3), torch.tensor(rows).bool()), kind


@torch.no_grad()
def test_under_each_mask_who_must_not_be_seen_changes_nothing():
    torch.manual_seed(0)
    own = perturbed(query_transformer(True))
    features, read = torch.randn(1, 7, 10), torch.randn(1, 4, 16)
    changed = read.clone()
    changed[:, 2, 0] += 1.0
    moved = {}
    for kind in ("apart", "causal", "together"):
        one, other = (own(features, words=w, visible=attention_pattern(kind, 5, 4)) for w in (read, changed))
        moved[kind] = ((one - other)[0].abs().amax(-1) > 1e-6).tolist()
    assert moved == {
        "apart": [False] * 5 + [True] * 4,
        "causal": [False] * 5 + [False, False, True, True],
        "together": [True] * 9,
    }


# ---------------------------------------------------------------------------------------------------------- equations


@torch.no_grad()
def test_a_positional_resampler_is_its_equation_in_float64():
    torch.manual_seed(0)
    config = PositionalResampler.Config(queries=6, map=(4, 6), cells=4, heads=3)
    own = config.build(24, 4 * 5, 0.1, 1).double()
    own.key_places, own.query_places = own.key_places.double(), own.query_places.double()
    for parameter in own.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    features = torch.randn(6, 4, 5)  # six strips of four features
    media = shown(features, (6, 1))
    found = own(replace(media, tokens=media.tokens.double()))[0, 1:]

    def place(row, column):
        out = []
        for at in (row, column):
            angles = [at / 10_000 ** (i / 6) for i in range(6)]
            out += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        return torch.tensor(out, dtype=torch.float64)

    def normed(x, norm):
        x = x - x.mean()
        return x / (x.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias

    flat = features.double().flatten(0, 1)
    values = [normed(own.project.weight @ z, own.key_norm) for z in flat]
    keys = [v + place(i // 6, i % 6) for i, v in enumerate(values)]
    matrix, bias = own.attention.in_proj_weight, own.attention.in_proj_bias
    for number in range(6):  # queries lie on a grid of 2 x 3, over the map of 4 x 6
        query = normed(own.queries[number], own.query_norm) + place(number // 3 * 2.0, number % 3 * 2.0)
        heads = []
        for h in range(3):
            part = slice(8 * h, 8 * h + 8)
            q, ks, vs = (
                [matrix[o : o + 24][part] @ x + bias[o : o + 24][part] for x in xs]
                for o, xs in ((0, [query]), (24, keys), (48, values))
            )
            weight = torch.stack([q[0] @ k / math.sqrt(8) for k in ks]).softmax(0)
            heads.append(sum(w * v for w, v in zip(weight, vs, strict=True)))
        expected = own.attention.out_proj(torch.cat(heads))
        torch.testing.assert_close(found[number], expected, rtol=0, atol=1e-6)  # places are float32


def normed(x, norm):
    x = x - x.mean()
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def attended(rows, queries, keys, values, heads):
    """Naive attention of all rows to all, by matrices with biases."""
    q, k, v = ([matrix @ x + bias for x in rows] for matrix, bias in (queries, keys, values))
    size, out = len(q[0]) // heads, []
    for one in q:
        read = []
        for part in (slice(h * size, (h + 1) * size) for h in range(heads)):
            weight = torch.stack([one[part] @ other[part] / math.sqrt(size) for other in k]).softmax(0)
            read.append(sum(w * value[part] for w, value in zip(weight, v, strict=True)))
        out.append(torch.cat(read))
    return out


@torch.no_grad()
def test_a_frame_transformer_is_its_equation_in_float64():
    torch.manual_seed(0)
    config = FrameTransformer.Config(cells=3, inner_width=8, heads=2, depth=2, mlp=12)
    own = config.build(10, 3 * 5, 0.1, 1).double().eval()
    for parameter in own.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    features = torch.randn(4, 3, 5)  # four strips of three features, of which the first is kept
    media = shown(features, (4, 1))
    found = own(replace(media, tokens=media.tokens.double()))[0, 1:]
    x = [own.into.weight @ z + own.into.bias for z in features[:, 0].double()]
    for layer in own.layers:
        matrix, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
        parts = [(matrix[o : o + 8], bias[o : o + 8]) for o in (0, 8, 16)]
        read = attended([normed(row, layer.norm1) for row in x], *parts, 2)
        x = [row + layer.self_attn.out_proj(r) for row, r in zip(x, read, strict=True)]
        gelu = torch.nn.functional.gelu
        x = [row + layer.linear2(gelu(layer.linear1(normed(row, layer.norm2)))) for row in x]
    expected = torch.stack([own.project(normed(row, own.norm)) for row in x])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_an_object_encoder_is_its_equation_in_float64():
    """Boxes enter before the layers, so that each place hears where the others lie, and not behind them."""
    torch.manual_seed(0)
    own = ObjectEncoder.Config(inner_width=8, heads=2, depth=2, mlp=12).build(10, 5, 0.1, 1).double().eval()
    for parameter in own.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    pictures = {grid: torch.randn(grid[0] * grid[1], 5).double() for grid in ((2, 3), (1, 4), (3, 1))}

    def behind_layers(x):
        for layer in own.layers:
            matrix, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
            parts = [(matrix[o : o + 8], bias[o : o + 8]) for o in (0, 8, 16)]
            read = attended(x, *parts, 2)
            x = [normed(row + layer.self_attn.out_proj(r), layer.norm1) for row, r in zip(x, read, strict=True)]
            gelu = torch.nn.functional.gelu
            x = [normed(row + layer.linear2(gelu(layer.linear1(row))), layer.norm2) for row in x]
        return torch.stack(x)

    expected, trapped = [], []
    for (tall, wide), features in pictures.items():
        seen = [normed(own.into.weight @ f + own.into.bias, own.norm) for f in features]
        boxes = [(c / wide, r / tall, (c + 1) / wide, (r + 1) / tall) for r in range(tall) for c in range(wide)]
        at = [normed(own.box_into.weight @ torch.tensor(b).double() + own.box_into.bias, own.box_norm) for b in boxes]
        expected.append(own.project(behind_layers([(f + p) / 2 for f, p in zip(seen, at, strict=True)])))
        trapped.append(own.project((behind_layers(seen) + torch.stack(at)) / 2))
    items = [Sequence(segments=(Media(tokens=t, grid=grid),)) for grid, t in pictures.items()]
    media = pack([[items[0], items[1]], [items[2]]]).media["image"]  # of several grids, in one row and in two
    found = own(replace(media, tokens=media.tokens.double()))
    for number, (one, other) in enumerate(zip(expected, trapped, strict=True)):
        mine = found[media.item == number]
        torch.testing.assert_close(mine, one, rtol=0, atol=1e-6)  # boxes are float32
        assert float((mine - other).abs().max()) > 1e-2


@torch.no_grad()
def test_a_prefix_mapper_is_its_equation_in_float64():
    torch.manual_seed(0)
    own = PrefixMapper.Config(rows=3, cells=2, heads=2, depth=2, mlp=2).build(8, 2 * 5, 0.1, 1).double()
    for parameter in own.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    features = torch.randn(3, 2, 5)
    media = shown(features, (3, 1))
    found = own(replace(media, tokens=media.tokens.double()))[0, 1:]
    mean = features.double().flatten(0, 1).mean(0)
    into = own.into.weight @ (mean / mean.square().sum().sqrt()) + own.into.bias
    x, none = [*into.view(3, 8), *own.constants], torch.zeros(8, dtype=torch.float64)
    for layer in own.layers:
        parts = [(part.weight, none) for part in (layer.query, layer.key, layer.value)]
        read = attended([normed(row, layer.norm) for row in x], *parts, 2)
        x = [row + layer.out(r) for row, r in zip(x, read, strict=True)]
        x = [row + layer.mlp[2](layer.mlp[0](normed(row, layer.mlp_norm)).clamp(min=0)) for row in x]
    torch.testing.assert_close(found, own.gain * torch.stack(x[3:]), rtol=0, atol=1e-10)


def test_places_tell_rows_from_columns_and_queries_lie_over_the_map():
    found = sincos_positions(4, 6, 24).view(4, 6, 24)
    assert torch.equal(found[2, 0, :12], found[2, 5, :12]) and torch.equal(found[0, 3, 12:], found[3, 3, 12:])
    assert torch.equal(sincos_positions(2, 3, 24, (4, 6)), found[::2, ::2].flatten(0, 1))
    assert len(found.flatten(0, 1).unique(dim=0)) == 24
    with pytest.raises(XFusionError, match="a width that is a multiple of 4, not 22"):
        sincos_positions(2, 2, 22)


@torch.no_grad()
def test_queries_read_all_features_of_their_own_item_and_no_others(bases):
    """Whatever else the batch holds: items of other sizes, other rows, words between."""
    for name in ("queries", "positional resampler", "prefix mapper"):
        port = make(bases["llama"], name).port
        one, other = picture((4, 4) if name == "positional resampler" else (2, 3), 1), picture((4, 4), 2)
        alone = port(pack([[Sequence(segments=(one,))]]).media["image"])
        both = pack([[Sequence(segments=(words(3, 1), other, words(2, 2), one))], [Sequence(segments=(other,))]])
        media = both.media["image"]
        found = port(media)
        torch.testing.assert_close(found[0][media.item[0] == 1], alone[0, 1:], rtol=0, atol=1e-6)
        torch.testing.assert_close(found[1][media.item[1] == 2], found[0][media.item[0] == 0], rtol=0, atol=1e-6)
        tokens = one.tokens.clone()
        tokens[-1, -1] += 1.0  # the last number of the last feature moves every query
        changed = port(pack([[Sequence(segments=(replace(one, tokens=tokens),))]]).media["image"])
        assert float((changed - alone)[0, 1:].abs().amax(-1).min()) > 1e-6


def test_sizes_that_do_not_fit_are_refused_in_one_line(bases):
    with pytest.raises(XFusionError, match="tokens of 10 numbers do not hold 3 features: set cells to"):
        Linear.Config(cells=3).build(8, 10, 0.1, 1)
    with pytest.raises(XFusionError, match="width 10 is not a multiple of its 4 heads"):
        Queries.Config(query_width=10).build(8, 12, 0.1, 1)
    with pytest.raises(XFusionError, match="object encoder: width 10 is not a multiple of its 4 heads"):
        ObjectEncoder.Config(inner_width=10).build(8, 12, 0.1, 1)
    with pytest.raises(XFusionError, match="object encoder: a token is one place, not 3: set cells to 1"):
        ObjectEncoder.Config(cells=3).build(8, 12, 0.1, 1)
    port = make(bases["llama"], "queries").port
    media = pack([[Sequence(segments=(picture((5, 5), 1),))]]).media["image"]
    with pytest.raises(XFusionError, match="an item has 25 rows, but the connector makes 16 states"):
        port(media)
    port = make(bases["llama"], "positional resampler").port
    for grid in ((2, 3), (3, 4), (5, 5)):  # fewer features would stand at the places of others
        media = pack([[Sequence(segments=(picture((4, 4), 1), words(2, 1), picture(grid, 2)))]]).media["image"]
        count = 16 * grid[0] * grid[1]
        with pytest.raises(
            XFusionError, match=rf"an item has {count} features, the map \(16, 16\) has 256 places: set map"
        ):
            port(media)
    with pytest.raises(XFusionError, match="stride 2, offset None, layers None, but it has no blocks to place"):
        Prefix.Config(stride=2).build()


# ---------------------------------------------------------------------------------------------------------- contracts


@pytest.mark.parametrize("name", CONNECTORS)
@torch.no_grad()
def test_text_is_bit_equal_whatever_the_connector_holds(bases, name):
    model = make(bases["llama"], name, randomised=False)
    ids = torch.randint(3, 300, (3, 17), generator=torch.Generator().manual_seed(5))
    for _ in range(2):
        assert torch.equal(model.text_logits(ids, stack="fused"), model.text_logits(ids))
        randomise(model, by=1.0)


@pytest.mark.parametrize("name", CONNECTORS)
@torch.no_grad()
def test_whole_packed_and_in_pieces_say_the_same(bases, name, monkeypatch):
    with exact(monkeypatch):
        model = make(bases["llama"], name, exactly=True)
        alone = [look(model, view([[s]], model))[0] for s in read_only(name)]
        for rows in ([read_only(name)], [read_only(name)[:3], read_only(name)[3:]]):
            assert apart(look(model, view(rows, model)), alone) <= FLOAT64
        with model.using(model.reference_engine()):
            assert apart(look(model, view([read_only(name)], model)), alone) <= FLOAT64
        for sequence, expected in zip(read_only(name), alone, strict=True):
            assert apart(incremental(model, view([[sequence]], model)), [expected]) <= FLOAT64


@torch.no_grad()
def test_a_prefix_is_what_the_base_makes_of_embeddings_in_its_place(bases):
    """The whole mechanism, by the base alone: connector output between embedded words, one causal forward pass."""
    model = make(bases["llama"], "mlp")
    before, behind, item = words(4, 1), words(5, 2), replace(picture((2, 3), 3), bidirectional=False)
    batch = pack([[Sequence(segments=(before, item, behind))]])
    states = model.port(batch.media["image"])[0]
    embed = model.backbone.model.get_input_embeddings()
    parts = (embed(torch.tensor(before.ids)), states, model.port.end[None], embed(torch.tensor(behind.ids)))
    expected = model.backbone.model(inputs_embeds=torch.cat(parts)[None]).logits[0]
    found = look(model, batch)[0][0]
    torch.testing.assert_close(found[:4], expected[:4], rtol=0, atol=FLOAT32)
    torch.testing.assert_close(found[4:], expected[4 + 7 :], rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("name", CONNECTORS)
def test_gradients_reach_every_weight_and_the_base_stays(bases, name):
    base = bases["llama"]
    before = base.compute_fingerprint()
    model = make(base, name)
    found = model.losses(view([[s] for s in read_only(name)], model), torch.Generator())
    assert set(found) == {"next_token"}
    found["next_token"][0].backward()
    grads = {n: 0.0 if p.grad is None else float(p.grad.abs().max()) for n, p in model.named_new_parameters().items()}
    assert [n for n, g in grads.items() if not g > 0] == []
    assert all(p.grad is None for p in base.model.parameters()) and base.compute_fingerprint() == before


@pytest.mark.parametrize("name", CONNECTORS)
def test_twenty_steps_of_the_real_loop_text_bit_equal_and_a_pack(bases, name, tmp_path):
    base = bases["llama"]
    stage = twenty_steps(MixtureConfig(draw=0, caption=6, pack=2, templates=Templates(question_share=0)), rate=1e-2)
    model, losses = trained(
        Recipe(model=make(base, name).config, data="noise", stages=(stage,)), base, tmp_path / "run"
    )
    assert share_left(losses, "next_token") < 0.8
    assert model.capabilities == {"text", "caption"}
    loaded = xfusion.load(tmp_path / "run" / "pack", backbone=base)
    assert loaded.config == model.config and loaded.fingerprint == model.fingerprint
    pictures = [Noise().picture(i, SIDE) for i in range(3)]
    assert loaded.caption(pictures, max_tokens=4) == model.caption(pictures, max_tokens=4)
    assert len(model.fusion.state_layers) == LAYERS


@pytest.mark.parametrize("name", CONNECTORS)
def test_a_connector_runs_without_values_for_what_it_would_cost(bases, name):
    port = make(bases["llama"], name).port
    media = pack([[Sequence(segments=(words(3, 1), picture((4, 4), 2)))]]).media["image"]
    found = port.to("meta")(replace(media.to("meta"), rows=media.rows.to("meta")))
    assert found.is_meta and found.shape == port.to("meta")(media.to("meta")).shape == (1, 17, 64)
