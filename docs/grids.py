"""The sample grids of docs/comparison.md, made of the strips that `xfusion compare` wrote beside its results."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from xfusion.apps.plots import COLOURS
from xfusion.comparison.results import REAL, run_name
from xfusion.storage import atomic_file

CELL, GAP, LABEL = 128, 8, 40
"""Pixels of a picture, between pictures, and of the line above a row."""
LARGEST_DRAWING = 64
"""Side in pixels up to which pictures are enlarged by whole pixels; larger ones are photographs."""


def strip(path: Path, count: int) -> list[Image.Image]:
    """The pictures of a strip."""
    with Image.open(path) as sheet:
        if sheet.width != sheet.height * count:
            raise ValueError(f"{path} is {sheet.width} x {sheet.height}, not {count} pictures side by side")
        side, image = sheet.height, sheet.convert("RGB")
    return [image.crop((i * side, 0, (i + 1) * side, side)) for i in range(count)]


def grid(rows: Sequence[tuple[str, str | None, Sequence[Image.Image]]]) -> Image.Image:
    """Rows of pictures under their labels.

    Args:
        rows: label, colour of the dot beside it or None, pictures; a row without a label has no line above it.
    """
    count = max(len(pictures) for _, _, pictures in rows)
    height = sum(CELL + GAP + (LABEL if label else 0) for label, _, _ in rows)
    sheet = Image.new("RGB", (count * (CELL + GAP) + GAP, height + GAP), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(size=27), GAP
    for label, colour, pictures in rows:
        left = GAP
        if label and colour:
            draw.ellipse((GAP, top + 8, GAP + 20, top + 28), fill=colour)
            left += 30
        if label:
            draw.text((left, top + 1), label, fill="#222", font=font)
            top += LABEL
        for i, picture in enumerate(pictures):
            is_drawing = picture.height <= LARGEST_DRAWING
            resampling = Image.Resampling.NEAREST if is_drawing else Image.Resampling.LANCZOS
            sheet.paste(picture.resize((CELL, CELL), resampling), (GAP + i * (CELL + GAP), top))
        top += CELL + GAP
    return sheet


def samples(folder: Path, pictures: Path) -> list[str]:
    """The part of a comparison's section on its samples; the grid is written into ``pictures``."""
    file = folder / "comparison.json"
    plan = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    prompts = plan.get("prompts", [])
    if not prompts or not (folder / REAL).is_file():
        return []
    real, names = strip(folder / REAL, len(prompts)), ", ".join(prompts)
    strips = [(label, folder / f"{run_name(label, 0)}.png") for label in plan["recipes"]]
    strips = [(label, path) for label, path in strips if path.is_file()]
    if not strips:
        target = pictures / f"{folder.name}_samples.jpg"
        save(grid([("", None, real)]), target)
        caption = f"**Pictures that are to be named**, with their true names from left to right: {names}. "
        caption += "What each system answered to single pictures is not in the result files; the scores are over many."
        return [caption, "", f"![{names}](pictures/{target.name})", ""]
    target = pictures / f"{folder.name}_samples.png"
    labels = list(plan["recipes"])
    colours = {label: COLOURS[labels.index(label) % len(COLOURS)] for label in labels}
    save(grid([("real", None, real), *((n, colours[n], strip(p, len(prompts))) for n, p in strips)]), target)
    caption = f"**Drawn by each** after training on these pictures: {names}. The same words and noise for all, seed"
    caption += " 0; the pictures were chosen by the hash of their ids, not by eye."
    return [caption, "", f"![{names}: real, {', '.join(n for n, _ in strips)}](pictures/{target.name})", ""]


def save(sheet: Image.Image, path: Path) -> None:
    """Write a sheet whole, and only where its pixels changed: another version of the library packs them otherwise."""
    if path.suffix == ".png" and path.is_file():
        with Image.open(path) as committed:
            if committed.size == sheet.size and committed.convert("RGB").tobytes() == sheet.tobytes():
                return
    data = io.BytesIO()
    if path.suffix == ".png":
        sheet.save(data, format="PNG", optimize=True)
    else:
        sheet.save(data, format="JPEG", quality=85)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data.getvalue())
