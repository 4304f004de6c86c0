"""BLIP's contrastive and matching losses (arXiv 2201.12086, section 3.2): ITC as in `contrastive`, ITM with hard negatives.

    L_itm = -mean_p log softmax(W h_p)_(y_p)        y = 1 for a true pair, 0 for a negative

with ``h_p`` the hidden state after the decoder's last norm at an [EOI] appended to the text, which is read after the picture.
This trained row, which follows a picture in captioning, replaces BLIP's [Encode]. Every pair gives three: itself, its picture
with the most similar other text, and its text with the most similar other picture, by the contrastive cosines. Pairs excluded
as contrastive negatives (one group of pictures, equal texts) are excluded here too. BLIP samples negatives by similarity
(ALBEF, arXiv 2107.07651, section 3.3); here the hardest are taken, so that nothing is random.

Shape legend: ``N`` pairs of a batch, ``k`` pairs to score, ``D`` model width, ``n`` positions of one owner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xfusion.data.sequence import END_OF_MEDIA, IGNORE, Batch, MediaRows, Rows
from xfusion.objectives.base import Losses, Run
from xfusion.objectives.contrastive import (
    Contrastive,
    duplicates,
    full_precision,
    identities,
    is_duplicate,
    pair_places,
)


class Matching(Contrastive):
    """InfoNCE over the pairs of a batch, and a head that tells true pairs from hard negatives.

    Text comes before its picture, as `Model.embed` reads it. Samples with text after a picture belong to the language-model
    loss and are skipped.
    """

    across_processes = False  # a hard negative is run through the model again, so it must be in the same process
    gives = frozenset({"embed", "match"})

    @dataclass(frozen=True, kw_only=True)
    class Config(Contrastive.Config):
        """The joint embedding space, and the weight of the head's loss."""

        matching: float = 1.0
        """Weight of the matching loss in the sum; BLIP weights all losses equally."""

        def build(self) -> Matching:
            """The objective."""
            return Matching(self)

    def __init__(self, config: Config):
        super().__init__(config)
        self.matching = config.matching

    @property
    def weights(self) -> dict[str, float]:
        """Weights of both losses."""
        return {self.name: self.weight, "matching": self.matching}

    def install(self, width: int, modality: Any) -> None:
        """Create the contrastive projections and the matching head (no match, match)."""
        super().install(width, modality)
        self.head = nn.Linear(width, 2)

    # -- pairs

    def match_logits(self, run: Run, batch: Batch, pictures: Tensor, words: Tensor) -> Tensor:
        """Logits ``[k, 2]`` (no match, match) of pictures and texts, given by their pairs' indices, int64 ``[k]`` each."""
        view = pairings_batch(batch, pictures, words)
        states = run(view).states["text"]
        last_states = states[torch.arange(len(pictures), device=states.device), view.text.order.argmax(dim=1)]
        with full_precision(last_states):
            return self.head(last_states.to(self.head.weight.dtype))

    def count(self, batch: Batch) -> dict[str, int]:
        """Pairs, and scored pairs: three for each pair that has a negative, otherwise one."""
        if batch.text_reads_media or not batch.media:
            return {}
        counts = super().count(batch)
        num_with_negative = sum(int((~excluded_pairs(batch, media)).any(1).sum()) for media in batch.media.values())
        return counts | ({"matching": counts[self.name] + 2 * num_with_negative} if counts else {})

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Both losses, summed in nats.

        Raises:
            XFusionError: a picture has no text.
        """
        if batch.text_reads_media or not batch.media:
            return {}
        outputs: dict[str, Any] = {}

        def run_once(view: Batch) -> Any:
            """Runs the text-only and media-only views once for both losses."""
            kind = "both" if view.media and view.text.count else "media" if view.media else "words"
            if kind == "both":
                return run(view)
            if kind not in outputs:
                outputs[kind] = run(view)
            return outputs[kind]

        (media,) = batch.media.values()
        pair_identities = identities(batch, media)
        losses = self._contrast(run_once, batch, media, pair_identities)
        with torch.no_grad():
            texts = self._embed_text(run_once, batch, *pair_places(media))
            pictures = self.embed_media(run_once, batch)
            with full_precision(texts):
                similarity = texts @ pictures.T
        excluded = is_duplicate(pair_identities, pair_identities).fill_diagonal_(True)
        picture_index, text_index, labels = matched_pairs(similarity, excluded)
        logits = self.match_logits(run, batch, picture_index, text_index)
        total = functional.cross_entropy(logits.float(), labels, reduction="sum")
        return losses | {"matching": (total, torch.tensor(len(labels), device=labels.device))}


def excluded_pairs(batch: Batch, media: MediaRows) -> Tensor:
    """Which items are not negatives of an item, including itself, bool ``[N, N]``."""
    return duplicates(batch, media).fill_diagonal_(True)


def hardest_negatives(similarity: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Hardest negatives: the most similar text for each picture and picture for each text, int64 ``[N]`` each, -1 for none.

    Args:
        similarity: cosines ``[N texts, N pictures]``.
        excluded: bool ``[N, N]``, symmetric: which pairs are not negatives.
    """
    scores = similarity.masked_fill(excluded, -math.inf)
    has_none = excluded.all(dim=1)
    return tuple(torch.where(has_none, -1, scores.argmax(dim=dim)) for dim in (0, 1))  # type: ignore[return-value]


