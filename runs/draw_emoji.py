"""Pictures of the README: what a pack draws, above the real pictures of the same names.

    python runs/draw_emoji.py docs/pictures/drawn.png
    python runs/draw_emoji.py docs/pictures/unseen_pairs.png --model runs/painter --data runs/colours/held.jsonl
    python runs/draw_emoji.py docs/pictures --knobs

Without --data these are twelve emoji; with it, the first --count pictures in the order of the hashes of their ids, so that nobody
chose them by eye. Seeds from 0 on, the pack's own steps and guidance, --size pixels a side; smaller ones are enlarged to 96 px
by whole pixels. With --knobs, each of `KNOBS` has a picture in the folder: three values side by side, one prompt a row, and one
seed unless it is the knob.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import xfusion
from xfusion.data.sources import open_source
from xfusion.evaluation.suites.emoji import choose_examples
from xfusion.objectives.solvers import Euler, Heun, Multistep
from xfusion.storage import atomic_file

PROMPTS = (
    "red heart", "flag of Japan", "red apple", "cat face", "pizza", "sunflower",
    "soccer ball", "eggplant", "blue heart", "full moon", "strawberry", "no entry",
)  # fmt: skip
KNOB_PROMPTS = ("red apple", "cat face", "a blue apple", "pizza and cheese")
"""Two names of the pack's training, and two prompts that it never saw."""
KNOBS: dict[str, list[dict[str, Any]]] = {
    "guidance": [{"guidance": 1}, {"guidance": 3}, {"guidance": 8}],
    "steps": [{"steps": 4}, {"steps": 10}, {"steps": 25}],
    "solver": [{"solver": solver, "steps": 6} for solver in (Euler(), Heun(), Multistep())],
    "seed": [{"seed": 0}, {"seed": 100}, {"seed": 200}],
    "size": [{"size": 16}, {"size": 32}, {"size": 96}],
}
SIDE, SHOWN, MARGIN = 32, 96, 4


def main() -> None:
    """Draw, look up the pictures of the same names, and lay both in two rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--data")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--size", type=int, default=SIDE)
    parser.add_argument("--knobs", action="store_true")
    options = parser.parse_args()
    model = xfusion.load(options.model)
    if options.knobs:
        for knob, settings in KNOBS.items():
            columns = [model.draw(KNOB_PROMPTS, **({"size": SIDE, "seed": 0} | setting)) for setting in settings]
            save(list(zip(*columns, strict=True)), options.out / f"knob_{knob}.png")
        return
    source = open_source(options.data or "emoji", split="all")
    indices = {example.captions[0]: i for i, example in enumerate(source.examples)}
    chosen = choose_examples(source.examples, options.count)
    prompts = [source.examples[i].captions[0] for i in chosen] if options.data else list(PROMPTS)
    drawings = model.draw(prompts, size=options.size, seed=0)
    save([drawings, [source.picture(indices[prompt], options.size) for prompt in prompts]], options.out)
    print(", ".join(prompts))


def save(rows: Sequence[Sequence[Image.Image]], out: Path) -> None:
    """Write rows of pictures as one, each enlarged to the same side by whole pixels."""
    side = max(SHOWN, *(picture.width for row in rows for picture in row))
    cell = side + 2 * MARGIN
    sheet = Image.new("RGB", (cell * len(rows[0]), cell * len(rows)), "white")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            large = picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (column * cell + MARGIN, row * cell + MARGIN))
    with atomic_file(out) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
