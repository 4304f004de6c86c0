"""Codecs of codes of the emoji beside each other: equal steps and widths, and held-out pictures only measure.

    python runs/compare_emoji_codes.py

Trains each kind that `runs/train_emoji_codes.py` knows, keeps no weights, and writes benchmarks/results/codecs.json, which
`python docs/pages.py speed` puts into docs/training_log.md. A run is short: figures say which kinds learn and use their codes in
so few steps, not how good each can become.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from train_emoji_codec import load
from train_emoji_codes import Options, figures_of, save_codec, train_codec

from xfusion.evaluation.machine import origin
from xfusion.modalities.codecs.vq import Quantizer
from xfusion.storage import write_json

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "codecs.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all of them are trained with."""

    steps: int = 400
    """Steps of each."""
    batch: int = 16
    """Pictures per step."""
    rate: float = 3e-3
    """Peak learning rate."""
    channels: tuple[int, ...] = (8, 16, 32, 64)
    """Width per resolution."""
    entries: int = 512
    """Codes per level."""
    seed: int = 0
    """Seed of weights, order of pictures, augmentation and relaxation."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = RESULT
    """Where the result goes."""


def kinds(settings: Settings) -> dict[str, Options]:
    """What is compared, by name."""
    table = Quantizer.Config(entries=settings.entries, width=8)
    common = {"steps": settings.steps, "batch": settings.batch, "rate": settings.rate, "channels": settings.channels}
    vq = Options(out=Path("unused"), seed=settings.seed, table=table, **common)
    dvae = replace(vq, kind="dvae")
    return {
        "VQ, L2": vq,
        "VQ, cosine": replace(vq, table=replace(table, distance="cosine")),
        "residual VQ, 2 levels": replace(vq, table=replace(table, levels=2)),
        "dVAE": dvae,
        "dVAE, scores as they come": replace(dvae, score_scale=0.0),
        "residual VQ, 4 levels": replace(vq, table=replace(table, levels=4)),
    }


def main(settings: Settings) -> None:
    """Train, measure, write after each."""
    provenance = origin("runs")
    pictures = {split: load(split, Options.size) for split in ("train", "held")}
    rows: list[dict[str, Any]] = []
    common = {key: value for key, value in vars(settings).items() if key != "out"}
    for name, options in kinds(settings).items():
        trained, _ = train_codec(pictures["train"], options)
        with tempfile.TemporaryDirectory() as folder:
            codec = save_codec(trained, Path(folder) / "codec")
            figures = {split: figures_of(codec, images) for split, images in pictures.items()}
        rows.append({"codec": name, "levels": codec.channels, "places": (Options.size // codec.factor) ** 2, **figures})
        print(json.dumps(rows[-1]), flush=True)
        counts = {split: len(images) for split, images in pictures.items()}
        write_json(settings.out, {**provenance, **common, "pictures": counts, "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Settings))
