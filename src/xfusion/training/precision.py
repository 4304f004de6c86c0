"""The precision of training on a device."""

from __future__ import annotations

import time
from functools import cache

import torch

from xfusion.data.sequence import XFusionError


def check_compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Check a requested precision.

    Raises:
        XFusionError: gradients would underflow in it, or new weights, which are float32, cannot be cast to it.
    """
    if dtype == torch.float16:
        raise XFusionError(
            f"training cannot compute in {dtype}: gradients in float16 vanish without a scaled loss, which there is none of; take"
            " torch.bfloat16 or torch.float32"
        )
    if dtype not in (torch.bfloat16, torch.float32):
        raise XFusionError(f"training cannot compute in {dtype}: take torch.bfloat16 or torch.float32")
    return dtype


def choose_compute_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The training precision of a device, with the reason.

    A CPU with AMX tiles uses bfloat16. One with only AVX-512's bfloat16 is measured once: some multiply it at twice the rate
    of float32; others, whose tiles a virtual machine hides, at half of it.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bfloat16: the GPU multiplies it natively"
        return torch.float32, "float32: the GPU has no native bfloat16"
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        from torch import cpu

        if cpu._is_amx_tile_supported():
            return torch.bfloat16, "bfloat16: the processor multiplies it natively"
        if cpu._is_avx512_bf16_supported():
            bfloat16_rate, float32_rate = product_rates()
            dtype = torch.bfloat16 if bfloat16_rate > float32_rate else torch.float32
            name = str(dtype).removeprefix("torch.")
            return (
                dtype,
                f"{name}: products ran at {bfloat16_rate:.0f} GFLOP/s in bfloat16 and {float32_rate:.0f} in float32",
            )
    return torch.float32, f"float32: no native bfloat16 on this {device.type}"


@cache
def product_rates(size: int = 1024, repeats: int = 4) -> tuple[float, float]:
    """GFLOP/s of square matrix products of `size` on the CPU in bfloat16 and in float32: the best of `repeats` each,
    alternating, some tens of milliseconds in total; measured once per process.
    """
    operands = [torch.ones(size, size, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    best = [float("inf")] * len(operands)
    for _ in range(repeats):
        for index, operand in enumerate(operands):
            started = time.perf_counter()
            torch.mm(operand, operand)
            best[index] = min(best[index], time.perf_counter() - started)
    bfloat16_rate, float32_rate = (2 * size**3 / seconds / 1e9 for seconds in best)
    return bfloat16_rate, float32_rate
