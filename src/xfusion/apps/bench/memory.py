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
    return {kind: _turns(bench, kind) for kind in ("drawing", "joint")}


def _turns(bench: Bench, kind: str) -> dict[str, Any]:
    step = Step(bench, bench.model(), caption=0 if kind == "drawing" else None)
    step.warm()
    taken: dict[str, list[tuple[float, float, float]]] = {"given_back": [], "kept": []}
    for number in range(bench.rounds):
        bench.tell(f"round {number + 1} of {bench.rounds}: {', '.join(taken)}")
        for name, up_to in (("given_back", GIVEN_BACK), ("kept", ALL)):
            keep_freed_memory(up_to)
            step()
            before, begun = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            for _ in range(STEPS):
                step()
            seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
            system, faults = after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt
            taken[name].append((seconds / STEPS, system / STEPS, faults / STEPS))
    names = ("step_seconds", "system_seconds", "page_faults")
    found: dict[str, Any] = {
        way: dict(zip(names, map(statistics.median, zip(*turns, strict=True)), strict=True))
        for way, turns in taken.items()
    }
    return found | {"given_back_over_kept": found["given_back"]["step_seconds"] / found["kept"]["step_seconds"]}
