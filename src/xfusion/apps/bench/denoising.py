"""Time of a guided denoising step relative to the time of the tower's own matrix products in it, at the demo's size.

On a CPU attention is computed by products of its own (`xfusion.layers.grouped_attention`), which are counted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from xfusion.apps.bench.base import Bench, products, replay
from xfusion.data.sequence import Text
from xfusion.generation import draw_tokens
from xfusion.model import Model


def measure(bench: Bench) -> dict[str, Any]:
    """Measure one picture and a full batch, for both towers; the demo's also compiled, although sampling is not."""
    result: dict[str, Any] = {}
    for tower in ("demo", "full"):
        model = bench.model(full=tower == "full")
        for pictures in (1, 2) if bench.quick else (1, 16):
            result[f"{tower}_tower_{pictures}_pictures"] = _measure_step(bench, model, pictures)
            if tower == "demo" and bench.compile:
                with model.using(replace(model.plain_engine(), compiled=True)):
                    result[f"demo_tower_{pictures}_pictures_compiled"] = _measure_step(bench, model, pictures)
    return result


def _measure_step(bench: Bench, model: Model, pictures: int) -> dict[str, Any]:
    few_steps, many_steps = (2, 4) if bench.quick else (2, 12)
    captions = [example.captions[0] for example in bench.source.examples]
    texts = [(Text(ids=bench.backbone.encode(captions[i % len(captions)])),) for i in range(pictures)]

    def draw(steps: int) -> None:
        draw_tokens(model, texts, model.image.sizes[0], seeds=range(pictures), steps=steps, guidance=3.0)

    draw(few_steps)
    # A longer sampling run differs from a shorter one only in its number of denoising steps.
    step_products = products(lambda: draw(few_steps + 1))[len(products(lambda: draw(few_steps))) :]
    works = {
        "few steps": lambda: draw(few_steps),
        "many steps": lambda: draw(many_steps),
        "its products": replay(step_products),
    }
    few_seconds, many_seconds, products_seconds = bench.in_turn(works).values()
    step_seconds = (many_seconds - few_seconds) / (many_steps - few_steps)
    return {
        "denoising_step_over_tower_flops": step_seconds / products_seconds,
        "step_seconds": step_seconds,
        "products_seconds": products_seconds,
        "flops": sum(product.flops for product in step_products),
        "precision": str(step_products[0].dtype).removeprefix("torch."),
    }
