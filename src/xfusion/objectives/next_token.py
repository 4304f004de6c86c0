"""Next-token cross-entropy on answers, and greedy or sampled decoding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from xfusion.backbone import Backbone
from xfusion.data.sequence import IGNORE, Batch, XFusionError
from xfusion.objectives.base import Losses, Objective, Run

GREEDY = 1e-5
"""A temperature below this is greedy, like 0: dividing logits by a smaller number would overflow."""
MOST_LOGITS = 64_000_000
"""Most logits of the vocabulary that a loss computes at once; they take some 12 bytes each, with their gradients."""


class NextToken(Objective):
    """L_AR: mean negative log-likelihood of the tokens that have a loss; the LM head runs on these positions only."""

    name = "next_token"
    gives = frozenset({"caption"})

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """Weight of the objective."""

        weight: float = 0.2
        """lambda_AR of X-Fusion (arXiv 2504.20996, section 4.1)."""

        def build(self) -> NextToken:
            """The objective."""
            return NextToken(self)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.weight = config.weight
        self._frozen: Callable[[], Backbone] | None = None
        if not self.weight:  # captioning is not trained
            self.gives = frozenset()

    def attach(self, port: Any, frozen: Callable[[], Backbone]) -> None:
        """Keep access to the base, whose vocabulary decides how many logits are computed at once."""
        del port
        self._frozen = frozen

    def count(self, batch: Batch) -> dict[str, int]:
        """Tokens that have a loss."""
        count = int((batch.labels != IGNORE).sum())
        return {self.name: count} if count else {}

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Summed nats and the number of tokens."""
        has_label = batch.labels != IGNORE
        if not bool(has_label.any()):
            return {}
        output, places = run(batch), has_label.flatten().nonzero()[:, 0]

        def logits_at(chosen: Tensor) -> Tensor:
            mask = torch.zeros_like(has_label).flatten().index_fill(0, chosen, True)
            return output.logits(mask.view_as(has_label))

        width = 1 if self._frozen is None else self._frozen().config.vocab_size
        total = sum_of_nats(logits_at, places, batch.labels[has_label], width)
        return {self.name: (total, has_label.sum())}

    @staticmethod
    def choose(
        logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator], top_k: int = 0
    ) -> Tensor:
        """The next token of each row.

        Args:
            logits: ``[B, V]``.
            temperature: sampling temperature; below `GREEDY` the most likely token is chosen.
            top_p: nucleus sampling: the smallest set of tokens whose probabilities reach this sum.
            generators: one per row, so that a batch gives the same tokens as single calls.
            top_k: keep only the k most likely tokens, before `top_p` is applied; 0 is all.

        Returns:
            int64 ``[B]``.
        """
        check_sampling(temperature, top_p, top_k)
        if temperature < GREEDY:
            return logits.argmax(dim=-1)
        probability, token = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        if top_k:
            probability = probability[:, :top_k] / probability[:, :top_k].sum(dim=-1, keepdim=True)
        mass_before = probability.cumsum(dim=-1) - probability
        probability = probability.masked_fill(mass_before >= top_p, 0.0)
        choices = [torch.multinomial(p, 1, generator=g) for p, g in zip(probability, generators, strict=True)]
        return token.gather(1, torch.stack(choices)).squeeze(1)


def sum_of_nats(logits_at: Callable[[Tensor], Tensor], places: Tensor, labels: Tensor, vocabulary: int) -> Tensor:
    """Summed cross-entropy of labels; beyond `MOST_LOGITS` in parts, whose logits are computed again in the backward pass.

    Args:
        logits_at: logits ``[k, V]`` of some places, int64 ``[k]``.
        places: where the labels are, int64 ``[n]``.
        labels: int64 ``[n]``.
        vocabulary: ``V``.
    """

    def nats(chosen: Tensor, chosen_labels: Tensor) -> Tensor:
        return cross_entropy(logits_at(chosen).float(), chosen_labels, reduction="sum")

    at_once = max(1, MOST_LOGITS // vocabulary)
    if len(places) <= at_once:
        return nats(places, labels)
    parts = zip(places.split(at_once), labels.split(at_once), strict=True)
    return torch.stack([checkpoint(nats, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]).sum()


def check_sampling(temperature: float, top_p: float, top_k: int) -> None:
    """Check the settings of `NextToken.choose`.

    Raises:
        XFusionError: one is out of its range, or not a number.
    """
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or top_k < 0:
        raise XFusionError(
            f"temperature {temperature} must be >= 0 and top_p {top_p} within (0, 1], top_k {top_k} 0 or more"
        )
