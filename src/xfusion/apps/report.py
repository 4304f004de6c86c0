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

from xfusion.apps.commands.base import write_whole

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

    text: str
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
    return write_whole(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


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
    metrics = story.metrics
    fresh, is_identical = metrics["fresh"], metrics["text_identical"]
    checks = [c for proof in metrics["proof"].values() for c in proof["checks"]]
    share = metrics["num_new_parameters"] / metrics["num_frozen_parameters"]
    title, sentence = (
        (
            "Its text is bit-identical to before.",
            "Logits and greedy tokens, with the new weights in place and with noise instead of them:",
        )
        if is_identical
        else ("Its text is NOT identical to before.", "Something changed what the model says:")
    )
    has_learned = all((fresh[name] or 0) >= 0.5 for name in ("fit_retrieval_pixel_at_1", "fit_caption_exact"))
    verb = "learned" if has_learned else "is learning"
    num_passed = sum(c["passed"] for c in checks)
    tiles = (
        (
            percent(fresh["fit_retrieval_pixel_at_1"]),
            f"of {fresh['num_concepts']} drawings are nearest to the emoji they should be",
        ),
        (percent(fresh["fit_caption_exact"]), f"of {fresh['num_concepts']} emoji are named right"),
        (f"{metrics['minutes_training']:.1f} min", f"of training, {number(metrics['training']['samples'])} samples"),
        (
            number(metrics["joint_samples_per_second"]),
            f"samples/s; drawing alone {number(metrics['drawing_samples_per_second'])}",
        ),
    )
    return f"""<header>
<h1>A frozen language model {verb} to draw and to name emoji</h1>
<p class="lead">{text(_base_name(metrics["base"]["source"]))} was never shown a picture. Beside its
{_million(metrics["num_frozen_parameters"])} frozen weights stand {_million(metrics["num_new_parameters"])} new ones
({percent(share)}), trained for {metrics["minutes_training"]:.1f} minutes on {text(_device_text(metrics["machine"]))} to draw
{fresh["num_concepts"]} emoji from words and to name them from pictures.</p>
<div class="proof{"" if is_identical else " bad"}"><div class="mark" aria-hidden="true">{"✓" if is_identical else "✗"}</div>
<div><strong>{title}</strong><p class="small">{sentence} {num_passed} of {len(checks)} checks passed.
<a href="#proof">The proof</a></p></div></div>
<div class="tiles">{"".join(f'<div class="tile"><b>{a}</b><span>{text(b)}</span></div>' for a, b in tiles)}</div>
</header>"""


def _base_name(source: str) -> str:
    name = source.rsplit("/", 1)[-1].removesuffix(".gguf")
    stem, _, kind = name.rpartition(".")
    return stem if stem and kind.upper().startswith(("Q", "F", "BF")) else name


def _device_text(machine_facts: dict[str, Any]) -> str:
    if machine_facts["gpu"]:
        return machine_facts["gpu"]
    return f"{machine_facts['cores']} processor core{'' if machine_facts['cores'] == 1 else 's'}"


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
    duration = max(seconds for seconds, _ in curve) or 1.0
    lines = {
        name: _bin_losses(curve, name, duration) for name in dict.fromkeys(k for _, losses in curve for k in losses)
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    values = [math.log10(v) for points in lines.values() for _, v in points]
    low, high = math.floor(min(values)), max(math.ceil(max(values)), math.floor(min(values)) + 1)

    def x(seconds: float) -> float:
        return left + (width - left - right) * seconds / duration

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - math.log10(value)) / (high - low)

    parts = []
    for power in range(low, high + 1):
        y_line = y(10.0**power)
        parts.append(f'<line class="grid-line" x1="{left}" x2="{width - right}" y1="{y_line:.1f}" y2="{y_line:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y_line + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for seconds, label in _ticks(duration):
        parts.append(f'<text x="{x(seconds):.1f}" y="{height - bottom + 22}" text-anchor="middle">{label}</text>')
    for seconds in shots:
        parts.append(f'<circle class="shot" cx="{min(x(seconds), width - right):.1f}" cy="{height - bottom}" r="3.5"/>')
    label_positions = _spread_labels([(y(points[-1][1]), name) for name, points in lines.items()], 22)
    for name, points in lines.items():
        kind, label_text = LOSSES.get(name, ("say", name))
        path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)
        parts.append(f'<polyline class="curve {text(kind)}" points="{path}"/>')
        parts.append(
            f'<text class="{text(kind)}" x="{width - right + 8}" y="{label_positions[name] + 4:.1f}">{text(label_text)}</text>'
        )
    title = "Losses over time, logarithmic: " + ", ".join(LOSSES.get(name, ("", name))[1] for name in lines)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(title)}"><title>{text(title)}</title>'
        f"{''.join(parts)}</svg>"
    )


