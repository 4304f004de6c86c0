"""The equations of cross-attention, adaption prompts and sparse experts, written out, and the traps of public code."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from contracts.table import (
    READERS,
    SIDE,
    Noise,
    exact,
    float64_base,
    float64_model,
    look,
    make_model,
    mixed_sequences,
    model_config,
    picture,
    randomise,
    view,
    words,
)
from contracts.test_equations import NORMS, Llama, behind_layers, of_module
from contracts.test_paths import FLOAT64, piece
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from xfusion.data.mixture import Mixture, MixtureConfig
from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, Text, XFusionError
from xfusion.data.templates import Templates, captioning
from xfusion.fusion import cross_attention
from xfusion.fusion.adaption_prompt import AdaptionPrompt, Prompted
from xfusion.fusion.base import parts_from_module
from xfusion.fusion.connectors.resampler import Resampler
from xfusion.fusion.cross_attention import CrossAttention, GatedCrossAttention
from xfusion.fusion.outside import Outside
from xfusion.fusion.sparse_experts import Experts, Routed, RoutedByAll, SparseExperts
from xfusion.model import Model
from xfusion.objectives.load_balance import LoadBalance, balance

SEQUENCES = mixed_sequences()


def shaken(module: nn.Module) -> nn.Module:
    """In float64, all weights moved."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    return module


def naive_norm(x, norm):
    """Layer norm, or root mean square without a mean."""
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean()
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight + (
        norm.bias if getattr(norm, "bias", None) is not None else 0
    )


