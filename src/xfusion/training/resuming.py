"""Resume a run from a state: read it with the run's sharding, and refuse it if the run's settings differ."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from xfusion import checkpoint
from xfusion.data.sequence import XFusionError
from xfusion.training import states
from xfusion.training.optimizer import Optimizer
from xfusion.training.processes import Processes
from xfusion.training.stages import Recipe

logger = logging.getLogger(__name__)


def read(
    folder: Path, optimizer: Optimizer, processes: Processes, *, sharded: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Plan and tensors of the newest intact state, sharded like the run's weights; all processes call it together.

    Args:
        folder: folder of the states.
        optimizer: the optimizer that will load the tensors.
        processes: the run's processes.
        sharded: whether weights are sharded.

    Raises:
        XFusionError: no state is intact, or a process cannot read it; raised in all processes.
    """
    if not sharded:
        with processes.all_or_none():
            return states.newest(folder)
    with processes.first_alone():
        newest = states.newest_intact(folder) if processes.is_first else (Path(), {})
    state, plan = processes.broadcast(newest)
    tensors = optimizer.state_like(states.entries(state))
    states.fill(state, tensors)
    return plan, tensors


def check(plan: dict[str, Any], out: Path, recipe: Recipe, fingerprint: str, data: str, examples: list[Any]) -> None:
    """Check that a run continues as it began; a difference that only changes its numbers is a warning.

    Args:
        plan: plan of the state.
        out: the run's folder, for messages.
        recipe: the current recipe.
        fingerprint: fingerprint of the base.
        data: spec of the source.
        examples: number, ids and content of the examples (`xfusion.training.progress.all_examples`).

    Raises:
        XFusionError: the base or the settings differ.
    """
    if plan["base_fingerprint"] != fingerprint:
        raise XFusionError(
            f"{out} was trained on the base {plan['base_fingerprint'][:16]}, this one is {fingerprint[:16]}: resume with the"
            " same base"
        )
    recorded_recipe = checkpoint.from_json(plan["recipe"], trust=True, where=str(out / "state"))
    if (mismatch := difference(recorded_recipe, recipe)) is not None:
        raise XFusionError(f"{out} was started otherwise: {mismatch}; give the same settings to resume")
    if plan["threads"] != torch.get_num_threads():
        logger.warning(
            "%s ran on %d threads and goes on with %d: sums round otherwise, so its losses agree but not to the bit",
            *(out, plan["threads"], torch.get_num_threads()),
        )
    recorded = plan.get("examples", examples)
    if recorded[:2] != examples[:2]:
        logger.warning(
            "%s held %d examples when %s began and holds %d, not all the same, now: its batches from here on are others",
            *(data, recorded[0], out, examples[0]),
        )
    elif recorded != examples[: len(recorded)]:  # older states do not record the content
        logger.warning(
            "%s holds %d examples of the same names as when %s began, but not the same pictures, words or groups (of the hub:"
            " another commit): its batches from here on are others",
            *(data, recorded[0], out),
        )


def difference(recorded: Any, current: Any) -> str | None:
    """The first field in which two configurations differ, with both values; None if they are equal."""
    for field, recorded_value, current_value in checkpoint.differing(*map(checkpoint.to_json, (recorded, current))):
        return f"{field} was {recorded_value!r} and is now {current_value!r}"
    return None
