"""LXMERT's picture encoder (arXiv 1908.07490, sections 2.1 and 2.2): features with their boxes, then self-attention layers.

    v_j = (n(F f_j) + n(P p_j)) / 2;    v <- n(v + S(v)),  v <- n(v + M(v)) in each layer;    H = W v

with f_j the feature of place j, p_j its box (left, top, right and bottom as fractions of the picture), S self-attention, M a
feed-forward network, n layer norms (each a separate one), and W a matrix to the model's width. F, P and W have biases. The
paper, where all widths are equal, has no W.

Shape legend: ``N`` media items, ``M`` features of an item.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xfusion.data.sequence import MediaRows, XFusionError
from xfusion.fusion.connectors.base import Connector, gather_features, scatter_states

EPSILON = 1e-12
"""Epsilon of the layer norms, as in BERT."""


class ObjectEncoder(Connector):
    """Features and boxes, averaged and processed by bidirectional post-norm layers."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """Size of the layers."""

        inner_width: int = 256
        """Width of the layers; LXMERT's is 768."""
        heads: int = 4
        """Attention heads."""
        depth: int = 2
        """Number of layers; LXMERT has 5."""
        mlp: int = 1024
        """Width of the feed-forward networks."""

    def __init__(self, config: Config, width: int, token_width: int, scale: float):
        super().__init__(config, width, token_width, scale)
        inner = config.inner_width
        if config.cells != 1:
            raise XFusionError(f"object encoder: a token is one place, not {config.cells}: set cells to 1")
        if inner % config.heads:
            raise XFusionError(f"object encoder: width {inner} is not a multiple of its {config.heads} heads")
        self.into, self.norm = nn.Linear(self.feature_width, inner), nn.LayerNorm(inner, eps=EPSILON)
        self.box_into, self.box_norm = nn.Linear(4, inner), nn.LayerNorm(inner, eps=EPSILON)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                inner, config.heads, config.mlp, 0.0, "gelu", layer_norm_eps=EPSILON, batch_first=True
            )
            for _ in range(config.depth)
        )
        self.project = nn.Linear(inner, width)
        nn.init.normal_(self.project.weight, std=scale / math.sqrt(inner))
        nn.init.zeros_(self.project.bias)

    def connect(self, media: MediaRows) -> Tensor:
        """All features of an item at once."""
        items = gather_features(self, media)
        x = self.read(items.features, boxes(media, items.features.shape[1]).to(items.features.dtype), items.present)
        return scatter_states(self.project(x), items, media)

    def read(self, features: Tensor, places: Tensor, present: Tensor) -> Tensor:
        """Features ``[N, M, F]`` and boxes ``[N, M, 4]`` -> output states of the layers, ``[N, M, inner_width]``.

        Args:
            features: from an encoder's feature map, or of regions.
            places: left, top, right and bottom.
            present: which features exist (are not padding), bool ``[N, M]``.
        """
        x = (self.norm(self.into(features)) + self.box_norm(self.box_into(places))) / 2
        # A softmax needs a key, even for an item without rows in this pass.
        present = present | ~present.any(dim=1, keepdim=True)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~present)
        return x


def boxes(media: MediaRows, count: int) -> Tensor:
    """Left, top, right and bottom of the first ``count`` places of each item in reading order, as fractions of its picture,
    ``[N, count, 4]``; arbitrary values if an item has fewer.
    """
    items = len(media.noised)
    item = torch.where(
        media.item >= 0, media.item, items
    ).flatten()  # rows of no item go to an extra one, which is dropped
    map_rows, map_columns = (
        torch.ones(items + 1, dtype=torch.int64, device=item.device).scatter_reduce(
            0, item, place.flatten() + 1, "amax"
        )[:items, None]
        for place in (media.grid_row, media.grid_column)
    )
    place = torch.arange(count, device=item.device)
    top, left = place // map_columns, place % map_columns
    return torch.stack([left / map_columns, top / map_rows, (left + 1) / map_columns, (top + 1) / map_rows], dim=-1)
