"""Naming: the rank of a picture's true name among candidate names.

The score of a name is its mean log-likelihood per token given the picture minus the same without the picture (pointwise
mutual information per token), so that neither short nor common names have an advantage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xfusion.data.sequence import Example, XFusionError
from xfusion.evaluation.metrics import blind as permuted
from xfusion.evaluation.metrics.retrieval import hit_by_chance


def pointwise(given_picture: Tensor, alone: Tensor) -> Tensor:
    """Scores [pictures, names]: log-likelihoods per token with the picture, less those without ([1, names])."""
    return given_picture - alone.reshape(1, -1)


def hits(pictures: Sequence[Example], names: Sequence[str], among: Sequence[Example] | None = None) -> Tensor:
    """bool [pictures, names]: which candidates are names (``captions[0]``) of a member of the picture's group.

    among: where to look for members; None looks in `pictures`.
    """
    names_by_group: dict[str, set[str]] = {}
    for example in [*pictures, *(among or ())]:
        names_by_group.setdefault(example.group, set()).add(example.captions[0])
    return torch.tensor(
        [[name in names_by_group[example.group] for name in names] for example in pictures], dtype=torch.bool
    )


def ranks(scores: Tensor, hit: Tensor) -> Tensor:
    """Rank of the best true name of every picture, float64 [pictures]; 1 is first.

    scores: [pictures, names], higher is better; not a number counts as minus infinity. hit: bool of the same shape.
    Ties get the mean rank: the expected rank of the best true name if the tied names were shuffled.
    """
    if scores.shape != hit.shape or scores.ndim != 2 or not scores.numel():
        raise XFusionError(
            f"scores and hits must have one shape [pictures, names]: {list(scores.shape)}, {list(hit.shape)}"
        )
    if not bool(hit.any(dim=1).all()):
        raise XFusionError(f"picture {int((~hit.any(dim=1)).nonzero()[0])} has no true name among the candidates")
    scores = scores.double().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    best = scores.masked_fill(~hit, -math.inf).amax(dim=1, keepdim=True)
    num_above = ((scores > best) & ~hit).sum(dim=1)
    tied_false = ((scores == best) & ~hit).sum(dim=1)
    tied_true = ((scores == best) & hit).sum(dim=1)
    return num_above + (tied_false + tied_true + 1).double() / (tied_true + 1)


def naming(scores: Tensor, hit: Tensor, *, ks: Sequence[int] = (1, 10)) -> dict[str, float]:
    """{"mrr", "at_1", "at_10"}: mean of 1 / rank, and the share of pictures whose true name ranks k or better."""
    rank = ranks(scores, hit)
    return {"mrr": (1 / rank).mean().item(), **{f"at_{k}": (rank <= k).double().mean().item() for k in ks}}


def blind(scores: Tensor, hit: Tensor, *, ks: Sequence[int] = (1, 10), seed: int = 0) -> dict[str, float]:
    """`naming` with the pictures permuted among the items, mean of five: what the names alone reveal."""
    keys = naming(scores, hit, ks=ks)
    return {
        key: permuted.blind(lambda p, key=key: naming(scores[p], hit, ks=ks)[key], len(hit), seed=seed) for key in keys
    }


def chance(hit: Tensor, *, ks: Sequence[int] = (1, 10)) -> dict[str, float]:
    """What a random order of the names scores in `naming`, without ties."""
    total, counts = hit.shape[1], hit.sum(dim=1).tolist()

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    by_k = {f"at_{k}": mean([hit_by_chance(total, num_true, k) for num_true in counts]) for k in ks}
    return {"mrr": mean([_expected_reciprocal(total, num_true) for num_true in counts]), **by_k}


def with_baselines(prefix: str, scores: Tensor, hit: Tensor, *, ks: Sequence[int] = (1, 10)) -> dict[str, float]:
    """`naming` together with its blind rate and chance: ``PREFIXat_1``, ``PREFIXat_1_blind``, ``chance_PREFIXat_1``, ..."""
    measured, blind_scores, chance_scores = naming(scores, hit, ks=ks), blind(scores, hit, ks=ks), chance(hit, ks=ks)
    metrics: dict[str, float] = {}
    for key in measured:
        name = f"{prefix}{key}"
        metrics |= {name: measured[key], f"{name}_blind": blind_scores[key], f"chance_{name}": chance_scores[key]}
    return metrics


def _expected_reciprocal(total: int, num_true: int) -> float:
    """E[1 / place of the first of `num_true` things in a random order of `total`]."""
    places = range(1, total - num_true + 2)
    return sum(math.comb(total - place, num_true - 1) / place for place in places) / math.comb(total, num_true)
