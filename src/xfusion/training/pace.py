"""How fast a run is, as soon as that can be known, what a wall-clock budget plans its steps by; and what compiles later."""

from __future__ import annotations

from xfusion.model import compiled_graphs

WARM_STEPS = 10
"""Steps that a wall-clock budget does not measure: compiling and first encodings happen there."""
MEASURED_STEPS = 20
"""Steps from which a wall-clock budget derives the number of steps."""
STEADY = 0.9
"""A stretch that takes less than this share of the one before is not the last that gets faster."""


class Pace:
    """When the speed of a run is known: not while first steps compile, and not while each stretch is faster than the last.

    A recipe may look things up that its first steps compute: states of words, features of pictures.
    """

    def __init__(self, step: int):
        self.next, self.since = step + WARM_STEPS, 0.0
        self.before: float | None = None
        self.first: tuple[int, float] | None = None

    def seconds_per_step(self, step: int, now: float, until: float) -> float | None:
        """Seconds per step of the last stretch of `MEASURED_STEPS`; None while that says nothing yet.

        Steps so slow that no stretch ends in time are measured from the first one on, which is left out: it compiles.

        Args:
            step: steps done.
            now: when.
            until: what is known has to do where one more stretch like the last would end later.
        """
        if self.first is None:
            self.first = (step, now)
        if step < self.next:
            begun, since = self.first
            return (now - since) / (step - begun) if now > until and step > begun else None
        self.next, since, self.since = step + MEASURED_STEPS, self.since, now
        if not since:
            return None
        found, before = (now - since) / MEASURED_STEPS, self.before
        self.before = found
        steady = before is not None and found > STEADY * before
        return found if steady or now + MEASURED_STEPS * found > until else None


class Graphs:
    """Graphs that a run compiles, and which of them came late, behind the warm-up: each holds up the step that asks for it.

    A step that is wider than nine tenths of those that were looked at (`xfusion.data.mixture.Mixture.widths`) may make some.

    Args:
        step: at which the run begins, or goes on: a process that goes on compiles anew.
    """

    def __init__(self, step: int):
        self.begun, self.first = step, compiled_graphs()
        self.before, self.late = self.first, 0

    def take(self, step: int, inside: int) -> None:
        """A step is done.

        Args:
            step: which.
            inside: its number within its stage, which warms up for itself.
        """
        found = compiled_graphs()
        if min(step - self.begun, inside) >= WARM_STEPS:
            self.late += found - self.before
        self.before = found

    def facts(self) -> dict[str, int]:
        """Graphs in all and behind the warm-up, for the log."""
        return {"graphs": self.before - self.first, "graphs_behind_warm_up": self.late}
