"""Next-token cross-entropy on answers, and greedy or sampled choice of the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from xfusion.data.sequence import IGNORE, Batch, XFusionError
from xfusion.objectives.base import Losses, Objective, Run

GREEDY = 1e-5
"""A lower temperature takes the likeliest token, as 0 does: divided by still less, logits are beyond what numbers hold."""


class NextToken(Objective):
    """L_AR: mean negative log-likelihood of the tokens that have a loss; the head runs on these positions only."""

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
        if not self.weight:  # nothing is learned of saying what pictures show
            self.gives = frozenset()

    def count(self, batch: Batch) -> dict[str, int]:
        """Tokens that have a loss."""
        count = int((batch.labels != IGNORE).sum())
        return {self.name: count} if count else {}

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Summed nats and the number of tokens."""
        chosen = batch.labels != IGNORE
        if not bool(chosen.any()):
            return {}
        logits = run(batch).logits(chosen)
        total = cross_entropy(logits.float(), batch.labels[chosen], reduction="sum")
        return {self.name: (total, chosen.sum())}

    @staticmethod
    def choose(
        logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator], top_k: int = 0
    ) -> Tensor:
        """The next token of each row.

        Args:
            logits: ``[B, V]``.
            temperature: below `GREEDY` the likeliest is chosen.
            top_p: nucleus sampling: the smallest set of tokens whose probabilities reach this sum.
            generators: one per row, so that a batch says what its singles would.
            top_k: only so many of the likeliest tokens, before the nucleus is taken of them; 0 is all.

        Returns:
            int64 ``[B]``.
        """
        if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
            raise XFusionError(
                f"temperature {temperature} must be >= 0 and top_p {top_p} within (0, 1], top_k {top_k} 0 or more"
            )
        if temperature < GREEDY:
            return logits.argmax(dim=-1)
        probability, token = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        if top_k:
            probability = probability[:, :top_k] / probability[:, :top_k].sum(dim=-1, keepdim=True)
        before = probability.cumsum(dim=-1) - probability
        probability = probability.masked_fill(before >= top_p, 0.0)
        picked = [torch.multinomial(p, 1, generator=g) for p, g in zip(probability, generators, strict=True)]
        return token.gather(1, torch.stack(picked)).squeeze(1)
