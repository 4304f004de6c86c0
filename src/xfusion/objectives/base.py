"""The contract of an objective: corrupt, loss and sample in one file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from xfusion.data.sequence import Batch


@dataclass(kw_only=True)
class Output:
    """What a forward pass gives the objectives."""

    logits: Callable[[Tensor], Tensor]
    """Vocabulary logits of chosen text positions: bool ``[B, n]`` in, ``[k, V]`` out. Nothing else is multiplied by the head."""
    media: dict[str, Tensor]
    """Per modality, the media head's prediction at every media row, ``[B, n, P]``."""
    states: dict[str, Tensor] = field(default_factory=dict)
    """What objectives asked for by `Objective.needs`, ``[B, n, D]`` by name."""


Run = Callable[[Batch], Output]
"""One forward pass on a batch; the same batch object is run once."""

Losses = dict[str, tuple[Tensor, Tensor]]
"""Name -> sum and count. The training loop divides by the global count."""


class Objective(nn.Module):
    """What is learned from a batch, and how it is sampled. It may own weights, which are trained and saved."""

    name: str
    """Name of its loss."""
    weight: float
    """Factor of its loss in the sum."""
    guidance: float = 1.0
    """Strength of classifier-free guidance that sampling takes where the caller names none; 1 is off."""
    needs: tuple[str, ...] = ()
    """States that a forward pass must keep: ``text`` and ``media`` behind the last norm, ``text.8`` and ``media.8`` behind
    the eighth layer."""
    scope: Literal["item", "batch"] = "item"
    """Whether the loss of an item depends on the other items of its step; such a loss cannot be accumulated."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of an objective; `build` makes it."""

        weight: float = 1.0
        """Factor of this loss in the sum."""

        def build(self) -> Objective:
            """The objective."""
            raise TypeError(f"{type(self).__qualname__} does not say which objective it builds")

        def adapted(self, trained: Any) -> Self:
            """These settings for weights that were trained by others: what the weights mean is theirs."""
            del trained
            return self

    def install(self, width: int, modality: Any) -> None:
        """Make the objective's own weights for a model of this width and its modality; most have none."""

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch as the model shall see it in training; by default unchanged."""
        return batch

    def count(self, batch: Batch) -> dict[str, int]:
        """How many targets a batch holds, by name of loss: known before any forward pass."""
        raise NotImplementedError(type(self).__name__)

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Sums and counts by name; an objective without a target in the batch returns nothing."""
        raise NotImplementedError(type(self).__name__)
