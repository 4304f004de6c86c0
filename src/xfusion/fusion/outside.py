"""Media outside the decoder's self-attention: text reads a few rows of each medium through new modules.

This is shared by cross-attention (Flamingo, arXiv 2204.14198) and adaption prompts (LLaMA-Adapter, 2303.16199). No media
position passes through a frozen layer. Text after a medium reads the medium's tokens, or the rows that a connector makes
from them; the keys and values of these rows use cache slot 1. A text token that reads no medium is bit-identical to the
base's: before a picture, after a hidden one and in text alone.

A connector's rows are placed at the first positions of their medium, so that tables, packing and caches need no changes.
Text behind a medium has the positions that it would have behind the medium's tokens in one sequence, whereas in the papers a
medium takes none: behind closed gates it is what the base says of these words at these positions.

Shape legend: ``B`` batch row, ``n`` rows of one owner, ``k`` media positions that text may read, ``N`` media items,
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


def segment_positions(rows: Rows) -> Tensor:
    """Index of each position within its segment, int64 ``[B, n]``: 0 for [BOI], 1 to P for the tokens of a medium."""
    same_segment = rows.segment[:, :, None] == rows.segment[:, None, :]
    comes_before = (rows.order[:, None, :] < rows.order[:, :, None]) & (rows.order[:, None, :] >= 0)
    return (same_segment & comes_before).sum(-1)


def token_positions(media: MediaRows) -> Tensor:
    """Index of each token of a pass within its medium, from 0, int64 ``[B, n]``; -1 for non-tokens ([BOI] and padding).

    A pass may contain a medium without its [BOI], which is then in the cache.
    """
    order, item = media.rows.order, media.item
    comes_before = (item[:, :, None] == item[:, None, :]) & (order[:, None, :] < order[:, :, None])
    return torch.where(item >= 0, comes_before.sum(-1), -1)


def gather_items(x: Tensor, media: MediaRows) -> tuple[Tensor, Tensor]:
    """Regroup rows ``[B, n, D]`` by item: tokens ``[N, P, D]`` in reading order, and which exist, bool ``[N, P]``."""
    position, count = token_positions(media), len(media.noised)
    # On meta tensors any row may be a token; a pass with only a [BOI] has no tokens.
    max_tokens = x.shape[1] if position.is_meta else max(1, int(position.max()) + 1)
    tokens = x.new_zeros(count + 1, max_tokens, x.shape[-1])
    present = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=x.device)
    # Non-tokens go to an extra item, which is dropped.
    indices = (torch.where(position >= 0, media.item, count), position.clamp(min=0))
    return tokens.index_put(indices, x)[:count], present.index_put(indices, position >= 0)[:count]


def scatter_items(rows: Tensor, media: MediaRows) -> Tensor:
    """Place rows ``[N, M, D]`` at the first tokens of their items, with zeros elsewhere, ``[B, n, D]``."""
    position = token_positions(media)
    if not len(rows):  # filler rows alone; the sum keeps what made them in the backward pass
        return rows.new_zeros(*position.shape, rows.shape[-1]) + rows.sum()
    values = rows[media.item.clamp(min=0), position.clamp(0, rows.shape[1] - 1)]
    return torch.where(((position >= 0) & (position < rows.shape[1]))[..., None], values, 0)


class Outside(Fusion):
    """Text reads media rows through new modules; the frozen layers see text only."""

    preserves_text = True
    prefix_is_constant = True
    joins_attention = False
    num_towers = 2

    @dataclass(frozen=True, kw_only=True)
    class Config(Fusion.Config):
        """Which media rows text reads."""

        mask: Literal["immediate", "all previous", "none"] = "immediate"
        """Media that a text token reads: the last before it (Flamingo), all before it, or all of its sequence. With none,
        text in a prompt also sees later pictures, so a prompt must be given whole."""
        connector: Resampler.Config | None = None
        """Connector that makes rows from a medium's tokens; None uses the tokens themselves."""

    def __init__(self, config: Config):
        super().__init__(config)
        if config.mask == "none":
            self.prefix_is_constant, self.reads_ahead = False, True

    def install(self, backbone: Backbone) -> None:
        """Create the connector and the new modules of every placed layer."""
        if self.config.connector is not None:
            self.connector = self.config.connector.build(backbone.hidden_size).to(backbone.device)
        super().install(backbone)

    @property
    def num_rows(self) -> int | None:
        """Number of rows of a medium that text reads; None means all of its tokens."""
        return None if self.config.connector is None else self.config.connector.latents

    def connect(self, x: Tensor, present: Tensor) -> Tensor:
        """Media ``[N, P, D]`` and which tokens exist, bool ``[N, P]`` -> rows ``[N, M, D]`` that text reads."""
        return self.connector(x, present)

    def with_rows(self, index: int, run: Pass, *, reference: bool = False) -> dict[str, Tensor]:
        """States of a pass; at the first layer with a block, media are replaced by the connector's output.

        Raises:
            XFusionError: a medium has fewer tokens than the connector makes rows.
        """
        rows = self.num_rows
        if rows is None or not run.media or index != self.state_layers[0]:
            return run.states
        media, x = run.media_rows[run.media], run.states[run.media]
        tokens, present = gather_items(x, media)
        counts = present.sum(-1)
        no_items = x.is_meta or not len(counts)
        fewest_tokens = rows if no_items else int(torch.where(counts > 0, counts, rows).min())
        if fewest_tokens < rows:
            raise XFusionError(
                f"a medium has {fewest_tokens} tokens, fewer than the {rows} rows that the connector makes: take fewer rows"
                " (latents, prompts) or smaller patches"
            )
        if not reference:
            connector_rows = self.connect(tokens, present)
        else:  # each medium by itself, without padding
            item_rows = [self.connect(t[None, p], p[None, p]) for t, p in zip(tokens, present, strict=True)]
            connector_rows = torch.cat(item_rows)
        return run.states | {run.media: scatter_items(connector_rows, media).to(x.dtype)}

    def reads(self, run: Pass) -> Tensor:
        """Which media positions each text token reads, bool ``[B, n, k]``; the same at every layer of a pass."""
        return run.cached_table((self, "reads"), lambda: self._media_mask(run))

    def _media_mask(self, run: Pass) -> Tensor:
        keys, queries = run.keys("media"), run.rows["text"]
        mask = run.seen("text", of="media")
        if not keys.count:
            return mask
        if self.config.mask == "none":
            same_sample = queries.sample[:, :, None] == keys.sample[:, None, :]
            is_visible = (keys.order >= 0) & keys.visible_to_later
            mask = same_sample & is_visible[:, None, :] & (queries.order >= 0)[:, :, None]
        elif self.config.mask == "immediate":
            segment = torch.where(mask, keys.segment[:, None, :], -1)
            mask = mask & (segment == segment.amax(-1, keepdim=True))
        position = segment_positions(keys)
        is_read = position >= 1 if self.num_rows is None else (position >= 1) & (position <= self.num_rows)
        return mask & is_read[:, None, :]

    def _media_columns(self, run: Pass, row: int, column: int) -> list[int]:
        """Which media positions of a pass one text token reads: `reads` without tensor operations, for reference paths."""
        if run.media is None or run.rows["text"].order[row, column] < 0:
            return []
        text, media = run.rows["text"], run.rows[run.media]
        order, segment = media.order[row].tolist(), media.segment[row].tolist()
        columns = [
            j
            for j, media_order in enumerate(order)
            if media_order >= 0
            and media.sample[row, j] == text.sample[row, column]
            and bool(media.visible_to_later[row, j])
            and (media_order < text.order[row, column] or self.config.mask == "none")
        ]
        if self.config.mask == "immediate":
            columns = [j for j in columns if segment[j] == max(segment[i] for i in columns)]
        first_order = {s: min(order[j] for j in columns if segment[j] == s) for s in {segment[j] for j in columns}}
        rows = self.num_rows or len(order)
        return [j for j in columns if 1 <= order[j] - first_order[segment[j]] <= rows]
