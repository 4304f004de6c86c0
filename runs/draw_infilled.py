"""Gaps of pictures as packs fill them, from the rest of the picture alone: drawings behind the scores of the suite `infilling`.

    python runs/draw_infilled.py docs/pictures/infilled.png runs/teal/pack runs/cm3leon/pack --data emoji:64

Under the pictures through the codec follow, for each gap, the picture with its gap in grey, then what each pack makes of it, in
the order given. The first --count pictures in the order of the hashes of their ids, so that nobody chose them by eye; picture i
of the source with the noise seed i.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import xfusion
from xfusion.data.sources import open_source
from xfusion.evaluation.suites.emoji import choose_examples
from xfusion.evaluation.suites.infilling import fill, gaps
from xfusion.storage import atomic_file

SCALE, MARGIN = 2, 2


def main() -> None:
    """Fill, and lay the pictures in rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("packs", nargs="+")
    parser.add_argument("--data", default="emoji:64")
    parser.add_argument("--split", default="train")
    parser.add_argument("--count", type=int, default=5)
    options = parser.parse_args()
    source = open_source(options.data, split=options.split)
    chosen = choose_examples(source.examples, options.count)
    models = [xfusion.load(pack) for pack in options.packs]
    image, size = models[0].image, models[0].image.sizes[0]
    for pack, model in zip(options.packs, models, strict=True):
        if model.image.config != image.config:
            parser.error(f"{pack} has other tokens than {options.packs[0]}: name packs of one codec")
    tokens = image.encode([source.picture(i, size) for i in chosen], size).cpu()

    def pictures(tokens: Tensor) -> list[Image.Image]:
        return image.to_pil(image.decode(tokens.to(image.device), size))

    rows = [pictures(tokens)]
    grid = image.grid(size)
    for gap in gaps(grid).values():
        shown = Image.fromarray((gap.view(grid).numpy() * 255).astype("uint8")).resize(
            (size, size), Image.Resampling.NEAREST
        )
        rows.append([Image.composite(Image.new("RGB", (size, size), "grey"), picture, shown) for picture in rows[0]])
        for model in models:
            prompts = [""] * len(chosen)
            filled = fill(model, tokens, gap, prompts, seeds=chosen, steps=25, guidance=1.0)
            rows.append(pictures(torch.where(gap[:, None], filled, tokens)))
    side = size * SCALE
    cell = side + 2 * MARGIN
    sheet = Image.new("RGB", (cell * len(chosen), cell * len(rows)), "white")
    for row, drawn in enumerate(rows):
        for column, picture in enumerate(drawn):
            large = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (column * cell + MARGIN, row * cell + MARGIN))
    with atomic_file(options.out) as temporary:
        sheet.quantize(256, dither=Image.Dither.NONE).save(temporary, format="PNG", optimize=True)
    print(", ".join(source.examples[i].captions[0] for i in chosen))


if __name__ == "__main__":
    main()