def naive_attention(q, ks, vs, heads, key_heads, width):
    """One query over some keys, head by head."""
    out = []
    for head in range(heads):
        at = slice(head // (heads // key_heads) * width, (head // (heads // key_heads) + 1) * width)
        scores = [float(q[head * width : (head + 1) * width] @ k[at]) / math.sqrt(width) for k in ks]
        total = sum(math.exp(s) for s in scores)
        out.append(sum(math.exp(s) / total * v[at] for s, v in zip(scores, vs, strict=True)))
    return torch.cat(out)


# ---------------------------------------------------------------------------------------------------- cross-attention


@pytest.mark.parametrize("name", ["flamingo", "openflamingo, all previous"])
@torch.no_grad()
def test_a_block_is_its_equation(name):
    """tanh gates, norms of words and of media, squared ReLU or GELU, head by head in float64."""
    torch.manual_seed(0)
    config = READERS[name]
    block: GatedCrossAttention = shaken(config.build().make(0, SimpleNamespace(hidden_size=20, device="cpu")))
    x, media = torch.randn(1, 4, 20).double(), torch.randn(1, 6, 20).double()
    reads = torch.tensor([[[0] * 6, [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1] * 6]]).bool()
    found = block(x, block.keys_values(media), reads)[0]
    m = [naive_norm(t, block.media_norm) if config.media_norm else t for t in media[0]]
    for i in range(4):
        y = x[0, i]
        if reads[0, i].any():
            mine = [m[j] for j in range(6) if reads[0, i, j]]
            ks, vs = ([w.weight @ t for t in mine] for w in (block.key, block.value))
            q = block.query.weight @ naive_norm(y, block.norm)
            read = naive_attention(q, ks, vs, config.heads, config.heads, config.head_width)
            y = y + math.tanh(float(block.gate)) * (block.out.weight @ read)
            inner = block.mlp[0].weight @ naive_norm(y, block.mlp_norm)
            inner = inner.clamp(min=0) ** 2 if config.activation == "squared relu" else functional.gelu(inner)
            y = y + math.tanh(float(block.mlp_gate)) * (block.mlp[2].weight @ inner)
        assert float((found[i] - y).abs().max()) <= FLOAT64


@torch.no_grad()
def test_the_resampler_is_its_equation():
    torch.manual_seed(0)
    config = Resampler.Config(latents=3, depth=2, heads=2, head_width=5, mlp=2, activation="squared relu")
    resampler = shaken(config.build(12))
    x = torch.randn(7, 12).double()
    z = list(resampler.latents)
    for attention, mlp in zip(resampler.attentions, resampler.mlps, strict=True):
        normed = [naive_norm(t, attention.latent_norm) for t in z]
        both = [naive_norm(t, attention.media_norm) for t in x] + normed
        ks, vs = ([w.weight @ t for t in both] for w in (attention.key, attention.value))
        read = [naive_attention(attention.query.weight @ t, ks, vs, 2, 2, 5) for t in normed]
        z = [t + attention.out.weight @ r for t, r in zip(z, read, strict=True)]
        inner = [(mlp[1].weight @ naive_norm(t, mlp[0])).clamp(min=0) ** 2 for t in z]
        z = [t + mlp[3].weight @ i for t, i in zip(z, inner, strict=True)]
    expected = torch.stack([naive_norm(t, resampler.norm) for t in z])
    found = resampler(x[None], torch.ones(1, 7, dtype=torch.bool))[0]
    assert float((found - expected).abs().max()) <= FLOAT64
    # Any order of tokens is the same medium; latents in another order come out in that order.
    order = torch.randperm(7)
    assert float((resampler(x[order][None], torch.ones(1, 7, dtype=torch.bool))[0] - expected).abs().max()) <= FLOAT64
    resampler.latents.copy_(resampler.latents.flip(0))
    assert float((resampler(x[None], torch.ones(1, 7, dtype=torch.bool))[0] - expected.flip(0)).abs().max()) <= FLOAT64


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        # words, picture of 3 x 3, four words behind [EOI], picture of 2 x 2, and what follows it
        ("immediate", [set()] * 2 + [{"a"}] * 5 + [{"b"}] * 6),
        ("all previous", [set()] * 2 + [{"a"}] * 5 + [{"a", "b"}] * 6),
        ("none", [{"a", "b"}] * 13),
    ],
)
def test_which_pictures_a_word_reads(bases, mask, expected):
    config = replace(READERS["flamingo"], mask=mask)
    model = Model(replace(model_config(bases["llama"], "flamingo"), fusion=config), bases["llama"]).eval()
    batch, seen = view([[SEQUENCES["pictures between words"]]], model), []
    real = Outside.reads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outside, "reads", lambda *a: seen.append(real(*a)) or seen[-1])
        with torch.no_grad():
            fast = look(model, batch)
            with model.using(model.reference_engine()):
                torch.testing.assert_close(fast[0][0], look(model, batch)[0][0], rtol=0, atol=1e-4)
    item = batch.media["image"].item[0]
    found = [{"ab"[int(i)] for i in item[row]} for row in seen[0][0]]
    assert found == expected
    assert {int(row.sum()) for row in seen[0][0]} <= {0, 3, 6}  # three latents each, and no [BOI]


def test_blocks_need_not_divide_the_depth(bases):
    assert make_model(bases["llama"], "flamingo").fusion.state_layers == (0, 3)
    model = make_model(bases["llama"], "openflamingo, all previous")
    assert model.fusion.state_layers == (1, 3)


@torch.no_grad()
def test_the_published_block_changes_text_once_it_is_trained_and_ours_does_not(bases):
    """Its MLP acts on words that see no picture: equal before training, another model behind it."""
    ids = torch.tensor([words(9, 1).ids])
    for name, keeps in (("cross-attention, published", False), ("openflamingo, all previous", True)):
        model = make_model(bases["llama"], name, randomised=False)
        assert model.fusion.preserves_text == model.fusion.prefix_is_constant == keeps
        assert torch.equal(model.text_logits(ids, stack="fused"), model.text_logits(ids))
        randomise(model, by=0.5)
        assert torch.equal(model.text_logits(ids, stack="fused"), model.text_logits(ids)) == keeps


