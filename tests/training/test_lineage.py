"""A pack that started from another one knows what all of its runs were trained on, and none of it is scored as held out."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from contracts.table import Noise, make_model
from training.runs import StopAt, recipe, train

import xfusion
from xfusion.apps import cli
from xfusion.card import data_licences, run_summary, training_runs
from xfusion.composition import together
from xfusion.data.mixture import MixtureConfig
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import content_fingerprint, open_source
from xfusion.evaluation.run import evaluate
from xfusion.evaluation.unseen import TrainingData, data_of, recorded_data
from xfusion.training.loop import Interrupted

QUICK = {"max_drawn": 1, "max_captioned": 1, "steps": 1, "features": False}
FOLDERS = {"photos": range(6), "cards": range(6, 10), "signs": range(10, 15)}
"""Folders of pictures by name, and which of the noise pictures each has."""


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = Noise(16)
    for folder, numbers in FOLDERS.items():
        write(tmp_path / folder, numbers, noise)


def write(folder, numbers, noise=None):
    folder.mkdir(parents=True)
    noise = noise or Noise(max(numbers) + 1)
    for i in numbers:
        noise.picture(i, 32).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(noise.examples[i].captions[0].strip())


def run(base, out, data, *, start=None, licence=None, **settings):
    small = recipe(base, steps=1, rate=0.0, mixture=MixtureConfig(draw=2, caption=2, pack=1))
    settings = {"from_pack": start and f"{start}/pack", "data": data, "source": None} | settings
    if licence is not None:
        small, settings["data"] = replace(small, data=data, data_licence=licence), None
    return train(base, out, recipe_=small, **settings)


def config_of(name):
    return json.loads(open(f"{name}/pack/config.json").read())


@pytest.fixture
def chain(bases, tmp_path):
    """Three runs, each from the pack of the one before."""
    base = bases["llama"]
    run(base, tmp_path / "one", "photos", licence="MIT")
    run(base, tmp_path / "two", "cards", start="one", licence="CC-BY-4.0")
    run(base, tmp_path / "three", "signs", start="two", licence="CC-BY-4.0")
    return base


def test_a_pack_records_the_data_of_all_runs_of_its_chain(chain, tmp_path, capsys):
    one, two, three = (config_of(name)["training"] for name in ("one", "two", "three"))
    assert "earlier" not in one and one["data"] == "photos"
    assert two["earlier"] == [one] and two["data"] == "cards" and two["steps"] == 1
    first = {key: value for key, value in two.items() if key != "earlier"}
    assert three["earlier"] == [one, first] and three["data"] == "signs"
    runs = training_runs(config_of("three"))
    assert [run["data"] for run in runs] == ["photos", "cards", "signs"] and "earlier" not in runs[-1]
    assert [data.spec for data in recorded_data(config_of("three"))] == ["photos", "cards", "signs"]
    assert [data.latest for data in recorded_data(config_of("three"))] == [False, False, True]
    card = (tmp_path / "three" / "pack" / "README.md").read_text()
    for part in ("| earlier run 1 | photos, 6 examples, 1 steps |", "| earlier run 2 | cards, 4 examples, 1 steps |",
                 "| data | signs |", "| data | photos: MIT; cards: CC-BY-4.0; signs: CC-BY-4.0 |"):  # fmt: skip
        assert part in card, part
    capsys.readouterr()
    assert cli.main(["show", "three", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["training"] == three
    assert json.loads(shown.out)["licences"]["data"] == "photos: MIT; cards: CC-BY-4.0; signs: CC-BY-4.0"
    lines = [" ".join(line.split()) for line in shown.err.splitlines()]
    start = lines.index("trained on photos, 6 examples, 1 steps")
    assert lines[start + 1 : start + 3] == ["cards, 4 examples, 1 steps", "signs, 5 examples, 1 steps"]


@pytest.mark.parametrize("data", ["photos", "cards"])
def test_what_an_earlier_run_was_trained_on_is_not_held_out(chain, capsys, data):
    call = [
        "evaluate",
        "three",
        "--set",
        f"held={data}",
        *(f"{name}={json.dumps(value)}" for name, value in QUICK.items()),
    ]
    assert cli.main(call) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"{data}: {len(FOLDERS[data])} of {len(FOLDERS[data])} held-out examples " in told
    assert f" trained on in {data}" in told


def test_the_last_run_is_the_source_and_lost_data_are_noted(chain, tmp_path):
    write(tmp_path / "others", range(20, 23))
    model = xfusion.load("three", backbone=chain)
    settings = evaluate(model, held="others", **QUICK)["settings"]
    assert settings["data"] == "signs" and settings["num_held"] == 3
    assert settings["trained_on"].startswith("photos and cards and signs")
    (tmp_path / "photos").rename(tmp_path / "moved")
    settings = evaluate(model, held="others", **QUICK)["settings"]
    assert "where nobody could look for what is held out: photos" in settings["trained_on"]
    with pytest.raises(XFusionError, match="are trained on in cards"):
        evaluate(model, held="cards", **QUICK)


def test_a_model_knows_from_its_record_what_it_was_trained_on(chain, tmp_path):
    """Without being told, loaded or just trained; what is told goes before the record."""
    model = xfusion.load("three", backbone=chain)
    for held in ("photos", "cards", "signs"):
        with pytest.raises(XFusionError, match=rf"{held}: .* held-out examples .* trained on in {held}"):
            evaluate(model, held=held, **QUICK)
    trained = run(chain, tmp_path / "four", "signs", start="one")
    assert [data.spec for data in data_of(trained)] == ["photos", "signs"]
    with pytest.raises(XFusionError, match="photos: .* held-out examples .* trained on in photos"):
        evaluate(trained, held="photos", **QUICK)
    told = evaluate(model, trained_on=["signs"], held="photos", **QUICK)["settings"]
    assert (told["trained_on"], told["held"], told["num_held"]) == ("signs", "photos", 6)


def test_a_model_without_a_record_is_scored_and_the_result_says_so(chain):
    fresh = make_model(chain)
    unknown = "not recorded: nobody could look for what is held out"
    assert data_of(fresh) == [TrainingData(None)]
    assert evaluate(fresh, source="photos", held="cards", **QUICK)["settings"]["trained_on"] == unknown
    model = xfusion.load("one", backbone=chain)
    assert [data.spec for data in data_of(model)] == ["photos"]
    with torch.no_grad():
        next(model.new_parameters()).mul_(2)
    assert [data.spec for data in data_of(model)] == ["photos", None]
    assert evaluate(model, held="cards", **QUICK)["settings"]["trained_on"].endswith(
        "on further data that nobody recorded"
    )


def test_packs_together_were_trained_on_the_data_of_all(chain):
    one, three = (xfusion.load(name, backbone=chain) for name in ("one", "three"))
    assert [data.spec for data in data_of(together(one, three))] == ["photos", "photos", "cards", "signs"]
    with pytest.raises(XFusionError, match="these packs were trained on photos and signs: name one of them as source"):
        evaluate(together(one, three), held="cards", **QUICK)


def test_a_resumed_run_keeps_what_it_started_from(chain, tmp_path):
    """It is resumed without naming the pack again."""
    with pytest.raises(Interrupted):
        run(chain, tmp_path / "four", "photos", start="three", steps=3, listener=StopAt(0))
    run(chain, tmp_path / "four", "photos", steps=3, resume=True)
    assert [run["data"] for run in training_runs(config_of("four"))] == ["photos", "cards", "signs", "photos"]


def test_a_pack_without_a_record_leaves_a_run_of_unknown_data(bases, tmp_path):
    base = bases["llama"]
    make_model(base).save_pretrained(tmp_path / "bare" / "pack")
    run(base, tmp_path / "adapted", "photos", start="bare")
    assert config_of("adapted")["training"]["earlier"] == [{}]
    assert "| earlier run 1 | data not recorded |" in (tmp_path / "adapted" / "pack" / "README.md").read_text()
    assert [data.spec for data in recorded_data(config_of("adapted"))] == [None, "photos"]
    model = xfusion.load("adapted", backbone=base)
    settings = evaluate(model, held="cards", **QUICK)["settings"]
    assert settings["trained_on"].endswith("; and on further data that nobody recorded")


def test_packs_of_before_are_read_as_one_run():
    emoji = {"training": {"data": "emoji", "steps": 11100, "pictures": 1746, "runs": [{"command": "xfusion train"}]}}
    assert training_runs(emoji) == [emoji["training"]] and recorded_data(emoji) == [TrainingData("emoji")]
    assert run_summary(emoji["training"]) == "emoji, 1,746 examples, 11,100 steps"
    assert training_runs({}) == [{}] and run_summary({}) == "data not recorded" and data_licences({}) == "not recorded"
    assert recorded_data({"recipe": {"data": "emoji"}, "training": {"steps": 3}}) == [TrainingData("emoji")]
    assert data_licences({"training": {"data": "emoji", "data_licence": "CC0"}}) == "CC0"


def test_encoders_that_taught_an_earlier_run_are_teachers(bases, tmp_path):
    model = make_model(bases["llama"])
    earlier = [{"data": "photos", "teachers": ["org/clip@1f3a"]}]
    model.save_pretrained(tmp_path / "pack", training={"data": "cards", "earlier": earlier})
    assert xfusion.load(tmp_path / "pack", backbone=bases["llama"]).teachers == {"org/clip@1f3a"}


# ----------------------------------------------------------------------------------------- which data of the same name


@pytest.fixture
def elsewhere(bases, tmp_path):
    """A run on a folder named ``photos`` of another place; a folder of that name and of other pictures is here."""
    write(tmp_path / "disk" / "photos", range(20, 25))
    write(tmp_path / "others", range(30, 33))
    run(bases["llama"], tmp_path / "run", str(tmp_path / "disk" / "photos"))
    return xfusion.load("run", backbone=bases["llama"]), tmp_path / "disk" / "photos"


def test_data_are_recognised_by_content_wherever_they_are(elsewhere, bases, tmp_path):
    model, photos = elsewhere
    text = json.dumps(config_of("run")).replace(bases["llama"].source, "")
    assert str(tmp_path) not in text and config_of("run")["training"]["data"] == "photos"
    assert config_of("run")["training"]["data_fingerprint"] == content_fingerprint(open_source(photos))
    with pytest.raises(
        XFusionError,
        match="^photos is not what the pack was trained on: its content is [0-9a-f]+, the pack recorded [0-9a-f]+; name",
    ):
        evaluate(model, **QUICK)
    settings = evaluate(model, source=str(photos), held="photos", **QUICK)[
        "settings"
    ]  # other pictures of the same name
    assert (settings["trained_on"], settings["held"], settings["num_held"]) == ("photos", "photos", 6)
    with pytest.raises(XFusionError, match="5 of 5 held-out examples are trained on in"):
        evaluate(model, source=str(photos), held=str(photos), **QUICK)
    photos.rename(tmp_path / "moved")
    assert evaluate(model, source="moved", held="photos", **QUICK)["settings"]["trained_on"] == "photos"


def test_data_that_only_have_the_name_may_be_those_of_the_training(elsewhere, tmp_path):
    """Such as when pictures were added: what is in them is not scored as held out, and the result says what is not certain."""
    model, photos = elsewhere
    settings = evaluate(model, source="cards", held="others", **QUICK)["settings"]
    assert settings["trained_on"].startswith("photos; perhaps other data of that name: photos: its content is ")
    with pytest.raises(
        XFusionError,
        match=r"^photos: 6 of 6 held-out examples may be trained on in photos \(its content is .*\), such as .*: name others",
    ):
        evaluate(model, source="cards", held="photos", **QUICK)
    shutil.rmtree("photos")
    shutil.copytree(photos, "photos")
    assert evaluate(model, held="others", **QUICK)["settings"]["trained_on"] == "photos"


def test_examples_that_training_left_out_make_no_other_data(bases, tmp_path):
    """Damage is found only by decoding, which training did."""
    write(tmp_path / "some", range(20, 25))
    broken = tmp_path / "some" / "23.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    run(bases["llama"], tmp_path / "run", "some", allow_bad=0.3)
    model = xfusion.load("run", backbone=bases["llama"])
    assert config_of("run")["training"]["pictures"] == 4
    settings = evaluate(model, source="cards", held="signs", **QUICK)["settings"]
    assert settings["trained_on"] == "some" and settings["num_held"] == 5


def test_a_folder_named_as_the_built_in_set_is_not_taken_for_it(bases, tmp_path):
    write(tmp_path / "disk" / "emoji", range(20, 25))
    run(bases["llama"], tmp_path / "run", str(tmp_path / "disk" / "emoji"))
    model = xfusion.load("run", backbone=bases["llama"])
    assert [data.spec for data in data_of(model)] == ["emoji"]
    with pytest.raises(XFusionError, match="^emoji is not what the pack was trained on"):
        evaluate(model, **QUICK)
