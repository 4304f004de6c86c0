"""Contrastive loss of pictures and texts: CLIP's symmetric InfoNCE (arXiv 2103.00020, figure 3), frozen decoder as text tower.

    u_i = norm(W_t h(words_i)),  v_i = norm(W_m h(picture_i)),  s = exp(a),  a <= ln 100
    L = -1/2 sum_i [log softmax_j(s u_i . v_j)_(j=i) + log softmax_j(s v_i . u_j)_(j=i)]

with ``h`` the hidden states after the decoder's last norm: the last text token's, and the mean over a picture's tokens. Texts
are read without pictures, and pictures, clean, without text. Two items are not negatives of each other if their pictures are
near-identical (one group) or their texts are equal: such columns are excluded from a row's softmax. Samples with text after a
picture belong to the language-model loss and are skipped: a question there does not describe the picture.

The processes of a step exchange their vectors: every pair is contrasted with the pairs of all processes, and the gradient
of a vector is the sum over all processes.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``D`` model width, ``N`` pairs, ``E`` width of a vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from xfusion.data.sequence import Batch, MediaRows, XFusionError
from xfusion.objectives.base import Losses, Objective, Run

FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0
"""CLIP's initial and maximum scale (inverse temperature) of the cosines."""


class Contrastive(Objective):
    """InfoNCE over the pairs of a batch, in both directions."""

    name = "contrastive"
    needs = ("text", "media")
    scope = "batch"
    across_processes = True
    gives = frozenset({"embed"})

    @dataclass(frozen=True, kw_only=True)
    class Config(Objective.Config):
        """The joint embedding space."""

        width: int = 256
        """Embedding width."""

        def build(self) -> Contrastive:
            """The objective."""
            return Contrastive(self)

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.weight, self.embedding_width = config, config.weight, config.width

    def install(self, width: int, modality: Any) -> None:
        """Create the two projections and the scale."""
        del modality
        self.words = nn.Linear(width, self.config.width, bias=False)
        self.media = nn.Linear(width, self.config.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))

    # -- vectors

    def embed_text(self, run: Run, batch: Batch) -> Tensor:
        """The vector of each row's last text token, ``[B, E]``; each row must hold one sequence."""
        return self._embed_text(run, batch, torch.arange(len(batch.text_ids), device=batch.text_ids.device), None)

    def embed_media(self, run: Run, batch: Batch) -> Tensor:
        """The vector of each item, ``[N, E]``."""
        (media,) = batch.media.values()
        states = run(batch.media_alone()).states["media"]
        return project(self.media, media.mean(states.float()))

    def _embed_text(self, run: Run, batch: Batch, row: Tensor, sample: Tensor | None) -> Tensor:
        states = run(batch.words_alone()).states["text"]
        return project(self.words, states[row, _last_word(batch, row, sample)].float())

    # -- loss

    def count(self, batch: Batch) -> dict[str, int]:
        """Pairs."""
        if batch.text_reads_media:
            return {}
        count = sum(len(media.noised) for media in batch.media.values())
        return {self.name: count} if count else {}

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Summed loss in nats, the mean of both directions, and the number of pairs.

        Raises:
            XFusionError: a picture has no text.
        """
        if batch.text_reads_media or not batch.media:
            return {}
        (media,) = batch.media.values()
        return self._contrast(run, batch, media, identities(batch, media))

    def _contrast(self, run: Run, batch: Batch, media: MediaRows, local_identities: Tensor) -> Losses:
        """The `loss` of a batch with media, given the `identities` of its pairs."""
        row, sample = pair_places(media)
        if len(row) and bool((batch.text.sample[row] != sample[:, None]).all(dim=1).any()):
            raise XFusionError(
                "contrastive: a picture of the batch has no words: set the templates' caption_dropout to 0"
            )
        if len(row):
            local_vectors = torch.stack(
                [self._embed_text(run, batch, row, sample), self.embed_media(run, batch)], dim=1
            )
        else:  # this process has no pair, but the others wait for it
            no_states = self.words.weight.new_zeros(0, self.words.in_features)
            local_vectors = torch.stack([project(self.words, no_states), project(self.media, no_states)], dim=1)
        all_vectors, all_identities, offset = _gather_pairs(local_vectors, local_identities)
        pair_index = torch.arange(len(local_vectors), device=local_vectors.device)
        excluded = is_duplicate(local_identities, all_identities)
        excluded[pair_index, offset + pair_index] = False
        with full_precision(local_vectors):
            scale = clipped_scale(self.log_scale)
            text_scores, media_scores = (
                scale * local_vectors[:, query] @ all_vectors[:, key].T for query, key in ((0, 1), (1, 0))
            )
            total = symmetric_loss(text_scores, media_scores, excluded, offset + pair_index)
        return {self.name: (total, torch.tensor(len(local_vectors), device=local_vectors.device))}


def has_pairs(batch: Batch) -> bool:
    """Whether a batch has pairs of a text followed by its picture."""
    return bool(batch.media) and not batch.text_reads_media and batch.text.count > 0


def clipped_scale(log_scale: nn.Parameter) -> Tensor:
    """The scale of the cosines, at most `LARGEST_SCALE`. In training the parameter itself is clipped, as in the paper. If only
    its use were clipped, it would have no gradient above the bound and stay there forever.
    """
    bound = math.log(LARGEST_SCALE)
    if not torch.is_grad_enabled():
        return log_scale.clamp(max=bound).exp()
    with torch.no_grad():
        log_scale.clamp_(max=bound)
    return log_scale.exp()


def symmetric_loss(text_scores: Tensor, media_scores: Tensor, excluded: Tensor, targets: Tensor) -> Tensor:
    """InfoNCE summed over pairs, in nats, the mean of both directions.

    Args:
        text_scores: scaled similarities of each text to all items, ``[n, m]``.
        media_scores: of each item to all texts, ``[n, m]``.
        excluded: bool ``[n, m]``: which pairs are not negatives of a pair.
        targets: index of a pair among all, int64 ``[n]``.
    """
    directions = [
        functional.cross_entropy(scores.masked_fill(excluded, -math.inf), targets, reduction="sum")
        for scores in (text_scores, media_scores)
    ]
    return (directions[0] + directions[1]) / 2


def identities(batch: Batch, media: MediaRows) -> Tensor:
    """Identity of each pair, int64 ``[N, 2]``: a hash of its text, equal in all processes, and the picture's group."""
    row, sample = pair_places(media)
    is_text = (batch.text.sample[row] == sample[:, None]) & (batch.text.order[row] >= 0)
    # Copied from a device together: each copy waits for all that was asked of it before.
    texts = zip(batch.unmasked().text_ids[row].tolist(), is_text.tolist(), strict=True)
    hashes = [hash(tuple(compress(ids, said))) for ids, said in texts]
    return torch.stack([torch.tensor(hashes, dtype=torch.int64, device=row.device), media.group.to(torch.int64)], dim=1)


