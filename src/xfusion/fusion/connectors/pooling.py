"""The mean of neighbouring features, then one matrix: Qwen-Audio's pooled frames (arXiv 2311.07919, section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from xfusion.data.sequence import MediaRows
from xfusion.fusion.connectors.base import Connector


class Pooling(Connector):
    """``h = W mean(z_1 ... z_cells) + b`` over the features of each token."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """No further settings; `cells` counts all features of a token, including those of a square patch."""

    def __init__(self, config: Config, width: int, token_width: int, scale: float):
        super().__init__(config, width, token_width, scale)
        self.project = nn.Linear(self.feature_width, width)
        nn.init.normal_(self.project.weight, std=scale / math.sqrt(self.feature_width))
        nn.init.zeros_(self.project.bias)

    def connect(self, media: MediaRows) -> Tensor:
        """Each token separately."""
        return self.project(self.split(media.tokens).mean(dim=-2))
