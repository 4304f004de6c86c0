"""Convert sequences to a `Batch`: boundary rows, position tables, labels, and packing under a budget of media positions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from xfusion.data.sequence import END_OF_MEDIA, IGNORE, Batch, Media, MediaRows, Rows, Sequence, Text, XFusionError

_Table = defaultdict[str, list[int]]
"""Positions of one owner in one row: a column for each field that its tensors get."""
_POSITION = {
    "order": -1,
    "sample": -1,
    "position": 0,
    "segment": -1,
    "bidirectional": False,
    "visible_to_later": False,
    "after_media": False,
}
"""Fields of `Rows`, and their values at padding."""
_CELL = {"item": -1, "boundary": False, "grid_row": 0, "grid_column": 0}
"""Fields of `MediaRows` that say what a media position holds, and their values at padding."""


def text_length(sequence: Sequence) -> int:
    """Text positions of a sequence, including [EOI], but not the last token of an answer if it is only a label."""
    total, last = 0, len(sequence.segments) - 1
    for i, segment in enumerate(sequence.segments):
        if isinstance(segment, Text):
            total += _num_read(segment, i == last)
        elif i < last:
            total += 1
    return total


def _num_read(text: Text, last: bool) -> int:
    """Tokens of a text that have a position: all, or all but its last one if that is only a label."""
    end_is_label = text.has_loss and (last or text.unread_end)
    return max(len(text.ids) - end_is_label, 0)


def media_length(sequence: Sequence) -> int:
    """Media positions of a sequence, including [BOI]."""
    return sum(len(s.tokens) + 1 for s in sequence.segments if isinstance(s, Media))


def balance(sequences: Seq[Sequence], budget: int) -> list[list[Sequence]]:
    """Pack sequences into as few rows of ``budget`` media positions as first fit needs, evenly: the largest media first,
    each into the row with the fewest media positions, and among equal rows into the one with the least text.

    The number of rows and the media positions of each depend only on the sizes of the media: steps with the same sizes
    have the same shapes. Text is balanced too, the longest with the shortest, so there is little padding.

    Raises:
        XFusionError: a single sequence has more media positions than the budget.
    """
    by_length = sorted(sequences, key=lambda s: (media_length(s), text_length(s)), reverse=True)
    if by_length and media_length(by_length[0]) > budget:
        raise XFusionError(
            f"a sequence of {media_length(by_length[0])} media positions does not fit into a row of {budget}: raise it"
        )
    row_lengths: list[int] = []
    for media in map(media_length, by_length):
        row_number = next((index for index, media_used in enumerate(row_lengths) if media_used + media <= budget), None)
        if row_number is None:
            row_lengths.append(media)
        else:
            row_lengths[row_number] += media
    rows: list[tuple[int, int, list[Sequence]]] = [(0, 0, []) for _ in row_lengths]
    for sequence in by_length:
        media, text = media_length(sequence), text_length(sequence)
        candidates = [index for index, (media_used, _, _) in enumerate(rows) if media_used + media <= budget]
        if not candidates:  # balanced rows may need one more than first fit
            candidates = [len(rows)]
            rows.append((0, 0, []))
        index = min(candidates, key=lambda index: rows[index][:2])
        media_used, text_used, row = rows[index]
        rows[index] = (media_used + media, text_used + text, [*row, sequence])
    return [row for _, _, row in rows]


class _Row:
    """One row of a batch while its sequences are laid out in reading order, each position in the table of its owner."""

    def __init__(self) -> None:
        self.text: _Table = defaultdict(list)
        self.media: defaultdict[str, _Table] = defaultdict(lambda: defaultdict(list))
        self.media_reads_text = False
        self.order = self.segment = 0
        self.sample = -1

    def begin_sequence(self) -> None:
        self.sample += 1
        self.position = 0
        self.has_text = self.has_media = False

    def add_text(self, text: Text, last: bool) -> None:
        """The tokens of a text. If it ``has_loss``, each is the label of the text position before it."""
        read = text.ids[: _num_read(text, last)]
        labels = [IGNORE] * len(read)
        if text.has_loss and text.ids:
            if self.has_text:
                self.text["label"][-1] = text.ids[0]
            labels = [*text.ids[1:], IGNORE][: len(read)]
        self._place(self.text, len(read))
        self.text["id"] += read
        self.text["label"] += labels
        self.has_text |= len(read) > 0
        self.segment += 1

    def add_media(self, media: Media, number: int) -> None:
        """[BOI] and the tokens of an item, which has this number among the batch's items of its modality."""
        count, columns = len(media.tokens), media.grid[1]
        if count != media.grid[0] * columns:
            raise XFusionError(f"a media item has {count} tokens but its grid is {media.grid}")
        self.has_media = True
        self.media_reads_text |= self.has_text
        table, visible = self.media[media.modality], media.visible_to_later
        self._place(table, 1, visible_to_later=visible)
        self._place(table, count, media.bidirectional, visible, media.shared_position)
        table["item"] += [-1] + [number] * count
        table["boundary"] += [True] + [False] * count
        table["grid_row"] += [0] + [token // columns for token in range(count)]
        table["grid_column"] += [0] + [token % columns for token in range(count)]
        self.segment += 1

    def _place(
        self,
        table: _Table,
        count: int,
        bidirectional: bool = False,
        visible_to_later: bool = True,
        shared_position: bool = False,
    ) -> None:
        """The next positions of the row, in reading order."""
        table["order"] += range(self.order, self.order + count)
        table["sample"] += [self.sample] * count
        table["position"] += [self.position + (0 if shared_position else i) for i in range(count)]
        table["segment"] += [self.segment] * count
        table["bidirectional"] += [bidirectional] * count
        table["visible_to_later"] += [visible_to_later] * count
        table["after_media"] += [self.has_media] * count
        self.order += count
        self.position += 1 if shared_position else count


def pack(rows: Seq[Seq[Sequence]], *, text_width: int | None = None) -> Batch:
    """Lay out sequences as a `Batch`, several to a row if asked.

    [BOI] is added before each media item, in the item's own tower, and [EOI] after it, in the text tower, if anything
    follows. A text position predicts the next text token of its sequence if that token ``has_loss``; the first token
    after a picture is predicted at [EOI].

    Args:
        rows: the sequences packed into each batch row; they cannot attend to each other.
        text_width: pad text positions to this width (None: the longest row).

    Raises:
        XFusionError: a row's text is longer than ``text_width``, or grids and tokens disagree.
    """
    laid_out: list[_Row] = []
    items: dict[str, list[Media]] = {}
    for sequences in rows:
        row = _Row()
        laid_out.append(row)
        for sequence in sequences:
            row.begin_sequence()
            for number, segment in enumerate(sequence.segments, 1):
                last = number == len(sequence.segments)
                if isinstance(segment, Text):
                    row.add_text(segment, last)
                    continue
                items_so_far = items.setdefault(segment.modality, [])
                row.add_media(segment, len(items_so_far))
                items_so_far.append(segment)
                if not last:
                    end_of_media = END_OF_MEDIA - list(items).index(segment.modality)
                    row.add_text(Text(ids=(end_of_media,)), last)

    text_tables = [row.text for row in laid_out]
    longest = max((len(table["id"]) for table in text_tables), default=0)
    width = longest if text_width is None else text_width
    if longest > width:
        raise XFusionError(f"a row holds {longest} text tokens but the budget is {width}: raise it or shorten the text")
    return Batch(
        text=Rows(**_padded(text_tables, width, _POSITION)),
        text_ids=_padded(text_tables, width, {"id": 0})["id"],
        labels=_padded(text_tables, width, {"label": IGNORE})["label"],
        media={name: _media_rows([row.media[name] for row in laid_out], items[name]) for name in items},
        text_reads_media=any(any(table["after_media"]) for table in text_tables),
        media_reads_text=any(row.media_reads_text for row in laid_out),
        num_sequences=sum(map(len, rows)),
    )


def _padded(tables: Seq[_Table], width: int, padding: dict[str, int]) -> dict[str, Tensor]:
    """The columns that ``padding`` names, ``[B, width]`` each: bool or int64, as the value at padding."""
    return {
        name: torch.tensor(
            [table[name] + [value] * (width - len(table[name])) for table in tables],
            dtype=torch.bool if isinstance(value, bool) else torch.int64,
        ).reshape(len(tables), width)
        for name, value in padding.items()
    }


def _media_rows(tables: Seq[_Table], items: Seq[Media]) -> MediaRows:
    width = max(len(table["order"]) for table in tables)
    cells = _padded(tables, width, _CELL)
    tokens = torch.zeros(len(tables), width, items[0].tokens.shape[1])
    tokens[cells["item"] >= 0] = torch.cat([media.tokens for media in items]).float()
    return MediaRows(
        rows=Rows(**_padded(tables, width, _POSITION)),
        tokens=tokens,
        **cells,
        time=torch.zeros(len(items)),
        noised=torch.tensor([media.state == "noised" for media in items]),
        has_loss=torch.tensor([media.has_loss for media in items]),
        largest_noise=torch.tensor([media.largest_noise for media in items]),
        group=torch.tensor([media.group for media in items]),
    )
