"""Media beside the decoder: no layer gets anything new, no word reads a medium, no medium goes through a frozen layer.

    H_text = F(words),    H_media = P(media)

with F the frozen decoder and P the media port, a connector with a transformer of its own perhaps. What joins the two stands above
their states: an objective that owns weights (`xfusion.objectives.masked_words`).

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``D`` model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from xfusion.backbone import Backbone
from xfusion.data.sequence import XFusionError
from xfusion.fusion.base import Call, Fusion, Pass
from xfusion.layers import run_rows


class Beside(Fusion):
    """Words through the frozen layers alone; media states stay what the port made of them."""

    preserves_text = True
    prefix_is_constant = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """Nothing to set: there are no blocks."""

        def sizes(self, num_layers: int) -> Iterator[Beside.Config]:
            """None: its weights are the port's and the objectives'."""
            del num_layers
            yield from ()

        def build(self) -> Beside:
            """The fusion, not yet installed."""
            if (self.stride, self.offset, self.layers) != (1, None, None):
                raise XFusionError(
                    f"beside: stride {self.stride}, offset {self.offset}, layers {self.layers}, but it has no blocks to"
                    " place: leave them out"
                )
            return Beside(self)

    def install(self, backbone: Backbone) -> None:
        """Learn the shape of the base; there is nothing to make."""
        self.windows = [backbone.window(i) for i in range(backbone.num_layers)]

    def set_attention(self, implementation: str) -> None:
        """Nothing is its own: the frozen layers say which attention they use."""

    @property
    def state_layers(self) -> tuple[int, ...]:
        """The first: nothing is read there, and states that are looked up at it cost nothing."""
        return (0,)

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Words through the frozen layer, unless they are given: then nobody asks for them."""
        return run.states | self.words_alone(0, index, frozen, call, run)

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The frozen layer on the words."""
        if "text" not in run.states:
            return run.states
        mask = run.mask("text", self.windows[index], of="text")
        return run.states | {"text": run_rows(frozen, run.states["text"], run.calls(call)["text"], mask, [], [])[0]}
