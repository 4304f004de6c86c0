"""Text-only prompts, continued by the base's own ``generate``: one, or several as one padded batch."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from xfusion.data.sequence import XFusionError
from xfusion.generation.base import Listener
from xfusion.generation.schema import next_tokens
from xfusion.model import Model
from xfusion.objectives.next_token import GREEDY
from xfusion.seeding import seeded

PLAIN: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""Settings forced on the base's own ``generate``, overriding its generation_config. Answers after pictures support only
temperature, `top_k` and `top_p`, and these must mean the same for text-only prompts."""
PLAIN_SAMPLING: dict[str, Any] = {"typical_p": 1.0, "min_p": None, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""Further forced settings if it samples."""
PADDED = 2
"""How many times the tokens of its prompts a batch may have with padding. Beyond that a long prompt waits rather than that short
ones are computed at its length."""
POSITIONS = 1 << 15
"""Positions that a batch of several prompts may have, padding and longest answer included: each has keys and values."""


def text_only_tokens(
    model: Model,
    prompts: Seq[tuple[int, ...]],
    *,
    max_tokens: Seq[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    allowed: Seq[tuple[int, ...]] | None = None,
    listen: Listener | None = None,
    ended: Callable[[int, list[int]], None] | None = None,
) -> list[list[int]]:
    """Continue text-only prompts with the base's own ``generate``, several as one batch padded on the left.

    A row's tokens are those of ``generate`` for this batch, up to the row's own end. The batch is computed until all of its
    rows have ended.

    Args:
        model: a model.
        prompts: token ids of each prompt; several if ``temperature`` is 0, since a row would get other random numbers than alone.
        max_tokens: longest answer to each prompt in tokens.
        temperature: sampling temperature; 0, or anything below 1e-5, is greedy.
        top_p: nucleus sampling.
        top_k: sample from the k most likely tokens; 0 is all, whatever the base's generation_config says.
        seed: seed of the random numbers.
        allowed: restrict each answer to one of these token sequences.
        listen: called with every token of an answer but end tokens; False ends that answer.
        ended: called with the index of a prompt and its answer as soon as that has ended.

    Returns:
        the tokens of each answer, with the end token if there is one.

    Raises:
        XFusionError: a prompt is empty.
    """
    if not all(prompts):
        raise XFusionError("there is nothing to continue: the prompt is empty")
    backbone = model.backbone
    width, pad = max(map(len, prompts)), next(iter(backbone.end_ids), None)
    ids = torch.full((len(prompts), width), pad or 0)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    sampling: dict[str, Any] = {"do_sample": False, **PLAIN}
    if temperature >= GREEDY:
        sampling |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k, **PLAIN_SAMPLING}
    if allowed is not None:
        end = backbone.end_id
        sampling["prefix_allowed_tokens_fn"] = lambda _, row: next_tokens(row[width:].tolist(), allowed, end)

    def hears(row: int, token: int) -> bool:
        return listen is None or token in backbone.end_ids or listen(row, token)

    rows = _Rows(max_tokens, set(backbone.stop_ids), hears, ended)
    with seeded(seed, backbone.device):
        model.text_model().generate(
            ids.to(backbone.device),
            attention_mask=mask.to(backbone.device),
            max_new_tokens=max(max_tokens),
            pad_token_id=pad,
            stopping_criteria=[rows],
            **sampling,
        )
    return rows.answers


class _Rows:
    """The answers of a batch, as a stopping criterion of ``generate``: ends each row by itself."""

    def __init__(
        self,
        max_tokens: Seq[int],
        stop_ids: set[int],
        hears: Listener,
        ended: Callable[[int, list[int]], None] | None,
    ):
        self.max_tokens, self.stop_ids, self.hears, self.ended = max_tokens, stop_ids, hears, ended
        self.answers: list[list[int]] = [[] for _ in max_tokens]
        self.active = set(range(len(max_tokens)))

    def __call__(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Whether each row has ended, bool ``[rows]``, given all token ids so far ``[rows, n]``."""
        for row, token in enumerate(ids[:, -1].tolist()):
            if row not in self.active:
                continue
            self.answers[row].append(token)
            is_heard = self.hears(row, token)
            if not is_heard or token in self.stop_ids or len(self.answers[row]) == self.max_tokens[row]:
                self.active.remove(row)
                if self.ended is not None:
                    self.ended(row, self.answers[row])
        return torch.tensor([row not in self.active for row in range(len(self.answers))], device=ids.device)


def rows_together(model: Model, prompts: Seq[int], max_tokens: Seq[int], most: int) -> list[int]:
    """Which prompts, in order of arrival, share a batch with the first one within `PADDED` and `POSITIONS`.

    Args:
        model: a model.
        prompts: tokens of each prompt.
        max_tokens: longest answer to each prompt in tokens.
        most: prompts of a batch.

    Returns:
        their indices, the first prompt's always.
    """
    chosen: list[int] = []
    for index in range(len(prompts)):
        if len(chosen) == most:
            break
        rows = [*chosen, index]
        width, total = max(prompts[row] for row in rows), sum(prompts[row] for row in rows)
        places = width + max(max_tokens[row] for row in rows)  # rows that have ended go on to the end of the batch
        is_learned = model.backbone.longest is None or places <= model.backbone.longest
        if not chosen or (len(rows) * width <= PADDED * total and len(rows) * places <= POSITIONS and is_learned):
            chosen = rows
    return chosen