@torch.no_grad()
def test_words_before_all_pictures_read_none_in_every_mode(bases, monkeypatch):
    """The public code masks a row without a picture wholly, and its softmax then reads all, later ones too."""
    model = make_model(bases["llama"], "openflamingo, all previous")
    randomise(model, by=0.5)

    def first_words():
        a, b = (look(model, view([[Sequence(segments=(words(3, 1), picture((2, 3), s)))]], model)) for s in (1, 2))
        return torch.equal(a[0][0][:3], b[0][0][:3])

    assert first_words()
    real = Outside.reads
    monkeypatch.setattr(Outside, "reads", lambda *a: (found := real(*a)) | ~found.any(-1, keepdim=True))
    assert not first_words()


def behind_cached_pictures(model, batch):
    """Logits of the words of one row, where all pictures are read first and then the words one by one in their places."""
    cache, logits = model.backbone.new_cache(model.fusion.num_towers, 1), []
    nothing = {"text_ids": batch.text_ids[:, :0], "labels": batch.labels[:, :0]}
    model.run_pass(replace(batch, text=batch.text.columns(slice(0, 0)), **nothing), cache=cache, update=True)
    for at in sorted(int(order) for order in batch.text.order[0]):
        one = replace(piece(batch, at, at + 1), media={})
        logits.append(model.backbone.logits(model.run_pass(one, cache=cache, update=True)[0])[0])
    return torch.cat(logits)


@pytest.mark.parametrize("fusion", READERS)
@torch.no_grad()
def test_a_word_behind_cached_pictures_reads_those_before_it(bases, fusion, monkeypatch):
    """The public code takes every word that is decoded behind a cache to stand after the last medium."""
    names = ("words around picture", "pictures between words", "noised copy beside clean one")
    with exact(monkeypatch):
        model = float64_model(bases["llama"], fusion)
        randomise(model, by=0.3)
        batches = [view([[SEQUENCES[name]]], model) for name in names]

        def apart():
            found = [behind_cached_pictures(model, batch) - look(model, batch)[0][0] for batch in batches]
            return [float(difference.abs().max()) for difference in found]

        assert max(apart()) <= FLOAT64
        real = Outside.reads

        def trapped(self, run):
            if run.cache is None or "text" not in run.rows:
                return real(self, run)
            text = run.rows["text"]
            behind = replace(text, order=torch.where(text.order >= 0, 1 << 20, -1))
            return real(self, replace(run, rows=run.rows | {"text": behind}))

        monkeypatch.setattr(Outside, "reads", trapped)
        assert min(apart()) > 1e-2


@pytest.mark.parametrize(
    "name", [name for name, config in READERS.items() if isinstance(config, CrossAttention.Config)]
)
@torch.no_grad()
def test_a_block_behind_closed_gates_gives_back_its_input_bit_for_bit(name):
    torch.manual_seed(0)
    block = GatedCrossAttention(READERS[name], 16)
    x, media = torch.randn(2, 3, 16), torch.randn(2, 4, 16)
    reads = torch.rand(2, 3, 4) < 0.5
    assert torch.equal(block(x, block.keys_values(media), reads), x)
    for gate in (block.gate, block.mlp_gate):  # each lets something through
        gate.fill_(0.5)
        assert not torch.equal(block(x, block.keys_values(media), reads), x)
        gate.zero_()


def test_gates_move_before_what_they_gate():
    """While a gate is closed nothing behind it has a gradient: it opens first, and all else learns from the second step on."""
    torch.manual_seed(0)
    block = GatedCrossAttention(READERS["flamingo"], 16)
    x, media = torch.randn(1, 3, 16), torch.randn(1, 4, 16)

    def reached():
        block.zero_grad()
        block(x, block.keys_values(media), torch.ones(1, 3, 4).bool()).square().sum().backward()
        return {name for name, p in block.named_parameters() if p.grad.abs().max() > 0}

    assert reached() == {"gate", "mlp_gate"}
    torch.optim.SGD(block.parameters(), lr=1e-2).step()
    assert reached() == {name for name, _ in block.named_parameters()}


