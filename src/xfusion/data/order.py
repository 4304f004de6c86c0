"""Which example stands at a place of an endless order: a pure function of source, seed and place.

Sources differ in how their order may be shuffled. Pictures that each lie for themselves are shuffled over the whole
epoch. Where pictures come in row groups (parquet), the groups are shuffled, and then the pictures of every few groups that
follow each other: what a shuffle buffer does, without its state. Of a mixture each source gets its exact share of every
short stretch and goes through epochs of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from xfusion.data.mixed import Mixed
from xfusion.data.shards import GROUPS_TOGETHER
from xfusion.data.sources import Source

STRETCH = 64
"""A mixture's shares are exact over about so many samples, or over the sum of its weights."""


class Order:
    """The orders of a source, one for each task.

    Args:
        source: what is ordered.
        seed: of the permutations.
        name: what tells the sources of a mixture apart.
    """

    def __init__(self, source: Source, seed: int, name: str = ""):
        self.source, self.seed, self.name = source, seed, name
        self._known: dict[str, tuple[int, Tensor]] = {}
        if isinstance(source, Mixed):
            self.parts = [Order(part, seed, f"{name}part {n}/") for n, part in enumerate(source.sources)]
            total = sum(source.weights)
            times = -(-STRETCH // total)
            self.stretch = [n for n, weight in enumerate(source.weights) for _ in range(weight * times)]

    def take(self, task: str, start: int, count: int) -> Iterator[int]:
        """Examples ``start`` to ``start + count`` of a task's order."""
        for place in range(start, start + count):
            yield self._mixed(task, place) if isinstance(self.source, Mixed) else self._one(task, place)

    def _one(self, task: str, place: int) -> int:
        epoch, inside = divmod(place, len(self.source.examples))
        known = self._known.get(task)
        if known is None or known[0] != epoch:
            known = self._known[task] = (epoch, self._permutation(f"{task}/{epoch}"))
        return int(known[1][inside])

    def _mixed(self, task: str, place: int) -> int:
        assert isinstance(self.source, Mixed)
        number, inside = divmod(place, len(self.stretch))
        pattern = random.Random(f"{self.seed}/{self.name}{task}/stretch {number}").sample(
            self.stretch, len(self.stretch)
        )
        part = pattern[inside]
        before = number * self.stretch.count(part) + pattern[:inside].count(part)
        return self.source.starts[part] + next(self.parts[part].take(task, before, 1))

    def _permutation(self, name: str) -> Tensor:
        # A string seeds Python's generator the same way on every run and platform.
        seed = random.Random(f"{self.seed}/{self.name}{name}").getrandbits(62)
        generator = torch.Generator().manual_seed(seed)
        blocks = getattr(self.source, "blocks", None)
        if blocks is None:
            return torch.randperm(len(self.source.examples), generator=generator)
        shuffled = [blocks[int(i)] for i in torch.randperm(len(blocks), generator=generator)]
        out = []
        for first in range(0, len(shuffled), GROUPS_TOGETHER):
            together = torch.tensor([i for block in shuffled[first : first + GROUPS_TOGETHER] for i in block])
            out.append(together[torch.randperm(len(together), generator=generator)])
        return torch.cat(out)