def matched_pairs(similarity: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is judged: every pair, then each picture with its hardest text, then each text with its hardest picture.

    Args:
        similarity: as for `hardest_negatives`.
        excluded: as for `hardest_negatives`.

    Returns:
        the pairs whose picture and whose text is taken, and which of these belong together (1) or not (0): int64 ``[k]`` each.
    """
    text_index, picture_index = hardest_negatives(similarity, excluded)
    pair_index, has_negative = torch.arange(len(similarity), device=similarity.device), text_index >= 0
    pictures = torch.cat([pair_index, pair_index[has_negative], picture_index[has_negative]])
    texts = torch.cat([pair_index, text_index[has_negative], pair_index[has_negative]])
    return pictures, texts, (torch.arange(len(pictures), device=pictures.device) < len(pair_index)).long()


def item_columns(rows: Rows, row: Tensor, sample: Tensor, segment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Columns of each item's positions in reading order ``[N, w]``, and their mask, bool ``[N, w]``, False at padding."""
    is_member = (rows.sample[row] == sample[:, None]) & (rows.order[row] >= 0)
    if segment is not None:
        is_member &= rows.segment[row] == segment[:, None]
    columns = rows.order[row].masked_fill(~is_member, torch.iinfo(torch.int64).max).argsort(dim=1)
    columns = columns[:, : int(is_member.sum(1).max())]
    return columns, is_member.gather(1, columns)


def pairings_batch(batch: Batch, pictures: Tensor, words: Tensor) -> Batch:
    """A batch with a row (picture, text, [EOI]) for each of ``k`` pairings of a picture with its own or another's text."""
    ((modality, media),) = batch.media.items()
    row, sample = pair_places(media)
    is_item = media.item >= 0
    segment = torch.zeros_like(row).scatter(0, media.item[is_item], media.rows.segment[is_item])
    media_columns, media_mask = (t[pictures] for t in item_columns(media.rows, row, sample, segment))
    media_row, device = row[pictures][:, None], media_columns.device

    def gathered(table: Tensor, fill: Any) -> Tensor:
        values = table[media_row, media_columns]
        return torch.where(media_mask if values.ndim == 2 else media_mask[..., None], values, fill)

    offset = torch.arange(media_columns.shape[1], device=device)
    order = torch.where(media_mask, offset, -1)
    start = media.rows.position[media_row, media_columns[:, :1]]
    position = gathered(media.rows.position, 0) - torch.where(media_mask, start, 0)
    rows = _reading_rows(order, position, gathered(media.rows.bidirectional, False), 0)
    boundary, item = gathered(media.boundary, False), torch.arange(len(pictures), device=device)
    clean = media.restored()
    item_number = torch.where(media_mask & ~boundary, item[:, None], -1)
    media = replace(
        clean,
        rows=rows,
        tokens=gathered(clean.tokens, 0.0),
        item=item_number,
        boundary=boundary,
        grid_row=gathered(media.grid_row, 0),
        grid_column=gathered(media.grid_column, 0),
        time=torch.zeros(len(pictures), device=device, dtype=media.time.dtype),
        noised=torch.zeros_like(item, dtype=torch.bool),
        has_loss=torch.zeros_like(item, dtype=torch.bool),
        largest_noise=media.largest_noise[pictures],
        group=media.group[pictures],
    )
    text_columns, text_mask = (t[words] for t in item_columns(batch.text, row, sample))
    length = text_mask.sum(1, keepdim=True)
    offset = torch.arange(text_columns.shape[1] + 1, device=device)
    ids = functional.pad(
        torch.where(text_mask, batch.unmasked().text_ids[row[words][:, None], text_columns], 0), (0, 1)
    )
    ids = ids.masked_fill(offset == length, END_OF_MEDIA)  # in place of [Encode]
    is_text = offset <= length
    order = torch.where(is_text, media_mask.sum(1, keepdim=True) + offset, -1)
    position = torch.where(is_text, position.amax(1, keepdim=True) + 1 + offset, 0)
    return Batch(
        text=_reading_rows(order, position, torch.zeros_like(is_text), 1),
        text_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        media={modality: media},
        text_reads_media=True,
        media_reads_text=False,
        num_sequences=len(pictures),
    )


def _reading_rows(order: Tensor, position: Tensor, bidirectional: Tensor, segment: int) -> Rows:
    is_present = order >= 0
    return Rows(
        order=order,
        sample=torch.where(is_present, 0, -1),
        position=position,
        segment=torch.where(is_present, segment, -1),
        bidirectional=bidirectional,
        visible_to_later=is_present,
        after_media=is_present,
    )
