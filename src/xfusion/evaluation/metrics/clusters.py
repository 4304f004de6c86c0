"""Confidence intervals by resampling items, or clusters of items such as the questions about one picture: the bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

RESAMPLES = 2000
"""Number of bootstrap samples of the items or clusters, with replacement."""
FEWEST = 5
"""Fewest items or clusters for which an interval is given."""


def bootstrap(statistic: Callable[[Tensor], Tensor], count: int, *, seed: int = 0) -> list[float] | None:
    """The 95 % interval of a statistic of ``count`` items: its quantiles over resampled items.

    Args:
        statistic: numbers of items, int64 ``[R, count]`` -> the statistic of each row, ``[R]``.
        count: number of items.
        seed: seed of the resampling.

    Returns:
        lower and upper end, or None if there are fewer than five items.
    """
    if count < FEWEST:
        return None
    resampled = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    return statistic(resampled).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def interval(values: Tensor, clusters: Sequence[Hashable], *, seed: int = 0) -> list[float] | None:
    """The 95 % interval of the mean of ``values`` (float ``[N]``): quantiles of the means over resampled clusters.

    Items of a cluster are resampled together, because their results are correlated; with one item per cluster this is the
    ordinary bootstrap. A mean of resampled clusters is the sum of their values over the number of their items.

    Returns:
        lower and upper end, or None if there are fewer than five clusters.
    """
    cluster_ids: dict[Hashable, int] = {}
    cluster_index = torch.tensor([cluster_ids.setdefault(cluster, len(cluster_ids)) for cluster in clusters])
    total = torch.zeros(len(cluster_ids), dtype=torch.float64).index_add(0, cluster_index, values.cpu().double())
    count = torch.zeros(len(cluster_ids), dtype=torch.float64).index_add(
        0, cluster_index, torch.ones_like(cluster_index).double()
    )
    return bootstrap(
        lambda resampled: total[resampled].sum(dim=1) / count[resampled].sum(dim=1), len(cluster_ids), seed=seed
    )
