"""The files of a comparison: their names, their content, and when they can be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from xfusion.checkpoint import differing
from xfusion.data.sequence import XFusionError
from xfusion.storage import atomic_file

BUDGET_TOLERANCE = 0.01
"""Largest relative difference of counted FLOPs from the first recipe's: budgets are whole steps."""
LEARNING_POINTS = 40
"""Points of a learning curve."""
SUMMARY = "comparison.json"
"""File that records what was compared and how, next to the runs' files."""
REAL = "real.png"
"""File with the real pictures of the sample grids."""


def run_name(label: str, seed: int, share: float = 1.0) -> str:
    """The name of a run's files: ``xfusion-seed0``, ``xfusion-seed0-share30``."""
    return f"{label}-seed{seed}" + ("" if share == 1 else f"-share{100 * share:g}")


def refuse_changed(path: Path, recorded: Any, current: Any) -> None:
    differences = [
        f"{field} = {recorded_value!r}, now it is {current_value!r}"
        for field, recorded_value, current_value in differing(recorded, current)
    ]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise XFusionError(
            f"{path} was made with {'; '.join(differences[:3])}{more}: give the same settings, another --out, or remove the"
            " file"
        )


def refuse_unequal(name: str, budget: Mapping[str, Any], other_name: str, other_budget: Mapping[str, Any]) -> None:
    """Refuse to compare unequal budgets."""
    kinds = [b["kind"] for b in (budget, other_budget)]
    if kinds[0] != kinds[1]:
        raise XFusionError(
            f"{name} has a budget in {kinds[0]}, {other_name} one in {kinds[1]}: they cannot be compared"
        )
    key = kinds[0]
    allowed = BUDGET_TOLERANCE * other_budget[key] if key == "flops" else 0
    if abs(budget[key] - other_budget[key]) > allowed:
        hint = "choose --samples as a multiple of both steps" if key == "samples" else "choose more --samples"
        raise XFusionError(
            f"{name} would train {budget[key]:,} {key} in steps of {budget['steps']}, {other_name} {other_budget[key]:,} in"
            f" {other_budget['steps']}: budgets must be equal; {hint}"
        )


def portable(value: Any) -> Any:
    """A JSON value with absolute paths shortened to the name of the file or folder."""
    if isinstance(value, Mapping):
        return {str(k): portable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(v) for v in value]
    if isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()) and "\n" not in value:
        return Path(value).name
    return value


def finite_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of a suite as JSON values, with None for values that are not finite."""
    values = {k: v for k, v in scores.items() if k != "settings"}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def read_events(log: Path) -> list[dict[str, Any]]:
    """Events of a run's log, without an incomplete last line left by a killed process."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def learning_curves(events: Sequence[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Loss -> points of samples so far and mean loss, from the events of a whole run."""
    steps = [event for event in events if event.get("event") == "step"]
    if not steps:
        return {}
    num_samples, curves = 0, {}
    length = math.ceil(len(steps) / LEARNING_POINTS)
    for start in range(0, len(steps), length):
        chunk = steps[start : start + length]
        num_samples += sum(event["samples"] for event in chunk)
        for name in chunk[0]["losses"]:
            mean = sum(event["losses"].get(name, 0.0) for event in chunk) / len(chunk)
            curves.setdefault(name, []).append([num_samples, float(f"{mean:.5g}")])
    return curves


def seconds_trained(events: Sequence[dict[str, Any]]) -> float:
    """Seconds that a run trained, resumed or not, from its events."""
    return max((event["seconds"] for event in events if "seconds" in event), default=0.0)


def write_strip(path: Path, pictures: Sequence[PILImage.Image], size: int) -> None:
    """Write pictures side by side into one file, atomically."""
    sheet = PILImage.new("RGB", (size * max(len(pictures), 1), size), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture.convert("RGB").resize((size, size)), (i * size, 0))
    with atomic_file(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
