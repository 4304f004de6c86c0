"""Share of the other tower's output in a tower that mixes by position, by layer and kind of position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xfusion.data.sequence import END_OF_MEDIA, Batch
from xfusion.fusion.dual_tower import Mix

KINDS = ("word", "end of picture", "begin of picture", "clean picture", "noised picture")


@torch.no_grad()
def shares(model: Any, batch: Batch) -> dict[int, dict[str, float]]:
    """Mean share of the other tower, in -1 to 1.

    Args:
        model: any model; the result is empty if its fusion learns no share per position.
        batch: packed sequences; only positions from the first picture of a sequence on are counted.

    Returns:
        Layer -> kind of position (some of `KINDS`) -> mean share; kinds without a position are left out.
    """
    gates: dict[str, Tensor] = {}
    fusion_mixes: dict[str, Any] = dict(getattr(model.fusion, "mixes", {}))
    mixes: dict[str, Any] = {n: m for n, m in fusion_mixes.items() if isinstance(m, Mix) and m.by == "token"}
    if not mixes:
        return {}
    hooks = [
        mix.register_forward_pre_hook(lambda mix, args, name=name: gates.__setitem__(name, mix.gate(args[0])[..., 0]))
        for name, mix in mixes.items()
    ]
    try:
        model.run_pass(batch)
    finally:
        for hook in hooks:
            hook.remove()
    masks = {"text": _words(batch), "media": _pictures(batch)}
    means: dict[int, dict[str, float]] = {}
    for name, share in gates.items():
        side, _, layer = name.rpartition("_")
        for kind, mask in masks[side].items():
            if mask.any():
                means.setdefault(int(layer), {})[kind] = float(share[mask].mean())
    return dict(sorted(means.items()))


def _words(batch: Batch) -> dict[str, Tensor]:
    is_end, is_counted = batch.text_ids <= END_OF_MEDIA, batch.text.after_media & (batch.text.order >= 0)
    return {"word": is_counted & ~is_end, "end of picture": is_counted & is_end}


def _pictures(batch: Batch) -> dict[str, Tensor]:
    (media,) = batch.media.values()
    noised, is_item = media.at(media.noised), media.item >= 0
    return {
        "begin of picture": media.boundary & (media.rows.order >= 0),
        "clean picture": is_item & ~noised,
        "noised picture": is_item & noised,
    }
