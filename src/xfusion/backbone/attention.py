"""What a base's layers can attend by, and which of it a device takes."""

from __future__ import annotations

import torch

from xfusion.data.sequence import XFusionError

ATTENTIONS = ("grouped", "eager", "sdpa", "flex_attention")
"""What layers can attend by: products of grouped queries, for long rows the fused kernel (`xfusion.layers.grouped_attention`);
the family's own plain products; torch's fused kernel; FlexAttention over block masks."""


def choose_attention(device: torch.device, asked: str | None = None) -> str:
    """What layers attend by in training and drawing: on a CPU grouped queries, the faster on short sequences (docs/speed.md).

    Args:
        device: where the run computes.
        asked: one of `ATTENTIONS` instead.

    Raises:
        XFusionError: it is none of them, or torch has no backward pass of it on this device.
    """
    if asked is not None and asked not in ATTENTIONS:
        raise XFusionError(f"attention {asked!r} is not one of {', '.join(ATTENTIONS)}")
    if asked == "flex_attention" and device.type != "cuda":
        raise XFusionError(
            f"attention 'flex_attention': torch {torch.__version__} has no backward pass of it on {device.type}, only on a GPU:"
            " take sdpa or eager"
        )
    if asked is not None:
        return asked
    return "grouped" if device.type == "cpu" else "sdpa"
