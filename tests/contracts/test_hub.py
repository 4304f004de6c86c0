"""A pack on a hub: pushed in one commit, loaded by its id, pinned by revision; the card says what was recorded."""

import json

import pytest
import torch
from contracts.table import make_model
from data.hub_server import hub
from huggingface_hub import ModelCard

import xfusion
from xfusion import checkpoint
from xfusion.apps import cli
from xfusion.data.sequence import XFusionError
from xfusion.opening import Opening

__all__ = ["hub"]


def test_a_pack_goes_to_the_hub_and_comes_back(bases, hub, tmp_path, capsys):
    model = make_model(bases["llama"])
    model.opening = Opening(64)
    model.save_pretrained(tmp_path / "one", training={"data": "emoji", "data_licence": "CC-BY-SA-4.0"})
    assert cli.main(["push", str(tmp_path / "one"), "org/one", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["commit"].rpartition("/")[2]
    assert set(hub.commits["org/one"][1][1]) == {".gitattributes", *checkpoint.FILES}
    loaded = xfusion.load("org/one", backbone=bases["llama"])
    assert loaded.fingerprint == model.fingerprint
    assert torch.equal(loaded.opening.opens.weight, model.opening.opens.weight)

    # Another one behind it, without a head: its file goes. The first one can still be named by its commit.
    other = make_model(bases["llama"], "dual tower, strided")
    assert other.push_to_hub("org/one", message="smaller").startswith(hub.address)
    assert len(hub.commits["org/one"]) == 3 and checkpoint.OPENING not in hub.commits["org/one"][2][1]
    newest = xfusion.load("org/one", backbone=bases["llama"])
    assert newest.fingerprint == other.fingerprint and newest.opening is None
    assert xfusion.load(f"org/one@{first}", backbone=bases["llama"]).fingerprint == model.fingerprint
    with pytest.raises(XFusionError, match="belongs to the base"):
        xfusion.load("org/one", backbone=bases["qwen3"])
    with pytest.raises(XFusionError, match="hub pack .* cannot be fetched|cannot be fetched"):
        xfusion.load("org/none")


def test_an_altered_pack_does_not_leave(bases, hub, tmp_path):
    make_model(bases["llama"], "low-rank tower").save_pretrained(tmp_path / "pack")
    path = tmp_path / "pack" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(XFusionError, match="was altered"):
        checkpoint.push(tmp_path / "pack", "org/pack")
    assert not hub.commits
    assert cli.main(["push", str(tmp_path / "pack"), "no-repository"]) == 2


def test_the_card_says_what_was_recorded_and_no_more(bases, tmp_path):
    model = make_model(bases["llama"])
    model.save_pretrained(tmp_path / "bare")
    bare = (tmp_path / "bare" / "README.md").read_text()
    assert "Not measured." in bare and "No proof is recorded" in bare and "| data | not recorded |" in bare
    scores = {"fit_caption_exact": 0.98765, "settings": {"suite": "emoji", "seed": 0, "versions": {"torch": "2.13.0"}}}
    training = {"data": "emoji", "data_licence": "CC-BY-SA-4.0", "runs": [{"command": "xfusion train xfusion"}]}
    assert "license" not in ModelCard(bare).data.to_dict() and "| these weights | not recorded |" in bare
    model.save_pretrained(tmp_path / "full", scores=scores, training=training, licence="cc-by-sa-4.0")
    proof = {"text_identical": True, "settings": {"dtype": "float32", "device": "cpu"}}
    checkpoint.add_facts(tmp_path / "full", model, proof=proof)
    text = (tmp_path / "full" / "README.md").read_text()
    for part in ("| fit_caption_exact | 0.9877 |", "suite emoji, seed 0; torch 2.13.0", "| data | CC-BY-SA-4.0 |",
                 "| run 1 | `xfusion train xfusion` |", "bit for bit the base's", bases["llama"].fingerprint,
                 "| codec | none needed |", "Regime: strictly frozen. Text alone comes out as the base's"):  # fmt: skip
        assert part in text, part
    assert ModelCard(text).data.to_dict()["license"] == "cc-by-sa-4.0"
    assert xfusion.load(tmp_path / "full", backbone=bases["llama"]).fingerprint == model.fingerprint
    with pytest.raises(XFusionError, match="holds other weights"):
        checkpoint.add_facts(tmp_path / "full", make_model(bases["llama"], "low-rank tower"), proof=proof)
