"""Contrast and matching of BLIP (arXiv 2201.12086, section 3.2): ITC as in `contrastive`, ITM on the pairs that it confuses.

    L_itm = -mean_p log softmax(W h_p)_(y_p)        y = 1 for a true pair, 0 for a negative

with ``h_p`` the state behind the decoder's last norm at [EOI] behind the words, which are read behind the picture: the trained
row that captions have behind a picture stands for BLIP's [Encode]. Every pair gives three: itself, its picture with the words,
and its words with the picture, that are most alike by the contrast's cosines. What is no negative of the contrast (one group
of pictures, equal words) is none here. BLIP draws the negatives by likeness (ALBEF, arXiv 2107.07651, section 3.3), here the
hardest are taken, so that nothing is left to chance.

Shape legend: ``N`` pairs of a batch, ``k`` pairs that are judged, ``D`` model width, ``n`` positions of one owner.
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
from xfusion.objectives.contrastive import Contrastive, pair_places, same


class Matching(Contrastive):
    """InfoNCE over the pairs of a batch, and a head that tells true pairs from hard negatives.

    Words stand before their picture, as `Model.embed` reads them. Samples in which words are said behind a picture are the
    language model's and left out.
    """

    across_processes = False  # a hard negative is read once more, so it must be a process's own
    gives = frozenset({"embed", "match"})

    @dataclass(frozen=True, kw_only=True)
    class Config(Contrastive.Config):
        """The common space, and the weight of the head's loss."""

        matching: float = 1.0
        """Factor of the matching loss in the sum; BLIP adds all losses alike."""

        def build(self) -> Matching:
            """The objective."""
            return Matching(self)

    def __init__(self, config: Config):
        super().__init__(config)
        self.matching = config.matching

    @property
    def weights(self) -> dict[str, float]:
        """Of both losses."""
        return {self.name: self.weight, "matching": self.matching}

    def install(self, width: int, modality: Any) -> None:
        """The contrast's projections, and the head: no match, match."""
        super().install(width, modality)
        self.head = nn.Linear(width, 2)

    # -- pairs

    def judged(self, run: Run, batch: Batch, pictures: Tensor, words: Tensor) -> Tensor:
        """Logits ``[k, 2]`` (no match, match) of pictures and words by the numbers of their pairs, int64 ``[k]`` each."""
        view = rearranged(batch, pictures, words)
        states = run(view).states["text"]
        last = states[torch.arange(len(pictures), device=states.device), view.text.order.argmax(dim=1)]
        with torch.autocast("cpu" if last.is_meta else last.device.type, enabled=False):
            return self.head(last.to(self.head.weight.dtype))

    def count(self, batch: Batch) -> dict[str, int]:
        """Pairs, and pairs that are judged: three for each that has a negative, else one."""
        if batch.text_reads_media or not batch.media:
            return {}
        found = super().count(batch)
        hard = sum(int((~_excluded(batch, media)).any(1).sum()) for media in batch.media.values())
        return found | ({"matching": found[self.name] + 2 * hard} if found else {})

    def loss(self, run: Run, batch: Batch) -> Losses:
        """Both, in summed nats.

        Raises:
            XFusionError: a picture stands without words.
        """
        if batch.text_reads_media or not batch.media:
            return {}
        once: dict[str, Any] = {}

        def remembered(view: Batch) -> Any:
            """The views of words alone and of media alone are run once for both losses."""
            kind = "both" if view.media and view.text.count else "media" if view.media else "words"
            if kind == "both":
                return run(view)
            if kind not in once:
                once[kind] = run(view)
            return once[kind]

        out = super().loss(remembered, batch)
        for media in batch.media.values():
            row, sample = pair_places(media)
            with torch.no_grad():
                alike = self._words(remembered, batch, row, sample) @ self.of_media(remembered, batch).T
            words, pictures = hardest(alike, _excluded(batch, media))
            own = torch.arange(len(alike), device=alike.device)
            some = words >= 0
            judged = self.judged(
                run,
                batch,
                torch.cat([own, own[some], pictures[some]]),
                torch.cat([own, words[some], own[some]]),
            )
            truth = torch.zeros(len(judged), dtype=torch.int64, device=own.device)
            truth[: len(own)] = 1
            total = functional.cross_entropy(judged.float(), truth, reduction="sum")
            out["matching"] = (total, torch.tensor(len(judged), device=own.device))
        return out


