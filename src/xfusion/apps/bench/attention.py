"""Which attention the training step shall take on a CPU: plain products, the same with grouped queries, the fused kernel."""

from __future__ import annotations

from typing import Any

from xfusion.apps.bench.base import Bench, Step, products
from xfusion.backbone import GROUPED


def measure(bench: Bench) -> dict[str, Any]:
    """Drawing and joint steps of the demo's tower by each, in turn."""
    found: dict[str, Any] = {}
    for kind in ("drawing", "joint"):
        steps = {
            name: Step(bench, bench.model(), caption=0 if kind == "drawing" else None, attention=attention)
            for name, attention in (("plain", "eager"), ("grouped", GROUPED), ("fused", "sdpa"))
        }
        for step in steps.values():
            step.warm()
        seconds = bench.in_turn(dict(steps))
        found[kind] = {f"{name}_step_seconds": taken for name, taken in seconds.items()}
        found[kind] |= {f"plain_over_{name}": seconds["plain"] / seconds[name] for name in ("grouped", "fused")}
        found[kind] |= {f"{name}_flops": sum(p.flops for p in products(steps[name])) for name in ("plain", "grouped")}
    return found
