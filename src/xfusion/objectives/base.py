"""The interface of an objective: corrupt, loss and sample in one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from xfusion.backbone import Backbone
from xfusion.data.sequence import Batch
from xfusion.modalities.base import Encoder
from xfusion.objectives.solvers import Solver


@dataclass(kw_only=True)
class Output:
    """Output of a forward pass, as seen by the objectives."""

    logits: Callable[[Tensor], Tensor]
    """Vocabulary logits of selected text positions: bool ``[B, n]`` in, ``[k, V]`` out. The LM head runs on these only."""
    vocabulary: Callable[[Tensor], Tensor]
    """The same LM head on an objective's own states, in place of final hidden states: ``[k, D]`` in, ``[k, V]`` out."""
    media: dict[str, Tensor]
    """Per modality, the media head's prediction at every media row, ``[B, n, Q]``; empty for a model that cannot draw."""
    states: dict[str, Tensor] = field(default_factory=dict)
    """Hidden states requested by `Objective.needs`, ``[B, n, D]`` by name."""


Run = Callable[[Batch], Output]
"""Runs a forward pass on a batch; the same batch object is run only once."""

Losses = dict[str, tuple[Tensor, Tensor]]
"""Name -> sum and count. The training loop divides by the global count."""


class Drawer(Protocol):
    """The model as used for sampling: one item per context, guidance included. An objective uses one of the two methods.

    ``N`` items of ``M`` tokens; ``Q`` is the width of the port's head.
    """

    def __call__(self, x: Tensor, time: float) -> Tensor:
        """Head output at all tokens ``[N, M, P]`` of the items at a noise level -> ``[N, M, Q]``; changes no state."""
        ...

    def following(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Head output at the last position after appending ``tokens`` ``[N, k, P]`` to the earlier ones -> ``[N, Q]``.

        The first call has ``k`` = 0 and gives the prediction of the first token at [BOI]. Tokens come in reading order, unless
        ``places`` ``[k]`` gives each token's index in its item; an index below 0 is none.
        """
        ...


class Objective(nn.Module):
    """A training loss on a batch and the matching sampler. It may own weights, which are trained and saved."""

    name: str
    """Name of its loss."""
    weight: float
    """Weight of its loss in the sum."""
    guidance: float = 1.0
    """Default classifier-free guidance scale for sampling; 1 is off."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guidance applies at noise levels above the first value and up to the second."""
    needs: tuple[str, ...] = ()
    """Hidden states that a forward pass must return: ``text`` and ``media`` after the last norm, ``text.8`` and ``media.8``
    after the eighth layer."""
    scope: Literal["item", "batch"] = "item"
    """Whether the loss of an item depends on the other items of its batch; if so, gradients cannot be accumulated. The
    drawing samples of a step are one batch and its captioning samples another."""
    across_processes: bool = False
    """Whether a loss of scope ``batch`` compares the items of all processes in a step. `loss` then waits for the other
    processes and is also called on a process without items."""
    encoders: tuple[Encoder.Config, ...] = ()
    """Frozen encoders that it learns from."""
    gives: frozenset[str] = frozenset()
    """Capabilities of a model trained with it, from ``caption``, ``draw``, ``embed``, ``fill``, ``match``."""

    @property
    def teachers(self) -> frozenset[str]:
        """Fingerprints of the encoders that it learns from; these must not score the model."""
        return frozenset(encoder.fingerprint for encoder in self.encoders)

    @property
    def weights(self) -> dict[str, float]:
        """Weights of its losses in the sum, by name; most objectives have one loss."""
        return {self.name: self.weight}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of an objective; `build` creates it."""

        weight: float = 1.0
        """Weight of this loss in the sum."""

        def build(self) -> Objective:
            """The objective."""
            raise TypeError(f"{type(self).__qualname__} does not say which objective it builds")

        def adapted(self, trained: Any) -> Self:
            """These settings, except that those that define the meaning of trained weights come from ``trained``."""
            del trained
            return self

    def attach(self, port: Any, frozen: Callable[[], Backbone]) -> None:
        """Give access to parts of the model outside a forward pass; most objectives need none. Called before `install`.

        Args:
            port: the media port, which trains and saves its weights itself.
            frozen: returns the frozen base, in the precision that the model computes in at the time.
        """
        del port, frozen

    def install(self, width: int, modality: Any) -> None:
        """Create the objective's own weights for a model of this width and its modality; most have none."""

    def check(self, modality: Any) -> None:
        """Refuse a modality that cannot be trained with these settings; called before training, not on loading a pack.

        Raises:
            XFusionError: it cannot be trained.
        """
        del modality

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch as the model sees it in training, such as with noise; unchanged by default."""
        return batch

    def count(self, batch: Batch) -> dict[str, int]:
        """Number of targets in a batch, by name of loss; available before any forward pass."""
        raise NotImplementedError(type(self).__name__)

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Sums and counts by name; empty if the batch has no target for this objective."""
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
        """Draw items; every objective that gives ``draw`` implements it.

        Args:
            predict: the model.
            noise: standard normal ``[N, M, P]``, each item's from its own seed: the only randomness in sampling.
            steps: number of steps, if the objective leaves a choice.
            known: clean tokens ``[N, M, P]``, used where ``keep`` is True.
            keep: bool ``[N, M]``, True where the token of ``known`` is kept.
            solver: the solver, for objectives that integrate a flow; only passed if the caller names one.

        Yields:
            after every step the tokens ``[N, M, P]`` and the current clean estimate; the last tokens are the sample.
        """
        raise NotImplementedError(type(self).__name__)

    def num_steps(self, steps: int, tokens: int) -> int:
        """How many steps `sample` yields for items of ``tokens`` tokens when ``steps`` are requested."""
        del tokens
        return steps


class Denoising(Objective):
    """Squared error of the prediction at noised items that have a loss: a mean per item, weighted by its noise level."""

    gives = frozenset({"draw"})

    def weigh(self, time: Tensor) -> Tensor:
        """Weights ``[N]`` of the items' errors at noise levels ``[N]``."""
        raise NotImplementedError(type(self).__name__)

    def count(self, batch: Batch) -> dict[str, int]:
        """Items that have a loss."""
        return noised_targets(self.name, batch)

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Sum of the per-item mean squared errors, and the number of items."""
        losses: Losses = {}
        for modality, media in batch.media.items():
            is_target = media.has_loss & media.noised
            if media.target is None or not bool(is_target.any()):
                continue
            error = (run(batch).media[modality].float() - media.target).square().mean(dim=-1)  # [B, n]
            per_item = media.mean(error) * self.weigh(media.time)
            add_loss(losses, self.name, per_item[is_target].sum(), is_target.sum())
        return losses


def add_loss(losses: Losses, name: str, total: Tensor, count: Tensor) -> None:
    """Add one modality's sum and count to those of the others, as `Objective.count` does."""
    others = losses.get(name)
    losses[name] = (total, count) if others is None else (others[0] + total, others[1] + count)


def noised_targets(name: str, batch: Batch) -> dict[str, int]:
    """The number of noised items that have a loss, under the name of the loss; empty if there are none."""
    count = sum(int((media.has_loss & media.noised).sum()) for media in batch.media.values())
    return {name: count} if count else {}


class NoObjective(Objective):
    """No loss: the media objective of a model that only reads pictures. The port needs no head."""

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
