"""Write Microsoft's 3D emoji of some categories as pictures and a manifest.

    python runs/write_fluent_emoji.py fluent_emoji_3d_256.parquet -o runs/fluent --categories animals-nature food-drink

reads a parquet file with the columns image (bytes of a WebP), caption and category, such as ``animals-nature/animal-mammal``, and
writes ``runs/fluent/pictures.jsonl`` with the pictures as they are beside it. Without --categories it takes all of them. They
are MIT (github.com/microsoft/fluentui-emoji; as WebP of 256 px in the npm package ``@lobehub/fluent-emoji-3d``).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from pyarrow import parquet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parquet", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--categories", nargs="+", default=[])
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
        name = f"{len(lines):04d}.webp"
        (options.out / name).write_bytes(row["image"]["bytes"])
        lines.append(json.dumps({"image": name, "caption": row["caption"]}))
    (options.out / "pictures.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(", ".join(f"{category} {counts[category]}" for category in chosen))


if __name__ == "__main__":
    main()
