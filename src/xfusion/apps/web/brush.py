"""A picture to paint on, and the mask from the paint."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image as PILImage
from PIL import ImageChops, ImageDraw

SIDE = 512
"""Side of a sheet in pixels."""
MOST = (4 * SIDE) ** 2
"""Most pixels of a painted layer: screens have up to four pixels per CSS pixel along a side."""
LINE = (128, 128, 128, 110)
"""Colour between two cells: visible on white and on black."""


def sheet(picture: PILImage.Image, grid: tuple[int, int]) -> PILImage.Image:
    """A picture as a model sees it, enlarged, with lines between the tokens of ``grid``: tokens are inpainted as a whole."""
    large = picture.convert("RGB").resize((SIDE, SIDE), PILImage.Resampling.NEAREST)
    lines = ImageDraw.Draw(large, "RGBA")
    rows, columns = grid
    for row in range(1, rows):
        lines.line((0, row * SIDE // rows, SIDE, row * SIDE // rows), fill=LINE)
    for column in range(1, columns):
        lines.line((column * SIDE // columns, 0, column * SIDE // columns, SIDE), fill=LINE)
    return large


def mask(layers: Iterable[PILImage.Image], side: int) -> PILImage.Image | None:
    """White where layers of paint cover at least half of a pixel of a ``side`` x ``side`` picture; None if nowhere."""
    painted = PILImage.new("L", (side, side))
    for layer in layers:
        opacity = layer.convert("RGBA").getchannel("A").point([0] + [255] * 255)
        coverage = opacity.resize((side, side), PILImage.Resampling.BOX)
        painted = ImageChops.lighter(painted, coverage.point([0] * 128 + [255] * 128))
    return painted if painted.getbbox() else None
