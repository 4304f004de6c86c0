"""Where the time of a training step goes: drawing and joint steps of the demo's tower, by torch's profiler.

    python benchmarks/profile_step.py

Seconds of a step by kind of work (self time), page faults and seconds in the operating system per step, and the profiler's
table for each kind of step. Writes benchmarks/results/profile.json, which `python docs/pages.py speed` reads, and profile_*.txt.
"""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from xfusion.apps.bench.base import PERIOD, Bench, Step
from xfusion.evaluation.machine import origin
from xfusion.storage import write_json

RESULT = Path(__file__).parent / "results" / "profile.json"
KINDS = {
    "matrix products": ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"),
    "compiled, beside the products": ("## Call CompiledFxGraph",),
    "AdamW": ("aten::_fused_adamw_",),
    "moving average": ("aten::lerp_",),
    "norm of the gradient": ("aten::dot",),
    "copies and casts": ("aten::copy_",),
    "filling": ("aten::fill_", "aten::zero_"),
}
"""Kind of work -> beginnings of the profiler's names."""


@dataclass(frozen=True)
class Settings:
    """How long."""

    steps: int = 10
    """Profiled steps of each kind."""
    data: str = "emoji:128"
    """Pictures with captions."""
    compile: bool = True
    """Compile the per-layer work, as training does."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = RESULT
    """Where the result goes."""


def main(settings: Settings) -> None:
    """Profile and write."""
    result, bench = origin("benchmarks"), Bench.of(None, settings.data, compile=settings.compile)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    for kind in ("drawing", "joint"):
        step = Step(bench, bench.model(), caption=0 if kind == "drawing" else None)
        step.warm()
        usage_before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for _ in range(settings.steps):
            step()
        seconds = (time.perf_counter() - start) / settings.steps
        usage_after = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        for step_index in range(settings.steps):
            step.mixture.batches(step_index % PERIOD)
        batches = (time.perf_counter() - start) / settings.steps
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(settings.steps):
                step()
        averages = profile.key_averages()
        total = sum(event.self_cpu_time_total for event in averages)
        shares = {
            name: sum(e.self_cpu_time_total for e in averages if e.key.startswith(starts)) / total
            for name, starts in KINDS.items()
        }
        result[kind] = {
            "step_seconds": round(seconds, 5),
            "batches_seconds": round(batches, 5),
            "system_seconds": round((usage_after.ru_stime - usage_before.ru_stime) / settings.steps, 5),
            "page_faults": round((usage_after.ru_minflt - usage_before.ru_minflt) / settings.steps),
            "shares": {name: round(share, 4) for name, share in (shares | {"rest": 1 - sum(shares.values())}).items()},
        }
        table = averages.table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=70)
        settings.out.with_name(f"profile_{kind}.txt").write_text(table + "\n", encoding="utf-8")
        print(json.dumps({kind: result[kind]}), flush=True)
    write_json(settings.out, result)


if __name__ == "__main__":
    main(tyro.cli(Settings))