def _excluded(batch: Batch, media: MediaRows) -> Tensor:
    """Which items are no negatives of an item, itself among them, bool ``[N, N]``."""
    return same(batch, media).fill_diagonal_(True)


def hardest(alike: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """For each picture the words, for each words the picture, that are no match and most alike: int64 ``[N]`` each, -1 for none.

    Args:
        alike: cosines ``[N words, N pictures]``.
        excluded: bool ``[N, N]``, symmetric: what is no negative.
    """
    scores = alike.masked_fill(excluded, -math.inf)
    none = excluded.all(dim=1)
    return tuple(torch.where(none, -1, scores.argmax(dim=dim)) for dim in (0, 1))  # type: ignore[return-value]


def members(rows: Rows, row: Tensor, sample: Tensor, segment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Columns of each item's positions in reading order ``[N, w]``, and which of them there are, bool ``[N, w]``."""
    inside = (rows.sample[row] == sample[:, None]) & (rows.order[row] >= 0)
    if segment is not None:
        inside &= rows.segment[row] == segment[:, None]
    columns = rows.order[row].masked_fill(~inside, torch.iinfo(torch.int64).max).argsort(dim=1)
    columns = columns[:, : int(inside.sum(1).max())]
    return columns, inside.gather(1, columns)


def rearranged(batch: Batch, pictures: Tensor, words: Tensor) -> Batch:
    """A row for each pair ``[k]`` of a picture and of words that may be another's: picture, words, [EOI]."""
    ((modality, media),) = batch.media.items()
    row, sample = pair_places(media)
    inside = media.item >= 0
    segment = torch.zeros_like(row).scatter(0, media.item[inside], media.rows.segment[inside])
    shown, kept = (t[pictures] for t in members(media.rows, row, sample, segment))
    at, device = row[pictures][:, None], shown.device

    def taken(table: Tensor, fill: Any) -> Tensor:
        found = table[at, shown]
        return torch.where(kept if found.ndim == 2 else kept[..., None], found, fill)

    place = torch.arange(shown.shape[1], device=device)
    order = torch.where(kept, place, -1)
    start = media.rows.position[at, shown[:, :1]]
    position = taken(media.rows.position, 0) - torch.where(kept, start, 0)
    rows = _rows(order, position, taken(media.rows.bidirectional, False), 0)
    boundary, item = taken(media.boundary, False), torch.arange(len(pictures), device=device)
    clean = media.restored()
    number = torch.where(kept & ~boundary, item[:, None], -1)
    media = replace(
        clean,
        rows=rows,
        tokens=taken(clean.tokens, 0.0),
        item=number,
        boundary=boundary,
        grid_row=taken(media.grid_row, 0),
        grid_column=taken(media.grid_column, 0),
        time=torch.zeros(len(pictures), device=device, dtype=media.time.dtype),
        noised=torch.zeros_like(item, dtype=torch.bool),
        has_loss=torch.zeros_like(item, dtype=torch.bool),
        largest_noise=media.largest_noise[pictures],
        group=media.group[pictures],
    )
    said, there = (t[words] for t in members(batch.text, row, sample))
    length = there.sum(1, keepdim=True)
    place = torch.arange(said.shape[1] + 1, device=device)
    ids = functional.pad(torch.where(there, batch.unmasked().text_ids[row[words][:, None], said], 0), (0, 1))
    ids = ids.masked_fill(place == length, END_OF_MEDIA)  # for [Encode]
    present = place <= length
    order = torch.where(present, kept.sum(1, keepdim=True) + place, -1)
    position = torch.where(present, position.amax(1, keepdim=True) + 1 + place, 0)
    return Batch(
        text=_rows(order, position, torch.zeros_like(present), 1),
        text_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        media={modality: media},
        text_reads_media=True,
        media_reads_text=False,
        num_sequences=len(pictures),
    )


def _rows(order: Tensor, position: Tensor, both_ways: Tensor, segment: int) -> Rows:
    there = order >= 0
    return Rows(
        order=order,
        sample=torch.where(there, 0, -1),
        position=position,
        segment=torch.where(there, segment, -1),
        bidirectional=both_ways,
        visible_to_later=there,
        after_media=there,
    )
