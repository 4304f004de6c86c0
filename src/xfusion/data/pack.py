"""Convert sequences to a `Batch`: boundary rows, position tables, labels, and packing under a budget of media positions."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from xfusion.data.sequence import END_OF_MEDIA, IGNORE, Batch, Media, MediaRows, Rows, Sequence, Text, XFusionError

_Table = list[tuple[int, int, int, int, bool, bool, bool]]
"""Positions of one owner in one row: order, sample, position, segment, bidirectional, visible to later, after media."""


def text_length(sequence: Sequence) -> int:
    """Text positions of a sequence, including [EOI], but not the last token of an answer if it is only a label."""
    total, last = 0, len(sequence.segments) - 1
    for i, segment in enumerate(sequence.segments):
        if isinstance(segment, Text):
            total += len(segment.ids) - (bool(segment.ids) and _end_is_label(segment, i == last))
        elif i < last:
            total += 1
    return total


def _end_is_label(segment: Text, last: bool) -> bool:
    """Whether the last token of a text is only a label and has no position."""
    return segment.has_loss and (last or segment.unread_end)


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
    text_tables: list[_Table] = []
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    names = list(
        dict.fromkeys(
            segment.modality
            for row in rows
            for sequence in row
            for segment in sequence.segments
            if isinstance(segment, Media)
        )
    )
    media_tables: dict[str, list[_Table]] = {name: [[] for _ in rows] for name in names}
    items: dict[str, list[Media]] = {name: [] for name in names}
    item_tables: dict[str, list[list[tuple[int, bool, int, int]]]] = {name: [[] for _ in rows] for name in names}
    text_reads_media = media_reads_text = False

    for row_number, row in enumerate(rows):
        table: _Table = []
        row_ids: list[int] = []
        row_labels: list[int] = []
        order = segment_number = 0
        for sample, sequence in enumerate(row):
            position, after_media, after_any_text, after_text = 0, False, False, False
            last = len(sequence.segments) - 1
            for i, segment in enumerate(sequence.segments):
                if isinstance(segment, Text):
                    for j, token in enumerate(segment.ids):
                        if segment.has_loss and after_text:
                            row_labels[-1] = token
                        if j == len(segment.ids) - 1 and _end_is_label(segment, i == last):
                            break
                        table.append((order, sample, position, segment_number, False, True, after_media))
                        row_ids.append(token)
                        row_labels.append(IGNORE)
                        after_text = True
                        order, position = order + 1, position + 1
                    text_reads_media |= after_media
                    after_any_text |= bool(segment.ids)
                else:
                    if segment.tokens.shape[0] != segment.grid[0] * segment.grid[1]:
                        raise XFusionError(
                            f"a media item has {segment.tokens.shape[0]} tokens but its grid is {segment.grid}"
                        )
                    media_table = media_tables[segment.modality][row_number]
                    item_table = item_tables[segment.modality][row_number]
                    number, count = len(items[segment.modality]), len(segment.tokens)
                    bidirectional, visible_to_later = segment.bidirectional, segment.visible_to_later
                    media_table.append((order, sample, position, segment_number, False, visible_to_later, True))
                    item_table.append((-1, True, 0, 0))
                    items[segment.modality].append(segment)
                    order, position, step = order + 1, position + 1, int(not segment.shared_position)
                    media_table += [
                        (order + m, sample, position + m * step, segment_number, bidirectional, visible_to_later, True)
                        for m in range(count)
                    ]
                    item_table += [(number, False, *divmod(m, segment.grid[1])) for m in range(count)]
                    order, position = order + count, position + count * step
                    position += segment.shared_position
                    after_text, after_media, media_reads_text = False, True, media_reads_text or after_any_text
                    if i < last:
                        table.append((order, sample, position, segment_number + 1, False, True, True))
                        row_ids.append(END_OF_MEDIA - names.index(segment.modality))
                        row_labels.append(IGNORE)
                        after_text, after_any_text, text_reads_media = True, True, True
                        order, position, segment_number = order + 1, position + 1, segment_number + 1
                segment_number += 1
        text_tables.append(table)
        ids.append(row_ids)
        labels.append(row_labels)

    longest = max(map(len, ids), default=0)
    width = longest if text_width is None else text_width
    if longest > width:
        raise XFusionError(f"a row holds {longest} text tokens but the budget is {width}: raise it or shorten the text")
    batch = Batch(
        text=_tables(text_tables, width),
        text_ids=torch.tensor([row + [0] * (width - len(row)) for row in ids], dtype=torch.int64).reshape(
            len(rows), width
        ),
        labels=torch.tensor([row + [IGNORE] * (width - len(row)) for row in labels]).reshape(len(rows), width).long(),
        text_reads_media=text_reads_media,
        media_reads_text=media_reads_text,
        num_sequences=sum(map(len, rows)),
    )
    for name in names:
        batch.media[name] = _media_rows(media_tables[name], item_tables[name], items[name])
    return batch


def _tables(tables: Seq[_Table], width: int) -> Rows:
    padded = [t + [(-1, -1, 0, -1, False, False, False)] * (width - len(t)) for t in tables]
    columns = torch.tensor(padded, dtype=torch.int64).reshape(len(tables), width, 7).unbind(-1)
    order, sample, position, segment, bidirectional, visible_to_later, after_media = (
        column.contiguous() for column in columns
    )
    return Rows(
        order=order,
        sample=sample,
        position=position,
        segment=segment,
        bidirectional=bidirectional.bool(),
        visible_to_later=visible_to_later.bool(),
        after_media=after_media.bool(),
    )


def _media_rows(
    tables: Seq[_Table], item_tables: Seq[list[tuple[int, bool, int, int]]], items: Seq[Media]
) -> MediaRows:
    width = max(map(len, tables))
    padded = [row + [(-1, False, 0, 0)] * (width - len(row)) for row in item_tables]
    item, boundary, grid_row, grid_column = torch.tensor(padded, dtype=torch.int64).unbind(-1)
    token_width = items[0].tokens.shape[1]
    tokens = torch.zeros(len(tables), width, token_width)
    is_token = item >= 0
    tokens[is_token] = torch.cat([media.tokens for media in items]).float()
    return MediaRows(
        rows=_tables(tables, width),
        tokens=tokens,
        item=item.contiguous(),
        boundary=boundary.bool(),
        grid_row=grid_row.contiguous(),
        grid_column=grid_column.contiguous(),
        time=torch.zeros(len(items)),
        noised=torch.tensor([media.state == "noised" for media in items]),
        has_loss=torch.tensor([media.has_loss for media in items]),
        largest_noise=torch.tensor([media.largest_noise for media in items]),
        group=torch.tensor([media.group for media in items]),
    )
