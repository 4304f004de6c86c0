"""The Perceiver resampler: maps any number of media tokens to a fixed number of latents (Flamingo, arXiv 2204.14198).

    z <- z + O softmax(Q n(z) (K [m(x); n(z)])^T / sqrt(K)) V [m(x); n(z)]
    z <- z + W_2 act(W_1 n'(z))                                              depth times; at last n''(z)

with learned latents z, layer norms n and linear maps without bias. Keys and values come from the medium and from the latents
themselves. The paper's activation is the squared ReLU, OpenFlamingo's is GELU; Idefics uses ReLU and norms queries and keys
per head.

Shape legend: ``N`` media items, ``P`` tokens of an item, ``M`` latents, ``D`` width, ``H`` heads, ``K`` head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.data.sequence import XFusionError

Activation = Literal["gelu", "relu", "squared relu"]


class Activated(nn.Module):
    """One of the papers' activations."""

    def __init__(self, kind: Activation):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., D]``."""
        if self.kind == "gelu":
            return functional.gelu(x)
        return functional.relu(x) ** (2 if self.kind == "squared relu" else 1)


class ResamplerAttention(nn.Module):
    """Latents that attend to a medium and to themselves."""

    def __init__(self, config: Resampler.Config, width: int):
        super().__init__()
        inner = config.heads * config.head_width
        self.heads = config.heads
        self.media_norm, self.latent_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, width, bias=False)
        norm = (lambda: nn.LayerNorm(config.head_width)) if config.head_norm else nn.Identity
        self.query_norm, self.key_norm = norm(), norm()

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, z: Tensor, present: Tensor) -> Tensor:
        """Media ``[N, P, D]``, latents ``[N, M, D]`` and which tokens exist, bool ``[N, P]`` -> ``[N, M, D]``."""
        z = self.latent_norm(z)
        context = torch.cat([self.media_norm(x), z], dim=1)
        q = self.query_norm(self._heads(self.query(z)))
        k = self.key_norm(self._heads(self.key(context)))
        mask = functional.pad(present, (0, z.shape[1]), value=True)[:, None, None]
        output = functional.scaled_dot_product_attention(q, k, self._heads(self.value(context)), attn_mask=mask)
        return self.out(output.transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """A fixed number of latents for each medium."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Sizes of the resampler; the defaults are OpenFlamingo's."""

        latents: int = 64
        """Number of rows (latents) per medium."""
        depth: int = 6
        """Number of layers."""
        heads: int = 8
        """Attention heads."""
        head_width: int = 64
        """Width of a head, independent of the model's."""
        mlp: int = 4
        """Hidden width of the MLP, as a multiple of the model's width."""
        activation: Activation = "gelu"
        """Activation of the MLP: squared relu is the paper's, gelu OpenFlamingo's, relu that of Idefics."""
        head_norm: bool = False
        """Whether queries and keys are normed per head (Idefics)."""

        def build(self, width: int) -> Resampler:
            """The resampler for media of this width.

            Raises:
                XFusionError: a size is not positive.
            """
            sizes = (self.latents, self.depth, self.heads, self.head_width, self.mlp)
            if min(sizes) < 1:
                raise XFusionError(
                    f"resampler: latents, depth, heads, head_width, mlp are {sizes}: take at least 1 each"
                )
            return Resampler(self, width)

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.randn(config.latents, width))
        self.attentions = nn.ModuleList(ResamplerAttention(config, width) for _ in range(config.depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, config.mlp * width, bias=False),
                Activated(config.activation),
                nn.Linear(config.mlp * width, width, bias=False),
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """Media ``[N, P, D]`` and which tokens exist, bool ``[N, P]`` -> latents ``[N, M, D]``."""
        z = self.latents.expand(len(x), -1, -1)
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            z = z + attention(x, z, present)
            z = z + mlp(z)
        return self.norm(z)