def _bin_losses(
    curve: Sequence[tuple[float, dict[str, float]]], name: str, duration: float
) -> list[tuple[float, float]]:
    bins: dict[int, list[tuple[float, float]]] = {}
    for seconds, losses in curve:
        value = losses.get(name)
        if value is not None and math.isfinite(value):
            bins.setdefault(int(BINS * seconds / duration), []).append((seconds, math.log(max(value, SMALLEST))))
    return [
        (sum(s for s, _ in points) / len(points), math.exp(sum(v for _, v in points) / len(points)))
        for _, points in sorted(bins.items())
    ]


def _ticks(duration: float) -> list[tuple[float, str]]:
    minutes = duration / 60
    if minutes < 1:
        step = 10
        return [(float(s), f"{s} s") for s in range(0, int(duration) + 1, step)]
    step = next((s for s in (1, 2, 5, 10, 20, 30, 60, 120, 240) if minutes / s <= 8), 480)
    return [(60.0 * m, f"{m} min" if m else "0") for m in range(0, int(minutes) + 1, step)]


def _spread_labels(labels: list[tuple[float, str]], gap: float) -> dict[str, float]:
    """Label positions that do not overlap."""
    positions: dict[str, float] = {}
    previous = -math.inf
    for position, name in sorted(labels):
        previous = max(position, previous + gap)
        positions[name] = previous
    return positions


def _drawings(story: Story) -> str:
    concepts, fresh = story.concepts[: story.num_shown], story.metrics["fresh"]
    has_shipped = any(concept.shipped for concept in concepts)
    cards = []
    for concept in concepts:
        figures = [
            _figure(concept.drawn, f"fresh {mark(concept.rank == 1)}", f"{concept.name}, drawn by the fresh tower")
        ]
        if concept.shipped is not None:
            figures.append(_figure(concept.shipped, "shipped", f"{concept.name}, drawn by the shipped pack"))
        figures.append(_figure(concept.real, "real", f"the real {concept.name}"))
        cards.append(
            f'<div class="card"><p class="name">{text(concept.name)}</p><div class="trio">{"".join(figures)}</div></div>'
        )
    rest = "".join(
        f'<div><div class="pair">{picture(concept.drawn, concept.name + ", drawn")}'
        f"{picture(concept.real, 'the real ' + concept.name)}</div>"
        f"{mark(concept.rank == 1)} {text(concept.name)}"
        f"{'' if concept.rank == 1 else f' <span class=soft>(rank {concept.rank})</span>'}</div>"
        for concept in story.concepts
    )
    shipped_note = ""
    if has_shipped:
        num_learned = number((story.metrics["shipped"] or {}).get("num_concepts"))
        shipped_note = f" Beside it the pack that ships with xfusion, which learned {num_learned} pictures."
    return f"""<section><h2>Drawn from words</h2>
<p>{len(concepts)} of the {fresh["num_concepts"]} trained concepts, chosen by the hash of their ids and not by eye.
{mark(True)} means: of all {fresh["num_concepts"]} real emoji, this one is nearest in pixels to what was drawn.{shipped_note}</p>
<div class="gallery">{"".join(cards)}</div>
<details><summary>All {len(story.concepts)} drawings of the fresh tower: the ones that were scored</summary>
<p class="small soft">Drawn left, real right. {sum(concept.rank == 1 for concept in story.concepts)} of {len(story.concepts)}
are nearest to their own emoji.</p><div class="grid">{rest}</div></details></section>"""


