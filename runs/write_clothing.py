"""Write the small clothing data set as pictures and a manifest whose captions are the ten kinds of clothing.

    git clone https://github.com/alexeygrigorev/clothing-dataset-small
    python runs/write_clothing.py clothing-dataset-small/train -o runs/clothing

reads a folder of folders that are named by kind, or a parquet file with the columns image (bytes) and label, and writes
``runs/clothing/photos.jsonl`` with its pictures beside it, the shorter side at most --side pixels. The photographs are CC0.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps
from pyarrow import parquet


def photos(place: Path) -> Iterator[tuple[str, bytes]]:
    """Kind and file of every picture, in a fixed order."""
    if place.is_dir():
        for file in sorted(place.glob("*/*.jpg")):
            yield file.parent.name, file.read_bytes()
        return
    for batch in parquet.ParquetFile(place).iter_batches(columns=["image", "label"]):
        for row in batch.to_pylist():
            yield row["label"], row["image"]["bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("place", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--side", type=int, default=160)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    counts: Counter[str] = Counter()
    lines = []
    for kind, content in photos(options.place):
        name = f"{kind}_{counts[kind]:04d}.jpg"
        counts[kind] += 1
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        factor = options.side / min(picture.size)
        if factor < 1:
            picture = picture.resize(
                [max(options.side, round(side * factor)) for side in picture.size], Image.Resampling.LANCZOS
            )
            picture.save(options.out / name, quality=90)
        else:
            (options.out / name).write_bytes(content)
        lines.append(json.dumps({"image": name, "caption": kind}))
    if not lines:
        parser.error(f"{options.place} holds no picture: name the folder train of the data set, or its parquet file")
    (options.out / "photos.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
