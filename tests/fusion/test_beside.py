"""Media beside the decoder: words are the base's own, media are what the port made of them, wherever they stand."""

from dataclasses import replace

import pytest
import torch
from contracts.table import (
    BASES,
    exact,
    float64_base,
    look,
    mixed_sequences,
    model_config,
    picture,
    randomise,
    view,
    words,
)
from contracts.test_paths import paths_agree
from contracts.test_text import state_of, text_batches

from xfusion.data.sequence import Sequence, XFusionError
from xfusion.fusion.beside import Beside
from xfusion.model import Model

SEQUENCES = mixed_sequences()


def make(base, by=0.1):
    model = Model(replace(model_config(base), fusion=Beside.Config()), base)
    randomise(model, by=by)
    return model.eval()


@pytest.mark.parametrize("family", BASES)
@torch.no_grad()
def test_fast_whole_packed_and_cached_say_the_same(bases, family, monkeypatch):
    with exact(monkeypatch):
        paths_agree(make(float64_base(bases[family])).double(), monkeypatch)


@pytest.mark.parametrize("family", BASES)
@torch.no_grad()
def test_text_is_bit_equal_and_the_base_stays(bases, family):
    base = bases[family]
    before, model = state_of(base), make(base, by=1.0)
    assert model.fusion.preserves_text and model.regime == "strictly frozen"
    assert list(model.fusion.parameters()) == []
    for name, (ids, mask) in text_batches().items():
        fused = model.text_logits(ids, stack="fused", attention_mask=mask)
        assert torch.equal(model.text_logits(ids, attention_mask=mask), fused), name
    assert state_of(base) == before


@torch.no_grad()
def test_media_are_the_ports_and_no_word_hears_of_them(bases):
    model = make(bases["llama"])
    batch = view([[s] for s in SEQUENCES.values()], model)
    _, run = model.run_pass(batch)
    assert torch.equal(run.states["image"], model.port(batch.media["image"]))
    said = [look(model, view([[Sequence(segments=(picture((2, 2), i), words(5, 1)))]], model))[0][0] for i in (1, 2)]
    assert torch.equal(*said)
    batch = view([[Sequence(segments=(words(4, 1), picture((2, 2), 3)))]], model)
    given = model.cached_text_states(batch)
    assert set(given) == {0}
    _, looked_up = model.run_pass(batch, cached_text=given)
    assert torch.equal(looked_up.states["image"], model.port(batch.media["image"]))


def test_there_is_nothing_to_place():
    with pytest.raises(XFusionError, match="beside: stride 2, .* it has no blocks to place: leave them out"):
        Beside.Config(stride=2).build()
