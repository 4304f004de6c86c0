"""Contrast of pictures and words: symmetric InfoNCE of CLIP (arXiv 2103.00020, figure 3), the frozen decoder as text tower.

    u_i = norm(W_t h(words_i)),  v_i = norm(W_m h(picture_i)),  s = exp(a),  a <= ln 100
    L = -1/2 sum_i [log softmax_j(s u_i . v_j)_(j=i) + log softmax_j(s v_i . u_j)_(j=i)]

with ``h`` the states behind the decoder's last norm, the last word's and the mean of a picture's tokens. Words are read as if
no picture stood beside them and pictures, clean, as if no words did. Two items are no negatives of each other where their
pictures are near-identical (one group) or their words are equal: such columns are left out of a row's softmax. Samples in which
words are said behind a picture are the language model's and left out: what such words ask says nothing of the picture.

Processes that share a step hand each other their vectors: every pair is contrasted with those of all, and the gradient
of a vector is the sum over all processes that were given it.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``D`` model width, ``N`` pairs, ``E`` width of a vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
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
    across_processes = True
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

    def _scale(self) -> Tensor:
        """The factor of the cosines. Where it is learned the parameter itself is brought back to the bound, as the paper clips
        it: clipped at its use alone, it had no gradient above the bound and would stay there for good.
        """
        bound = math.log(LARGEST_SCALE)
        if not torch.is_grad_enabled():
            return self.log_scale.clamp(max=bound).exp()
        with torch.no_grad():
            self.log_scale.clamp_(max=bound)
        return self.log_scale.exp()

    # -- loss

    def count(self, batch: Batch) -> dict[str, int]:
        """Pairs."""
        if batch.text_reads_media:
            return {}
        count = sum(len(media.noised) for media in batch.media.values())
        return {self.name: count} if count else {}

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Summed nats, the mean of both ways, and the number of pairs.

        Raises:
            XFusionError: a picture stands without words.
        """
        out: Losses = {}
        if batch.text_reads_media:
            return out
        for media in batch.media.values():
            row, sample = pair_places(media)
            if len(row) and bool((batch.text.sample[row] != sample[:, None]).all(dim=1).any()):
                raise XFusionError(
                    "contrastive: a picture of the batch has no words: set the templates' caption_dropout to 0"
                )
            if len(row):
                own = torch.stack([self._words(run, batch, row, sample), self.of_media(run, batch)], dim=1)
            else:  # of a process without a pair; the others wait for it
                nothing = self.words.weight.new_zeros(0, self.words.in_features)
                own = torch.stack([_unit(self.words, nothing), _unit(self.media, nothing)], dim=1)
            known = identities(batch, media)
            vectors, others, first = _of_all(own, known)
            aim = first + torch.arange(len(own), device=own.device)
            excluded = alike(known, others)
            excluded[torch.arange(len(own), device=own.device), aim] = False
            # Cosines times 100 need their digits.
            with torch.autocast("cpu" if own.is_meta else own.device.type, enabled=False):
                scale = self._scale()
                both = [
                    functional.cross_entropy(
                        (scale * own[:, one] @ vectors[:, other].T).masked_fill(excluded, -math.inf),
                        aim,
                        reduction="sum",
                    )
                    for one, other in ((0, 1), (1, 0))
                ]
            out[self.name] = ((both[0] + both[1]) / 2, torch.tensor(len(own), device=own.device))
        return out


def identities(batch: Batch, media: MediaRows) -> Tensor:
    """What tells pairs apart, int64 ``[N, 2]``: a number of the words, in all processes the same, and the group."""
    row, sample = pair_places(media)
    inside = (batch.text.sample[row] == sample[:, None]) & (batch.text.order[row] >= 0)
    words = batch.unmasked().text_ids[row]
    said = [hash(tuple(ids[mine].tolist())) for ids, mine in zip(words, inside, strict=True)]
    return torch.stack([torch.tensor(said, dtype=torch.int64, device=row.device), media.group.to(torch.int64)], dim=1)


def alike(one: Tensor, other: Tensor) -> Tensor:
    """Which pairs have equal words or pictures of one group, bool ``[n, m]``, by their `identities`."""
    words = one[:, None, 0] == other[:, 0]
    return words | ((one[:, None, 1] == other[:, 1]) & (one[:, None, 1] >= 0))


def same(batch: Batch, media: MediaRows) -> Tensor:
    """Which other items are no negatives of an item, bool ``[N, N]``: of its group, or with its words."""
    known = identities(batch, media)
    return alike(known, known).fill_diagonal_(False)


class _Gathered(torch.autograd.Function):
    """Rows of all processes, in the order of their ranks; the gradient of a row is what all processes found for it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, first: int, total: int) -> Tensor:
        ctx.place = slice(first, first + len(own))
        out = own.new_zeros(total, *own.shape[1:])
        out[ctx.place] = own
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        return summed[ctx.place], None, None


def _of_all(own: Tensor, known: Tensor) -> tuple[Tensor, Tensor, int]:
    """Vectors and `identities` of the pairs of all processes, and where the own ones begin; some may have none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own, known, 0
    rank = dist.get_rank()
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=own.device)
    counts[rank] = len(own)
    dist.all_reduce(counts)
    first, total = int(counts[:rank].sum()), int(counts.sum())
    return _Gathered.apply(own, first, total), _Gathered.apply(known, first, total), first


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
