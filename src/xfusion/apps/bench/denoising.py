"""Time of a guided denoising step relative to the time of the tower's own matrix products in it, at the demo's size.

Attention scores and weighted sums are computed inside the fused attention and do not count as products: the measure is strict.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from xfusion.apps.bench.base import Bench, alone, products
from xfusion.data.sequence import Text
from xfusion.generation import draw_tokens
from xfusion.model import Model


def measure(bench: Bench) -> dict[str, Any]:
    """Measure one picture and a full batch, for both towers; the demo's also compiled, although sampling is not."""
    found: dict[str, Any] = {}
    for tower in ("demo", "full"):
        model = bench.model(full=tower == "full")
        for pictures in (1, 2) if bench.quick else (1, 16):
            found[f"{tower}_tower_{pictures}_pictures"] = _step(bench, model, pictures)
            if tower == "demo" and bench.compile:
                with model.using(replace(model.plain_engine(), compiled=True)):
                    found[f"demo_tower_{pictures}_pictures_compiled"] = _step(bench, model, pictures)
    return found


def _step(bench: Bench, model: Model, pictures: int) -> dict[str, Any]:
    few, many = (2, 4) if bench.quick else (2, 12)
    captions = [example.captions[0] for example in bench.source.examples]
    texts = [(Text(ids=bench.backbone.encode(captions[i % len(captions)])),) for i in range(pictures)]

    def draw(steps: int) -> None:
        draw_tokens(model, texts, model.image.sizes[0], seeds=range(pictures), steps=steps, guidance=3.0)

    draw(few)
    # A longer sampling run differs from a shorter one only in its number of denoising steps.
    step = products(lambda: draw(few + 1))[len(products(lambda: draw(few))) :]
    works = {"few steps": lambda: draw(few), "many steps": lambda: draw(many), "its products": alone(step)}
    short, long, matrices = bench.in_turn(works).values()
    taken = (long - short) / (many - few)
    return {
        "denoising_step_over_tower_flops": taken / matrices,
        "step_seconds": taken,
        "products_seconds": matrices,
        "flops": sum(product.flops for product in step),
        "precision": str(step[0].dtype).removeprefix("torch."),
    }
