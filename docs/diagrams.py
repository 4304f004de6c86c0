"""Draws a recipe from the model that it builds: what is frozen, what is new and where, and what each part weighs."""

from __future__ import annotations

import re
from collections import Counter
from html import escape

from xfusion.fusion.beside import Beside
from xfusion.fusion.conditioned import Conditioned
from xfusion.model import Model

WIDTH, LEFT, TOP, TALL = 760, 150, 92, 58
FROZEN, NEW, WORDS, MEDIA = "#d5d8dd", "#d9772b", "#8a93a1", "#2f7ed8"


def diagram(title: str, model: Model) -> str:
    """SVG of a model: a column per layer of the base, the trained part of each layer above it.

    The height of a trained part is its number of weights as a share of the heaviest one's; a layer without one passes
    pictures on as the fusion says (the recipe's own page).
    """
    layers = model.backbone.num_layers
    blocks, others = weights(model)
    heaviest = max(blocks.values(), default=1)
    step = (WIDTH - LEFT - 130) / layers
    bottom = TOP + TALL
    parts = [
        _text(16, 24, title, 15, bold=True),
        _text(16, 43, _summary(model), 11.5),
        _text(LEFT, TOP - 14, _layers_text(model, len(blocks)), 11.5),
        _box(16, bottom + 8, 104, 26, WORDS, "words", "base's table"),
        _box(16, TOP + 18, 104, 26, MEDIA, "picture", _count(others["port"])),
    ]
    # Its blocks stand in a row of their own, which the last layer's words enter.
    is_conditioned = isinstance(model.fusion, Conditioned)
    gap = (layers - 1) / len(blocks) if is_conditioned else 1.0
    for layer in range(layers):
        x = LEFT + layer * step
        parts.append(_rect(x, bottom + 4, step * 0.82, 34, FROZEN))
        if layer in blocks:
            x = LEFT + layer * gap * step
            bar_height = 6 + (TALL - 6) * blocks[layer] / heaviest
            parts.append(_rect(x, bottom - bar_height, step * 0.82, bar_height, NEW))
    end = LEFT + layers * step
    parts.append(_text(LEFT, bottom + 54, f"layers of the frozen base, 0 to {layers - 1}", 11.5))
    parts.append(_box(end + 14, bottom + 8, 104, 26, WORDS, "next word", "base's head"))
    if "draw" in model.capabilities:
        parts.append(_box(end + 14, TOP + 18, 104, 26, MEDIA, "picture out", _count(others["head"])))
    if others["connector"]:
        parts.append(_box(16, TOP - 14, 104, 26, NEW, "connector", _count(others["connector"])))
    parts += [_arrow(122, bottom + 21, LEFT - 6), _arrow(end + 1, bottom + 21, end + 12)]
    is_beside = isinstance(model.fusion, Beside)
    parts.append(_arrow(122, TOP + 31, end + 12 if is_beside else LEFT - 6))
    if is_beside:  # what joins words and pictures stands behind both
        parts.append(_path(f"M{end - step * 0.6:.1f} {bottom + 2}V{TOP + 31}"))
        parts.append(_box(end + 14, TOP + 18, 104, 26, NEW, "reads both", _count(others["objective"])))
    if is_conditioned:
        last = LEFT + max(blocks) * gap * step + step * 0.82
        y, arrowhead = (
            bottom - 8,
            f"M{last + 7:.1f} {bottom - 12}L{last + 2:.1f} {bottom - 8}L{last + 7:.1f} {bottom - 4}",
        )
        parts.append(_path(f"M{end - step * 0.6:.1f} {bottom + 2}V{y}H{last + 2:.1f}{arrowhead}"))
        parts.append(_arrow(last + 2, TOP + 31, end + 12))
    legend = [(FROZEN, "frozen")]
    if blocks:
        legend.append((NEW, f"new {'beside' if is_conditioned else 'in'} layers: {_count(sum(blocks.values()))}"))
    if others["objective"] and not is_beside:
        legend.append((MEDIA, f"of objectives: {_count(others['objective'])}"))
    x = LEFT + 190.0
    for colour, name in legend:
        parts += [_rect(x, bottom + 46, 10, 10, colour), _text(x + 15, bottom + 55, name, 11.5)]
        x += 26 + 5.6 * len(name)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 70}" role="img" font-family="sans-serif">'
        f'<title>{escape(title)}</title><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _layers_text(model: Model, count: int) -> str:
    layers = model.backbone.num_layers
    if isinstance(model.fusion, Beside):
        return "no layer is trained, and no picture passes one"
    if isinstance(model.fusion, Conditioned):
        return f"{count} blocks beside the base; they read its states of the words, no picture passes its layers"
    if not count:
        return "no layer is trained: pictures pass the frozen ones, as words do"
    return f"trained in {count} of {layers} layers"


def weights(model: Model) -> tuple[dict[int, int], Counter[str]]:
    """New weights by layer, and of the parts outside the layers: ``port``, ``head``, ``connector``, ``objective``."""
    blocks: Counter[int] = Counter()
    others: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        block_match = re.match(r"fusion\.(?:parts\.\d+\.)?(?!connector)\w+?\.\D*?(\d+)(?:\.|$)", name)
        if block_match:
            blocks[int(block_match[1])] += parameter.numel()
        else:
            others[_part(name)] += parameter.numel()
    return dict(blocks), others


def _part(name: str) -> str:
    if name.startswith("port."):
        return "head" if name.startswith(("port.head", "port.norm")) else "port"
    return "connector" if name.startswith("fusion.") else "objective"


def _summary(model: Model) -> str:
    text_note = "text stays bit-identical" if model.fusion.preserves_text else "the text changes with them"
    return f"{_count(sum(p.numel() for p in model.new_parameters() if p.requires_grad))} trained, {text_note}"


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit} weights"
    return f"{number} weights"


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{colour}"/>'


def _box(x: float, y: float, width: float, height: float, colour: str, name: str, caption: str) -> str:
    middle = f'text-anchor="middle" x="{x + width / 2:.1f}"'
    return (
        f"{_rect(x, y, width, height, colour)}"
        f'<text {middle} y="{y + 12:.1f}" font-size="11.5" fill="white" font-weight="bold">{escape(name)}</text>'
        f'<text {middle} y="{y + 22.5:.1f}" font-size="9" fill="white">{escape(caption)}</text>'
    )


def _text(x: float, y: float, content: str, size: float, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="#222"{weight}>{escape(content)}</text>'


def _path(commands: str) -> str:
    return f'<path d="{commands}" stroke="#555" stroke-width="1.4" fill="none"/>'


def _arrow(start: float, y: float, end: float) -> str:
    head = f"M{end - 5:.1f} {y - 4}L{end:.1f} {y}L{end - 5:.1f} {y + 4}"
    return _path(f"M{start:.1f} {y}H{end:.1f}{head}")
