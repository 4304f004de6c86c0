"""Input and output of media tokens: the same for every fusion, so that compared fusions differ only in the fusion itself.

Shape legend: ``B`` batch row, ``n`` media rows, ``D`` model width, ``P`` width of a media token, ``N`` media items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.data.sequence import MediaRows, XFusionError

TIME_FREQUENCIES = 128
"""Number of sine and cosine pairs in the embedding of a noise level."""


def sinusoids(time: Tensor) -> Tensor:
    """Noise levels ``[N]`` in [0, 1] -> their sines and cosines ``[N, 2 TIME_FREQUENCIES]``."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(TIME_FREQUENCIES, device=time.device) / TIME_FREQUENCIES)
    angle = 1000 * time[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class MediaPort(nn.Module):
    """Linear patch embedding in (X-Fusion, arXiv 2504.20996), noise level, positions, boundary rows, head out.

    The noise level is embedded as MLP(sinusoid(t)), with t = 0 for clean items. It is added to item tokens, or modulates them
    before every layer with new modules, or modulates the branches inside every new block. [BOI] gets none, so that its keys
    and values stay the same while an item is denoised. Row and column embeddings are added.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Positions and noise levels of media tokens."""

        largest_grid: int = 64
        """Number of row and of column position embeddings."""
        time: Literal["add", "modulate", "adaln", "adaln single"] = "add"
        """How the noise level enters. ``add`` adds it to the tokens. ``modulate`` scales and shifts them before each new
        block, ``x + s norm(x) + b``, with s and b from one projection and a row per layer. The others scale and shift the
        inputs of attention and MLP in each new block and scale their outputs (`xfusion.layers.modulated`): ``adaln`` with a
        projection per layer (AdaLN-Zero of DiT, arXiv 2212.09748), ``adaln single`` with one projection and a row per layer
        (PixArt, arXiv 2310.00426). All start at zero; a gate is then 1, not 0 as in DiT, so copied blocks work unchanged."""

        def build(self, width: int, token_width: int, scale: float, num_layers: int) -> MediaPort:
            """The port of a model.

            Args:
                width: model width.
                token_width: width of a media token.
                scale: standard deviation of the base's own embeddings.
                num_layers: number of layers of the base.
            """
            return MediaPort(self, width, token_width, scale, num_layers)

    def __init__(self, config: Config, width: int, token_width: int, scale: float, num_layers: int):
        super().__init__()
        self.config = config
        self.project = nn.Linear(token_width, width)
        self.time = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.row = nn.Embedding(config.largest_grid, width)
        self.column = nn.Embedding(config.largest_grid, width)
        self.begin = nn.Parameter(torch.empty(width))
        self.end = nn.Parameter(torch.empty(width))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, token_width)
        # New rows start at the scale of the frozen embedding, which the copied blocks are used to.
        nn.init.normal_(self.project.weight, std=scale / math.sqrt(token_width))
        nn.init.zeros_(self.project.bias)
        for table in (self.row.weight, self.column.weight, self.begin, self.end):
            nn.init.normal_(table, std=scale)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if config.time == "modulate":
            self.modulation = nn.Linear(width, 2 * width)
            self.by_layer = nn.Parameter(torch.zeros(num_layers, 2 * width))
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def check_grid(self, rows: int, columns: int) -> None:
        """Check that there are enough position embeddings for a picture of so many tokens.

        Raises:
            XFusionError: there are fewer.
        """
        if max(rows, columns) > self.config.largest_grid:
            raise XFusionError(
                f"a picture of {rows} x {columns} tokens, but the port has positions for {self.config.largest_grid} rows and"
                " columns: set its largest_grid to as many, or take larger patches"
            )

    @property
    def modulates_blocks(self) -> bool:
        """Whether the noise level acts inside the new blocks."""
        return self.config.time in ("adaln", "adaln single")

    def add_block_modulation(self, widths: Mapping[int, int]) -> None:
        """Create the modulation inside blocks (`modulates_blocks`); call after a fusion's `install`.

        Args:
            widths: layer -> model width of its block.
        """
        single = self.config.time == "adaln single"
        inputs, device = self.norm.weight.shape[0], self.norm.weight.device
        # One projection for all blocks of a width, or one for each block.
        self._projection = {
            index: f"width_{block_width}" if single else str(index) for index, block_width in widths.items()
        }
        self.block_modulation = nn.ModuleDict(
            {name: nn.Linear(inputs, 6 * widths[index], device=device) for index, name in self._projection.items()}
        )
        for parameter in self.block_modulation.parameters():
            nn.init.zeros_(parameter)
        rows = {
            str(i): nn.Parameter(torch.zeros(6 * block_width, device=device))
            for i, block_width in widths.items()
            if single
        }
        self.by_block = nn.ParameterDict(rows)

    def embed_time(self, time: Tensor) -> Tensor:
        """Noise levels ``[N]`` in [0, 1] -> ``[N, D]``."""
        return self.time(sinusoids(time))

    def forward(self, media: MediaRows) -> Tensor:
        """Media rows -> input states ``[B, n, D]``."""
        x = self.project(media.tokens) + self.row(media.grid_row) + self.column(media.grid_column)
        if self.config.time == "add":
            x = x + _of_items(self.embed_time(media.time), media).to(x.dtype)
        return torch.where(media.boundary[..., None], self.begin.to(x.dtype), x)

    def before_layer(self, index: int, x: Tensor, media: MediaRows) -> Tensor:
        """Input states ``[B, n, D]`` of a layer with new modules, modulated if configured."""
        if self.config.time != "modulate":
            return x
        scale_and_shift = self.modulation(functional.silu(self.embed_time(media.time))) + self.by_layer[index]
        scale, shift = _of_items(scale_and_shift, media).to(x.dtype).chunk(2, dim=-1)
        modulated_states = x + scale * functional.rms_norm(x, x.shape[-1:]) + shift
        return torch.where((media.item >= 0)[..., None], modulated_states, x)

    def modulation_in_block(self, index: int, media: MediaRows, dtype: torch.dtype) -> Tensor | None:
        """Modulation of a layer's block at media rows (`xfusion.layers.modulated`), ``[B, n, 6, W]``: zeros at [BOI] and
        padding. None if the noise level does not act inside blocks.
        """
        if not self.modulates_blocks:
            return None
        modulation = self.block_modulation[self._projection[index]](functional.silu(self.embed_time(media.time)))
        if str(index) in self.by_block:
            modulation = modulation + self.by_block[str(index)]
        rows = _of_items(modulation.to(dtype), media).unflatten(-1, (6, -1))
        return torch.where((media.item >= 0)[..., None, None], rows, 0.0)

    def readout(self, hidden: Tensor) -> Tensor:
        """Hidden states of media rows ``[B, n, D]`` -> the media objective's prediction ``[B, n, P]``."""
        return self.head(self.norm(hidden.to(self.norm.weight.dtype)))


def _of_items(values: Tensor, media: MediaRows) -> Tensor:
    """Values of items ``[N, W]`` gathered at their rows ``[B, n, W]``; rows without an item get the first item's."""
    if not len(values):  # a process that holds only filler rows; the sum keeps its shards in the backward pass
        return values.new_zeros((*media.item.shape, values.shape[1])) + values.sum()
    # The backward pass of an embedding is one kernel; that of indexing goes entry by entry.
    return functional.embedding(media.item.clamp(min=0), values)