@pytest.mark.parametrize("name", ["flamingo", "openflamingo, all previous"])
@torch.no_grad()
def test_a_path_that_ignores_the_mask_is_noticed(bases, name, monkeypatch):
    """Otter's fast path reads all media whatever the mask says: words then hear of a picture that stands behind them."""
    model = make_model(bases["llama"], name)
    randomise(model, by=0.5)

    def before_the_second(seed):
        """Logits of two words, of [EOI] and of four words, behind which the second picture stands."""
        segments = (words(2, 1), picture((2, 3), 1), words(4, 2), picture((2, 3), seed), words(3, 3))
        return look(model, view([[Sequence(segments=segments)]], model))[0][0][:7]

    assert torch.equal(before_the_second(2), before_the_second(3))
    read = functional.scaled_dot_product_attention
    careless = SimpleNamespace(scaled_dot_product_attention=lambda q, k, v, attn_mask, **more: read(q, k, v, **more))
    monkeypatch.setattr(cross_attention, "functional", careless)
    one, other = before_the_second(2), before_the_second(3)
    assert torch.equal(one[:2], other[:2])  # words that see no picture throw away what they read
    assert float((one - other)[2:].abs().amax(-1).min()) > 1e-3


# ---------------------------------------------------------------------------------------------------- adaption prompts


class Naive(Prompted):
    """The equation for Llama: a softmax of its own, a gate per head, no positions of the prompt."""

    def forward(self, frozen, *args, **kwargs):
        out, *rest = frozen(*args, **kwargs)
        x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        q = frozen.q_proj(x).unflatten(-1, (-1, frozen.head_dim)).transpose(1, 2)
        q, _ = apply_rotary_pos_emb(q, q, cos, sin)
        k, v = self.kv
        gate, out = self.gated.o_proj.delta.gate, out.clone()
        for b, i in self.media_mask.any(-1).nonzero().tolist():
            heads = []
            for head in range(q.shape[1]):
                group, mine = head // frozen.num_key_value_groups, self.media_mask[b, i]
                weight = (k[b, group][mine] @ q[b, head, i] / math.sqrt(frozen.head_dim)).softmax(-1)
                heads.append(gate[head].tanh() * (weight @ v[b, group][mine]))
            out[b, i] += frozen.o_proj.weight @ torch.cat(heads)
        return (out, *rest)


@torch.no_grad()
def test_a_prompt_is_its_equation(bases, monkeypatch):
    with exact(monkeypatch):
        model = float64_model(bases["llama"], "llama-adapter")
        batch = view([[s] for s in SEQUENCES.values()], model)
        found = look(model, batch)
        made = []
        real = AdaptionPrompt._prompts
        monkeypatch.setattr(AdaptionPrompt, "_prompts", lambda *a: made.append((a, real(*a))) or made[-1][1])
        monkeypatch.setattr("xfusion.fusion.adaption_prompt.Prompted", Naive)
        for one, other in zip(found, look(model, batch), strict=True):
            if len(one[0]):
                assert float((one[0] - other[0]).abs().max()) <= FLOAT64
        # Keys are W_k (P_l + I) of the frozen matrix: learned rows and the picture's one vector, at the first tokens.
        (_, index, frozen, states, _, run), (k, _) = made[0]
        media, prompt = run.media_rows["image"], model.fusion.blocks[str(index)].rows
        for item in range(len(media.noised)):
            b, columns = (media.item == item).any(1).nonzero()[0, 0], (media.item == item).nonzero()[:, 1]
            own = states["image"][b, columns[:3]]
            assert float((own - own[:1]).abs().max()) == 0
            expected = frozen.self_attn.k_proj(prompt + own).unflatten(-1, (-1, frozen.self_attn.head_dim))
            assert float((k[b, :, columns[:3]].transpose(0, 1) - expected).abs().max()) <= FLOAT64


class Tuned:
    """A matrix with a scale and a bias: ``s (W x + b)``."""

    def __init__(self, matrix, part):
        self.matrix, self.scale, self.bias = matrix, *(p.detach().numpy() for p in (part.scale, part.bias))

    def __matmul__(self, x):
        return self.scale * (self.matrix @ x + self.bias)


