"""The cost and saving of activation checkpointing: seconds and memory of a step with and without it, taking turns.

Memory is the growth of the process in a turn, by the system's high-water mark, with freed blocks returned to the system
before; on a GPU, what its allocator handed out. The prediction of `xfusion show` for an uncompiled step is reported, too.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from xfusion.apps.bench.base import Bench, Step
from xfusion.comparison.cost import activation_memory, peak_memory
from xfusion.training.memory import give_back_freed_memory

STEPS = 3
"""Steps of a turn, after one in which memory is allocated again."""


def measure(bench: Bench) -> dict[str, Any]:
    """Measure joint steps of the demo's tower and of the full copied one."""
    return {f"{tower}_tower": _turns(bench, full=tower == "full") for tower in ("demo", "full")}


def _turns(bench: Bench, *, full: bool) -> dict[str, Any]:
    step = Step(bench, bench.model(full=full))
    ways = {"kept": False, "computed_again": True}
    taken: dict[str, list[tuple[float, float | None]]] = {way: [] for way in ways}
    for again in ways.values():
        step.engine.activation_checkpointing = again
        step.warm()
    device = bench.backbone.device
    for number in range(bench.rounds):
        bench.tell(f"round {number + 1} of {bench.rounds}: {', '.join(ways)}")
        for way, again in ways.items():
            step.engine.activation_checkpointing = again
            taken[way].append(_turn(step, device))
    found: dict[str, Any] = {}
    for way, again in ways.items():
        seconds, grown = zip(*taken[way], strict=True)
        found[way] = {
            "step_seconds": statistics.median(seconds),
            "memory_bytes": None if None in grown else statistics.median(grown),
            "predicted_activation_bytes": activation_memory(step.model, bench.stage, bench.dtype, checkpointing=again),
        }
    kept, again = found["kept"], found["computed_again"]
    found["time_over_kept"] = again["step_seconds"] / kept["step_seconds"]
    if kept["memory_bytes"]:
        found["memory_over_kept"] = again["memory_bytes"] / kept["memory_bytes"]
    return found


def _turn(step: Step, device: torch.device) -> tuple[float, float | None]:
    """Seconds of a step, and the bytes that a turn needs."""
    give_back_freed_memory()
    before = _held(device)
    with peak_memory(device) as most:
        step()
        begun = time.perf_counter()
        for _ in range(STEPS):
            step()
        seconds = (time.perf_counter() - begun) / STEPS
    return seconds, None if before is None or most["bytes"] is None else most["bytes"] - before


def _held(device: torch.device) -> int | None:
    """Bytes held now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with peak_memory(device) as now:
        pass
    return now["bytes"]
