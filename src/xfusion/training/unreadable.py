"""Examples that become unreadable during a run: all processes leave out the same ones, up to the allowed share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from xfusion.data.mixture import Prefetcher
from xfusion.data.sequence import Unreadable, XFusionError
from xfusion.data.sources import Source, too_many
from xfusion.training.processes import Processes
from xfusion.training.track import Track

T = TypeVar("T")
logger = logging.getLogger(__name__)


class TooManyUnreadable(XFusionError):
    """More examples are unreadable than allowed, or the whole source cannot be read. All processes raise the same error.

    Args:
        message: the reason, in one line.
        unreadable: number of each newly unreadable example -> what is wrong with it.
    """

    def __init__(self, message: str, unreadable: dict[int, str]):
        super().__init__(message)
        self.unreadable = unreadable


class LeftOut(dict[int, str]):
    """The examples that a run leaves out: number in the source -> what is wrong with it, in the order of discovery.

    Args:
        source: the data source.
        allow_bad: share of bad examples, from 0 to 1, that may be left out, including those found when the source was opened.
    """

    def __init__(self, source: Source, allow_bad: float):
        super().__init__()
        self.source, self.allow_bad = source, allow_bad

    def read(
        self, compute: Callable[[], T], step: int, prefetcher: Prefetcher[Any], processes: Processes, track: Track
    ) -> T:
        """Compute a result from readable examples. If some are unreadable, all processes leave out the same ones and retry.

        Args:
            compute: computes the result from the examples that are not left out; called again until it succeeds.
            step: the current step, for messages and events.
            prefetcher: its prepared batches are dropped when examples are left out.
            processes: the run's processes, which all call this together.
            track: receives an event for each example that is left out.

        Raises:
            TooManyUnreadable: more examples are unreadable than allowed, or the whole source cannot be read.
        """
        while True:
            result, unreadable, failure = None, {}, None
            try:
                result = compute()
            except Unreadable as error:
                unreadable, failure = error.examples, None if error.examples else str(error)
            except XFusionError as error:
                failure = str(error)
            if not processes.largest(bool(unreadable or failure))[0]:
                return cast("T", result)
            prefetcher.forget()
            reports = processes.gather((unreadable, failure))
            new = {i: reason for rank_examples, _ in reports for i, reason in rank_examples.items() if i not in self}
            new = dict(sorted(new.items()))
            message = next((failure for _, failure in reports if failure), None)
            message = message or too_many(self.source, self | new, self.allow_bad)
            if message is not None:
                raise TooManyUnreadable(message, new)
            self.update(new)
            for index, reason in new.items():
                if processes.is_first:
                    logger.warning("%s: left out from step %d on; another takes its place", reason, step)
                track.event(event="left_out", step=step, example=self.source.examples[index].id, reason=reason)

    def by_id(self, unreadable: Mapping[int, str]) -> dict[str, dict[str, str]]:
        """Describe unreadable examples by id, which stays valid if the numbers of a source change.

        Args:
            unreadable: number of an example -> what is wrong with it.

        Returns:
            id -> its ``group``, its ``content`` hash and the ``reason``.
        """
        examples = [(self.source.examples[index], reason) for index, reason in unreadable.items()]
        return {
            example.id: {"group": example.group, "content": example.content, "reason": reason}
            for example, reason in examples
        }

    def state_dict(self) -> dict[str, dict[str, str]]:
        """All examples that are left out, in the format of `by_id`."""
        return self.by_id(self)

    def load_state_dict(self, by_id: Mapping[str, dict[str, str]]) -> None:
        """Restore a `state_dict`; ids that the source no longer has are ignored."""
        numbers = {example.id: index for index, example in enumerate(self.source.examples) if example.id in by_id}
        self.update(
            {numbers[example_id]: facts["reason"] for example_id, facts in by_id.items() if example_id in numbers}
        )
