"""Where things stand: an oracle finds them, one that does not look is at chance, and what is asked is what was drawn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from contracts.table import make_model

from xfusion.data.boxes import Box, boxes_of
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import open_source
from xfusion.evaluation.run import evaluate
from xfusion.evaluation.suites.grounding import COLOURS, SIDE, drawn_scenes, nlvr_scenes
from xfusion.evaluation.suites.understanding import part


class Oracle:
    """Knows the boxes of pictures by their names; of a name that a picture has not it says its first thing's."""

    capabilities = frozenset({"caption"})

    def __init__(self, scenes, said=lambda box: box.text()):
        self.said = said
        self.boxes = {}
        for scene in scenes:
            self.boxes.setdefault(scene.picture.tobytes(), {})[scene.question] = scene.box

    def generate(self, items, max_tokens):
        found = []
        for picture, question in items:
            boxes = self.boxes[picture.tobytes()]
            found.append([self.said(boxes.get(question, next(iter(boxes.values()))))])
        return found


def test_an_oracle_finds_all_and_the_blind_rate_is_far_below():
    scenes = drawn_scenes(60, 2)
    result = evaluate(Oracle(scenes), "grounding", count=60)
    assert result["hit"] == 1 and result["overlap"] > 0.96 and result["valid"] == 1 and result["named"] == 1
    assert result["named_chance"] == 0.5 and result["settings"]["num_with_others"] == 30
    assert result["hit_blind"] < 0.2 and result["chance_hit"] < 0.35 and 0 < result["overlap_blind"] < 0.3
    assert result["hit_over_blind"] == pytest.approx(1 - result["hit_blind"])
    low, high = result["hit_over_blind_interval"]
    assert 0.7 < low <= result["hit_over_blind"] <= high <= 1
    sizes = [x for x, _ in result["curves"]["hit_by_size"]]
    assert sizes == sorted(sizes) and 0.24 < sizes[0] < sizes[-1] < 0.44


def test_the_wrong_thing_and_what_is_no_box_are_told_apart():
    scenes = drawn_scenes(30, 2)
    others = {scene.box: scene.others[0] for scene in scenes if scene.others}
    result = evaluate(Oracle(scenes, lambda box: others.get(box, box).text()), "grounding", count=30)
    assert result["hit"] == 0.5 and result["named"] == 0 and result["valid"] == 1
    for said in ("nowhere", "<box>(1,2),(3,4)</box><box>(1,2),(3,4)</box>", "<box>(7,7),(3,4)</box>"):
        result = evaluate(Oracle(scenes, lambda _, said=said: said), "grounding", count=30)
        assert result["valid"] == result["hit"] == result["overlap"] == result["named"] == 0


def test_one_answer_for_all_is_no_better_than_the_best_box():
    scenes = drawn_scenes(40, 1, seed=4)
    middle = Box(0.33, 0.33, 0.67, 0.67)
    result = evaluate(Oracle(scenes, lambda _: middle.text()), "grounding", count=40, most=1, seed=4)
    assert result["hit"] == result["hit_blind"] <= result["chance_hit"] and result["named"] is None
    assert result["overlap"] == pytest.approx(result["overlap_blind"])
    assert result["hit_over_blind_interval"] == [0, 0]


