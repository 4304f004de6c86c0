"""Attention weights as pictures and as a table."""

from __future__ import annotations

from html import escape

import numpy
from PIL import Image as PILImage
from torch import Tensor

from xfusion.evaluation.attention import Attention

SIDE = 192
"""Side of a heat map in pixels."""
HOT = numpy.array([235.0, 92.0, 20.0])
"""The colour of the largest weight."""
BEGIN, PICTURE = "(start of the picture)", "(the picture itself)"


def overlay(picture: PILImage.Image, weights: Tensor, grid: tuple[int, int], largest: float) -> PILImage.Image:
    """Weights ``[M]`` of a picture's tokens, drawn over the picture in grey: no colour is 0, full colour is ``largest``."""
    rows, columns = grid
    cells = numpy.clip(weights.reshape(rows, columns).numpy() / max(largest, 1e-12), 0, 1)
    share = PILImage.fromarray((255 * cells).round().astype(numpy.uint8)).resize((SIDE, SIDE), PILImage.Resampling.BOX)
    alpha = 0.9 * numpy.asarray(share, dtype=numpy.float64)[..., None] / 255
    grey = picture.convert("L").resize((SIDE, SIDE), PILImage.Resampling.NEAREST)
    background = numpy.asarray(grey, dtype=numpy.float64)[..., None] * 0.75 + 40
    return PILImage.fromarray((background * (1 - alpha) + HOT * alpha).round().clip(0, 255).astype(numpy.uint8))


def names(attention: Attention) -> list[str]:
    """Readable names of what a picture's token may attend to; words are numbered, since one may occur twice."""
    return [f"{i + 1}: {word.strip() or repr(word)}" for i, word in enumerate(attention.words)]


def maps(picture: PILImage.Image, attention: Attention, word: str | None) -> list[tuple[PILImage.Image, str]]:
    """A heat map per layer: how much each token of the picture attends to a word of `names`, or to all words."""
    word_names = names(attention)
    weights = (
        attention.on_words[..., word_names.index(word)] if word in word_names else attention.on_words.sum(-1)
    )  # [L, M]
    layers = zip(attention.layers, weights, strict=True)
    return [
        (
            overlay(picture, cells, attention.grid, float(cells.max())),
            f"layer {index + 1}: {cells.mean():.1%}",
        )
        for index, cells in layers
    ]


def table(attention: Attention) -> str:
    """Mean weight by layer on each word, on the start of the picture and on the picture itself, as HTML."""
    rows = [(name, attention.on_words[..., i].mean(-1)) for i, name in enumerate(names(attention))]
    rows += [(BEGIN, attention.on_begin.mean(-1)), (PICTURE, attention.on_picture.sum(-1).mean(-1))]
    head = "".join(f'<th scope="col">{index + 1}</th>' for index in attention.layers)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(_cell(float(share)) for share in shares)}</tr>'
        for name, shares in rows
    )
    caption = "Share of attention of the picture's tokens, in %, by layer"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table class="heat">'
        f'<caption>{caption}</caption><thead><tr><th scope="col">looks at</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(share: float) -> str:
    red, green, blue = HOT.astype(int)
    return f'<td style="background: rgba({red},{green},{blue},{0.75 * share**0.5:.2f})">{100 * share:.0f}</td>'
