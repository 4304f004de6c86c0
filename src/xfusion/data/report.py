"""The result of checking a data source, as text, as JSON and as a contact sheet; and which of its pictures look the same."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
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
    """What is no error: files that are not pictures and were ignored, or pictures of different groups that look the same."""
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


THUMBNAIL = 16
"""Side in pixels at which pictures are compared."""
SAME_ERROR, SAME_DIFFERENCE = 2.0, 10
"""Pictures look the same if their thumbnails' root mean square difference and largest difference are at most these, of 255
levels. Of 300 photographs, copies as JPEG of quality 75 and 95 differ by at most 0.95 and 4, at half the size by 1.6 and 8; the
nearest two of 2,900 different ones by 12.7 and 41. Clock faces an hour apart differ by 7 and 68."""
MAX_PAIRS = 1000
"""Most pairs that are looked for: of a film's frames each looks like many others."""
MAX_NAMED = 20
"""Most sets of pictures, and pictures of a set, that are named."""


def look_alikes(source: Source) -> list[str]:
    """Notes on pictures that look the same and are of different groups, such as one photograph saved twice.

    Contrastive losses take them for different pictures, and a held-out split may put them on both sides. Every picture is
    decoded once more. Drawings of thin, faint lines look the same, too, where they differ in little else.

    Args:
        source: pictures, all of them readable.

    Returns:
        nothing if there are none; otherwise a note on all, and one for each set of them.
    """
    import numpy as np

    def thumbnail(index: int) -> np.ndarray:
        return np.asarray(source.picture(index, THUMBNAIL)).ravel()

    examples = source.examples
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        thumbnails = np.stack(list(pool.map(thumbnail, range(len(examples)))))
    pairs = ((i, j) for i, j in _same_pairs(thumbnails) if examples[i].group != examples[j].group)
    found = list(islice(pairs, MAX_PAIRS))
    sets: dict[int, list[int]] = {}  # by member; all members of a set share one list
    for first, second in found:
        left, right = sets.setdefault(first, [first]), sets.setdefault(second, [second])
        if left is not right:
            left += right
            sets |= dict.fromkeys(right, left)
    if not found:
        return []
    at_least = "at least " if len(found) == MAX_PAIRS else ""
    notes = [
        f"{at_least}{len(sets)} pictures look the same as one of another group: contrastive losses take them for different ones,"
        " and a held-out split may divide them; if they are copies of one picture, give them one group, in a .jsonl"
    ]
    distinct = sorted({min(members): sorted(members) for members in sets.values()}.items())
    for _, members in distinct[:MAX_NAMED]:
        names, rest = ", ".join(examples[i].origin for i in members[:MAX_NAMED]), len(members) - MAX_NAMED
        notes.append(one_line(f"look the same: {names}" + (f" and {rest} more" if rest > 0 else "")))
    return notes + ([f"... and {len(distinct) - MAX_NAMED} more such sets"] if len(distinct) > MAX_NAMED else [])


def _same_pairs(thumbnails: Any) -> Iterator[tuple[int, int]]:
    """Pairs of rows of ``uint8 [N, D]`` that look the same."""
    import numpy as np

    x = thumbnails.astype(np.float32)
    mean, norm = x.mean(1), (x * x).sum(1)
    order, width = np.argsort(mean, kind="stable"), x.shape[1]
    for start in range(0, len(x), 256):
        rows = order[start : start + 256]
        # Means differ by no more than the root mean square difference, so only a window of them needs comparing.
        stop = np.searchsorted(mean[order], mean[rows[-1]] + SAME_ERROR + 0.1, side="right")
        columns = order[start:stop]
        squares = norm[rows, None] + norm[columns] - 2 * x[rows] @ x[columns].T
        # Some slack for rounding; then exactly, in integers.
        for row, column in zip(*np.nonzero(np.triu(squares <= width * (SAME_ERROR + 0.1) ** 2, k=1)), strict=True):
            i, j = sorted((int(rows[row]), int(columns[column])))
            difference = thumbnails[i].astype(np.int64) - thumbnails[j]
            if abs(difference).max() <= SAME_DIFFERENCE and (difference**2).sum() <= width * SAME_ERROR**2:
                yield i, j


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
