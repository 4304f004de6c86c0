"""Retrieval: is a drawn picture nearest to the real picture of its prompt, among all real ones?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from xfusion.data.sequence import XFusionError

# Squared distances in float64 carry rounding of this size relative to the squared lengths; what is closer is a tie.
_TIE = 1e-12
Distance = Literal["euclidean", "cosine"]


def retrieval(
    drawn: Tensor,
    gallery: Tensor,
    target: Tensor,
    groups: Sequence[str],
    *,
    ks: Sequence[int] = (1, 10),
    distance: Distance = "euclidean",
) -> dict[str, float]:
    """Share of drawn pictures that have a member of their target's group among the k nearest real pictures.

    Args:
        drawn: [N, ...] pixels or features.
        gallery: [G, ...] the same of the real pictures.
        target: int [N], the index in the gallery of what was to be drawn.
        groups: the group of every real picture; any member of the target's group is a hit.
        ks: numbers of nearest neighbours.
        distance: "euclidean" for pixels, "cosine" for features.

    Returns:
        {"at_1": ..., "at_10": ...} for ks (1, 10). Ties count against the drawn picture.

    The ceiling is the same call with the real pictures as the model can show them at best (through codec and resizing)
    in place of `drawn`; `chance` gives the floor.
    """
    ranks = first_hit(drawn, gallery, target, groups, distance=distance)
    return {f"at_{k}": (ranks <= k).double().mean().item() for k in ks}


def first_hit(
    drawn: Tensor, gallery: Tensor, target: Tensor, groups: Sequence[str], *, distance: Distance = "euclidean"
) -> Tensor:
    """Rank (1 is nearest) of the best member of each target's group, int64 [N]; arguments as in `retrieval`.

    Ties are pessimistic: non-members as close as the best member rank before it, so a model that draws the same picture
    everywhere gains nothing. A picture that is not finite is infinitely far from everything.
    """
    drawn, gallery, target = drawn.flatten(1).cpu().double(), gallery.flatten(1).cpu().double(), target.cpu()
    _check(drawn, gallery, target, groups)
    if distance == "cosine":
        drawn, gallery = F.normalize(drawn, dim=-1), F.normalize(gallery, dim=-1)
    group_index = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    group = torch.tensor([group_index[name] for name in groups])
    same_group = group[target][:, None] == group[None, :]
    lengths = drawn.square().sum(1)[:, None] + gallery.square().sum(1)[None, :]
    # On unit vectors the squared distance is 2 - 2 cos, so one formula orders both kinds.
    squares = (lengths - 2 * drawn @ gallery.T).nan_to_num(nan=math.inf)
    best = squares.masked_fill(~same_group, math.inf).amin(dim=1, keepdim=True)
    is_near = squares <= best + _TIE * lengths.nan_to_num(nan=0.0, posinf=0.0)
    return 1 + (is_near & ~same_group).sum(dim=1)


def chance(target: Tensor, groups: Sequence[str], *, ks: Sequence[int] = (1, 10)) -> dict[str, float]:
    """What a random order of the gallery scores in `retrieval`: mean of 1 - C(G - m, k) / C(G, k), m members."""
    sizes = Counter(groups)
    group_sizes = [sizes[groups[int(index)]] for index in target]
    return {f"at_{k}": sum(hit_by_chance(len(groups), size, k) for size in group_sizes) / len(group_sizes) for k in ks}


def hit_by_chance(total: int, hits: int, k: int) -> float:
    """Probability that the first k of `total` things in random order hold one of `hits` of them."""
    k = min(k, total)
    return 1 - math.comb(total - hits, k) / math.comb(total, k)


def _check(drawn: Tensor, gallery: Tensor, target: Tensor, groups: Sequence[str]) -> None:
    if drawn.shape[1] != gallery.shape[1]:
        raise XFusionError(
            f"drawn pictures have {drawn.shape[1]} values, real ones {gallery.shape[1]}; resize one of them"
        )
    if len(groups) != len(gallery) or len(target) != len(drawn) or not len(drawn):
        raise XFusionError(
            f"retrieval needs a group per real picture and a target per drawn one: {len(gallery)} real ones with "
            f"{len(groups)} groups, {len(drawn)} drawn ones with {len(target)} targets"
        )
