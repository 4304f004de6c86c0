"""Writes docs/recipes/ from the recipes' docstrings and counted costs, docs/comparison.md from committed comparisons, and the
tables and plots of docs/speed.md, docs/scaling.md, docs/serving.md and docs/training_log.md from benchmarks/results/, those of
docs/questions.md from comparison/understanding/.

    python docs/pages.py [speed | comparison | RECIPE ...]

Weights and FLOPs are counted on the embedded base and on shapes of larger ones; nothing is trained.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from diagrams import diagram
from grids import samples
from overview import contents, overview, recipes_by_label

from xfusion.apps.commands.base import size_text
from xfusion.apps.comparison_page import CONTRIBUTION, SHARES, TIMES, by_share
from xfusion.apps.plots import COLOURS, bars, curves, dots, numbered, over_numbers, scatter, standalone
from xfusion.backbone import SHAPES, Backbone
from xfusion.comparison import summarise
from xfusion.comparison.cost import flops_of_encoder, flops_of_shape
from xfusion.comparison.table import SCORES
from xfusion.modalities.codecs.kmeans import KMeans
from xfusion.model import build
from xfusion.objectives.contrastive import Contrastive
from xfusion.objectives.masked_words import MaskedWords
from xfusion.objectives.matching import Matching
from xfusion.recipes.base import find, names

HERE = Path(__file__).parent
RESULTS = HERE.parent / "comparison"
MEASURED = HERE.parent / "benchmarks" / "results"
SHOWN = ("fit_retrieval_pixel_at_1", "fit_retrieval_feature_at_1", "fit_caption_exact", "text_perplexity_change")
SHOWN_UNSEEN = ("held_retrieval_pixel_at_1", "held_retrieval_feature_at_1", "held_caption_exact")
"""Shown before these where unseen pictures were drawn."""
SHOWN_NAMING = ("held_caption_exact", "held_caption_at_1", "fit_caption_exact", "text_perplexity_change")
"""Where no recipe draws. The first that was measured is open on the page."""
PAIRS = (Contrastive.Config, Matching.Config, MaskedWords.Config)
"""Objectives over pairs of a picture and a text."""
SHOWN_OF_SOUNDS = ("held_exact", "held_word_errors", "made_at_1")
SHOWN_OF_RECIPE = tuple(dict.fromkeys((*SHOWN_UNSEEN[:-1], *SHOWN[:-1], *SHOWN_NAMING[:-1], *SHOWN_OF_SOUNDS)))
"""On a recipe's page, where its runs have them."""
EMOJI = re.compile(r"(fit|held)_(caption|retrieval)_")
"""Scores of the suite `emoji`, of which those above are shown."""
SHORT = "<!-- run full short -->"
"""What tests/docs/test_docs.py wants above a block of which it runs little: a step or two of training, a round of a benchmark."""
SHORT_BESIDE_PEER = "<!-- run full short needs=transfusion_pytorch -->"
"""Above one that is left out where that package is missing."""
TARGETS = (
    ("share_of_shape_peak", "0.70"),
    ("share_of_peak", "-"),
    ("graphs_after_warm_up", "0"),
    ("graphs_in_unseen_steps", "0"),
)
"""Figures of the bench for a training step, and the target of each."""
BENCH_FIRST = ("bench",)
"""Results of the bench that stand above the others."""
SHOWN_BY_SHARE = ("fit_retrieval_pixel_at_1", "fit_caption_exact", "held_caption_mrr")


# ------------------------------------------------------------------------------------------------------------ recipes


def cost(name: str, base: Backbone) -> str:
    """A line of the table of costs."""
    try:
        model = build(find(name)().model, base)
    except ValueError as error:
        return f"| {_base_name(base)} | cannot be built: {error} | | |"
    flops = flops_of_shape(model)
    gflops = " | ".join(
        f"{flops[task]['training'] / 1e9:,.1f}" if task in flops else "-" for task in ("draw", "caption")
    )
    return f"| {_base_name(base)} | {model.num_new_parameters / 1e6:,.1f} M | {gflops} |"


def recipe_index() -> str:
    """All recipes by kind of mechanism."""
    modules = {name: import_module(f"xfusion.recipes.{name}") for name in names()}
    none_note = "" if "reproduced" in {module.STATUS for module in modules.values()} else " None is `reproduced` yet."
    lines = [
        "# Recipes",
        "",
        "One short file per published system, on the same frozen LLM. The status says how far it was tested:",
        "`sketch` was trained for a few steps in the tests, `runs` on real data, and `reproduced` has committed runs that",
        f"confirm a finding of the paper.{none_note}",
        "",
        "| recipe | mechanism | paper | status |",
        "| --- | --- | --- | --- |",
    ]
    for name, module in sorted(modules.items(), key=lambda pair: (pair[1].KIND, pair[0])):
        lines.append(f"| [{name}]({name}.md) | {module.KIND} | {module.PAPER} | {module.STATUS} |")
    return "\n".join(
        [*lines, "", "For systems that are missing, and what each would need, see [ideas](../ideas.md).", ""]
    )


def drawing(name: str, base: Backbone) -> str | None:
    """The drawing of a recipe on the first base, or None where it cannot be built there."""
    try:
        model = build(find(name)().model, base)
    except ValueError:
        return None
    return diagram(f"{name} on {_base_name(base)}", model)


