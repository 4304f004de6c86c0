"""Time of a guided denoising step over the time of the tower's own matrix products in it, at the demo's size.

Scores and their sums are made inside the fused attention and are not among the products: the measure is strict.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from xfusion.apps.bench.base import Bench, alone, products
from xfusion.data.sequence import Text
from xfusion.generation import draw_tokens
from xfusion.model import Model


def measure(bench: Bench) -> dict[str, Any]:
    """One picture, and as many as are drawn together, of both towers; the demo's also compiled, which sampling is not."""
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
    # What a walk does beyond a shorter one is denoising steps and nothing else.
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
