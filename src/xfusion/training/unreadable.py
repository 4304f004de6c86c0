"""Examples found unreadable during a run: all processes leave out the same ones as far as allowed, or the run stops."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from xfusion.data.mixture import Ahead
from xfusion.data.sequence import Unreadable, XFusionError
from xfusion.data.sources import Source, too_many
from xfusion.training.processes import Processes
from xfusion.training.track import Track

T = TypeVar("T")
logger = logging.getLogger(__name__)


class TooManyUnreadable(XFusionError):
    """More examples than allowed cannot be read, or the data fails as a whole; the same in all processes.

    Args:
        why: in one line.
        broken: numbers of the examples that are found now, and what is wrong with each.
    """

    def __init__(self, why: str, broken: dict[int, str]):
        super().__init__(why)
        self.broken = broken


class LeftOut(dict[int, str]):
    """Numbers of the examples that a run leaves out, in the order in which they were found, and what is wrong with each.

    Args:
        source: whose examples.
        allow_bad: share of bad examples, those at opening included, that may be left out.
    """

    def __init__(self, source: Source, allow_bad: float):
        super().__init__()
        self.source, self.allow_bad = source, allow_bad

    def read(self, make: Callable[[], T], step: int, ahead: Ahead[Any], processes: Processes, track: Track) -> T:
        """The result of ``make`` over readable examples; all processes leave out the same unreadable ones first.

        Args:
            make: computes the result from the examples that are not left out; called until it succeeds.
            step: current step, for messages.
            ahead: its prepared next step is dropped.
            processes: the run's processes, which all call this together.
            track: gets an event for each example that is left out.

        Raises:
            TooManyUnreadable: there are more of them than allowed, or the data fails as a whole.
        """
        while True:
            made, broken, failed = None, {}, None
            try:
                made = make()
            except Unreadable as error:
                broken, failed = error.examples, None if error.examples else str(error)
            except XFusionError as error:
                failed = str(error)
            if not processes.largest(bool(broken or failed))[0]:
                return cast("T", made)
            ahead.forget()
            found = processes.gather((broken, failed))
            new = {i: what for one, _ in found for i, what in one.items() if i not in self}
            new = dict(sorted(new.items()))
            why = next((failed for _, failed in found if failed), None)
            why = why or too_many(self.source, self | new, self.allow_bad)
            if why is not None:
                raise TooManyUnreadable(why, new)
            self.update(new)
            for index, what in new.items():
                if processes.first:
                    logger.warning("%s: left out from step %d on; another takes its place", what, step)
                track.event(event="left_out", step=step, example=self.source.examples[index].id, reason=what)

    def by_id(self, unreadable: Mapping[int, str]) -> dict[str, dict[str, str]]:
        """Group and content of each, and what is wrong with it, by its id: numbers mean nothing to another source."""
        examples = [(self.source.examples[index], what) for index, what in unreadable.items()]
        return {e.id: {"group": e.group, "content": e.content, "reason": what} for e, what in examples}

    def state_dict(self) -> dict[str, dict[str, str]]:
        """What is left out, `by_id`."""
        return self.by_id(self)

    def load_state_dict(self, by_id: Mapping[str, dict[str, str]]) -> None:
        """Leave out what `state_dict` gave, as far as the source still has it."""
        numbers = {example.id: index for index, example in enumerate(self.source.examples) if example.id in by_id}
        self.update({numbers[i]: facts["reason"] for i, facts in by_id.items() if i in numbers})