def _base_name(base: Backbone) -> str:
    return "SmolLM2-135M-Instruct" if base.source.startswith("wheel:") else base.source


def figures(name: str) -> list[str]:
    """What committed comparisons say of a recipe with the arguments that it had there, the mean over its runs on all of the
    data, and whether the training log has it.
    """
    rows: list[dict[str, Any]] = []
    forms = set()
    for folder in comparisons():
        recipes = recipes_by_label(folder)
        results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*-seed*.json"))]
        for label in dict.fromkeys([*recipes, *(result["recipe"] for result in results)]):
            called = recipes.get(label, label)
            runs = [r for r in results if r["recipe"] == label and r["settings"]["share"] == 1]
            if runs and called.partition("(")[0] == name:
                scores = {
                    SCORES[score].title: f"{sum(r['scores'][score] for r in runs) / len(runs):.3f}"
                    for score in SHOWN_OF_RECIPE
                    if all(score in r["scores"] for r in runs)
                }
                link = f"[{folder.name}](../comparison.md#{folder.name})"
                rows.append({"comparison": link, "recipe": f"`{called}`", "runs": len(runs)} | scores)
                forms.add(called)
    titles = [SCORES[score].title for score in SHOWN_OF_RECIPE if any(SCORES[score].title in row for row in rows)]
    lines = table(rows, ("comparison", "recipe", "runs", *titles)) if rows else []
    if rows and all(find(form)() != find(name)() for form in forms):
        lines = [
            "No comparison ran the recipe without arguments; the second column has theirs.",
            "",
            *lines,
        ]
    if re.search(rf"xfusion train [\"']?{name}\b", (HERE / "training_log.md").read_text(encoding="utf-8")):
        lines.append("Its other runs and scores are in the [training log](../training_log.md).")
    elif lines:
        lines.pop()
    return lines or ["Nothing has been measured yet."]


def title_part(name: str) -> list[str]:
    """Name, title, mechanism, paper and status of a recipe."""
    module = import_module(f"xfusion.recipes.{name}")
    title = (module.__doc__ or "").strip().partition("\n\n")[0]
    return [
        f"# {name}",
        "",
        title,
        "",
        f"Mechanism: {module.KIND}. Paper: {module.PAPER}. Status: {module.STATUS}.",
        "",
    ]


def text_part(name: str) -> list[str]:
    """The rest of a recipe's docstring, and its command."""
    module = import_module(f"xfusion.recipes.{name}")
    body = (module.__doc__ or "").strip().partition("\n\n")[2]
    recipe = find(name)()
    codec = recipe.model.modality.codec
    files = [recipe.data.partition("/")[0]] if recipe.data.endswith(".jsonl") else []
    files += [codec.source] if isinstance(codec, KMeans.Config) else []
    given_note = [f"<!-- given: {' '.join(files)} -->"] if files else []
    return [body, "", "## Command", "", *given_note, SHORT, "```bash", f"xfusion train {name}", "```", ""]


def cost_part(name: str, bases: list[Backbone]) -> list[str]:
    """What a recipe costs on some bases."""
    item = "a sound" if find(name)().model.audio else "a picture"
    note = (
        f"Trained weights, and GFLOPs (forward and backward, without cached text states) for a sample of 12 words and {item} of"
        " the recipe's size. A dash means that the recipe does not learn the task."
    )
    encoder = flops_of_encoder(find(name)().model)
    if encoder != 0:
        encoder_note = f" ({encoder / 1e9:.2f} GFLOPs per picture)" if encoder else ""
        note += f" The frozen encoder or codec{encoder_note} is not included."
    if any(isinstance(objective, PAIRS) for objective in find(name)().model.extra):
        note += " Losses over pairs of a picture and a text are not counted here; [comparisons](../comparison.md) count them."
    table = ["| base | trained | per drawing sample | per captioning sample |", "| --- | --- | --- | --- |"]
    return ["## Cost", "", note, "", *table, *(cost(name, base) for base in bases), ""]


def recipe_page(name: str, bases: list[Backbone]) -> str:
    """The page of a recipe."""
    lines = title_part(name)
    if (svg := drawing(name, bases[0])) is not None:
        file = HERE / "pictures" / f"recipe_{name}.svg"
        file.write_text(svg, encoding="utf-8")
        lines += [f"![{name}](../{file.relative_to(HERE)})", ""]
    lines += [*text_part(name), *cost_part(name, bases)]
    return "\n".join([*lines, "## Figures", "", *figures(name), ""])


# -------------------------------------------------------------------------------------------------------- comparisons


def comparisons() -> list[Path]:
    """Folders of committed results."""
    return sorted(path for path in RESULTS.glob("*") if path.is_dir() and list(path.glob("*-seed*.json")))


