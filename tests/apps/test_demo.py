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
from xfusion.data.sources import open_source
from xfusion.modalities.image import ImageModality
from xfusion.training.loop import Interrupted
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
    reporter = demo._Reporter(Console(quiet=True))
    for number in range(3):
        demo._move_aside(tmp_path / "fresh", reporter)
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

    recorder = demo.RecordingModel(Known())
    pictures = recorder.draw(["a", "a", "b"], seeds=[1, 2, 3], size=4)
    assert recorder.drawings[("a", 2)] is pictures[1] and len(recorder.drawings) == 3
    recorder.caption(pictures)
    assert recorder.answers[pictures[2].tobytes()] == "3"
    recorder.score_names(None, ["x", "y"])
    recorder.score_names(pictures, ["x", "y"])
    assert recorder.blind_scores.shape == (1, 2) and len(recorder.name_scores) == 3
    assert recorder.capabilities == Known.capabilities


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
    assert demo._load_shipped(SimpleNamespace(fingerprint="x")) is None
    demo._first_picture(demo._Reporter(Console(force_terminal=False)), None)
    assert "the fresh tower alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rates", "minutes", "pictures", "draw"),
    [
        ((380.0, 200.0), 5.0, 128, 64),
        (
            (18.0, 145.0),
            5.0,
            32,
            16,
        ),  # two cores without AVX-512: 122 steps of 96 samples taught nothing of 128 pictures
        ((18.0, 145.0), 12.0, 128, 64),
        ((380.0, 200.0), 1.0, 16, 16),
        ((1.0, 1.0), 0.1, 16, 16),
    ],
)
def test_a_machine_learns_as_many_pictures_as_it_has_time_for(monkeypatch, rates, minutes, pictures, draw):
    monkeypatch.setattr(demo, "product_rates", lambda: rates)
    assert demo.choose_size(minutes) == (pictures, draw)
    recipe = demo.find(f"{demo.RECIPE}(pictures={pictures}, draw={draw})")()
    mixture = recipe.stages[0].mixture
    assert (recipe.data, mixture.draw, mixture.caption) == (f"emoji:{pictures}", draw, draw // 2)
    assert demo.choose_size(minutes, 100) == (100, 32) and demo.choose_size(minutes, 3) == (3, 16)
    assert demo.minutes_for(128) > demo.minutes_for(32) > demo.COMPILING / 60


def test_facts_of_the_machine_are_json():
    facts = demo.machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["threads"] == torch.get_num_threads() and facts["versions"]["torch"] == torch.__version__
    assert facts["instructions"] == torch.backends.cpu.get_cpu_capability()


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


IDENTITY = {"source": "wheel:w/Base-1B.Q4_1.gguf", "revision": None, "fingerprint": "base"}


class Knower:
    """Draws and names what it was trained on; knows nothing else."""

    capabilities = frozenset({"text", "draw", "caption"})
    num_new_parameters = 3
    guidance = 3.0
    fingerprint = "weights"
    image = ImageModality.Config(patch=4, sizes=(16,)).build()
    backbone = SimpleNamespace(**IDENTITY, identity=IDENTITY)

    def __init__(self, source):
        self.pictures = {e.captions[0]: source.picture(i, 16) for i, e in enumerate(source.examples)}
        self.names = {p.tobytes(): name for name, p in self.pictures.items()}

    def eval(self):
        return self

    def draw(self, prompts, *, seeds=(), size=None, **settings):
        white = Image.new("RGB", (16, 16), "white")
        return [self.pictures.get(p, white) if p != "pizza" else white for p in prompts]

    def caption(self, pictures, **settings):
        return [self.names.get(p.tobytes(), "<b>unknown</b>") for p in pictures]

    def score_names(self, pictures, names, **settings):
        return torch.zeros(1 if pictures is None else len(pictures), len(names))


def trained(recipe, *, out, source, listener, preview_prompts, **settings):
    """Stands for `train`: two previews, forty steps."""
    out.mkdir(parents=True)
    listener({"event": "start", "step": 0, "dtype": "float32", "threads": 1, "pictures": len(source.examples)})
    for step in range(40):
        losses = {"flow_matching": 1 / (1 + step), "next_token": 2 / (1 + step)}
        listener(
            {
                "event": "step",
                "step": step,
                "seconds": 1.0 + step,
                "losses": losses,
                "samples": 8,
                "samples_per_second": 80.0,
            }
        )
        if step in (20, 39):
            path = out / f"{step}.png"
            Image.new("RGB", (16 * len(preview_prompts), 16), "red").save(path)
            listener({"event": "preview", "step": step + 1, "path": str(path), "prompts": list(preview_prompts)})
    listener({"event": "end", "step": 40, "samples": 320, "seconds": 42.0})
    return Knower(source)


PROOF = {"text_identical": True, "checks": [{"name": "logits", "passed": True, "detail": "bit-equal"}]}


@pytest.fixture
def played(monkeypatch):
    """The demo with its slow parts played."""
    backbone = SimpleNamespace(**vars(Knower.backbone), special_tokens=(), num_parameters=7)
    monkeypatch.setattr(demo.Backbone, "load", lambda *a, **k: backbone)
    monkeypatch.setattr(demo, "train", trained)
    monkeypatch.setattr(demo, "verify", lambda model, progress: PROOF)
    monkeypatch.setattr(demo, "quick_proof", lambda model: PROOF | {"quick": True})
    speed = {"samples_per_second": 123.45, "batch": 64, "steps": 20}
    monkeypatch.setattr(demo, "drawing_speed", lambda *a, **k: speed)
    monkeypatch.setattr(demo, "MAX_HELD", 6)
    monkeypatch.setattr(checkpoint, "shipped", list)
    return monkeypatch


def recipe(number):
    return Recipe(data=f"emoji:{number}", stages=(Stage(mixture=MixtureConfig(draw=16, caption=8)),))


@pytest.mark.parametrize("shipped", [False, True])
def test_what_the_demo_writes(played, tmp_path, shipped):
    if shipped:
        played.setattr(demo, "_load_shipped", lambda backbone: Knower(open_source("emoji:20")))
        played.setattr(checkpoint, "find", lambda name: name)
        played.setattr(checkpoint, "read_config", lambda folder: {"training": {"data": "emoji:20"}})
    told = io.StringIO()
    console = Console(file=told, width=100, force_terminal=True, color_system="truecolor")
    out = tmp_path / "demo"
    metrics = demo.run(out, 1.0, console, seed=3, recipe=recipe(20), encoder=Colours())

    assert json.loads((out / "metrics.json").read_text(encoding="utf-8")) == metrics
    assert metrics["text_identical"] is True and metrics["minutes_training"] == 0.7
    assert metrics["joint_samples_per_second"] == 80.0 and metrics["drawing_samples_per_second"] == 123.5
    assert metrics["tokens_per_image"] == 16 and metrics["codec_psnr_db"] == 100.0 and metrics["seed"] == 3
    assert metrics["settings"]["ratio_draw_to_caption"] == 2 and metrics["settings"]["recipe"]["seed"] == 3
    fresh = metrics["fresh"]
    assert set(report.SCORES) <= set(fresh) and fresh["num_concepts"] == 20
    assert fresh["fit_caption_exact"] == 1 and fresh["fit_retrieval_pixel_at_1"] == 0.95
    assert fresh["settings"]["num_held"] == 6 and fresh["held_caption_mrr"] == fresh["held_caption_mrr_blind"]
    assert (metrics["shipped"] is not None) == (metrics["shipped_spot_check"] is not None) == shipped

    page = (out / "report.html").read_text(encoding="utf-8")
    flat = " ".join(page.split())
    # What the page marks are the pictures and answers that were scored.
    assert "95 %" in page and "19 of 20 are nearest" in flat and "20 of 20 answers" in flat
    assert "&lt;b&gt;unknown&lt;/b&gt;" in page and "<b>unknown" not in page
    assert "Base-1B was never shown a picture" in flat and "No claim is made" in flat
    assert (">shipped<" in page) == shipped
    assert "bit-identical to the base" in told.getvalue() and "▀" in told.getvalue()
    assert not list(out.glob(".*"))


def test_a_failed_proof_is_not_hidden(played, tmp_path):
    played.setattr(demo, "verify", lambda model, progress: {**PROOF, "text_identical": False})
    metrics = demo.run(tmp_path / "demo", recipe=recipe(10), encoder=Colours())
    assert metrics["text_identical"] is False
    assert "NOT identical" in (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")


def test_ctrl_c_keeps_what_was_learned(played, tmp_path):
    def interrupted(recipe, *, out, **settings):
        (out / "pack").mkdir(parents=True)
        raise Interrupted("training stopped at step 7; go on with --resume")

    played.setattr(demo, "train", interrupted)
    told = io.StringIO()
    with pytest.raises(Interrupted):
        demo.run(tmp_path, console=Console(file=told, width=200), recipe=recipe(10), encoder=Colours())
    assert (tmp_path / "fresh" / "pack").is_dir() and not (tmp_path / "metrics.json").exists()
    assert "--resume" in told.getvalue()
