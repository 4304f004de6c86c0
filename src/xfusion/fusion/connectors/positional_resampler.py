"""Qwen-VL's adapter (arXiv 2308.12966, section 2.1): one cross-attention from learned queries with positions.

    H = Attention(n_q(Q) + p_q,  n_k(W Z) + p_k,  n_k(W Z))

with 2-D sinusoidal positions: ``p_k`` of the features on the encoder's map, and ``p_q`` of the queries on the squarest grid of
that many queries, laid over the same map: row r of R is at r T / R of the map's T rows, and likewise for columns. If there
are as many queries as features, they have the features' positions, like Qwen-VL's 256 on 16 x 16. Fewer queries are at the
start of their part of the map, where Qwen-VL, which interpolates, uses the middle. A prime number of queries, such as 7, lies
along the top row, so they differ only by column.

Shape legend: ``N`` media items, ``M`` features of an item, ``F`` width of a feature, ``K`` queries, ``D`` model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xfusion.data.sequence import MediaRows, XFusionError
from xfusion.fusion.connectors.base import Connector, gather_features, scatter_states


def sincos_positions(rows: int, columns: int, width: int, over: tuple[int, int] | None = None) -> Tensor:
    """Sine and cosine of row and column, ``[rows * columns, width]``: a quarter of the width each.

    Args:
        rows: rows of the grid.
        columns: columns of the grid.
        width: a multiple of 4.
        over: rows and columns of the grid in whose units positions are measured; None means the grid itself.
    """
    if width % 4:
        raise XFusionError(f"positional resampler: 2-D positions need a width that is a multiple of 4, not {width}")
    frequency = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    map_rows, map_columns = over or (rows, columns)
    row = (torch.arange(rows, dtype=torch.float64) * map_rows / rows)[:, None].expand(rows, columns).flatten()
    column = (torch.arange(columns, dtype=torch.float64) * map_columns / columns)[None].expand(rows, columns).flatten()
    angles = [coordinate[:, None] * frequency for coordinate in (row, column)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


class PositionalResampler(Connector):
    """One cross-attention layer with 2-D positions on queries and keys."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """Number of queries and size of the feature map."""

        queries: int = 7
        """Number of learned queries: the tokens of a picture."""
        map: tuple[int, int] = (7, 7)
        """Rows and columns of the encoder's feature map."""
        heads: int = 4
        """Attention heads."""

    key_places: Tensor
    query_places: Tensor

    def __init__(self, config: Config, width: int, token_width: int, scale: float):
        super().__init__(config, width, token_width, scale)
        if width % config.heads:
            raise XFusionError(f"positional resampler: width {width} is not a multiple of its {config.heads} heads")
        self.map = config.map
        # The squarest grid with this many queries: 256 give 16 x 16; 7 give 1 x 7, the map's top row.
        grid_rows = next(n for n in range(math.isqrt(config.queries), 0, -1) if config.queries % n == 0)
        grid = (grid_rows, config.queries // grid_rows)
        self.register_buffer("key_places", sincos_positions(*config.map, width), persistent=False)
        self.register_buffer("query_places", sincos_positions(*grid, width, config.map), persistent=False)
        self.queries = nn.Parameter(torch.randn(config.queries, width) * 0.02)
        self.project = nn.Linear(self.feature_width, width, bias=False)
        self.query_norm, self.key_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, config.heads, batch_first=True)
        nn.init.normal_(self.project.weight, std=1 / math.sqrt(self.feature_width))
        nn.init.normal_(self.attention.out_proj.weight, std=scale / math.sqrt(width))

    def connect(self, media: MediaRows) -> Tensor:
        """All features of an item at once.

        Raises:
            XFusionError: an item's number of features differs from the map's size, so positions would be wrong.
        """
        items = gather_features(self, media)
        count = items.features.shape[1]
        for number in () if items.present.is_meta else items.present.sum(dim=1).unique().tolist():
            if number not in (0, len(self.key_places)):
                raise XFusionError(
                    f"positional resampler: an item has {number} features, the map {self.map} has"
                    f" {len(self.key_places)} places: set map to the rows and columns of the encoder's map"
                )
        present = items.present | ~items.present.any(dim=1, keepdim=True)
        values = self.key_norm(self.project(items.features))
        query = (self.query_norm(self.queries) + self.query_places).expand(len(values), -1, -1)
        keys = values + self.key_places[:count]
        states = self.attention(query, keys, values, key_padding_mask=~present, need_weights=False)[0]
        return scatter_states(states, items, media)
