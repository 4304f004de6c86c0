"""Contracts of models that draw and do not read: the frozen layers see words alone, a picture hears of the words before it."""

import pytest
import torch
from contracts.table import (
    BASES,
    LAYERS,
    WRITERS,
    exact,
    float64_model,
    look,
    make_model,
    mixed_sequences,
    picture,
    randomise,
    view,
    words,
)
from contracts.test_paths import packings, paths_agree
from contracts.test_text import state_of, text_batches

from xfusion.data.sequence import Sequence

SEQUENCES = mixed_sequences()
UNREAD = {"port.begin", "port.norm.weight", "port.head.weight", "port.head.bias"}
"""[BOI], which no token of a picture reads, and the head, which these gradients do not go through."""


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("fusion", WRITERS)
@torch.no_grad()
def test_fast_whole_packed_and_cached_say_the_same(bases, fusion, family, monkeypatch):
    with exact(monkeypatch):
        model = float64_model(bases[family], fusion)
        paths_agree(model, monkeypatch)


@pytest.mark.parametrize("fusion", WRITERS)
def test_gradients_of_both_paths_agree_and_reach_all_but_the_base(bases, fusion, monkeypatch):
    with exact(monkeypatch):
        model = float64_model(bases["llama"], fusion)
        batch, grads = view(packings()["packed"][0], model), []
        for engine in (model.engine, model.reference_engine()):
            model.zero_grad()
            with model.using(engine):
                _, run = model.run_pass(batch)
                (run.states["image"] * torch.linspace(-1, 1, run.states["image"].shape[-1])).square().sum().backward()
            grads.append(
                {n: p.grad for n, p in model.named_new_parameters().items() if n not in UNREAD - {"port.begin"}}
            )
        for name, grad in grads[0].items():
            torch.testing.assert_close(grad, grads[1][name], rtol=1e-8, atol=1e-8, msg=name)
            assert name == "port.end" or float(grad.abs().max()) > 0, name
        assert all(p.grad is None for p in model.backbone.model.parameters())


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("fusion", WRITERS)
@torch.no_grad()
def test_text_is_bit_equal_and_the_base_stays(bases, fusion, family):
    base = bases[family]
    before, model = state_of(base), make_model(base, fusion, randomised=False)
    assert model.fusion.preserves_text
    for _ in range(2):
        for name, (ids, mask) in text_batches().items():
            fused = model.text_logits(ids, stack="fused", attention_mask=mask)
            assert torch.equal(model.text_logits(ids, attention_mask=mask), fused), name
        randomise(model, by=1.0)
    model.fusion.remove()
    assert list(model.fusion.parameters()) == [] and state_of(base) == before


@pytest.mark.parametrize("fusion", WRITERS)
@torch.no_grad()
def test_a_picture_hears_of_its_words_and_no_word_of_a_picture(bases, fusion):
    model = make_model(bases["llama"], fusion)

    def found(*segments):
        return look(model, view([[Sequence(segments=segments)]], model))[0]

    target, tail = picture((2, 2), 3, noised=True), words(4, 2)
    one, other = found(words(4, 1), target), found(words(4, 2), target)
    assert float((one[1][1:] - other[1][1:]).abs().amax(-1).min()) > 1e-3
    behind = [found(picture((2, 2), seed), tail)[0] for seed in (1, 2)]
    assert torch.equal(*behind)
    # Another picture of the sequence is not heard of either.
    pair = [found(words(4, 1), picture((2, 2), seed), target)[1][-4:] for seed in (1, 2)]
    torch.testing.assert_close(*pair, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fusion", WRITERS)
@torch.no_grad()
def test_looked_up_words_give_the_same_drawing(bases, fusion):
    model = make_model(bases["llama"], fusion)
    batch = view([[SEQUENCES["picture behind words"]], [Sequence(segments=(words(3, 9), picture((4, 4), 9)))]], model)
    given = model.cached_text_states(batch)
    assert set(given) == {LAYERS - 1}
    _, run = model.run_pass(batch, cached_text=given)
    _, whole = model.run_pass(batch)
    torch.testing.assert_close(run.states["image"], whole.states["image"], rtol=0, atol=2e-5)
