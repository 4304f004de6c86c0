"""How far a run is, and how far it goes: what its states say of it, and what a resumed run takes up."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

from xfusion.data.sources import Source
from xfusion.training.stages import Stage

LATEST_PLAN = 0.75
"""Share of a wall-clock budget behind which no further stretch is waited for."""
LARGEST_STEPS = 10_000_000
"""Steps of a stage whose length is not planned yet: its rate is warming up."""
REMEMBERED = 0.98
"""Share of the mean loss that stays at each step: it looks back over some fifty. Its lowest value is the best state's."""


class Progress:
    """Steps, samples, seconds and the mean loss of a run, from its start on.

    Args:
        stages: of the recipe.
        minutes: wall-clock budget, which fixes the number of steps later (`plan`); None takes that of the stages.
    """

    def __init__(self, stages: Sequence[Stage], minutes: float | None):
        self.stages, self.minutes = stages, minutes
        self.totals = [stage.steps for stage in stages]
        self.planned = minutes is None
        self.step = 0
        self.samples = 0
        self._started = time.perf_counter()
        self._seconds_before = 0.0
        self._recent = (0.0, 0.0)
        """Sum and weight of the mean loss; `REMEMBERED`."""

    @property
    def total(self) -> int:
        """Steps of all stages, as far as they are known."""
        return sum(self.totals)

    @property
    def over(self) -> bool:
        """Whether the last step is done."""
        return self.planned and self.step >= self.total

    @property
    def seconds(self) -> float:
        """Since the run began, without the breaks."""
        return self._seconds_before + time.perf_counter() - self._started

    def stage(self, step: int) -> tuple[int, int, int]:
        """Stage of a step, the step within it, and the stage's steps."""
        for number, total in enumerate(self.totals):
            if step < total:
                return number, step, total
            step -= total
        return len(self.totals) - 1, step, self.totals[-1]

    def rate(self) -> float:
        """Learning rate of the next step."""
        number, inside, total = self.stage(self.step)
        return self.stages[number].rate_at(inside, total if self.planned else LARGEST_STEPS)

    def take(self, loss: float, samples: int) -> None:
        """A step is done: the weighted sum of its losses, and how many samples it read."""
        total, weight = self._recent if self.stage(self.step)[1] else (0.0, 0.0)  # another stage is another loss
        self._recent = (REMEMBERED * total + (1 - REMEMBERED) * loss, REMEMBERED * weight + (1 - REMEMBERED))
        self.samples += samples
        self.step += 1

    def planned_by(self) -> float:
        """When a plan has to be there: three quarters into the wall-clock budget."""
        assert self.minutes is not None
        return self._started - self._seconds_before + LATEST_PLAN * 60 * self.minutes

    def steps_in_budget(self, seconds_per_step: float, now: float, preview_every: float, preview_seconds: float) -> int:
        """Steps that the run has in all, if the rest goes on at this pace.

        Args:
            seconds_per_step: as measured, at the moment ``now``.
            now: when.
            preview_every: seconds from one preview to the next; 0 makes none.
            preview_seconds: what one takes.
        """
        assert self.minutes is not None
        left = self.minutes * 60 - (now - self._started) - self._seconds_before
        previews = left / preview_every * preview_seconds if preview_every else 0.0
        return self.step + max(1, int((left - previews) / seconds_per_step))

    def plan(self, total: int) -> None:
        """Everything from here on is by step."""
        self.totals, self.planned = [total], True

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, in JSON's types; ``stage`` and ``loss`` are not read back."""
        total, weight = self._recent
        return {
            "step": self.step,
            "stage": self.stage(max(0, self.step - 1))[0],
            "samples": self.samples,
            "totals": self.totals,
            "planned": self.planned,
            "minutes": self.minutes,
            "seconds": self.seconds,
            "recent": self._recent,
            "loss": total / weight if weight else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand where `state_dict` said; other keys are passed over."""
        self.step, self.samples, self.totals = state["step"], state["samples"], state["totals"]
        self.planned, self._seconds_before = state["planned"], state["seconds"]
        self.minutes = state["minutes"] if self.minutes is None else self.minutes
        self._recent = tuple(state.get("recent", self._recent))


def all_examples(source: Source) -> list[Any]:
    """How many examples there are, a hash over which, for the order of a run goes over all of them, and one over what they
    hold.
    """
    which, held = hashlib.sha256(), hashlib.sha256()
    for number, e in enumerate(source.examples):
        which.update(("\n" * bool(number) + e.id).encode(errors="surrogatepass"))
        held.update(json.dumps([e.id, e.group, e.captions, e.question, e.content]).encode())
    return [len(source.examples), which.hexdigest(), held.hexdigest()]
