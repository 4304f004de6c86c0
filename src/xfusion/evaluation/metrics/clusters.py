"""Confidence interval of a share whose questions come in clusters, such as pictures with one sentence: a cluster bootstrap."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

RESAMPLES = 2000
"""Number of bootstrap samples of the clusters, with replacement."""


def interval(values: Tensor, clusters: Sequence[Hashable], *, seed: int = 0) -> list[float] | None:
    """The 95 % interval of the mean of ``values`` (float ``[N]``): quantiles of the means over resampled clusters.

    Items of a cluster are resampled together, because their results are correlated; with one item per cluster this is the
    ordinary bootstrap. A mean of resampled clusters is the sum of their values over the number of their items.

    Returns:
        lower and upper end, or None if there are fewer than five clusters.
    """
    cluster_ids: dict[Hashable, int] = {}
    cluster_index = torch.tensor([cluster_ids.setdefault(cluster, len(cluster_ids)) for cluster in clusters])
    if len(cluster_ids) < 5:
        return None
    total = torch.zeros(len(cluster_ids), dtype=torch.float64).index_add(0, cluster_index, values.double().cpu())
    count = torch.zeros(len(cluster_ids), dtype=torch.float64).index_add(
        0, cluster_index, torch.ones_like(cluster_index).double()
    )
    resampled = torch.randint(
        len(cluster_ids), (RESAMPLES, len(cluster_ids)), generator=torch.Generator().manual_seed(seed)
    )
    means = total[resampled].sum(dim=1) / count[resampled].sum(dim=1)
    return means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
