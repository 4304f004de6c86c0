"""A pack on a hub: pushed in one commit, loaded by its id, pinned by revision; the card says what was recorded."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from contracts.table import make_base, make_model, model_config
from data.hub_server import hub
from huggingface_hub import ModelCard

import xfusion
from xfusion import checkpoint
from xfusion.apps import cli
from xfusion.backbone import Backbone
from xfusion.card import card as card_of
from xfusion.card import most_restrictive, task
from xfusion.data.sequence import XFusionError
from xfusion.model import Model
from xfusion.objectives.alignment import Alignment
from xfusion.objectives.base import NoObjective
from xfusion.opening import Opening
from xfusion.storage import without_folders

__all__ = ["hub"]


def test_a_pack_goes_to_the_hub_and_comes_back(bases, hub, tmp_path, capsys):
    model = make_model(bases["llama"])
    model.opening = Opening(64)
    model.save_pretrained(tmp_path / "one", training={"data": "emoji", "data_licence": "CC-BY-SA-4.0"})
    assert cli.main(["push", str(tmp_path / "one"), "org/one", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["commit"].rpartition("/")[2]
    files = hub.commits["org/one"][1][1]
    assert set(files) == {".gitattributes", *checkpoint.FILES}
    assert set(hub.large.values()) == {files[name] for name in (checkpoint.WEIGHTS, checkpoint.OPENING)}  # by LFS
    loaded = xfusion.load("org/one", backbone=bases["llama"])
    assert loaded.fingerprint == model.fingerprint
    assert torch.equal(loaded.opening.opens.weight, model.opening.opens.weight)

    # Another one behind it, without a head: its file goes. The first one can still be named by its commit.
    other = make_model(bases["llama"], "dual tower, strided")
    assert other.push_to_hub("org/one", message="smaller").startswith(hub.address)
    assert len(hub.commits["org/one"]) == 3 and checkpoint.OPENING not in hub.commits["org/one"][2][1]
    card = hub.commits["org/one"][2][1]["README.md"].decode()  # of a model of which nobody recorded anything
    assert (
        "Not measured." in card and "No proof is recorded" in card and "license" not in ModelCard(card).data.to_dict()
    )
    assert other.push_to_hub("org/one", licence="cc-by-4.0") and len(hub.commits["org/one"]) == 4
    card = hub.commits["org/one"][3][1]["README.md"].decode()
    assert "| these weights | cc-by-4.0 |" in card and ModelCard(card).data.to_dict()["license"] == "cc-by-4.0"
    with pytest.raises(XFusionError, match="licence 'mine: all of it' is no name"):
        other.push_to_hub("org/one", licence="mine: all of it")
    with pytest.raises(XFusionError, match="states its own licence"):
        checkpoint.push(tmp_path / "one", "org/one", licence="mit")
    newest = xfusion.load("org/one", backbone=bases["llama"])
    assert newest.fingerprint == other.fingerprint and newest.opening is None
    assert xfusion.load(f"org/one@{first}", backbone=bases["llama"]).fingerprint == model.fingerprint
    with pytest.raises(XFusionError, match="belongs to the base"):
        xfusion.load("org/one", backbone=bases["qwen3"])
    with pytest.raises(XFusionError, match="no folder 'org/none', and the hub pack of that name cannot be fetched: "):
        xfusion.load("org/none")


PROOF = {
    "text_identical": True,
    "perplexity": {"base": 38.1104, "fused": 40.5},
    "settings": {"dtype": "float32", "device": "cpu"},
}
SCORES = {"fit_caption_exact": 0.98765, "settings": {"suite": "emoji", "seed": 0, "versions": {"torch": "2.13.0"}}}
TRAINING = {"data": "emoji", "data_licence": "CC-BY-SA-4.0", "runs": [{"command": "xfusion train xfusion"}]}


def test_a_pack_of_several_runs_states_its_seed_and_no_rate(bases, tmp_path):
    recipe = {"seed": 7, "stages": [{"rate": 0.25, "mixture": {"draw": 3}}]}
    one_run = {key: value for key, value in TRAINING.items() if key != "runs"}
    for name, training, rate_is_said in (("one", one_run, True), ("several", TRAINING, False)):
        make_model(bases["llama"]).save_pretrained(tmp_path / name, training=training, recipe=recipe)
        card = (tmp_path / name / "README.md").read_text()
        assert "| seed | 7 |" in card and ("| largest rate | 0.25 |" in card) == rate_is_said


def test_each_of_several_runs_states_what_it_computed_and_what_was_not_recorded(bases, tmp_path):
    recorded = {"command": "xfusion train xfusion", "steps": 4700, "seconds": 2478.9, "threads": 2}
    training = TRAINING | {"runs": [recorded, {"command": "xfusion train `x`"}]}
    make_model(bases["llama"]).save_pretrained(tmp_path / "pack", training=training)
    card = (tmp_path / "pack" / "README.md").read_text()
    assert "| run 1 | `xfusion train xfusion`, 4,700 steps, 2,478.9 s, 2 threads |" in card
    assert "| run 2 | ``xfusion train `x``` |" in card
    assert "| commit | not recorded |\n| machine | not recorded |" in card


def test_what_a_pack_recorded_goes_along_with_its_weights(bases, hub, tmp_path):
    model = make_model(bases["llama"])
    model.opening = Opening(64)
    pack = tmp_path / "pack"
    model.save_pretrained(pack, scores=SCORES, training=TRAINING, proof=PROOF, licence="mit")
    checkpoint.add_opening(pack, model, model.opening, pack, scores={"recall": 0.5})
    written = (tmp_path / "pack" / "README.md").read_text()

    def pushed(model, **settings):
        model.push_to_hub("org/pack", **settings)
        return hub.commits["org/pack"][-1][1]["README.md"].decode()

    loaded = xfusion.load(tmp_path / "pack", backbone=bases["llama"])
    assert pushed(loaded) == written and pushed(model) == written
    assert "| perplexity in the proof | 38.11 (base), 40.5 (with this pack) |" in written
    loaded.save_pretrained(tmp_path / "again", licence="cc-by-4.0")
    assert (tmp_path / "again" / "README.md").read_text() == written.replace(
        "license: mit", "license: cc-by-4.0"
    ).replace("| these weights | mit |", "| these weights | cc-by-4.0 |")
    assert ModelCard(pushed(loaded)).data.to_dict()["license"] == "cc-by-4.0"
    # Of another head nothing was measured, and of half as precise weights nothing at all, though they were trained and may be
    # used as the whole ones; read back they are the same.
    loaded.opening = Opening(64)
    assert "## Opening head" not in (card := pushed(loaded)) and "| fit_caption_exact | 0.9877 |" in card
    checkpoint.save(model, tmp_path / "half", dtype=torch.bfloat16)
    card = (tmp_path / "half" / "README.md").read_text()
    assert "Not measured." in card and "No proof" in card and "| data | emoji |" in card and "license: mit" in card
    assert "## Opening head" in card  # it reads the base alone
    model.save_pretrained(tmp_path / "whole")  # the copy is not what the model is
    assert (tmp_path / "whole" / "README.md").read_text() == written
    half = xfusion.load(tmp_path / "half", backbone=bases["llama"])
    checkpoint.add_facts(tmp_path / "half", half, scores={"held_caption_at_1": 0.25})
    assert "| held_caption_at_1 | 0.25 |" in pushed(half)
    # One weight more or less, or another use of them, and it is another model.
    assert "| data | emoji |" in pushed(half)
    half.set_objectives(half.config.text, replace(half.config.media, guidance=7.0))
    assert "Not measured." in pushed(half)
    with torch.no_grad():
        next(model.new_parameters()).view(-1)[0] += 1
    card = pushed(model)
    assert (
        "Not measured." in card and "No proof" in card and "| data | not recorded |" in card and "| mit |" not in card
    )


def test_a_hub_that_takes_no_more_is_told_in_one_line(bases, hub):
    hub.takes_no_uploads = True
    with pytest.raises(
        XFusionError, match=r"cannot be put on the hub as 'org/pack': .*model\.safetensors.*403"
    ) as error:
        make_model(bases["llama"], "low-rank tower").push_to_hub("org/pack")
    assert "\n" not in str(error.value) and len(hub.commits["org/pack"]) == 1


def test_no_folder_of_this_machine_stands_in_a_pack(bases, hub, tmp_path):
    mixed = "/home/me/photos:weight=2+emoji:16"
    training = TRAINING | {"data": "/home/me/my photos:held=0.1", "data_licence": f"/home/me/photos: MIT; {mixed}"}
    training["runs"] = [{"command": "xfusion train xfusion --data /home/me/photos -o ~/runs/one"}]
    scores = SCORES | {"settings": SCORES["settings"] | {"data": mixed, "held": "C:\\Users\\me\\photos"}}
    proof = PROOF | {"model": "/tmp/me/pack"}
    make_model(bases["llama"]).save_pretrained(tmp_path / "pack", training=training, scores=scores, proof=proof)
    card, config = ((tmp_path / "pack" / name).read_text() for name in ("README.md", "config.json"))
    for text in (card, config.replace(bases["llama"].source, "")):  # the base is found by its folder
        assert not any(part in text for part in ("/me", "me/", "~/", "Users", str(tmp_path)))
    assert bases["llama"].source not in card
    for part in ("| data | my photos:held=0.1 |", "| run 1 | `xfusion train xfusion --data photos -o one` |",
                 "data photos:weight=2+emoji:16, held photos", "| data | photos: MIT; photos:weight=2+emoji:16 |"):  # fmt: skip
        assert part in card, part
    for address in ("https://host/a/b", "hf:org/name:train", "org/namef3a", "runs/photos/pack", "and/or", "1 / 2"):
        assert without_folders({"a": [address]}) == {"a": [address]}


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
    assert "license" not in ModelCard(bare).data.to_dict() and "| these weights | not recorded |" in bare
    model.save_pretrained(tmp_path / "full", scores=SCORES, training=TRAINING, licence="cc-by-sa-4.0")
    checkpoint.add_facts(tmp_path / "full", model, proof=PROOF)
    text = (tmp_path / "full" / "README.md").read_text()
    for part in ("| fit_caption_exact | 0.9877 |", "suite emoji, seed 0; torch 2.13.0", "| data | CC-BY-SA-4.0 |",
                 "| run 1 | `xfusion train xfusion` |", "bit for bit the base's", bases["llama"].fingerprint,
                 "| codec | none needed |", "Regime: strictly frozen. Text alone comes out as the base's",
                 "Requests of text alone run on any engine that serves the base.",
                 "It loads with xfusion only", "measure memory", "No score here is of examples that training did not see",
                 "Which link asks most of you cannot be said: no known licence is named for base."):  # fmt: skip
        assert part in text, part
    assert ModelCard(text).data.to_dict()["license"] == "cc-by-sa-4.0"
    assert xfusion.load(tmp_path / "full", backbone=bases["llama"]).fingerprint == model.fingerprint
    with pytest.raises(XFusionError, match="holds other weights"):
        checkpoint.add_facts(tmp_path / "full", make_model(bases["llama"], "low-rank tower"), proof=PROOF)


@pytest.mark.parametrize(
    ("modality", "able", "named"),
    [
        ("image", {"caption", "draw"}, "any-to-any"),
        ("image", {"caption"}, "image-text-to-text"),
        ("image", {"caption", "embed"}, "image-text-to-text"),
        ("image", {"draw"}, "text-to-image"),
        ("image", {"embed"}, "zero-shot-image-classification"),
        ("image", {"match", "fill"}, "zero-shot-image-classification"),
        ("image", {"fill"}, "fill-mask"),
        ("audio", {"caption"}, "audio-text-to-text"),
        ("audio", {"draw"}, "text-to-audio"),
        ("image", set(), "text-generation"),
    ],
)
def test_the_hub_is_told_the_task_of_a_recipe(modality, able, named):
    model = SimpleNamespace(modality=SimpleNamespace(name=modality), capabilities={"text", *able})
    assert task(model) == named


def test_a_card_names_the_task_the_encoders_and_where_else_it_loads(bases, tmp_path):
    config = model_config(bases["llama"])
    reader = Model(replace(config, media=NoObjective.Config(), extra=(Alignment.Config(layer=1),)), bases["llama"])
    reader.save_pretrained(tmp_path / "reader")
    card = (tmp_path / "reader" / "README.md").read_text()
    assert ModelCard(card).data.to_dict()["pipeline_tag"] == "image-text-to-text"
    assert "| encoder efficientnet-lite0 | Apache-2.0 |" in card and "It loads with xfusion only" in card
    make_model(bases["llama"], "prefix").save_pretrained(tmp_path / "prefix")
    assert "`xfusion export PACK --to transformers` writes it" in (tmp_path / "prefix" / "README.md").read_text()


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        ({"base": "Apache-2.0", "codec": "none needed", "data": "MIT"}, "Every link is permissive."),
        (
            {"base": "Apache-2.0", "codec": "cc-by-sa-4.0", "data": "photos: MIT; emoji:16: CC-BY-SA-4.0"},
            "The most restrictive link: codec (cc-by-sa-4.0), data (photos: MIT; emoji:16: CC-BY-SA-4.0), share alike.",
        ),
        (
            {"base": "Apache-2.0", "encoder E": "CC-BY-NC-4.0", "data": "CC-BY-SA-4.0"},
            "The most restrictive link: encoder E (CC-BY-NC-4.0), not for commercial use.",
        ),
        (
            {"base": "gemma", "codec": "mit", "data": "photos: as the owner of the files says; emoji: CC-BY-SA-4.0"},
            "Which link asks most of you cannot be said: no known licence is named for base, data.",
        ),
    ],
)
def test_the_most_restrictive_link_is_named_where_all_are_known(chain, said):
    assert most_restrictive({"these weights": "not recorded"} | chain) == said


@pytest.mark.full
def test_the_shipped_card_is_what_is_written_of_it_today():
    folder = checkpoint.find("emoji")
    config = checkpoint.read_config(folder)
    assert (folder / "README.md").read_text() == card_of(config, xfusion.load("emoji"))


def test_a_base_of_the_hub_is_pinned_by_its_commit_with_the_licence_of_its_card(hub, tmp_path):
    """The repository moves on; the pack still comes back on what it was trained on."""

    def files(seed):
        folder = Path(make_base("llama", tmp_path / str(seed), seed=seed))
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    card = b"---\nlicense: llama3.2\n---\n# A base\n"
    hub.commits["org/base"] = [("a" * 40, files(0) | {"README.md": card})]
    for revision in (None, "main", "a" * 40):
        base = Backbone.load("org/base", revision=revision)
        assert (base.revision, base.licence) == ("a" * 40, "llama3.2"), revision
    model = make_model(base)
    model.save_pretrained(tmp_path / "pack")
    written = ModelCard.load(tmp_path / "pack" / "README.md")
    assert written.data.base_model == "org/base" and "| base | llama3.2 |" in written.text
    assert f"| revision | {'a' * 40} |" in written.text
    hub.commits["org/base"].append(("b" * 40, files(1)))
    again = xfusion.load(tmp_path / "pack")
    assert again.backbone.revision == "a" * 40 and again.backbone.fingerprint == base.fingerprint
    assert Backbone.load("org/base").revision == "b" * 40
    assert Backbone.load("org/base", revision="a" * 40).licence == "llama3.2"
    assert Backbone.load("org/base").licence.startswith("not recorded")  # the newer one has no card
    hub.commits["org/base"].append(("c" * 40, files(1) | {"README.md": b"---\nlicense: [mit\n---\n"}))
    assert Backbone.load("org/base").licence.startswith("not recorded")  # its metadata are broken
    hub.out_of_order = True  # the cache knows
    assert Backbone.load("org/base", revision="a" * 40).licence == "llama3.2"


def test_a_base_in_a_folder_beside_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_base("llama", Path("models/llama"))
    make_model(Backbone.load("models/llama")).save_pretrained("pack")
    assert ModelCard.load("pack/README.md").data.base_model is None
