"""Where a run is and how far it will go; saved with its states and restored on resume."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Source, content_fingerprint
from xfusion.training.stages import Stage

LATEST_PLAN = 0.75
"""Share of a wall-clock budget after which the plan is made with the pace known so far."""
LARGEST_STEPS = 10_000_000
"""Assumed length of a stage that is not planned yet: its learning rate warms up and then stays at its peak."""
LOSS_DECAY = 0.98
"""Decay of the running mean of the loss, which looks back over some fifty steps. The best state has its lowest value."""


class Progress:
    """Steps, samples, tokens, seconds and mean loss of a run since its start.

    Args:
        stages: the recipe's.
        minutes: wall-clock budget, which sets the number of steps later (`plan`); None uses that of the stages.
    """

    def __init__(self, stages: Sequence[Stage], minutes: float | None):
        self.stages, self.minutes = stages, minutes
        self.totals = [stage.steps for stage in stages]
        self.planned = minutes is None
        self.step = 0
        self.samples = 0
        self.skipped = 0
        """Steps whose loss or gradient was not finite; they count as steps, but not their samples and tokens."""
        self.tokens: int | None = 0
        """Text and media positions of all steps (`Batch.num_positions`); None behind a state from before they were counted."""
        self._started = time.perf_counter()
        self._seconds_before = 0.0
        self._recent = (0.0, 0.0)
        """Sum and weight of the running mean of the loss (`LOSS_DECAY`)."""

    @property
    def total(self) -> int:
        """Steps of all stages, as far as known."""
        return sum(self.totals)

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.planned and self.step >= self.total

    @property
    def seconds(self) -> float:
        """Training time since the run began, without interruptions."""
        return self._seconds_before + time.perf_counter() - self._started

    def stage(self, step: int) -> tuple[int, int, int]:
        """The stage of a step, the step within that stage, and the stage's number of steps."""
        if not self.planned:  # the single stage of a budget goes on beyond the steps that the recipe gives it
            return 0, step, self.totals[0]
        for index, total in enumerate(self.totals):
            if step < total:
                return index, step, total
            step -= total
        return len(self.totals) - 1, step, self.totals[-1]

    def rate(self) -> float:
        """Learning rate of the next step."""
        stage_number, stage_step, total = self.stage(self.step)
        return self.stages[stage_number].rate_at(stage_step, total if self.planned else LARGEST_STEPS)

    def record(self, loss: float, samples: int, tokens: int) -> None:
        """Record a finished step: the weighted sum of its losses, and its numbers of samples and tokens."""
        # Losses of two stages are not comparable.
        total, weight = self._recent if self.stage(self.step)[1] else (0.0, 0.0)
        self._recent = (LOSS_DECAY * total + (1 - LOSS_DECAY) * loss, LOSS_DECAY * weight + (1 - LOSS_DECAY))
        self.samples += samples
        self.tokens = None if self.tokens is None else self.tokens + tokens
        self.step += 1

    def skip(self) -> None:
        """Pass over a step that changed nothing."""
        self.step += 1
        self.skipped += 1

    def planned_by(self) -> float:
        """The time by which the steps must be planned: three quarters into the wall-clock budget."""
        assert self.minutes is not None
        return self._started - self._seconds_before + LATEST_PLAN * 60 * self.minutes

    def steps_in_budget(self, seconds_per_step: float, now: float, *pauses: tuple[float, float]) -> int:
        """Total number of steps of the run at this pace.

        Args:
            seconds_per_step: as measured.
            now: the current time.
            pauses: of previews and of checkpoints, seconds from the end of one to the next, 0 if there are none, and seconds
                that one takes.
        """
        assert self.minutes is not None
        remaining = self.minutes * 60 - (now - self._started) - self._seconds_before
        # The interval to the next one begins when one is finished. In a second of steps there are 1 / every of them.
        paused = sum(seconds / every for every, seconds in pauses if every)
        return self.step + max(1, int(remaining / (1 + paused) / seconds_per_step))

    def plan(self, total: int) -> None:
        """Fix the total number of steps."""
        self.totals, self.planned = [total], True

    def state_dict(self) -> dict[str, Any]:
        """The position as JSON types; ``stage`` and ``loss`` are informative and not read back."""
        total, weight = self._recent
        return {
            "step": self.step,
            "stage": self.stage(max(0, self.step - 1))[0],
            "samples": self.samples,
            "skipped": self.skipped,
            "tokens": self.tokens,
            "totals": self.totals,
            "planned": self.planned,
            "minutes": self.minutes,
            "seconds": self.seconds,
            "recent": self._recent,
            "loss": total / weight if weight else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`; unknown keys are ignored.

        Raises:
            XFusionError: its steps are fixed, and this call gives another budget.
        """
        if state["planned"] and self.minutes not in (None, state["minutes"]):
            budget = "" if state["minutes"] is None else f" by a budget of {state['minutes']:g} minutes"
            raise XFusionError(
                f"the run has {sum(state['totals'])} steps, fixed{budget}: resume it without --minutes, which says"
                f" {self.minutes:g}; to train longer, start another run from its pack (--from)"
            )
        self.step, self.samples, self.totals = state["step"], state["samples"], state["totals"]
        self.tokens, self.skipped = state.get("tokens"), state.get("skipped", 0)
        self.planned, self._seconds_before = state["planned"], state["seconds"]
        self.minutes = state["minutes"] if self.minutes is None else self.minutes
        self._recent = tuple(state.get("recent", self._recent))


def all_examples(source: Source) -> list[Any]:
    """The number of examples, a hash of their ids (the order of a run depends on all of them), and a hash of their content."""
    id_hash = hashlib.sha256()
    for number, example in enumerate(source.examples):
        id_hash.update(("\n" * bool(number) + example.id).encode(errors="surrogatepass"))
    return [len(source.examples), id_hash.hexdigest(), content_fingerprint(source)]
