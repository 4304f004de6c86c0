"""The blind base rate: what a score is worth when the model's outputs belong to other pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PERMUTATIONS = 5
"""Number of seeded permutations that the base rate averages over."""


def blind(score: Callable[[Tensor], float], count: int, *, seed: int = 0) -> float:
    """Mean of `score(order)` over five seeded permutations ``order`` (int64 [count]) of the pictures among the items.

    A permutation may leave some pictures in place, as chance does.
    """
    generator = torch.Generator().manual_seed(seed)
    return sum(score(torch.randperm(count, generator=generator)) for _ in range(PERMUTATIONS)) / PERMUTATIONS
