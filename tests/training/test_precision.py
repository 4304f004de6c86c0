"""The precision that training takes of a device."""

import pytest
import torch

from xfusion.data.sequence import XFusionError
from xfusion.training.precision import check_compute_dtype, choose_compute_dtype


@pytest.mark.parametrize(("half", "single", "chosen"), [(900.0, 300.0, "bfloat16"), (150.0, 250.0, "float32")])
def test_a_processor_with_bfloat16_and_no_tiles_is_asked_which_is_faster(monkeypatch, half, single, chosen):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr("xfusion.training.precision.product_rates", lambda: (half, single))
    dtype, reason = choose_compute_dtype(torch.device("cpu"))
    assert dtype == getattr(torch, chosen)
    assert reason == f"{chosen}: products ran at {half:.0f} GFLOP/s in bfloat16 and {single:.0f} in float32"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert choose_compute_dtype(torch.device("cpu"))[0] == torch.bfloat16


@pytest.mark.parametrize(
    ("native", "dtype", "reason"),
    [
        (True, torch.bfloat16, "bfloat16: the GPU multiplies it natively"),
        (False, torch.float32, "float32: the GPU has no native bfloat16"),
    ],
)
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch, native, dtype, reason):
    """Turing's do, several times slower than in float32, and torch says that they support it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert choose_compute_dtype(torch.device("cuda")) == (dtype, reason)


def test_float16_is_refused_in_one_line():
    assert check_compute_dtype(torch.float32) == torch.float32 and check_compute_dtype(torch.bfloat16) == torch.bfloat16
    with pytest.raises(
        XFusionError, match=r"cannot compute in torch.float16: .*; take torch.bfloat16 or torch.float32"
    ) as error:
        check_compute_dtype(torch.float16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_a_type_that_no_pass_computes_in_is_refused_in_one_line(dtype):
    with pytest.raises(XFusionError, match=rf"cannot compute in {dtype}: take torch.bfloat16 or torch.float32$"):
        check_compute_dtype(dtype)
