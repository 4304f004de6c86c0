"""Contracts of models that read pictures and do not draw: media stand outside the decoder's self-attention."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from contracts.table import (
    LAYERS,
    READER_ROWS,
    READERS,
    SIDE,
    Found,
    Noise,
    distance,
    exact,
    float64_model,
    look,
    make_model,
    mixed_sequences,
    model_config,
    on_every_family,
    picture,
    randomise,
    share_left,
    trained,
    twenty_steps,
    view,
    words,
)
from contracts.test_paths import FLOAT32, FLOAT64, MIXED, incremental, packings
from contracts.test_text import state_of, text_batches

import xfusion
import xfusion.fusion.base as fusion_base
from xfusion.backbone import Backbone
from xfusion.comparison.cost import flops_of_shape
from xfusion.data.mixture import MixtureConfig
from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, Text, XFusionError
from xfusion.data.templates import Templates
from xfusion.fusion.outside import Outside
from xfusion.model import BackboneConfig, Model, compiled_graphs
from xfusion.training.stages import Recipe

SEQUENCES = mixed_sequences()
KEPT = [row for row in READER_ROWS if READERS[str(row.values[0])].build().preserves_text]
"""The rows whose fusion keeps text."""
UNREAD = {"port.norm.weight", "port.head.weight", "port.head.bias", "port.begin"}
"""The port's head, which a model that does not draw never asks, and [BOI], which no word reads."""
EACH = [
    pytest.param(name, marks=() if name in ("flamingo", "llama-adapter 2") else pytest.mark.full) for name in READERS
]
"""Each mechanism once in the default tier, with all its settings in the full one."""


def said(model, *segments):
    """Logits of the words of a sequence."""
    return look(model, view([[Sequence(segments=segments)]], model))[0][0]


def apart(one: Found, other: Found) -> float:
    """Largest difference of what is said about words."""
    pairs = [(a[0], b[0]) for a, b in zip(one, other, strict=True) if len(a[0])]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("fusion", ["idefics", "llama-adapter"])
def test_who_reads_what_is_laid_out_once_a_pass(bases, fusion, monkeypatch):
    """Not at every layer: it is a table of all words and media, and a walk over what the cache holds."""
    model, laid = make_model(bases["llama"], fusion), []
    table = Outside._media_mask
    monkeypatch.setattr(Outside, "_media_mask", lambda self, run: laid.append(run) or table(self, run))
    model.run_pass(view([[s] for s in SEQUENCES.values()], model))
    assert len(model.fusion.blocks) > 1 and len(laid) == 1
    model.caption([Noise().picture(0, SIDE)], max_tokens=3)
    assert len(laid) == len({id(run) for run in laid})


@pytest.mark.parametrize(("fusion", "family"), READER_ROWS)
@torch.no_grad()
def test_fast_path_is_the_reference_path(bases, fusion, family, monkeypatch):
    calls = []
    with exact(monkeypatch):
        model = float64_model(bases[family], fusion)
        kind, reference = type(model.fusion), type(model.fusion).reference_layer
        monkeypatch.setattr(kind, "reference_layer", lambda *a: calls.append(a[1]) or reference(*a))
        for name in ("one to a row", "packed"):  # the reference path goes word by word
            batch = view(packings()[name][0], model)
            fast = look(model, batch)
            with model.using(model.reference_engine()):
                assert apart(fast, look(model, batch)) <= FLOAT64, name
    assert set(calls) == set(range(LAYERS))