def read_heads(q, pairs, llama):
    """What one query ``[H, K]`` reads from keys and values ``[keys, K]``, head by head in a softmax of their own."""
    out = []
    for head in range(llama.heads):
        group = head * llama.keys // llama.heads
        score = np.exp([k[group] @ q[head] / math.sqrt(llama.width) for k, _ in pairs])
        out.append(sum(s / score.sum() * v[group] for s, (_, v) in zip(score, pairs, strict=True)))
    return np.stack(out)


def tuned_layer(llama, x, positions, frozen, tuned, prompt, gates, first):
    """Version 2 word by word: from the word ``first`` on words have the tuned parts and read the prompt."""
    own = [tuned if i >= first else frozen for i in range(len(x))]
    made = [llama.key_value(w, h, p) for w, h, p in zip(own, x, positions, strict=True)]
    key, value = (frozen[f"self_attn.{name}_proj"] for name in "kv")
    rows = [tuple((matrix @ row).reshape(llama.keys, -1) for matrix in (key, value)) for row in prompt]
    out = []
    for i, (w, h, position) in enumerate(zip(own, x, positions, strict=True)):
        q = llama.turn((w["self_attn.q_proj"] @ llama.norm(h, w[NORMS[0]])).reshape(llama.heads, -1), position)
        read = read_heads(q, made[: i + 1], llama)
        if i >= first:
            read = read + np.tanh(gates)[:, None] * read_heads(q, rows, llama)
        y = h + w["self_attn.o_proj"] @ read.flatten()
        n = llama.norm(y, w[NORMS[1]])
        gate = w["mlp.gate_proj"] @ n
        out.append(y + w["mlp.down_proj"] @ (gate / (1 + np.exp(-gate)) * (w["mlp.up_proj"] @ n)))
    return out


@pytest.mark.parametrize("fusion", ["early", "released"])
@torch.no_grad()
def test_a_tuned_layer_is_its_equation(bases, fusion, monkeypatch):
    """Version 2 as a whole, behind every layer: scale, bias and norms from the picture on, a gate per head on a prompt whose keys
    and values are the frozen matrices', and queries, own keys and the output of tuned ones.
    """
    config = READERS["llama-adapter 2"]
    config = config if fusion == "early" else replace(config, picture="added")
    base = float64_base(bases["llama"])
    model = Model(replace(model_config(base, "llama-adapter 2"), fusion=config), base)
    randomise(model, by=0.3)
    model, sequence = model.double().eval(), SEQUENCES["words around picture"]
    batch, llama = view([[sequence]], model), Llama(base.config)
    ids, first = batch.text_ids[0].tolist(), len(sequence.segments[0].ids)
    assert batch.text.order[0].diff().min() > 0 and ids[first] < 0  # words, [EOI], words
    table = base.model.get_input_embeddings().weight
    x = [(model.port.end if i < 0 else table[i]).numpy() for i in ids]
    with exact(monkeypatch):
        patches = model.port(batch.media["image"])[:, 1:]  # without [BOI]
        shown = model.fusion.connect(patches, torch.ones(patches.shape[:2], dtype=torch.bool))[0].numpy()
        found = {}
        for engine in (model.plain_engine(), model.reference_engine()):
            with model.using(engine):
                found[engine.reason] = behind_layers(model, batch)
        for index, layer in enumerate(base.layers):
            frozen, own = of_module(layer), model.fusion.blocks[str(index)]
            assert (own.rows is None) == (fusion == "early" and index < 2)
            learned = None if own.rows is None else own.rows.numpy()
            prompt = shown if learned is None else learned if fusion == "early" else learned + shown
            parts = parts_from_module(own.tuned)
            assert set(parts) == set(frozen)
            tuned = {p: t.weight.numpy() if p in NORMS else Tuned(frozen[p], t) for p, t in parts.items()}
            x = tuned_layer(llama, x, batch.text.position[0].tolist(), frozen, tuned, prompt, own.gate.numpy(), first)
            for states in found.values():
                assert float((states[index]["text"][0] - torch.tensor(np.stack(x))).abs().max()) <= FLOAT64, index


