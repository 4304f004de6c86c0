"""A denoiser that reads a frozen language model's hidden states of the text (Imagen, arXiv 2205.11487, section 2.1).

    x = x + MHA(m(n(x))) ;  x = x + MHA(n(x), c) ;  x = x + MLP(m(n(x)))          c = frozen states of the text

for the tokens x of one picture, at every block. m scales and shifts by a projection of the noise level's embedding plus that
of the mean of c, as in the paper's residual blocks. The language model reads only text, once per prompt. No picture passes
through it, so no gradient does either. c is the input of its last layer (the penultimate states): the last layer's output is
specialized for predicting the next token.

Several pictures may share a batch row. The denoiser computes each by itself, as rows of ``[N, M, W]``: attention over whole
batch rows would compute, and mask, the scores between tokens of different pictures.

Shape legend: ``B`` batch row, ``n`` media rows, ``k`` text tokens, ``N`` media items, ``M`` tokens of an item, ``D`` model
width, ``W`` denoiser width, ``H`` heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.fusion.base import Call, Pass, WithoutBlocks, compiled
from xfusion.layers import KeysValues, attention_mask, grouped_attention
from xfusion.modalities.port import TIME_FREQUENCIES, sinusoids


def positions_of_items(item: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where the tokens of each item are.

    Args:
        item: index of the item at each position, int64 ``[B, n]``, -1 at none.
        count: number of items.

    Returns:
        positions in the flattened ``[B n]``, int64 ``[N, M]``, and which of them are tokens of the item, bool ``[N, M]``;
        shorter items are filled up with any position, and an item may have none here.
    """
    if item.is_meta:  # shapes alone: items of equal length
        length = item.numel() // max(count, 1)
        positions = torch.zeros(count, length, dtype=torch.long, device=item.device)
        return positions, torch.ones_like(positions, dtype=torch.bool)
    sizes = torch.bincount(item[item >= 0], minlength=count)
    ordered = item.flatten().argsort(stable=True)[item.numel() - int(sizes.sum()) :]
    column = torch.arange(int(sizes.max()) if count else 0, device=item.device)
    is_token = column < sizes[:, None]
    starts = (sizes.cumsum(0) - sizes).clamp(max=max(len(ordered) - 1, 0))
    return ordered[starts[:, None] + torch.where(is_token, column, 0)], is_token


class Attention(nn.Module):
    """Multi-head cross-attention to other rows, or self-attention."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(context_width, width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width)

    def keys_values(self, rows: Tensor) -> KeysValues:
        """``[B, k, ...]`` -> keys and values ``[B, H, k, W / H]``."""
        k, v = (
            projection(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2) for projection in (self.key, self.value)
        )
        return k, v

    def forward(self, x: Tensor, kv: KeysValues, mask: Tensor, attention: str) -> Tensor:
        """Rows ``[B, n, W]``, keys and values, and a bool mask, ``[B, n, k]`` or ``[B, 1, k]`` for all rows alike; the output is
        0 for a row that reads nothing. ``attention`` names the implementation: plain products for ``grouped`` and ``eager``,
        torch's fused kernel for others.
        """
        has_keys = mask.any(-1, keepdim=True)
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.to(q.dtype) for t in kv)
        open_mask = mask | ~has_keys
        if attention in ("grouped", "eager"):
            output = grouped_attention(self, q, k, v, attention_mask(open_mask, attention, q.dtype))[0]
        else:
            open_mask = attention_mask(open_mask, "sdpa", q.dtype)
            output = functional.scaled_dot_product_attention(q, k, v, attn_mask=open_mask).transpose(1, 2)
        return torch.where(has_keys, self.out(output.flatten(2)), 0)


class Block(nn.Module):
    """Tokens of a picture read each other, then the text."""

    def __init__(self, width: int, text_width: int, heads: int):
        super().__init__()
        self.norm, self.words_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.own, self.cross = Attention(width, width, heads), Attention(width, text_width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 4 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x: Tensor,
        level: Tensor,
        same_item: Tensor,
        text_kv: KeysValues | None,
        text_mask: Tensor,
        attention: str = "eager",
    ) -> Tensor:
        """Tokens ``[N, M, W]``, the embedding of each picture's noise level and text ``[N, W]``, which tokens they read, bool
        ``[N, M or 1, M]``, the text's keys and values, the mask for reading them, and the attention implementation.
        """
        scale, shift, mlp_scale, mlp_shift = self.modulation(level)[:, None].chunk(4, dim=-1)
        h = (1 + scale) * self.norm(x) + shift
        x = x + self.own(h, self.own.keys_values(h), same_item, attention)
        if text_kv is not None:
            x = x + self.cross(self.words_norm(x), text_kv, text_mask, attention)
        return x + self.mlp((1 + mlp_scale) * self.mlp_norm(x) + mlp_shift)


def block_rows(
    block: Block,
    x: Tensor,
    level: Tensor,
    same_item: Tensor,
    text_kv: KeysValues | None,
    text_mask: Tensor,
    attention: str,
) -> Tensor:
    """One block's work, as a function, so that all blocks share a compiled graph."""
    return block(x, level, same_item, text_kv, text_mask, attention)


