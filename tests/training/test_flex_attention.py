"""Block masks of FlexAttention: who sees whom as in the dense mask, block by block, and layers that say the same by them."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from contracts.table import distance, look, make_model, mixed_sequences, view
from torch._inductor.kernel.flex.flex_cpu import check_cpu_supported
from torch.nn.attention.flex_attention import flex_attention

import xfusion.fusion.base as fusion_base
from xfusion.backbone.attention import choose_attention
from xfusion.data.pack import pack
from xfusion.data.sequence import Media, Rows, Sequence, Text, XFusionError, visible
from xfusion.layers import BLOCK, block_mask
from xfusion.model import compiled_graphs

SEQUENCES = list(mixed_sequences().values())


def tables(rows):
    batch = pack(rows)
    return Rows.cat([batch.text, *(media.rows for media in batch.media.values())])


def long_rows():
    """Rows of several blocks: long texts, pictures of 144 tokens, padding, rows of one and of many sequences."""
    picture = Media(tokens=torch.zeros(144, 4), grid=(12, 12))
    one = Sequence(segments=(Text(ids=(1,) * 200), picture, Text(ids=(2,) * 60)))
    return [[one, one], [Sequence(segments=(picture,))] * 3, [one]]


@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize("rows", [[SEQUENCES[:3], SEQUENCES[3:6], SEQUENCES[6:]], long_rows()])
def test_the_mask_is_the_dense_one(rows, window):
    query = tables(rows)
    key = Rows.cat([query.columns(slice(0, 5)), query])  # as with a cache
    mask, dense = block_mask(query, key, window), visible(query, key, window)
    b, i, j = torch.meshgrid(*(torch.arange(size) for size in dense.shape), indexing="ij")
    assert torch.equal(mask.mask_mod(b, torch.zeros_like(b), i, j), dense)
    assert mask.shape == (len(rows), 1, query.count, key.count)
    for row in range(len(rows)):
        for first in range(0, query.count, BLOCK):
            some, whole = set(), set()
            for at in range(0, key.count, BLOCK):
                part = dense[row, first : first + BLOCK, at : at + BLOCK]
                if bool(part.any()):
                    (whole if part.numel() == BLOCK * BLOCK and bool(part.all()) else some).add(at // BLOCK)
            n = first // BLOCK
            for found, count, blocks in (
                (some, mask.kv_num_blocks, mask.kv_indices),
                (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
            ):
                assert set(blocks[row, 0, n, : count[row, 0, n]].tolist()) == found


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 100])
def test_attention_by_blocks_is_attention_by_the_dense_mask(window):
    table = tables(long_rows())
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(len(table.order), heads, table.count, 16, generator=made) for heads in (4, 2, 2))
    found = flex_attention(q, k, v, block_mask=block_mask(table, table, window), enable_gqa=True)
    dense = visible(table, table, window)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)
    assert float((found - expected).abs().max()) < 2e-6


@pytest.mark.full
@torch.no_grad()
def test_attention_by_blocks_compiled_by_inductor_is_the_softmax_over_what_is_visible():
    """On a CPU inductor generates the forward pass alone (torch's `_inductor/kernel/flex/flex_cpu.py`: "only supports
    inference"), so the generated backward pass is tested on a GPU (`tests/contracts/test_device.py`).
    """
    if not check_cpu_supported():
        pytest.skip("inductor generates FlexAttention only for x86 processors with AVX2, not on macOS")
    rows = long_rows()
    table = tables(rows)
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(len(rows), heads, table.count, 16, generator=made) for heads in (4, 2, 2))
    torch.compiler.reset()
    attend = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    found = attend(q, k, v, block_mask=block_mask(table, table), enable_gqa=True)
    torch.compiler.reset()
    scores = torch.einsum("bhik,bhjk->bhij", q, k.repeat_interleave(2, dim=1)).double() / 4
    weights = scores.masked_fill(~visible(table, table)[:, None], -torch.inf).softmax(dim=-1)
    expected = torch.einsum("bhij,bhjk->bhik", weights, v.repeat_interleave(2, dim=1).double())
    assert float((found - expected).abs().max()) < 2e-6
    assert float((found[:, :, 1:] - found[:, :, :-1]).abs().max()) > 0.1


@torch.no_grad()
@pytest.mark.parametrize(("fusion", "family"), [("dual tower", "llama"), ("x-fuse", "gemma3"), ("flamingo", "llama")])
def test_packed_layers_by_blocks_say_the_same_and_new_steps_make_no_new_graph(bases, fusion, family, monkeypatch):
    monkeypatch.setattr(fusion_base.torch, "compile", partial(torch.compile, backend="eager"))
    fusion_base.compiled.cache_clear()
    torch.compiler.reset()
    model = make_model(bases[family], fusion)
    engine = model.training_engine(torch.float32, "tested", "flex_attention", True)
    graphs = [compiled_graphs()]
    for rows in ([SEQUENCES[:4], SEQUENCES[4:]], [SEQUENCES[:4], SEQUENCES[4:]], [SEQUENCES[:4], SEQUENCES[4:]]):
        batch = view(rows, model)
        with model.using(engine):
            found = look(model, batch)
        graphs.append(compiled_graphs())
        with model.using(replace(model.training_engine(torch.float32, "tested", "eager", False))):
            assert distance(found, look(model, batch)) < 2e-5
    fusion_base.compiled.cache_clear()
    torch.compiler.reset()
    assert graphs[0] < graphs[1] == graphs[2] == graphs[3]


def test_what_cannot_be_trained_here_is_refused():
    with pytest.raises(XFusionError, match="'flex_attention': torch .* has no backward pass of it on cpu"):
        choose_attention(torch.device("cpu"), "flex_attention")
    with pytest.raises(XFusionError, match="attention 'flash' is not one of grouped, eager, sdpa, flex_attention"):
        choose_attention(torch.device("cpu"), "flash")
    assert choose_attention(torch.device("cuda"), "flex_attention") == ("flex_attention", "as asked")
