"""`xfusion compare` as people meet it: the verb, its table, its page."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from contracts.table import Noise, make_base

from xfusion.apps import cli, comparison_page, plots
from xfusion.apps.commands.compare import Compare, summary_text
from xfusion.comparison import run as walk
from xfusion.comparison.table import contributions
from xfusion.data.sequence import XFusionError
from xfusion.evaluation import verify
from xfusion.recipes.base import find

RECIPES = """
from __future__ import annotations
from dataclasses import dataclass
from xfusion.fusion.dual_tower import DualTower
from xfusion.modalities.image import ImageModality
from xfusion.recipes.xfusion import xfusion

@dataclass(frozen=True, kw_only=True)
class Mine(DualTower.Config):
    twist: int = 0

def plain():
    fusion, image = DualTower.Config(stride=2, mlp=40), ImageModality.Config(patch=4, sizes=(16,))
    return xfusion().with_model(fusion=fusion, image=image)

def twisted():
    return plain().with_model(fusion=Mine(stride=2, mlp=24))
"""


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return make_base("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with recipes and captioned pictures."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(RECIPES)
    noise, folder = Noise(8), tmp_path / "photos"
    folder.mkdir()
    for i, example in enumerate(noise.examples):
        noise.picture(i, 32).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(example.captions[0] if i else "<script>alert(1)</script>")
    return tmp_path


@pytest.fixture
def start(here, base, capsys, monkeypatch):
    """Call the command line: exit status, stdout, stderr."""
    monkeypatch.setattr(verify, "PROMPTS", verify.PROMPTS[:3])

    def call(*argv, small=True, samples=24):
        options = ["--backbone", str(base), "--data", "photos", "--no-compile", "--draw", "8", "--caption", "4"]
        options += ["--samples", str(samples), "--set", "features=false", "steps=2", "max_drawn=4", "max_captioned=2"]
        capsys.readouterr()
        code = cli.main(["compare", *argv, *(options if small else [])])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_two_recipes_of_a_file(start, here, base):
    code, out, err = start("mine.py:plain", "mine.py:twisted", "--seeds", "2", "--out", "comparison/own", "--json")
    assert code == 0 and out.count("\n") == 1
    found = json.loads(out)
    assert found["recipes"] == ["plain", "twisted"] and found["first"] == "plain" and found["seeds"] == [0, 1]
    folder = Path("comparison/own")
    names = {f"{r}-seed{s}.{kind}" for r in ("plain", "twisted") for s in (0, 1) for kind in ("json", "png")}
    assert {p.name for p in folder.iterdir()} == names | {"comparison.json", "real.png", "index.html"}
    assert "n < 5: no interval" in err and "bit-identical to the base's in 2 of 2 runs, as declared" in err
    again = json.loads((folder / "comparison.json").read_text())["command"]
    assert again.startswith("xfusion compare mine.py:plain mine.py:twisted --samples 24 --seeds 2 --out comparison/own")
    assert f"--backbone {base.name} " in again and "--no-compile" in again and str(base) not in again
    page = (folder / "index.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page), "nothing is fetched"
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png") == 8 * 3 + 8 * 3, "real pictures and both recipes', for each seed"
    assert "twisted" in page and "Make it again" in page and "no interval" in page
    styles, body = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL)), page.rpartition("</style>")[2]
    for name in ("plots", "card", "chip", "strips", "scroll", "num"):
        assert f".{name}" in styles and re.search(rf'class="?[^">]*\b{name}\b', body), f"{name} has no style, or no use"
    code, _, err = start("mine.py:plain", "mine.py:twisted", "--seeds", "2", "--out", "comparison/own", samples=36)
    assert code == 2 and "plain-seed0.json was made with" in err and err.count("\n") == 1
    (folder / "index.html").unlink()
    code, out, _ = start("--out", "comparison/own", small=False)
    assert code == 0 and "page: comparison/own/index.html" in out
    assert (folder / "index.html").read_text() == page


def test_stopped_in_a_mechanism_of_ones_own_and_gone_on_with(start, here, monkeypatch):
    """The half-trained run names a class of the user's file; the same command goes on with it."""
    real = walk.train

    def stopping(recipe, *, listener, **settings):
        def listen(event):
            listener(event)
            if event["event"] == "step" and event["step"] == 0 and recipe.seed == 0 and "Mine" in repr(recipe):
                raise KeyboardInterrupt

        return real(recipe, listener=listen, **settings)

    monkeypatch.setattr(walk, "train", stopping)
    argv = ("mine.py:twisted", "--seeds", "1", "--out", "comparison/own")
    code, out, err = start(*argv)
    assert code == 130 and out == ""
    assert "training stopped at step 1; the same command goes on" in err and "--resume" not in err
    monkeypatch.setattr(walk, "train", real)
    assert start(*argv)[0] == 0
    assert json.loads(Path("comparison/own/twisted-seed0.json").read_text())["budget"]["steps"] == [2]


