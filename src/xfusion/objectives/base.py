"""The contract of an objective: corrupt, loss and sample in one file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xfusion.data.sequence import Batch


@dataclass(kw_only=True)
class Output:
    """What a forward pass gives the objectives."""

    logits: Callable[[Tensor], Tensor]
    """Vocabulary logits of chosen text positions: bool ``[B, n]`` in, ``[k, V]`` out. Nothing else is multiplied by the head."""
    media: dict[str, Tensor]
    """Per modality, the media head's prediction at every media row, ``[B, n, P]``."""


Run = Callable[[Batch], Output]
"""One forward pass on a batch; the same batch object is run once."""

Losses = dict[str, tuple[Tensor, Tensor]]
"""Name -> sum and count. The training loop divides by the global count."""


class Objective:
    """What is learned from a batch, and how it is sampled."""

    name: str
    weight: float
    guidance: float = 1.0
    """Strength of classifier-free guidance that sampling takes where the caller names none; 1 is off."""

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch as the model shall see it in training; by default unchanged."""
        return batch

    def count(self, batch: Batch) -> dict[str, int]:
        """How many targets a batch holds, by name of loss: known before any forward pass."""
        raise NotImplementedError(type(self).__name__)

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Sums and counts by name; an objective without a target in the batch returns nothing."""
        raise NotImplementedError(type(self).__name__)
