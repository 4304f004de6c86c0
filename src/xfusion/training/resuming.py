"""The state that a run goes on from: read as its weights are divided, and refused where the run would be another."""

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
    folder: Path, optimizer: Optimizer, processes: Processes, *, divided: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Plan and tensors of the newest intact state, divided as the run's weights are; all processes call it together.

    Args:
        folder: of states.
        optimizer: whose tensors these will be.
        processes: of the run.
        divided: whether they divide weights.
    """
    if not divided:
        return states.newest(folder)
    state, plan = processes.same(states.newest_intact(folder) if processes.first else (Path(), {}))
    tensors = optimizer.state_like(states.entries(state))
    states.fill(state, tensors)
    return plan, tensors


def check(plan: dict[str, Any], out: Path, recipe: Recipe, fingerprint: str, data: str, examples: list[Any]) -> None:
    """Whether a run goes on as it began; what alone makes its numbers others is a warning.

    Args:
        plan: of the state.
        out: the run's folder, for the messages.
        recipe: as it is now.
        fingerprint: of the base.
        data: spec of the source.
        examples: how many there are, which, and what is in them (`xfusion.training.progress.all_examples`).

    Raises:
        XFusionError: another base or other settings.
    """
    if plan["base_fingerprint"] != fingerprint:
        raise XFusionError(
            f"{out} was trained on the base {plan['base_fingerprint'][:16]}, this one is {fingerprint[:16]}: resume with the"
            " same base"
        )
    saved = checkpoint.from_json(plan["recipe"], trust=True, where=str(out / "state"))
    if (said := difference(saved, recipe)) is not None:
        raise XFusionError(f"{out} was started otherwise: {said}; give the same settings to resume")
    if plan["threads"] != torch.get_num_threads():
        logger.warning(
            "%s ran on %d threads and goes on with %d: sums round otherwise, so its losses agree but not to the bit",
            *(out, plan["threads"], torch.get_num_threads()),
        )
    before = plan.get("examples", examples)
    if before[:2] != examples[:2]:
        logger.warning(
            "%s held %d examples when %s began and holds %d, not all the same, now: its batches from here on are others",
            *(data, before[0], out, examples[0]),
        )
    elif before != examples[: len(before)]:  # states from before it was asked do not say what was in them
        logger.warning(
            "%s holds %d examples of the same names as when %s began, but not the same pictures, words or groups (of the hub:"
            " another commit): its batches from here on are others",
            *(data, before[0], out),
        )


def difference(one: Any, other: Any) -> str | None:
    """The first field in which two configurations differ, with both values; None where there is none."""
    for where, was, now in checkpoint.differing(*map(checkpoint.to_json, (one, other))):
        return f"{where} was {was!r} and is now {now!r}"
    return None
