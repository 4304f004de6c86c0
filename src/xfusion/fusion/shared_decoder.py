"""One decoder for text and media: X-Fusion's single tower (arXiv 2504.20996, figure 3 a), Transfusion (2408.11039).

    H_out = F(E)    with F initialised from the language model and trained

The trained blocks are copies: the frozen model itself is never changed, and a pack stores the copies. Text passes through
them too, so it is not preserved; this mechanism is there for comparison. With ``stride`` k every k-th layer has a trained
block; at the other layers the frozen layer computes text and media states pass unchanged, as in the other mechanisms.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from xfusion.fusion.base import Call, Fusion, Pass


class SharedDecoder(Fusion):
    """Trained copies of decoder layers for all positions."""

    media_blocks = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """Which layers are trained."""

        def build(self) -> SharedDecoder:
            """The fusion, not yet installed."""
            return SharedDecoder(self)

    def keeps(self, index: int) -> bool:
        """False at layers with a trained copy."""
        return str(index) not in self.blocks

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The trained block over all rows at once."""
        block = self.block(index, frozen)
        if block is None:
            return self.frozen_layer(index, frozen, call, run)
        return self.tower(0, index, block, run.states, call, run, by_noise=True)

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """The whole block over the whole sequence."""
        block = self.block(index, frozen)
        if block is None:
            return self.frozen_reference(index, frozen, call, run)
        return self.whole(index, block, call, run, by_noise=True)

    def text_layer(self, index: int, frozen: nn.Module, x: Tensor, call: Call) -> Tensor:
        """A text-only layer: the trained block if there is one, else the frozen layer."""
        block = self.block(index, frozen)
        return frozen(x, **call) if block is None else block(x.to(next(block.parameters()).dtype), **call).to(x.dtype)
