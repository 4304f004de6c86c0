"""The page of a comparison: one file with its tables, plots and pictures inside; no script, and nothing is fetched.

All outside text is escaped, and every number is read from the result of `xfusion.comparison.summarise`.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image as PILImage

from xfusion.apps.commands.base import size_text, write_whole
from xfusion.apps.commands.compare import text_text
from xfusion.apps.plots import bars, colour, curves, dots, numbered, over_numbers, scatter
from xfusion.apps.report import TEMPLATE, number, picture, text
from xfusion.comparison.intervals import FEWEST_RUNS
from xfusion.comparison.results import REAL, run_name
from xfusion.comparison.table import difference_notes

LOSSES = {"flow_matching": "drawing", "next_token": "naming"}
"""Loss -> its display name."""
CONTRIBUTION = "learned share of the other tower"
"""What the plot of contributions shows."""
SHARES = "% of the pictures"
TIMES = ("step_seconds", "draw_seconds_per_picture", "caption_seconds_per_picture")
"""Times that `measure_time` measures for a recipe."""
STYLE = """<style>
main { max-width: 76rem; overflow-wrap: break-word; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: .9rem; }
.plots h3 { margin: 0 0 .1rem; font-size: .95rem; }
.plots .card { padding: .9rem 1rem .6rem; min-width: 0; }
svg .zero { stroke: var(--soft); stroke-width: 1.2; }
svg .beside { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; }
svg text.name { fill: var(--ink); }
svg text.end { font-size: 10.5px; }
.chip { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
.named { white-space: nowrap; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .88rem; margin: .2rem 0 .8rem; }
.better { color: var(--good); font-weight: 650; } .worse { color: var(--bad); font-weight: 650; }
.scores :is(th, td) { min-width: 9.5rem; } .scores td span { white-space: nowrap; }
.scores :is(th, td):first-child { position: sticky; left: 0; background: var(--page); min-width: 8rem; max-width: 12rem; }
.costs th.num { white-space: normal; min-width: 5rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
td small { color: var(--soft); }
.strips { display: grid; gap: .4rem; align-items: center; min-width: 40rem; }
.wide svg { min-width: 36rem; }
.strips .what { font-size: .74rem; color: var(--soft); text-align: center; line-height: 1.15; align-self: end; }
.strips .who { font-size: .86rem; white-space: nowrap; position: sticky; left: 0; align-self: stretch; background: var(--card);
  display: flex; align-items: center; }
@media (max-width: 34rem) {
  svg text { font-size: 13.5px; } svg text.end { font-size: 12.5px; }
  .plots .card { padding: .7rem .4rem .4rem; } .plots h3 { padding: 0 .4rem; }
  .scores :is(th, td):first-child { min-width: 6.5rem; max-width: 6.5rem; }
}
.strips .rule { grid-column: 1 / -1; border-top: 1px dashed var(--line); }
</style>"""


def write(path: Path, summary: dict[str, Any], folder: Path) -> Path:
    """Write the page atomically.

    Args:
        path: the file.
        summary: the result of `summarise`.
        folder: folder of the sample grids.
    """
    page = render(summary, folder)
    return write_whole(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def render(summary: dict[str, Any], folder: Path) -> str:
    """The page as HTML."""
    template = Template((resources.files("xfusion.apps") / TEMPLATE).read_text(encoding="utf-8"))
    body = "\n".join(
        [
            STYLE + _head(summary),
            _scores(summary),
            _plots(summary),
            _samples(summary, folder),
            _data_needed(summary),
            _learning(summary),
            _text_side(summary),
            _contributions(summary),
            _cost(summary),
            _settings(summary),
        ]
    )
    return template.substitute(title=text(f"xfusion compare: {summary['name']}"), body=body)


def _chip(summary: dict[str, Any], label: str) -> str:
    dot = f'<span class="chip" style="background:{colour(summary["recipes"], label)}"></span>'
    return f'<span class="named">{dot}{text(label)}</span>'


def _arguments(summary: dict[str, Any], label: str) -> str:
    """A recipe's arguments, shown below its name; empty if it has none, or has its own label."""
    _, bracket, rest = summary["called"][label].partition("(")
    return f"<br><small>{text(bracket + rest)}</small>" if bracket else ""


def _legend(summary: dict[str, Any]) -> str:
    return f'<div class="legend">{"".join(f"<span>{_chip(summary, r)}</span>" for r in summary["recipes"])}</div>'


# ----------------------------------------------------------------------------------------------------------- sections


def _head(summary: dict[str, Any]) -> str:
    first, *others = summary["recipes"]
    budget, settings = summary["budget"], summary["settings"]
    budget_text = f"the executed FLOPs of {number(budget['samples'])} samples" if budget["kind"] == "flops" else ""
    budget_text = budget_text or f"{number(budget['samples'])} samples"
    against = f" against {', '.join(others)}" if others else ""
    differences = difference_notes(summary)
    notes = "".join(f"<li>{text(note)}</li>" for note in summary["notes"] if note not in differences)
    details = "".join(f"<li>{text(note)}</li>" for note in differences)
    if details:
        details = (
            f'<details class="small"><summary>What differs besides the mechanism</summary><ul>{details}</ul></details>'
        )
    return f"""<header><h1>{text(first)}{text(against)}</h1>
<p class="lead">Each trained on {budget_text}, {len(summary["seeds"])} seed{"s" if len(summary["seeds"]) != 1 else ""}, on the
same frozen {text(settings["base"]["source"])} and the same {number(settings["num_pictures"])} {summary["media"]} of
{text(settings["data"])}: same order, wordings, noise and sampling noise for the same seed.</p>
<ul class="small">{notes}</ul>{details}</header>"""


def _scores(summary: dict[str, Any]) -> str:
    share = summary["shares"][0]
    head = "".join(f"<th>{_chip(summary, label)}{_arguments(summary, label)}</th>" for label in summary["recipes"])
    rows = ""
    for score in _scores_at(summary, share):
        cells = "".join(f"<td>{_cell(row)}</td>" for row in score["rows"])
        references = ", ".join(f"{k} {score[k]:.3f}" for k in ("chance", "blind", "ceiling") if k in score)
        arrow = "↑" if score["better"] == "higher" else "↓"
        rows += f"<tr><td>{text(score['title'])} {arrow}<br><small>{references}</small></td>{cells}</tr>"
    return f"""<section><h2>Scores</h2><p>Mean over seeds with its 95 % interval; below, the paired difference to
{text(summary["first"])} with its own. {"↑ higher is better, ↓ lower is better."}</p>
<div class="scroll scores"><table><thead><tr><th>score</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"""


def _cell(row: dict[str, Any]) -> str:
    if row["mean"] is None:
        return "–"
    out = f"<span><b>{_short(row['mean'])}</b> {_interval(row['interval'])}</span> <small>n = {row['num_runs']}</small>"
    difference = row["difference"]
    if difference is None:
        return out
    kind = {"better": "better", "worse": "worse"}.get(difference["verdict"].partition(",")[0], "soft")
    bounds = f" {_interval(difference['interval'])}" if difference["interval"] else ""
    out += f'<br><span>{difference["mean"]:+.3f}{bounds}</span><br><span class="{kind}">{difference["verdict"]}</span>'
    if difference["seeds_needed"] and difference["verdict"] == "not decidable":
        out += f"<br><small>{difference['seeds_needed']} seeds would find a difference this large</small>"
    return out


def _interval(bounds: list[float] | None) -> str:
    return (
        f"[{_short(bounds[0])}, {_short(bounds[1])}]" if bounds else f"<small>n &lt; {FEWEST_RUNS}: no interval</small>"
    )


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _scores_at(summary: dict[str, Any], share: float) -> list[dict[str, Any]]:
    return [score for score in summary["scores"] if score["share"] == share]


def _plots(summary: dict[str, Any]) -> str:
    scores, numbers = _scores_at(summary, summary["shares"][0]), numbered(summary["recipes"])

    def recipe_colour(label: str) -> str:
        return colour(summary["recipes"], label)

    def plot(score: dict[str, Any]) -> str:
        return dots(score, recipe_colour) if numbers is None else over_numbers(score, *numbers)

    cards = "".join(f'<div class="card"><h3>{text(s["title"])}</h3>{plot(s)}</div>' for s in scores)
    out = f"""<section><h2>Every run, mean and interval</h2><p>Small dots are runs, the large dot their mean, the bar its
95 % interval (from {FEWEST_RUNS} runs on). Dashed lines: chance, blind rate and ceiling.</p>
<div class="plots">{cards}</div></section>"""
    cards = ""
    for score in scores:
        rows = [{"recipe": r["recipe"], **r["difference"]} for r in score["rows"] if r["difference"]]
        if rows:
            difference_plot = dots(
                {"title": f"difference in {score['title']}", "rows": rows, "zero": 0.0}, recipe_colour
            )
            cards += f'<div class="card"><h3>{text(score["title"])}</h3>{difference_plot}</div>'
    if not cards:
        return out
    return f"""{out}<section><h2>Paired differences to {text(summary["first"])}</h2><p>Small dots are pairs of runs of the
same seed. A bar that does not reach the line at 0 decides; anything else does not.</p>
<div class="plots">{cards}</div></section>"""


def _samples(summary: dict[str, Any], folder: Path) -> str:
    real = _strip(folder / REAL, len(summary["prompts"]))
    if not real:
        return ""
    share = summary["shares"][0]
    strips_by_seed: dict[int, dict[str, list[PILImage.Image]]] = {}
    for seed in summary["seeds"]:
        for label in summary["recipes"]:
            name = run_name(label, seed, share)
            strip = [] if name in summary["drawn_otherwise"] else _strip(folder / f"{name}.png", len(real))
            if strip:
                strips_by_seed.setdefault(seed, {})[label] = strip
    if not strips_by_seed:
        return ""
    columns = f"grid-template-columns: minmax(8.5rem, max-content) repeat({len(real)}, minmax(2.5rem, 6rem))"
    blocks = []
    for seed, strips in strips_by_seed.items():
        cells = ["<div></div>", *(f'<div class="what">{text(prompt)}</div>' for prompt in summary["prompts"])]
        for row_name, pictures in (("real", real), *strips.items()):
            cells.append(f'<div class="who">{_chip(summary, row_name) if row_name in strips else "real"}</div>')
            cells += [picture(p, f"{q}, {row_name}") for p, q in zip(pictures, summary["prompts"], strict=True)]
            cells += ['<div class="rule"></div>'] if row_name == "real" else []
        grid = f'<div class="card scroll"><div class="strips" style="{columns}">{"".join(cells)}</div></div>'
        blocks.append((seed, grid))
    (seed, first_grid), *rest = blocks
    details = "".join(f"<details><summary>Seed {s}</summary>{grid}</details>" for s, grid in rest)
    return f"""<section><h2>Drawn by each</h2><p>The same words and the same noise for all; the concepts are chosen by the
hash of their ids, not by eye. All were trained on these pictures. Seed {seed}:</p>{first_grid}{details}</section>"""


def _strip(path: Path, count: int) -> list[PILImage.Image]:
    """The pictures of a strip; empty if it is missing or has another length."""
    if not path.is_file() or not count:
        return []
    with PILImage.open(path) as sheet:
        side = sheet.height
        if sheet.width != side * count:
            return []
        return [sheet.crop((i * side, 0, (i + 1) * side, side)) for i in range(count)]


def by_share(summary: dict[str, Any], name: str) -> dict[str, list[tuple[float, float]]]:
    """Recipe -> (percent of the pictures, mean score) pairs, for recipes trained on more than one share."""
    tables = sorted((s for s in summary["scores"] if s["score"] == name), key=lambda s: s["share"])
    points: dict[str, list[tuple[float, float]]] = {}
    for table in tables:
        for row in table["rows"]:
            if row["mean"] is not None:
                points.setdefault(row["recipe"], []).append((100 * table["share"], row["mean"]))
    return {label: points[label] for label in summary["recipes"] if len(points.get(label, ())) > 1}


def _data_needed(summary: dict[str, Any]) -> str:
    if len(summary["shares"]) < 2:
        return ""
    cards = ""
    for name in dict.fromkeys(score["score"] for score in summary["scores"]):
        title = next(score["title"] for score in summary["scores"] if score["score"] == name)
        lines = by_share(summary, name)
        cards += f'<div class="card"><h3>{text(title)}</h3>{curves(summary["recipes"], lines, SHARES)}</div>'
    return f"""<section><h2>How much data each needs</h2><p>The same budget on fewer pictures; a smaller share is part of a
larger one. Scores of trained pictures are on those that were trained on, so that fewer are easier.</p>{_legend(summary)}
<div class="plots">{cards}</div></section>"""


def _learning(summary: dict[str, Any]) -> str:
    names = dict.fromkeys(name for curve in summary["learning"].values() for name in curve)
    cards = ""
    for name in names:
        lines = {r: [(s, v) for s, v in summary["learning"].get(r, {}).get(name, [])] for r in summary["recipes"]}
        plot = curves(summary["recipes"], lines, "samples", logarithmic=True)
        cards += f'<div class="card"><h3>loss of {text(LOSSES.get(name, name))}</h3>{plot}</div>' if plot else ""
    if not cards:
        return ""
    return f"""<section><h2>What learning costs</h2><p>Training loss, mean over seeds; what a sample
costs stands in the table of costs.</p>{_legend(summary)}<div class="plots">{cards}</div></section>"""


def _text_side(summary: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_chip(summary, label)}</td><td>{text(text_text(facts))}</td></tr>"
        for label, facts in summary["text"].items()
    )
    plot_part = ""
    drawing_score = next((s for s in _scores_at(summary, 1.0) if s["score"].startswith("fit_retrieval")), None)
    changed = any(facts["bit_equal"] < facts["num_runs"] for facts in summary["text"].values())
    if drawing_score and changed and (plot := scatter(summary, drawing_score)):
        plot_part = f"""<h3>What drawing cost the text</h3><p>Every run: perplexity of the bundled texts against the score in
drawing ({text(drawing_score["title"])}), large ones means. The dashed line is the base.</p>
<div class="card scroll wide" style="max-width:44rem">{plot}</div>"""
    return f"""<section><h2>The base's own text</h2><p>The bundled texts of <code>xfusion verify</code> through the base and
through the fused stack after training.</p><div class="scroll"><table><tbody>{rows}</tbody></table></div>{plot_part}</section>"""


def _contributions(summary: dict[str, Any]) -> str:
    if not summary["contributions"]:
        return ""
    return f"""<section><h2>What the towers contribute</h2><p>Where each position decides how much of the other tower it takes:
means by layer and kind of position, 0 is the plain dual tower.</p>
<div class="card" style="max-width:34rem">{bars(summary["contributions"], CONTRIBUTION)}</div></section>"""


def _cost(summary: dict[str, Any]) -> str:

    def flops(value: float | None) -> str:
        return "–" if value is None else f"{value / 1e9:,.4g}"

    has_times = any(row["time"] for row in summary["cost"])
    head = ["recipe", "trainable parameters", "steps", "samples", "GFLOPs to learn a drawing", "… to learn a name"]
    head += [f"tokens per {summary['media'].removesuffix('s')}", "peak memory", "wall minutes"]
    head += ["seconds per step", "… per drawing", "… per name"] if has_times else []
    rows = ""
    for row in summary["cost"]:
        flops_per_sample, time = row["flops_per_sample"], row["time"] or {}
        cells = [number(row["trainable_parameters"]), " + ".join(map(number, row["steps"])), number(row["samples"])]
        cells += [
            flops(flops_per_sample.get("draw")),
            flops(flops_per_sample.get("caption")),
            number(row["tokens_per_picture"]),
        ]
        peak = row["peak_memory"]["bytes"]
        cells += [size_text(peak) if peak else "–", f"{row['wall_minutes']:.1f}"]
        if has_times:
            cells += [f"{time[key]:.3g}" if time.get(key) is not None else "–" for key in TIMES]
        name_cell = _chip(summary, row["recipe"]) + _arguments(summary, row["recipe"])
        rows += f"<tr><td>{name_cell}</td>{''.join(f'<td class=num>{c}</td>' for c in cells)}</tr>"
    titles = "".join(f"<th{' class=num' if i else ''}>{text(t)}</th>" for i, t in enumerate(head))
    memory_measure = summary["cost"][0]["peak_memory"]["what"]
    return f"""<section><h2>What each costs</h2><p>FLOPs are executed ones, forward and backward, counted by torch on a real
uncompiled step. Peak memory: {text(memory_measure)}.</p><div class="scroll costs"><table><thead><tr>{titles}</tr></thead>
<tbody>{rows}</tbody></table></div></section>"""


def _settings(summary: dict[str, Any]) -> str:
    machine, settings = summary["machine"], summary["settings"]
    rows = [
        ("base", f"{settings['base']['source']}, fingerprint {settings['base']['fingerprint'][:16]}"),
        ("data", f"{settings['data']}, {settings['num_pictures']} {summary['media']}"),
        ("seeds", ", ".join(map(str, summary["seeds"]))),
        ("scoring", json.dumps(settings["evaluation"]) if settings["evaluation"] else "the suite's own settings"),
        ("compute", settings["dtype"]),
        ("processor", f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"),
        ("GPU", machine["gpu"]),
        ("software", ", ".join(f"{k} {v}" for k, v in machine["versions"].items())),
        ("commit", ", ".join(c[:12] for c in summary["commits"]) or None),
        (summary["media"], summary["licence"]),
    ]
    items = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in rows if v is not None)
    fusions = "".join(
        f"<dt>{text(row['recipe'])}</dt><dd><code>{text(_fusion(row['fusion']))}</code></dd>" for row in summary["cost"]
    )
    command = f"<h3>Make it again</h3><pre>{text(summary['command'])}</pre>" if summary["command"] else ""
    return f"""<section><h2>Settings</h2><dl>{items}</dl><h3>Mechanisms</h3><dl>{fusions}</dl>{command}
<p class="small soft">Each run's JSON file beside this page holds its whole recipe, all its scores, chance, ceiling and
blind rates.</p></section><footer>This page is one file, without scripts, and loads nothing.</footer>"""


def _fusion(config: dict[str, Any]) -> str:
    name = config["type"].rpartition(":")[2].removesuffix(".Config")
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in config.items() if k != 'type')})"
