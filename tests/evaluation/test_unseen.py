"""Nothing that a model was trained on is scored as held out, and what is scored as trained is what its pack recorded."""

import pytest
import torch
from contracts.table import Noise

from xfusion.data.sequence import XFusionError
from xfusion.data.sources import open_source
from xfusion.evaluation.run import evaluate
from xfusion.evaluation.suites import emoji
from xfusion.evaluation.unseen import TrainingData, held_out, held_split, recorded_data
from xfusion.modalities.codecs.pixels import Pixels
from xfusion.modalities.image import ImageModality

SIDE = 8


class Namer:
    """Says one name of everything."""

    capabilities = frozenset({"text", "caption"})
    image = ImageModality.Config(codec=Pixels.Config(), patch=8, sizes=(SIDE,)).build()

    def caption(self, pictures):
        return ["cat" for _ in pictures]

    def score_names(self, pictures, names):
        return torch.zeros(1 if pictures is None else len(pictures), len(names))


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    """Ten pictures with captions in the current folder, and a copy of one of them beside another picture."""
    monkeypatch.chdir(tmp_path)
    noise = Noise(14)
    for folder, numbers in (("photos", range(10)), ("mixed", (3, 12)), ("others", (10, 11))):
        (tmp_path / folder).mkdir()
        for i in numbers:
            noise.picture(i, 32).save(tmp_path / folder / f"{i}.png")
            (tmp_path / folder / f"{i}.txt").write_text(noise.examples[i].captions[0].strip())
    assert held_split(open_source("photos:held=0.3")) is not None


def score(known=(), **settings):
    return evaluate(Namer(), trained_on=known, **settings)


def test_the_recorded_data_are_the_source():
    config = {"training": {"data": "photos"}, "recipe": {"data": "emoji"}}
    assert recorded_data(config) == [TrainingData("photos")] and recorded_data({}) == [TrainingData(None)]
    result = score(["photos"])
    assert result["settings"]["data"] == result["settings"]["trained_on"] == "photos" and result["num_concepts"] == 10
    assert result["settings"]["held"] is None
    held = score(["photos:held=0.3"])["settings"]
    assert held["data"] == held["held"] == held["trained_on"] == "photos:held=0.3" and held["num_held"] > 0
    both = score(["photos:held=0.3"], source="photos:held=0.3")
    assert both["held_caption_mrr"] == score(source="photos:held=0.3")["held_caption_mrr"]  # no pack says what it knows


@pytest.mark.parametrize(
    ("known", "settings", "message"),
    [
        (["photos"], {"source": "photos:held=0.3"}, r"photos:held=0.3: (\d) of \1 held-out examples are trained on in photos,"),
        (["photos"], {"source": "others", "held": "mixed"}, "mixed: 1 of 2 held-out examples are trained on in photos, such as"),
        ([], {"source": "photos", "held": "photos"}, "photos: 10 of 10 held-out examples are trained on in photos, such as"),
        ([], {"source": "photos", "held": "mixed"}, "mixed: 1 of 2 held-out examples are trained on in photos"),
        (["gone"], {}, "gone.*; the pack was trained on gone: name that as source, where it stands now"),
        (["photos", "others"], {}, "these packs were trained on photos and others: name one of them as source"),
    ],
)  # fmt: skip
def test_what_was_trained_on_is_not_held_out(known, settings, message):
    with pytest.raises(XFusionError, match=message) as caught:
        score(known, **settings)
    assert "\n" not in str(caught.value)


def test_others_are_held_out_and_data_that_are_gone_are_noted():
    settings = score(["photos"], source="photos", held="others")["settings"]
    assert (settings["held"], settings["num_held"]) == ("others", 2)
    settings = score(["gone"], source="photos", held="others")["settings"]
    assert settings["trained_on"].startswith("gone, where nobody could look for what is held out: ")


def test_suites_that_hold_nothing_out_are_left_alone(monkeypatch):
    def suite(model, *, progress, source="emoji"):
        return {"settings": {"source": source}}

    monkeypatch.setattr(emoji, "run", suite)
    assert score(["gone"])["settings"]["source"] == "emoji"


def test_a_split_of_a_spec_or_all_of_it_is_held_out():
    whole, some = open_source("others"), open_source("photos:held=0.3")
    assert held_out(None, whole) is None and held_out(some, whole) is some
    assert len(held_out("photos", whole)) == 10 and 0 < len(held_out("photos:held=0.3", whole)) < 10
    with pytest.raises(XFusionError, match="nowhere"):
        held_out("nowhere", whole)
