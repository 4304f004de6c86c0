"""The speed of drawing alone, measured through the training loop."""

import pytest
from contracts.table import model_config

from xfusion.data.mixture import MixtureConfig
from xfusion.data.sequence import XFusionError
from xfusion.training.speed import drawing_speed
from xfusion.training.stages import Recipe, Stage


def recipe(base, **mixture):
    return Recipe(model=model_config(base), data="emoji:6", stages=(Stage(mixture=MixtureConfig(**mixture)),))


def test_drawing_alone_is_measured(bases, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    base = bases["llama"]
    speed = drawing_speed(recipe(base, draw=3, caption=4, pack=2), backbone=base, steps=2, compile=False)
    assert speed["samples_per_second"] > 0
    assert speed | {"samples_per_second": None} == {"samples_per_second": None, "batch": 3, "steps": 2}
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_what_does_not_draw_has_no_speed(bases):
    with pytest.raises(XFusionError, match="draw 0"):
        drawing_speed(recipe(bases["llama"], draw=0, caption=4, pack=2), backbone=bases["llama"])
