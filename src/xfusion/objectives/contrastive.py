"""Contrast of pictures and words: symmetric InfoNCE of CLIP (arXiv 2103.00020, figure 3), the frozen decoder as text tower.

    u_i = norm(W_t h(words_i)),  v_i = norm(W_m h(picture_i)),  s = exp(min(a, ln 100))
    L = -1/2 sum_i [log softmax_j(s u_i . v_j)_(j=i) + log softmax_j(s v_i . u_j)_(j=i)]

with ``h`` the states behind the decoder's last norm, the last word's and the mean of a picture's tokens. Words are read as if
no picture stood beside them and pictures, clean, as if no words did. Two items are no negatives of each other where their
pictures are near-identical (one group) or their words are equal: such columns are left out of a row's softmax.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``D`` model width, ``N`` pairs, ``E`` width of a vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.data.sequence import Batch, MediaRows, XFusionError
from xfusion.objectives.base import Losses, Objective, Run

FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0
"""The factor of the cosines, as CLIP begins and as it is clipped."""


class Contrastive(Objective):
    """InfoNCE over the pairs of a batch, both ways."""

    name = "contrastive"
    needs = ("text", "media")
    scope = "batch"
    gives = frozenset({"embed"})

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """The common space."""

        width: int = 256
        """Numbers of a vector."""

        def build(self) -> Contrastive:
            """The objective."""
            return Contrastive(self)

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.weight, self.embedding_width = config, config.weight, config.width

    def install(self, width: int, modality: Any) -> None:
        """The two projections and the scale."""
        del modality
        self.words = nn.Linear(width, self.config.width, bias=False)
        self.media = nn.Linear(width, self.config.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))

    # -- vectors

    def of_words(self, run: Run, batch: Batch) -> Tensor:
        """The vector of the last word of each row, ``[B, E]``, for rows of one sequence each."""
        return self._words(run, batch, torch.arange(len(batch.text_ids), device=batch.text_ids.device), None)

    def of_media(self, run: Run, batch: Batch) -> Tensor:
        """The vector of each item, ``[N, E]``."""
        (media,) = batch.media.values()
        shown = run(batch.media_alone()).states["media"]
        return _unit(self.media, media.mean(shown.float()))

    def _words(self, run: Run, batch: Batch, row: Tensor, sample: Tensor | None) -> Tensor:
        read = run(batch.words_alone()).states["text"]
        return _unit(self.words, read[row, _last_word(batch, row, sample)].float())

    # -- loss

    def count(self, batch: Batch) -> dict[str, int]:
        """Pairs."""
        count = sum(len(media.noised) for media in batch.media.values())
        return {self.name: count} if count else {}

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Summed nats, the mean of both ways, and the number of pairs.

        Raises:
            XFusionError: a picture stands without words.
        """
        out: Losses = {}
        for media in batch.media.values():
            row, sample = pair_places(media)
            if bool((batch.text.sample[row] != sample[:, None]).all(dim=1).any()):
                raise XFusionError(
                    "contrastive: a picture of the batch has no words: set the templates' caption_dropout to 0"
                )
            u, v = self._words(run, batch, row, sample), self.of_media(run, batch)
            with torch.autocast(
                "cpu" if u.is_meta else u.device.type, enabled=False
            ):  # cosines times 100 need their digits
                # Clipped where it is used: above the bound it gets no gradient and stays.
                scale = self.log_scale.clamp(max=math.log(LARGEST_SCALE)).exp()
                logits = (scale * u @ v.T).masked_fill(same(batch, media), -math.inf)
                aim = torch.arange(len(logits), device=logits.device)
                one, other = (functional.cross_entropy(x, aim, reduction="sum") for x in (logits, logits.T))
            out[self.name] = ((one + other) / 2, torch.tensor(len(logits), device=logits.device))
        return out


def same(batch: Batch, media: MediaRows) -> Tensor:
    """Which other items are no negatives of an item, bool ``[N, N]``: of its group, or with its words."""
    row, sample = pair_places(media)
    inside = (batch.text.sample[row] == sample[:, None]) & (batch.text.order[row] >= 0)
    said = [tuple(ids[mine].tolist()) for ids, mine in zip(batch.text_ids[row], inside, strict=True)]
    number = {words: i for i, words in enumerate(said)}
    wording = torch.tensor([number[words] for words in said], device=row.device)
    alike = (media.group[:, None] == media.group) & (media.group >= 0)
    return (alike | (wording[:, None] == wording)).fill_diagonal_(False)


def pair_places(media: MediaRows) -> tuple[Tensor, Tensor]:
    """Batch row and packed sequence of each item, int64 ``[N]``."""
    inside = media.item >= 0
    rows = torch.arange(len(media.item), device=media.item.device)[:, None].expand_as(media.item)
    row = torch.zeros_like(media.noised, dtype=torch.int64).scatter(0, media.item[inside], rows[inside])
    return row, torch.zeros_like(row).scatter(0, media.item[inside], media.rows.sample[inside])


def _last_word(batch: Batch, row: Tensor, sample: Tensor | None) -> Tensor:
    """Column of the last word of a packed sequence of each row; of any sequence where there is but one."""
    order = batch.text.order[row]
    return (order if sample is None else order.masked_fill(batch.text.sample[row] != sample[:, None], -1)).argmax(1)


def _unit(projection: nn.Linear, states: Tensor) -> Tensor:
    with torch.autocast("cpu" if states.is_meta else states.device.type, enabled=False):
        return functional.normalize(projection(states), dim=-1)
