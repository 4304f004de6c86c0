"""Probes: one minimal mechanism of each kind that the library does not have yet, held to the contracts of all others.

They are not products. Each is here so that a contract which cannot hold its kind breaks today: media outside the
decoder's self-attention (Flamingo), new keys inside a frozen attention (LLaMA-Adapter), media as ordinary tokens
(LLaVA), codes drawn one after the other (DALL-E, Emu3: by now the library's own, on a toy codec), and a loss over pairs of
a batch (CLIP).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from contracts.table import (
    LAYERS,
    SIDE,
    Found,
    Noise,
    corrupted,
    distance,
    exact,
    look,
    make_model,
    mixed_sequences,
    model_config,
    picture,
    randomise,
    view,
    words,
)
from contracts.test_paths import FLOAT32, FLOAT64, incremental
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import xfusion
from xfusion.backbone import Backbone
from xfusion.data.mixture import MixtureConfig
from xfusion.data.pack import pack
from xfusion.data.sequence import Media, Sequence, Text, XFusionError
from xfusion.data.templates import Templates, opened
from xfusion.fusion.base import Fusion
from xfusion.fusion.prefix import Prefix
from xfusion.generation import draw_tokens
from xfusion.layers import Delta, assembled, attention_mask, attention_path, keys_values, run_rows
from xfusion.modalities.base import Codec
from xfusion.modalities.codes import CodePort
from xfusion.modalities.image import ImageModality
from xfusion.modalities.port import MediaPort
from xfusion.model import Model, ModelConfig
from xfusion.objectives.base import NoObjective, Objective
from xfusion.objectives.codes import NextCode
from xfusion.objectives.flow_matching import FlowMatching
from xfusion.training.loop import train
from xfusion.training.stages import Recipe, Stage

# ------------------------------------------------------------------------------------------- media outside: Flamingo


class GatedCrossAttention(nn.Module):
    """``y = x + tanh(a) O attention(Q n(x), K m, V m)``, ``y + tanh(b) MLP(n(y))``, for words that read a picture."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gate, self.mlp_gate = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, media: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.key(media)), self._heads(self.value(media))

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        reads = seen.any(-1, keepdim=True)
        # A row that reads nothing has no softmax: it is given one, and then left as it was, MLP included.
        mask = (seen | ~reads)[:, None]
        read = functional.scaled_dot_product_attention(self._heads(self.query(self.norm(x))), *kv, attn_mask=mask)
        y = x + torch.tanh(self.gate) * self.out(read.transpose(1, 2).flatten(2))
        y = y + torch.tanh(self.mlp_gate) * self.mlp(self.mlp_norm(y))
        return torch.where(reads, y.to(x.dtype), x)


