"""The example at a place of an endless order: a pure function of source, seed and place.

Sources differ in how they can be shuffled. Pictures that are stored individually are shuffled over the whole epoch. If
pictures come in row groups (parquet), the places of a step belong to *lanes*: the row groups of an epoch are shuffled and
dealt to the lanes. Each lane goes through its own groups one after another, with the pictures of each group shuffled. So a
step's pictures come from as many groups as there are lanes, like with a shuffle buffer, but without its state. A process that
owns the rows of some lanes reads only the groups of these lanes, whatever the number of processes. In a mixture, each source
gets its exact share of every short stretch and has its own epochs.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor

from xfusion.data.mixed import Mixed
from xfusion.data.shards import GROUPS_TOGETHER
from xfusion.data.sources import Source

T = TypeVar("T")
STRETCH = 64
"""A mixture's shares are exact over about this many samples, or over the sum of its weights, in each lane separately."""
CountsBefore = Callable[[int], list[int]]
"""Returns how many examples of a source each lane has used before a place."""


def num_grouped(source: Source) -> int:
    """Number of sources of a mixture whose pictures come in row groups."""
    if isinstance(source, Mixed):
        return sum(map(num_grouped, source.sources))
    return int(getattr(source, "blocks", None) is not None)


class Lanes:
    """The lanes of a task.

    Args:
        of_place: the lane of each place of a step.
    """

    def __init__(self, of_place: Sequence[int]):
        self.of_place = tuple(of_place)
        self._counts = [[0] * (1 + max(self.of_place))]
        for lane in self.of_place:
            self._counts.append([count + (lane == number) for number, count in enumerate(self._counts[-1])])

    @classmethod
    def of_rows(cls, rows: int, per_row: int) -> Lanes | None:
        """Lanes of a step of ``rows`` rows with ``per_row`` places per row: lanes take consecutive rows, like the shares of
        processes; None if there are no places.
        """
        bounds = [rows * lane // GROUPS_TOGETHER for lane in range(GROUPS_TOGETHER + 1)]
        places = [lane for lane, (start, end) in enumerate(pairwise(bounds)) for _ in range((end - start) * per_row)]
        return cls(places) if places else None

    def find(self, place: int) -> int:
        """The lane of a place of the endless order."""
        return self.of_place[place % len(self.of_place)]

    def counts_before(self, place: int) -> list[int]:
        """Number of places of each lane before this one."""
        steps, position = divmod(place, len(self.of_place))
        return [
            steps * per_step + partial
            for per_step, partial in zip(self._counts[-1], self._counts[position], strict=True)
        ]


class Order:
    """The orders of a source, one for each task.

    Args:
        source: the source to order.
        seed: seed of the permutations.
        lanes: lanes of the tasks, if pictures come in row groups; a task without an entry deals its places to all in turn.
        name: distinguishes the sources of a mixture.
    """

    def __init__(
        self, source: Source, seed: int, lanes: Mapping[str, Lanes | None] = MappingProxyType({}), name: str = ""
    ):
        self.source, self.seed, self.name = source, seed, name
        self.num_lanes = GROUPS_TOGETHER if num_grouped(source) else 1
        self._lanes = lanes if self.num_lanes > 1 else {}
        self._default_lanes = Lanes(range(self.num_lanes))
        self._epochs: dict[str, _Epoch] = {}
        if isinstance(source, Mixed):
            self.parts = [Order(part, seed, name=f"{name}part {number}/") for number, part in enumerate(source.sources)]
            total = sum(source.weights)
            repeats = -(-STRETCH // (total * self.num_lanes))
            self.stretch = [number for number, weight in enumerate(source.weights) for _ in range(weight * repeats)]
            self._stretch_sources = lru_cache(maxsize=4 * self.num_lanes)(self._shuffle_stretch)

    def lanes(self, task: str) -> Lanes:
        """The lanes of a task; a single one if no pictures come in row groups."""
        return self._lanes.get(task) or self._default_lanes

    def group_by_lane(self, task: str, step: Sequence[T]) -> list[list[T]]:
        """The items at the places of a step, by lane."""
        lanes = self._lanes.get(task)
        if lanes is None:
            return [list(step)]
        items: list[list[T]] = [[] for _ in range(self.num_lanes)]
        for lane, item in zip(lanes.of_place, step, strict=True):
            items[lane].append(item)
        return items

    def take(self, task: str, start: int, count: int) -> Iterator[int]:
        """Examples ``start`` to ``start + count`` of a task's order."""
        lanes = self.lanes(task)
        for place in range(start, start + count):
            yield self._example_at(task, place, lanes.find(place), lanes.counts_before)

    def _example_at(self, task: str, place: int, lane: int, counts_before: CountsBefore) -> int:
        """The example at a place, which belongs to ``lane``."""
        if isinstance(self.source, Mixed):
            number, position = divmod(counts_before(place)[lane], len(self.stretch))
            part = self._stretch_sources(task, lane, number)[position]
            return self.source.starts[part] + self.parts[part]._example_at(
                task, place, lane, self._part_counts(task, part, counts_before)
            )
        counts = counts_before(place)
        number, epoch = sum(counts) // len(self.source.examples), self._epochs.get(task)
        if epoch is None or epoch.number != number:
            epoch = self._epochs[task] = _Epoch(number, place, counts_before, self._permutation(f"{task}/{number}"))
        return epoch.at(lane, counts[lane])

    def _part_counts(self, task: str, part: int, counts_before: CountsBefore) -> CountsBefore:
        """Counts only the places of one source of a mixture."""
        per_stretch = self.stretch.count(part)

        def of_part(place: int) -> list[int]:
            counts = []
            for lane, count in enumerate(counts_before(place)):
                number, position = divmod(count, len(self.stretch))
                counts.append(
                    number * per_stretch
                    + (self._stretch_sources(task, lane, number)[:position].count(part) if position else 0)
                )
            return counts

        return of_part

    def _shuffle_stretch(self, task: str, lane: int, number: int) -> list[int]:
        """The sources at the places of a stretch of a lane."""
        name = f"{task}/stretch {number}" if self.num_lanes == 1 else f"{task}/lane {lane}/stretch {number}"
        return random.Random(f"{self.seed}/{self.name}{name}").sample(self.stretch, len(self.stretch))

    def _permutation(self, name: str) -> Tensor:
        # A string seeds Python's generator the same way on every run and platform.
        seed = random.Random(f"{self.seed}/{self.name}{name}").getrandbits(62)
        generator = torch.Generator().manual_seed(seed)
        blocks = getattr(self.source, "blocks", None)
        if blocks is None:
            return torch.randperm(len(self.source.examples), generator=generator)
        shuffled = (blocks[int(i)] for i in torch.randperm(len(blocks), generator=generator))
        return torch.cat([block.start + torch.randperm(len(block), generator=generator) for block in shuffled])


class _Epoch:
    """One pass over a source: each lane gets a stretch of the shuffled examples, as long as its number of places.

    Args:
        number: number of the epoch.
        place: a place within the epoch.
        counts_before: counts examples of the source.
        shuffled: all examples.
    """

    def __init__(self, number: int, place: int, counts_before: CountsBefore, shuffled: Tensor):
        def first_place(examples: int, bound: int) -> int:
            """The first place before which this many examples were used."""
            return bisect_left(range(bound), examples, key=lambda place: sum(counts_before(place)))

        bound, total = place + 1, len(shuffled)
        while sum(counts_before(bound)) < (number + 1) * total:
            bound *= 2
        self.number, self.shuffled = number, shuffled
        self._first_counts = counts_before(first_place(number * total, place))
        end = counts_before(first_place((number + 1) * total, bound))
        sizes = [last - start for start, last in zip(self._first_counts, end, strict=True)]
        self._starts = [0, *accumulate(sizes)]

    def at(self, lane: int, count: int) -> int:
        """The next example of a lane that has used ``count`` examples."""
        return int(self.shuffled[self._starts[lane] + count - self._first_counts[lane]])
