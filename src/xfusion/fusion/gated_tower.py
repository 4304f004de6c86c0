"""X-Fusion's gated tower (arXiv 2504.20996, figure 3 b): a trainable copy of a layer whose output is added through a gate.

    H_out = F_txt(E) + gamma F_gate(E)    with gamma = 0 at the start (after Flamingo, arXiv 2204.14198)

Both blocks see the whole mixed sequence. The paper reports unchanged text scores, so the gate cannot act on text alone:
here it acts from the first media token of a sequence on. With ``stride`` k every k-th layer has a gated block; media
states pass the other layers unchanged, as in the other mechanisms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xfusion.backbone import Backbone
from xfusion.fusion.base import Call, Fusion, Pass


class GatedTower(Fusion):
    """The frozen layer for all positions, plus a gated trainable copy of it."""

    preserves_text = True
    prefix_is_constant = True
    media_blocks = True
    num_towers = 2

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """Which layers have a gated copy."""

        def build(self) -> GatedTower:
            """The fusion, not yet installed."""
            return GatedTower(self)

    def install(self, backbone: Backbone) -> None:
        """Copy the frozen layers, each with a closed gate."""
        super().install(backbone)
        self.gates = nn.ParameterDict({str(index): nn.Parameter(torch.zeros(())) for index in self.state_layers})

    def layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Both blocks for every row; the gated one computes text only if some of it comes after a picture."""
        block = self.block(index, frozen)
        if block is None:
            return self.frozen_layer(index, frozen, call, run)
        frozen_states = self.tower(0, index, frozen, run.states, call, run)
        gated_owners = {o for o in run.rows if o != "text" or run.text_reads_media}
        gated_states = self.tower(1, index, block, gated_owners, call, run, by_noise=True)
        return run.states | frozen_states | self._add_gated(index, run, frozen_states, gated_states)

    def _add_gated(
        self, index: int, run: Pass, frozen_states: dict[str, Tensor], gated_states: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        gate = self.gates[str(index)]
        return {
            owner: torch.where(
                run.after_media(owner), (frozen_states[owner] + gate * h).to(h.dtype), frozen_states[owner]
            )
            for owner, h in gated_states.items()
        }

    def reference_layer(self, index: int, frozen: nn.Module, call: Call, run: Pass) -> dict[str, Tensor]:
        """Both whole blocks over the whole sequence, added."""
        block = self.block(index, frozen)
        if block is None:
            return self.frozen_reference(index, frozen, call, run)
        frozen_states = self.whole(index, frozen, call, run)
        return self._add_gated(index, run, frozen_states, self.whole(index, block, call, run, by_noise=True))
