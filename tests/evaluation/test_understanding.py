"""Questions with known answers: an oracle is right, a blind one is not, and refusal is chosen where it was not tested."""

import json
import math
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from contracts.table import make_model

from xfusion.apps.commands.proof import Evaluate
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import open_source
from xfusion.evaluation.metrics.clusters import interval
from xfusion.evaluation.metrics.refusal import refusal, threshold
from xfusion.evaluation.run import evaluate
from xfusion.evaluation.suites.understanding import COLOURS, counting, grade, nlvr, part
from xfusion.generation import generate


class Oracle:
    """Knows every picture that was not damaged, less surely those of many things; of others it says 1."""

    capabilities = frozenset({"caption"})

    def __init__(self, questions):
        self.answers = {q.picture.tobytes(): q.answer for q in questions}

    def score_names(self, pictures, names, question="", summed=False):
        assert summed  # only then is a softmax of them a share
        said = self.answers.get(pictures[0].tobytes(), names[0])
        return torch.tensor([[2.0 if name == said else 0.0 for name in names]])

    def generate(self, items, schema):
        said = [self.answers.get(picture.tobytes(), "1") for picture, _ in items]
        values = schema["properties"]["answer"]["enum"]
        return [[json.dumps({"answer": values[0] if int(one) == 4 else int(one)})] for one in said]


def test_an_oracle_counts_and_damage_is_seen():
    result = evaluate(Oracle(counting(60, 4)), "understanding", count=60, most=4)
    assert result["accuracy"] == 1 and result["accuracy_interval"] == [1, 1]
    test = [q for q in counting(60, 4) if part(q.id) == "test"]
    agree = sum((a.answer == b.answer) for a in test for b in test) / len(test) ** 2  # of a picture and any picture
    assert result["accuracy_blind"] == pytest.approx(agree, abs=0.12)  # five permutations of some thirty
    assert result["accuracy_over_blind"] == pytest.approx(1 - result["accuracy_blind"])
    low, high = result["accuracy_over_blind_interval"]
    assert 0.5 < low < result["accuracy_over_blind"] < high < 1
    assert 0.25 <= result["chance_accuracy"] < 0.5
    assert result["answered"] == 1 and result["accuracy_answered"] == 1
    fours, ones = (sum(q.answer == answer for q in test) for answer in ("4", "1"))
    assert result["accuracy_json"] == pytest.approx(1 - fours / len(test))  # it writes 1 for 4
    assert result["json_valid"] == 1
    assert result["accuracy_jpeg_5"] == pytest.approx(ones / len(test))  # only the answer 1 is still right
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
    is_right = torch.tensor([True, True, False, True, False])
    assert threshold(confidence, is_right, 1.0) == pytest.approx(0.8)
    assert threshold(confidence, is_right, 0.75) == pytest.approx(0.6)
    assert threshold(confidence, is_right, 0.6) == pytest.approx(0.5)
    assert threshold(confidence, ~is_right & (confidence < 0), 0.5) == math.inf
    assert refusal(confidence, is_right, 0.65) == {
        "answered": pytest.approx(0.6),
        "accuracy_answered": pytest.approx(2 / 3),
    }
    assert refusal(confidence, is_right, math.inf) == {"answered": 0.0, "accuracy_answered": None}


def test_a_model_is_asked_and_its_curves_are_drawn(bases, tmp_path):
    model = make_model(bases["llama"])
    result = evaluate(model, "understanding", count=20, most=2, out=tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["curves"] == result["curves"]
    schema = {"type": "object", "properties": {"answer": {"type": "integer", "minimum": 1, "maximum": 2}}}
    asked = [q for q in counting(20, 2) if part(q.id) == "test"]
    said = [json.loads(generate(model, [q.picture, q.text], schema=schema)[0])["answer"] for q in asked]
    assert result["accuracy_json"] == sum(a == int(q.answer) for a, q in zip(said, asked, strict=True)) / len(asked)
    drawn = Evaluate(model="none", out=tmp_path / "found.json").plots(result["curves"])
    assert [name for name, _ in drawn] == ["plot of jpeg", "plot of crop", "plot of resolution"]
    assert (tmp_path / "found.jpeg.svg").read_text().count("<circle") == 5


def test_what_is_not_json_is_no_answer():
    class Rambling(Oracle):
        def generate(self, items, schema):
            return [["{" if i % 2 else '{ "answer":9}'] for i in range(len(items))]

    result = evaluate(Rambling(counting(20, 2)), "understanding", count=20, most=2, robustness=False)
    assert result["json_valid"] == result["accuracy_json"] == 0 and result["accuracy"] == 1


def test_two_answers_that_are_equally_likely_are_none():
    questions = counting(3, 3)
    shares = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.6, 0.2], [1 / 3, 1 / 3, 1 / 3]])
    confidence, found = grade(shares, questions, ["1", "2", "3"])
    assert found.tolist() == [False, True, False] and confidence.tolist() == pytest.approx([0.4, 0.6, 1 / 3])