def _figure(image: PILImage.Image, caption: str, words: str) -> str:
    return f"<figure>{picture(image, words)}<figcaption>{caption}</figcaption></figure>"


def _answer_line(tower: str, answer: Answer) -> str:
    caption = text(answer.text) if answer.text else "<em>nothing</em>"
    return f'<p class="says"><span>{tower}</span> {mark(answer.right)} {caption}</p>'


def _answers(story: Story) -> str:
    concepts = story.concepts[: story.num_shown]
    cards = []
    for concept in concepts:
        lines = [_answer_line("fresh", concept.answer)] + (
            [_answer_line("shipped", concept.shipped_answer)] if concept.shipped_answer else []
        )
        cards.append(
            f'<div class="card"><div>{picture(concept.real, concept.name)}</div><div><div class="name">{text(concept.name)}</div>'
            f"{''.join(lines)}</div></div>"
        )
    wrong = [concept for concept in story.concepts if not concept.answer.right]
    all_wrong = "".join(
        f"<div>{picture(concept.real, concept.name)}{mark(False)} {text(concept.answer.text)}"
        f" <span class=soft>({text(concept.name)})</span></div>"
        for concept in wrong
    )
    right = len(story.concepts) - len(wrong)
    details = (
        f"<details><summary>All {len(wrong)} wrong answers</summary><div class=grid>{all_wrong}</div></details>"
        if wrong
        else ""
    )
    return f"""<section><h2>Named from pictures</h2>
<p>The frozen model reads the picture through the new weights and answers in its own words.
{right} of {len(story.concepts)} answers are one of the emoji's names.</p>
<div class="unseen">{"".join(cards)}</div>{details}</section>"""