def test_training_says_how_to_use_a_mechanism_of_ones_own(here, base, capsys):
    """The pack names a class of the file: Python has to find it, and it has to be trusted."""
    settings = ["--model.backbone.source", str(base), "--data", "photos", "--steps", "1", "--no-compile"]
    settings += ["--preview-every", "0", "--stages.0.mixture.draw", "4", "--stages.0.mixture.caption", "4"]
    for name, command in (("twisted", "PYTHONPATH=. {} --trust"), ("plain", "{}")):
        assert cli.main(["train", f"mine.py:{name}", *settings]) == 0
        use = command.format(f'xfusion generate runs/{name}/pack "..."')
        assert f"try     {use}\n" in capsys.readouterr().out
    assert cli.main(["train", "mine.py:plain", "--resume", "-o", "runs/plain"]) == 0
    assert "losses  no step was left to take\n" in capsys.readouterr().out


def test_a_file_is_one_module_until_it_changes(here):
    one, two = find("mine.py:plain"), find("mine.py:twisted")
    assert one.__globals__ is two.__globals__ is vars(sys.modules["mine"])
    Path("mine.py").write_text(RECIPES.replace("mlp=24", "mlp=16"))
    assert find("mine.py:twisted")().model.fusion.mlp == 16, "within the second, at the same length"
    assert not Path("__pycache__").exists(), "nothing is left beside a user's file"


def test_a_file_with_the_name_of_a_module_is_refused(here):
    """Who imports the module later would get the file, as `data/emoji.py` would by an `emoji.py` of somebody's own."""
    known = set(sys.modules)
    for name in ("json", "tabnanny"):  # imported already, and not yet
        Path(f"{name}.py").write_text("def plain():\n    return 1\n")
        message = rf"recipe '{name}.py:plain': there is a module '{name}' already, .*: rename the file"
        with pytest.raises(XFusionError, match=message):
            find(f"{name}.py:plain")
    assert sys.modules["json"] is json and "tabnanny" not in set(sys.modules) - known
    Path("a.folder").mkdir()
    for place in ("mine.py", "a.folder/mine.py", "a.folder/json.mine.py"):
        Path(place).write_text(f"def plain():\n    return {place!r}\n")
        assert find(f"{place}:plain")() == place, "two files of one name take it one after the other"


def test_bad_input_is_one_line(start):
    for argv, message in (
        ((), "name recipes, or a folder of results with --out"),
        (("xfusio",), "did you mean 'xfusion'?"),
        (("mine.py:plain", "--seeds", "0"), "--seeds 0: at least 1"),
        (("mine.py:plain", "--trials", "7"), "trials 7: from 1"),
        (
            ("mine.py:plain", "--trials", "2", "--choose-by", "held_f1"),
            "choose by 'held_f1', which is no score of pictures",
        ),
        (("mine.py:plain", "--choose-by", "held_caption_f1"), "choose_by held_caption_f1: one trial leaves nothing"),
        (("mine.py:plain", "--share", "half"), "--share: cannot read 'half'; see xfusion compare --help"),
        (("mine.py:plain", "--share", "2.0"), "shares [2.0]: above 0 and up to 1"),
        (("mine.py:plain", "--device", "abacus"), "device 'abacus' is not one of"),
        (("mine.py",), "'mine.py' names no function: write mine.py:FUNCTION"),
        (("mine.py:plain", "xfusion"), "differ in model.image.sizes.0: 16 and 32"),
        (("--out", "nowhere"), "nowhere holds no result of a comparison"),
    ):
        small = argv != () and argv[0] != "--out"
        code, out, err = start(*argv, small=small)
        assert (code, out) == (2, ""), argv
        assert message in err and err.count("\n") == 1, err


def test_the_command_says_what_was_asked():
    verb = Compare(recipes=("one", "/home/someone/file.py:two"), share=(0.1, 1.0), compile=False, match_parameters=True)
    assert verb.command() == "xfusion compare one file.py:two --share 0.1 1 --match-parameters --no-compile"
    assert verb.folder() == Path("comparison/one-two")
    again = cli.read(verb.command().split()[1:])
    assert isinstance(again, Compare) and again.share == (0.1, 1.0) and again.match_parameters and not again.compile


# ----------------------------------------------------------------------------------------------------------- the page


def score(low, high, **more):
    rows = [
        {
            "recipe": "one",
            "num_runs": 2,
            "mean": 0.25,
            "interval": None,
            "values": {"0": low, "1": high},
            "difference": None,
        }
    ]
    return {"score": "s", "title": "a score", "better": "higher", "share": 1.0, "rows": rows, **more}


def test_dots_stand_where_their_values_are():
    drawn = plots.dots(score(0.0, 1.0, chance=0.5), lambda _: "#123456")
    # 0 to 1 lies between x = 118 and x = 400.
    large = re.findall(r'<circle cx="([\d.]+)" cy="[\d.]+" r="5.5"', drawn)
    small = re.findall(r'<circle cx="([\d.]+)" cy="[\d.]+" r="2.8"', drawn)
    assert [float(v) for v in large] == [pytest.approx(118 + 282 * 0.25, abs=0.06)]
    assert [float(v) for v in small] == [118, 400]
    assert re.search(r'class="beside" x1="259.0"', drawn) and ">chance</text>" in drawn
    assert 'stroke-width="3"' not in drawn, "no interval, no bar"
    many = score(0.0, 1.0)
    many["rows"][0]["interval"] = [0.5, 0.75]
    bar = re.search(r'<line x1="([\d.]+)" x2="([\d.]+)"[^>]*stroke-width="3"', plots.dots(many, lambda _: "#1"))
    assert (float(bar[1]), float(bar[2])) == (pytest.approx(259, abs=0.06), pytest.approx(329.5, abs=0.06))


