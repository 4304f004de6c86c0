"""Probes: one minimal mechanism of each kind that the library does not have in that form, held to the contracts of all
others.

They are not products. Each is here so that a contract which cannot hold its kind breaks: media as ordinary tokens behind a
port that is a perceptron (LLaVA), and codes drawn one after the other on a toy codec (DALL-E, Emu3).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from contracts.table import (
    LAYERS,
    SIDE,
    Found,
    Noise,
    distance,
    exact,
    look,
    make_model,
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
from torch import Tensor, nn
from torch.nn import functional

import xfusion
from xfusion.backbone import Backbone
from xfusion.data.mixture import MixtureConfig
from xfusion.data.pack import pack
from xfusion.data.sequence import Media, Sequence, Text, XFusionError
from xfusion.data.templates import Templates, with_begin
from xfusion.fusion.prefix import Prefix
from xfusion.generation import draw_tokens
from xfusion.modalities.base import Codec
from xfusion.modalities.codes import CodePort
from xfusion.modalities.image import ImageModality
from xfusion.modalities.port import MediaPort
from xfusion.model import Model, ModelConfig
from xfusion.objectives.base import NoObjective
from xfusion.objectives.codes import NextCode
from xfusion.training.stages import Recipe

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
}


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


@pytest.mark.parametrize("name", PROBES)
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


@pytest.mark.parametrize("name", PROBES)
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


@pytest.mark.parametrize("name", PROBES)
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
    losses = both(model, batch_of(name, model, rows))
    assert set(losses) == set(PROBES[name].losses)
    sum(losses.values()).backward()
    grads = {n: 0.0 if p.grad is None else float(p.grad.abs().max()) for n, p in model.named_new_parameters().items()}
    assert [n for n, g in grads.items() if not g > 0] == []
    assert all(p.grad is None for p in base.model.parameters())
    assert base.compute_fingerprint() == before


@pytest.mark.parametrize("name", PROBES)
def test_twenty_steps_of_the_real_loop_and_a_pack(bases, name, tmp_path):
    base, probe = bases["llama"], PROBES[name]
    templates = Templates(caption_dropout=0, article_share=0, other_wordings=0, question_share=0)
    stage = twenty_steps(MixtureConfig(draw=probe.draw, caption=probe.caption, pack=2, templates=templates))
    recipe = Recipe(model=config_of(base, name), data="noise", stages=(stage,))
    model, losses = trained(recipe, base, tmp_path / "run", preview_every=60)
    assert set(losses[0]) == set(probe.losses)
    own = probe.losses[-1]  # the others are tested at length elsewhere; pictures of noise are slow to draw
    assert share_left(losses, own) < 0.8, losses
    assert (tmp_path / "run" / "previews").exists() == ("draw" in model.capabilities)

    folder = tmp_path / "run" / "pack"
    with pytest.raises(XFusionError, match="which is not xfusion's: pass --trust"):
        xfusion.load(folder, backbone=base)
    loaded = xfusion.load(folder, backbone=base, trust=True)
    assert loaded.config == model.config and loaded.fingerprint == model.fingerprint
    batch = batch_of(name, loaded)
    with torch.no_grad():
        assert distance(look(loaded, batch), look(model.eval(), batch)) == 0
    shown = [Noise().picture(i, SIDE) for i in range(3)]
    assert loaded.caption(shown, max_tokens=4) == model.caption(shown, max_tokens=4)


# ------------------------------------------------------------------------------------- what each kind alone promises


@pytest.mark.parametrize("name", PROBES)
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
            for before in (with_begin(begin, context), ()):
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
    given = model.run_pass(batch, cached_text=model.cached_text_states(batch))[1].states["image"]
    torch.testing.assert_close(given, whole, rtol=0, atol=FLOAT32)


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
