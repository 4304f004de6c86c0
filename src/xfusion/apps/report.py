"""The demo's page: one file with its style, curves and pictures inside; no script, and nothing is fetched.

All outside text is escaped, and every number is read from the content of ``metrics.json``.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image as PILImage

from xfusion.apps.commands.base import written

TEMPLATE = "report.html"
BINS = 160
"""Points of a curve; each is the geometric mean of the steps in its time interval."""
SMALLEST = 1e-6
"""Smallest loss drawn, since the axis is logarithmic; smaller ones are clipped to it."""
SCORES = (
    "num_concepts",
    "fit_retrieval_pixel_at_1",
    "fit_retrieval_pixel_at_10",
    "fit_retrieval_feature_at_1",
    "fit_retrieval_feature_at_10",
    "fit_caption_exact",
    "held_caption_mrr",
    "held_caption_mrr_blind",
)
"""Scores that `metrics.json` always has for a pack; chance and ceiling are separate."""
LOSSES = {"flow_matching": ("draw", "drawing"), "next_token": ("say", "naming")}
"""Loss -> CSS class of its line, and its display name."""

# ----------------------------------------------------------------------------------------------- what the page shows


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer to a picture, and whether it is one of the picture's names."""

    said: str
    right: bool


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Previews of one point in time."""

    seconds: float
    step: int
    pictures: Sequence[PILImage.Image]


@dataclass(frozen=True, kw_only=True)
class Concept:
    """A training picture, the drawing from its name, and the answers to it."""

    name: str
    real: PILImage.Image
    drawn: PILImage.Image
    rank: int
    """Rank of the real picture among all training pictures, by pixel distance to the drawn one."""
    answer: Answer
    shipped: PILImage.Image | None = None
    shipped_answer: Answer | None = None


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A held-out picture."""

    name: str
    picture: PILImage.Image
    answer: Answer
    rank: float
    """Rank of the true name among the candidates."""
    shipped_answer: Answer | None = None


@dataclass(frozen=True, kw_only=True)
class Story:
    """All content of the page."""

    metrics: dict[str, Any]
    """The content of ``metrics.json``."""
    curve: Sequence[tuple[float, dict[str, float]]]
    """Seconds and losses of every step."""
    frames: Sequence[Frame]
    frame_names: Sequence[str]
    """Prompts of the previews."""
    frame_real: Sequence[PILImage.Image]
    """The real pictures for these prompts."""
    concepts: Sequence[Concept]
    """All training pictures."""
    num_shown: int
    """How many of them, from the first, are shown in full."""
    held: Sequence[HeldOut]
    commands: Sequence[tuple[str, str]]
    """Commands and what they do."""


def write(path: Path, story: Story) -> Path:
    """Write the page atomically."""
    page = render(story)
    return written(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def render(story: Story) -> str:
    """The page as HTML."""
    template = Template((resources.files("xfusion.apps") / TEMPLATE).read_text(encoding="utf-8"))
    sections = (_head, _film, _curve_section, _drawings, _answers, _unseen, _proof, _numbers, _machine, _next, _foot)
    return template.substitute(title="xfusion demo", body="\n".join(section(story) for section in sections))


# ---------------------------------------------------------------------------------------------------- small helpers


def text(value: Any) -> str:
    """Any value as escaped text."""
    return escape(str(value), quote=True)


def number(value: float | int | None) -> str:
    """A formatted score or count; a dash if it was not measured."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def percent(value: float | None) -> str:
    """A fraction as percent."""
    return "–" if value is None else f"{100 * value:.0f} %"


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def picture(image: PILImage.Image, words: str) -> str:
    """An embedded picture, with its pixels shown as squares."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img class="px" {size} alt="{text(words)}" src="data:image/png;base64,{data}">'


def mark(right: bool) -> str:
    """A tick or a cross, with text for screen readers."""
    sign, word = ("✓", "right") if right else ("✗", "wrong")
    return f'<i class="{"yes" if right else "no"}" role="img" aria-label="{word}">{sign}</i>'


def _rows(rows: Iterable[tuple[str, Any]]) -> str:
    items = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in rows if v is not None)
    return f"<dl>{items}</dl>"