class CrossAttention(Fusion):
    """Flamingo: a gated cross-attention block before frozen layers; media states stay what the port made."""

    preserves_text = True
    prefix_is_constant = True
    num_towers = 2

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        stride: int = 2

        def build(self) -> CrossAttention:
            return CrossAttention(self)

    def make(self, index: int, backbone: Backbone) -> nn.Module:
        return GatedCrossAttention(backbone.hidden_size, 4)

    def layer(self, index, frozen, call, run):
        block, x = self.block(index, frozen), run.inputs(index)["text"] if "text" in run.states else None
        if block is not None:
            held = run.cache
            kvs = held.past(1, index) if held else []
            new = [block.keys_values(run.states[run.media])] if run.media else []
            if held and run.update:
                held.append(1, index, new) if new else None
            if x is not None and kvs + new:
                k, v = (torch.cat(parts, dim=2) for parts in zip(*kvs, *new, strict=True))
                x = block(x, (k, v), run.seen("text", of="media"))
        return run.states | self.words_alone(0, index, frozen, call, run, x)

    def text_layer(self, index, frozen, x, call):
        return frozen(x, **call)  # the slot of this mechanism holds media's keys and values, never words'

    def reference_layer(self, index, frozen, call, run):
        """Each word by itself over the rows that it sees; then the frozen layer over all rows, media keys hidden."""
        block, states = self.block(index, frozen), dict(run.states)
        text, rows = states["text"], run.rows["text"]
        if block is not None and run.media:
            new, media = text.clone(), run.rows[run.media]
            for b in range(text.shape[0]):
                for i in range(text.shape[1]):
                    before = (media.order[b] < rows.order[b, i]) & (media.sample[b] == rows.sample[b, i])
                    mine = before & (media.order[b] >= 0) & media.visible_to_later[b]
                    if not mine.any():
                        continue
                    x, m = text[b, i], states[run.media][b][mine]
                    q = block.query(block.norm(x)).unflatten(-1, (4, -1))
                    k, v = (p(m).unflatten(-1, (4, -1)) for p in (block.key, block.value))
                    weight = (torch.einsum("hd,mhd->hm", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
                    y = x + block.gate.tanh() * block.out(torch.einsum("hm,mhd->hd", weight, v).flatten())
                    new[b, i] = y + block.mlp_gate.tanh() * block.mlp(block.mlp_norm(y))
            states["text"] = new
        whole = torch.cat(list(states.values()), dim=1)
        seen = torch.cat([run.seen(owner) for owner in run.rows], dim=1)
        seen[..., text.shape[1] :] = False
        seen[..., 0] |= ~seen.any(-1)  # rows of media and padding, which are not kept
        mask = attention_mask(seen, run.attention, run.dtype)
        h, _ = run_rows(frozen, whole, run.calls(call)[""], mask, [], [])
        return states | {"text": run.cut(h)["text"]}


# ------------------------------------------------------------------------------------ inside attention: LLaMA-Adapter


class Prompt(nn.Module):
    """Learned prompt rows of one layer and a gate per key head."""

    def __init__(self, width: int, heads: int, count: int = 3):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(count, width))
        self.gate = nn.Parameter(torch.zeros(heads))


class Prompted(Delta):
    """A frozen attention, plus what its own queries read from a prompt; made for one pass, since rows differ."""

    def __init__(self, prompt: Prompt, acts: Tensor):
        super().__init__()
        self.prompt, self.acts = prompt, acts

    def forward(self, frozen, *args, **kwargs):
        out, *rest = frozen(*args, **kwargs)
        x, tables = kwargs["hidden_states"], kwargs["position_embeddings"]
        count = len(self.prompt.rows)
        still = {"position_embeddings": tuple(f(t[:1, :1]).expand(-1, count, -1) for f, t in zip(_STILL, tables))}  # noqa: B905
        k, v = keys_values(frozen, self.prompt.rows[None].to(x.dtype), still)
        kv = (
            k.expand(len(x), -1, -1, -1),
            (v * self.prompt.gate.tanh()[:, None, None].to(v.dtype)).expand(len(x), -1, -1, -1),
        )
        every = torch.ones(len(x), x.shape[1], count, dtype=torch.bool)
        mask = attention_mask(every, frozen.config._attn_implementation, x.dtype)
        read, _ = run_rows(frozen, x, {"position_embeddings": tables}, mask, [kv], [], splice_own=False)
        return (torch.where(self.acts, out + read, out), *rest)


_STILL = (torch.ones_like, torch.zeros_like)
"""Cosine and sine that turn nothing."""


class Naive(Prompted):
    """The equation of the paper, written out for Llama."""

    def forward(self, frozen, *args, **kwargs):
        out, *rest = frozen(*args, **kwargs)
        x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        q, k, v = (
            p(t).unflatten(-1, (-1, frozen.head_dim)).transpose(-3, -2)
            for p, t in ((frozen.q_proj, x), (frozen.k_proj, self.prompt.rows), (frozen.v_proj, self.prompt.rows))
        )
        q, _ = apply_rotary_pos_emb(q, q, cos, sin)
        read = []
        for head in range(q.shape[1]):
            group = head // frozen.num_key_value_groups
            weight = (q[:, head] @ k[group].mT / math.sqrt(frozen.head_dim)).softmax(-1)
            read.append(self.prompt.gate[group].tanh() * (weight @ v[group]))
        return (out + self.acts * frozen.o_proj(torch.cat(read, -1)), *rest)


class AdaptionPrompt(Fusion):
    """LLaMA-Adapter: gated prompts in frozen attentions, from the first media token on; media are ordinary tokens."""

    preserves_text = True
    prefix_is_constant = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        stride: int = 2

        def build(self) -> AdaptionPrompt:
            return AdaptionPrompt(self)

    @property
    def state_layers(self):
        return tuple(range(len(self.windows)))

    def make(self, index: int, backbone: Backbone) -> nn.Module:
        return Prompt(backbone.hidden_size, backbone.config.num_key_value_heads)

    def _block(self, index, frozen, run, kind):
        prompt = self.block(index, frozen)
        if prompt is None:
            return frozen
        computed = [o for o in run.states if not (o == "text" and run.given is not None)]
        if not computed:
            return frozen
        acts = torch.cat([run.after_media(owner) for owner in computed], dim=1)
        return assembled(frozen, {attention_path(frozen): kind(prompt, acts)})

    def layer(self, index, frozen, call, run):
        return run.states | self.tower(0, index, self._block(index, frozen, run, Prompted), run.states, call, run)

    def reference_layer(self, index, frozen, call, run):
        return self.whole(index, self._block(index, frozen, run, Naive), call, run)


# ------------------------------------------------------------------------------------------- as ordinary tokens: LLaVA


class Connector(MediaPort):
    """A perceptron from encoder features to the model's width; no noise level, nothing read out."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MediaPort.Config):
        hidden: int = 48

        def build(self, width, token_width, scale, num_layers):
            return Connector(self, width, token_width, scale, num_layers)

    def __init__(self, config, width, token_width, scale, num_layers):
        super().__init__(config, width, token_width, scale, num_layers)
        for unused in ("time", "norm", "head"):
            delattr(self, unused)
        self.project = nn.Sequential(
            nn.Linear(token_width, config.hidden), nn.GELU(), nn.Linear(config.hidden, width, bias=False)
        )
        nn.init.normal_(self.project[2].weight, std=scale)

    def forward(self, media):
        x = self.project(media.tokens) + self.row(media.grid_row) + self.column(media.grid_column)
        return torch.where(media.boundary[..., None], self.begin.to(x.dtype), x)

    def readout(self, hidden):
        return hidden  # only these tests look


# ---------------------------------------------------------------------------------------------- codes, one by one


LEVELS = 8
"""Codes of the toy codec: grey levels of 4 x 4 pixels."""


class Grey(Codec):
    """Pictures as one code per 4 x 4 pixels; a latent is the code's number."""

    channels, factor = 1, 4

    @dataclass(frozen=True, kw_only=True)
    class Config(Codec.Config):
        def build(self) -> Grey:
            return Grey().freeze()

    def _encode(self, images: Tensor) -> Tensor:
        grey = functional.avg_pool2d(images.mean(1, keepdim=True), 4)
        return ((grey + 1) / 2 * LEVELS).floor().clamp(0, LEVELS - 1)

    def _decode(self, latents: Tensor) -> Tensor:
        grey = (latents + 0.5) / LEVELS * 2 - 1
        return grey.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)