def is_duplicate(rows: Tensor, columns: Tensor) -> Tensor:
    """Which pairs have equal texts or pictures of one group, bool ``[n, m]``, by their `identities`."""
    same_text = rows[:, None, 0] == columns[:, 0]
    return same_text | ((rows[:, None, 1] == columns[:, 1]) & (rows[:, None, 1] >= 0))


def duplicates(batch: Batch, media: MediaRows) -> Tensor:
    """Which other items are not negatives of an item, bool ``[N, N]``: those of its group or with the same text."""
    pair_identities = identities(batch, media)
    return is_duplicate(pair_identities, pair_identities).fill_diagonal_(False)


class _AllGather(torch.autograd.Function):
    """All-gather of rows in rank order; the gradient of a row is summed over all processes."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, offset: int, total: int) -> Tensor:
        ctx.place = slice(offset, offset + len(local))
        gathered = local.new_zeros(total, *local.shape[1:])
        gathered[ctx.place] = local
        dist.all_reduce(gathered)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        return summed[ctx.place], None, None


def _gather_pairs(vectors: Tensor, pair_identities: Tensor) -> tuple[Tensor, Tensor, int]:
    """Vectors and `identities` of the pairs of all processes, and where this process's start; a process may have none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return vectors, pair_identities, 0
    rank = dist.get_rank()
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=vectors.device)
    counts[rank] = len(vectors)
    dist.all_reduce(counts)
    offset, total = int(counts[:rank].sum()), int(counts.sum())
    return _AllGather.apply(vectors, offset, total), _AllGather.apply(pair_identities, offset, total), offset


def pair_places(media: MediaRows) -> tuple[Tensor, Tensor]:
    """Batch row and packed sequence of each item, int64 ``[N]``."""
    is_item = media.item >= 0
    rows = torch.arange(len(media.item), device=media.item.device)[:, None].expand_as(media.item)
    row = torch.zeros_like(media.noised, dtype=torch.int64).scatter(0, media.item[is_item], rows[is_item])
    return row, torch.zeros_like(row).scatter(0, media.item[is_item], media.rows.sample[is_item])


def _last_word(batch: Batch, row: Tensor, sample: Tensor | None) -> Tensor:
    """Column of the last text token of a packed sequence in each row; ``sample`` is None if each row has one sequence."""
    order = batch.text.order[row]
    return (order if sample is None else order.masked_fill(batch.text.sample[row] != sample[:, None], -1)).argmax(1)


def full_precision(tensor: Tensor) -> torch.autocast:
    """A block without autocast on a tensor's device: cosines times 100 differ by less than bfloat16 can say."""
    return torch.autocast("cpu" if tensor.is_meta else tensor.device.type, enabled=False)


def project(projection: nn.Linear, states: Tensor) -> Tensor:
    """Vectors ``[..., E]`` of unit length, in float32 whatever the precision of a pass."""
    with full_precision(states):
        return functional.normalize(projection(states), dim=-1)
