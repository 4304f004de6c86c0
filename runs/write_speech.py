"""Write the English telephone prompts of Asterisk as sounds and manifests, with some sentences held out.

    python runs/write_speech.py asterisk_en_train.parquet -o speech

reads a parquet file with the columns audio (bytes), text, label, seconds and source_path, and writes ``speech/wav/`` and the
manifests ``train.jsonl`` and ``held_sentences.jsonl``. The hash of its caption decides a sound's part, so a sentence that
was recorded twice is never in both. Captions are as speech recognition has them: lower case, no punctuation, notes such as
``[-]`` left out, and a digit or sign of its own as the word that is said (``press 1`` -> ``press one``). Left out and counted
are sounds that are no speech, by their label or because their text is only a note, and those longer than --longest seconds.
The prompts are of one speaker, at 8 kHz, CC-BY-SA-3.0 (github.com/asterisk/asterisk-core-sounds).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import parquet
from write_digits import share_of, write

from xfusion.evaluation.metrics.word_errors import normalised

HELD_SHARE = 0.12
NOTE = re.compile(r"\(.*?\)|\[.*?\]|<.*?>")
"""What a transcript says of a sound without its being said."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SAID = {str(digit): word for digit, word in enumerate(DIGITS)} | {"*": "star", "#": "pound"}
"""How a digit or sign is said that stands alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parquet", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--longest", type=float, default=5.0)
    options = parser.parse_args()
    rows = parquet.read_table(options.parquet).to_pylist()
    spoken = [(row, text) for row in rows if row["label"] == "speech" and (text := caption(row["text"]))]

    def sounds() -> Iterator[tuple[str, dict[str, Any], str, dict[str, Any]]]:
        for row, text in spoken:
            name = "-".join(Path(row["source_path"]).parts[1:])  # two folders have a 1.wav
            part = "held_sentences" if share_of(text) < HELD_SHARE else "train"
            yield part, row, name, {"caption": text, "group": text}

    write(options.out, ("train", "held_sentences"), sounds(), options.longest)
    print(f"{len(rows) - len(spoken)} sounds that are no speech left out")


def caption(text: str) -> str:
    """What is said, as speech recognition writes it; empty if nothing is."""
    words = re.sub(r"(?<!\S)([\d*#])(?=[.,;:]?(?:\s|$))", lambda match: SAID[match[1]], NOTE.sub(" ", text))
    return normalised(words)


if __name__ == "__main__":
    main()