# ------------------------------------------------------------------------------------------------ pairs of a batch


class Contrastive(Objective):
    """InfoNCE of CLIP: ``-log softmax_j (s u_i . v_j)``, both ways, for words alone and pictures alone."""

    name = "contrastive"
    needs = ("text", "media")
    scope = "batch"
    gives = frozenset({"match"})

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        width: int = 16

        def build(self) -> Contrastive:
            return Contrastive(self)

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.weight = config, config.weight

    def install(self, width, modality):
        self.of_text = nn.Linear(width, self.config.width, bias=False)
        self.of_media = nn.Linear(width, self.config.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def count(self, batch):
        count = sum(len(media.noised) for media in batch.media.values())
        return {self.name: count} if count else {}

    def vectors(self, run, batch):
        """Of each picture and of the words of its sequence, ``[N, width]`` each, of unit length."""
        (media,) = batch.media.values()
        read = run(batch.words_alone()).states["text"]
        shown = run(batch.media_alone()).states["media"]
        pictures, sentences = [], []
        for i in range(len(media.noised)):
            row, column = (media.item == i).nonzero()[0].tolist()
            pictures.append(shown[row][media.item[row] == i].mean(0))
            mine = batch.text.sample[row] == media.rows.sample[row, column]
            sentences.append(read[row, torch.where(mine, batch.text.order[row], -1).argmax()])
        u, v = self.of_text(torch.stack(sentences)), self.of_media(torch.stack(pictures))
        return functional.normalize(u, dim=-1), functional.normalize(v, dim=-1)

    def loss(self, run, batch):
        if not batch.media:
            return {}
        u, v = self.vectors(run, batch)
        logits = self.log_scale.exp() * u @ v.T
        index = torch.arange(len(logits))
        total = (cross_entropy(logits, index, reduction="sum") + cross_entropy(logits.T, index, reduction="sum")) / 2
        return {self.name: (total, torch.tensor(len(logits)))}


# ------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Probe:
    """What a probe builds, what it learns and on what."""

    changes: dict = field(default_factory=dict)
    losses: tuple[str, ...] = ("next_token",)
    can: frozenset[str] = frozenset({"text", "caption"})
    draw: int = 0
    caption: int = 6


READ = {"port": Connector.Config(largest_grid=6), "media": NoObjective.Config()}
PROBES = {
    "cross-attention": Probe({**READ, "fusion": CrossAttention.Config()}),
    "adaption prompt": Probe({**READ, "fusion": AdaptionPrompt.Config()}),
    "prefix": Probe({**READ, "fusion": Prefix.Config()}),
    "codes": Probe(
        {
            "image": ImageModality.Config(codec=Grey.Config(), patch=1, sizes=(SIDE,), order="causal"),
            "port": CodePort.Config(largest_grid=6, entries=LEVELS),
            "fusion": Prefix.Config(),
            "media": NextCode.Config(guidance=1.0),
        },
        losses=("next_token", "next_code"),
        can=frozenset({"text", "caption", "draw"}),
        draw=6,
    ),
    "pairs": Probe(
        {"extra": (Contrastive.Config(),), "media": FlowMatching.Config(prediction="velocity")},
        losses=("next_token", "flow_matching", "contrastive"),
        can=frozenset({"text", "caption", "draw", "match"}),
        draw=6,
    ),
}
FUSED = tuple(name for name in PROBES if name != "pairs")
"""Probes with a mechanism of their own."""


def config_of(base: Backbone, name: str) -> ModelConfig:
    return replace(model_config(base), **PROBES[name].changes)


def make(base: Backbone, name: str, *, randomised: bool = True, dtype: torch.dtype | None = None) -> Model:
    base = base if dtype is None else Backbone.load(base.source, dtype=dtype)
    model = Model(config_of(base, name), base)
    if randomised:
        randomise(model)
    return (model.double() if dtype == torch.float64 else model).eval()


def coded(media: Media) -> Media:
    """A picture of codes in the place of one of patches."""
    codes = ((media.tokens.mean(-1, keepdim=True) * 8 + 1) / 2 * LEVELS).floor().clamp(0, LEVELS - 1)
    return replace(media, tokens=codes, bidirectional=False)


def sequences(name: str) -> list[Sequence]:
    found = list(mixed_sequences().values())
    if name != "codes":
        return found
    return [Sequence(segments=tuple(coded(s) if isinstance(s, Media) else s for s in q.segments)) for q in found]


def batch_of(name: str, model: Model, rows: list[list[Sequence]] | None = None):
    rows = rows or [[s] for s in sequences(name)]
    if name != "codes":
        return view(rows, model)
    return pack(rows)  # nothing is noised


def apart(one: Found, other: Found) -> float:
    """`distance`, where nothing is said of a kind that a sequence does not hold."""
    pairs = [(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True) if len(x) or len(y)]
    return max(float((x - y).abs().max()) for x, y in pairs)


def both(model: Model, batch):
    generator = torch.Generator().manual_seed(0)
    return {name: value / count for name, (value, count) in model.losses(batch, generator).items()}


# ---------------------------------------------------------------------------------------------------------- contracts


@pytest.mark.parametrize("name", PROBES)
def test_what_it_can_do_is_what_its_objectives_give(bases, name):
    model = make(bases["llama"], name)
    assert model.capabilities == PROBES[name].can
    if "draw" not in model.capabilities:
        with pytest.raises(XFusionError, match="this model cannot draw, only caption, text: train one with a media"):
            model.draw(["a tree"], steps=1)


@pytest.mark.parametrize("name", PROBES)
@torch.no_grad()
def test_text_is_bit_equal_whatever_the_new_weights_are(bases, name):
    model = make(bases["llama"], name, randomised=False)
    ids = torch.randint(3, 300, (3, 17), generator=torch.Generator().manual_seed(5))
    for _ in range(2):
        assert model.fusion.preserves_text
        assert torch.equal(model.text_logits(ids, stack="fused"), model.text_logits(ids))
        randomise(model, by=1.0)


@pytest.mark.parametrize("name", PROBES)
@torch.no_grad()
def test_words_before_media_are_the_bases_through_the_mixed_path(bases, name):
    model = make(bases["llama"], name)
    randomise(model, by=1.0)
    (text,) = (words(9, 1),)
    base = model.text_logits(torch.tensor([text.ids]))[0]
    for behind in ((), (picture((2, 3), 1, noised=True),)):
        rows = [[Sequence(segments=(text, *(coded(s) if name == "codes" else s for s in behind)))]]
        found = look(model, batch_of(name, model, rows))[0][0]
        torch.testing.assert_close(found, base, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_fast_path_is_the_reference_path(bases, name, monkeypatch):
    calls, kind = [], type(make(bases["llama"], name).fusion)
    reference = kind.reference_layer
    monkeypatch.setattr(kind, "reference_layer", lambda *a: calls.append(a[1]) or reference(*a))
    with exact(monkeypatch):
        model = make(bases["llama"], name, dtype=torch.float64)
        found = sequences(name)
        packings_ = ([[s] for s in found if len(s.segments) > 1], [found[:3], found[3:6], found[6:]])
        for rows in packings_:
            batch = batch_of(name, model, rows)
            fast = look(model, batch)
            with model.using(model.reference_engine()):
                assert distance(fast, look(model, batch)) <= FLOAT64
    assert set(calls) == set(range(LAYERS))


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_packed_is_unpacked_and_cached_in_pieces_is_one_pass(bases, name, monkeypatch):
    with exact(monkeypatch):
        model = make(bases["llama"], name, dtype=torch.float64)
        found = sequences(name)
        alone = [look(model, batch_of(name, model, [[s]]))[0] for s in found]
        packed = look(model, batch_of(name, model, [found[:3], found[3:6], found[6:]]))
        assert apart(packed, alone) <= FLOAT64
        for sequence, expected in zip(found, alone, strict=True):
            said = incremental(model, batch_of(name, model, [[sequence]]))
            assert apart(said, [expected]) <= FLOAT64


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_later_changes_nothing_before_and_earlier_does(bases, name, monkeypatch):
    with exact(monkeypatch):
        model = make(bases["llama"], name, dtype=torch.float64)
        whole = sequences(name)[3]  # pictures between words
        after = look(model, batch_of(name, model, [[whole]]))[0]
        for stop in range(1, len(whole.segments)):
            before = look(model, batch_of(name, model, [[Sequence(segments=whole.segments[:stop])]]))[0]
            for short, long in zip(before, after, strict=True):
                if len(short):
                    assert float((short - long[: len(short)]).abs().max()) <= FLOAT64, stop
        said = []
        for seed in (1, 2):
            shown = picture((2, 2), seed)
            segments = (coded(shown) if name == "codes" else shown, words(4, 2))
            said.append(look(model, batch_of(name, model, [[Sequence(segments=segments)]]))[0][0])
        assert float((said[0] - said[1]).abs().amax(-1).min()) > 1e-3  # [EOI] and every word hear of the picture


@pytest.mark.parametrize("name", PROBES)
def test_gradients_reach_every_new_weight_and_the_base_stays(bases, name):
    base = bases["llama"]
    before = base.compute_fingerprint()
    model = make(base, name)
    rows = [[s] for s in sequences(name)]
    if name == "pairs":  # a pair is a picture and words
        rows = [[s] for s in sequences(name) if len(s.segments) == 2]
        rows = [row for row in rows if any(isinstance(s, Media) for s in row[0].segments)]
    losses = both(model, batch_of(name, model, rows))
    assert set(losses) == set(PROBES[name].losses)
    sum(losses.values()).backward()
    grads = {n: 0.0 if p.grad is None else float(p.grad.abs().max()) for n, p in model.named_new_parameters().items()}
    assert [n for n, g in grads.items() if not g > 0] == []
    assert all(p.grad is None for p in base.model.parameters())
    assert base.compute_fingerprint() == before


@pytest.mark.parametrize("name", PROBES)
def test_twenty_steps_of_the_real_loop_and_a_pack(bases, name, tmp_path):
    base, probe, losses = bases["llama"], PROBES[name], []
    before = base.compute_fingerprint()
    mixture = MixtureConfig(
        draw=probe.draw,
        caption=probe.caption,
        pack=2,
        templates=Templates(caption_dropout=0, article_share=0, other_wordings=0, question_share=0),
    )
    recipe = Recipe(
        model=config_of(base, name),
        data="noise",
        stages=(Stage(steps=20, warmup=2, rate=2e-2, schedule="constant", ema=0, mixture=mixture),),
    )
    trained = train(
        recipe,
        out=tmp_path / "run",
        source=Noise(),
        backbone=base,
        compile=False,
        dtype=torch.float32,
        preview_every=60,
        listener=lambda e: losses.append(e["losses"]) if e["event"] == "step" else None,
    )
    assert len(losses) == 20 and set(losses[0]) == set(probe.losses)
    own = probe.losses[-1]  # the others are tested at length elsewhere; pictures of noise are slow to draw
    first, last = (sum(step[own] for step in part) / 4 for part in (losses[:4], losses[-4:]))
    assert last < 0.8 * first, (own, first, last)
    assert base.compute_fingerprint() == before
    assert (tmp_path / "run" / "previews").exists() == ("draw" in trained.capabilities)

    folder = tmp_path / "run" / "pack"
    with pytest.raises(XFusionError, match="which is not xfusion's: pass --trust"):
        xfusion.load(folder, backbone=base)
    loaded = xfusion.load(folder, backbone=base, trust=True)
    assert loaded.config == trained.config and loaded.fingerprint == trained.fingerprint
    batch = batch_of(name, loaded)
    with torch.no_grad():
        assert distance(look(loaded, batch), look(trained.eval(), batch)) == 0
    shown = [Noise().picture(i, SIDE) for i in range(3)]
    assert loaded.caption(shown, max_tokens=4) == trained.caption(shown, max_tokens=4)


# ------------------------------------------------------------------------------------- what each kind alone promises


@torch.no_grad()
def test_words_that_see_no_picture_are_not_touched_by_cross_attention(bases):
    """Bit for bit: before a picture, behind one that later words may not see, and with closed gates everywhere."""
    model = make(bases["llama"], "cross-attention")
    hidden = picture((2, 3), 1, later=False)

    def text(segments, model=model):
        return look(model, view([[Sequence(segments=segments)]], model))[0][0]

    first, other = (
        text((words(3, 1), replace(hidden, tokens=t), words(4, 2))) for t in (hidden.tokens, -hidden.tokens)
    )
    assert torch.equal(first, other)
    shut = make(bases["llama"], "cross-attention", randomised=False)
    seen = [text((words(3, 1), picture((2, 3), seed), words(4, 2)), shut) for seed in (1, 2)]
    assert torch.equal(*seen)
    with torch.no_grad():
        shut.fusion.blocks["1"].gate.fill_(0.5)
    opened = [text((words(3, 1), picture((2, 3), seed), words(4, 2)), shut) for seed in (1, 2)]
    assert torch.equal(opened[0][:3], seen[0][:3]) and float((opened[0] - opened[1])[3:].abs().min(-1)[0].max()) > 0


@torch.no_grad()
def test_cross_attention_keeps_media_out_of_the_frozen_slot(bases):
    model = make(bases["llama"], "cross-attention")
    batch = view([[mixed_sequences()["words around picture"]]], model)
    cache = model.backbone.new_cache(2, 1)
    model.run_pass(batch, cache=cache, update=True)
    text, media = batch.text.count, batch.media["image"].rows.count
    assert {k.shape[2] for k, _ in cache.slots[0].values()} == {text}
    assert {k.shape[2] for k, _ in cache.slots[1].values()} == {media}
    assert cache.rows.count == text + media


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_names_are_scored_behind_a_cached_picture_as_by_full_passes(bases, name):
    """Rows of a cache are chosen and repeated: what each position is goes with them."""
    model, names = make(bases["llama"], name), ["a red apple", "tree"]
    pictures = [Noise().picture(i, SIDE) for i in range(2)]
    found = model.score_names(pictures, names)
    for shown, scores in zip(pictures, found, strict=True):
        item = model.image.segment(model.image.encode([shown], SIDE)[0], (4, 4))
        for words_, score in zip(names, scores, strict=True):
            ids = (*model.backbone.encode(words_), model.backbone.end_ids[0])
            batch = pack([[Sequence(segments=(item, Text(ids=ids, has_loss=True)))]])
            total, count = model.text_objective.loss(model, batch)["next_token"]
            assert float(score) == pytest.approx(-float(total / count), abs=1e-4)
    assert float((found[0] - found[1]).abs().min()) > 1e-3


@torch.no_grad()
def test_a_prompt_acts_from_the_first_media_token_on_and_only_through_its_gate(bases):
    model = make(bases["llama"], "adaption prompt", randomised=False)
    batch = view([[mixed_sequences()["words around picture"]]], model)
    shut = look(model, batch)[0]
    for prompt in model.fusion.blocks.values():
        prompt.rows.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(look(model, batch)[0], shut, strict=True))
    for prompt in model.fusion.blocks.values():
        prompt.gate.fill_(0.5)
    opened = look(model, batch)[0]
    moved = (opened[0] - shut[0]).abs().amax(-1)
    assert float(moved[:3].max()) == 0 and float(moved[3:].min()) > 1e-3


@torch.no_grad()
def test_codes_are_drawn_one_by_one_as_full_passes_would(bases):
    """Behind words, behind nothing and behind a picture, with guidance: the cached walk against whole passes."""
    model = make(bases["llama"], "codes")
    shown = coded(picture((2, 3), 4))
    contexts, seeds, scale = [(words(5, 1),), (), (words(2, 2), shown, words(2, 3))], [3, 4, 5], 2.0
    told = []
    drawn = draw_tokens(
        model, contexts, SIDE, seeds=seeds, steps=99, guidance=scale, progress=lambda *a: told.append(a[:2])
    )
    assert told == [(i, 16) for i in range(1, 17)]
    begin = model.backbone.begin_ids
    for context, seed, found in zip(contexts, seeds, drawn, strict=True):
        share = torch.special.ndtr(torch.randn(16, 1, generator=torch.Generator().manual_seed(seed)))
        codes = torch.zeros(16, 1)
        for i in range(16):
            logits = []
            for before in (opened(begin, context), ()):
                blank = Media(tokens=codes, grid=(4, 4), state="noised", bidirectional=False)
                batch = pack([[Sequence(segments=(*before, blank))]])
                states = model.run_pass(batch)[1].states["image"]
                logits.append(model.port.readout(states)[0, -17 + i])
            probability = (logits[1] + scale * (logits[0] - logits[1])).softmax(-1)
            codes[i] = float((probability.cumsum(-1) < share[i]).sum())
        assert torch.equal(found, codes)
    assert len(drawn.unique()) > 2
    assert [p.size for p in model.draw(["a tree", ""])] == [(SIDE, SIDE)] * 2
    keep = torch.zeros(1, 16, dtype=torch.bool)
    keep[0, 3:9] = True
    kept = draw_tokens(
        model, contexts[:1], SIDE, seeds=[3], steps=1, guidance=1.0, known=torch.full((1, 16, 1), 7.0), keep=keep
    )
    assert torch.equal(kept[keep], torch.full((6, 1), 7.0)) and float(kept[~keep].min()) < 7


@torch.no_grad()
def test_looked_up_text_states_serve_media_that_go_through_frozen_layers(bases):
    model = make(bases["llama"], "codes")
    segments = (words(5, 1), coded(picture((3, 3), 1, noised=True, loss=True)))
    batch = pack([[Sequence(segments=segments)]])
    whole = model.run_pass(batch)[1].states["image"]
    given = model.run_pass(batch, given=model.given_states(batch))[1].states["image"]
    torch.testing.assert_close(given, whole, rtol=0, atol=FLOAT32)


@torch.no_grad()
def test_a_pair_is_seen_as_words_alone_and_a_clean_picture_alone(bases):
    """Views do not depend on what else stands in the sequence, on noise, on packing, or on each other's memory."""
    model = make(bases["llama"], "pairs")
    (objective,) = model.extra
    one, other = words(5, 1), words(5, 2)
    shown = picture((2, 3), 3, noised=True, loss=True)

    def vectors(rows):
        batch = corrupted(pack(rows))
        return objective.vectors(model, batch)

    base_u, base_v = vectors([[Sequence(segments=(one, shown))]])
    u, v = vectors([[Sequence(segments=(other, shown))]])
    torch.testing.assert_close(v, base_v, rtol=0, atol=1e-5)
    assert float((u - base_u).abs().max()) > 1e-2
    packed_u, packed_v = vectors([[Sequence(segments=(other, shown)), Sequence(segments=(one, shown))]])
    torch.testing.assert_close(packed_u, torch.cat([u, base_u]), rtol=0, atol=1e-5)
    torch.testing.assert_close(packed_v, torch.cat([v, base_v]), rtol=0, atol=1e-5)
    clean = pack([[Sequence(segments=(one, shown))]])
    torch.testing.assert_close(objective.vectors(model, clean)[1], base_v, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fusion", ["gated tower", "x-fuse", "dynamic"])
@torch.no_grad()
def test_words_alone_are_the_bases_though_a_picture_stood_before_them(bases, fusion):
    model = make_model(bases["llama"], fusion)
    text = words(7, 1)
    batch = pack([[Sequence(segments=(text, picture((2, 2), 1), words(2, 2)))]])
    alone = batch.words_alone()
    hidden, _ = model.run_pass(alone)
    whole, run = model.run_pass(batch)
    base = model.text_logits(torch.tensor([text.ids]))[0]
    torch.testing.assert_close(model.backbone.logits(hidden)[0, :7], base, rtol=0, atol=FLOAT32)
    ends = replace(alone, text_ids=alone.text_ids.clamp(min=0))
    plain = make_model(bases["llama"], "dual tower")
    torch.testing.assert_close(model.run_pass(ends)[0], plain.run_pass(ends)[0], rtol=0, atol=FLOAT32)
    assert float((whole[:, run.slices["text"]] - hidden)[0, 7:].abs().amax(-1).min()) > 1e-2


def test_views_that_are_made_and_dropped_are_told_apart(bases, monkeypatch):
    """Views of one step may come to lie at one address: none may be answered with another's output."""
    model, found = make(bases["llama"], "prefix"), []

    class Asks(NoObjective):
        def loss(self, run, batch):
            shape = batch.media["image"].tokens.shape
            found.extend(run(batch.with_media("image", tokens=torch.full(shape, float(k)))) for k in range(20))
            return {}

    monkeypatch.setattr(model, "forward", lambda batch: float(batch.media["image"].tokens.mean()))
    model.media_objective = Asks(NoObjective.Config())
    model.losses(pack([[Sequence(segments=(picture((2, 2), 1),))]]), torch.Generator())
    assert found == list(range(20))


def test_a_loss_over_a_batch_is_not_accumulated(bases, tmp_path):
    recipe = Recipe(model=config_of(bases["llama"], "pairs"), data="noise", stages=(Stage(steps=1, accumulate=2),))
    with pytest.raises(
        XFusionError,
        match=r"stage 0 accumulates 2 batches, but the loss contrastive compares .* set --stages.0.accumulate 1 ",
    ):
        train(recipe, out=tmp_path / "run", source=Noise(), backbone=bases["llama"], compile=False)


def test_the_value_of_a_contrastive_loss_is_its_equation(bases):
    model = make(bases["llama"], "pairs")
    (objective,) = model.extra
    rows = [[Sequence(segments=(words(3 + i, i), picture((2, 2), i, noised=True, loss=True)))] for i in range(4)]
    batch = corrupted(pack(rows))
    u, v = (x.double() for x in objective.vectors(model, batch))
    similarity = (objective.log_scale.double().exp() * u @ v.T).detach()
    expected = sum(
        -0.5 * (float(s[i, i]) - math.log(sum(math.exp(float(s[i, j])) for j in range(4))))
        for s in (similarity, similarity.T)
        for i in range(4)
    )
    total, count = objective.loss(model, batch)["contrastive"]
    assert int(count) == 4 and float(total.detach()) == pytest.approx(expected, rel=1e-5)
