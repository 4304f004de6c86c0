"""Writes the pages of docs/recipes/ from the recipes' docstrings, counted costs and committed comparisons.

    python docs/recipes.py

Weights and FLOPs are counted on the embedded base and on shapes of larger ones; nothing is trained.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from xfusion.backbone import SHAPES, Backbone
from xfusion.comparison.cost import flops_of_shape
from xfusion.model import build
from xfusion.recipes.base import find, names

HERE = Path(__file__).parent
RESULTS = HERE.parent / "comparison"
SCORES = ("fit_retrieval_pixel_at_1", "fit_retrieval_feature_at_1", "fit_caption_exact")


def cost(name: str, base: Backbone) -> str:
    """A line of the table of costs."""
    model = build(find(name)().model, base)
    flops = flops_of_shape(model)
    each = " | ".join(f"{flops[task]['training'] / 1e9:,.1f}" for task in ("draw", "caption"))
    source = "SmolLM2-135M-Instruct" if base.source.startswith("wheel:") else base.source
    return f"| {source} | {model.num_new_parameters / 1e6:,.1f} M | {each} |"


def figures(name: str) -> list[str]:
    """What committed comparisons say of a recipe: the mean over its runs."""
    lines = []
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{name}-seed*.json"))]
        if runs:
            scores = [
                f"{score} {sum(r['scores'][score] for r in runs) / len(runs):.3f}"
                for score in SCORES
                if all(score in r["scores"] for r in runs)
            ]
            lines.append(f"- [{folder.name}](../comparison.md), {len(runs)} runs: {', '.join(scores)}")
    return lines or ["Nothing was measured yet."]


def page(name: str, bases: list[Backbone]) -> str:
    """The page of a recipe."""
    module = import_module(f"xfusion.recipes.{name}")
    title, _, body = (module.__doc__ or "").strip().partition("\n\n")
    return "\n".join(
        [
            f"# {name}",
            "",
            title,
            "",
            f"Mechanism: {module.KIND}. Paper: {module.PAPER}. Status: {module.STATUS}.",
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
            "Trained weights, and GFLOPs (forward and backward, nothing looked up) of a sample of 12 words and a picture of",
            "the recipe's size.",
            "",
            "| base | trained | to learn a drawing | to learn a name |",
            "| --- | --- | --- | --- |",
            *(cost(name, base) for base in bases),
            "",
            "## Figures",
            "",
            *figures(name),
            "",
        ]
    )


def main() -> None:
    """Write all pages."""
    bases = [Backbone.load(), *(Backbone.of_shape(shape) for shape in SHAPES)]
    folder = HERE / "recipes"
    folder.mkdir(exist_ok=True)
    for name in names():
        (folder / f"{name}.md").write_text(page(name, bases), encoding="utf-8")
        print(f"docs/recipes/{name}.md")


if __name__ == "__main__":
    main()
