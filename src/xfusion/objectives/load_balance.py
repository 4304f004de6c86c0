"""The load-balancing loss of sparse experts (Switch, arXiv 2101.03961; MoE-LLaVA, 2401.15947).

    L = sum over layers of  E sum_i F_i G_i

where F_i is the share of tokens whose first choice is expert i and G_i the mean probability of i. It is 1 per layer if both
are uniform, and E if all tokens go to one expert. Only G has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from xfusion.data.sequence import Batch, XFusionError
from xfusion.objectives.base import Losses, Objective, Run


class LoadBalance(Objective):
    """Spreads tokens evenly over the experts of each layer."""

    name = "load_balance"
    scope = "batch"

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """Weight of the loss."""

        weight: float = 0.01
        """Weight of this loss in the sum; the default is MoE-LLaVA's."""

        def build(self) -> LoadBalance:
            """The objective."""
            return LoadBalance(self)

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.weight = config, config.weight

    def count(self, batch: Batch) -> dict[str, int]:
        """One per batch, since shares are computed over a batch."""
        return {self.name: 1} if batch.media else {}

    def loss(self, run: Run, batch: Batch) -> Losses:
        """The loss of a batch, summed over its layers.

        Raises:
            XFusionError: no layer has a router.
        """
        if not batch.media:
            return {}
        states = run(batch).states
        if not any(name.startswith("router.") for name in states):
            raise XFusionError(
                "load_balance: no layer has a router: take sparse experts as the fusion, or leave this objective out"
            )
        routers = [p for name, p in states.items() if name.startswith("router.") and len(p)]
        if not routers:
            return {}
        return {self.name: (torch.stack([balance(p) for p in routers]).sum(), torch.tensor(1))}


def balance(probability: Tensor) -> Tensor:
    """``E sum_i F_i G_i`` of a router's probabilities ``[r, E]``."""
    num_experts = probability.shape[-1]
    first_choice_share = functional.one_hot(probability.argmax(-1), num_experts).to(probability.dtype).mean(0)
    return num_experts * (first_choice_share * probability.mean(0)).sum()
