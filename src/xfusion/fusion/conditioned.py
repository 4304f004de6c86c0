"""A denoiser that reads what a frozen language model made of the words (Imagen, arXiv 2205.11487, section 2.1).

    x = x + MHA(n(x)) ;  x = x + MHA(n(x), c) ;  x = x + MLP(n(x))          c = frozen states of the words

for the tokens x of one picture, at every block; a projection of the mean of c is added to the tokens beside the noise level.
The language model reads words alone, once per prompt, and nothing of a picture goes through it, so no gradient does
either. c is the input of its last layer, the penultimate states: those behind the last are bent towards the next token.

Shape legend: ``B`` batch row, ``n`` media rows, ``k`` words, ``N`` media items, ``D`` model width, ``W`` denoiser width,
``H`` heads.
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
    """Multi-head attention of rows to other rows, or to themselves."""

    def __init__(self, width: int, other: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(other, width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width)

    def keys_values(self, rows: Tensor) -> KeysValues:
        """``[B, k, ...]`` -> keys and values ``[B, H, k, W / H]``."""
        k, v = (p(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.key, self.value))
        return k, v

    def forward(self, x: Tensor, kv: KeysValues, reads: Tensor) -> Tensor:
        """Rows ``[B, n, W]``, keys and values, who reads whom, bool ``[B, n, k]``; 0 for a row that reads nothing."""
        sees = reads.any(-1, keepdim=True)
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.to(q.dtype) for t in kv)
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=(reads | ~sees)[:, None])
        return torch.where(sees, self.out(found.transpose(1, 2).flatten(2)), 0)


class Block(nn.Module):
    """Tokens of a picture read each other, then the words."""

    def __init__(self, width: int, words: int, heads: int):
        super().__init__()
        self.norm, self.words_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.own, self.cross = Attention(width, width, heads), Attention(width, words, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, alike: Tensor, words: KeysValues | None, reads: Tensor) -> Tensor:
        """Tokens ``[B, n, W]``, which are of one picture ``[B, n, n]``, the words' keys and values, who reads them."""
        h = self.norm(x)
        x = x + self.own(h, self.own.keys_values(h), alike)
        if words is not None:
            x = x + self.cross(self.words_norm(x), words, reads)
        return x + self.mlp(self.mlp_norm(x))


class Conditioned(WithoutBlocks):
    """Frozen layers for words alone, and beside them a denoiser that reads their states."""

    preserves_text = True
    prefix_is_constant = True
    num_towers = 2

    @dataclass(frozen=True, kw_only=True)
    class Config(WithoutBlocks.Config):
        """Size of the denoiser."""

        width: int = 256
        """W."""
        depth: int = 6
        """Blocks."""
        heads: int = 4
        """Attention heads."""

        def sizes(self, num_layers: int) -> Iterator[Conditioned.Config]:
            """By width."""
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
            self.refuse_places("conditioned")
            return Conditioned(self)

    def install(self, backbone: Backbone) -> None:
        """The denoiser; no layer of the base gets anything new."""
        super().install(backbone)
        config, width = self.config, backbone.hidden_size
        self.into, self.out = nn.Linear(width, config.width), nn.Linear(config.width, width)
        self.words_norm, self.pooled = nn.LayerNorm(width), nn.Linear(width, config.width)
        self.denoiser = nn.ModuleList(Block(config.width, width, config.heads) for _ in range(config.depth))

    @property
    def state_layers(self) -> tuple[int, ...]:
        """The last, whose input is read."""
        return (len(self.windows) - 1,)

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Words through the frozen layer; at the last one the denoiser on media."""
        states = run.states | self.words_alone(0, index, frozen, call, run)
        if index != self.state_layers[0]:
            return states
        words = (
            self.words_norm(run.inputs(index)["text"].to(self.words_norm.weight.dtype))
            if "text" in run.states
            else None
        )
        parts = self._read(run, words)
        if not run.media:
            return states
        media, reads = run.media_rows[run.media], run.seen(run.media, of="text")
        alike = (media.item[:, :, None] == media.item[:, None, :]) & (media.item >= 0)[:, None, :]
        x = self.into(states[run.media].to(self.into.weight.dtype))
        *blocks, pooled = parts
        if pooled is not None:
            share = reads.to(x.dtype) / reads.sum(-1, keepdim=True).clamp(min=1)
            x = x + share @ pooled[1][:, 0].to(x.dtype)
        for block, kv in zip(self.denoiser, blocks, strict=True):
            x = block(x, alike, kv, reads)
        made = self.out(x).to(states[run.media].dtype)
        # [BOI] is no part of a picture, and the same at every noise level.
        return states | {run.media: torch.where((media.item >= 0)[..., None], made, states[run.media])}

    def _read(self, run: Pass, words: Tensor | None) -> list[KeysValues | None]:
        """Keys and values of all words for each block, cached ones first, and of each word its share of the pooled vector."""
        made: list[KeysValues | None] = [None] * (self.config.depth + 1)
        if words is not None:
            blocks: Any = self.denoiser
            pooled = self.pooled(words)[:, None]
            made = [*(block.cross.keys_values(words) for block in blocks), (pooled, pooled)]
        return [run.all_keys_values(1, number, new) for number, new in enumerate(made)]

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Each picture by itself with the words before it."""
        states = dict(run.states)
        if "text" in states:
            mask = run.mask("text", self.windows[index], of="text")
            states["text"] = run_rows(frozen, states["text"], run.calls(call)["text"], mask, [], [])[0]
        if index != self.state_layers[0] or not run.media:
            return states
        media, x = run.media_rows[run.media], states[run.media].clone()
        before, text = media.rows, run.rows.get("text")
        for item in range(len(media.noised)):
            row, columns = torch.nonzero(media.item == item, as_tuple=True)
            if not len(row):
                continue
            b = int(row[0])
            words: list[int] = []
            if text is not None:
                first, sample = int(before.order[b, columns].min()), int(before.sample[b, columns[0]])
                tables = zip(text.order[b].tolist(), text.sample[b].tolist(), strict=True)
                words = [j for j, (order, own) in enumerate(tables) if 0 <= order < first and own == sample]
            tokens = self.into(run.states[run.media][b, columns][None].to(self.into.weight.dtype))
            everyone = torch.ones(1, len(columns), len(columns), dtype=torch.bool, device=tokens.device)
            c = self.words_norm(run.states["text"][b, words][None].to(self.words_norm.weight.dtype)) if words else None
            if c is not None:
                tokens = tokens + self.pooled(c).mean(1, keepdim=True)
            reads = torch.ones(1, len(columns), len(words), dtype=torch.bool, device=tokens.device)
            for block in self.denoiser:
                tokens = block(tokens, everyone, None if c is None else block.cross.keys_values(c), reads)  # type: ignore[operator]
            x[b, columns] = self.out(tokens)[0].to(x.dtype)
        return states | {run.media: x}
