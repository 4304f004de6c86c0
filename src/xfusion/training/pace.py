"""The pace of a run, by which a wall-clock budget plans its steps, and the graphs that were compiled after the warm-up."""

from __future__ import annotations

from xfusion.model import compiled_graphs

WARM_STEPS = 10
"""Steps that a wall-clock budget does not measure: they compile, and encode texts and pictures for the first time."""
MEASURED_STEPS = 20
"""Steps per measurement of the pace."""
FEW_STEPS, SMALL_STEP = 200, 32
"""Below so many steps, of more samples than these, a tower often learns nothing, and more steps of fewer samples may teach it."""
LARGE_PREVIEWS = 0.25
"""From this share of the run on it is said how long previews take."""
STEADY = 0.9
"""The pace counts as steady once a measurement takes at least this share of the one before."""


class Pace:
    """Measures the pace of a run, once it is steady.

    The first steps compile, and later ones get faster as texts and pictures come back whose states or features are cached.
    """

    def __init__(self, step: int):
        self.next_step, self.started = step + WARM_STEPS, 0.0
        self.previous: float | None = None
        self.first_call: tuple[int, float] | None = None

    def pause(self, seconds: float) -> None:
        """Leave out the time of a preview or a checkpoint that was made between two steps."""
        self.started += seconds if self.started else 0.0
        if self.first_call is not None:
            step, start = self.first_call
            self.first_call = step, start + seconds

    def seconds_per_step(self, step: int, now: float, deadline: float) -> float | None:
        """Seconds per step over the last `MEASURED_STEPS`, pauses aside; None while the pace is not steady.

        If steps are so slow that no measurement would end in time, all steps but the first, which compiles, are measured.

        Args:
            step: number of finished steps.
            now: the current time.
            deadline: the pace known so far is returned if another measurement like the last would end after this time.
        """
        if self.first_call is None:
            self.first_call = (step, now)
        if step < self.next_step:
            first_step, start = self.first_call
            return (now - start) / (step - first_step) if now > deadline and step > first_step else None
        self.next_step, start, self.started = step + MEASURED_STEPS, self.started, now
        if not start:
            return None
        seconds, previous = (now - start) / MEASURED_STEPS, self.previous
        self.previous = seconds
        is_steady = previous is not None and seconds > STEADY * previous
        return seconds if is_steady or now + MEASURED_STEPS * seconds > deadline else None


class Graphs:
    """Counts the graphs that a run compiles, and those compiled after the warm-up, each of which delays a step.

    The text widths that rare longer batches need (`xfusion.data.mixture.Mixture.further_widths`) are compiled ahead.

    Args:
        step: where the run starts or resumes; a resumed process compiles again.
    """

    def __init__(self, step: int):
        self.start_step, self.initial_count = step, compiled_graphs()
        self.count, self.late_count = self.initial_count, 0

    def record(self, step: int, stage_step: int) -> None:
        """Record a finished step.

        Args:
            step: its number.
            stage_step: its number within its stage; each stage has its own warm-up.
        """
        count = compiled_graphs()
        if min(step - self.start_step, stage_step) >= WARM_STEPS:
            self.late_count += count - self.count
        self.count = count

    def facts(self) -> dict[str, int]:
        """Number of graphs in total and after the warm-up, for the log."""
        return {"graphs": self.count - self.initial_count, "graphs_behind_warm_up": self.late_count}