def _million(count: int) -> str:
    return f"{count / 1e6:.1f} million"


# --------------------------------------------------------------------------------------------------------- sections


def _head(story: Story) -> str:
    m = story.metrics
    fresh, same = m["fresh"], m["text_identical"]
    passed = [c for each in m["proof"].values() for c in each["checks"]]
    share = m["num_new_parameters"] / m["num_frozen_parameters"]
    title, words = (
        (
            "Its text is bit-identical to before.",
            "Logits and greedy tokens, with the new weights in place and with noise instead of them:",
        )
        if same
        else ("Its text is NOT identical to before.", "Something changed what the model says:")
    )
    able = all((fresh[name] or 0) >= 0.5 for name in ("fit_retrieval_pixel_at_1", "fit_caption_exact"))
    verb = "learned" if able else "is learning"
    good = sum(c["passed"] for c in passed)
    tiles = (
        (
            percent(fresh["fit_retrieval_pixel_at_1"]),
            f"of {fresh['num_concepts']} drawings are nearest to the emoji they should be",
        ),
        (percent(fresh["fit_caption_exact"]), f"of {fresh['num_concepts']} emoji are named right"),
        (f"{m['minutes_training']:.1f} min", f"of training, {number(m['training']['samples'])} samples"),
        (number(m["joint_samples_per_second"]), f"samples/s; drawing alone {number(m['drawing_samples_per_second'])}"),
    )
    return f"""<header>
<h1>A frozen language model {verb} to draw and to name emoji</h1>
<p class="lead">{text(_base_name(m["base"]["source"]))} was never shown a picture. Beside its
{_million(m["num_frozen_parameters"])} frozen weights stand {_million(m["num_new_parameters"])} new ones
({percent(share)}), trained for {m["minutes_training"]:.1f} minutes on {text(_where(m["machine"]))} to draw
{fresh["num_concepts"]} emoji from words and to name them from pictures.</p>
<div class="proof{"" if same else " bad"}"><div class="mark" aria-hidden="true">{"✓" if same else "✗"}</div>
<div><strong>{title}</strong><p class="small">{words} {good} of {len(passed)} checks passed.
<a href="#proof">The proof</a></p></div></div>
<div class="tiles">{"".join(f'<div class="tile"><b>{a}</b><span>{text(b)}</span></div>' for a, b in tiles)}</div>
</header>"""


def _base_name(source: str) -> str:
    name = source.rsplit("/", 1)[-1].removesuffix(".gguf")
    stem, _, kind = name.rpartition(".")
    return stem if stem and kind.upper().startswith(("Q", "F", "BF")) else name


def _where(machine: dict[str, Any]) -> str:
    if machine["gpu"]:
        return machine["gpu"]
    return f"{machine['cores']} processor core{'' if machine['cores'] == 1 else 's'}"


def _film(story: Story) -> str:
    if not story.frames:
        return ""
    cells = ["<div></div>", *(f'<div class="what">{text(name)}</div>' for name in story.frame_names)]
    for frame in story.frames:
        cells.append(f'<div class="when" title="step {frame.step}">{clock(frame.seconds)}</div>')
        cells += [
            picture(p, f"{n} at {clock(frame.seconds)}") for p, n in zip(frame.pictures, story.frame_names, strict=True)
        ]
    cells.append('<div class="rule"></div><div class="when real">real</div>')
    cells += [picture(p, f"the real {n}") for p, n in zip(story.frame_real, story.frame_names, strict=True)]
    columns = f"grid-template-columns: minmax(1.9rem, auto) repeat({len(story.frame_names)}, 1fr)"
    return f"""<section><h2>Learning to draw</h2>
<p>The same words and the same noise each time. Left: minutes and seconds since the start, compiling included.</p>
<div class="card film" style="{columns}">{"".join(cells)}</div></section>"""


