"""Shares of the other tower, held to gates that are set by hand."""

import math

import pytest
import torch
from contracts.table import Noise, make_model, mixed_sequences, view

from xfusion.data.sequence import XFusionError
from xfusion.data.sources import content_fingerprint
from xfusion.evaluation.metrics.shares import shares
from xfusion.evaluation.run import evaluate


def test_a_gate_that_looks_at_nothing_is_its_bias_at_every_position(bases):
    model = make_model(bases["llama"], "dynamic", randomised=False)
    sequences = mixed_sequences()
    rows = [[sequences["words around picture"]], [sequences["picture behind words"]]]
    assert shares(model, view(rows, model)) == {
        layer: dict.fromkeys(("word", "end of picture", "begin of picture", "clean picture", "noised picture"), 0.0)
        for layer in model.fusion.state_layers
    }
    with torch.no_grad():
        for name, mix in model.fusion.mixes.items():
            mix.bias.fill_(0.5 if name.startswith("text") else -0.25)
    found = shares(model, view(rows, model))
    for kinds in found.values():
        for kind, value in kinds.items():
            wanted = 0.5 if kind in ("word", "end of picture") else -0.25
            assert value == pytest.approx(math.tanh(wanted), abs=1e-6)


def test_words_before_a_picture_and_absent_kinds_are_not_counted(bases):
    model = make_model(bases["llama"], "dynamic")
    found = shares(model, view([[mixed_sequences()["picture behind words"]]], model))
    assert found and all(set(kinds) == {"begin of picture", "noised picture"} for kinds in found.values())


def test_the_suite_says_it_of_samples_and_refuses_what_learns_no_shares(bases):
    model = make_model(bases["llama"], "dynamic", randomised=False)
    with torch.no_grad():
        for name, mix in model.fusion.mixes.items():
            mix.bias.fill_(0.5 if name.startswith("text") else -0.25)
    result = evaluate(model, "shares", source=Noise(), num_samples=4)
    kinds = {"word": 0.5, "end_of_picture": 0.5}
    kinds |= dict.fromkeys(("begin_of_picture", "clean_picture", "noised_picture"), -0.25)
    wanted = {f"share_layer{i}_{k}": math.tanh(v) for i in model.fusion.state_layers for k, v in kinds.items()}
    assert {k: v for k, v in result.items() if k != "settings"} == pytest.approx(wanted, abs=1e-6)
    assert result["settings"]["num_samples"] == 4
    assert result["settings"]["source_fingerprint"] == content_fingerprint(Noise())
    facts = result["settings"]["model"]
    found = [facts[name] for name in ("dtype", "device", "attention", "drawing_attention", "solver")]
    assert found == ["float32", "cpu", "sdpa", "grouped", "euler"]
    with pytest.raises(XFusionError, match=r"'shares' needs a tower that learns a share per position.*DualTower"):
        evaluate(make_model(bases["llama"]), "shares", source=Noise(), num_samples=4)
