"""Write Microsoft's 3D emoji of some categories as pictures and a manifest.

    python runs/write_fluent_emoji.py fluent_emoji_3d_256.parquet -o runs/fluent --categories animals-nature food-drink

reads a parquet file with the columns image (bytes), caption and category, such as ``animals-nature/animal-mammal``, and writes
``runs/fluent/pictures.jsonl`` with PNGs of --side pixels on white beside it. Without --categories it takes all of them. The
pictures are MIT (github.com/microsoft/fluentui-emoji; as WebP of 256 px in the npm package ``@lobehub/fluent-emoji-3d``).
"""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from pathlib import Path

from PIL import Image
from pyarrow import parquet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parquet", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--categories", nargs="+", default=[])
    parser.add_argument("--side", type=int, default=128)
    options = parser.parse_args()
    rows = parquet.read_table(options.parquet, columns=["image", "caption", "category"]).to_pylist()
    counts = Counter(row["category"].split("/")[0] for row in rows)
    if unknown := sorted(set(options.categories) - counts.keys()):
        parser.error(f"no category {', '.join(unknown)}: there are {', '.join(sorted(counts))}")
    chosen = options.categories or sorted(counts)
    options.out.mkdir(parents=True)
    lines = []
    for row in rows:
        if row["category"].split("/")[0] not in chosen:
            continue
        name = f"{len(lines):04d}.png"
        picture = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGBA")
        on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        on_white.resize((options.side, options.side), Image.Resampling.LANCZOS).save(options.out / name)
        lines.append(json.dumps({"image": name, "caption": row["caption"]}))
    (options.out / "pictures.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(
        ", ".join(f"{category} {counts[category]}" for category in chosen),
        f"{len(lines)} pictures of {options.side} px",
    )


if __name__ == "__main__":
    main()