@torch.no_grad()
def test_early_pictures_and_learned_prompts_are_not_mixed_and_tuned_parts_are_copies(bases):
    model = make_model(bases["llama"], "llama-adapter 2", randomised=False)
    assert [model.fusion.blocks[str(i)].rows is None for i in range(4)] == [True, True, False, False]
    layer = model.backbone.layers[0]
    tuned = model.fusion.blocks["0"].tuned
    assert set(tuned) == {p.replace(".", "/") for p, m in layer.named_modules() if isinstance(m, nn.Linear)} | {
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert tuned["input_layernorm"].weight.data_ptr() != layer.input_layernorm.weight.data_ptr()
    affine = tuned["mlp/up_proj"]
    affine.scale.fill_(2.0)
    affine.bias.fill_(0.5)
    x = torch.randn(1, 3, layer.mlp.up_proj.in_features)
    torch.testing.assert_close(affine(layer.mlp.up_proj, x), 2 * (layer.mlp.up_proj(x) + 0.5))


@pytest.mark.parametrize("fusion", ["early", "released"])
@torch.no_grad()
def test_which_rows_a_layers_prompt_is_made_of(bases, fusion, monkeypatch):
    """The paper of version 2 never mixes picture and learned rows, its code adds them; both by the frozen W_k and W_v."""
    config = READERS["llama-adapter 2"]
    config = config if fusion == "early" else replace(config, picture="added")
    model = Model(replace(model_config(bases["llama"], "llama-adapter 2"), fusion=config), bases["llama"]).eval()
    randomise(model)
    made = []
    real = AdaptionPrompt._prompts
    monkeypatch.setattr(AdaptionPrompt, "_prompts", lambda *a: made.append((a, real(*a))) or made[-1][1])
    look(model, view([[SEQUENCES["words around picture"]]], model))
    assert [a[1] for a, _ in made] == [0, 1, 2, 3]
    for (_, index, frozen, states, _, run), kv in made:
        columns = (run.media_rows["image"].item[0] == 0).nonzero()[:3, 0]
        shown, learned = states["image"][0, columns], model.fusion.blocks[str(index)].rows
        rows = shown if learned is None else learned if fusion == "early" else learned + shown
        assert (learned is None) == (fusion == "early" and index < 2)
        assert float((shown[0] - shown[1]).abs().max()) > 1e-2  # a row of the picture for each of the prompt
        for found, matrix in zip(kv, (frozen.self_attn.k_proj, frozen.self_attn.v_proj), strict=True):
            expected = matrix(rows).unflatten(-1, (-1, frozen.self_attn.head_dim))
            torch.testing.assert_close(found[0, :, columns].transpose(0, 1), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ sparse experts


def experts(count: int, active: int, *, frozen_expert: bool, width: int = 10) -> tuple[Experts, nn.Module]:
    torch.manual_seed(0)
    config = SparseExperts.Config(experts=count, active=active, frozen_expert=frozen_expert)
    made = [
        nn.Sequential(nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, width)) for _ in range(count + 1 - frozen_expert)
    ]
    return Experts(config, width, made[1:]).double(), made[0].double()


@pytest.mark.parametrize("frozen_expert", [True, False])
@torch.no_grad()
def test_experts_are_their_equation(frozen_expert):
    made, frozen = experts(4, 2, frozen_expert=frozen_expert)
    x, acts = torch.randn(2, 9, 10).double(), torch.rand(2, 9) < 0.7
    seen = []
    found = Routed(made, acts, seen)(frozen, x)
    every = [frozen, *made.experts] if frozen_expert else list(made.experts)
    for b in range(2):
        for i in range(9):
            expected = frozen(x[b, i])
            if acts[b, i]:
                scores = [math.exp(float(w @ x[b, i])) for w in made.router.weight]
                best = sorted(range(4), key=lambda e: -scores[e])[:2]
                expected = sum(scores[e] / sum(scores[j] for j in best) * every[e](x[b, i]) for e in best)
            assert float((found[b, i] - expected).abs().max()) <= FLOAT64
    assert float((RoutedByAll(made, acts, seen)(frozen, x) - found).abs().max()) <= FLOAT64
    assert torch.equal(seen[0], seen[1]) and seen[0].shape == (int(acts.sum()), 4)


@pytest.mark.parametrize("frozen_expert", [True, False])
@torch.no_grad()
def test_a_row_goes_through_two_mlps_where_it_is_routed_and_through_one_elsewhere(frozen_expert):
    """2 x 3 d f per routed token: what the router does not choose is not computed, nor the frozen MLP in its place."""
    made, frozen = experts(4, 2, frozen_expert=frozen_expert)
    x, seen = torch.randn(2, 9, 10).double(), []
    every = dict.fromkeys([frozen, *made.experts])
    for module in every:
        module.register_forward_hook(lambda module, args, _: seen.append((module, args[0])))
    for routed in (torch.rand(2, 9) < 0.7, torch.ones(2, 9).bool(), torch.zeros(2, 9).bool()):
        seen.clear()
        Routed(made, routed, [])(frozen, x)
        rows = {module: sum(given.shape[:-1].numel() for m, given in seen if m is module) for module in every}
        count, chosen = int(routed.sum()), int((made.weights(x[routed])[1][:, 0] > 0).sum())
        assert sum(rows.values()) == 2 * count + (18 - count)
        assert rows[frozen] == 18 - count + frozen_expert * chosen
    # Words alone go through the frozen MLP as in the base.
    assert [given is x for m, given in seen if m is frozen and given.numel()] == [True]


@torch.no_grad()
def test_autocast_rounds_no_score_of_a_router():
    """Two experts may stand closer than bfloat16 can tell: the choice must not depend on the precision of the pass."""
    made, _ = experts(4, 2, frozen_expert=True)
    x = torch.randn(50, 10)
    exact = made.float().weights(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = made.weights(x)
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


@torch.no_grad()
def test_copied_experts_are_the_mlp_and_balance_is_one_when_even():
    made, frozen = experts(3, 2, frozen_expert=True)
    for expert in made.experts:
        expert.load_state_dict(frozen.state_dict())
    x = torch.randn(2, 9, 10).double()
    torch.testing.assert_close(Routed(made, torch.ones(2, 9).bool(), [])(frozen, x), frozen(x), rtol=0, atol=1e-12)
    even = torch.eye(4).repeat(3, 1) * 0.4 + 0.15
    assert float(balance(even)) == pytest.approx(1.0)
    assert float(balance(torch.eye(4)[:1].expand(8, -1))) == pytest.approx(4.0)


def test_the_balance_loss_sums_over_layers_and_moves_routers_alone(bases):
    config = replace(model_config(bases["llama"], "sparse experts"), extra=(LoadBalance.Config(),))
    model = Model(config, bases["llama"])
    randomise(model)
    batch = view([[s] for s in SEQUENCES.values()], model)
    states = model(batch).states
    assert set(states) == {"router.0", "router.2"}
    routed = int(batch.text.after_media.sum() + (batch.media["image"].item >= 0).sum())
    assert {tuple(p.shape) for p in states.values()} == {(routed, 3)}
    (objective,) = model.extra
    total, count = objective.loss(model, batch)["load_balance"]
    assert int(count) == 1 and objective.count(batch) == {"load_balance": 1}
    assert float(total.detach()) == pytest.approx(sum(float(balance(p.detach())) for p in states.values()))
    total.backward()
    assert all(model.fusion.blocks[i].router.weight.grad.abs().max() > 0 for i in "02")
    words_ = view([[SEQUENCES["words alone"]]], model)
    assert objective.loss(model, words_) == {} == objective.count(words_)
    plain = make_model(bases["llama"])
    with pytest.raises(XFusionError, match="load_balance: no layer has a router"):
        objective.loss(plain, batch)


@torch.no_grad()
def test_the_papers_form_routes_text_too_and_ours_keeps_it(bases):
    ids = torch.tensor([words(9, 1).ids])
    for name, keeps in (("sparse experts", True), ("sparse experts, of the paper", False)):
        model = make_model(bases["llama"], name)
        assert torch.equal(model.text_logits(ids, stack="fused"), model.text_logits(ids)) == keeps
        assert len(model.fusion.blocks["0"].experts) == 3 - keeps


# ------------------------------------------------------------------------------------- where the base's sequence opens


def test_the_beginning_of_text_stands_before_a_picture_that_opens_a_sequence(bases):
    """In training, in answers and in scores alike, where the picture is no position of the base."""
    base = bases["llama"]
    config = model_config(base, "flamingo")
    model = Model(replace(config, image=replace(config.image, behind_begin=True)), base).eval()
    randomise(model, by=0.3)
    shown = [Noise().picture(i, SIDE) for i in range(2)]
    begin = base.begin_ids
    plain = {"question_share": 0.0, "article_share": 0.0}
    mixture = MixtureConfig(draw=0, caption=2, pack=1, templates=Templates(**plain))
    (batch,) = Mixture(Noise(), model.image, (SIDE,), base.encode, begin, base.end_ids[0], mixture, 0).batches(0)
    assert batch.text_ids[:, 0].tolist() == [begin[0]] * 2 and not batch.text.after_media[:, 0].any()
    with torch.no_grad():
        scores = model.score_names(shown, ["a red apple", "tree"])
        blind = model.score_names(None, ["tree"])[0, 0]
        for picture_, row in zip(shown, scores, strict=True):
            media = model.image.segment(model.image.encode([picture_], SIDE)[0], (4, 4))
            found = pack([[captioning(base.encode, base.end_ids[0], media, "tree", begin=begin)]])
            total, count = model.text_objective.loss(model, found)["next_token"]
            assert float(row[1]) == pytest.approx(-float(total / count), abs=1e-4)
            assert abs(float(row[1] - blind)) > 1e-4
        media = model.image.segment(model.image.encode(shown[:1], SIDE)[0], (4, 4))
        logits = look(model, pack([[Sequence(segments=(Text(ids=begin), media, Text(ids=())))]]))[0][0]
        first = base.decode([int(logits[-1].argmax())]).strip()
    assert model.caption(shown[:1], max_tokens=1) == [first]


# ------------------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CrossAttention.Config(heads=6, key_heads=4), "6 heads of 64, 4 for keys.*that the key heads divide"),
        (CrossAttention.Config(mlp=0), "MLP 0: take positive sizes"),
        (CrossAttention.Config(stride=9), "stride 9, offset 4 puts no block into 4 layers"),
        (CrossAttention.Config(connector=Resampler.Config(depth=0)), "resampler: latents, depth.*take at least 1 each"),
        (AdaptionPrompt.Config(prompts=0), "1 rows of a picture for prompts of 0"),
        (AdaptionPrompt.Config(prompts=4, connector=Resampler.Config(latents=3)), "3 rows.*prompts of 4.*or 1"),
        (AdaptionPrompt.Config(prompts=4, picture="early"), "1 rows.*prompts of 4: take as many$"),
        (AdaptionPrompt.Config(connector=None), "0 rows of a picture"),
        (SparseExperts.Config(experts=2, active=3), "3 of 2: take at least 2 experts"),
        (SparseExperts.Config(experts=1, active=1), "1 of 1: take at least 2 experts"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_one_line(bases, config, message):
    with pytest.raises(XFusionError, match=message) as error:
        Model(replace(model_config(bases["llama"]), fusion=config), bases["llama"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 220


def test_a_picture_of_fewer_tokens_than_rows_is_refused(bases):
    model = make_model(bases["llama"], "flamingo")
    with pytest.raises(XFusionError, match="a medium has 2 tokens, fewer than the 3 rows that the connector makes"):
        look(model, view([[Sequence(segments=(picture((1, 2), 1), words(3, 1)))]], model))