def _curve_section(story: Story) -> str:
    if len(story.curve) < 2:
        return ""
    last = story.metrics["training"]["last_losses"] or {}
    ends = ", ".join(f"{LOSSES.get(k, (k, k))[1]} {v:.3g}" for k, v in last.items())
    return f"""<section><h2>How it learned</h2>
<p>Both losses of every step, on a logarithmic axis. The last step: {text(ends)}. Dots mark the rows of the film above.</p>
<div class="card">{curve_svg(story.curve, [f.seconds for f in story.frames])}</div></section>"""


def curve_svg(curve: Sequence[tuple[float, dict[str, float]]], shots: Sequence[float] = ()) -> str:
    """The losses over time; the y axis is logarithmic."""
    width, height, left, right, top, bottom = 720, 320, 72, 108, 14, 40
    longest = max(seconds for seconds, _ in curve) or 1.0
    lines = {name: _binned(curve, name, longest) for name in dict.fromkeys(k for _, losses in curve for k in losses)}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    values = [math.log10(v) for points in lines.values() for _, v in points]
    low, high = math.floor(min(values)), max(math.ceil(max(values)), math.floor(min(values)) + 1)

    def x(seconds: float) -> float:
        return left + (width - left - right) * seconds / longest

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - math.log10(value)) / (high - low)

    parts = []
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line class="grid-line" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for seconds, label in _ticks(longest):
        parts.append(f'<text x="{x(seconds):.1f}" y="{height - bottom + 22}" text-anchor="middle">{label}</text>')
    for seconds in shots:
        parts.append(f'<circle class="shot" cx="{min(x(seconds), width - right):.1f}" cy="{height - bottom}" r="3.5"/>')
    ends = _apart([(y(points[-1][1]), name) for name, points in lines.items()], 22)
    for name, points in lines.items():
        kind, words = LOSSES.get(name, ("say", name))
        path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)
        parts.append(f'<polyline class="curve {text(kind)}" points="{path}"/>')
        parts.append(
            f'<text class="{text(kind)}" x="{width - right + 8}" y="{ends[name] + 4:.1f}">{text(words)}</text>'
        )
    title = "Losses over time, logarithmic: " + ", ".join(LOSSES.get(name, ("", name))[1] for name in lines)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(title)}"><title>{text(title)}</title>'
        f"{''.join(parts)}</svg>"
    )


def _binned(curve: Sequence[tuple[float, dict[str, float]]], name: str, longest: float) -> list[tuple[float, float]]:
    bins: dict[int, list[tuple[float, float]]] = {}
    for seconds, losses in curve:
        value = losses.get(name)
        if value is not None and math.isfinite(value):
            bins.setdefault(int(BINS * seconds / longest), []).append((seconds, math.log(max(value, SMALLEST))))
    return [
        (sum(s for s, _ in part) / len(part), math.exp(sum(v for _, v in part) / len(part)))
        for _, part in sorted(bins.items())
    ]


def _ticks(longest: float) -> list[tuple[float, str]]:
    minutes = longest / 60
    if minutes < 1:
        step = 10
        return [(float(s), f"{s} s") for s in range(0, int(longest) + 1, step)]
    step = next((s for s in (1, 2, 5, 10, 20, 30, 60, 120, 240) if minutes / s <= 8), 480)
    return [(60.0 * m, f"{m} min" if m else "0") for m in range(0, int(minutes) + 1, step)]


def _apart(places: list[tuple[float, str]], least: float) -> dict[str, float]:
    """Label positions that do not overlap."""
    out: dict[str, float] = {}
    before = -math.inf
    for at, name in sorted(places):
        before = max(at, before + least)
        out[name] = before
    return out