@pytest.mark.parametrize(("fusion", "family"), READER_ROWS)
def test_gradients_of_fast_and_reference_path_agree(bases, fusion, family, monkeypatch):
    with exact(monkeypatch):
        model = float64_model(bases[family], fusion)
        batch, grads = view(packings()["packed"][0], model), []
        for engine in (model.engine, model.reference_engine()):
            model.zero_grad()
            with model.using(engine):
                out = model(batch)
                model.text_objective.loss(lambda _, out=out: out, batch)["next_token"][0].backward()
            grads.append({n: p.grad for n, p in model.named_new_parameters().items() if n not in UNREAD})
        for name, grad in grads[0].items():
            torch.testing.assert_close(grad, grads[1][name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("fusion", "family"), READER_ROWS)
@torch.no_grad()
def test_packed_is_unpacked_and_cached_in_pieces_is_one_pass(bases, fusion, family, monkeypatch):
    with exact(monkeypatch):
        model = float64_model(bases[family], fusion)
        alone = [look(model, view([[s]], model))[0] for s in SEQUENCES.values()]
        for name, (packed, order) in packings().items():
            assert apart(look(model, view(packed, model)), [alone[i] for i in order]) <= FLOAT64, name
        for (name, sequence), expected in zip(SEQUENCES.items(), alone, strict=True):
            if name in MIXED:
                assert apart(incremental(model, view([[sequence]], model)), [expected]) <= FLOAT64, name


@pytest.mark.parametrize(("fusion", "family"), READER_ROWS)
@torch.no_grad()
def test_the_training_engine_agrees_with_the_reference_path(bases, fusion, family):
    """Another attention implementation over a copy of the frozen weights, in float32."""
    model = make_model(bases[family], fusion)
    batch = view(packings()["packed"][0], model)
    with model.using(model.reference_engine()):
        whole = look(model, batch)
    with model.using(model.training_engine(torch.float32, "as asked", "eager", False)):
        assert apart(look(model, batch), whole) <= 2 * FLOAT32


@pytest.fixture
def traced(monkeypatch):
    """Compiling traces layers and hands them to no code generator, which takes half a minute for each."""
    monkeypatch.setattr(fusion_base.torch, "compile", partial(torch.compile, backend="eager"))
    fusion_base.compiled.cache_clear()
    torch.compiler.reset()
    yield
    fusion_base.compiled.cache_clear()
    torch.compiler.reset()


def gradients(model, engine, batch):
    model.zero_grad()
    with model.using(engine):
        out = model(batch)
        model.text_objective.loss(lambda _: out, batch)["next_token"][0].backward()
    return [p.grad.clone() for n, p in model.named_new_parameters().items() if n not in UNREAD and p.grad is not None]


def compiled_agrees(model):
    batch = view(packings()["packed"][0], model)
    graphs, found = [], []
    for _ in range(3):
        found = gradients(model, model.training_engine(torch.float32, "as asked", "eager", True), batch)
        graphs.append(compiled_graphs())
    expected = gradients(model, model.reference_engine(), batch)
    assert len(found) == len(expected) > 0
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-3
    assert graphs[0] > 0 and graphs[1] == graphs[2], "every step is compiled anew"


@pytest.mark.parametrize("fusion", EACH)
def test_layers_are_traced_once_and_agree_with_the_reference_path(bases, fusion, traced):
    compiled_agrees(make_model(bases["llama"], fusion))


@pytest.mark.full
@pytest.mark.parametrize("fusion", ["flamingo", "llama-adapter", "llama-adapter 2"])
def test_compiled_layers_agree_with_the_reference_path(bases, fusion):
    compiled_agrees(make_model(bases["llama"], fusion))


# --------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(("fusion", "family"), on_every_family(KEPT))
def test_text_is_bit_equal_whatever_the_new_weights_are(bases, fusion, family):
    model = make_model(bases[family], fusion, randomised=False)
    for _ in range(2):
        for name, (ids, mask) in text_batches().items():
            base = model.text_logits(ids, attention_mask=mask)
            assert torch.equal(base, model.text_logits(ids, stack="fused", attention_mask=mask)), name
        randomise(model, by=1.0)


@pytest.mark.parametrize(
    "fusion", ["dual tower", "dual tower, adaln", "flamingo", "llama-adapter", "conditioned denoiser", "sparse experts"]
)
def test_a_part_of_a_batch_may_have_no_picture(bases, fusion):
    """Its filler rows stay, and its words are those of a text alone."""
    model, text = make_model(bases["llama"], fusion), words(6, 2)
    batch = view([[Sequence(segments=(words(4, 1), picture((2, 2), 1)))], [Sequence(segments=(text,))]], model)
    with torch.no_grad():
        hidden, run = model.run_pass(batch.index(torch.tensor([1])))
        found = model.backbone.logits(hidden[:, run.slices["text"]])[0, :6]
        torch.testing.assert_close(found, model.text_logits(torch.tensor([text.ids]))[0], rtol=0, atol=FLOAT32)


@pytest.mark.parametrize(("fusion", "family"), KEPT)
def test_text_of_a_base_in_half_precision_is_bit_equal(bases, fusion, family):
    model = make_model(Backbone.load(bases[family].source, dtype=torch.bfloat16), fusion)
    ids, mask = text_batches()["left-padded"]
    assert torch.equal(
        model.text_logits(ids, attention_mask=mask), model.text_logits(ids, stack="fused", attention_mask=mask)
    )
    assert all(isinstance(text, str) for text in model.caption([Noise().picture(0, SIDE)], max_tokens=3))


@pytest.mark.parametrize(("fusion", "family"), KEPT)
@torch.no_grad()
def test_words_that_see_no_picture_are_not_touched(bases, fusion, family):
    """Bit for bit in one pass: before a picture, and behind one that later words may not see."""
    model = make_model(bases[family], fusion)
    randomise(model, by=1.0)
    hidden, first, last = picture((2, 3), 1, later=False), words(3, 1), words(4, 2)
    one, other = (said(model, first, replace(hidden, tokens=t), last) for t in (hidden.tokens, -hidden.tokens))
    assert torch.equal(one, other)
    one, other = (said(model, first, picture((2, 3), seed), last) for seed in (1, 2))
    assert torch.equal(one[:3], other[:3]) and float((one - other)[3:].abs().amax(-1).min()) > 1e-3
    text = words(9, 1)
    base = model.text_logits(torch.tensor([text.ids]))[0]
    torch.testing.assert_close(said(model, text), base, rtol=0, atol=FLOAT32)
    torch.testing.assert_close(said(model, text, picture((2, 3), 1))[:9], base, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize(("fusion", "family"), READER_ROWS)
@torch.no_grad()
def test_fresh_weights_change_no_word_even_behind_a_picture(bases, fusion, family):
    """Closed gates: the answer is the same for any picture."""
    model = make_model(bases[family], fusion, randomised=False)
    one, other = (said(model, words(3, 1), picture((2, 3), seed), words(4, 2)) for seed in (1, 2))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("fusion", "family"), on_every_family(READER_ROWS))
@torch.no_grad()
def test_closed_gates_leave_words_behind_a_picture_to_the_base(bases, fusion, family):
    """The base itself on the same rows at the same positions: no gate is wrong by a constant, such as the output's bias."""
    model = make_model(bases[family], fusion, randomised=False)
    base = model.backbone
    before = () if any(base.window(i) for i in range(LAYERS)) else (words(3, 1),)  # a window counts a picture's rows
    batch = view([[Sequence(segments=(*before, picture((2, 3), 1), words(4, 2)))]], model)
    embedded = base.model.get_input_embeddings()(batch.text_ids.clamp(min=0))
    embedded = torch.where((batch.text_ids < 0)[..., None], model.port.end, embedded)
    places = {"attention_mask": torch.ones_like(batch.text_ids), "position_ids": batch.text.position}
    expected = base.model(inputs_embeds=embedded, **places).logits[0]
    torch.testing.assert_close(look(model, batch)[0][0], expected, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize(("fusion", "family"), READER_ROWS)
def test_training_and_removal_leave_the_base_as_it_was(bases, fusion, family):
    base = bases[family]
    before = state_of(base)
    model = make_model(base, fusion)
    batch = view([[s] for s in SEQUENCES.values()], model)
    adamw = torch.optim.AdamW(model.new_parameters(), lr=1e-2)
    for _ in range(2):
        losses = model.losses(batch, torch.Generator().manual_seed(0))
        assert set(losses) == {"next_token"}
        (losses["next_token"][0] / losses["next_token"][1]).backward()
        silent = {n for n, p in model.named_new_parameters().items() if p.grad is None or not p.grad.abs().max() > 0}
        assert silent == UNREAD
        adamw.step()
        adamw.zero_grad()
    assert all(p.grad is None for p in base.model.parameters())
    model.fusion.remove()
    assert list(model.fusion.parameters()) == [] and state_of(base) == before


@torch.no_grad()
def test_cross_attention_keeps_media_out_of_the_frozen_slot(bases):
    """The frozen layers' slot holds keys and values of words alone, the mechanism's those of media alone."""
    model = make_model(bases["llama"], "flamingo")
    batch = view([[SEQUENCES["words around picture"]]], model)
    cache = model.backbone.new_cache(2, 1)
    model.run_pass(batch, cache=cache, update=True)
    text, media = batch.text.count, batch.media["image"].rows.count
    assert {k.shape[2] for k, _ in cache.slots[0].values()} == {text}
    assert {k.shape[2] for k, _ in cache.slots[1].values()} == {media}
    assert cache.rows.count == text + media


@torch.no_grad()
def test_a_prompt_acts_only_through_its_gate(bases):
    """Bit for bit: behind closed gates nothing hears of the learned rows, behind open ones words after a picture do."""
    model = make_model(bases["llama"], "llama-adapter", randomised=False)
    segments = (words(3, 1), picture((2, 3), 1), words(4, 2))
    shut, blocks = said(model, *segments), model.fusion.blocks.values()
    for block in blocks:
        block.rows.add_(1.0)
    assert torch.equal(said(model, *segments), shut)
    for block in blocks:
        block.gate.fill_(0.5)
    moved = (said(model, *segments) - shut).abs().amax(-1)
    assert float(moved[:3].max()) == 0 and float(moved[3:].min()) > 1e-3


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(("fusion", "family"), READER_ROWS)
@torch.no_grad()
def test_what_appears_later_changes_nothing_before(bases, fusion, family, monkeypatch):
    with exact(monkeypatch):
        model = float64_model(bases[family], fusion)
        whole = SEQUENCES["pictures between words"]
        after = said(model, *whole.segments)
        for stop in range(1, len(whole.segments)):
            before = said(model, *whole.segments[:stop])
            if len(before):
                assert float((before - after[: len(before)]).abs().max()) <= FLOAT64, stop


@torch.no_grad()
def test_names_are_scored_behind_a_cached_picture_as_by_full_passes(bases):
    for fusion in READERS:
        model, names = make_model(bases["llama"], fusion), ["a red apple", "tree"]
        randomise(model, by=0.3)
        pictures = [Noise().picture(i, SIDE) for i in range(2)]
        found = model.score_names(pictures, names)
        for shown, scores in zip(pictures, found, strict=True):
            item = model.image.segment(model.image.encode([shown], SIDE)[0], (4, 4))
            for words_, score in zip(names, scores, strict=True):
                ids = (*model.backbone.encode(words_), model.backbone.end_ids[0])
                batch = pack([[Sequence(segments=(item, Text(ids=ids, has_loss=True)))]])
                total, count = model.text_objective.loss(model, batch)["next_token"]
                assert float(score) == pytest.approx(-float(total / count), abs=1e-4)
        assert float((found[0] - found[1]).abs().min()) > 1e-4, fusion


@torch.no_grad()
def test_words_that_read_what_comes_later_are_computed_anew(bases, monkeypatch):
    """Without a mask: what a shorter prompt left behind says nothing of a longer one."""
    monkeypatch.setitem(READERS, "no mask", replace(READERS["flamingo"], mask="none"))
    with exact(monkeypatch):
        model = float64_model(bases["llama"], "no mask")
        assert model.fusion.reads_ahead
        alone = [look(model, view([[s]], model))[0] for s in SEQUENCES.values()]
        for name, (packed, order) in packings().items():
            found = look(model, view(packed, model))
            with model.using(model.reference_engine()):
                assert apart(found, look(model, view(packed, model))) <= FLOAT64, name
            assert apart(found, [alone[i] for i in order]) <= FLOAT64, name
    model = make_model(bases["llama"], "no mask")
    randomise(model, by=0.2)
    prompt = [part for i in range(3) for part in (Noise().picture(i, SIDE), f"words {i} ")]
    first = []

    def keep(logits, *_, **__):
        first.append(logits)
        raise StopIteration

    monkeypatch.setattr(model.text_objective, "choose", keep)
    for known in ([], [prompt[:2], prompt[:4]]):
        model.engine.turns.clear()
        for asked in (*known, prompt):
            with pytest.raises(StopIteration):
                model.generate(asked, max_tokens=1)
    assert float((first[0] - first[-1]).abs().max()) < FLOAT32
    assert not model.engine.turns


@pytest.mark.parametrize("fusion", READERS)
@torch.no_grad()
def test_several_pictures_between_words_are_answered_as_by_full_passes(bases, fusion):
    """A few-shot prompt: every greedy token is the one that the reference path says, without a cache."""
    model = make_model(bases["llama"], fusion)
    randomise(model, by=0.2)
    shown = [Noise().picture(i, SIDE) for i in range(3)]
    prompt = [shown[0], "a red apple\n", shown[1], "tree\n", shown[2]]
    (answer,) = model.generate(prompt, max_tokens=6)
    media = [model.image.segment(t, (4, 4)) for t in model.image.encode(shown, SIDE)]
    a, b = (Text(ids=model.backbone.encode(t)) for t in ("a red apple\n", "tree\n"))
    ids: list[int] = []
    with model.using(model.reference_engine()):
        for _ in range(6):
            text = Text(ids=tuple(ids))
            logits = said(model, media[0], a, media[1], b, media[2], text)
            token = int(logits[-1].argmax())
            if token in model.backbone.end_ids:
                break
            ids.append(token)
    assert answer == model.backbone.decode(ids)
    swapped = said(model, media[1], a, media[0], b, media[2]) - said(model, media[0], a, media[1], b, media[2])
    assert float(swapped[-1].abs().max()) > 1e-4


@pytest.mark.parametrize("fusion", READERS)
def test_twenty_steps_of_the_real_loop_and_a_pack(bases, fusion, tmp_path):
    base = bases["llama"]
    templates = Templates(caption_dropout=0, article_share=0, other_wordings=0, question_share=0)
    stage = twenty_steps(MixtureConfig(draw=0, caption=6, pack=2, templates=templates))
    recipe = Recipe(model=model_config(base, fusion), data="noise", stages=(stage,))
    model, losses = trained(recipe, base, tmp_path / "run")
    assert set(losses[0]) == {"next_token"} and share_left(losses, "next_token") < 0.8
    assert model.capabilities == {"text", "caption"}
    with pytest.raises(XFusionError, match="this model cannot draw, only caption, text"):
        model.draw(["a tree"], steps=1)
    loaded = xfusion.load(tmp_path / "run" / "pack", backbone=base)
    assert loaded.config == model.config and loaded.fingerprint == model.fingerprint
    batch = view([[s] for s in SEQUENCES.values()], loaded)
    with torch.no_grad():
        assert distance(look(loaded, batch), look(model.eval(), batch)) == 0


@pytest.mark.parametrize("fusion", [*EACH, "sparse experts"])
def test_its_cost_is_counted_on_a_base_without_weights(bases, fusion):
    """Every tensor is a shape: what a recipe would cost on a large base."""
    config = replace(model_config(bases["llama"], fusion), backbone=BackboneConfig(source="Llama-3.2-1B"))
    flops = flops_of_shape(Model(config, Backbone.of_shape("Llama-3.2-1B")))
    assert set(flops) == ({"caption"} if fusion in READERS else {"draw", "caption"})  # what it can learn
    assert flops["caption"]["training"] > flops["caption"]["forward"] > 1e9
