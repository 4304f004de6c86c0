"""Write pictures of things in colours, some pairs of thing and colour apart: can a model draw a pair that it never saw?

    python runs/write_colours.py -o runs/colours

draws the first --things of `xfusion.data.emoji.FAMILIAR` in eight colours each and writes ``train.jsonl`` and ``held.jsonl``
with their pictures beside them. One colour of every thing is held out: every thing is trained on in seven colours, and every
colour on seven eighths of the things. Then

    xfusion train xfusion.recipes.xfusion:demo --data runs/colours/train.jsonl --steps 500 -o runs/painter
    xfusion evaluate runs/painter --set source=runs/colours/train.jsonl held=runs/colours/held.jsonl max_held_drawn=32

The pictures are OpenMoji (CC-BY-SA-4.0), their colours changed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from xfusion.data.emoji import FAMILIAR, Artwork, Emoji

COLOURS = {
    "red": "#d7263d",
    "orange": "#f58a1f",
    "yellow": "#f5d90a",
    "green": "#2f9e44",
    "turquoise": "#17bebb",
    "blue": "#2962ff",
    "purple": "#8e24aa",
    "brown": "#7b4a21",
}
"""Name -> colour of a picture's most frequent grey. Black lines stay black, and white stays white."""


def things(count: int) -> list[tuple[str, str]]:
    """Name without a colour, and picture, of the first familiar things; names that would then be equal are left out."""
    identities = {example.captions[0]: example.id for example in Emoji(num_concepts=len(FAMILIAR)).examples}
    plain = {" ".join(word for word in name.split() if word not in COLOURS): name for name in reversed(FAMILIAR)}
    return [(name, identities[whole]) for name, whole in reversed(plain.items())][:count]


def in_colour(picture: Image.Image, colour: str) -> Image.Image:
    """The picture in shades of one colour."""
    grey = ImageOps.grayscale(picture)
    counts = grey.histogram()
    main_grey = max(range(32, 240), key=counts.__getitem__)
    return ImageOps.colorize(grey, black="black", white="white", mid=colour, midpoint=main_grey)


def pairs(chosen: list[tuple[str, str]], side: int) -> Iterator[tuple[Image.Image, dict[str, Any], bool]]:
    """Picture, its line of the manifest, and whether it is held out."""
    art = Artwork()
    for index, (thing, identity) in enumerate(chosen):
        picture = art.draw(identity, side)
        for number, (name, colour) in enumerate(COLOURS.items()):
            file = f"{thing.replace(' ', '_')}_{name}.png"
            yield in_colour(picture, colour), {"image": file, "caption": f"{name} {thing}"}, index % 8 == number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--things", type=int, default=32)
    parser.add_argument("--side", type=int, default=64)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists: name a new folder")
    if not 1 <= options.things <= len(FAMILIAR):
        parser.error(f"--things {options.things}: from 1 to {len(FAMILIAR)}")
    chosen = things(options.things)
    options.out.mkdir(parents=True)
    lines: dict[bool, list[str]] = {False: [], True: []}
    for picture, line, is_held in pairs(chosen, options.side):
        picture.save(options.out / line["image"])
        lines[is_held].append(json.dumps(line))
    for is_held, name in ((False, "train"), (True, "held")):
        (options.out / f"{name}.jsonl").write_text("\n".join(lines[is_held]) + "\n", encoding="utf-8")
    print(f"{len(lines[False])} pictures to train on, {len(lines[True])} held out")


if __name__ == "__main__":
    main()
