"""What `doctor` tries on a base can fail, and says where."""

import sys
from pathlib import Path

import pytest
from transformers import JambaConfig, JambaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.table import FAMILIES, make_base, tokenizer

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.evaluation.contracts import check_base

BEFORE = "words before a picture are the base's"


def failed(result):
    return {check["name"]: check["detail"] for check in result["checks"] if not check["passed"]}


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_the_table_passes(family, tmp_path):
    base = Backbone.load(str(make_base(family, tmp_path)))
    before = base.compute_fingerprint()
    assert failed(check_base(base, lambda *_: None)) == {}
    assert base.compute_fingerprint() == before


def test_a_mixed_pass_that_embeds_otherwise_is_found(tmp_path, monkeypatch):
    base = Backbone.load(str(make_base("gemma3", tmp_path)))
    monkeypatch.setattr(Backbone, "embed", lambda self, ids: self.model.get_input_embeddings().weight[ids])
    assert set(failed(check_base(base, lambda *_: None))) == {BEFORE}


def test_a_mixed_pass_without_its_windows_is_found(tmp_path, monkeypatch):
    base = Backbone.load(str(make_base("mistral", tmp_path)))
    monkeypatch.setattr(Backbone, "window", lambda self, layer: None)
    assert set(failed(check_base(base, lambda *_: None))) == {BEFORE}


def test_layers_without_attention_among_others_are_counted(tmp_path, monkeypatch):
    config = JambaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
    )
    with pytest.raises(XFusionError, match=r"some of its layers \(JambaMambaDecoderLayer\) have no softmax attention"):
        Backbone(JambaForCausalLM(config), tokenizer(), "made here")
    # Where only a pass shows it.
    base = Backbone.load(str(make_base("llama", tmp_path)))
    for index in (1, 3):
        monkeypatch.setattr(base.layers[index].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    result = check_base(base, lambda *_: None)
    assert len(result["checks"]) == 1  # nothing more is tried
    (detail,) = failed(result).values()
    assert detail.startswith("2 of 4 have none to share, first layer 1 (LlamaDecoderLayer")
