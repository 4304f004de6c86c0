"""Gated cross-attention before frozen layers (Flamingo, arXiv 2204.14198; OpenFlamingo, 2308.01390; Idefics, 2306.16527).

    y = x + tanh(a) O softmax(mask(Q n(x) (K m)^T / sqrt(K))) V m
    y = y + tanh(b) MLP(n'(y))                    a = b = ``gate`` at first, 0 in the papers;
                                                  then the frozen layer on y

for text tokens x that read media rows m. The published code zeroes the attention of text that sees no medium (but not in the
mode that attends to all earlier media), yet its gated MLP acts on all text: training changes text-only output. Here both act
only on text that sees a medium, as in Mllama; ``text_only="mlp"`` is the published form. What a token sees is determined
from the order tables, so tokens generated after an earlier picture see that picture, whereas the published code assumes that
every new token follows the last picture.

=====================  ==================  ===================  ======================  ============
system                 norms               heads                MLP                     placed at
=====================  ==================  ===================  ======================  ============
Flamingo               layer, media too    of 128               squared ReLU, 4 D       i % n = 0
OpenFlamingo           layer               8 of 64              GELU, 4 D               i % n = n - 1
Idefics, Mllama        RMS, also per head  the base's           SwiGLU, the base's      i % n = 0
=====================  ==================  ===================  ======================  ============

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``k`` media positions that text may read, ``H`` heads,
``K`` head width, ``D`` model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.fusion.base import Call, Pass, compiled
from xfusion.fusion.connectors.resampler import Activated
from xfusion.fusion.outside import Outside
from xfusion.layers import KeysValues


class GatedLinearUnit(nn.Module):
    """``W_down (silu(W_gate x) * W_up x)``: the MLP of Llama."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., D]``."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class GatedCrossAttention(nn.Module):
    """One block: text reads media rows; attention and MLP are gated."""

    def __init__(self, config: CrossAttention.Config, width: int):
        super().__init__()
        heads, mlp = config.heads, 4 * width if config.mlp is None else config.mlp
        key_heads = heads if config.key_heads is None else config.key_heads
        if min(heads, key_heads, config.head_width, mlp) < 1 or heads % key_heads:
            raise XFusionError(
                f"cross-attention: {heads} heads of {config.head_width}, {key_heads} for keys, MLP {mlp}: take positive sizes,"
                " and a number of heads that the key heads divide"
            )
        norm = nn.LayerNorm if config.norm == "layer" else lambda size: nn.RMSNorm(size, eps=1e-6)
        self.heads, self.key_heads, self.text_only = heads, key_heads, config.text_only
        self.norm, self.mlp_norm = norm(width), norm(width)
        self.media_norm = norm(width) if config.media_norm else nn.Identity()
        self.query = nn.Linear(width, heads * config.head_width, bias=False)
        self.key, self.value = (nn.Linear(width, key_heads * config.head_width, bias=False) for _ in range(2))
        self.out = nn.Linear(heads * config.head_width, width, bias=False)
        self.query_norm, self.key_norm = (
            norm(config.head_width) if config.head_norm else nn.Identity() for _ in range(2)
        )
        if config.activation == "swiglu":
            self.mlp = GatedLinearUnit(width, mlp)
        else:
            self.mlp = nn.Sequential(
                nn.Linear(width, mlp, bias=False),
                Activated(config.activation),
                nn.Linear(mlp, width, bias=False),
            )
        self.gate, self.mlp_gate = (nn.Parameter(torch.tensor(float(config.gate))) for _ in range(2))

    def keys_values(self, media: Tensor) -> KeysValues:
        """Media rows ``[B, n, D]`` -> keys and values ``[B, H, n, K]``; there is no rotary embedding."""
        media = self.media_norm(media)
        k, v = (
            projection(media).unflatten(-1, (self.key_heads, -1)).transpose(1, 2)
            for projection in (self.key, self.value)
        )
        return self.key_norm(k), v

    def queries(self, x: Tensor) -> Tensor:
        """Text states ``[B, n, D]`` -> ``[B, H, n, K]``."""
        return self.query_norm(self.query(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2))

    def forward(self, x: Tensor, kv: KeysValues | None, media_mask: Tensor) -> Tensor:
        """Text states ``[B, n, D]``, keys and values of media or None, and which of them each token reads, ``[B, n, k]``."""
        has_keys = media_mask.any(-1, keepdim=True)
        y = x
        if kv is not None:
            k, v = kv
            # A softmax needs a key: a token that reads nothing gets an open mask, and its result is discarded.
            mask = (media_mask | ~has_keys)[:, None]
            q = self.queries(x)
            attended = functional.scaled_dot_product_attention(
                q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, enable_gqa=self.key_heads != self.heads
            )
            attended = self.out(attended.transpose(1, 2).flatten(2))
            y = y + torch.tanh(self.gate) * torch.where(has_keys, attended, 0)
        y = y + torch.tanh(self.mlp_gate) * self.mlp(self.mlp_norm(y))
        return (y if self.text_only == "mlp" else torch.where(has_keys, y, x)).to(x.dtype)


