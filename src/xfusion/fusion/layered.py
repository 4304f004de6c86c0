"""Several mechanisms in one model, each at its own layers, so that a recipe can define a hybrid.

Every layer belongs to at most one mechanism, so they can share cache slots. At layers that belong to none, the frozen layer
computes text and media states pass unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.fusion.base import REGIMES, Call, Fusion, Pass


class Layered(Fusion):
    """A list of fusions over disjoint ranges of layers."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """The mechanisms, each with its own ``layers``."""

        parts: tuple[Fusion.Config, ...] = ()
        """Mechanisms with disjoint ``layers``; stride and offset count within each range."""

        def sizes(self, num_layers: int) -> Iterator[Layered.Config]:
            """None: its parts have their own sizes."""
            del num_layers
            yield from ()

        def build(self) -> Layered:
            """The fusion, not yet installed."""
            ranges = [part.layers for part in self.parts]
            if not ranges or None in ranges:
                raise XFusionError(f"layered: give each of the {len(ranges)} mechanisms its layers=(first, end)")
            sorted_ranges = sorted(r for r in ranges if r is not None)
            for (_, end), (first, next_end) in pairwise(sorted_ranges):
                if first < end:
                    raise XFusionError(
                        f"layered: layers {first} to {next_end} begin before {end}: ranges must not overlap"
                    )
            return Layered(self)

    def __init__(self, config: Config):
        super().__init__(config)
        self.parts = nn.ModuleList(part.build() for part in config.parts)
        fusions: list[Any] = list(self.parts)
        self.preserves_text = all(part.preserves_text for part in fusions)
        self.prefix_is_constant = all(part.prefix_is_constant for part in fusions)
        self.reads_ahead = any(part.reads_ahead for part in fusions)
        self.num_towers = max(part.num_towers for part in fusions)
        self.joins_attention = any(part.joins_attention for part in fusions)

    def install(self, backbone: Backbone) -> None:
        """Install each mechanism at its layers."""
        self.windows = [backbone.window(i) for i in range(backbone.num_layers)]
        self.owner: dict[int, Any] = {}
        for part in self._fusions():
            part.install(backbone)
            first, end = part.config.layers
            self.owner |= dict.fromkeys(range(first, end), part)

    def begin(self, backbone: Backbone) -> None:
        """Load the weights that each mechanism starts from."""
        for part in self._fusions():
            part.begin(backbone)
        self.taken = {index: sources for part in self._fusions() for index, sources in part.taken.items()}

    def _fusions(self) -> list[Any]:
        return list(self.parts)

    @property
    def regime(self) -> str:
        """The regime of the mechanism that trains most of the base."""
        return max((part.regime for part in self._fusions()), key=REGIMES.index)

    def keeps(self, index: int) -> bool:
        """Answered by the mechanism that owns the layer."""
        return index not in self.owner or self.owner[index].keeps(index)

    @contextmanager
    def unadapted(self) -> Iterator[None]:
        """Inside the ``with`` block no mechanism's deltas apply."""
        with ExitStack() as stack:
            for part in self._fusions():
                stack.enter_context(part.unadapted())
            yield

    def set_attention(self, implementation: str) -> None:
        """Choose the attention implementation of all mechanisms."""
        for part in self._fusions():
            part.set_attention(implementation)

    def block_widths(self) -> dict[int, int]:
        """Block widths of all mechanisms; each must have blocks."""
        return {
            index: width
            for part in self._fusions()
            for index, width in part.block_widths().items()
            if self.owner.get(index) is part
        }

    @property
    def state_layers(self) -> tuple[int, ...]:
        """The layers at which the mechanism that owns them computes media."""
        layers = {i for part in self._fusions() for i in part.state_layers if self.owner.get(i) is part}
        return tuple(sorted(layers))

    def new_modules(self, index: int) -> list[nn.Module]:
        """The new modules of the mechanism that owns the layer."""
        return self.owner[index].new_modules(index) if index in self.owner else []

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Computed by the mechanism that owns the layer."""
        if index in self.owner:
            return self.owner[index].layer(index, frozen, call, run)
        return self.frozen_layer(index, frozen, call, run)

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The reference path of the mechanism that owns the layer."""
        if index in self.owner:
            return self.owner[index].reference_layer(index, frozen, call, run)
        return self.frozen_reference(index, frozen, call, run)

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: Call) -> Tensor:
        """The text-only layer of the mechanism that owns the layer."""
        return self.owner[index].text_layer(index, frozen, x, call) if index in self.owner else frozen(x, **call)
