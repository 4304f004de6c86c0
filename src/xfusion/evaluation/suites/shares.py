"""Contribution of each tower if the fusion mixes them by position: mean learned share by layer and kind of position.

It works on any model whose fusion learns a share per position (`xfusion.fusion.dual_tower.Mix`, ``fuse_by="token"``). The
share is the weight of the other tower's output, in [-1, 1]; 0 is the plain dual tower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xfusion.data.mixture import Mixture, MixtureConfig
from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Source, content_fingerprint, open_source
from xfusion.evaluation.metrics.shares import shares


def run(
    model: Any,
    *,
    progress: Callable[[str, int, int], None],
    source: Source | str = "emoji",
    size: int | None = None,
    num_samples: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean shares over drawing samples, at the noise levels of training, and over captioning samples.

    Args:
        model: a model whose fusion learns a share per position.
        progress: see `evaluate`.
        source: pictures with captions: a `Source`, or a spec such as "emoji:128".
        size: side in pixels; None uses the first that the model was trained at.
        num_samples: number of drawing samples, and of captioning samples.
        seed: seed of the choice of samples and of their noise.

    Returns:
        ``share_layerL_KIND``, such as ``share_layer5_word``: the layer, counted from 0, and the kind of position.

    Raises:
        XFusionError: the model learns no shares.
    """
    pictures = open_source(source) if isinstance(source, str) else source
    backbone, side = model.backbone, model.image.sizes[0] if size is None else size
    config = MixtureConfig(draw=num_samples, caption=num_samples, pack=1)
    batches = Mixture(
        pictures, model.image, (side,), backbone.encode, backbone.begin_ids, backbone.end_id, config, seed
    ).batches(0)
    generator, sums = torch.Generator().manual_seed(seed), dict[str, list[float]]()
    for index, batch in enumerate(batches):
        progress("shares", index, len(batches))
        batch = batch.to(backbone.device)
        for objective in model.objectives:
            batch = objective.corrupt(batch, generator)
        for layer, kinds in shares(model, batch).items():
            for kind, value in kinds.items():
                sums.setdefault(f"share_layer{layer}_{kind.replace(' ', '_')}", []).append(value)
    progress("shares", len(batches), len(batches))
    if not sums:
        raise XFusionError(
            f"the suite 'shares' needs a tower that learns a share per position; this model's fusion is"
            f" {type(model.fusion).__name__} without one: train the recipe xfusion_dynamic"
        )
    metrics = {name: sum(values) / len(values) for name, values in sums.items()}
    settings = {
        "source": pictures.spec,
        "source_fingerprint": content_fingerprint(pictures),
        "size": side,
        "num_samples": num_samples,
        "seed": seed,
    }
    return {**metrics, "settings": settings}
