"""Questions with known answers: an oracle is right, a blind one is not, and refusal is chosen where it was not tested."""

import json
import math

import pytest
import torch
from contracts.table import make_model

from xfusion.apps.commands.proof import Evaluate
from xfusion.data.sequence import XFusionError
from xfusion.evaluation.metrics.refusal import refusal, threshold
from xfusion.evaluation.run import evaluate
from xfusion.evaluation.suites.emoji import part_of
from xfusion.evaluation.suites.understanding import COLOURS, counting, nlvr
from xfusion.generation import answer_json


class Oracle:
    """Knows every picture that was not damaged, less surely those of many things; of others it says 1."""

    capabilities = frozenset({"caption"})

    def __init__(self, questions):
        self.answers = {q.picture.tobytes(): q.answer for q in questions}

    def score_names(self, pictures, names, question=""):
        said = self.answers.get(pictures[0].tobytes(), names[0])
        return torch.tensor([[2.0 if name == said else 0.0 for name in names]])

    def generate(self, items, schema):
        said = [self.answers.get(picture.tobytes(), "1") for picture, _ in items]
        values = schema["properties"]["answer"]["enum"]
        return [[json.dumps({"answer": values[0] if int(one) == 4 else int(one)})] for one in said]


def test_an_oracle_counts_and_damage_is_seen():
    result = evaluate(Oracle(counting(60, 4)), "understanding", count=60, most=4)
    assert result["accuracy"] == 1 and result["accuracy_blind"] < 0.6
    assert 0.25 <= result["chance_accuracy"] < 0.5
    assert result["answered"] == 1 and result["accuracy_answered"] == 1
    fours = sum(q.answer == "4" for q in counting(60, 4) if part_of(q.id) == "test")
    assert result["accuracy_json"] == pytest.approx(1 - fours / result["settings"]["num_test"])  # it writes 1 for 4
    ones = sum(q.answer == "1" for q in counting(60, 4))
    assert result["accuracy_jpeg_5"] == pytest.approx(ones / 60, abs=0.15)  # only the answer 1 is still right
    assert result["curves"]["jpeg"][-1] == [100.0, 1.0] and len(result["curves"]["crop"]) == 4
    assert result["settings"]["num_test"] + result["settings"]["num_validation"] == 60
    with pytest.raises(XFusionError, match="counting has none, nlvr a parquet file"):
        evaluate(Oracle([]), "understanding", questions="nlvr")


def test_what_is_drawn_is_what_is_said():
    """Discs do not touch, so that the pieces of a colour are their number."""
    for question in counting(32, 16, seed=3):
        colour = COLOURS[question.text.split()[2]]
        pixels, side = question.picture.load(), question.picture.width
        left = {(x, y) for x in range(side) for y in range(side) if pixels[x, y] == colour}
        pieces = 0
        while left:
            pieces, edge = pieces + 1, [left.pop()]
            while edge:
                x, y = edge.pop()
                near = {(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)} & left
                left -= near
                edge += near
        assert pieces == int(question.answer)


def test_the_threshold_is_the_lowest_that_fits():
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    right = torch.tensor([True, True, False, True, False])
    assert threshold(confidence, right, 1.0) == pytest.approx(0.8)
    assert threshold(confidence, right, 0.75) == pytest.approx(0.6)
    assert threshold(confidence, right, 0.6) == pytest.approx(0.5)
    assert threshold(confidence, ~right & (confidence < 0), 0.5) == math.inf
    assert refusal(confidence, right, 0.65) == {
        "answered": pytest.approx(0.6),
        "accuracy_answered": pytest.approx(2 / 3),
    }
    assert refusal(confidence, right, math.inf) == {"answered": 0.0, "accuracy_answered": None}


def test_a_model_is_asked_and_its_curves_are_drawn(bases, tmp_path):
    model = make_model(bases["llama"])
    result = evaluate(model, "understanding", count=20, most=2, out=tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["curves"] == result["curves"]
    schema = {"type": "object", "properties": {"answer": {"type": "integer", "minimum": 1, "maximum": 2}}}
    asked = [q for q in counting(20, 2) if part_of(q.id) == "test"]
    said = [answer_json(model, [q.picture], q.text, schema)[0]["answer"] for q in asked]
    assert result["accuracy_json"] == sum(a == int(q.answer) for a, q in zip(said, asked, strict=True)) / len(asked)
    drawn = Evaluate(model="none", out=tmp_path / "found.json").plots(result["curves"])
    assert [name for name, _ in drawn] == ["plot of jpeg", "plot of crop", "plot of resolution"]
    assert (tmp_path / "found.jpeg.svg").read_text().count("<circle") == 5


def test_nlvr_is_read(assets):
    found = nlvr(assets / "images" / "nlvr_dev.parquet", 40)
    assert len(found) == 40 and {q.answer for q in found} == {"true", "false"}
    assert all(q.picture.size[0] == q.picture.size[1] for q in found)
    assert found[0].text == "Each grey box contains atleast one yellow object touching the edge True or false?"
    assert found[0].answer == "true"
