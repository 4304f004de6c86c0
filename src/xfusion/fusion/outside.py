"""Media outside the decoder's self-attention: words read a few rows of each medium through something new.

What cross-attention (Flamingo, arXiv 2204.14198) and adaption prompts (LLaMA-Adapter, 2303.16199) share. No media position
goes through a frozen layer. The tokens of a medium, or the rows that a connector makes of them, are read by the words
behind it; keys and values of these rows have slot 1 of the cache. A word that reads no medium is left as it was to the last
bit, before a picture, behind a hidden one and in text alone.

Rows that a connector makes lie at the first positions of their medium, so that tables, packing and caches need nothing new.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``k`` media positions that words may read, ``N`` media items,
``P`` tokens of an item, ``M`` rows that a connector makes, ``D`` model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xfusion.backbone import Backbone
from xfusion.data.sequence import MediaRows, Rows, XFusionError
from xfusion.fusion.base import Fusion, Pass
from xfusion.fusion.connectors.resampler import Resampler


def places(rows: Rows) -> Tensor:
    """Place of each position within its segment, int64 ``[B, n]``: [BOI] has 0, the tokens of a medium 1 to P."""
    same = rows.segment[:, :, None] == rows.segment[:, None, :]
    before = (rows.order[:, None, :] < rows.order[:, :, None]) & (rows.order[:, None, :] >= 0)
    return (same & before).sum(-1)


def token_places(media: MediaRows) -> Tensor:
    """The same of a pass's own tokens, counted from 0, int64 ``[B, n]``; -1 where there is none ([BOI] and padding).

    A pass may hold a medium without its [BOI], which then lies in the cache.
    """
    order, item = media.rows.order, media.item
    before = (item[:, :, None] == item[:, None, :]) & (order[:, None, :] < order[:, :, None])
    return torch.where(item >= 0, before.sum(-1), -1)


def gathered(x: Tensor, media: MediaRows) -> tuple[Tensor, Tensor]:
    """Rows ``[B, n, D]`` by item: tokens ``[N, P, D]`` in reading order, and which there are, bool ``[N, P]``."""
    place, count = token_places(media), len(media.noised)
    # Without values any row may be a token; a pass of a [BOI] alone has none.
    longest = x.shape[1] if place.is_meta else max(1, int(place.max()) + 1)
    out = x.new_zeros(count + 1, longest, x.shape[-1])
    present = torch.zeros(out.shape[:2], dtype=torch.bool, device=x.device)
    # What is no token goes to an item more, which is dropped.
    where = (torch.where(place >= 0, media.item, count), place.clamp(min=0))
    return out.index_put(where, x)[:count], present.index_put(where, place >= 0)[:count]


def scattered(rows: Tensor, media: MediaRows) -> Tensor:
    """Rows ``[N, M, D]`` at the first tokens of their items, zeros elsewhere, ``[B, n, D]``."""
    place = token_places(media)
    found = rows[media.item.clamp(min=0), place.clamp(0, rows.shape[1] - 1)]
    return torch.where(((place >= 0) & (place < rows.shape[1]))[..., None], found, 0)


class Outside(Fusion):
    """Words read rows of media through new modules; the frozen layers see words alone."""

    preserves_text = True
    prefix_is_constant = True
    num_towers = 2

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """Which rows of media words read."""

        mask: Literal["immediate", "all previous", "none"] = "immediate"
        """Media that a word reads: the last before it (Flamingo), all before it, or all of its sequence, wherever they
        stand. With the last, words of a prompt also hear of later pictures, so a prompt must be given whole."""
        connector: Resampler.Config | None = None
        """What makes rows of a medium's tokens; None takes the tokens as they are."""

    def __init__(self, config: Config):
        super().__init__(config)
        if config.mask == "none":
            self.prefix_is_constant = False

    def install(self, backbone: Backbone) -> None:
        """The connector, and the new modules of every placed layer."""
        if self.config.connector is not None:
            self.connector = self.config.connector.build(backbone.hidden_size).to(backbone.device)
        super().install(backbone)

    @property
    def num_rows(self) -> int | None:
        """Rows of a medium that words read; None is all of its tokens."""
        return None if self.config.connector is None else self.config.connector.latents

    def connected(self, x: Tensor, present: Tensor) -> Tensor:
        """Media ``[N, P, D]``, which tokens there are, bool ``[N, P]`` -> rows ``[N, M, D]`` that words read."""
        return self.connector(x, present)

    def with_rows(self, index: int, run: Pass, *, reference: bool = False) -> dict[str, Tensor]:
        """States of a pass, in which media are what the connector made of them, from the first layer with a block on.

        Raises:
            XFusionError: a medium has fewer tokens than the connector makes rows.
        """
        rows = self.num_rows
        if rows is None or not run.media or index != self.state_layers[0]:
            return run.states
        media, x = run.media_rows[run.media], run.states[run.media]
        tokens, present = gathered(x, media)
        counts = present.sum(-1)
        least = rows if x.is_meta else int(torch.where(counts > 0, counts, rows).min())
        if least < rows:
            raise XFusionError(
                f"a medium has {least} tokens, fewer than the {rows} rows that the connector makes: take fewer rows"
                " (latents, prompts) or smaller patches"
            )
        if not reference:
            made = self.connected(tokens, present)
        else:  # each medium by itself, without padding
            alone = [self.connected(t[None, p], p[None, p]) for t, p in zip(tokens, present, strict=True)]
            made = torch.cat(alone)
        return run.states | {run.media: scattered(made, media).to(x.dtype)}

    def reads(self, run: Pass) -> Tensor:
        """Which media positions each word reads, bool ``[B, n, k]``; the same at every layer of a pass."""
        return run.once((self, "reads"), lambda: self._table(run))

    def _table(self, run: Pass) -> Tensor:
        key, query = run.keys("media"), run.rows["text"]
        found = run.seen("text", of="media")
        if not key.count:
            return found
        if self.config.mask == "none":
            same = query.sample[:, :, None] == key.sample[:, None, :]
            there = (key.order >= 0) & key.visible_to_later
            found = same & there[:, None, :] & (query.order >= 0)[:, :, None]
        elif self.config.mask == "immediate":
            segment = torch.where(found, key.segment[:, None, :], -1)
            found = found & (segment == segment.amax(-1, keepdim=True))
        place = places(key)
        row = place >= 1 if self.num_rows is None else (place >= 1) & (place <= self.num_rows)
        return found & row[:, None, :]

    def _read(self, run: Pass, row: int, column: int) -> list[int]:
        """Which media positions of a pass one word reads: `reads` without a tensor, for reference paths."""
        if run.media is None or run.rows["text"].order[row, column] < 0:
            return []
        word, media = run.rows["text"], run.rows[run.media]
        order, segment = media.order[row].tolist(), media.segment[row].tolist()
        before = [
            j
            for j, at in enumerate(order)
            if at >= 0
            and media.sample[row, j] == word.sample[row, column]
            and bool(media.visible_to_later[row, j])
            and (at < word.order[row, column] or self.config.mask == "none")
        ]
        if self.config.mask == "immediate":
            before = [j for j in before if segment[j] == max(segment[i] for i in before)]
        first = {s: min(order[j] for j in before if segment[j] == s) for s in {segment[j] for j in before}}
        rows = self.num_rows or len(order)
        return [j for j in before if 1 <= order[j] - first[segment[j]] <= rows]
