"""One matrix and a bias: ``H = W Z + b`` (LLaVA, arXiv 2304.08485, equation 1, which has no b)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from xfusion.data.sequence import MediaRows
from xfusion.fusion.connectors.base import Connector


class Linear(Connector):
    """A linear map of each token."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """No further settings."""

    def __init__(self, config: Config, width: int, token_width: int, scale: float):
        super().__init__(config, width, token_width, scale)
        self.project = nn.Linear(token_width, width)
        # Features of about unit scale are mapped to the scale of the frozen embeddings.
        nn.init.normal_(self.project.weight, std=scale / math.sqrt(token_width))
        nn.init.zeros_(self.project.bias)

    def connect(self, media: MediaRows) -> Tensor:
        """Each token separately."""
        return self.project(media.tokens)
