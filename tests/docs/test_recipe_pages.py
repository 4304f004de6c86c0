"""The pages of the recipes are what docs/pages.py writes of them: a docstring that changes without its page fails."""

import json
import re
import statistics
from pathlib import Path

import pytest

from xfusion.backbone import SHAPES, Backbone
from xfusion.comparison.table import SCORES
from xfusion.recipes.base import names

ROOT = Path(__file__).parents[2]
HINT = "run: python docs/pages.py"
DRAWN = "![{0}](../pictures/recipe_{0}.svg)\n\n"


def committed(name):
    return (ROOT / "docs" / "recipes" / f"{name}.md").read_text(encoding="utf-8")


def test_every_recipe_has_a_page_and_every_page_a_recipe(pages):
    assert {path.stem for path in (ROOT / "docs" / "recipes").glob("*.md")} == {*names(), "index"}
    assert committed("index") == pages.recipe_index(), HINT


@pytest.mark.parametrize("name", names())
def test_a_page_says_what_its_recipe_says(name, pages):
    """All but the counted costs, which need every base."""
    head, cost, rest = committed(name).partition("## Cost\n")
    _, figures, measured = rest.partition("## Figures\n")
    assert cost and figures
    assert head.replace(DRAWN.format(name), "") == "\n".join([*pages.title_part(name), *pages.text_part(name), ""]), (
        HINT
    )
    assert measured == "\n".join(["", *pages.figures(name), ""]), HINT


each_name = pytest.mark.parametrize(
    "name",
    ["xfusion", "blip2", *(pytest.param(n, marks=pytest.mark.full) for n in names() if n not in ("xfusion", "blip2"))],
)


@each_name
def test_drawings_are_drawn_again(name, pages, embedded):
    drawing, file = pages.drawing(name, embedded), ROOT / "docs" / "pictures" / f"recipe_{name}.svg"
    assert (file.read_text(encoding="utf-8") if file.is_file() else None) == drawing, HINT
    assert (DRAWN.format(name) in committed(name)) == (drawing is not None), HINT


@each_name
def test_costs_are_counted_again(name, pages):
    shape = next(iter(SHAPES))
    counted = pages.cost_part(name, [Backbone.of_shape(shape)])
    page = committed(name).splitlines()
    at = page.index("## Cost")
    assert page[at : at + 6] == counted[:6], HINT
    assert counted[6] in page[at:], f"{counted[6]}\n{HINT}"


@pytest.mark.parametrize("name", ["xfusion", "single_tower"])
def test_figures_are_of_runs_on_all_of_the_data(name, pages):
    """Runs on a tenth of the pictures remember them better: their scores must not enter the mean."""
    files = sorted((ROOT / "comparison" / "four_layers_tuned").glob(f"{name}-seed?.json"))
    scores = [json.loads(file.read_text(encoding="utf-8"))["scores"]["fit_retrieval_pixel_at_1"] for file in files]
    head, _, *rows = (line.strip("| ").split(" | ") for line in pages.figures(name) if line.startswith("|"))
    (row,) = (dict(zip(head, row, strict=True)) for row in rows if "[four_layers_tuned]" in row[0])
    assert row["runs"] == "5" and row[SCORES["fit_retrieval_pixel_at_1"].title] == f"{statistics.fmean(scores):.3f}"


COMPLETE = {
    "dual_projection": "a baseline of X-Fusion, whole",
    "gated_tower": "a baseline of X-Fusion, whole",
    "single_tower": "a baseline of X-Fusion, whole",
    "xfuse": "an option of X-Fusion, whole",
    "lora": "beside any recipe",
    "hybrid": "not published",
    "xfusion_dynamic": "not published",
    "xfusion_lora": "not published as one system",
}
"""Recipes of which no part is missing, and why."""


def test_the_ideas_name_what_each_recipe_still_lacks():
    ideas = (ROOT / "docs" / "ideas.md").read_text(encoding="utf-8")
    _, _, part = ideas.partition("## Parts that recipes lack\n")
    rows = [line.split(" | ") for line in part.partition("\n## ")[0].splitlines() if line.startswith("| [")]
    named = [name for row in rows for name in re.findall(r"\(recipes/(\w+)\.md\)", row[0])]
    assert set(named) | set(COMPLETE) == set(names()) and not set(named) & set(COMPLETE)
    assert all(len(row) == 2 and len(row[1]) > 10 for row in rows)
