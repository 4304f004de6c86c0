"""Media tokens at the input of the frozen decoder, treated like text (features: LLaVA, BLIP-2, Qwen-VL; codes: TEAL).

    X = [Emb(words); C(Enc(m)); Emb(words)],  H_out = F(X)    with every layer F frozen

All new weights are in the media port: a connector C from the features of a frozen encoder to the model's width, or an
embedding table for codes. The frozen layers process media rows like text, so training backpropagates through all of them.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``D`` model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from xfusion.fusion.base import Call, Pass, WithoutBlocks


class Prefix(WithoutBlocks):
    """All rows pass through the frozen layers; there are no other modules."""

    preserves_text = True
    prefix_is_constant = True

    @dataclass(frozen=True, kw_only=True)
    class Config(WithoutBlocks.Config):
        """No settings: the mechanism has no blocks."""

        def build(self) -> Prefix:
            """The fusion, not yet installed."""
            self.reject_block_placement("prefix")
            return Prefix(self)

    @property
    def state_layers(self) -> tuple[int, ...]:
        """All layers: media rows pass through every frozen layer."""
        return tuple(range(len(self.windows)))

    @property
    def exports(self) -> tuple[str, ...]:
        """transformers, for vision and audio models."""
        return ("transformers",)

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Fast path: cached text is looked up; all other rows are computed at once."""
        return run.states | self.tower(0, index, frozen, run.states, call, run)

    def media_block(self, index: int, frozen: nn.Module) -> nn.Module:
        """The frozen layer."""
        del index
        return frozen

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The frozen block on the whole sequence."""
        return self.whole(index, frozen, call, run)