def test_a_picture_of_one_part_is_in_no_other():
    asked, trained = counting(300, 1), counting(2000, 1, seed=5, parts=("train",))  # so many that some come twice
    assert {part(q.id) for q in trained} == {"train"} and len({q.id for q in trained}) < 2000
    assert {q.id for q in asked} == {q.id for q in counting(300, 1)}
    pixels = [{q.picture.tobytes() for q in some} for some in (asked, trained)]
    assert not pixels[0] & pixels[1]
    shares = [sum(part(str(n)) == name for n in range(4000)) / 4000 for name in ("train", "validation", "test")]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.03)


def test_an_interval_is_of_clusters():
    """Of the mean of n zeros and n ones it is 0.5 +- 1.96 / (2 sqrt(n)); copies of an item add nothing to what is known."""
    values = torch.tensor([0.0, 1.0] * 50)
    low, high = interval(values, range(100))
    assert (low, high) == (pytest.approx(0.402, abs=0.015), pytest.approx(0.598, abs=0.015))
    copies = interval(values.repeat_interleave(9), [i // 9 for i in range(900)])
    assert copies == pytest.approx([low, high], abs=1e-9)
    assert interval(torch.ones(8), [0, 0, 1, 1, 2, 2, 3, 3]) is None
    uneven = interval(torch.tensor([1.0] * 30 + [0.0] * 5), [0] * 30 + [1, 2, 3, 4, 5])
    assert uneven[0] == 0 and uneven[1] > 0.9  # a sentence with thirty pictures is still one sentence


def test_nlvr_is_asked_by_sentence_and_parts_share_nothing(assets):
    path = assets / "images" / "nlvr_dev.parquet"
    found = nlvr(path, 60)
    assert len(found) == 60 and {q.answer for q in found} == {"true", "false"}
    assert all(q.picture.size[0] == q.picture.size[1] for q in found)
    assert len({q.text.lower() for q in found}) == 60  # each question of another sentence
    again = [q.text for q in nlvr(path, 60)]
    assert [q.text for q in found] == again != [q.text for q in nlvr(path, 60, seed=1)]
    keys, count = [], 0
    for name in ("train", "validation", "test"):
        asked = nlvr(path, parts=(name,))
        keys.append([{q.id for q in asked}, {q.text.lower() for q in asked}, {boxes(q.picture) for q in asked}])
        count += len(asked)
    assert count == 5934
    for one, other in combinations(keys, 2):
        assert all(one) and not any(a & b for a, b in zip(one, other, strict=True))


def boxes(picture):
    """The three boxes of a question's picture, in whatever order they stand."""
    return tuple(sorted(picture.crop((x, 150, x + 100, 250)).tobytes() for x in (0, 150, 300)))


def test_questions_are_written_to_train_on(assets, tmp_path):
    script = Path(__file__).parents[2] / "runs" / "write_questions.py"
    argv = [sys.executable, str(script), "counting", "-o", str(tmp_path / "c"), "--count", "40", "--most", "2"]
    told = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert told.splitlines()[0].startswith("train: 40 questions") and "1 20, 2 20" in told.splitlines()[0]
    source = open_source(tmp_path / "c" / "train.jsonl")
    assert {e.captions for e in source.examples} == {("1",), ("2",)}
    assert all(part(e.group) == "train" and e.question.startswith("How many ") for e in source.examples)
    assert {part(e.group) for e in open_source(tmp_path / "c" / "test.jsonl").examples} == {"test"}
