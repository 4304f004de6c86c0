"""Quality of drawings against steps: Euler, Heun and diffusers' multistep solver, with the shipped pack.

    python benchmarks/solvers.py

Draws 64 emoji with each solver in 4, 8, 16, 25 and 50 steps from the same noise. The error is the distance to Heun's drawing in
100 steps from that noise: root mean square, levels of 255; the distance to the requested picture is given beside it. R@1 is the
share of drawings whose nearest picture, among all that the pack was trained on, is of the requested group, in pixels and by the
features of EfficientNet-Lite0: memorisation. A step of Heun costs two passes of the model, so passes are
counted too. Guidance is the pack's own. Writes
benchmarks/results/solvers.json, which `python docs/pages.py speed` draws.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

import xfusion
from xfusion.data.sources import open_source
from xfusion.evaluation.machine import origin
from xfusion.evaluation.metrics.retrieval import retrieval
from xfusion.evaluation.suites.emoji import choose_examples
from xfusion.modalities.encoders.efficientnet_lite import EfficientNetLite
from xfusion.objectives import solvers
from xfusion.storage import write_json

RESULT = Path(__file__).parent / "results" / "solvers.json"


@dataclass(frozen=True)
class Settings:
    """What is drawn."""

    pack: str = "emoji"
    """A model that draws."""
    data: str = "emoji"
    """The pictures that it was trained on."""
    pictures: int = 64
    """How many are drawn."""
    steps: tuple[int, ...] = (4, 8, 16, 25, 50)
    """Steps of each solver."""
    fine: int = 100
    """Heun's steps of the drawing that others are held against."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = RESULT
    """Where the result goes."""


def _levels(images: torch.Tensor, others: torch.Tensor) -> float:
    """Root mean square distance in levels of 255, of pixels in [-1, 1]."""
    return round(127.5 * float((images - others).square().mean().sqrt()), 2)


def main(settings: Settings) -> None:
    """Draw, score, write."""
    provenance = origin("benchmarks")
    model, source = xfusion.load(settings.pack), open_source(settings.data, split="train")
    size, passes = model.image.sizes[0], 0
    all_indices = range(len(source.examples))
    gallery = model.image.from_pil([source.picture(i, size) for i in all_indices], size)
    encoder = EfficientNetLite()
    gallery_features = torch.cat([encoder.features(part) for part in gallery.split(64)])
    groups = [example.group for example in source.examples]
    indices = choose_examples(source.examples, settings.pictures)
    prompts = [source.examples[i].captions[0] for i in indices]
    rows: list[dict] = []
    # It also prepares what a first call has to, which is no solver's.
    reference = model.image.from_pil(
        model.draw(prompts, seeds=indices, steps=settings.fine, solver=solvers.find("heun")), size
    )
    for name in solvers.names():
        for steps in settings.steps:
            start = time.perf_counter()
            pictures = model.draw(prompts, seeds=indices, steps=steps, solver=solvers.find(name))
            seconds = time.perf_counter() - start
            passes = 2 * steps - 1 if name == "heun" else steps
            images = model.image.from_pil(pictures, size)
            retrieval_scores = retrieval(images, gallery, torch.tensor(indices), groups, ks=(1, 10))
            by_features = retrieval(
                encoder.features(images), gallery_features, torch.tensor(indices), groups, distance="cosine"
            )
            row = {
                "solver": name,
                "steps": steps,
                "passes": passes,
                "error": _levels(images, reference),
                "to_real": _levels(images, gallery[torch.tensor(indices)]),
                "feature_at_1": by_features["at_1"],
                "pixel_at_1": retrieval_scores["at_1"],
            }
            rows.append(row | {"pixel_at_10": retrieval_scores["at_10"], "seconds": round(seconds, 2)})
            print(json.dumps(rows[-1]), flush=True)
    result = {
        **provenance,
        "pack": settings.pack,
        "fingerprint": model.fingerprint,
        "guidance": model.guidance,
        "sampling_shift": model.config.media.sampling_shift,
        "pictures": len(indices),
        "fine": settings.fine,
        "gallery": len(groups),
        "rows": rows,
    }
    write_json(settings.out, result)


if __name__ == "__main__":
    main(tyro.cli(Settings))
