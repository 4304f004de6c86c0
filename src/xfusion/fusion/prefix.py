"""Media tokens at the input of the frozen decoder, as if they were words (features: LLaVA, BLIP-2, Qwen-VL; codes: TEAL).

    X = [Emb(words); C(Enc(m)); Emb(words)],  H_out = F(X)    with every layer F frozen

All that is new stands in the media port: a connector C from the features of a frozen encoder to the model's width, or
rows for codes. The
frozen layers compute media rows as they compute words, so training goes back through all of them.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``D`` model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from xfusion.fusion.base import Call, Pass, WithoutBlocks


class Prefix(WithoutBlocks):
    """Frozen layers for all rows, and nothing beside them."""

    preserves_text = True
    prefix_is_constant = True

    @dataclass(frozen=True, kw_only=True)
    class Config(WithoutBlocks.Config):
        """Nothing to set: the mechanism has no blocks."""

        def build(self) -> Prefix:
            """The fusion, not yet installed."""
            self.refuse_places("prefix")
            return Prefix(self)

    @property
    def state_layers(self) -> tuple[int, ...]:
        """All of them: media rows go through every frozen layer."""
        return tuple(range(len(self.windows)))

    @property
    def exports(self) -> tuple[str, ...]:
        """Its models of vision and of sound."""
        return ("transformers",)

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Fast path: text that is given is looked up, all other rows are computed at once."""
        return run.states | self.tower(0, index, frozen, run.states, call, run)

    def media_block(self, index: int, frozen: nn.Module) -> nn.Module:
        """The frozen one."""
        del index
        return frozen

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The frozen block on the whole sequence."""
        return self.whole(index, frozen, call, run)