def test_what_is_drawn_stands_where_it_is_said():
    """The asked thing's colour has pixels up to each edge of its box; no two things have one name or touch."""
    for scene in drawn_scenes(24, 3, seed=2):
        left, top, right, bottom = map(round, scene.box.pixels((SIDE, SIDE)))
        found = scene.picture.load()
        wanted = COLOURS[scene.name.split()[0]]
        inside = [(x, y) for x in range(left, right) for y in range(top, bottom) if found[x, y] == wanted]
        edges = (
            min(x for x, _ in inside),
            min(y for _, y in inside),
            max(x for x, _ in inside),
            max(y for _, y in inside),
        )
        assert edges == (left, top, right - 1, bottom - 1)
        around = {(x, y) for x in range(left - 1, right + 1) for y in (top - 1, bottom)}
        around |= {(x, y) for x in (left - 1, right) for y in range(top, bottom)}
        assert {found[place] for place in around} == {(255, 255, 255)}
        shape = scene.name.split()[1]
        share = len(inside) / ((right - left) * (bottom - top))
        assert share == pytest.approx({"disc": 0.785, "square": 1.0, "triangle": 0.5}[shape], abs=0.06)
        assert boxes_of(scene.answer)[0][1].left == pytest.approx(scene.box.left, abs=0.0011)
    with pytest.raises(XFusionError, match="from 1 to 3 things fit"):
        drawn_scenes(1, 4)


def test_parts_share_no_scene():
    parts = {name: drawn_scenes(40, 2, seed=1, parts=(name,)) for name in ("train", "validation", "test")}
    assert all({part(scene.id) for scene in scenes} == {name} for name, scenes in parts.items())
    assert (
        [s.answer for s in drawn_scenes(5, 2)]
        == [s.answer for s in drawn_scenes(5, 2)]
        != [s.answer for s in drawn_scenes(5, 2, seed=1)]
    )


def test_nlvr_is_asked_for_what_it_places(assets):
    path = assets / "images" / "nlvr_dev.parquet"
    scenes = nlvr_scenes(path, parts=("train", "test"))
    parts = {name: [scene for scene in scenes if part(scene.id) == name] for name in ("train", "test")}
    assert not {s.picture.tobytes() for s in parts["train"]} & {s.picture.tobytes() for s in parts["test"]}
    assert len(parts["test"]) > 150 and len(parts["train"]) + len(parts["test"]) == len(scenes)
    colours = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
    for scene in parts["test"][:40]:
        left, top, right, bottom = map(round, scene.box.pixels(scene.picture.size))
        seen = scene.picture.crop((left, top, right, bottom))
        middle, lowest = (
            seen.getpixel((seen.width // 2, seen.height // 2)),
            seen.getpixel((seen.width // 2, seen.height - 2)),
        )
        assert middle == lowest == colours[scene.name.split()[0]]
    result = evaluate(Oracle(parts["test"]), "grounding", things="nlvr", source=str(path), count=20)
    assert result["hit"] == 1 and result["overlap"] > 0.98 and result["settings"]["source"] == "nlvr_dev.parquet"


def test_a_model_is_asked(bases):
    model = make_model(bases["llama"])
    result = evaluate(model, "grounding", count=4, most=1)
    scenes = drawn_scenes(4, 1)
    texts = [model.generate([scene.picture, scene.question], max_tokens=40)[0] for scene in scenes]
    assert result["valid"] == sum("</box>" in text for text in texts) / 4
    with pytest.raises(XFusionError, match="drawn has none, nlvr a parquet file"):
        evaluate(model, "grounding", things="nlvr")
    drawing = Oracle([])
    drawing.capabilities = frozenset({"draw"})
    with pytest.raises(XFusionError, match="asks where things are in pictures, but the model can only do: draw"):
        evaluate(drawing, "grounding")


def test_boxes_are_written_to_train_on(tmp_path):
    script = Path(__file__).parents[2] / "runs" / "write_questions.py"
    argv = [sys.executable, str(script), "boxes", "-o", str(tmp_path / "b"), "--count", "20"]
    told = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert told.splitlines()[0].startswith("train: 20 questions, 20 ids")
    source = open_source(tmp_path / "b" / "train.jsonl")
    line = json.loads((tmp_path / "b" / "train.jsonl").read_text().splitlines()[0])
    scene = drawn_scenes(1, 2, parts=("train",))[0]
    assert (line["question"], line["caption"]) == (f"<ref>{scene.name}</ref>", scene.box.text())
    assert all(part(e.group) == "train" and len(boxes_of(e.captions[0])) == 1 for e in source.examples)
