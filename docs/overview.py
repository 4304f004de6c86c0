"""The table at the head of docs/comparison.md: a row per system and data set, from committed results alone."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from xfusion.comparison.intervals import interval
from xfusion.comparison.plan import heading, recipes_in_command
from xfusion.recipes.base import names

NAMED = (
    ("caption_exact", "exact name"),
    ("word_errors", "word errors"),
    ("exact", "exact name"),
    ("accuracy", "right answers"),
    ("caption_at_1", "ranked first"),
    ("at_1", "ranked first"),
)
"""Scores of what is said of a picture or sound; the first that a run has is shown. And what they are called."""
SPACE = "\u00a0"
"""Within a line of a cell."""
RANKED = "at_1"
"""How scores of ranks among given names end."""
MADE = (("retrieval_pixel_at_1", "found first"), ("made_at_1", "made sounds"))
"""Scores of what is drawn or made, alike."""
PLAIN = ("exact name", "found first")
"""What the words below the table say of every score without another title."""
PARTS = (("held_", "**unseen**"), ("fit_", "*memory*"), ("", ""))
"""What a score is of, in the order of preference, and how it is marked."""
BESIDE = ("blind", "chance")
HEAD = ("system", "names", "draws", "GFLOPs", "trained", "text", "comparison")


ShownScore = tuple[str, str, str]
"""Name of a score, mark of its part, what it is called."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A system in one comparison."""

    recipe: str
    arguments: str
    """That the recipe was given, in brackets."""
    label: str
    """What the comparison calls it."""
    folder: str
    runs: Sequence[dict[str, Any]]
    """On all of the data, in the order of the seeds."""

    @property
    def setting(self) -> tuple[str, str, str]:
        """Rows of one setting are of the same system, suite and data: one of them is shown."""
        first = self.runs[0]
        return self.recipe, first["scored"].get("suite", ""), first["settings"]["data"]

    @property
    def preference(self) -> tuple[Any, ...]:
        """The largest of a setting is shown."""
        first = self.runs[0]
        unseen = any(name.startswith("held_") for name in first["scores"])
        return self.label == self.recipe, unseen, len(self.runs), first["budget"]["samples"], self.folder


def recipes_by_label(folder: Path) -> dict[str, str]:
    """Label -> recipe with its arguments, as the command of a comparison says; a label that it lacks is a recipe's own name."""
    file = folder / "comparison.json"
    return recipes_in_command(json.loads(file.read_text(encoding="utf-8")).get("command") if file.is_file() else None)


def rows(folders: Sequence[Path]) -> list[Row]:
    """The rows of the table, ordered by kind, then by comparison and system."""
    best: dict[tuple[str, str, str], Row] = {}
    for folder in folders:
        recipes = recipes_by_label(folder)
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-seed*.json"))]
        for label in dict.fromkeys([*recipes, *(run["recipe"] for run in runs)]):
            label_runs = [run for run in runs if run["recipe"] == label and run["settings"]["share"] == 1]
            if label_runs:
                recipe, bracket, rest = recipes.get(label, label).partition("(")
                row = Row(recipe=recipe, arguments=bracket + rest, label=label, folder=folder.name, runs=label_runs)
                previous = best.get(row.setting)
                if previous is None or row.preference > previous.preference:
                    best[row.setting] = row
    return sorted(best.values(), key=lambda row: (kind(row.recipe), row.folder, row.setting))


def kind(recipe: str) -> str:
    """Of mechanism, or nothing where the recipe is not of this repository."""
    return import_module(f"xfusion.recipes.{recipe}").KIND if recipe in names() else ""


def shown_scores(run: dict[str, Any]) -> tuple[ShownScore | None, ShownScore | None]:
    """What is shown of a run's naming and of its drawing: the score of unseen items, or of trained ones where there is none."""
    scores, scores_shown = run["scores"], []
    for candidates in (NAMED, MADE):
        choices = ((part + name, mark, title) for part, mark in PARTS for name, title in candidates)
        scores_shown.append(next((choice for choice in choices if scores.get(choice[0]) is not None), None))
    if scores_shown == [None, None]:  # of a suite that is not listed above
        other_scores = [name for name in scores if name.startswith(("held_", "fit_")) and not name.endswith("_blind")]
        other_scores.sort(key=lambda name: name.startswith("fit_"))
        scores_shown[0] = next(
            ((name, dict(PARTS)[name.partition("_")[0] + "_"], f"`{name}`") for name in other_scores), None
        )
    return scores_shown[0], scores_shown[1]


