"""Resume a run from a state: read it with the run's sharding, and refuse it if the run's settings differ, but for a few."""

from __future__ import annotations

import logging
import re
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
CHANGEABLE = ("rate", "warmup", "schedule", "clip", "weight_decay")
"""Settings of a stage that a resumed run may change. They only say how far a step moves the weights, and each step reads them
anew: nothing in a state depends on them, nor which samples and noise a step has. Others do: the average is a mean by the decay
``ema``, and ``steps``, ``accumulate`` and the mixture say what the position of a run means.
"""


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


def check(
    plan: dict[str, Any], out: Path, recipe: Recipe, fingerprint: str, data: str, examples: list[Any]
) -> dict[str, tuple[Any, Any]]:
    """Check that a run continues as it began; a difference that only changes its numbers is a warning.

    Args:
        plan: plan of the state.
        out: the run's folder, for messages.
        recipe: the current recipe.
        fingerprint: fingerprint of the base.
        data: spec of the source.
        examples: number, ids and content of the examples (`xfusion.training.progress.all_examples`).

    Returns:
        settings that may be changed and are (`CHANGEABLE`): field of the recipe -> its recorded and its current value.

    Raises:
        XFusionError: the base or other settings differ.
    """
    if plan["base_fingerprint"] != fingerprint:
        raise XFusionError(
            f"{out} was trained on the base {plan['base_fingerprint'][:16]}, this one is {fingerprint[:16]}: resume with the"
            " same base"
        )
    recorded_recipe = checkpoint.from_json(plan["recipe"], trust=True, where=str(out / "state"))
    changed: dict[str, tuple[Any, Any]] = {}
    for field, before, now in checkpoint.differing(*map(checkpoint.to_json, (recorded_recipe, recipe))):
        if not _is_changeable(field, plan):
            raise XFusionError(
                f"{out} was started otherwise: {field} was {before!r} and is now {now!r}; give the same settings to resume (of"
                f" a stage with steps left {', '.join(CHANGEABLE)} may be others)"
            )
        changed[field] = before, now
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
    return changed


def _is_changeable(field: str, plan: dict[str, Any]) -> bool:
    """Whether a field of the recipe is one that later steps read, and nothing else."""
    match = re.fullmatch(rf"stages\.(\d+)\.({'|'.join(CHANGEABLE)})", field)
    return match is not None and (not plan["planned"] or plan["step"] < sum(plan["totals"][: int(match[1]) + 1]))


def difference(recorded: Any, current: Any) -> str | None:
    """The first field in which two configurations differ, with both values; None if they are equal."""
    for field, recorded_value, current_value in checkpoint.differing(*map(checkpoint.to_json, (recorded, current))):
        return f"{field} was {recorded_value!r} and is now {current_value!r}"
    return None
