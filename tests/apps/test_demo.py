"""The demo's own parts; and, on a tiny base, the whole of it."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console

from xfusion import checkpoint
from xfusion.apps import demo, report
from xfusion.data.mixture import MixtureConfig
from xfusion.training.speed import samples_per_second
from xfusion.training.stages import Recipe, Stage


def test_pictures_in_half_blocks():
    text = demo.half_blocks([Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "white")], 4)
    assert text.plain.splitlines() == ["  ▀▀▀▀  ▀▀▀▀"] * 2
    assert "#ff0000 on #ff0000" in {str(span.style) for span in text.spans}


def test_a_sheet_is_cut_into_its_pictures():
    sheet = Image.new("RGB", (24, 8), "white")
    sheet.paste("red", (8, 0, 16, 8))
    assert [p.getpixel((4, 4)) for p in demo.cut(sheet)] == [(255, 255, 255), (255, 0, 0), (255, 255, 255)]


def test_speed_leaves_the_warm_up_out():
    slow = [{"samples": 10, "samples_per_second": 1.0}] * 3
    fast = [{"samples": 10, "samples_per_second": 100.0}, {"samples": 10, "samples_per_second": 50.0}]
    assert samples_per_second(slow + fast, warm=3) == pytest.approx(20 / 0.3)
    assert samples_per_second(slow, warm=3) is None


def test_the_run_of_before_moves_aside(tmp_path):
    told = demo._Told(Console(quiet=True))
    for number in range(3):
        demo._make_room(tmp_path / "fresh", told)
        (tmp_path / "fresh").mkdir()
        (tmp_path / "fresh" / "number").write_text(str(number))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "fresh.before"]
    assert (tmp_path / "fresh.before" / "number").read_text() == "1"


def test_what_is_asked_is_remembered():
    class Known:
        capabilities = frozenset({"draw"})

        def draw(self, prompts, *, seeds, size):
            return [Image.new("RGB", (size, size), (seed, 0, 0)) for seed in seeds]

        def caption(self, pictures):
            return [str(p.getpixel((0, 0))[0]) for p in pictures]

        def score_names(self, pictures, names):
            return torch.zeros(len(pictures or [None]), len(names))

    asked = demo.Asked(Known())
    pictures = asked.draw(["a", "a", "b"], seeds=[1, 2, 3], size=4)
    assert asked.drawn[("a", 2)] is pictures[1] and len(asked.drawn) == 3
    asked.caption(pictures)
    assert asked.said[pictures[2].tobytes()] == "3"
    asked.score_names(None, ["x", "y"])
    asked.score_names(pictures, ["x", "y"])
    assert asked.alone.shape == (1, 2) and len(asked.given) == 3
    assert asked.capabilities == Known.capabilities


@pytest.mark.parametrize("scores", [None, {"fit_caption_exact": 0.9, "num_concepts": 1746, "settings": {}}])
def test_scores_of_the_shipped_pack_say_where_they_are_from(monkeypatch, scores):
    monkeypatch.setattr(checkpoint, "find", lambda name: name)
    monkeypatch.setattr(checkpoint, "read_config", lambda folder: {"scores": scores} if scores else {})
    check = {"num_concepts": 1746, "fit_caption_exact": 0.8, "settings": {"num_captioned": 128}}
    found = demo._shipped_scores(check)
    assert found is not None and set(report.SCORES) <= set(found)
    assert (found["how"].startswith("committed"), found["fit_caption_exact"]) == (
        (True, 0.9) if scores else (False, 0.8)
    )
    assert demo._shipped_scores(None) is None


def test_no_shipped_pack_is_no_hindrance(monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "shipped", list)
    assert demo._shipped(SimpleNamespace(fingerprint="x")) is None
    demo._first_picture(demo._Told(Console(force_terminal=False)), None)
    assert "the fresh tower alone" in capsys.readouterr().out


def test_facts_of_the_machine_are_json():
    facts = demo.machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["threads"] == torch.get_num_threads() and facts["versions"]["torch"] == torch.__version__


class Colours:
    """Looks at mean colours: no network is needed."""

    def features(self, images):
        return images.mean(dim=(2, 3)) + 1e-3


def tiny_recipe(base):
    from contracts.table import model_config

    mixture = MixtureConfig(draw=4, caption=4, pack=2)
    return Recipe(model=model_config(base), data="emoji:10", stages=(Stage(mixture=mixture, warmup=2),))


@pytest.mark.full
def test_the_whole_demo_on_a_tiny_base(bases, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "shipped", list)
    monkeypatch.setattr(demo, "MAX_HELD", 4)
    told, out = io.StringIO(), tmp_path / "demo"
    console = Console(file=told, width=100, force_terminal=True, color_system="truecolor")
    metrics = demo.run(out, 0.05, console, recipe=tiny_recipe(bases["llama"]), encoder=Colours())
    assert "bit-identical to the base" in told.getvalue() and "▀" in told.getvalue()
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8")) == metrics
    assert metrics["text_identical"] is True and metrics["shipped"] is None
    assert metrics["minutes_training"] > 0 and metrics["drawing_samples_per_second"] > 0
    assert metrics["settings"]["ratio_draw_to_caption"] == 1 and metrics["tokens_per_image"] == 16
    fresh = metrics["fresh"]
    assert set(report.SCORES) <= set(fresh) and fresh["num_concepts"] == 10
    page = (out / "report.html").read_text(encoding="utf-8")
    assert f"{fresh['num_concepts']} drawings are nearest" in page and "is bit-identical" in page
    # The pictures on the page are those that were scored: their marks add up to the score.
    hits = round(fresh["fit_retrieval_pixel_at_1"] * 10)
    assert f"{hits} of 10 are nearest" in " ".join(page.split())
    right = round(fresh["fit_caption_exact"] * 10)
    assert f"{right} of 10 answers are one of" in page
    assert (out / "fresh" / "pack" / "model.safetensors").is_file()
    assert not list(out.glob(".*"))
    # And once more: the first run moves aside.
    demo.run(out, 0.05, None, recipe=tiny_recipe(bases["llama"]), encoder=Colours())
    assert (out / "fresh.before" / "pack").is_dir()
