"""Plots as SVG, without a script: dots with intervals, lines, bars and points; their style comes from the page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from xfusion.apps.report import text

COLOURS = ("#c2571a", "#2f73c8", "#1c8a55", "#9355bd", "#c43f52", "#0f8f95", "#a3800a", "#7a7468")
"""Colours of the recipes, in order; repeated if there are more recipes."""
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 10, 40
"""Margins around the area between the axes."""
STANDALONE_STYLE = """<style>text{font:13px sans-serif;fill:#555}text.name{fill:#222}text.end{font-size:10.5px}
.curve{fill:none;stroke-width:2}
.grid-line{stroke:#ddd}.beside{stroke:#888;stroke-dasharray:3 3}.zero{stroke:#888;stroke-width:1.2}</style>"""
"""Style of a plot in its own file, without the page's style."""


def colour(recipes: Sequence[str], label: str) -> str:
    """A recipe's colour, by its position among all of them."""
    return COLOURS[recipes.index(label) % len(COLOURS)]


def dots(score: dict[str, Any], colour_of: Callable[[str], str]) -> str:
    """One score of all recipes as dots and intervals.

    Args:
        score: an entry of ``summary["scores"]``.
        colour_of: gives a recipe's colour by its name.
    """
    width, left, right, top, step = 420, 118, 20, 8, 34
    rows = [row for row in score["rows"] if row["mean"] is not None]
    references = {kind: score[kind] for kind in ("zero", "chance", "blind", "ceiling") if kind in score}
    values = [v for row in rows for v in row["values"].values()] + list(references.values())
    values += [v for row in rows for v in row["interval"] or ()]
    low, high, ticks = _axis(values)
    height = top + step * len(rows) + 40

    def x(value: float) -> float:
        return left + (width - left - right) * (value - low) / (high - low)

    parts = []
    bottom = height - 32
    for tick in ticks:
        parts.append(f'<line class="grid-line" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="end" x="{x(tick):.1f}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>')
    labels: list[tuple[float, str]] = []
    for kind, value in sorted(references.items(), key=lambda item: item[1]):
        line = "zero" if kind == "zero" else "beside"
        parts.append(f'<line class="{line}" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top}" y2="{bottom}"/>')
        if labels and x(value) - labels[-1][0] < 42:  # lines this near share one label
            labels[-1] = ((labels[-1][0] + x(value)) / 2, f"{labels[-1][1]}, {kind}")
        elif kind != "zero":
            labels.append((x(value), kind))
    for label_x, label_text in labels:
        parts.append(f'<text class="end" x="{label_x:.1f}" y="{bottom + 27}" text-anchor="middle">{label_text}</text>')
    for index, row in enumerate(rows):
        y, fill = top + step * (index + 0.5), colour_of(row["recipe"])
        parts.append(
            f'<text class="name" x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{text(_shorten(row["recipe"]))}</text>'
        )
        if row["interval"]:
            a, b = (x(v) for v in row["interval"])
            parts.append(f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{y}" y2="{y}" stroke="{fill}" stroke-width="3"/>')
        for k, value in enumerate(row["values"].values()):
            dot_y = y + (-7 if k % 2 else 7)
            parts.append(f'<circle cx="{x(value):.1f}" cy="{dot_y}" r="2.8" fill="{fill}" opacity=".6"/>')
        parts.append(f'<circle cx="{x(row["mean"]):.1f}" cy="{y}" r="5.5" fill="{fill}"/>')
    summary = "; ".join(f"{row['recipe']} {row['mean']:.3g}" for row in rows)
    return _svg(width, height, f"{score['title']}: {summary}", parts)


def numbered(labels: Sequence[str]) -> tuple[str, dict[str, float]] | None:
    """The number by which recipes differ, and each one's value: ``batch_8``, ``batch_16`` -> ``batch``, 8 and 16.

    None if there are fewer than three recipes, one is named differently, or a number is not above 0.
    """
    matches = [re.fullmatch(r"(\w+?)_(\d+(?:\.\d+)?)", label) for label in labels]
    if len(labels) < 3 or not all(matches) or len({match[1] for match in matches if match}) > 1:
        return None
    numbers = {label: float(match[2]) for label, match in zip(labels, matches, strict=True) if match}
    return (matches[0][1], numbers) if matches[0] and min(numbers.values()) > 0 else None


def over_numbers(score: dict[str, Any], axis_label: str, numbers: Mapping[str, float]) -> str:
    """One score as a line through the means of recipes that differ in one number, with every run and the intervals.

    Args:
        score: an entry of ``summary["scores"]``.
        axis_label: the name of the number.
        numbers: recipe -> its number, above 0; the axis is logarithmic.
    """
    rows = sorted((r for r in score["rows"] if r["mean"] is not None), key=lambda row: numbers[row["recipe"]])
    positions = {row["recipe"]: math.log10(numbers[row["recipe"]]) for row in rows}
    references = {kind: score[kind] for kind in ("chance", "blind", "ceiling") if kind in score}
    values = [v for row in rows for v in (*row["values"].values(), *(row["interval"] or ()))]
    width, height, fill = 420, 250, COLOURS[0]
    x, y, parts = _axes(
        width,
        height,
        axis_label,
        list(positions.values()),
        [*values, *references.values()],
        lambda tick: "",
        lambda tick: f"{tick:g}",
    )
    labels: list[tuple[float, str]] = []
    for kind, value in sorted(references.items(), key=lambda item: -item[1]):
        label_y = y(value)
        parts.append(f'<line class="beside" x1="{LEFT}" x2="{width - RIGHT}" y1="{label_y:.1f}" y2="{label_y:.1f}"/>')
        if labels and label_y - labels[-1][0] < 16:  # lines this near share one label
            labels[-1] = (labels[-1][0], f"{labels[-1][1]}, {kind}")
        else:
            labels.append((label_y, kind))
    for label_y, label_text in labels:
        parts.append(
            f'<text class="end" x="{width - RIGHT}" y="{label_y - 3:.1f}" text-anchor="end">{label_text}</text>'
        )
    path = " ".join(f"{x(positions[row['recipe']]):.1f},{y(row['mean']):.1f}" for row in rows)
    parts.append(f'<polyline class="curve" stroke="{fill}" points="{path}"/>')
    for row in rows:
        point_x, label = x(positions[row["recipe"]]), f"{numbers[row['recipe']]:g}"
        parts.append(
            f'<text class="end" x="{point_x:.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{label}</text>'
        )
        if row["interval"]:
            low, high = (y(v) for v in row["interval"])
            parts.append(
                f'<line x1="{point_x:.1f}" x2="{point_x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{fill}" stroke-width="3"/>'
            )
        for k, value in enumerate(row["values"].values()):
            dot_x = point_x + (-6 if k % 2 else 6)
            parts.append(f'<circle cx="{dot_x:.1f}" cy="{y(value):.1f}" r="2.8" fill="{fill}" opacity=".6"/>')
        parts.append(f'<circle cx="{point_x:.1f}" cy="{y(row["mean"]):.1f}" r="5.5" fill="{fill}"/>')
    summary = "; ".join(f"{numbers[row['recipe']]:g} {row['mean']:.3g}" for row in rows)
    return _svg(width, height, f"{score['title']} by {axis_label}: {summary}", parts)


def bars(groups: Mapping[str, Mapping[str, float]], axis_label: str) -> str:
    """Named values in groups, as bars from zero.

    Args:
        groups: group -> name -> value.
        axis_label: the name of the values.
    """
    width, left, right, top, step = 420, 178, 20, 8, 18
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    low, high, ticks = _axis([0.0, *(v for group in groups.values() for v in group.values())])
    height = top + sum(step * (len(group) + 1) for group in groups.values()) + 40

    def x(value: float) -> float:
        return left + (width - left - right) * (value - low) / (high - low)

    bottom, row_y, parts = height - 34, float(top), []
    for tick in ticks:
        parts.append(f'<line class="grid-line" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="end" x="{x(tick):.1f}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>')
    for group, values in groups.items():
        row_y += step
        parts.append(f'<text class="name" x="4" y="{row_y:.1f}">{text(group)}</text>')
        for name, value in values.items():
            row_y += step
            start, stop = sorted((x(0), x(value)))
            fill = COLOURS[names.index(name) % len(COLOURS)]
            parts.append(f'<text class="end" x="{left - 8}" y="{row_y:.1f}" text-anchor="end">{text(name)}</text>')
            parts.append(
                f'<rect x="{start:.1f}" y="{row_y - 10:.1f}" width="{max(stop - start, 0.5):.1f}" height="11" fill="{fill}"/>'
            )
    parts.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{top}" y2="{bottom}"/>')
    parts.append(
        f'<text class="end" x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">{text(axis_label)}</text>'
    )
    return _svg(width, height, axis_label, parts)


def curves(
    recipes: Sequence[str], lines: dict[str, list[tuple[float, float]]], axis_label: str, *, logarithmic: bool = False
) -> str:
    """One line per recipe.

    Args:
        recipes: all of them, in the order of their colours; lines may be fewer.
        lines: recipe -> points.
        axis_label: the label of the x axis.
        logarithmic: use a logarithmic y axis if the range of values is large; points at 0 and below are then left out.
    """
    width, height = 420, 250
    values = [b for line in lines.values() for _, b in line if b > 0]
    logarithmic = logarithmic and bool(values) and max(values) > 8 * min(values)  # else round ticks read better
    lines = {
        k: [(a, math.log10(b) if logarithmic else b) for a, b in v if not logarithmic or b > 0]
        for k, v in lines.items()
    }
    lines = {k: v for k, v in lines.items() if v}
    if not lines:
        return ""
    points = [point for line in lines.values() for point in line]
    x, y, parts = _axes(
        width,
        height,
        axis_label,
        [0.0, *(a for a, _ in points)],
        [b for _, b in points],
        lambda tick: f"{tick / 1000:g}k" if tick >= 1000 else f"{tick:g}",
        lambda tick: f"{float(f'{10**tick:.3g}'):,g}" if logarithmic else f"{tick:g}",
    )
    for label, line in lines.items():
        fill, path = colour(recipes, label), " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
        parts.append(f'<polyline class="curve" stroke="{fill}" points="{path}"/>')
        parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.4" fill="{fill}"/>' for a, b in line if len(line) < 8]
    return _svg(width, height, f"{', '.join(lines)} by {axis_label}", parts)


def scatter(summary: dict[str, Any], score: dict[str, Any]) -> str:
    """Perplexity of the fused stack (logarithmic) against a score: a small dot per run, a large one per mean. Empty without
    a finite perplexity.
    """
    width, margin = 640, 150
    height = max(300, TOP + 20 * len(summary["recipes"]) + BOTTOM)
    base = math.log10(next(iter(summary["text"].values()))["perplexity_base"])
    points = [
        (row["recipe"], math.log10(summary["text"][row["recipe"]]["perplexity_fused"][seed]), value)
        for row in score["rows"]
        for seed, value in row["values"].items()
        if summary["text"][row["recipe"]]["perplexity_fused"].get(seed)  # None if it was not finite
    ]
    if not points:
        return ""
    x, y, parts = _axes(
        width,
        height,
        "perplexity of the text (dashed: the base's)",
        [base, *(p for _, p, _ in points)],
        [v for _, _, v in points],
        lambda tick: f"{10**tick:.3g}",
        lambda tick: f"{tick:g}",
        margin,
    )
    middle = (TOP + height - BOTTOM) / 2
    parts.append(
        f'<text class="end" transform="translate(14 {middle:g}) rotate(-90)" text-anchor="middle">'
        f"{text(score['title'].rpartition(': ')[2])}</text>"
    )
    parts.append(f'<line class="beside" x1="{x(base):.1f}" x2="{x(base):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
    for index, label in enumerate(summary["recipes"]):
        recipe_points, fill = [(p, v) for recipe, p, v in points if recipe == label], colour(summary["recipes"], label)
        if not recipe_points:
            continue
        for perplexity, value in recipe_points:
            parts.append(f'<circle cx="{x(perplexity):.1f}" cy="{y(value):.1f}" r="3" fill="{fill}" opacity=".6"/>')
        mean_x, mean_y = (sum(values) / len(recipe_points) for values in zip(*recipe_points, strict=True))
        parts.append(f'<circle cx="{x(mean_x):.1f}" cy="{y(mean_y):.1f}" r="6.5" fill="{fill}"/>')
        legend_y = TOP + 20 * index + 10
        parts.append(f'<circle cx="{width - margin + 16}" cy="{legend_y}" r="5" fill="{fill}"/>')
        parts.append(f'<text class="name" x="{width - margin + 26}" y="{legend_y + 4}">{text(_shorten(label))}</text>')
    return _svg(width, height, "perplexity of the text against drawing, one small dot per run", parts)


def standalone(svg: str, legend: Mapping[str, str] = MappingProxyType({})) -> str:
    """A plot as its own file, with its style and a size, without which pages stretch it.

    Args:
        svg: the plot.
        legend: names and their colours, written below the plot, where no line crosses them.
    """
    head, rest = svg.split(">", 1)
    box = head.split('"')[1]
    width, height = (float(side) for side in box.split()[2:])
    names = (
        f'<text class="name" x="46" y="{height + 16 * i + 12:g}" style="fill:{colour}">{text(name)}</text>'
        for i, (name, colour) in enumerate(legend.items())
    )
    rest = rest.replace("</svg>", f"{''.join(names)}</svg>")
    if legend:
        height += 16 * len(legend) + 4
        head = head.replace(box, f"0 0 {width:g} {height:g}")
    head = f'{head} width="{1.3 * width:g}" height="{1.3 * height:g}" xmlns="http://www.w3.org/2000/svg"'
    return f'{head}>{STANDALONE_STYLE}<rect width="100%" height="100%" fill="white"/>{rest}\n'


# ------------------------------------------------------------------------------------------------- axes and their text


def _axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Ends and round ticks of an axis that covers the values."""
    low, high = min(values), max(values)
    if high - low < 1e-12:
        margin = abs(high) / 10 or 0.05
        low, high = low - margin, high + margin
    raw = (high - low) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * f for f in (1, 2, 2.5, 5, 10) if unit * f >= raw * 0.999)
    low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
    count = round((high - low) / step)
    return low, high, [float(f"{low + i * step:.6g}") for i in range(count + 1)]


def _axes(
    width: int,
    height: int,
    axis_label: str,
    x_values: Sequence[float],
    y_values: Sequence[float],
    format_x: Callable[[float], str],
    format_y: Callable[[float], str],
    margin: int = RIGHT,
) -> tuple[Callable[[float], float], Callable[[float], float], list[str]]:
    """Functions that map a value to its x and to its y position, and both axes as SVG.

    ``x_values`` and ``y_values`` are the values that the axes cover, and ``format_x`` and ``format_y`` write their ticks.
    ``axis_label`` is the label of the x axis; ``margin`` pixels stay free on the right.
    """
    x_low, x_high, x_ticks = _axis(x_values)
    y_low, y_high, y_ticks = _axis(y_values)
    right, bottom = width - margin, height - BOTTOM

    def x(value: float) -> float:
        return LEFT + (right - LEFT) * (value - x_low) / (x_high - x_low)

    def y(value: float) -> float:
        return TOP + (bottom - TOP) * (y_high - value) / (y_high - y_low)

    parts = []
    for tick in y_ticks:
        tick_y = y(tick)
        parts.append(f'<line class="grid-line" x1="{LEFT}" x2="{right}" y1="{tick_y:.1f}" y2="{tick_y:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 7}" y="{tick_y + 4:.1f}" text-anchor="end">{format_y(tick)}</text>')
    for tick in x_ticks:
        label = format_x(tick)
        parts.append(f'<text class="end" x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    parts.append(
        f'<text class="end" x="{(LEFT + right) / 2}" y="{height - 6}" text-anchor="middle">{axis_label}</text>'
    )
    return x, y, parts


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    label = text(title)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}"><title>{label}</title>{"".join(parts)}</svg>'


def _shorten(label: str) -> str:
    return label if len(label) <= 17 else label[:16] + "…"
