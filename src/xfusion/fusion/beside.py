"""Media beside the decoder: no layer gets anything new, no word reads a medium, no medium goes through a frozen layer.

    H_text = F(words),    H_media = P(media)

with F the frozen decoder and P the media port, a connector with a transformer of its own perhaps. What joins the two stands above
their states: an objective that owns weights (`xfusion.objectives.masked_words`).

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``D`` model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from xfusion.fusion.base import Call, Pass, WithoutBlocks
from xfusion.layers import run_rows


class Beside(WithoutBlocks):
    """Words through the frozen layers alone; media states stay what the port made of them."""

    preserves_text = True
    prefix_is_constant = True

    @dataclass(frozen=True, kw_only=True)
    class Config(WithoutBlocks.Config):
        """Nothing to set: there are no blocks."""

        def build(self) -> Beside:
            """The fusion, not yet installed."""
            self.refuse_places("beside")
            return Beside(self)

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
