"""Intersection over union of boxes, and the best score that one constant box can get."""

from __future__ import annotations

import torch
from torch import Tensor

from xfusion.data.sequence import XFusionError

HIT = 0.5
"""Smallest overlap at which a box counts as found, as on RefCOCO."""
GRID = 20
"""Edges of the constant boxes to try are at multiples of the side divided by this."""


def overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes ``[..., 4]``, left, top, right and bottom, which broadcast: ``[...]`` from 0 to 1.

    A box without area overlaps none; this is how an answer that is not a box is scored.

    Raises:
        XFusionError: the input does not have four edges.
    """
    if boxes.shape[-1:] != (4,) or others.shape[-1:] != (4,):
        raise XFusionError(
            f"boxes have four edges [..., 4], but these are {list(boxes.shape)} and {list(others.shape)}"
        )
    boxes, others = boxes.double(), others.double()
    corners = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    shared = (corners[1] - corners[0]).clamp(min=0).prod(dim=-1)
    areas = [
        (corner_pairs[..., 2:] - corner_pairs[..., :2]).clamp(min=0).prod(dim=-1) for corner_pairs in (boxes, others)
    ]
    return torch.where(shared > 0, shared / (areas[0] + areas[1] - shared), 0.0)


def best_constant(boxes: Tensor) -> dict[str, float]:
    """``hit`` and ``mean``: the best share with an overlap of `HIT`, and the best mean overlap, of one box for all ``[N, 4]``.

    Each uses its own best box, chosen on the boxes that it is scored on: up to the steps of the grid, no answer that ignores
    the picture can do better.
    """
    edges = torch.arange(GRID + 1, dtype=torch.float64) / GRID
    low, high = torch.triu_indices(GRID + 1, GRID + 1, offset=1)
    spans = torch.stack([edges[low], edges[high]], dim=1)
    best = {"hit": 0.0, "mean": 0.0}
    candidates = spans[:, [0, 0, 1, 1]]
    for span in spans:  # one left and right edge at a time: all boxes at once are some hundred million numbers
        candidates[:, 0], candidates[:, 2] = span
        overlaps = overlap(candidates[:, None], boxes[None])
        best["hit"] = max(best["hit"], float((overlaps >= HIT).double().mean(dim=1).max()))
        best["mean"] = max(best["mean"], float(overlaps.mean(dim=1).max()))
    return best
