"""The contract of an objective: corrupt, loss and sample in one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from xfusion.data.sequence import Batch
from xfusion.modalities.base import Encoder
from xfusion.objectives.solvers import Solver


@dataclass(kw_only=True)
class Output:
    """What a forward pass gives the objectives."""

    logits: Callable[[Tensor], Tensor]
    """Vocabulary logits of chosen text positions: bool ``[B, n]`` in, ``[k, V]`` out. Nothing else is multiplied by the head."""
    vocabulary: Callable[[Tensor], Tensor]
    """The same head on states that an objective made itself, as behind the last norm: ``[k, D]`` in, ``[k, V]`` out."""
    media: dict[str, Tensor]
    """Per modality, the media head's prediction at every media row, ``[B, n, Q]``; empty for a model that cannot draw."""
    states: dict[str, Tensor] = field(default_factory=dict)
    """What objectives asked for by `Objective.needs`, ``[B, n, D]`` by name."""


Run = Callable[[Batch], Output]
"""One forward pass on a batch; the same batch object is run once."""

Losses = dict[str, tuple[Tensor, Tensor]]
"""Name -> sum and count. The training loop divides by the global count."""


class Drawer(Protocol):
    """What an objective draws with: one item per context, guidance included. An objective walks one of two ways.

    ``N`` items of ``M`` tokens; ``Q`` is the width of the port's head.
    """

    def __call__(self, x: Tensor, time: float) -> Tensor:
        """The head at all tokens ``[N, M, P]`` of the items at a noise level -> ``[N, M, Q]``; leaves no trace."""
        ...

    def following(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """The head at the last position once ``tokens`` ``[N, k, P]`` stand behind those given before -> ``[N, Q]``.

        With ``k`` of 0, the first call, it is what [BOI] says of the first token. Tokens come in reading order, or
        ``places`` ``[k]`` says which of an item's tokens each is, below 0 none.
        """
        ...


class Objective(nn.Module):
    """What is learned from a batch, and how it is sampled. It may own weights, which are trained and saved."""

    name: str
    """Name of its loss."""
    weight: float
    """Factor of its loss in the sum."""
    guidance: float = 1.0
    """Strength of classifier-free guidance that sampling takes where the caller names none; 1 is off."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Noise levels above the first and up to the second at which guidance acts."""
    needs: tuple[str, ...] = ()
    """States that a forward pass must keep: ``text`` and ``media`` behind the last norm, ``text.8`` and ``media.8`` behind
    the eighth layer."""
    scope: Literal["item", "batch"] = "item"
    """Whether the loss of an item depends on the other items of its batch; such a loss cannot be accumulated. A step's
    drawings are one batch and its captionings another."""
    across_processes: bool = False
    """Whether a loss of scope ``batch`` compares the items of all processes that share a step: `loss` then waits for the
    others, and is called for a process without items, too."""
    encoders: tuple[Encoder.Config, ...] = ()
    """Frozen encoders that it learns from."""
    gives: frozenset[str] = frozenset()
    """What a model can do that was trained by it, of ``caption``, ``draw``, ``embed``, ``fill``, ``match``."""

    @property
    def teachers(self) -> frozenset[str]:
        """Fingerprints of the encoders that it learns from: they may not score the model."""
        return frozenset(encoder.fingerprint for encoder in self.encoders)

    @property
    def weights(self) -> dict[str, float]:
        """Factors of its losses in the sum, by name; most objectives have one."""
        return {self.name: self.weight}

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

    def check(self, modality: Any) -> None:
        """Refuse a modality that cannot be learned with these settings; asked before training, and not of a pack that is loaded.

        Raises:
            XFusionError: it cannot.
        """
        del modality

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch as the model shall see it in training; by default unchanged."""
        return batch

    def count(self, batch: Batch) -> dict[str, int]:
        """How many targets a batch holds, by name of loss: known before any forward pass."""
        raise NotImplementedError(type(self).__name__)

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Sums and counts by name; an objective without a target in the batch returns nothing."""
        raise NotImplementedError(type(self).__name__)

    def sample(
        self,
        predict: Drawer,
        noise: Tensor,
        *,
        steps: int,
        known: Tensor | None = None,
        keep: Tensor | None = None,
        solver: Solver | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw items; every objective that gives ``draw`` has it.

        Args:
            predict: the model.
            noise: standard normal ``[N, M, P]``, each item's from its own seed: the only chance that a walk takes.
            steps: how many steps to take, where the objective leaves a choice.
            known: clean tokens ``[N, M, P]`` of which some are kept.
            keep: bool ``[N, M]``, True where ``known`` stands.
            solver: takes the steps; only given where the caller names one, to objectives that walk a flow.

        Yields:
            after every step the tokens ``[N, M, P]`` and the current clean estimate; the last tokens are the sample.
        """
        raise NotImplementedError(type(self).__name__)

    def num_steps(self, steps: int, tokens: int) -> int:
        """How many steps `sample` yields for items of so many tokens, when so many are asked for."""
        del tokens
        return steps


class Denoising(Objective):
    """Squared error of the prediction at noised items that have a loss: a mean per item, weighed by its noise level."""

    gives = frozenset({"draw"})

    def weigh(self, time: Tensor) -> Tensor:
        """Factors ``[N]`` of the items' errors at noise levels ``[N]``."""
        raise NotImplementedError(type(self).__name__)

    def count(self, batch: Batch) -> dict[str, int]:
        """Items that have a loss."""
        return noised_targets(self.name, batch)

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Summed per-item mean squared errors and the number of items."""
        out: Losses = {}
        for modality, media in batch.media.items():
            wanted = media.has_loss & media.noised
            if media.target is None or not bool(wanted.any()):
                continue
            error = (run(batch).media[modality].float() - media.target).square().mean(dim=-1)  # [B, n]
            per_item = media.mean(error) * self.weigh(media.time)
            out[self.name] = (per_item[wanted].sum(), wanted.sum())
        return out


def noised_targets(name: str, batch: Batch) -> dict[str, int]:
    """How many noised items have a loss, under the name of the loss; nothing where there are none."""
    count = sum(int((media.has_loss & media.noised).sum()) for media in batch.media.values())
    return {name: count} if count else {}


class NoObjective(Objective):
    """Nothing is learned: the media objective of a model that only reads pictures. The port needs no head."""

    name = "none"

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """Nothing to set."""

        def build(self) -> NoObjective:
            """The objective."""
            return NoObjective(self)

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.weight = config, config.weight

    def count(self, batch: Batch) -> dict[str, int]:
        """No targets."""
        return {}

    def loss(self, run: Run, batch: Batch) -> Losses:
        """No losses."""
        return {}
