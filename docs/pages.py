"""Writes docs/recipes/ from the recipes' docstrings and counted costs, and docs/comparison.md from committed comparisons.

    python docs/pages.py

Weights and FLOPs are counted on the embedded base and on shapes of larger ones; nothing is trained.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from xfusion.apps.comparison_page import COLOURS, CONTRIBUTION, bars, dots, scatter
from xfusion.backbone import SHAPES, Backbone
from xfusion.comparison import summarise
from xfusion.comparison.cost import flops_of_shape
from xfusion.model import build
from xfusion.recipes.base import find, names

HERE = Path(__file__).parent
RESULTS = HERE.parent / "comparison"
SHOWN = ("fit_retrieval_pixel_at_1", "fit_retrieval_feature_at_1", "fit_caption_exact", "text_perplexity_change")
STYLE = """<style>text{font:13px sans-serif;fill:#555}text.name{fill:#222}text.end{font-size:10.5px}
.grid-line{stroke:#ddd}.beside{stroke:#888;stroke-dasharray:3 3}.zero{stroke:#888;stroke-width:1.2}</style>"""


# ------------------------------------------------------------------------------------------------------------ recipes


def cost(name: str, base: Backbone) -> str:
    """A line of the table of costs."""
    try:
        model = build(find(name)().model, base)
    except ValueError as error:
        return f"| {_called(base)} | cannot be built: {error} | | |"
    flops = flops_of_shape(model)
    each = " | ".join(f"{flops[task]['training'] / 1e9:,.1f}" for task in ("draw", "caption"))
    return f"| {_called(base)} | {model.num_new_parameters / 1e6:,.1f} M | {each} |"


def _called(base: Backbone) -> str:
    return "SmolLM2-135M-Instruct" if base.source.startswith("wheel:") else base.source


def figures(name: str) -> list[str]:
    """What committed comparisons say of a recipe: the mean over its runs."""
    lines = []
    for folder in comparisons():
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{name}-seed*.json"))]
        if runs:
            scores = [
                f"{score} {sum(r['scores'][score] for r in runs) / len(runs):.3f}"
                for score in SHOWN[:3]
                if all(score in r["scores"] for r in runs)
            ]
            lines.append(f"- [{folder.name}](../comparison.md#{folder.name}), {len(runs)} runs: {', '.join(scores)}")
    return lines or ["Nothing was measured yet."]


def recipe_page(name: str, bases: list[Backbone]) -> str:
    """The page of a recipe."""
    module = import_module(f"xfusion.recipes.{name}")
    title, _, body = (module.__doc__ or "").strip().partition("\n\n")
    head = [f"# {name}", "", title, "", f"Mechanism: {module.KIND}. Paper: {module.PAPER}. Status: {module.STATUS}."]
    table = ["| base | trained | to learn a drawing | to learn a name |", "| --- | --- | --- | --- |"]
    what = (
        "Trained weights, and GFLOPs (forward and backward, nothing looked up) of a sample of 12 words and a picture of"
        " the recipe's size."
    )
    lines = [
        *head,
        "",
        body,
        "",
        "## Command",
        "",
        "```bash",
        f"xfusion train {name}",
        "```",
        "",
        "## Cost",
        "",
        what,
        "",
    ]
    return "\n".join([*lines, *table, *(cost(name, base) for base in bases), "", "## Figures", "", *figures(name), ""])


# -------------------------------------------------------------------------------------------------------- comparisons


def comparisons() -> list[Path]:
    """Folders of committed results."""
    return sorted(path for path in RESULTS.glob("*") if path.is_dir() and list(path.glob("*-seed*.json")))


def comparison_part(folder: Path) -> list[str]:
    """A section on one comparison, its plots beside it."""
    summary = summarise(folder)
    note = folder / "README.md"
    lines = [f"## {folder.name}", ""]
    if note.is_file():
        lines += [note.read_text(encoding="utf-8").strip(), ""]
    lines += ["```bash", str(summary["command"]), "```", ""]
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(summary["recipes"])}
    for score in summary["scores"]:
        if score["score"] not in SHOWN or score["share"] != 1:
            continue
        file = HERE / "pictures" / f"{folder.name}_{score['score']}.svg"
        drawn = dots(score, lambda label, colours=colours: colours[label])
        file.write_text(_standalone(drawn), encoding="utf-8")
        lines += [f"**{score['title']}** ({score['better']} is better)", ""]
        lines += [f"![{score['title']}](pictures/{file.name})", ""]
        lines += [f"| recipe | mean | 95 % interval | paired difference to {summary['first']} | verdict |"]
        lines += ["| --- | --- | --- | --- | --- |", *(_row(row) for row in score["rows"]), ""]
    drawing = next((s for s in summary["scores"] if s["score"] == SHOWN[0] and s["share"] == 1), None)
    if drawing and any(text["bit_equal"] < text["num_runs"] for text in summary["text"].values()):
        file = HERE / "pictures" / f"{folder.name}_text.svg"
        file.write_text(_standalone(scatter(summary, drawing)), encoding="utf-8")
        lines += ["**What drawing cost the text**: perplexity against the score in drawing, a small dot per run", ""]
        lines += [f"![perplexity of the text against drawing](pictures/{file.name})", ""]
    if summary["contributions"]:
        file = HERE / "pictures" / f"{folder.name}_shares.svg"
        file.write_text(_standalone(bars(summary["contributions"], CONTRIBUTION)), encoding="utf-8")
        lines += [f"**{CONTRIBUTION.capitalize()}**, by layer and kind of position", ""]
        lines += [f"![learned shares](pictures/{file.name})", ""]
    lines += ["| recipe | trained weights | GFLOPs per drawing, per name | text |", "| --- | --- | --- | --- |"]
    for row in summary["cost"]:
        flops = ", ".join(f"{value / 1e9:.2f}" for value in row["flops_per_sample"].values())
        text: dict[str, Any] = summary["text"][row["recipe"]]
        kept = "bit-identical" if text["bit_equal"] == text["num_runs"] else "changed"
        lines.append(f"| {row['recipe']} | {row['trainable_parameters']:,} | {flops} | {kept} |")
    lines += ["", *(f"- {note}" for note in summary["notes"]), ""]
    return lines


def _row(row: dict[str, Any]) -> str:
    def span(found: list[float] | None) -> str:
        return f"{found[0]:.3f} to {found[1]:.3f}" if found else "-"

    difference = row["difference"]
    beside = f"{difference['mean']:+.3f} ({span(difference['interval'])})" if difference else "-"
    verdict = difference["verdict"] if difference else "-"
    mean = "not measured" if row["mean"] is None else f"{row['mean']:.3f}"
    return f"| {row['recipe']} | {mean} | {span(row['interval'])} | {beside} | {verdict} |"


def _standalone(svg: str) -> str:
    head, rest = svg.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{STYLE}<rect width="100%" height="100%" fill="white"/>{rest}\n'


def main() -> None:
    """Write all pages."""
    text = [
        "# Comparisons",
        "",
        "Every figure is read from the files in `comparison/`, which `xfusion compare` wrote; `python docs/pages.py` makes",
        "this page of them. Dots are runs, bars 95 % intervals; nothing is decided by fewer than five runs.",
        "",
        *(line for folder in comparisons() for line in comparison_part(folder)),
    ]
    (HERE / "comparison.md").write_text("\n".join(text), encoding="utf-8")
    print("docs/comparison.md")
    bases = [Backbone.load(), *(Backbone.of_shape(shape) for shape in SHAPES)]
    (HERE / "recipes").mkdir(exist_ok=True)
    for name in names():
        (HERE / "recipes" / f"{name}.md").write_text(recipe_page(name, bases), encoding="utf-8")
        print(f"docs/recipes/{name}.md")


if __name__ == "__main__":
    main()
