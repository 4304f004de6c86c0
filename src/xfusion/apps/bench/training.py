"""How close a training step comes to the time of its own matrix products, and to the rate of a large one.

``share_of_shape_peak``: time of the step's own matrix products alone (forward and backward, same shapes, precision and
threads) over the time of the step. ``share_of_peak``: FLOPs that the step executes per second over those of a 4096-cubed
product. Cold start is the first step, once with nothing compiled and once with an earlier process's compile cache on disk.
Timed steps repeat the batches of the warm-up, so that they compile no new graph; ``graphs_in_unseen_steps`` counts new graphs
on unseen batches.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from xfusion.apps.bench.base import Bench, Step, alone, no_new_graphs, products

UNSEEN = 16
"""Steps in which new graphs are counted."""


def measure(bench: Bench) -> dict[str, Any]:
    """Measure drawing and joint steps of the demo's tower and of the full copied one."""
    return {f"{tower}_tower": _tower(bench, full=tower == "full") for tower in ("demo", "full")}


def _tower(bench: Bench, *, full: bool) -> dict[str, Any]:
    model = bench.model(full=full)
    found: dict[str, Any] = {"trainable_parameters": model.num_new_parameters}
    for kind in ("drawing", "joint"):
        step = Step(bench, model, caption=0 if kind == "drawing" else None)
        found[kind] = {"cold_start_seconds": _cold(bench, step)} if not full else {}
        step.warm()
        executed, (square, flops) = products(step), bench.matrix_product()
        with no_new_graphs() as graphs:
            seconds = bench.in_turn({f"{kind} step": step, "its products": alone(executed), "a large product": square})
            found[kind]["graphs_after_warm_up"] = graphs()
        with no_new_graphs() as graphs:
            step.unseen(UNSEEN)
            found[kind]["graphs_in_unseen_steps"] = graphs()
        taken, matrices, large = seconds.values()
        done = sum(product.flops for product in executed)
        found[kind] |= {
            "share_of_shape_peak": matrices / taken,
            "share_of_peak": done / taken / (flops / large),
            "share_of_peak_of_the_products": done / matrices / (flops / large),
            "samples_per_second": step.samples / taken,
            "step_seconds": taken,
            "products_seconds": matrices,
            "products": len(executed),
            "flops": done,
            "peak_flops_per_second": flops / large,
        }
    return found


def _cold(bench: Bench, step: Step) -> dict[str, float]:
    """Seconds of a first step: with nothing compiled, then with the compile cache on disk."""

    def first() -> float:
        torch.compiler.reset()
        begun = time.perf_counter()
        step()
        return time.perf_counter() - begun

    bench.tell("cold start")
    with fresh_cache():
        return {"nothing_compiled": first(), "compiled_before": first()}
