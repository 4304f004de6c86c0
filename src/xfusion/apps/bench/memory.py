"""The saving from keeping freed memory in the process: seconds and page faults of a step, in turn with returning it."""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

from xfusion.apps.bench.base import Bench, Step
from xfusion.training.memory import ALL, keep_freed_memory

GIVEN_BACK = 1 << 26
"""Bytes that glibc keeps by itself after large blocks were freed."""
STEPS = 3
"""Steps of a turn, after one that the other setting disturbed."""


def measure(bench: Bench) -> dict[str, Any]:
    """Measure drawing and joint steps of the demo's tower."""
    return {kind: _measure_steps(bench, kind) for kind in ("drawing", "joint")}


def _measure_steps(bench: Bench, kind: str) -> dict[str, Any]:
    step = Step(bench, bench.model(), caption=0 if kind == "drawing" else None)
    step.warm()
    measurements: dict[str, list[tuple[float, float, float]]] = {"given_back": [], "kept": []}
    for round_index in range(bench.rounds):
        bench.report(f"round {round_index + 1} of {bench.rounds}: {', '.join(measurements)}")
        for mode, limit in (("given_back", GIVEN_BACK), ("kept", ALL)):
            keep_freed_memory(limit)
            step()
            before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            for _ in range(STEPS):
                step()
            seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
            system_seconds, faults = after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt
            measurements[mode].append((seconds / STEPS, system_seconds / STEPS, faults / STEPS))
    measures = ("step_seconds", "system_seconds", "page_faults")
    result: dict[str, Any] = {
        mode: dict(zip(measures, map(statistics.median, zip(*turns, strict=True)), strict=True))
        for mode, turns in measurements.items()
    }
    return result | {"given_back_over_kept": result["given_back"]["step_seconds"] / result["kept"]["step_seconds"]}
