"""Pictures of the README: what a pack draws, above the real pictures of the same names.

    python runs/draw_emoji.py docs/pictures/drawn.png
    python runs/draw_emoji.py docs/pictures/unseen_pairs.png --model runs/painter --data runs/colours/held.jsonl

Without --data these are twelve emoji; with it, the first --count pictures in the order of the hashes of their ids, so that nobody
chose them by eye. Seeds from 0 on, the pack's own steps and guidance, 32 px, each pixel shown as three by three.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import xfusion
from xfusion.data.sources import open_source
from xfusion.evaluation.suites.emoji import choose_examples
from xfusion.storage import atomic_file

PROMPTS = (
    "red heart", "flag of Japan", "red apple", "cat face", "pizza", "sunflower",
    "soccer ball", "eggplant", "blue heart", "full moon", "strawberry", "no entry",
)  # fmt: skip
SIDE, SCALE, MARGIN = 32, 3, 4


def main() -> None:
    """Draw, look up the pictures of the same names, and lay both in two rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--data")
    parser.add_argument("--count", type=int, default=12)
    options = parser.parse_args()
    source = open_source(options.data or "emoji", split="all")
    indices = {example.captions[0]: i for i, example in enumerate(source.examples)}
    chosen = choose_examples(source.examples, options.count)
    prompts = [source.examples[i].captions[0] for i in chosen] if options.data else list(PROMPTS)
    drawings = xfusion.load(options.model).draw(prompts, size=SIDE, seed=0)
    rows = drawings, [source.picture(indices[prompt], SIDE) for prompt in prompts]
    cell = SIDE * SCALE + 2 * MARGIN
    sheet = Image.new("RGB", (cell * len(prompts), cell * len(rows)), "white")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            large = picture.convert("RGB").resize((SIDE * SCALE,) * 2, Image.Resampling.NEAREST)
            sheet.paste(large, (column * cell + MARGIN, row * cell + MARGIN))
    with atomic_file(options.out) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
    print(", ".join(prompts))


if __name__ == "__main__":
    main()
