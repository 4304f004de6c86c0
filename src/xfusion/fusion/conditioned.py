"""A denoiser that reads a frozen language model's hidden states of the text (Imagen, arXiv 2205.11487, section 2.1).

    x = x + MHA(n(x)) ;  x = x + MHA(n(x), c) ;  x = x + MLP(n(x))          c = frozen states of the text

for the tokens x of one picture, at every block; a projection of the mean of c is added to the tokens besides the noise
level. The language model reads only text, once per prompt. No picture passes through it, so no gradient does either. c is
the input of its last layer (the penultimate states): the last layer's output is specialized for predicting the next token.

Shape legend: ``B`` batch row, ``n`` media rows, ``k`` text tokens, ``N`` media items, ``D`` model width,
``W`` denoiser width, ``H`` heads.
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
from xfusion.fusion.base import Call, Pass, WithoutBlocks
from xfusion.layers import KeysValues, run_rows


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

    def forward(self, x: Tensor, kv: KeysValues, mask: Tensor) -> Tensor:
        """Rows ``[B, n, W]``, keys and values, bool mask ``[B, n, k]``; the output is 0 for a row that reads nothing."""
        has_keys = mask.any(-1, keepdim=True)
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.to(q.dtype) for t in kv)
        output = functional.scaled_dot_product_attention(q, k, v, attn_mask=(mask | ~has_keys)[:, None])
        return torch.where(has_keys, self.out(output.transpose(1, 2).flatten(2)), 0)


class Block(nn.Module):
    """Tokens of a picture read each other, then the text."""

    def __init__(self, width: int, text_width: int, heads: int):
        super().__init__()
        self.norm, self.words_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.own, self.cross = Attention(width, width, heads), Attention(width, text_width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, same_item: Tensor, text_kv: KeysValues | None, text_mask: Tensor) -> Tensor:
        """Tokens ``[B, n, W]``, same-picture mask ``[B, n, n]``, the text's keys and values, and the mask for reading them."""
        h = self.norm(x)
        x = x + self.own(h, self.own.keys_values(h), same_item)
        if text_kv is not None:
            x = x + self.cross(self.words_norm(x), text_kv, text_mask)
        return x + self.mlp(self.mlp_norm(x))


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
        self.words_norm, self.pooled = nn.LayerNorm(width), nn.Linear(width, config.width)
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
        new_kv = self._text_keys_values(run, text_states)
        if not run.media:
            return states
        media, text_mask = run.media_rows[run.media], run.seen(run.media, of="text")
        same_item = (media.item[:, :, None] == media.item[:, None, :]) & (media.item >= 0)[:, None, :]
        x = self.into(states[run.media].to(self.into.weight.dtype))
        *blocks, pooled = new_kv
        if pooled is not None:
            pooling_weights = text_mask.to(x.dtype) / text_mask.sum(-1, keepdim=True).clamp(min=1)
            x = x + pooling_weights @ pooled[1][:, 0].to(x.dtype)
        for block, kv in zip(self.denoiser, blocks, strict=True):
            x = block(x, same_item, kv, text_mask)
        denoised = self.out(x).to(states[run.media].dtype)
        # [BOI] is not part of a picture; it is the same at every noise level.
        return states | {run.media: torch.where((media.item >= 0)[..., None], denoised, states[run.media])}

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
        states = dict(run.states)
        if "text" in states:
            mask = run.mask("text", self.windows[index], of="text")
            states["text"] = run_rows(frozen, states["text"], run.calls(call)["text"], mask, [], [])[0]
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
            tokens = self.into(run.states[run.media][b, columns][None].to(self.into.weight.dtype))
            full_mask = torch.ones(1, len(columns), len(columns), dtype=torch.bool, device=tokens.device)
            text_states = (
                self.words_norm(run.states["text"][b, text_columns][None].to(self.words_norm.weight.dtype))
                if text_columns
                else None
            )
            if text_states is not None:
                tokens = tokens + self.pooled(text_states).mean(1, keepdim=True)
            text_mask = torch.ones(1, len(columns), len(text_columns), dtype=torch.bool, device=tokens.device)
            for block in self.denoiser:
                cross: Any = block.cross
                keys_values = None if text_states is None else cross.keys_values(text_states)
                tokens = block(tokens, full_mask, keys_values, text_mask)
            x[b, columns] = self.out(tokens)[0].to(x.dtype)
        return states | {run.media: x}
