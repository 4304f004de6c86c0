"""Media tokens at the input of the frozen decoder, as if they were words (features: LLaVA, BLIP-2, Qwen-VL; codes: TEAL).

    X = [Emb(words); C(Enc(m)); Emb(words)],  H_out = F(X)    with every layer F frozen

All that is new stands in the media port: a connector C from the features of a frozen encoder to the model's width, or
rows for codes. The
frozen layers compute media rows as they compute words, so training goes back through all of them.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``D`` model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.fusion.base import Call, Fusion, Pass


class Prefix(Fusion):
    """Frozen layers for all rows, and nothing beside them."""

    preserves_text = True
    prefix_is_constant = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """Nothing to set: the mechanism has no blocks."""

        def sizes(self, num_layers: int) -> Iterator[Prefix.Config]:
            """None: its weights are the connector's."""
            del num_layers
            yield from ()

        def build(self) -> Prefix:
            """The fusion, not yet installed."""
            if (self.stride, self.offset, self.layers) != (1, None, None):
                raise XFusionError(
                    f"prefix: stride {self.stride}, offset {self.offset}, layers {self.layers}, but it has no blocks to"
                    " place: leave them out"
                )
            return Prefix(self)

    def install(self, backbone: Backbone) -> None:
        """Learn the shape of the base; there is nothing to make."""
        self.windows = [backbone.window(i) for i in range(backbone.num_layers)]

    def set_attention(self, implementation: str) -> None:
        """Nothing is its own: the frozen layers say which attention they use."""

    @property
    def state_layers(self) -> tuple[int, ...]:
        """All of them: media rows go through every frozen layer."""
        return tuple(range(len(self.windows)))

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Fast path: text that is given is looked up, all other rows are computed at once."""
        return run.states | self.tower(0, index, frozen, run.states, call, run)

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The frozen block on the whole sequence."""
        return self.whole(index, frozen, call, run)