def _drawings(story: Story) -> str:
    shown, fresh = story.concepts[: story.num_shown], story.metrics["fresh"]
    with_shipped = any(c.shipped for c in shown)
    cards = []
    for c in shown:
        figures = [_figure(c.drawn, f"fresh {mark(c.rank == 1)}", f"{c.name}, drawn by the fresh tower")]
        if c.shipped is not None:
            figures.append(_figure(c.shipped, "shipped", f"{c.name}, drawn by the shipped pack"))
        figures.append(_figure(c.real, "real", f"the real {c.name}"))
        cards.append(
            f'<div class="card"><p class="name">{text(c.name)}</p><div class="trio">{"".join(figures)}</div></div>'
        )
    rest = "".join(
        f'<div><div class="pair">{picture(c.drawn, c.name + ", drawn")}{picture(c.real, "the real " + c.name)}</div>'
        f"{mark(c.rank == 1)} {text(c.name)}{'' if c.rank == 1 else f' <span class=soft>(rank {c.rank})</span>'}</div>"
        for c in story.concepts
    )
    beside = ""
    if with_shipped:
        learned = number((story.metrics["shipped"] or {}).get("num_concepts"))
        beside = f" Beside it the pack that ships with xfusion, which learned {learned} pictures."
    return f"""<section><h2>Drawn from words</h2>
<p>{len(shown)} of the {fresh["num_concepts"]} trained concepts, chosen by the hash of their ids and not by eye.
{mark(True)} means: of all {fresh["num_concepts"]} real emoji, this one is nearest in pixels to what was drawn.{beside}</p>
<div class="gallery">{"".join(cards)}</div>
<details><summary>All {len(story.concepts)} drawings of the fresh tower: the ones that were scored</summary>
<p class="small soft">Drawn left, real right. {sum(c.rank == 1 for c in story.concepts)} of {len(story.concepts)}
are nearest to their own emoji.</p><div class="grid">{rest}</div></details></section>"""


def _figure(image: PILImage.Image, caption: str, words: str) -> str:
    return f"<figure>{picture(image, words)}<figcaption>{caption}</figcaption></figure>"


def _says(who: str, answer: Answer) -> str:
    said = text(answer.said) if answer.said else "<em>nothing</em>"
    return f'<p class="says"><span>{who}</span> {mark(answer.right)} {said}</p>'


def _answers(story: Story) -> str:
    shown = story.concepts[: story.num_shown]
    cards = []
    for c in shown:
        lines = [_says("fresh", c.answer)] + ([_says("shipped", c.shipped_answer)] if c.shipped_answer else [])
        cards.append(
            f'<div class="card"><div>{picture(c.real, c.name)}</div><div><div class="name">{text(c.name)}</div>'
            f"{''.join(lines)}</div></div>"
        )
    wrong = [c for c in story.concepts if not c.answer.right]
    all_wrong = "".join(
        f"<div>{picture(c.real, c.name)}{mark(False)} {text(c.answer.said)} <span class=soft>({text(c.name)})</span></div>"
        for c in wrong
    )
    right = len(story.concepts) - len(wrong)
    more = (
        f"<details><summary>All {len(wrong)} wrong answers</summary><div class=grid>{all_wrong}</div></details>"
        if wrong
        else ""
    )
    return f"""<section><h2>Named from pictures</h2>
<p>The frozen model reads the picture through the new weights and answers in its own words.
{right} of {len(story.concepts)} answers are one of the emoji's names.</p>
<div class="unseen">{"".join(cards)}</div>{more}</section>"""