def comparison_part(folder: Path) -> list[str]:
    """A section on one comparison: its note, its samples and its first score; all others fold out."""
    summary = summarise(folder)
    note = folder / "README.md"
    lines = [f"## {folder.name}", ""]
    if note.is_file():
        lines += [note.read_text(encoding="utf-8").strip(), ""]
    command = str(summary["command"])
    lines += [*samples(folder, HERE / "pictures"), *given(command), SHORT, "```bash", command, "```", ""]
    draws = any(score["score"] == SHOWN[0] for score in summary["scores"])
    scores = {score["score"]: score for score in summary["scores"] if score["share"] == 1}
    unseen = SHOWN_UNSEEN if SHOWN_UNSEEN[0] in scores else ()
    shown = list(dict.fromkeys((*unseen, *SHOWN)) if draws else SHOWN_NAMING)
    # What another suite scores is shown before the text.
    shown[-1:-1] = [name for name in scores if not EMOJI.match(name) and name not in shown]
    is_text_equal = all(text["bit_equal"] == text["num_runs"] for text in summary["text"].values())
    if is_text_equal:
        shown.remove("text_perplexity_change")
        lines += [f"The base's text is bit-identical in all {summary['num_runs']} runs.", ""]
    parts = [score_part(summary, scores[name]) for name in shown if name in scores]
    open_part, folded_parts = (parts[0], parts[1:]) if parts else ([], [])
    lines += open_part
    drawing = scores.get(SHOWN[0])
    if drawing and not is_text_equal:
        file = HERE / "pictures" / f"{folder.name}_text.svg"
        file.write_text(standalone(scatter(summary, drawing)), encoding="utf-8")
        lines += ["**What drawing cost the text**: perplexity against the drawing score, one small dot per run", ""]
        lines += [f"![perplexity of the text against drawing](pictures/{file.name})", ""]
    folded_parts += [share_part(summary, name, folder.name) for name in SHOWN_BY_SHARE if len(summary["shares"]) > 1]
    if summary["contributions"]:
        file = HERE / "pictures" / f"{folder.name}_shares.svg"
        file.write_text(standalone(bars(summary["contributions"], CONTRIBUTION)), encoding="utf-8")
        folded_parts.append([f"**{CONTRIBUTION.capitalize()}**, by layer and kind of position", ""])
        folded_parts.append([f"![learned shares](pictures/{file.name})", ""])
    lines += folded("Other scores: every run, intervals, verdicts", [line for part in folded_parts for line in part])
    costs = [*cost_table(summary, draws), "", *(f"- {note}" for note in summary["notes"]), ""]
    return [*lines, *folded("Costs, and what else differs", costs)]


def given(command: str) -> list[str]:
    """What a reader has made before a comparison, as tests/docs/test_docs.py wants it named: data, codes and encoders."""
    words = " ".join(shlex.split(command))
    files = [place.rpartition("/")[0] for place in re.findall(r" --(?:data|held) (\S+)\.jsonl", words)]
    files += re.findall(r"\b(?:codes|encoder)='(.+?)'", words)
    return [f"<!-- given: {' '.join(dict.fromkeys(files))} -->"] if files else []


def comparison_page() -> str:
    """The page of all comparisons; pictures are written beside it."""
    folders = comparisons()
    text = [
        "# Comparisons",
        "",
        "Every figure is read from the files in `comparison/`, which `xfusion compare` wrote; `python docs/pages.py comparison`",
        "generates this page from them. Dots are runs and bars are 95 % confidence intervals. Fewer than five runs decide",
        "nothing. A verdict between recipes at one rate each, with no equal trials of other rates, is marked *untuned*. For a",
        "summary, see [which fusion should I use?](choosing.md)",
        "",
        *overview(folders),
        *contents(folders),
        *(line for folder in folders for line in comparison_part(folder)),
        *(line for file in sorted(RESULTS.glob("*/few_shot.json")) for line in few_shot_part(file.parent)),
    ]
    return "\n".join(text)


def folded(title: str, lines: list[str]) -> list[str]:
    """Lines that open by a click, here and on GitHub."""
    return ['<details markdown="1">', f"<summary>{title}</summary>", "", *lines, "</details>", ""] if lines else []


def score_part(summary: dict[str, Any], score: dict[str, Any]) -> list[str]:
    """A score of all recipes: plot, table, and what stands beside it."""
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(summary["recipes"])}
    file = HERE / "pictures" / f"{summary['name']}_{score['score']}.svg"
    number = numbered(summary["recipes"])
    svg = dots(score, colours.__getitem__) if number is None else over_numbers(score, *number)
    file.write_text(standalone(svg), encoding="utf-8")
    lines = [f"**{score['title']}** ({score['better']} is better)", ""]
    lines += [f"![{score['title']}](pictures/{file.name})", ""]
    lines += [f"| recipe | mean | 95 % interval | paired difference to {_baseline(summary)} | verdict |"]
    lines += ["| --- | --- | --- | --- | --- |", *(_row(row, summary) for row in score["rows"]), ""]
    return lines + _references(score, summary["media"])


