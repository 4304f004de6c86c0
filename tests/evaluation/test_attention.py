"""Where a picture's tokens look: against the equation, written out in float64."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.table import FUSIONS, TOKEN_WIDTH, make_model

from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, Text, XFusionError
from xfusion.evaluation.attention import drawing_attention

PROMPT, GRID = "two blue birds", (4, 4)


def tokens():
    return torch.rand(16, TOKEN_WIDTH, generator=torch.Generator().manual_seed(5)) * 2 - 1


def test_the_first_layer_is_the_towers_softmax(bases):
    base = bases["llama"]
    model = make_model(base, "dual tower")
    found = drawing_attention(model, PROMPT, tokens(), GRID)
    ids = (*base.begin_ids, *base.encode(PROMPT))
    assert len(found.words) == len(ids) and "".join(found.words[len(base.begin_ids) :]) == PROMPT
    assert found.layers == (0, 1, 2, 3)

    # Words, [BOI], picture: the tower's own queries and keys of all of them; the picture sees everything.
    batch = pack([[Sequence(segments=(Text(ids=ids), model.image.segment(tokens(), GRID, state="noised")))]])
    with torch.no_grad():
        states = torch.cat([base.embed(torch.tensor([ids])), model.port(batch.media["image"])], dim=1)
        block = model.fusion.blocks["0"]
        normed = block.input_layernorm(states)
        count, own = states.shape[1], block.self_attn
        position = torch.arange(count)[None]
        assert torch.equal(torch.cat([batch.text.position, batch.media["image"].rows.position], dim=1), position)
        q, k = ((project(normed)).view(1, count, -1, 16).transpose(1, 2) for project in (own.q_proj, own.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *base.decoder.rotary_emb(states, position))
        scores = q.double() @ repeat_kv(k, 2).double().transpose(2, 3) / 4
        expected = scores.softmax(-1).mean(1)[0, len(ids) + 1 :].float()
    torch.testing.assert_close(found.on_words[0], expected[:, : len(ids)])
    torch.testing.assert_close(found.on_begin[0], expected[:, len(ids)])
    torch.testing.assert_close(found.on_picture[0], expected[:, len(ids) + 1 :])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_mechanism_that_draws_is_asked_where_it_computes_pictures(bases, fusion):
    base = bases["llama"]
    model = make_model(base, fusion)
    before = model.engine
    found = drawing_attention(model, PROMPT, tokens(), GRID)
    assert model.engine is before and found.layers == tuple(sorted(model.fusion.state_layers))
    total = found.on_words.sum(-1) + found.on_begin + found.on_picture.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    other = drawing_attention(model, PROMPT, tokens().flip(0), GRID)
    assert (other.on_words - found.on_words).abs().amax() > 1e-4, "it does not depend on the picture"


def test_what_another_model_computes_meanwhile_is_not_recorded(bases, monkeypatch):
    model, other = make_model(bases["llama"]), make_model(bases["gemma3"])
    alone, run_pass = drawing_attention(model, PROMPT, tokens(), GRID), model.run_pass

    def run_both(batch):
        found = run_pass(batch)
        engine = other.training_engine(other.backbone.dtype, "", "eager", False)
        with other.using(replace(engine, reference=True)), torch.no_grad():
            other.run_pass(batch)
        return found

    monkeypatch.setattr(model, "run_pass", run_both)
    found = drawing_attention(model, PROMPT, tokens(), GRID)
    assert torch.equal(found.on_words, alone.on_words) and torch.equal(found.on_picture, alone.on_picture)


def test_a_picture_without_words(bases):
    found = drawing_attention(make_model(bases["llama"]), "", tokens(), GRID)
    assert found.words == () and found.on_words.shape == (4, 16, 0)
    total = found.on_begin + found.on_picture.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_model_that_only_reads_is_refused(bases):
    with pytest.raises(XFusionError, match="cannot draw"):
        drawing_attention(make_model(bases["llama"], "flamingo"), PROMPT, tokens(), GRID)
