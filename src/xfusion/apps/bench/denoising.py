"""Time of a guided denoising step relative to the time of the tower's own matrix products in it, at the demo's size.

On a CPU attention is computed by products of its own (`xfusion.layers.grouped_attention`), which are counted.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

from xfusion.apps.bench.base import TURN, Bench, products, replay
from xfusion.data.sequence import Text
from xfusion.generation import draw_tokens
from xfusion.model import Model


def measure(bench: Bench) -> dict[str, Any]:
    """Measure one picture and a full batch, for both towers; also compiled, although sampling is not."""
    result: dict[str, Any] = {}
    for tower in ("demo", "full"):
        model = bench.model(full=tower == "full")
        for pictures in (1, 2) if bench.quick else (1, 16):
            result[f"{tower}_tower_{pictures}_pictures"] = _measure_step(bench, model, pictures)
            if bench.compile:
                with model.using(replace(model.plain_engine(), compiled=True)):
                    result[f"{tower}_tower_{pictures}_pictures_compiled"] = _measure_step(bench, model, pictures)
    return result


def _measure_step(bench: Bench, model: Model, pictures: int) -> dict[str, Any]:
    """Steps of one drawing and its products alone, in turn within a second, so that both find the machine equally fast."""
    steps = 4 if bench.quick else 10
    captions = [example.captions[0] for example in bench.source.examples]
    texts = [(Text(ids=bench.backbone.encode(captions[i % len(captions)])),) for i in range(pictures)]

    def draw(steps: int) -> list[float]:
        """Seconds of every step but the first, which also makes the masks."""
        ends: list[float] = []
        draw_tokens(
            model,
            texts,
            model.image.sizes[0],
            seeds=range(pictures),
            steps=steps,
            guidance=3.0,
            progress=lambda *_: ends.append(time.perf_counter()),
        )
        return [end - start for start, end in pairwise(ends)]

    draw(steps)
    step_products = products(lambda: draw(steps + 1))[len(products(lambda: draw(steps))) :]
    replay_products = replay(step_products)
    replay_products()
    rounds: list[tuple[float, float]] = []
    for number in range(bench.rounds * (1 if bench.quick else 2)):
        bench.report(f"round {number + 1}: steps of a drawing, their products")
        step_seconds, products_seconds = [], []
        begun = time.perf_counter()
        while not step_seconds or (time.perf_counter() - begun < TURN and not bench.quick):
            step_seconds += draw(steps)
            for _ in range(steps):
                start = time.perf_counter()
                replay_products()
                products_seconds.append(time.perf_counter() - start)
            products_seconds.pop(-steps)  # the first found the CPU cache full of the step's own matrices
        rounds.append((statistics.median(step_seconds), statistics.median(products_seconds)))
    return {
        "denoising_step_over_tower_flops": statistics.median(step / alone for step, alone in rounds),
        "step_seconds": statistics.median(step for step, _ in rounds),
        "products_seconds": statistics.median(alone for _, alone in rounds),
        "flops": sum(product.flops for product in step_products),
        "precision": str(step_products[0].dtype).removeprefix("torch."),
    }