def _unseen(story: Story) -> str:
    fresh, held_out = story.metrics["fresh"], story.held
    if not held_out:
        return ""
    cards = []
    for item in held_out[: story.num_shown]:
        lines = [_answer_line("fresh", item.answer)] + (
            [_answer_line("shipped", item.shipped_answer)] if item.shipped_answer else []
        )
        cards.append(
            f'<div class="card"><div>{picture(item.picture, item.name)}</div><div><div class="name">{text(item.name)}</div>'
            f"{''.join(lines)}<p class=says><span>true name ranks {item.rank:g} of {len(held_out)}</span></p></div></div>"
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
{text(verdict(fresh, held_out))}</p>
<div class="scroll"><table><thead><tr><th>fresh tower, {len(held_out)} unseen
pictures</th><th class=num>score</th><th class=num>blind</th>
<th class=num>chance</th></tr></thead><tbody>{table}</tbody></table></div>
<p class="small soft">Candidates are the {len(held_out)} pictures' own names, ranked by how much likelier a name
becomes with the picture. Blind: the same answers with the pictures shuffled. Below, the greedy answers to
{min(len(held_out), story.num_shown)} of them, fixed by hash.</p>
<div class="unseen">{"".join(cards)}</div></section>"""


def verdict(fresh: dict[str, Any], held_out: Sequence[HeldOut]) -> str:
    """An honest sentence about held-out names: is the mean reciprocal rank above the blind rate by two standard errors?"""
    score, blind = fresh.get("held_caption_mrr"), fresh.get("held_caption_mrr_blind")
    if score is None or blind is None or len(held_out) < 2:
        return "Not measured."
    values = [1 / item.rank for item in held_out]
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    figures = f"{number(score)} against {number(blind)} blind, standard error {error:.3f}"
    if score - blind > 2 * error:
        return (
            f"A little: the mean reciprocal rank is above the blind rate ({figures}). That is far from understanding."
        )
    if blind - score > 2 * error:
        return f"No: the mean reciprocal rank is below the blind rate ({figures})."
    return f"It cannot be told from {len(held_out)} pictures: {figures}. No claim is made."


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
    metrics = story.metrics
    columns: list[tuple[str, dict[str, Any]]] = [("fresh", metrics["fresh"])]
    if metrics["shipped"]:
        columns.append(("shipped", metrics["shipped"]))
    if metrics["shipped_spot_check"]:
        columns.append(("shipped, here", metrics["shipped_spot_check"]))
    head = "".join(f"<th class=num>{title}</th>" for title, _ in columns)
    body = ""
    for name in SCORES:
        cells = "".join(f"<td class=num>{number(scores[name])}</td>" for _, scores in columns)
        limits = f"<td class=num>{number(metrics['fresh'].get(f'chance_{name}'))}</td>"
        limits += f"<td class=num>{number(metrics['fresh'].get(f'ceiling_{name}'))}</td>"
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
    metrics, settings, training = story.metrics, story.metrics["settings"], story.metrics["training"]
    machine, versions = metrics["machine"], metrics["machine"]["versions"]
    commit = metrics["commit"] and metrics["commit"]["id"][:12] + (
        f" with {metrics['commit']['changed_files']} changed files" if metrics["commit"]["changed_files"] else ""
    )
    speed = settings["speed_of_drawing"]
    ratio = f"{settings['draw_per_step']} drawings and {settings['caption_per_step']} namings per step"
    ratio += f" ({settings['ratio_draw_to_caption']:g} : 1)" if settings["ratio_draw_to_caption"] else ""
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
        ("base", f"{metrics['base']['source']}, fingerprint {metrics['base']['fingerprint'][:16]}"),
        ("new weights", number(metrics["num_new_parameters"])),
        (
            "data",
            f"{settings['data']}, {settings['picture_size']} px, {metrics['tokens_per_image']} tokens per picture",
        ),
        ("what a step reads", ratio),
        (
            "training",
            f"{number(training['steps'])} steps, {number(training['samples'])} samples, {training['dtype']},"
            f" {metrics['minutes_training']:.2f} minutes",
        ),
        ("speed, both tasks", f"{number(metrics['joint_samples_per_second'])} samples/s behind the warm-up"),
        (
            "speed, drawing alone",
            f"{number(metrics['drawing_samples_per_second'])} samples/s, batch {speed['batch']},"
            f" {speed['steps']} steps behind the warm-up",
        ),
        ("drawing", f"{settings['sampling_steps']} steps, guidance {settings['guidance']}"),
        (
            "codec",
            f"PSNR {number(metrics['codec_psnr_db'])} dB"
            + (" (lossless)" if (metrics["codec_psnr_db"] or 0) >= 100 else ""),
        ),
        ("seed", metrics["seed"]),
        (
            "whole demo",
            f"{metrics['minutes_total']:.1f} minutes, {metrics['minutes_after_training']:.1f} of them behind the training",
        ),
    ]
    return f"""<section><h2>Where and how</h2><h3>The machine</h3>{_rows(machine_rows)}
<h3>The settings</h3>{_rows(settings_rows)}
<p class="small soft">Everything on this page stands in <code>metrics.json</code> beside it, with the whole
recipe.</p></section>"""


def _next(story: Story) -> str:
    rows = "".join(
        f'<div class="small soft">{text(purpose)}</div><pre>{text(command)}</pre>'
        for command, purpose in story.commands
    )
    return f"<section><h2>Go on</h2>{rows}</section>"


def _foot(story: Story) -> str:
    del story
    return """<footer>All real emoji are designed by OpenMoji, the open-source emoji and icon project, under CC BY-SA
4.0; their names come from the Unicode locale data. Method: X-Fusion (arXiv 2504.20996). This page is one file, without
scripts, and loads nothing.</footer>"""