def score_text(row: Row, score: ShownScore | None) -> str:
    """A score of a row, its interval over runs, and what stands beside it."""
    if score is None:
        return "-"
    name, mark, title = score

    def mean(key: str) -> float | None:
        scores = [run["scores"][key] for run in row.runs if run["scores"].get(key) is not None]
        return statistics.fmean(scores) if scores else None

    values = [run["scores"][name] for run in row.runs if run["scores"].get(name) is not None]
    bounds, runs = interval(values), "one run" if len(values) == 1 else f"{len(values)} runs"
    text = f"{statistics.fmean(values):.2f} " + (f"({bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else f"({runs})")
    floors = (("blind", mean(f"{name}_blind")), ("chance", mean(f"chance_{name}")))
    parts = [mark, "" if title in PLAIN else title]
    parts += [next((f"{word} {value:.2f}" for word, value in floors if value is not None), "")]
    ceiling = mean(f"ceiling_{name}")
    parts += [f"ceiling {ceiling:.2f}" if ceiling is not None and ceiling < 1 else ""]
    return f"{text}<br>{', '.join(filter(None, parts))}".removesuffix("<br>").replace(" ", SPACE)


def ways(run: dict[str, Any]) -> str:
    """What a system reads and what it makes of it."""
    medium = "sound" if run["settings"]["recipe"]["model"].get("audio") else "picture"
    naming, drawing = shown_scores(run)
    if naming is not None and naming[0].endswith(RANKED):
        return f"{medium} ~ words"
    return f"{medium} {'⇄' if naming and drawing else '←' if drawing else '→'} words"


def through(run: dict[str, Any]) -> str:
    """What a run's pictures or sounds pass first, and their size."""
    model = run["settings"]["recipe"]["model"]
    part = model.get("audio") or model["image"]
    codec = part["codec"]
    word: str = (codec.get("encoder") or codec)["type"].rpartition(":")[2].removesuffix(".Config")
    word = {"VectorQuantized": f"codes of {codec.get('source')}", "Pixels": "pixels"}.get(word, word)
    return word if model.get("audio") else f"{part['sizes'][0]} px, {word}"


def cost_text(row: Row) -> str:
    """GFLOPs of a training sample by task, and seconds of a step where they were measured."""
    flops = row.runs[0]["cost"]["flops_per_sample"]
    # Both are samples in which words stand before pictures.
    drawing_label = "to draw" if shown_scores(row.runs[0])[1] else "per pair"
    labels = {"draw": drawing_label, "caption": "to name"} if len(flops) > 1 else {}
    text = "<br>".join(f"{value / 1e9:.2f} {labels.get(task, '')}".strip() for task, value in flops.items())
    times = [run["cost"]["time"]["step_seconds"] for run in row.runs if run["cost"]["time"]]
    return (text + (f"<br>{statistics.median(times):.2g} s per step" if times else "")).replace(" ", SPACE)


def text_text(row: Row) -> str:
    """Whether the base's text is kept, and the regime where something of the base is trained."""
    regime = row.runs[0].get("regime")
    regime_note = f"<br>regime: {regime}" if regime not in (None, "strictly frozen") else ""
    equal = [run["scores"].get("text_bit_equal") for run in row.runs]
    if None in equal:
        return f"not measured{regime_note}"
    if all(equal):
        return f"bit-identical{regime_note}"
    change = [run["scores"]["text_perplexity_change"] for run in row.runs]
    bounds = interval(change)
    bounds_text = f" ({bounds[0]:.1f} to {bounds[1]:.1f})" if bounds else ""
    return f"perplexity {statistics.fmean(change):+.1f}{bounds_text}{regime_note}"


def line(row: Row) -> str:
    """A row of the table."""
    system = f"[{row.recipe}](recipes/{row.recipe}.md)" if row.recipe in names() else row.recipe
    system += f" `{row.arguments}`" if row.arguments else ""
    system += "" if row.label == row.recipe else f" as `{row.label}`"
    first, count = row.runs[0], len(row.runs)
    scores = [score_text(row, score) for score in shown_scores(first)]
    runs = "**one run**" if count == 1 else f"{count} runs"
    weights = f"{first['cost']['trainable_parameters'] / 1e6:.1f} M".replace(" ", SPACE)
    cells = (f"{system}<br>{ways(first).replace(' ', SPACE)}", *scores, cost_text(row), weights, text_text(row))
    return f"| {' | '.join(cells)} | [{row.folder}](#{row.folder})<br>{runs.replace(' ', SPACE)} |"


def overview(folders: Sequence[Path]) -> list[str]:
    """The part of the page on all systems."""
    table_rows = rows(folders)
    missing = [f"[{name}](recipes/{name}.md)" for name in names() if name not in {row.recipe for row in table_rows}]
    absent = f"In no comparison yet (see their own pages for figures): {', '.join(missing)}." if missing else ""
    table = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    previous_kind = None
    for row in table_rows:
        if kind(row.recipe) != previous_kind:
            previous_kind = kind(row.recipe)
            table.append(f"| **{(previous_kind or 'others').replace(' ', SPACE)}** |{' |' * (len(HEAD) - 1)}")
        table.append(line(row))
    return [
        "## All systems",
        "",
        "Rows are ordered by kind of mechanism, not ranked. **Compare only rows of the same comparison** (last column), because",
        "pictures, encoders and budgets differ between comparisons. Their sections state what is decided.",
        "",
        "- *names*: share of exact answers, any text allowed; *ranked first*: the true name ranks before the other given names.",
        "  *word errors*: per word that is said; lower is better.",
        "  *draws*: share of drawings whose nearest real picture, in pixels, is the right one.",
        "- **unseen**: items of groups that training never saw. *memory*: trained items, if no others were scored.",
        "  *blind*: the same with pictures permuted. *chance*: a random order. *ceiling*: real pictures through the",
        "  codec.",
        "- Parentheses hold 95 % t-intervals over runs, which may reach below 0 or above 1; fewer than five runs have none and",
        "  decide nothing.",
        "- *GFLOPs*: forward and backward pass of a training sample, with seconds per step if measured. *trained*: weights.",
        "- *text*: the base's output without pictures: bit-identical, or the rise in perplexity of the bundled texts.",
        "- → reads, ← generates, ⇄ both, ~ scores how close a picture and words are, and generates nothing.",
        "- After a system come the arguments that its recipe was given; without them it is the recipe as it stands. Each",
        "  system has one row per dataset: the comparison with unseen items, then most runs, then most samples. Its variants",
        "  (rates, noise) are in the sections.",
        "",
        *table,
        "",
        *([absent, ""] if absent else []),
    ]


def contents(folders: Sequence[Path]) -> list[str]:
    """A line per comparison: its note's first words, its data and budget, its systems and runs."""
    lines = [
        "## The comparisons",
        "",
        "Between recipes of different regimes (`single_tower`, `transfusion`, `paper_moe` or `lora`, and the others) there are",
        "differences with intervals, but no verdicts. `xfusion compare --out comparison/kinds` makes a page of one comparison",
        "from its files, `index.html` in the same folder, with the drawings of all seeds.",
        "",
    ]
    for folder in folders:
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-seed*.json"))]
        present = {run["recipe"] for run in runs}
        recipes = recipes_by_label(folder)
        labels = [label for label in dict.fromkeys([*recipes, *sorted(present)]) if label in present]
        note = folder / "README.md"
        about = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
        about = re.split(r"[.:;](?:\s|$)", re.sub(r"\s+", " ", about.partition("\n\n")[0]), maxsplit=1)[0]
        about = f"{about}. " if about else ""
        data = "/".join(re.sub(r":held=.*", "", runs[0]["settings"]["data"]).split("/")[-2:])
        budget = f"{runs[0]['budget']['samples']:,} samples, {len(runs)} run{'s' if len(runs) > 1 else ''}"
        systems = ", ".join(f"`{heading(label, recipes.get(label, label))}`" for label in labels)
        lines.append(f"- [{folder.name}](#{folder.name}): {about}`{data}` ({through(runs[0])}), {budget}: {systems}.")
    return [*lines, ""]
