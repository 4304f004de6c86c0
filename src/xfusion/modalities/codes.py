"""Input and output of codes: their own rows next to the frozen embedding and the frozen LM head.

    E' = [E_text (frozen); E_codes]        logits = [O_text n_text(h) (frozen); O_codes n(h) + b]

(TEAL, arXiv 2311.04589; DALL-E, arXiv 2102.12092), with h the states after the last layer, n_text the base's last norm, n a norm
of the codes' own, and a bias b unless the output rows are tied (O_codes = E_codes); as published, both read the same normed
states, without a bias. Each position of the sequence belongs to text or to a medium and may only predict tokens of its own kind:
the other logits are minus infinity (DALL-E's segment masks). The joint softmax is then the softmax over the position's own rows,
and only this is computed. Text cannot be predicted inside a picture, nor codes inside text, and the frozen tables are neither
copied nor changed.

Shape legend: ``B`` batch row, ``n`` media rows, ``D`` model width, ``P`` codes per token, ``K`` entries of a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xfusion.data.sequence import MediaRows, XFusionError
from xfusion.modalities.port import MediaPort


class CodePort(MediaPort):
    """Code embedding in, logits per code out, row and column embeddings (DALL-E's axial positions), boundary rows.

    A token of ``P`` codes (levels of a residual quantiser, cells of a patch) enters as the sum of their embeddings, with a
    table per slot. Its codes are predicted in parallel, independent of each other given the preceding tokens. Negative codes
    are sentinels (-1 is the first): rows without a position in the picture, which are never predicted.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(MediaPort.Config):
        """Embedding and output rows of codes."""

        entries: int = 512
        """Number of codes of the codec."""
        tied: bool = False
        """Tie the output rows to the input embedding (AudioPaLM, arXiv 2306.12925); otherwise use separate ones (TEAL)."""
        sentinels: int = 0
        """Number of sentinel embeddings that the objective needs (`xfusion.objectives.codes.NextCode`: 2 for infilling)."""

        def build(self, width: int, token_width: int, scale: float, num_layers: int) -> CodePort:
            """The port of a model."""
            if self.time != "add":
                raise XFusionError(
                    f"codes have no noise level that could modulate layers: leave the port's time at 'add', not {self.time!r}"
                )
            return CodePort(self, width, token_width, scale, num_layers)

    def __init__(self, config: Config, width: int, token_width: int, scale: float, num_layers: int):
        super().__init__(config, width, token_width * config.entries, scale, num_layers)
        del self.project, self.time
        self.tied = config.tied
        if self.tied:
            del self.head
        self.entries, self.sentinels, self.slots = config.entries, config.sentinels, token_width
        self.table = nn.Embedding(token_width * config.entries + config.sentinels, width)
        nn.init.normal_(self.table.weight, std=scale / math.sqrt(token_width))

    def forward(self, media: MediaRows) -> Tensor:
        """Codes ``[B, n, P]`` -> input states ``[B, n, D]``."""
        codes = media.tokens.round().long()
        if not codes.is_meta and codes.numel():
            low, high = (int(bound) for bound in codes.aminmax())
            if high >= self.entries or low < -self.sentinels:
                raise XFusionError(
                    f"the port knows codes {-self.sentinels} to {self.entries - 1}, but these go from {low} to {high}: set"
                    " its entries to the codec's, and its sentinels to the objective's"
                )
        slot = self.entries * torch.arange(self.slots, device=codes.device)
        x = self.table(codes.clamp(min=0) + slot).sum(-2)
        x = x + self.row(media.grid_row) + self.column(media.grid_column)
        if self.sentinels:
            sentinel = (-1 - codes[..., 0]).clamp(min=0)
            x = torch.where(codes[..., :1] < 0, self.table(self.slots * self.entries + sentinel), x)
        return torch.where(media.boundary[..., None], self.begin.to(x.dtype), x)

    def readout(self, hidden: Tensor) -> Tensor:
        """Hidden states of media rows ``[B, n, D]`` -> logits of the next token's codes, ``[B, n, P * K]``."""
        x = self.norm(hidden.to(self.norm.weight.dtype))
        if not self.tied:
            return self.head(x)
        return x @ self.table.weight[: self.slots * self.entries].T
