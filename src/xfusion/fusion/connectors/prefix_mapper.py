"""Pengi's mapper: one vector per sound becomes a prefix of K rows (arXiv 2305.11834, section 3; ClipCap's, arXiv 2111.09734).

    p = g T([reshape(W a / |a| + b); c])[-K:]

with a the mean of an item's features, W and b a linear map to K rows of the model's width, K learned rows c, and pre-norm layers
T, of whose output only the rows of c are kept. The papers have no g, a learned number that begins at the scale of the base's
embeddings: rows of unit scale would be many times as large as words.

Shape legend: ``N`` media items, ``K`` rows of an item, ``D`` model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.data.sequence import MediaRows, XFusionError
from xfusion.fusion.connectors.base import Connector, gather_features, scatter_states


class MapperLayer(nn.Module):
    """Pre-norm attention without bias on queries, keys and values, and a ReLU MLP."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.heads = heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.ReLU(), nn.Linear(mlp, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 2K, D]`` -> ``[N, 2K, D]``, with full attention."""
        y = self.norm(x)
        q, k, v = (
            part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class PrefixMapper(Connector):
    """A fixed number of rows from the mean of an item's features."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """Size of the mapper; the paper's is 40 rows and 4 layers."""

        rows: int = 10
        """Rows of the prefix: the tokens of an item."""
        heads: int = 8
        """Attention heads, a divisor of the model's width."""
        depth: int = 2
        """Number of layers."""
        mlp: int = 2
        """Hidden width of the MLP, as a multiple of the model's width."""

    def __init__(self, config: Config, width: int, token_width: int, scale: float):
        super().__init__(config, width, token_width, scale)
        if width % config.heads:
            raise XFusionError(f"prefix mapper: the model's width {width} is not a multiple of {config.heads} heads")
        self.into = nn.Linear(self.feature_width, config.rows * width)
        self.constants = nn.Parameter(torch.randn(config.rows, width))
        self.layers = nn.ModuleList(MapperLayer(width, config.heads, config.mlp * width) for _ in range(config.depth))
        # Constants of about unit scale are mapped to the scale of the frozen embeddings.
        self.gain = nn.Parameter(torch.tensor(scale))
        # A unit-length vector is mapped to rows of about unit scale.
        nn.init.normal_(self.into.weight, std=1.0)
        nn.init.zeros_(self.into.bias)

    def connect(self, media: MediaRows) -> Tensor:
        """All features of an item at once."""
        items = gather_features(self, media)
        total = (items.features * items.present[..., None]).sum(dim=1)
        x = self.into(functional.normalize(total, dim=-1)).unflatten(-1, self.constants.shape)
        x = torch.cat([x, self.constants.expand_as(x).to(x.dtype)], dim=1)
        for layer in self.layers:
            x = layer(x)
        return scatter_states(self.gain * x[:, len(self.constants) :], items, media)
