"""The base class of connectors: the media port of a model that only reads media.

Shape legend: ``B`` batch row, ``n`` media rows, ``P`` width of a media token, ``F`` width of a feature, ``D`` model width,
``N`` media items, ``M`` features of an item, ``K`` rows of an item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xfusion.data.sequence import MediaRows, XFusionError
from xfusion.modalities.port import MediaPort


class Connector(MediaPort):
    """Feature inputs between trainable [BOI] and [EOI]; no noise level, no position embeddings of its own, no readout.

    The ``Config`` of a subclass builds it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(MediaPort.Config):
        """How many features a token holds."""

        connector: ClassVar[type[Connector]]
        """The class that it builds."""
        cells: int = 1
        """Features per token: the image modality's `patch_width`, for a `patch` of 1."""

        def build(self, width: int, token_width: int, scale: float, num_layers: int) -> Connector:
            """The connector of a model."""
            del num_layers
            return self.connector(self, width, token_width, scale)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "Config" in vars(cls):
            cls.Config.connector = cls

    def __init__(self, config: Config, width: int, token_width: int, scale: float):
        nn.Module.__init__(self)  # a model that only reads media needs neither noise levels nor a head
        if config.cells < 1 or token_width % config.cells:
            raise XFusionError(
                f"connector: tokens of {token_width} numbers do not hold {config.cells} features: set cells to the"
                " image modality's patch_width"
            )
        if config.time != "add":
            raise XFusionError(
                f"connector: what it reads has no noise level: leave the port's time at 'add', not {config.time!r}"
            )
        self.config, self.feature_width = config, token_width // config.cells
        self.begin = nn.Parameter(torch.randn(width) * scale)
        self.end = nn.Parameter(torch.randn(width) * scale)

    def connect(self, media: MediaRows) -> Tensor:
        """Media rows -> states ``[B, n, D]`` at tokens; values elsewhere are ignored."""
        raise NotImplementedError(type(self).__name__)

    def forward(self, media: MediaRows) -> Tensor:
        """Media rows -> input states ``[B, n, D]``."""
        x = self.connect(media)
        return torch.where(media.boundary[..., None], self.begin.to(x.dtype), x)

    def check_grid(self, rows: int, columns: int) -> None:
        """Accept any number of tokens: they have no position embeddings."""

    def before_layer(self, index: int, x: Tensor, media: MediaRows) -> Tensor:
        """The input states of a layer, unchanged."""
        del index, media
        return x

    def readout(self, hidden: Tensor) -> Tensor:
        """The states themselves: media are not predicted."""
        return hidden

    def split(self, tokens: Tensor) -> Tensor:
        """Tokens ``[..., P]`` (channels first, as patches are) -> their features ``[..., cells, F]``."""
        return tokens.unflatten(-1, (self.feature_width, self.config.cells)).transpose(-1, -2)


@dataclass(frozen=True)
class ItemFeatures:
    """The features of each item, and the positions of its rows."""

    features: Tensor
    """``[N, M, F]``, zero-padded."""
    present: Tensor
    """Which features exist (are not padding), bool ``[N, M]``."""
    position: Tensor
    """Index of each row within its item, int64 ``[B, n]``; 0 at [BOI] and padding."""


def gather_features(connector: Connector, media: MediaRows) -> ItemFeatures:
    """The rows of a batch grouped by item, for connectors that process a whole item at once."""
    order, count = media.rows.order, len(media.noised)
    item = torch.where(media.item >= 0, media.item, count)  # rows of no item go to an extra one, which is dropped
    first = torch.full((count + 1,), torch.iinfo(torch.int64).max, device=order.device)
    first = first.scatter_reduce(0, item.flatten(), order.flatten(), "amin")
    position = torch.where(media.item >= 0, order - first[item], 0)
    # Meta tensors, used to count costs, do not hold the size of the largest item: assume that all items have equal sizes.
    rows = (
        order.numel() // max(count, 1) - 1 if position.is_meta else int(position.max()) + 1 if position.numel() else 0
    )
    tokens = media.tokens.new_zeros(count + 1, rows, media.tokens.shape[-1]).index_put((item, position), media.tokens)[
        :-1
    ]
    present = torch.zeros(count + 1, rows, dtype=torch.bool, device=order.device)
    present = present.index_put((item, position), media.item >= 0)[:-1]
    cells = connector.config.cells
    return ItemFeatures(connector.split(tokens).flatten(1, 2), present.repeat_interleave(cells, dim=1), position)


def scatter_states(states: Tensor, items: ItemFeatures, media: MediaRows) -> Tensor:
    """Place the items' states ``[N, K, D]`` at their rows, ``[B, n, D]``.

    Raises:
        XFusionError: an item has more rows than there are states.
    """
    rows = int(items.position.max()) + 1 if items.position.numel() and not items.position.is_meta else 0
    if rows > states.shape[1]:
        raise XFusionError(
            f"connector: an item has {rows} rows, but the connector makes {states.shape[1]} states: choose patch_width"
            " and cells so that an item has as many tokens"
        )
    return states[media.item.clamp(min=0), items.position]
