"""How training computes on a device: in which precision, and by which attention."""

from __future__ import annotations

import time
from functools import cache

import torch

from xfusion.data.sequence import XFusionError

ATTENTIONS = ("grouped", "eager", "sdpa", "flex_attention")
"""What layers can attend by: products of grouped queries, for long rows the fused kernel (`xfusion.layers.grouped_attention`);
the family's own plain products; torch's fused kernel; FlexAttention over block masks."""


def choose_compute_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The training precision of a device, with the reason.

    A processor with tiles (AMX) takes bfloat16. One with AVX-512's bfloat16 alone is asked once: some multiply it at twice
    the rate of float32, some, whose tiles a virtual machine hides, at half of it.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "bfloat16: the GPU multiplies it natively"
        return torch.float32, "float32: the GPU has no bfloat16"
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        from torch import cpu

        if cpu._is_amx_tile_supported():
            return torch.bfloat16, "bfloat16: the processor multiplies it natively"
        if cpu._is_avx512_bf16_supported():
            half, single = product_rates()
            chosen = torch.bfloat16 if half > single else torch.float32
            name = str(chosen).removeprefix("torch.")
            return chosen, f"{name}: products ran at {half:.0f} GFLOP/s in bfloat16 and {single:.0f} in float32"
    return torch.float32, f"float32: no native bfloat16 on this {device.type}"


@cache
def product_rates(size: int = 1024, turns: int = 4) -> tuple[float, float]:
    """GFLOP/s of square products of `size` on the CPU in bfloat16 and in float32: the best of `turns` each, in turns, some
    tens of milliseconds in all; measured once a process.
    """
    operands = [torch.ones(size, size, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    best = [float("inf")] * len(operands)
    for _ in range(turns):
        for place, operand in enumerate(operands):
            begun = time.perf_counter()
            torch.mm(operand, operand)
            best[place] = min(best[place], time.perf_counter() - begun)
    half, single = (2 * size**3 / seconds / 1e9 for seconds in best)
    return half, single


def choose_attention(device: torch.device, asked: str | None = None) -> str:
    """What layers attend by in training: on a CPU grouped queries, for the fused kernel's backward is slow on short sequences.

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
