"""The attention implementations of a base's layers, and the choice for a device."""

from __future__ import annotations

import torch

from xfusion.data.sequence import XFusionError

ATTENTIONS = ("grouped", "eager", "sdpa", "flex_attention")
"""Attention implementations: grouped-query matrix products, with the fused kernel for long sequences
(`xfusion.layers.grouped_attention`); the family's own plain products; torch's fused kernel; FlexAttention over block masks."""


def choose_attention(device: torch.device, implementation: str | None = None) -> tuple[str, str]:
    """The attention for training and drawing, with the reason: on a CPU ``grouped``, which is faster on short sequences
    (docs/speed.md).

    Args:
        device: the device of the run.
        implementation: one of `ATTENTIONS`, to override the default.

    Raises:
        XFusionError: ``implementation`` is not one of them, or torch has no backward pass for it on this device.
    """
    if implementation is not None and implementation not in ATTENTIONS:
        raise XFusionError(f"attention {implementation!r} is not one of {', '.join(ATTENTIONS)}")
    if implementation == "flex_attention" and device.type != "cuda":
        raise XFusionError(
            f"attention 'flex_attention': torch {torch.__version__} has no backward pass of it on {device.type}, only on a GPU:"
            " take sdpa or eager"
        )
    if implementation is not None:
        return implementation, "as asked"
    if device.type == "cpu":
        return "grouped", "plain products are faster than the fused kernel on a CPU's short sequences"
    return "sdpa", "torch's fused kernel"
