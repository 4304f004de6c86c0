"""The result of checking a data source, as text, as JSON and as a contact sheet."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xfusion.data.sequence import Example, XFusionError
from xfusion.storage import atomic_file

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

    from xfusion.data.sources import Source


LONGEST_LINE = 600
"""Longest line of a report in characters: a name or a value from a file may be as long as the file."""


def one_line(text: str) -> str:
    """Arbitrary text, such as a file name, as one line of bounded length that any terminal can show."""
    bounded = text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]} ..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in bounded)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with one example."""

    kind: str
    """Short category, for counting: ``"missing picture"``, ``"empty caption"``, ..."""
    where: str
    """``file:line``, or the file if it has no lines."""
    what: str
    """Description of the problem."""

    def __str__(self) -> str:
        return one_line(f"{self.where}: {self.what}")


@dataclass(frozen=True, kw_only=True)
class CaptionStats:
    """Lengths of captions, in characters."""

    num_captions: int
    """Wordings of all examples together."""
    shortest: int
    """Characters of the shortest."""
    median: float
    """Characters of the median."""
    longest: int
    """Characters of the longest."""

    @staticmethod
    def of(examples: Iterable[Example]) -> CaptionStats:
        """Statistics over all wordings of the examples; all zero if there are none."""
        lengths = [len(caption) for example in examples for caption in example.captions] or [0]
        count = len(lengths) if any(lengths) else 0
        return CaptionStats(
            num_captions=count, shortest=min(lengths), median=statistics.median(lengths), longest=max(lengths)
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is in a data source and what is wrong with it."""

    spec: str
    """As the user wrote it."""
    licence: str
    """Licence of the pictures."""
    num_examples: int
    """Examples, good and bad: those in a part of a shard that cannot be read count too, by its bytes where it does not say."""
    num_bad: int
    """Examples with at least one problem: they are left out if the user allows their share."""
    num_groups: int
    """Groups of pictures that count as the same, among the good ones."""
    problems: tuple[str, ...]
    """Every problem as ``file:line: what``."""
    counts: Mapping[str, int]
    """Number of problems of each kind."""
    notes: tuple[str, ...]
    """What was ignored without being an error, such as files that are not pictures."""
    captions: CaptionStats
    """Statistics over the good examples."""
    source: Source | None = field(default=None, repr=False, compare=False)
    """The good examples, for the contact sheet; None if there are none."""

    @property
    def share_bad(self) -> float:
        """Share of bad examples."""
        return self.num_bad / max(1, self.num_examples)

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures, for `json.dumps`."""
        content = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("source", "captions")
        }
        content |= {"problems": list(self.problems), "notes": list(self.notes), "counts": dict(self.counts)}
        return content | {"share_bad": self.share_bad, "captions": asdict(self.captions)}

    def sheet(self, path: str | Path, *, size: int = 32, num_pictures: int = 25) -> Path:
        """Draw pictures as a model of ``size`` pixels sees them, captions underneath, into a PNG.

        The pictures are spread over the whole source. Returns the path; the file appears only when it is complete.
        """
        if self.source is None:
            raise XFusionError(f"{self.spec}: no good example to draw; see the problems first")
        path = Path(path)
        image = _draw_sheet(self.source, _evenly_spaced(len(self.source.examples), num_pictures), size)
        with atomic_file(path) as temporary:
            image.save(temporary, format="PNG")
        return path


def _evenly_spaced(total: int, count: int) -> list[int]:
    """At most ``count`` indices, evenly over ``range(total)``."""
    count = min(total, count)
    return [index * total // count for index in range(count)]


def _draw_sheet(source: Source, indices: Sequence[int], size: int, tile: int = 128, margin: int = 12):
    from PIL import Image, ImageDraw

    font = _font()
    columns = min(5, len(indices))
    rows = -(-len(indices) // columns)
    step_x, step_y = tile + margin, tile + margin + 3 * 14
    sheet = Image.new("RGB", (columns * step_x + margin, rows * step_y + margin), "#e8e8e8")
    draw = ImageDraw.Draw(sheet)
    for position, index in enumerate(indices):
        x, y = margin + position % columns * step_x, margin + position // columns * step_y
        # Nearest neighbour: the sheet shows the model's pixels, not a smoothed picture that no model sees.
        sheet.paste(source.picture(index, size).resize((tile, tile), Image.Resampling.NEAREST), (x, y))
        for line, text in enumerate(_wrap(source.examples[index].captions[0], font, tile)):
            draw.text((x, y + tile + 3 + 14 * line), text, fill="black", font=font)
    return sheet


def _font() -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    try:
        return ImageFont.truetype("DejaVuSans.ttf", 10)  # where the system has it: most alphabets
    except OSError:
        return ImageFont.load_default(size=11)  # Latin letters only; others are drawn as boxes


def _wrap(text: str, font: FreeTypeFont | ImageFont, width: int, num_lines: int = 3) -> list[str]:
    """Break a caption into lines that fit; the last one ends with an ellipsis if the text is cut."""
    lines = [""]
    text = " ".join(text.split())[:200]
    for word in text.split():
        while font.getlength(word) > width:  # one long word, or a script without blanks
            word = word[:-2] + "…"
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > num_lines:
        lines = lines[:num_lines]
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "…"
    return lines
