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
    return {f"{tower}_tower": _measure_tower(bench, full=tower == "full") for tower in ("demo", "full")}


def _measure_tower(bench: Bench, *, full: bool) -> dict[str, Any]:
    step = Step(bench, bench.model(full=full))
    modes = {"kept": False, "computed_again": True}
    measurements: dict[str, list[tuple[float, float | None]]] = {mode: [] for mode in modes}
    for checkpointing in modes.values():
        step.engine.activation_checkpointing = checkpointing
        step.warm()
    device = bench.backbone.device
    for round_index in range(bench.rounds):
        bench.report(f"round {round_index + 1} of {bench.rounds}: {', '.join(modes)}")
        for mode, checkpointing in modes.items():
            step.engine.activation_checkpointing = checkpointing
            measurements[mode].append(_measure_turn(step, device))
    result: dict[str, Any] = {}
    for mode, checkpointing in modes.items():
        seconds, memory = zip(*measurements[mode], strict=True)
        result[mode] = {
            "step_seconds": statistics.median(seconds),
            "memory_bytes": None if None in memory else statistics.median(memory),
            "predicted_activation_bytes": activation_memory(
                step.model, bench.stage, bench.dtype, checkpointing=checkpointing
            ),
        }
    stored, recomputed = result["kept"], result["computed_again"]
    result["time_over_kept"] = recomputed["step_seconds"] / stored["step_seconds"]
    if stored["memory_bytes"]:
        result["memory_over_kept"] = recomputed["memory_bytes"] / stored["memory_bytes"]
    return result


def _measure_turn(step: Step, device: torch.device) -> tuple[float, float | None]:
    """Seconds of a step, and the bytes that a turn needs."""
    give_back_freed_memory()
    bytes_before = _allocated_bytes(device)
    with peak_memory(device) as peak:
        step()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        seconds = (time.perf_counter() - start) / STEPS
    return seconds, None if bytes_before is None or peak["bytes"] is None else peak["bytes"] - bytes_before


def _allocated_bytes(device: torch.device) -> int | None:
    """Bytes held now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with peak_memory(device) as peak:
        pass
    return peak["bytes"]
