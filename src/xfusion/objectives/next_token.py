"""Next-token cross-entropy on answers, and greedy or sampled decoding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from xfusion.data.sequence import IGNORE, Batch, XFusionError
from xfusion.objectives.base import Losses, Objective, Run

GREEDY = 1e-5
"""A temperature below this is greedy, like 0: dividing logits by a smaller number would overflow."""


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
        if not self.weight:  # captioning is not trained
            self.gives = frozenset()

    def count(self, batch: Batch) -> dict[str, int]:
        """Tokens that have a loss."""
        count = int((batch.labels != IGNORE).sum())
        return {self.name: count} if count else {}

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Summed nats and the number of tokens."""
        has_label = batch.labels != IGNORE
        if not bool(has_label.any()):
            return {}
        logits = run(batch).logits(has_label)
        total = cross_entropy(logits.float(), batch.labels[has_label], reduction="sum")
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


def check_sampling(temperature: float, top_p: float, top_k: int) -> None:
    """Check the settings of `NextToken.choose`.

    Raises:
        XFusionError: one is out of its range, or not a number.
    """
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or top_k < 0:
        raise XFusionError(
            f"temperature {temperature} must be >= 0 and top_p {top_p} within (0, 1], top_k {top_k} 0 or more"
        )