class Conditioned(WithoutBlocks):
    """Frozen layers for text only, and a separate denoiser that reads their states."""

    preserves_text = True
    prefix_is_constant = True
    joins_attention = False
    num_towers = 2

    @dataclass(frozen=True, kw_only=True)
    class Config(WithoutBlocks.Config):
        """Size of the denoiser."""

        width: int = 256
        """Width W of the denoiser."""
        depth: int = 6
        """Number of blocks."""
        heads: int = 4
        """Attention heads."""

        def sizes(self, num_layers: int) -> Iterator[Conditioned.Config]:
            """Sizes by width."""
            del num_layers
            for width in range(self.heads * 16, 4097, self.heads * 16):
                yield replace(self, width=width)

        def build(self) -> Conditioned:
            """The fusion, not yet installed."""
            if min(self.width, self.depth, self.heads) < 1 or self.width % self.heads:
                raise XFusionError(
                    f"conditioned: width {self.width}, depth {self.depth}, {self.heads} heads: take positive sizes, and a"
                    " width that the heads divide"
                )
            self.reject_block_placement("conditioned")
            return Conditioned(self)

    def install(self, backbone: Backbone) -> None:
        """Create the denoiser; no layer of the base gets new modules."""
        super().install(backbone)
        config, width = self.config, backbone.hidden_size
        self.into, self.out = nn.Linear(width, config.width), nn.Linear(config.width, width)
        # Media states have the scale of the base's embeddings, such as 0.1, which the blocks' outputs would drown.
        self.media_norm, self.words_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.pooled = nn.Linear(width, config.width)
        self.time = nn.Sequential(
            nn.Linear(2 * TIME_FREQUENCIES, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.denoiser = nn.ModuleList(Block(config.width, width, config.heads) for _ in range(config.depth))

    @property
    def state_layers(self) -> tuple[int, ...]:
        """The last layer, whose input is read."""
        return (len(self.windows) - 1,)

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The frozen layer on text; at the last layer also the denoiser on media."""
        states = run.states | self.words_alone(0, index, frozen, call, run)
        if index != self.state_layers[0]:
            return states
        text_states = (
            self.words_norm(run.inputs(index)["text"].to(self.words_norm.weight.dtype))
            if "text" in run.states
            else None
        )
        text_kv = self._text_keys_values(run, text_states)
        if not run.media:
            return states
        media, x = run.media_rows[run.media], states[run.media]
        # [BOI] is not part of a picture; it is the same at every noise level.
        positions, is_token = positions_of_items(media.item, len(media.noised))
        if not positions.shape[1]:  # a pass over [BOI] alone
            return states
        batch_row = positions[:, 0].div(media.item.shape[1], rounding_mode="floor")
        text_mask = run.seen(run.media, of="text").flatten(0, 1)[positions[:, :1]]
        compute_block = compiled(block_rows) if run.compiled else block_rows
        tokens = self._enter(functional.embedding(positions, x.flatten(0, 1)))
        *blocks, pooled = (None if kv is None else (kv[0][batch_row], kv[1][batch_row]) for kv in text_kv)
        level = self.time(sinusoids(media.time))
        if pooled is not None:
            pooling_weights = text_mask.to(level.dtype) / text_mask.sum(-1, keepdim=True).clamp(min=1)
            level = level + (pooling_weights @ pooled[1][:, 0].to(level.dtype))[:, 0]
        level = functional.silu(level)
        denoiser: Any = self.denoiser
        for block, kv in zip(denoiser, blocks, strict=True):
            tokens = compute_block(block, tokens, level, is_token[:, None], kv, text_mask, run.attention)
        denoised, rows = self.out(tokens).to(x.dtype), x.flatten(0, 1)
        # What fills up shorter items goes to one more row, which is dropped.
        target = torch.where(is_token, positions, len(rows)).flatten()
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).index_put((target,), denoised.flatten(0, 1))
        return states | {run.media: rows[:-1].view_as(x)}

    def _enter(self, x: Tensor) -> Tensor:
        """Media states ``[N, M, D]`` -> tokens of the denoiser ``[N, M, W]``."""
        return self.into(self.media_norm(x.to(self.into.weight.dtype)))

    def _text_keys_values(self, run: Pass, text_states: Tensor | None) -> list[KeysValues | None]:
        """Keys and values of all text for each block, cached ones first; last, each token's share of the pooled vector."""
        new_kv: list[KeysValues | None] = [None] * (self.config.depth + 1)
        if text_states is not None:
            blocks: Any = self.denoiser
            pooled = self.pooled(text_states)[:, None]
            new_kv = [*(block.cross.keys_values(text_states) for block in blocks), (pooled, pooled)]
        return [run.all_keys_values(1, number, block_kv) for number, block_kv in enumerate(new_kv)]

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Each picture by itself with the text before it."""
        states = run.states | self.words_alone_reference(index, frozen, call, run)
        if index != self.state_layers[0] or not run.media:
            return states
        media, x = run.media_rows[run.media], states[run.media].clone()
        media_table, text_table = media.rows, run.rows.get("text")
        for item in range(len(media.noised)):
            row, columns = torch.nonzero(media.item == item, as_tuple=True)
            if not len(row):
                continue
            b = int(row[0])
            text_columns: list[int] = []
            if text_table is not None:
                first_order, sample = int(media_table.order[b, columns].min()), int(media_table.sample[b, columns[0]])
                tables = zip(text_table.order[b].tolist(), text_table.sample[b].tolist(), strict=True)
                text_columns = [
                    j
                    for j, (order, token_sample) in enumerate(tables)
                    if 0 <= order < first_order and token_sample == sample
                ]
            tokens = self._enter(run.states[run.media][b, columns][None])
            full_mask = torch.ones(1, len(columns), len(columns), dtype=torch.bool, device=tokens.device)
            text_states = (
                self.words_norm(run.states["text"][b, text_columns][None].to(self.words_norm.weight.dtype))
                if text_columns
                else None
            )
            level = self.time(sinusoids(media.time[item, None]))
            if text_states is not None:
                level = level + self.pooled(text_states).mean(1)
            text_mask = torch.ones(1, len(columns), len(text_columns), dtype=torch.bool, device=tokens.device)
            for block in self.denoiser:
                cross: Any = block.cross
                keys_values = None if text_states is None else cross.keys_values(text_states)
                tokens = block(tokens, functional.silu(level), full_mask, keys_values, text_mask)
            x[b, columns] = self.out(tokens)[0].to(x.dtype)
        return states | {run.media: x}
