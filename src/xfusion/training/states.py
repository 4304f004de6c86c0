"""The states of a run: the newest few and the best, each whole or not there, and read only as it was written.

``state/step_00000300/`` holds ``state.safetensors`` (weights, their average, the optimizer's moments) and ``state.json``
(the recipe, where the run stands, a hash of the tensors' file and one over itself).
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from xfusion import checkpoint
from xfusion.data.sequence import XFusionError

STATE, PLAN = "state.safetensors", "state.json"
logger = logging.getLogger(__name__)


def found(folder: Path) -> list[Path]:
    """A run's states, the newest first, intact or not; none where there is no such folder."""
    states = sorted((path for path in folder.glob("step_*") if path.is_dir()), reverse=True)
    # Before states were numbered there was one, in the folder itself.
    return states + ([folder] if (folder / PLAN).is_file() else [])


def write(folder: Path, tensors: dict[str, Tensor], plan: dict[str, Any], keep: int) -> Path:
    """Write the state of ``plan["step"]``, then remove all but the newest ``keep`` and the best.

    Raises:
        XFusionError: it cannot be written; the states that were there stay.
    """
    target = folder / f"step_{plan['step']:08d}"
    with checkpoint.whole_folder(target) as state:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(state / STATE))
        plan = checkpoint.sealed(plan | {"state_sha256": checkpoint.file_hash(state / STATE)})
        (state / PLAN).write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    kept = {*found(folder)[:keep], best(folder)}
    for state in found(folder):
        if state == folder:
            (state / STATE).unlink(missing_ok=True)
            (state / PLAN).unlink()
        elif state not in kept:  # without its name first, or a kill in between would leave half of a state under it
            shutil.rmtree(state.rename(folder / f".{state.name}-old"), ignore_errors=True)
    return target


def best(folder: Path) -> Path | None:
    """The state with the lowest loss among those of the furthest stage: losses of two stages have no common measure."""
    ranked = []
    for state in found(folder):
        try:
            plan = read_plan(state)
        except XFusionError:
            continue
        if plan.get("loss") is not None:
            ranked.append((-plan["stage"], plan["loss"], state))
    return min(ranked)[2] if ranked else None


def read_plan(state: Path) -> dict[str, Any]:
    """What a state says of its run.

    Raises:
        XFusionError: it is missing, half there or altered.
    """
    plan = checkpoint.read_json(state / PLAN)
    numbered = state.name.startswith("step_")
    if numbered and not {checkpoint.SEAL, "state_sha256"} <= set(plan):
        raise XFusionError(f"{state / PLAN} was altered: a state has hashes, this has none; take an intact copy")
    return plan


def read(state: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state's plan and tensors.

    Raises:
        XFusionError: it is missing, half there or altered.
    """
    plan = read_plan(state)
    return plan, checkpoint.read_tensors(state / STATE, plan.get("state_sha256"))


def newest(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The newest intact state; damaged ones are named in a warning.

    Raises:
        XFusionError: none is intact.
    """
    damage: list[str] = []
    for state in found(folder):
        try:
            plan, tensors = read(state)
        except XFusionError as error:
            damage.append(str(error))
            continue
        for line in damage:
            logger.warning("%s: left out, the run goes on from step %d", line, plan["step"])
        return plan, tensors
    raise XFusionError(f"{folder} holds no intact state: {'; '.join(damage) or 'it is empty'}; start the run again")


def newest_plan(folder: Path) -> dict[str, Any]:
    """The plan of the newest state that can be read, without its tensors.

    Raises:
        XFusionError: none can.
    """
    damage: list[str] = []
    for state in found(folder):
        try:
            return read_plan(state)
        except XFusionError as error:
            damage.append(str(error))
    raise XFusionError(f"{folder} holds no intact state: {'; '.join(damage) or 'it is empty'}; start the run again")


def remove_rests(run: Path) -> None:
    """Remove what a killed run had half written: folders that never got their name."""
    for rest in (*run.glob("state/.step_*-*"), *run.glob(".pack-*")):
        shutil.rmtree(rest, ignore_errors=True)