def gated_rows(block: GatedCrossAttention, x: Tensor, k: Tensor, v: Tensor, media_mask: Tensor) -> Tensor:
    """A block on text that may read media."""
    return block(x, (k, v), media_mask)


class CrossAttention(Outside):
    """Gated cross-attention to media before frozen layers."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Outside.Config):
        """Sizes of the blocks; ``stride`` and ``offset`` choose the layers that they precede."""

        heads: int = 8
        """Attention heads."""
        key_heads: int | None = None
        """Key/value heads; None means as many as there are heads."""
        head_width: int = 64
        """Width of a head, independent of the base's."""
        norm: Literal["layer", "rms"] = "layer"
        """Norm before attention and MLP."""
        media_norm: bool = False
        """Whether media rows are normed too (Flamingo's figure 4; a resampler's output is already normed)."""
        head_norm: bool = False
        """Whether queries and keys are normed per head (Idefics, Mllama)."""
        mlp: int | None = None
        """Hidden units of the MLP; None means 4 D."""
        activation: Literal["gelu", "relu", "squared relu", "swiglu"] = "gelu"
        """Activation of the MLP; swiglu has three matrices."""
        gate: float = 0.0
        """Initial value of both gates, before tanh. The papers' 0 closes them: the base answers as before until they open, by
        about one learning rate per step. Use 1 for a short run; text that sees no medium is unaffected."""
        text_only: Literal["skip", "mlp"] = "skip"
        """What a block does to text that sees no medium: nothing, or its gated MLP, as published (text is then not kept)."""

        def build(self) -> CrossAttention:
            """The fusion, not yet installed."""
            return CrossAttention(self)

    def __init__(self, config: Config):
        super().__init__(config)
        if config.text_only == "mlp":
            self.preserves_text = self.prefix_is_constant = False

    def make(self, index: int, backbone: Backbone) -> GatedCrossAttention:
        """The block before a layer."""
        del index
        return GatedCrossAttention(self.config, backbone.hidden_size).to(backbone.device)

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The block on text, then the frozen layer on text alone; media rows stay unchanged."""
        block, states = self.block(index, frozen), self.with_rows(index, run)
        x = run.inputs(index)["text"] if "text" in run.states else None
        if block is not None:
            kv = run.all_keys_values(1, index, block.keys_values(states[run.media]) if run.media else None)
            if x is not None and run.cached_text is None and (kv is not None or not self.preserves_text):
                media_mask = self.reads(run)
                compute_rows = compiled(gated_rows) if run.compiled and kv is not None else gated_rows
                x = compute_rows(block, x, *kv, media_mask) if kv is not None else block(x, None, media_mask)
        return states | self.words_alone(0, index, frozen, call, run, x)

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Each text token by itself over the rows that it reads; then the frozen layer on text alone."""
        block, states = self.block(index, frozen), self.with_rows(index, run, reference=True)
        if "text" not in states:
            return states
        x = self._token_by_token(block, states, run) if block is not None else states["text"]
        return states | self.words_alone_reference(index, frozen, call, run, x)

    def _token_by_token(self, block: GatedCrossAttention, states: dict[str, Tensor], run: Pass) -> Tensor:
        """The equation for one token at a time, ``[B, n, D]``; the rows that a token reads are looked up in the tables."""
        text, output = states["text"], states["text"].clone()
        for b in range(text.shape[0]):
            for i in range(text.shape[1]):
                x, attended, positions = text[b, i], torch.zeros_like(text[b, i]), self._media_columns(run, b, i)
                if positions and run.media:
                    k, v = block.keys_values(states[run.media][b][positions][None])
                    k, v = (t[0].repeat_interleave(block.heads // block.key_heads, 0) for t in (k, v))
                    q = block.queries(x[None, None])[0, :, 0]
                    weight = (torch.einsum("hd,hmd->hm", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
                    attended = block.out(torch.einsum("hm,hmd->hd", weight, v).flatten())
                if positions or self.config.text_only == "mlp":
                    y = x + block.gate.tanh() * attended
                    output[b, i] = y + block.mlp_gate.tanh() * block.mlp(block.mlp_norm(y))
        return output

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: Call) -> Tensor:
        """A text-only layer: the block is called without media and leaves text unchanged, unless ``text_only`` is "mlp"."""
        block = self.block(index, frozen)
        if block is not None:
            empty_mask = torch.zeros(*x.shape[:2], 0, dtype=torch.bool, device=x.device)
            x = block(x.to(block.gate.dtype), None, empty_mask).to(x.dtype)
        return frozen(x, **call)
