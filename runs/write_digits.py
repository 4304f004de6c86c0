"""Write the Free Spoken Digit Dataset as sounds and manifests, with a speaker and some recordings held out.

    python runs/write_digits.py fsdd_train.parquet -o digits --held-speaker theo

reads a parquet file with the columns audio (bytes), text, speaker, seconds and source_path, and writes ``digits/wav/`` and the
manifests ``train.jsonl``, ``held_recordings.jsonl`` (a tenth of the recordings of the same speakers, by the hash of their
names) and ``held_speaker.jsonl``. Sounds longer than --longest seconds are left out and counted. The data set is
CC-BY-SA-4.0 (github.com/Jakobovski/free-spoken-digit-dataset).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyarrow import parquet

HELD_SHARE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parquet", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--held-speaker", default="theo")
    parser.add_argument("--longest", type=float, default=0.96)
    options = parser.parse_args()
    rows = parquet.read_table(options.parquet).to_pylist()
    if options.held_speaker not in {row["speaker"] for row in rows}:
        parser.error(
            f"no speaker {options.held_speaker!r}: there are {', '.join(sorted({r['speaker'] for r in rows}))}"
        )

    def sounds() -> Iterable[tuple[str, dict[str, Any], str, dict[str, Any]]]:
        for row in rows:
            name = Path(row["source_path"]).name
            part = "held_recordings" if share_of(name) < HELD_SHARE else "train"
            part = "held_speaker" if row["speaker"] == options.held_speaker else part
            yield part, row, name, {"caption": row["text"]}

    write(options.out, ("train", "held_recordings", "held_speaker"), sounds(), options.longest)


def share_of(text: str) -> float:
    """A number from 0 to 1 that depends on the text alone, evenly spread over texts."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def write(
    out: Path, parts: Iterable[str], sounds: Iterable[tuple[str, dict[str, Any], str, dict[str, Any]]], longest: float
) -> None:
    """Write ``wav/`` and a manifest per part; sounds longer than ``longest`` seconds are left out and counted.

    sounds: the part, row of the parquet file, file name and further fields of the manifest, for each sound.
    """
    (out / "wav").mkdir(parents=True)
    manifests: dict[str, list[str]] = {part: [] for part in parts}
    left_out: Counter[str] = Counter()
    for part, row, name, fields in sounds:
        if row["seconds"] > longest:
            left_out[part] += 1
            continue
        (out / "wav" / name).write_bytes(row["audio"]["bytes"])
        manifests[part].append(json.dumps({"audio": f"wav/{name}", **fields}))
    for part, lines in manifests.items():
        (out / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{part}: {len(lines)} sounds, {left_out[part]} longer than {longest:g} s left out")


if __name__ == "__main__":
    main()
