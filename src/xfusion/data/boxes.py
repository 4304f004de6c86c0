"""Boxes as text, as in Qwen-VL (arXiv 2308.12966, section 3.1): ``<ref>red disc</ref><box>(120,340),(560,780)</box>``.

A box is plain text for the base's own tokenizer: there are no new tokens. Its corners, upper left and lower right, are
integers from 0 to 999: thousandths of the width and height of the picture as the model sees it, which is the center crop if
the picture is not square.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from xfusion.data.sequence import XFusionError

SCALE = 1000
"""Coordinates are integers below this."""
_MARKS = re.compile(r"<ref>(?P<name>[^<>]*)</ref>|<box>(?P<corners>[^<>]*)</box>|(?P<stray></?(?:ref|box)>)")
_CORNERS = re.compile(r"\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*,\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*", re.ASCII)


@dataclass(frozen=True)
class Box:
    """A box in relative coordinates, from 0 to 1, of the square that a model sees.

    Raises:
        XFusionError: an edge is outside, or the box has no area.
    """

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self) -> None:
        if not (0 <= self.left < self.right <= 1 and 0 <= self.top < self.bottom <= 1):
            raise XFusionError(
                f"a box goes from left to right and from top to bottom within 0 to 1, but this one from"
                f" ({self.left:g}, {self.top:g}) to ({self.right:g}, {self.bottom:g})"
            )

    @classmethod
    def of_pixels(cls, left: float, top: float, right: float, bottom: float, size: tuple[int, int]) -> Box:
        """The box of a region of a picture of ``(width, height)`` pixels, clipped to the middle square.

        Raises:
            XFusionError: nothing is left of the box.
        """
        side = min(size)
        margin_x, margin_y = ((length - side) / 2 for length in size)
        edges = [
            (position - margin) / side
            for position, margin in ((left, margin_x), (top, margin_y), (right, margin_x), (bottom, margin_y))
        ]
        clipped = [min(max(edge, 0.0), 1.0) for edge in edges]
        if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
            raise XFusionError(
                f"the box ({left:g}, {top:g}) to ({right:g}, {bottom:g}) has no area in the middle square of a picture of"
                f" {size[0]} x {size[1]} pixels, which is all that a model sees"
            )
        return cls(*clipped)

    def pixels(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Left, top, right and bottom edge on a picture of ``(width, height)`` pixels: the inverse of `of_pixels`."""
        side = min(size)
        margin_x, margin_y = ((length - side) / 2 for length in size)
        return (
            margin_x + self.left * side,
            margin_y + self.top * side,
            margin_x + self.right * side,
            margin_y + self.bottom * side,
        )

    def text(self, name: str = "") -> str:
        """The box as a model writes it, after the name of its object if one is given.

        Raises:
            XFusionError: the box is thinner than a thousandth of the picture, or the name contains a mark.
        """
        left, top, right, bottom = (
            min(math.floor(edge * SCALE + 1e-6), SCALE - 1) for edge in (self.left, self.top, self.right, self.bottom)
        )
        if left == right or top == bottom:
            raise XFusionError(f"{self} is thinner than a thousandth of the picture: it cannot be said")
        return f"{reference(name) if name else ''}<box>({left},{top}),({right},{bottom})</box>"


def reference(name: str) -> str:
    """A name as written before its box; on its own, it asks for the box.

    Raises:
        XFusionError: the name is empty or contains a mark.
    """
    if not name.strip() or "<" in name or ">" in name:
        raise XFusionError(f"{name!r} cannot be the name of a box: it needs words, without < and >")
    return f"<ref>{name.strip()}</ref>"


def boxes_of(text: str) -> list[tuple[str, Box]]:
    """The boxes in a text, in order, each with the name before it; several boxes may follow one name.

    Raises:
        XFusionError: a mark has no partner, or a box is not two corners of integers from 0 to 999 with the first one on the
            upper left of the second.
    """
    boxes: list[tuple[str, Box]] = []
    name, end = "", 0
    for mark in _MARKS.finditer(text):
        if text[end : mark.start()].strip():
            name = ""  # other text in between: the next box does not belong to the last name
        end = mark.end()
        if mark["stray"]:
            raise XFusionError(f"{mark['stray']} stands alone at character {mark.start()} of {_short(text)}")
        if mark["name"] is not None:
            name = mark["name"].strip()
            continue
        corners = _CORNERS.fullmatch(mark["corners"])
        if corners is None:
            raise XFusionError(f"{_short(mark[0])} is no box: write <box>(x1,y1),(x2,y2)</box> in whole numbers")
        numbers = [int(number) for number in corners.groups()]
        if max(numbers) >= SCALE:
            raise XFusionError(f"{_short(mark[0])} has a coordinate {max(numbers)}: they go from 0 to {SCALE - 1}")
        if numbers[0] >= numbers[2] or numbers[1] >= numbers[3]:
            raise XFusionError(
                f"{_short(mark[0])} has no area: the first corner is the upper left, the second the lower right"
            )
        boxes.append((name, Box(*(number / SCALE for number in numbers))))
    return boxes


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}…")
