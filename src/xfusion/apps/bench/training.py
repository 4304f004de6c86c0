"""How close a training step comes to the time of its own matrix products, and to the rate of a large one.

``share_of_shape_peak``: time of the step's own matrix products alone (forward and backward, same shapes, precision and
threads) over the time of the step. ``share_of_peak``: FLOPs that the step executes per second over those of a 4096-cubed
product in the ``precision`` of training. Cold start is the first step, once with nothing compiled and once with an earlier
process's compile cache on disk. Timed steps repeat the batches of the warm-up, so that they compile no new graph;
``graphs_in_unseen_steps`` counts new graphs on unseen batches.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from xfusion.apps.bench.base import Bench, Step, count_new_graphs, products, replay

UNSEEN = 16
"""Steps in which new graphs are counted."""


def measure(bench: Bench) -> dict[str, Any]:
    """Measure drawing and joint steps of the demo's tower and of the full copied one."""
    return {f"{tower}_tower": _measure_tower(bench, full=tower == "full") for tower in ("demo", "full")}


def _measure_tower(bench: Bench, *, full: bool) -> dict[str, Any]:
    model = bench.model(full=full)
    precision = str(bench.dtype).removeprefix("torch.")
    result: dict[str, Any] = {"trainable_parameters": model.num_new_parameters, "precision": precision}
    for kind in ("drawing", "joint"):
        step = Step(bench, model, caption=0 if kind == "drawing" else None)
        result[kind] = {"cold_start_seconds": _cold_start(bench, step)} if not full else {}
        step.warm()
        executed, (large_product, large_flops) = products(step), bench.matrix_product()
        with count_new_graphs() as graphs:
            seconds = bench.in_turn(
                {f"{kind} step": step, "its products": replay(executed), "a large product": large_product}
            )
            result[kind]["graphs_after_warm_up"] = graphs()
        with count_new_graphs() as graphs:
            step.run_unseen(UNSEEN)
            result[kind]["graphs_in_unseen_steps"] = graphs()
        step_seconds, products_seconds, large_seconds = seconds.values()
        executed_flops = sum(product.flops for product in executed)
        result[kind] |= {
            "share_of_shape_peak": products_seconds / step_seconds,
            "share_of_peak": executed_flops / step_seconds / (large_flops / large_seconds),
            "share_of_peak_of_the_products": executed_flops / products_seconds / (large_flops / large_seconds),
            "samples_per_second": step.samples / step_seconds,
            "step_seconds": step_seconds,
            "products_seconds": products_seconds,
            "products": len(executed),
            "flops": executed_flops,
            "peak_flops_per_second": large_flops / large_seconds,
        }
    return result


def _cold_start(bench: Bench, step: Step) -> dict[str, float]:
    """Seconds of a first step: with nothing compiled, then with the compile cache on disk."""

    def first_step() -> float:
        torch.compiler.reset()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    bench.report("cold start")
    with fresh_cache():
        return {"nothing_compiled": first_step(), "compiled_before": first_step()}
