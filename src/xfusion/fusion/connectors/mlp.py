"""Two matrices with GELU between them: ``H = W2 gelu(W1 Z)`` (LLaVA-1.5, arXiv 2310.03744, section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from xfusion.data.sequence import MediaRows
from xfusion.fusion.connectors.base import Connector


class MLP(Connector):
    """An MLP on each token, with the model's width as hidden width (`mlp2x_gelu`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Connector.Config):
        """No further settings."""

    def __init__(self, config: Config, width: int, token_width: int, scale: float):
        super().__init__(config, width, token_width, scale)
        self.into, self.out = nn.Linear(token_width, width), nn.Linear(width, width)
        nn.init.normal_(self.into.weight, std=1 / math.sqrt(token_width))
        nn.init.normal_(self.out.weight, std=scale / math.sqrt(width / 2))  # GELU halves the second moment
        for bias in (self.into.bias, self.out.bias):
            nn.init.zeros_(bias)

    def connect(self, media: MediaRows) -> Tensor:
        """Each token separately."""
        return self.out(functional.gelu(self.into(media.tokens)))
