"""SLM's adapter: most frames are dropped; a small bidirectional transformer reads the rest (arXiv 2310.00230, section 3).

    H = W T(z_0, z_c, z_2c, ...)

with every c-th feature z, pre-norm layers T over all of an item's kept features, and a matrix W to the model's width. The
paper drops frames at random; here the first of every c is kept, so that a sound always gets the same states.

Shape legend: ``N`` media items, ``M`` features of an item, ``K`` rows of an item, ``D`` model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from xfusion.data.sequence import MediaRows, XFusionError
from xfusion.fusion.connectors.base import Connector, gather_features, scatter_states


class FrameTransformer(Connector):
    """A transformer over one feature of each token."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """Size of the transformer; one of every `cells` features is kept."""

        inner_width: int = 256
        """Width of the layers."""
        heads: int = 4
        """Attention heads."""
        depth: int = 2
        """Number of layers; the paper uses at least two."""
        mlp: int = 1024
        """Width of the feed-forward networks."""

    def __init__(self, config: Config, width: int, token_width: int, scale: float):
        super().__init__(config, width, token_width, scale)
        inner = config.inner_width
        if inner % config.heads:
            raise XFusionError(f"frame transformer: width {inner} is not a multiple of its {config.heads} heads")
        self.into = nn.Linear(self.feature_width, inner)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(inner, config.heads, config.mlp, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(config.depth)
        )
        self.norm, self.project = nn.LayerNorm(inner), nn.Linear(inner, width)
        nn.init.normal_(self.project.weight, std=scale / math.sqrt(inner))
        nn.init.zeros_(self.project.bias)

    def connect(self, media: MediaRows) -> Tensor:
        """All kept features of an item at once."""
        items = gather_features(self, media)
        x = self.into(items.features[:, :: self.config.cells])
        present = items.present[:, :: self.config.cells]
        # A softmax needs a key, even for an item without rows in this pass.
        present = present | ~present.any(dim=1, keepdim=True)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~present)
        return scatter_states(self.project(self.norm(x)), items, media)
