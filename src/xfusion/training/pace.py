"""The pace of a run, by which a wall-clock budget plans its steps, and the graphs that were compiled after the warm-up."""

from __future__ import annotations

from xfusion.model import compiled_graphs

WARM_STEPS = 10
"""Steps that a wall-clock budget does not measure: they compile, and encode texts and pictures for the first time."""
MEASURED_STEPS = 20
"""Steps per measurement of the pace."""
STEADY = 0.9
"""The pace counts as steady once a measurement takes at least this share of the one before."""


class Pace:
    """Measures the pace of a run, once it is steady.

    The first steps compile, and later ones get faster as texts and pictures come back whose states or features are cached.
    """

    def __init__(self, step: int):
        self.next, self.since = step + WARM_STEPS, 0.0
        self.before: float | None = None
        self.first: tuple[int, float] | None = None

    def seconds_per_step(self, step: int, now: float, until: float) -> float | None:
        """Seconds per step over the last `MEASURED_STEPS`; None while the pace is not steady.

        If steps are so slow that no measurement would end in time, all steps but the first, which compiles, are measured.

        Args:
            step: number of finished steps.
            now: the current time.
            until: the pace known so far is returned if another measurement like the last would end after this time.
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
    """Counts the graphs that a run compiles, and those compiled after the warm-up, each of which delays a step.

    A batch wider than 90 % of those that were sampled (`xfusion.data.mixture.Mixture.widths`) may compile new ones.

    Args:
        step: where the run starts or resumes; a resumed process compiles again.
    """

    def __init__(self, step: int):
        self.begun, self.first = step, compiled_graphs()
        self.before, self.late = self.first, 0

    def take(self, step: int, inside: int) -> None:
        """Record a finished step.

        Args:
            step: its number.
            inside: its number within its stage; each stage has its own warm-up.
        """
        found = compiled_graphs()
        if min(step - self.begun, inside) >= WARM_STEPS:
            self.late += found - self.before
        self.before = found

    def facts(self) -> dict[str, int]:
        """Number of graphs in total and after the warm-up, for the log."""
        return {"graphs": self.before - self.first, "graphs_behind_warm_up": self.late}