def test_recipes_that_a_number_tells_apart_are_points_of_one_line():
    labels = ["batch_32", "batch_8", "batch_128"]
    assert plots.numbered(labels) == ("batch", {"batch_32": 32, "batch_8": 8, "batch_128": 128})
    assert plots.numbered(["rate_0.5", "rate_1", "rate_2.5"])[1]["rate_2.5"] == 2.5
    for others in (labels[:2], [*labels, "xfusion"], [*labels, "rate_3"], [*labels, "batch_0"]):
        assert plots.numbered(others) is None
    found = score(0.0, 1.0, chance=0.5)
    (row,) = found["rows"]
    found["rows"] = [row | {"recipe": name, "mean": mean} for name, mean in zip(labels, (0.5, 0.25, 1.0), strict=True)]
    found["rows"][0]["interval"] = [0.25, 0.75]
    drawn = plots.over_numbers(found, *plots.numbered(labels))
    (line,) = re.findall(r'<polyline[^>]*points="([^"]*)"', drawn)
    (x8, y8), (x32, y32), (x128, y128) = (map(float, point.split(",")) for point in line.split())
    # By logarithms, whatever the order of the recipes.
    assert x32 - x8 == pytest.approx(x128 - x32, abs=0.11) and x32 > x8
    assert (y8, y32, y128) == (pytest.approx(160, abs=0.1), pytest.approx(110, abs=0.1), 10)  # 1 is at 10 and 0 at 210
    bars = re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)" y2="([\d.]+)"[^>]*stroke-width="3"', drawn)
    assert [tuple(map(float, bar)) for bar in bars] == [(x32, x32, 160, 60)]
    assert drawn.count('r="2.8"') == 6 and all(f">{n}</text>" in drawn for n in (8, 32, 128, "batch", "chance"))


def test_shares_of_a_folder_are_means_and_bars_begin_at_zero(tmp_path):
    for name, value in (("a", 0.2), ("b", -0.4)):
        found = {"share_layer5_word": value, "share_layer15_begin_of_picture": 0.5, "settings": {}}
        (tmp_path / f"shares-{name}.json").write_text(json.dumps(found))
    means = contributions(tmp_path)
    assert means == {"layer 5": {"word": pytest.approx(-0.1)}, "layer 15": {"begin of picture": 0.5}}
    assert contributions(tmp_path / "none") == {}
    drawn = plots.bars(means, "share")
    rects = [tuple(map(float, r)) for r in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)]
    (zero,) = re.findall(r'<line class="zero" x1="([\d.]+)"', drawn)
    (x1, w1), (x2, w2) = rects
    assert x1 + w1 == pytest.approx(float(zero), abs=0.2) and x2 == pytest.approx(float(zero), abs=0.2)
    assert w2 / w1 == pytest.approx(5, rel=0.02)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0], [-3e-7, 2e-7], [0.31, 0.74], [12.0, 5310.0]])
def test_an_axis_holds_its_values(values):
    low, high, ticks = plots._axis(values)
    assert low <= min(values) and max(values) <= high and low < high
    assert 2 <= len(ticks) <= 7
    assert ticks == sorted(ticks) and ticks[0] == pytest.approx(low) and ticks[-1] == pytest.approx(high)


def test_a_decided_and_an_open_difference_read_differently():
    decided = {"mean": 0.2, "interval": [0.1, 0.3], "verdict": "better", "seeds_needed": 5}
    still_open = {"mean": -0.1, "interval": None, "verdict": "not decidable", "seeds_needed": 44}
    row = {"recipe": "two", "num_runs": 5, "mean": 0.5, "interval": [0.4, 0.6]}
    assert 'class="better">better' in comparison_page._cell(row | {"difference": decided})
    untuned = decided | {"verdict": "better, untuned"}
    assert 'class="better">better, untuned' in comparison_page._cell(row | {"difference": untuned})
    assert "44 seeds would find" in comparison_page._cell(row | {"difference": still_open})
    table = {
        "recipes": ["two"],
        "called": {"two": "two(rank=2)"},
        "scores": [score(0, 1) | {"rows": [row | {"difference": decided}, row | {"difference": still_open}]}],
        "cost": [],
        "text": {"two": {"declared": True, "bit_equal": 4, "num_runs": 5}},
        "notes": ["a note"],
    }
    said = summary_text(table)
    assert "  two(rank=2)  0.5 [0.4, 0.6], n = 5" in said
    assert "+0.2 [0.1, 0.3]: better" in said and "-0.1: not decidable; 44 seeds" in said
    assert "changed in 1 of 5 runs, ALTHOUGH IT IS DECLARED" in said and "- a note" in said