def _unseen(story: Story) -> str:
    fresh, held = story.metrics["fresh"], story.held
    if not held:
        return ""
    cards = []
    for item in held[: story.num_shown]:
        lines = [_says("fresh", item.answer)] + ([_says("shipped", item.shipped_answer)] if item.shipped_answer else [])
        cards.append(
            f'<div class="card"><div>{picture(item.picture, item.name)}</div><div><div class="name">{text(item.name)}</div>'
            f"{''.join(lines)}<p class=says><span>true name ranks {item.rank:g} of {len(held)}</span></p></div></div>"
        )
    rows = [
        ("mean reciprocal rank of the true name", "held_caption_mrr"),
        ("true name first", "held_caption_at_1"),
        ("true name among the first ten", "held_caption_at_10"),
        ("answer exactly right", "held_caption_exact"),
    ]
    table = "".join(
        f"<tr><td>{words}</td><td class=num>{number(fresh.get(key))}</td><td class=num>{number(fresh.get(key + '_blind'))}</td>"
        f"<td class=num>{number(fresh.get('chance_' + key))}</td></tr>"
        for words, key in rows
    )
    return f"""<section><h2>Pictures it has never seen</h2>
<p>Everything above is <strong>memory, not understanding</strong>: the tower was trained on those very pictures.
Here are pictures of groups that no training saw. The base has words for all of them; can the new weights find the right one?
{text(verdict(fresh, held))}</p>
<div class="scroll"><table><thead><tr><th>fresh tower, {len(held)} unseen
pictures</th><th class=num>score</th><th class=num>blind</th>
<th class=num>chance</th></tr></thead><tbody>{table}</tbody></table></div>
<p class="small soft">Candidates are the {len(held)} pictures' own names, ranked by how much likelier a name
becomes with the picture. Blind: the same answers with the pictures shuffled. Below, the greedy answers to
{min(len(held), story.num_shown)} of them, fixed by hash.</p>
<div class="unseen">{"".join(cards)}</div></section>"""


def verdict(fresh: dict[str, Any], held: Sequence[HeldOut]) -> str:
    """An honest sentence about held-out names: is the mean reciprocal rank above the blind rate by two standard errors?"""
    score, blind = fresh.get("held_caption_mrr"), fresh.get("held_caption_mrr_blind")
    if score is None or blind is None or len(held) < 2:
        return "Not measured."
    values = [1 / item.rank for item in held]
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    figures = f"{number(score)} against {number(blind)} blind, standard error {error:.3f}"
    if score - blind > 2 * error:
        return (
            f"A little: the mean reciprocal rank is above the blind rate ({figures}). That is far from understanding."
        )
    if blind - score > 2 * error:
        return f"No: the mean reciprocal rank is below the blind rate ({figures})."
    return f"It cannot be told from {len(held)} pictures: {figures}. No claim is made."


def _proof(story: Story) -> str:
    parts = []
    for name, proof in story.metrics["proof"].items():
        rows = "".join(
            f"<tr><td>{mark(c['passed'])}</td><td>{text(c['name'])}</td><td>{text(c['detail'])}</td></tr>"
            for c in proof["checks"]
        )
        short = " (short form: <code>xfusion verify</code> gives the whole proof)" if proof.get("quick") else ""
        parts.append(
            f'<h3>{text(name).capitalize()}{short}</h3><div class="scroll"><table><tbody>{rows}</tbody></table></div>'
        )
    title = "not one bit of its text moved" if story.metrics["text_identical"] else "its text is not what it was"
    return f"""<section id="proof"><h2>The proof: {title}</h2>
<p>The base is loaded afresh by transformers alone and reads prompts in several languages. The same prompts go
through the model's text path and through the fused stack, once as trained and once with all new weights replaced by
noise. Logits and greedy tokens are compared bit for bit. Only text in front of a picture, which is computed in other
tensor shapes, is held to a tolerance.</p>
{"".join(parts)}</section>"""


def _numbers(story: Story) -> str:
    m = story.metrics
    columns: list[tuple[str, dict[str, Any]]] = [("fresh", m["fresh"])]
    if m["shipped"]:
        columns.append(("shipped", m["shipped"]))
    if m["shipped_spot_check"]:
        columns.append(("shipped, here", m["shipped_spot_check"]))
    head = "".join(f"<th class=num>{title}</th>" for title, _ in columns)
    body = ""
    for name in SCORES:
        cells = "".join(f"<td class=num>{number(scores[name])}</td>" for _, scores in columns)
        limits = f"<td class=num>{number(m['fresh'].get(f'chance_{name}'))}</td>"
        limits += f"<td class=num>{number(m['fresh'].get(f'ceiling_{name}'))}</td>"
        body += f"<tr><td><code>{name}</code></td>{cells}{limits}</tr>"
    notes = "; ".join(f"{title}: {text(scores['how'])}" for title, scores in columns)
    return f"""<section><h2>All scores</h2>
<p><code>fit_</code> is memory of trained pictures, <code>held_</code> is on pictures that no training saw. Retrieval
asks whether the drawn picture is nearest (or among the ten nearest) to its own among all trained ones, in pixels or in
the features of a frozen ImageNet network. Chance is a random answer; the ceiling is the real picture through codec and
resizing. Both are the fresh tower's.</p>
<div class="scroll"><table><thead><tr><th>score</th>{head}<th class=num>chance</th><th class=num>ceiling</th></tr></thead>
<tbody>{body}</tbody></table></div><p class="small soft">{notes}.</p></section>"""


