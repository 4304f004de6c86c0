"""How fast the embedded default trains and draws: one JSON object on standard output.

    make bench

Drawing: steps of 64 drawings, no captions. Joint: 64 drawings and 32 captions per step (2 : 1). Sampling: 16 pictures in
25 guided steps with the model loaded; the median of three. Run it on an idle machine.
"""

from __future__ import annotations

import json
import statistics
import time

import torch

from xfusion.apps.demo import machine
from xfusion.backbone import Backbone
from xfusion.model import build
from xfusion.recipes.xfusion import demo as recipe_function
from xfusion.training.speed import drawing_speed, short_run

STEPS = 40
PROMPTS = [
    f"{colour} {thing}" for colour in ("red", "green", "blue", "big") for thing in ("apple", "car", "house", "cat")
]


def sampling_seconds(backbone: Backbone) -> float:
    """Seconds for 16 pictures in 25 guided steps."""
    model = build(recipe_function().model, backbone)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model.draw(PROMPTS, steps=25, guidance=3.0)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    backbone = Backbone.load()
    drawing = drawing_speed(recipe_function(), backbone=backbone, steps=STEPS)
    _, joint = short_run(recipe_function(), backbone=backbone, steps=STEPS)
    result = {
        "drawing_samples_per_second": round(drawing["samples_per_second"], 1),
        "joint_samples_per_second": round(joint or 0.0, 1),
        "seconds_for_16_pictures_in_25_guided_steps": round(sampling_seconds(backbone), 2),
        "threads": torch.get_num_threads(),
        "machine": machine(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
