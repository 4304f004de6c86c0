"""How fast a run is, as soon as that can be known: what a wall-clock budget plans its steps by."""

from __future__ import annotations

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
