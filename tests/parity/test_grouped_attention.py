"""Attention by grouped products against transformers' own plain attention: states, weights and all gradients."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import eager_attention_forward

from xfusion import layers
from xfusion.data.sequence import XFusionError
from xfusion.layers import _Scores, attention_mask, grouped_attention


@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (4, 1), (1, 4)])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("long", [False, True])
def test_grouped_products_are_the_familys_own(heads, groups, masked, long, monkeypatch):
    if long:
        monkeypatch.setattr(layers, "LONG", 5)
    made = torch.Generator().manual_seed(0)
    shapes = [(2, heads * groups, 5, 8), (2, heads, 7, 8), (2, heads, 7, 6)]
    seen = torch.rand(2, 5, 7, generator=made) < 0.6
    seen[..., 0] = True
    mask = attention_mask(seen, "grouped", torch.float64) if masked else None
    module = SimpleNamespace(num_key_value_groups=groups, training=True)
    answers = []
    for attend in (grouped_attention, eager_attention_forward):
        made.manual_seed(1)
        given = [torch.randn(shape, generator=made, dtype=torch.float64, requires_grad=True) for shape in shapes]
        out, weights = attend(module, *given, mask, scaling=0.3)
        out.square().sum().backward()
        assert (weights is None) == (long and attend is grouped_attention)
        answers.append([out, *([] if long else [weights]), *(x.grad for x in given)])
    for ours, theirs in zip(*answers, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).detach().abs().max()) < 1e-6  # both take the softmax in float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_without_gradients_the_same_is_computed_in_fewer_passes(masked, dtype):
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=made).to(dtype) for heads in (6, 2, 2))
    seen = torch.rand(2, 5, 5, generator=made) < 0.6
    seen[..., 0] = True
    mask = attention_mask(seen, "grouped", dtype) if masked else None
    expected = grouped_attention(torch.nn.Identity(), q, k, v, mask)
    kept = None if mask is None else mask.clone()
    with torch.no_grad():
        found = grouped_attention(torch.nn.Identity(), q, k, v, mask)
    assert mask is None or torch.equal(mask, kept)
    tolerance = 1e-6 if dtype == torch.float64 else 2e-2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("unknown", ["softcap", "s_aux", "position_bias"])
def test_what_it_does_not_know_is_refused(unknown):
    q, k, v = (torch.randn(1, 2, 4, 16) for _ in range(3))
    with pytest.raises(XFusionError, match=f"'grouped' knows no {unknown}, which Identity has: take eager"):
        grouped_attention(torch.nn.Identity(), q, k, v, None, **{unknown: torch.ones(2)})


def test_without_a_scale_it_is_one_over_the_root_of_the_width():
    q, k, v = (torch.randn(1, 2, 4, 16) for _ in range(3))
    found, _ = grouped_attention(torch.nn.Identity(), q, k, v, None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert float((found - expected).abs().max()) < 1e-6


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key_dtype", [torch.float32, torch.bfloat16])
def test_gradients_under_autocast_are_autograds(query_dtype, key_dtype):
    """A family that norms its queries and keys, such as Qwen3, has them in float32 beside bfloat16 values."""
    torch.manual_seed(0)
    gradients = []
    for product in (_Scores.apply, lambda q, k: q @ k.mT):
        generator = torch.Generator().manual_seed(1)
        q = torch.randn(2, 3, 5, 8, generator=generator).to(query_dtype).requires_grad_()
        k = torch.randn(2, 3, 7, 8, generator=generator).to(key_dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            scores = product(q, k)
        scores.float().square().sum().backward()
        assert scores.dtype == torch.bfloat16
        gradients.append((q.grad, k.grad))
    for own, expected in zip(*gradients, strict=True):
        assert own.dtype == expected.dtype
        torch.testing.assert_close(own, expected, rtol=1e-2, atol=1e-2)
