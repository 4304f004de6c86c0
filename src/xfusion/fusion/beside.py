"""Media beside the decoder: no layer gets new modules, text does not attend to media, media skip the frozen layers.

    H_text = F(words),    H_media = P(media)

with F the frozen decoder and P the media port, which may be a connector with its own transformer. The two are joined above
their states, by an objective that owns weights (`xfusion.objectives.masked_words`).

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``D`` model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from xfusion.fusion.base import Call, Pass, WithoutBlocks


class Beside(WithoutBlocks):
    """Only text passes through the frozen layers; media states stay as the port produced them."""

    preserves_text = True
    prefix_is_constant = True
    joins_attention = False

    @dataclass(frozen=True, kw_only=True)
    class Config(WithoutBlocks.Config):
        """No settings: there are no blocks."""

        def build(self) -> Beside:
            """The fusion, not yet installed."""
            self.reject_block_placement("beside")
            return Beside(self)

    @property
    def state_layers(self) -> tuple[int, ...]:
        """The first layer: nothing is read there, and looking up states at it costs nothing."""
        return (0,)

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Run the frozen layer on text, unless its states are cached: then it is not needed."""
        return run.states | self.words_alone(0, index, frozen, call, run)

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The frozen layer on text."""
        return run.states | self.words_alone_reference(index, frozen, call, run)
