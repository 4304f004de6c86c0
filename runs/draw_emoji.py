"""The picture at the top of the README: what the shipped pack `emoji` draws, above the emoji themselves.

    python runs/draw_emoji.py docs/pictures/drawn.png

Twelve prompts, seeds 0 to 11, the pack's own steps and guidance, 32 px, each pixel shown as three by three.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

import xfusion
from xfusion.data.sources import open_source
from xfusion.storage import atomic_file

PROMPTS = (
    "red heart", "flag of Japan", "red apple", "cat face", "pizza", "sunflower",
    "soccer ball", "eggplant", "blue heart", "full moon", "strawberry", "no entry",
)  # fmt: skip
SIDE, SCALE, MARGIN = 32, 3, 4


def main(out: str) -> None:
    """Draw, look up the emoji of the same names, and lay both in two rows."""
    source = open_source("emoji", split="train")
    indices = {example.captions[0]: i for i, example in enumerate(source.examples)}
    drawings = xfusion.load("emoji").draw(list(PROMPTS), size=SIDE, seed=0)
    rows = drawings, [source.picture(indices[prompt], SIDE) for prompt in PROMPTS]
    cell = SIDE * SCALE + 2 * MARGIN
    sheet = Image.new("RGB", (cell * len(PROMPTS), cell * len(rows)), "white")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            large = picture.convert("RGB").resize((SIDE * SCALE,) * 2, Image.Resampling.NEAREST)
            sheet.paste(large, (column * cell + MARGIN, row * cell + MARGIN))
    with atomic_file(Path(out)) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
