"""The page of comparisons says what the committed results say, and shows what they drew."""

import copy
import importlib.util
import json
import re
import statistics
import sys
from pathlib import Path

import pytest
from PIL import Image

from xfusion.recipes.base import names

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
FOLDERS = sorted(path for path in (ROOT / "comparison").glob("*") if list(path.glob("*-seed*.json")))


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


overview, grids = script("overview"), script("grids")


def table(text):
    """Rows of the table of all systems, as cells by head."""
    lines = text.partition("## All systems")[2].partition("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, _, *rest = cells
    return [dict(zip(head, row, strict=True)) for row in rest if any(row[1:])]


def link(cell):
    """What a cell shows and where it leads."""
    return re.match(r"\[([^]]+)\]\(([^)]+)\)(?: `\([^`]+\)`)?(?: as `([^`]+)`)?", cell).groups()


def results(folder, label):
    paths = sorted(folder.glob(f"{label}-seed*.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [run for run in runs if run["settings"]["share"] == 1]


def test_the_page_is_that_of_the_files():
    wanted = "\n".join([*overview.overview(FOLDERS), *overview.contents(FOLDERS)])
    assert wanted in PAGE, "run: python docs/pages.py comparison"


def test_every_recipe_with_a_result_has_a_row():
    shown = {link(row["system"])[0] for row in table(PAGE)}
    for folder in FOLDERS:
        command = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["command"]
        labels = {json.loads(path.read_text())["recipe"] for path in folder.glob("*-seed*.json")}
        for label in labels:  # as LABEL=RECIPE(...), or by the recipe's own name
            given = re.search(rf"(?<![\w.]){re.escape(label)}=(\w+)", command)
            assert (given[1] if given else label) in shown, f"{folder.name}: {label}"
        assert f"\n## {folder.name}\n" in PAGE and f"- [{folder.name}](#{folder.name}): " in PAGE
    listed = PAGE.partition("In no comparison yet")[2].partition("\n")[0]
    absent = set(re.findall(r"\[(\w+)\]", listed))
    assert absent | shown >= set(names()) and not absent & shown


@pytest.mark.parametrize(
    "row", table(PAGE), ids=lambda row: "-".join(link(row[k])[0] for k in ("system", "comparison"))
)
def test_figures_are_those_of_the_files(row):
    recipe, _, variant = link(row["system"])
    runs = results(ROOT / "comparison" / link(row["comparison"])[0], variant or recipe)
    assert row["comparison"].replace("\u00a0", " ").endswith("**one run**" if len(runs) == 1 else f"{len(runs)} runs")

    def mean(name):
        return f"{statistics.fmean(run['scores'][name] for run in runs):.2f}"

    for cell, plain in ((row["names"], "caption_exact"), (row["draws"], "retrieval_pixel_at_1")):
        if cell == "-":
            continue
        value, bracket, about = re.match(r"([\d.]+) \((.+?)\)<br>(.+)", cell.replace("\u00a0", " ")).groups()
        assert (" to " in bracket) == (len(runs) >= 5)
        part = "held_" if "**unseen**" in about else "fit_" if "*memory*" in about else ""
        assert part == "held_" or not any(name == f"held_{plain}" for name in runs[0]["scores"])
        if runs[0]["scored"]["suite"] == "emoji":
            score = f"{part}{'caption_at_1' if 'ranked first' in about else plain}"
            assert value == mean(score)
            for word, key in (
                ("blind", f"{score}_blind"),
                ("chance", f"chance_{score}"),
                ("ceiling", f"ceiling_{score}"),
            ):
                assert re.findall(rf"{word} ([\d.]+)", about) in ([], [mean(key)] if key in runs[0]["scores"] else [])
            assert "blind" in about or "chance" in about
        else:
            assert value in {mean(name) for name, found in runs[0]["scores"].items() if isinstance(found, float)}
    cost = runs[0]["cost"]
    assert re.findall(r"^[\d.]+|(?<=<br>)[\d.]+(?=\u00a0to|\u00a0per)", row["GFLOPs"]) == [
        f"{value / 1e9:.2f}" for value in cost["flops_per_sample"].values()
    ]
    assert row["trained"] == f"{cost['trainable_parameters'] / 1e6:.1f}\u00a0M"
    kept = all(run["scores"]["text_bit_equal"] for run in runs)
    assert row["text"].startswith("bit-identical") == kept
    if not kept:
        change = statistics.fmean(run["scores"]["text_perplexity_change"] for run in runs)
        assert row["text"].startswith(f"perplexity {change:+.1f}")
    assert (runs[0].get("regime") in (None, "strictly frozen")) == ("regime" not in row["text"])


def test_a_system_of_one_data_set_has_one_row():
    found = overview.rows(FOLDERS)
    assert len({row.setting for row in found}) == len(found) == len(table(PAGE))
    known = ("four_layers", "four_layers_tuned", "noise_caps", "rates", "towers")
    found = overview.rows([ROOT / "comparison" / name for name in known])
    towers = {row.folder for row in found if row.recipe == "xfusion"}
    assert towers == {"towers", "four_layers_tuned"}, "noise_caps has fewer samples"
    single = {row.folder for row in found if row.recipe == "single_tower"}
    assert single == {"four_layers", "four_layers_tuned"}, "in rates it has other rates than its own"


def test_figures_stand_under_the_arguments_that_they_are_of():
    systems = [row["system"] for row in table(PAGE)]
    assert any(s.startswith("[dall_e](recipes/dall_e.md) `(rank=16)`<br>") for s in systems)
    part = PAGE.partition("\n## tokens\n")[2].partition("\n## ")[0]
    assert re.search(r"^\| dall_e\(rank=16\) \| 0\.93", part, re.MULTILINE) and "\n| dall_e |" not in part


def test_a_verdict_without_equal_trials_says_so():
    seen = set()
    for folder in FOLDERS:
        part = PAGE.partition(f"\n## {folder.name}\n")[2].partition("\n## ")[0]
        runs = [json.loads(path.read_text()) for path in folder.glob("*-seed*.json")]
        trials = {run["settings"]["tuning"]["trials"] for run in runs}
        marks = set(re.findall(r"\| (?:better|worse)(, untuned)? \|", part))
        assert marks <= {"" if min(trials) > 1 else ", untuned"}, folder.name
        seen |= marks
    assert ", untuned" in seen


def write(folder, runs, command):
    folder.mkdir(parents=True)
    for run in runs:
        (folder / f"{run['recipe']}-seed{run['seed']}.json").write_text(json.dumps(run))
    (folder / "comparison.json").write_text(json.dumps({"command": command, "recipes": [runs[0]["recipe"]]}))


def test_new_folders_appear_by_themselves(tmp_path):
    (pattern,) = results(ROOT / "comparison" / "readers", "lora")
    sound = copy.deepcopy(pattern) | {"recipe": "heard"}
    model = sound["settings"]["recipe"]["model"]
    model["audio"] = model["image"]
    sound["settings"]["data"] = "digits/train.jsonl"
    sound["scored"]["suite"] = "sounds"
    sound["scores"] = {"fit_exact": 1.0, "held_at_1": 0.5, "held_exact": 0.75, "held_exact_blind": 0.125} | {
        "text_bit_equal": False,
        "text_perplexity_change": 2.0,
    }
    write(tmp_path / "sounds", [sound], "xfusion compare 'heard=slm(stride=2)' --samples 10")
    other = sound | {"recipe": "slm", "scored": {"suite": "new"}, "scores": {"fit_new": 0.5, "held_new": 0.25}}
    write(tmp_path / "other", [other], "xfusion compare slm --samples 10")
    new, heard = table("\n".join(overview.overview([tmp_path / "sounds", tmp_path / "other"])).replace("\u00a0", " "))
    assert heard["system"] == "[slm](recipes/slm.md) `(stride=2)` as `heard`<br>sound → words"
    assert heard["names"] == "0.75 (one run)<br>**unseen**, blind 0.12"
    assert heard["text"] == "perplexity +2.0<br>regime: LoRA"
    assert heard["comparison"] == "[sounds](#sounds)<br>**one run**"
    assert new["names"] == "0.25 (one run)<br>**unseen**, `held_new`" and new["text"].startswith("not measured")
    sound["scores"] |= {
        "held_word_errors": 0.5,
        "held_word_errors_blind": 1.25,
    }  # of sentences, of which few are all right
    write(tmp_path / "speech", [sound], "xfusion compare 'heard=slm(stride=2)' --samples 10")
    (heard,) = table("\n".join(overview.overview([tmp_path / "speech"])).replace("\u00a0", " "))
    assert heard["names"] == "0.50 (one run)<br>**unseen**, word errors, blind 1.25"


@pytest.mark.parametrize(
    ("held", "more_runs", "wanted"), [(True, False, "first"), (False, False, "second"), (False, True, "first")]
)
def test_unseen_items_come_before_runs_and_runs_before_names(held, more_runs, wanted, tmp_path):
    runs = results(ROOT / "comparison" / "kinds", "blip2")
    memory = [copy.deepcopy(run) for run in runs[:2]]
    for run in memory:
        run["scores"] = {key: value for key, value in run["scores"].items() if "held" not in key}
    first = runs[:1] if held else memory if more_runs else memory[:1]
    write(tmp_path / "first", first, "xfusion compare blip2 --samples 10")
    write(tmp_path / "second", memory[:2] if held else memory[:1], "xfusion compare blip2 --samples 10")
    (row,) = overview.rows([tmp_path / "first", tmp_path / "second"])
    assert row.folder == wanted


def test_every_comparison_that_drew_shows_its_drawings():
    for folder in FOLDERS:
        part = PAGE.partition(f"\n## {folder.name}\n")[2].partition("\n## ")[0]
        plan = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        drawn = [label for label in plan["recipes"] if (folder / f"{label}-seed0.png").is_file()]
        shown = re.findall(rf"\]\(pictures/({folder.name}_samples\.(?:png|jpg))\)", part)
        assert len(shown) == (folder / "real.png").is_file()
        assert all(shown_file.endswith("png") == bool(drawn) for shown_file in shown)
        if drawn:
            assert f": real, {', '.join(drawn)}](pictures/" in part
            holds(ROOT / "docs" / "pictures" / shown[0], ["real", *drawn], folder, len(plan["prompts"]))


def holds(sheet, rows, folder, count):
    """Every picture of the strips stands in the sheet, enlarged by whole pixels."""
    with Image.open(sheet) as opened:
        found = opened.convert("RGB")
    top = grids.GAP
    for name in rows:
        top += grids.LABEL
        with Image.open(folder / ("real.png" if name == "real" else f"{name}-seed0.png")) as strip:
            side = strip.height
            for i in range(count):
                left = grids.GAP + i * (grids.CELL + grids.GAP)
                there = found.crop((left, top, left + grids.CELL, top + grids.CELL))
                wanted = strip.convert("RGB").crop((i * side, 0, (i + 1) * side, side))
                back = there.resize((side, side), Image.Resampling.NEAREST)
                assert back.tobytes() == wanted.tobytes(), f"{sheet.name}: {name}, picture {i}"
        top += grids.CELL + grids.GAP


def test_no_picture_is_left_over_and_all_are_small():
    pictures = ROOT / "docs" / "pictures"
    assert sum(path.stat().st_size for path in pictures.glob("*_samples.*")) < 1.5e6
    for folder in FOLDERS:
        # names of comparisons may begin alike
        own = [p for p in pictures.glob(f"{folder.name}_*") if max(_begins(p.name), key=len) == folder.name]
        assert own
        for path in own:
            assert f"](pictures/{path.name})" in PAGE, f"{path.name} is on no page: git rm it"


def _begins(name):
    return [folder.name for folder in FOLDERS if name.startswith(f"{folder.name}_")]


def test_what_folds_out_is_closed_again():
    assert PAGE.count('<details markdown="1">') == PAGE.count("</details>") >= len(FOLDERS)
    for part in re.findall(r"<details.*?</details>", PAGE, re.DOTALL):
        assert part.count("<summary>") == 1 and "</summary>\n\n" in part, "GitHub needs the empty line"