def _machine(story: Story) -> str:
    m, s, t = story.metrics, story.metrics["settings"], story.metrics["training"]
    machine, versions = m["machine"], m["machine"]["versions"]
    commit = m["commit"] and m["commit"]["id"][:12] + (
        f" with {m['commit']['changed_files']} changed files" if m["commit"]["changed_files"] else ""
    )
    speed = s["speed_of_drawing"]
    ratio = f"{s['draw_per_step']} drawings and {s['caption_per_step']} namings per step"
    ratio += f" ({s['ratio_draw_to_caption']:g} : 1)" if s["ratio_draw_to_caption"] else ""
    machine_rows = [
        ("processor", machine["processor"]),
        ("cores, threads", f"{machine['cores']}, {machine['threads']}"),
        ("GPU", machine["gpu"]),
        ("memory", machine["memory_gb"] and f"{machine['memory_gb']:g} GB"),
        ("system", machine["system"]),
        ("software", ", ".join(f"{k} {v}" for k, v in versions.items())),
        ("commit", commit or None),
    ]
    settings_rows = [
        ("base", f"{m['base']['source']}, fingerprint {m['base']['fingerprint'][:16]}"),
        ("new weights", number(m["num_new_parameters"])),
        ("data", f"{s['data']}, {s['picture_size']} px, {m['tokens_per_image']} tokens per picture"),
        ("what a step reads", ratio),
        (
            "training",
            f"{number(t['steps'])} steps, {number(t['samples'])} samples, {t['dtype']}, {m['minutes_training']:.2f} minutes",
        ),
        ("speed, both tasks", f"{number(m['joint_samples_per_second'])} samples/s behind the warm-up"),
        (
            "speed, drawing alone",
            f"{number(m['drawing_samples_per_second'])} samples/s, batch {speed['batch']},"
            f" {speed['steps']} steps behind the warm-up",
        ),
        ("drawing", f"{s['sampling_steps']} steps, guidance {s['guidance']}"),
        (
            "codec",
            f"PSNR {number(m['codec_psnr_db'])} dB" + (" (lossless)" if (m["codec_psnr_db"] or 0) >= 100 else ""),
        ),
        ("seed", m["seed"]),
        (
            "whole demo",
            f"{m['minutes_total']:.1f} minutes, {m['minutes_after_training']:.1f} of them behind the training",
        ),
    ]
    return f"""<section><h2>Where and how</h2><h3>The machine</h3>{_rows(machine_rows)}
<h3>The settings</h3>{_rows(settings_rows)}
<p class="small soft">Everything on this page stands in <code>metrics.json</code> beside it, with the whole
recipe.</p></section>"""


def _next(story: Story) -> str:
    rows = "".join(
        f'<div class="small soft">{text(what)}</div><pre>{text(command)}</pre>' for command, what in story.commands
    )
    return f"<section><h2>Go on</h2>{rows}</section>"


def _foot(story: Story) -> str:
    del story
    return """<footer>All real emoji are designed by OpenMoji, the open-source emoji and icon project, under CC BY-SA
4.0; their names come from the Unicode locale data. Method: X-Fusion (arXiv 2504.20996). This page is one file, without
scripts, and loads nothing.</footer>"""