def cost_table(summary: dict[str, Any], draws: bool) -> list[str]:
    """What each recipe costs."""
    has_times = any(row["time"] for row in summary["cost"])
    # What a dual encoder draws and names is a pair.
    sample_text = "per drawing, per name" if draws else "per sample"
    if summary["media"] == "sounds" and any("draw" in row["flops_per_sample"] for row in summary["cost"]):
        sample_text = "per sound said, per name"
    head = ["recipe", "trained weights", f"GFLOPs {sample_text}", "peak memory", "text"]
    head += ["seconds per step, per drawing, per name"] if has_times else []
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in summary["cost"]:
        flops = ", ".join(f"{value / 1e9:.2f}" for value in row["flops_per_sample"].values())
        text: dict[str, Any] = summary["text"][row["recipe"]]
        text_note = "bit-identical" if text["bit_equal"] == text["num_runs"] else "changed"
        peak = row["peak_memory"]["bytes"]
        cells = [
            summary["called"][row["recipe"]],
            f"{row['trainable_parameters']:,}",
            flops,
            size_text(peak) if peak else "-",
            text_note,
        ]
        if has_times:
            times = row["time"] or {}
            cells.append(", ".join(f"{times[key]:.3g}" if times.get(key) else "-" for key in TIMES))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def share_part(summary: dict[str, Any], name: str, folder: str) -> list[str]:
    """A score against the share of the pictures that were trained on."""
    lines_by_recipe, tables = by_share(summary, name), [s for s in summary["scores"] if s["score"] == name]
    if not lines_by_recipe:
        return []
    title, file = tables[0]["title"], HERE / "pictures" / f"{folder}_shares_{name}.svg"
    colours = {label: COLOURS[summary["recipes"].index(label) % len(COLOURS)] for label in lines_by_recipe}
    file.write_text(standalone(curves(summary["recipes"], lines_by_recipe, SHARES), colours), encoding="utf-8")
    lines = [f"**{title}, by share of the pictures** (the same budget on fewer pictures)", ""]
    lines += [f"![{title} by share]({file.relative_to(HERE)})", ""]
    lines += [f"| recipe | share | mean | 95 % interval | paired difference to {_baseline(summary)} | verdict |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for share_score in tables:
        share = f" | {100 * share_score['share']:g} %"
        lines += [_row(row, summary, share) for row in share_score["rows"] if row["recipe"] in lines_by_recipe]
    return [*lines, ""]


def few_shot_part(folder: Path) -> list[str]:
    """A section on naming behind solved examples, from the results of the suite ``few_shot``: a plot, and a table below it."""
    result = json.loads((folder / "few_shot.json").read_text(encoding="utf-8"))
    titles = {
        "": "exact answer",
        "_misnamed": "the same, each example with another picture's name",
        "_blind": "pictures permuted",
    }
    numbers = sorted(int(match[1]) for key in result if (match := re.fullmatch(r"held_exact_(\d+)_shots", key)))
    lines = {
        title: [(float(n), result[key]) for n in numbers if (key := f"held_exact_{n}_shots{suffix}") in result]
        for suffix, title in titles.items()
    }
    svg = curves(list(lines), lines, "solved examples before the picture")
    file = HERE / "pictures" / f"{folder.name}.svg"
    file.write_text(standalone(svg, legend(lines)), encoding="utf-8")
    rows = [
        " | ".join([title, *(f"{v:.2f}" if (v := dict(line).get(float(n))) is not None else "-" for n in numbers)])
        for title, line in lines.items()
    ]
    return [
        f"## {folder.name}",
        "",
        (folder / "README.md").read_text(encoding="utf-8").strip(),
        "",
        f"![naming by number of solved examples](pictures/{file.name})",
        "",
        f"| {result['settings']['num_held']} unseen pictures, examples: | {' | '.join(map(str, numbers))} |",
        "| --- " * (1 + len(numbers)) + "|",
        *(f"| {row} |" for row in rows),
        "",
    ]


def _references(score: dict[str, Any], media: str) -> list[str]:
    """What chance, the blind rate and the ceiling of a score are, where they were measured."""
    real = {"pictures": "the real picture", "sounds": "unheard recordings"}[media]
    titles = {"chance": "a random order", "blind": f"{media} permuted (mean of all)", "ceiling": real}
    texts = [f"{title} {score[key]:.3f}" for key, title in titles.items() if key in score]
    return [f"For reference: {', '.join(texts)}.", ""] if texts else []


def _baseline(summary: dict[str, Any]) -> str:
    return summary["called"][summary["first"]]


def _row(row: dict[str, Any], summary: dict[str, Any], share: str = "") -> str:
    def bounds_text(bounds: list[float] | None) -> str:
        return f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else "-"

    difference = row["difference"]
    difference_text = f"{difference['mean']:+.3f} ({bounds_text(difference['interval'])})" if difference else "-"
    verdict = difference["verdict"] if difference else "-"
    mean = "not measured" if row["mean"] is None else f"{row['mean']:.3f}"
    return (
        f"| {summary['called'][row['recipe']]}{share} | {mean} | {bounds_text(row['interval'])}"
        f" | {difference_text} | {verdict} |"
    )


# -------------------------------------------------------------------------------------------------------------- speed


def measured(name: str) -> dict[str, Any] | None:
    """A committed result of a benchmark."""
    file = MEASURED / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def origin(result: dict[str, Any]) -> list[str]:
    """What a figure was made by and on."""
    machine, commit = result["machine"], result["commit"]
    commit_text = f"commit {commit['id'][:10]}" if commit else "no commit"
    if commit and commit.get("changed_files"):
        commit_text += f" and {commit['changed_files']} changed files"
    load = result.get("load_before")
    load_text = "" if load is None else f", load {load:g} before"
    instructions = f" ({machine['instructions']})" if "instructions" in machine else ""
    machine_text = (
        f"{machine['processor']}{instructions}, {machine['cores']} cores, {machine['threads']} threads,"
        f" torch {machine['versions']['torch']}"
    )
    # The peer is an extra of its own.
    mark = SHORT_BESIDE_PEER if {"transfusion", "peer"} & set(result) else SHORT
    return [mark, "```bash", result["command"], "```", "", f"{machine_text}; {commit_text}{load_text}.", ""]


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> list[str]:
    """Some columns of rows."""
    lines = [f"| {' | '.join(c.replace('_', ' ') for c in columns)} |", f"|{' --- |' * len(columns)}"]
    return [*lines, *(f"| {' | '.join(str(row.get(c, '-')) for c in columns)} |" for row in rows), ""]


def plot(
    name: str, lines: dict[str, list[tuple[float, float]]], axis_label: str, title: str, *, log: bool = False
) -> list[str]:
    """A plot beside the page, and the words that show it below its title."""
    svg = curves(list(lines), lines, axis_label, logarithmic=log)
    (HERE / "pictures" / f"speed_{name}.svg").write_text(standalone(svg, legend(lines)), encoding="utf-8")
    return [f"**{title}**", "", f"![{title}](pictures/speed_{name}.svg)", ""]


def legend(lines: dict[str, Any]) -> dict[str, str]:
    """Names and colours, where there is more than one line."""
    return dict(zip(lines, COLOURS, strict=False)) if len(lines) > 1 else {}


def bench_part() -> list[str]:
    """What `xfusion bench` found, against its targets; runs of some of its questions each have their table."""
    files = sorted(MEASURED.glob("bench*.json"), key=lambda file: (file.stem not in BENCH_FIRST, file.name))
    if not files:
        return ["Not measured yet: `xfusion bench --json -o benchmarks/results/bench.json` on an idle machine.", ""]
    return [line for file in files for line in bench_table(json.loads(file.read_text(encoding="utf-8")))]


def bench_table(result: dict[str, Any]) -> list[str]:
    """A run of the bench."""
    rows: list[dict[str, Any]] = []

    def add(question: str, value: Any, target: str = "-") -> None:
        if isinstance(value, (int, float)) and target != "-":
            bound = float(target.removeprefix("at most "))
            is_missed = value > bound if target.startswith("at most") or not bound else value < bound
            value = f"{value} (missed)" if is_missed else value
        rows.append({"figure": question, "value": value, "target": target})

    for tower in ("demo_tower", "full_tower"):
        name = tower.replace("_", " ")
        for kind in ("drawing", "joint"):
            part = result.get("training", {}).get(tower, {}).get(kind, {})
            for key, target in TARGETS:
                if key in part:
                    add(f"`{key}`, {kind}, {name}", part[key], target)
            if "samples_per_second" in part:
                add(f"samples per second, {kind}, {name}", part["samples_per_second"])
            for state, seconds in part.get("cold_start_seconds", {}).items():
                add(f"cold start in seconds, {state.replace('_', ' ')}, {kind}, {name}", seconds)
        if "precision" in (part := result.get("training", {}).get(tower, {})):
            add(f"precision of training, {name}", part["precision"])
        part = result.get("transfusion", {}).get(tower, {})
        for key, target in (
            ("ratio_to_transfusion_pytorch", "3"),
            ("ratio_to_transfusion_pytorch_cached", "5"),
            ("ratio_at_matched_parameters", "-"),
            ("ratio_at_matched_parameters_cached", "-"),
        ):
            if key in part:
                add(f"`{key}`, {name}", part[key], target)
        part = result.get("llama", {}).get(tower, {})
        if part:
            add(f"`ratio_to_llama_text_training`, {name}", part["ratio_to_llama_text_training"], "0.8")
    for kind in ("drawing", "joint"):
        if kind in result.get("memory", {}):
            add(f"freed memory given back over kept, {kind} step", result["memory"][kind]["given_back_over_kept"])
    for tower in ("demo_tower", "full_tower"):
        part = result.get("activation_checkpointing", {}).get(tower, {})
        for key, target in (("memory_over_kept", "-"), ("time_over_kept", "-")):
            measure = key.replace("_over_kept", "")
            if part:
                name = f"activation checkpointing: {measure} over that of keeping, {tower.replace('_', ' ')}"
                add(name, part.get(key, "not measured"), target)
    for name, part in result.get("denoising", {}).items():
        if isinstance(part, dict):
            figure = f"`denoising_step_over_tower_flops`, {name.replace('_compiled', ' if compiled').replace('_', ' ')}"
            add(figure, part["denoising_step_over_tower_flops"], "at most 1.15")
    if "generate" in result:
        add("`ratio_to_base_generate`", result["generate"]["ratio_to_base_generate"], "0.98")
        add("the same through the fused stack", result["generate"]["ratio_of_the_fused_stack"])
    return [*origin(result), *table(rows, ("figure", "value", "target"))]


def time_to_loss_part() -> list[str]:
    """Loss against seconds, ours and the peer's."""
    result = measured("time_to_loss")
    if result is None:
        return ["Not measured yet: `python benchmarks/time_to_loss.py`.", ""]
    title = "Loss of names against seconds of training"
    our_seconds = result["our_seconds_to_that_loss"]
    peer_loss, peer_seconds = result["loss_reached_by_the_peer"], result["seconds_of_the_peer"]
    comparison = "not within its own time" if our_seconds is None else f"within {our_seconds:.0f} s"
    return [
        *origin(result),
        f"The peer ({result['peer'].partition(', ')[2]}) reached {peer_loss:.2f} nats per token in {peer_seconds:.0f} s and"
        f" {result['steps']['transfusion-pytorch']} steps; ours reached that {comparison}.",
        "",
        *plot("time_to_loss", result["curves"], "seconds of training", title),
    ]


def memory_part() -> list[str]:
    """What towers hold beside their base."""
    result = measured("memory")
    if result is None:
        return ["Not measured yet: `python benchmarks/memory.py`.", ""]
    columns = {
        "base": "base alone",
        "held": "held between steps",
        "held_predicted": "the same, predicted",
        "activations_predicted": "activations, predicted",
        "peak_of_a_step": "peak of the process",
    }
    rows = []
    for row in result["rows"]:
        sizes = {name: f"{row[key] / 1e6:,.0f} MB" for key, name in columns.items() if key in row}
        rows.append(
            {"model": row["base_model"], "over the base": row["held_over_base"]}
            | sizes
            | {"recipe": f"`{row['recipe']}`"}
        )
    return [*origin(result), *table(rows, ("model", "recipe", *columns.values(), "over the base"))]


def memory_in_short_part() -> list[str]:
    """What base and tower hold together, a column per base: the measured figure, or the prediction where there is none."""
    result = measured("memory")
    if result is None:
        return ["Not measured yet: `python benchmarks/memory.py`.", ""]
    rows: dict[str, dict[str, str]] = {"none": {"recipe": "the base alone"}}
    for row in result["rows"]:
        size = f"{row['held'] / 1e9:.1f} GB" if "held" in row else f"{row['held_predicted'] / 1e9:.1f} GB, predicted"
        rows["none"][row["base_model"]] = f"{row['base'] / 1e9:.1f} GB"
        rows.setdefault(row["recipe"], {"recipe": f"`{row['recipe']}`"})[row["base_model"]] = size
    return table(list(rows.values()), tuple(rows["none"]))


def profile_part() -> list[str]:
    """Where a step's time goes."""
    result = measured("profile")
    if result is None:
        return ["Not measured yet: `python benchmarks/profile_step.py`.", ""]
    kinds = ("drawing", "joint")
    rows = [
        {"work": name} | {k: f"{result[k]['shares'][name]:.1%}" for k in kinds} for name in result["drawing"]["shares"]
    ]
    names = ("step_seconds", "batches_seconds", "system_seconds", "page_faults")
    rows += [{"work": name.replace("_", " ")} | {k: result[k][name] for k in kinds} for name in names]
    return [*origin(result), *table(rows, ("work", *kinds))]


def solvers_part() -> list[str]:
    """Quality against steps."""
    result = measured("solvers")
    if result is None:
        return ["Not measured yet: `python benchmarks/solvers.py`.", ""]
    titles = {
        "error": "Error of a drawing against passes of the model",
        "feature_at_1": "Drawings nearest to their picture by features (R@1) against passes of the model",
    }
    plots: list[str] = []
    for key, title in titles.items():
        if key not in result["rows"][0]:  # of an older measurement
            continue
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in result["rows"]:
            lines.setdefault(row["solver"], []).append((row["passes"], row[key]))
        plots += plot("solvers" if key == "error" else f"solvers_{key}", lines, "passes of the model", title)
    names = {"to_real": "distance to the picture", "feature_at_1": "R@1 features", "pixel_at_1": "R@1 pixels"}
    rows = [{names.get(key, key): value for key, value in row.items()} for row in result["rows"]]
    columns = ("solver", "steps", "passes", "error", *names.values(), "seconds")
    return [*origin(result), *plots, *table(rows, tuple(name for name in columns if name in rows[0]))]


def growth_part() -> list[str]:
    """Samples per second against what grows."""
    result = measured("growth")
    if result is None:
        return ["Not measured yet: `python benchmarks/growth.py`.", ""]
    out = origin(result)
    titles = {
        "tokens": "tokens per picture",
        "batch": "batch",
        "depth": "layers of the base",
        "pictures": "pictures per sequence",
    }
    for name, axis_label in titles.items():
        rows = [row for row in result["rows"] if row["varied"] == name]
        if rows:
            points = [(float(row[name]), row["samples_per_second"]) for row in rows]
            title = f"Samples per second against {axis_label}"
            out += plot(f"growth_{name}", {"samples": points}, axis_label, title, log=True)
            out += table(rows, ("tokens", "batch", "depth", "pictures", "samples_per_second", "tokens_per_second"))
    return out


def serving_part() -> list[str]:
    """Seconds of answers of a server under load."""
    result = measured("serving")
    if result is None:
        return ["Not measured yet: `python benchmarks/serving.py` on an idle machine.", ""]
    columns = ("clients", "seconds", "request", "answers", "wrong", "refused", "late", "failed", "p50", "p95", "p99")
    titles = {
        "first_word_p50": "p50 to first word",
        "megabytes_first_third": "MB at first",
        "megabytes_last_third": "MB at last",
    }
    rows = [{titles.get(key, key): value for key, value in row.items()} for row in result["rows"]]
    about = (
        f"`--limits.queue {result['queue']} --limits.batch {result['batch']}`, {result['steps']} steps per drawing, words of at"
        f" most {result['tokens']} tokens. `draw` requests a drawing, `look` what a picture shows, `say` words, `embed` vectors."
        " *refused*: 429, after which the client asks again; *late*: past the deadline; *wrong*: not the answer of the single"
        " call. p50, p95 and p99 are seconds; MB is the server's largest memory in the first and in the last third of the time."
    )
    return [*origin(result), about, "", *table(rows, (*columns, *titles.values()))]


def codecs_part() -> list[str]:
    """What kinds of codes keep of a picture, and how they use their codes."""
    result = measured("codecs")
    if result is None:
        return ["Not measured yet: `python runs/compare_emoji_codes.py`.", ""]
    counts = result["pictures"]
    about = (
        f"{result['steps']} steps of {result['batch']} pictures at rate {result['rate']:g}, widths {result['channels']},"
        f" seed {result['seed']}, {result['entries']} codes a level;"
        f" {counts['train']:,} pictures trained and {counts['held']:,} held out."
    )
    head = [
        "codec",
        "bits of a picture",
        "PSNR over all pixels, dB",
        "over pixels that are not white, dB",
        "codes used",
    ]
    lines = [*origin(result), about, "", f"| {' | '.join([*head, 'perplexity'])} |", "|" + " --- |" * (len(head) + 1)]

    def pair(row: dict[str, Any], format_part: Any) -> str:
        return ", ".join(format_part(row[split]) for split in ("train", "held"))

    for row in result["rows"]:
        cells = [row["codec"], f"{row['levels'] * row['places'] * math.log2(result['entries']):.0f}"]
        cells += [pair(row, lambda part, name=name: f"{part[name]:.2f}") for name in ("all_pixels", "non_white")]
        cells += [pair(row, lambda part: f"{part['codes_used']:.0%}")]
        cells += [pair(row, lambda part: " + ".join(f"{level:.0f}" for level in part["perplexities"]))]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def sound_codes_part() -> list[str]:
    """What clusters keep of features, and how they are used."""
    result = measured("sound_codes")
    if result is None:
        return ["Not measured yet: `python runs/fit_sound_codes.py`.", ""]
    columns = ("sounds", "features", "variance explained", "codes used", "perplexity")
    rows = [
        {
            "sounds": part.replace("_", " "),
            "features": f"{figures['features']:,}",
            "variance explained": f"{figures['explained']:.3f}",
            "codes used": f"{figures['codes_used']:.0%}",
            "perplexity": f"{figures['perplexity']:.1f}",
        }
        for part, figures in result["parts"].items()
    ]
    about = (
        f"{result['entries']} clusters, {result['pooled']} features to a code, a window of {result['window']:g} s,"
        f" seed {result['seed']}."
    )
    return [*origin(result), about, "", *table(rows, columns)]


DAMAGES = {
    "jpeg": "JPEG quality",
    "crop": "share of the side kept by a crop",
    "resolution": "resolution (share of the side)",
}
"""What the strength of a damage is."""


def questions_part(name: str) -> list[str]:
    """What a trained model understands by the suite's questions of one kind, and its curves of damage."""
    file = RESULTS / "understanding" / f"{name}.json"
    if not file.is_file():
        return [
            f"Not measured yet: `xfusion evaluate runs/understanding --suite understanding --set questions={name}`.",
            "",
        ]
    result = json.loads(file.read_text(encoding="utf-8"))
    settings, difference = result["settings"], result["accuracy_over_blind_interval"]
    verdict = "above the blind rate" if difference and difference[0] > 0 else "not above the blind rate"
    measures = [
        ("accuracy", result["accuracy"], result["accuracy_interval"]),
        ("blind: pictures permuted, mean of five", result["accuracy_blind"], None),
        ("most frequent answer", result["chance_accuracy"], None),
        ("accuracy minus blind", result["accuracy_over_blind"], difference),
        ("accuracy in JSON, with a schema", result["accuracy_json"], None),
        ("valid JSON", result["json_valid"], None),
        ("answered, if refusal is allowed", result["answered"], None),
        ("accuracy on those", result["accuracy_answered"], None),
    ]
    rows = [
        {
            "test part": label,
            "share": "-" if value is None else f"{value:.3f}",
            "95 % interval": f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else "-",
        }
        for label, value, bounds in measures
    ]
    bound = result["refusal_threshold"]
    refusal_note = (
        f"no confidence reaches an accuracy of {settings['wanted']:g} there, so all questions are refused"
        if bound is None
        else f"there, answers with a confidence of {bound:.3f} or more reach an accuracy of {settings['wanted']:g}"
    )
    lines = [
        f"{settings['num_test']} questions of {settings['num_test_clusters']} clusters were tested."
        f" The threshold was chosen on {settings['num_validation']} others: {refusal_note}. **{verdict.capitalize()}.**",
        "",
        *table(rows, ("test part", "share", "95 % interval")),
    ]
    for damage, points in result["curves"].items():
        ends = [points[0][0], points[-1][0]]
        lines_by_name = {
            "accuracy": [(x, y) for x, y in points],
            "blind": [(x, result["accuracy_blind"]) for x in ends],
        }
        title = f"Accuracy against {DAMAGES[damage]}"
        svg_file = HERE / "pictures" / f"questions_{name}_{damage}.svg"
        svg = curves(list(lines_by_name), lines_by_name, DAMAGES[damage])
        svg_file.write_text(standalone(svg, legend(lines_by_name)), encoding="utf-8")
        points_text = ", ".join(f"{x:g}: {y:.3f}" for x, y in reversed(points))
        lines += [f"**{title}** ({points_text})", "", f"![{title}](pictures/{svg_file.name})", ""]
    return lines


def json_part() -> list[str]:
    """Accuracy of counting in JSON, of a reader that never learned it and of one that did."""
    rows = []
    for name, in_training in (("counting", "no"), ("counting_json", "yes")):
        file = RESULTS / "understanding" / f"{name}.json"
        if file.is_file():
            result = json.loads(file.read_text(encoding="utf-8"))
            shares = ("accuracy", "accuracy_json", "json_valid", "accuracy_blind")
            values = [f"{result[key]:.3f}" for key in shares]
            columns = ("accuracy", "accuracy in JSON", "valid JSON", "blind")
            rows.append({"JSON in training": in_training} | dict(zip(columns, values, strict=True)))
    return table(rows, ("JSON in training", "accuracy", "accuracy in JSON", "valid JSON", "blind"))


def boxes_part(name: str) -> list[str]:
    """Where a trained model finds things, by the suite ``grounding``."""
    file = RESULTS / "understanding" / f"{name}.json"
    if not file.is_file():
        return ["Not measured yet: `xfusion evaluate runs/boxes --suite grounding`.", ""]
    result = json.loads(file.read_text(encoding="utf-8"))
    settings, difference = result["settings"], result["hit_over_blind_interval"]
    verdict = "above the blind rate" if difference and difference[0] > 0 else "not above the blind rate"
    measures = [
        ("its picture", result["hit"], result["hit_interval"], result["overlap"], result["overlap_interval"]),
        ("blind: pictures permuted, mean of five", result["hit_blind"], None, result["overlap_blind"], None),
        ("best single box for all", result["chance_hit"], None, result["chance_overlap"], None),
        (
            "its picture minus blind",
            result["hit_over_blind"],
            difference,
            result["overlap_over_blind"],
            result["overlap_over_blind_interval"],
        ),
    ]
    rows = [
        {
            "input": label,
            "overlap of 0.5 or more": f"{hit:.3f}",
            "95 % interval": f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else "-",
            "mean overlap": f"{mean:.3f}",
            "95 % interval ": f"{overlap_bounds[0]:.3f} to {overlap_bounds[1]:.3f}" if overlap_bounds else "-",
        }
        for label, hit, bounds, mean, overlap_bounds in measures
    ]
    sizes = ", ".join(f"{size:.2f}: {hit:.3f}" for size, hit in result["curves"]["hit_by_size"])
    naming_note = (
        f" In {settings['num_with_others']} pictures with other things, {result['named']:.3f} of the answers overlap most with"
        f" the requested thing (chance {result['named_chance']:.3f})."
        if result["named"] is not None
        else ""
    )
    return [
        f"{settings['num_scenes']} pictures were tested. **{verdict.capitalize()}.** {result['valid']:.3f} of the answers are a"
        f" single box.{naming_note} Hit rate by size of the thing (thirds, by its side as a share of the picture's): {sizes}.",
        "",
        *table(rows, tuple(rows[0])),
    ]


PARTS = {
    "speed.md": {
        "bench": bench_part,
        "time to loss": time_to_loss_part,
        "memory": memory_part,
        "profile": profile_part,
        "solvers": solvers_part,
        "growth": growth_part,
    },
    "scaling.md": {"memory in short": memory_in_short_part},
    "serving.md": {"serving": serving_part},
    "training_log.md": {"codecs": codecs_part, "sound codes": sound_codes_part},
    "questions.md": {
        **{name: partial(questions_part, name) for name in ("counting", "nlvr")},
        "json": json_part,
        "boxes": partial(boxes_part, "boxes"),
    },
}
"""What is measured, by page."""


def write_measured() -> None:
    """Put the measured parts of pages in their places."""
    for name, parts in PARTS.items():
        page = HERE / name
        text = page.read_text(encoding="utf-8")
        for part, make_lines in parts.items():
            marks = f"<!-- measured: {part} -->\n", f"<!-- end: {part} -->"
            pattern = re.compile(f"(?<={re.escape(marks[0])}).*?(?={re.escape(marks[1])})", re.DOTALL)
            text = pattern.sub(lambda _, make_lines=make_lines: "\n" + "\n".join(make_lines()) + "\n", text, count=1)
        page.write_text(text, encoding="utf-8")
        print(f"docs/{name}")


def main() -> None:
    """Write all pages, or those that are named: the measured parts of hand-written ones, the comparisons, or some recipes."""
    choices = ["speed", "comparison", *names()]
    selected = sys.argv[1:] or choices
    if unknown := [name for name in selected if name not in choices]:
        sys.exit(f"{unknown[0]!r} is none of the pages: {', '.join(choices)}")
    if "speed" in selected:
        write_measured()
    if "comparison" in selected:
        (HERE / "comparison.md").write_text(comparison_page(), encoding="utf-8")
        print("docs/comparison.md")
    recipes = [name for name in names() if name in selected]
    if not recipes:
        return
    (HERE / "recipes").mkdir(exist_ok=True)
    (HERE / "recipes" / "index.md").write_text(recipe_index(), encoding="utf-8")
    bases = [Backbone.load(), *(Backbone.of_shape(shape) for shape in SHAPES)]
    for name in recipes:
        (HERE / "recipes" / f"{name}.md").write_text(recipe_page(name, bases), encoding="utf-8")
        print(f"docs/recipes/{name}.md")


if __name__ == "__main__":
    main()
