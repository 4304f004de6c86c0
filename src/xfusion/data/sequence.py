"""Samples (ordered lists of segments), batches as tables of positions, and the attention mask rule.

Shape legend: ``B`` batch row (one row may hold several packed sequences), ``n`` positions of one kind in a row,
``M`` tokens of one media item, ``P`` width of a media token, ``N`` media items in the batch.

A batch keeps its positions sorted by the tower that owns them: all text positions of a row, then all positions of each
modality. The sequence order lives in a table (`Rows.order`), not in memory layout, so a tower's positions are one slice
and no code ever searches for a placeholder id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

END_OF_MEDIA = -1
"""Entry of `Batch.text_ids` that stands for [EOI]: a text position whose embedding is a trainable row of the media port."""
MaskTables = Seq[Tensor]
"""Five tables of positions, in any shape: order, sample, segment, bidirectional, visible to later ones."""
IGNORE = -100
"""Label of a text position without a loss."""


class XFusionError(ValueError):
    """Bad input, in one line: the thing, the conflicting values, and what to do."""

    reported_elsewhere = False
    """Whether another process of the run reports it, so that it is printed once."""


class Unreadable(XFusionError):
    """Examples that turn out to be unreadable, or too long for the model, after the data was opened.

    Args:
        message: what is wrong with the first of them.
        examples: number in the source -> what is wrong, if the numbers are known.
    """

    def __init__(self, message: str, examples: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.examples = dict(examples or {})


class TooLong(XFusionError):
    """The prompt has more tokens than the model can read."""


def first_line(error: BaseException) -> str:
    """First line of another library's error message."""
    return (str(error).strip() or repr(error)).splitlines()[0]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One picture or sound of a data source, without its pixels or samples."""

    id: str
    """Unique within the source."""
    captions: tuple[str, ...]
    """``captions[0]`` is the name, which is the answer when captioning; the others are alternative wordings."""
    group: str
    """Near-identical pictures share a group: a split never separates them, and a hit on any member counts."""
    origin: str
    """Where it comes from, for messages: ``file.jsonl:12`` or ``folder/a.png``."""
    question: str = ""
    """The question after the picture or sound, to which ``captions[0]`` is the answer; empty if there is none."""
    content: str = ""
    """Hash of its file, or of its address and commit if the file is not read ahead; empty if the source never changes."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """A request to draw a picture at this place of a list given to ``generate``."""

    size: int | None = None
    """Side in pixels; None uses the trained size."""


@dataclass(frozen=True, kw_only=True)
class Audio:
    """A request to generate a sound at this place of a list given to ``generate``."""

    seconds: float | None = None
    """Length in seconds; None uses the trained length."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sound:
    """A mono sound as input to a model; `xfusion.read_sound` reads one from a file."""

    samples: Tensor
    """Float32 ``[n]``, from -1 to 1."""
    rate: int
    """Samples per second."""

    def __post_init__(self) -> None:
        if self.samples.ndim != 1 or not len(self.samples) or not self.samples.is_floating_point() or self.rate < 1:
            raise XFusionError(
                f"a sound is a row of floats at a rate, but this is {self.samples.dtype} {list(self.samples.shape)} at"
                f" {self.rate} per second: mix its channels, and divide whole numbers by their largest"
            )

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.samples) / self.rate


@dataclass(frozen=True, kw_only=True)
class Text:
    """A run of token ids."""

    ids: tuple[int, ...]
    """Ids of the base's own tokenizer."""
    has_loss: bool = False
    """Whether the model is trained to predict these tokens."""
    unread_end: bool = False
    """Whether the last token is a target only and hidden from later positions, as at the end of a sequence. Before another
    picture this trains an answer to end although prompts contain answers without their end token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Media:
    """One media item: its tokens and how they are used."""

    tokens: Tensor
    """Linear patches of the clean item, float ``[M, P]``."""
    grid: tuple[int, int]
    """Rows and columns of tokens; their product is ``M``."""
    modality: str = "image"
    """Name of the modality of the tokens."""
    state: Literal["clean", "noised"] = "clean"
    """Clean items are context; noised ones are corrupted by the media objective."""
    has_loss: bool = False
    """Whether the model is trained to produce this item."""
    visible_to_later: bool = True
    """Whether later positions may attend to the item; False for a noised copy next to a clean one."""
    largest_noise: float = 1.0
    """Largest noise level of a noised item."""
    bidirectional: bool = True
    """Whether attention within the item is bidirectional; otherwise it is causal in reading order."""
    shared_position: bool = False
    """Whether all tokens of the item share one rotary position and differ by row and column only."""
    behind_begin: bool = False
    """Whether the base's BOS token comes before the item if it opens a sequence."""
    group: int = -1
    """Items of one group are near-identical, so none is a negative for another; -1 has no group."""


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """An ordered list of segments: one training sample or one prompt."""

    segments: tuple[Text | Media, ...]
    """In reading order. [BOI] and [EOI] are added around media by `xfusion.data.pack.pack`."""


@dataclass(kw_only=True)
class Rows:
    """Position tables ``[B, n]`` of the positions that one tower owns."""

    order: Tensor
    """Index of the position in its row's reading order, int64; -1 marks padding."""
    sample: Tensor
    """Which packed sequence of the row the position belongs to, int64."""
    position: Tensor
    """Position id given to the rotary (or learned) position code, int64."""
    segment: Tensor
    """Index of the segment within the row, int64."""
    bidirectional: Tensor
    """True if attention within the segment is bidirectional, bool."""
    visible_to_later: Tensor
    """False if only the position's own segment may attend to it, bool."""
    after_media: Tensor
    """True from the first media token ([BOI]) of a sequence on, bool: only there may new weights act on text."""

    @property
    def count(self) -> int:
        return self.order.shape[1]

    @property
    def seeing(self) -> MaskTables:
        """The tables that `sees` needs."""
        return self.order, self.sample, self.segment, self.bidirectional, self.visible_to_later

    @classmethod
    def empty(cls, batch: int, device: torch.device | str = "cpu") -> Rows:
        """Empty tables for ``batch`` rows."""
        integers = torch.empty(batch, 0, dtype=torch.int64, device=device)
        flags = torch.empty(batch, 0, dtype=torch.bool, device=device)
        return cls(
            order=integers,
            sample=integers,
            position=integers,
            segment=integers,
            bidirectional=flags,
            visible_to_later=flags,
            after_media=flags,
        )

    @classmethod
    def cat(cls, tables: Seq[Rows]) -> Rows:
        """The tables side by side, ``[B, sum n]``."""
        return cls(**{f.name: torch.cat([getattr(t, f.name) for t in tables], dim=1) for f in fields(cls)})

    def columns(self, indices: Tensor | slice) -> Rows:
        """Some positions of every row, by int64 ``[k]`` or a slice."""
        return Rows(**{f.name: getattr(self, f.name)[:, indices] for f in fields(self)})

    def none(self) -> Rows:
        """Empty tables of the same rows."""
        return self.columns(slice(0, 0))

    def index(self, rows: Tensor) -> Rows:
        """The batch rows ``rows`` (int64 ``[k]``), e.g. to repeat a batch for guidance."""
        return Rows(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device | str) -> Rows:
        """The tables on a device."""
        return _to_device(self, device)


def seen(query: Rows, key: Rows, window: int | None = None) -> Tensor:
    """Which keys each query may attend to: causal over a sequence, both ways inside a media item.

    Args:
        query: tables ``[B, q]``.
        key: tables ``[B, k]``.
        window: a sliding window: keys ``order_q - window < order_k``; a media item stays whole.

    Returns:
        bool ``[B, q, k]``; all False for a padded query and for one before all keys.
    """
    query_tables = [table[:, :, None] for table in query.seeing]
    key_tables = [table[:, None, :] for table in key.seeing]
    return sees(query_tables, key_tables, window)


def sees(query: MaskTables, key: MaskTables, window: int | None = None) -> Tensor:
    """The attention mask rule, for `Rows.seeing` of queries and keys in any shapes that broadcast. It is defined only here."""
    q_order, q_sample, q_segment, q_bidirectional, _ = query
    k_order, k_sample, k_segment, k_bidirectional, k_visible_to_later = key
    same_segment = q_segment == k_segment
    bidirectional = same_segment & q_bidirectional & k_bidirectional
    causal = (k_order <= q_order) & (k_visible_to_later | same_segment)
    if window is not None:
        causal = causal & (k_order > q_order - window)
    return (causal | bidirectional) & (q_sample == k_sample) & (k_order >= 0) & (q_order >= 0)


def visible(query: Rows, key: Rows, window: int | None = None) -> Tensor:
    """`seen`, but a query that sees no key attends to the first one, so that no row of the softmax is empty."""
    return never_blind(seen(query, key, window))


def never_blind(mask: Tensor) -> Tensor:
    """A mask ``[..., q, k]`` in which a query without visible keys attends to the first key."""
    first = torch.zeros_like(mask)
    first[..., 0] = True
    return torch.where(mask.any(dim=-1, keepdim=True), mask, first)


@dataclass(kw_only=True)
class MediaRows:
    """The positions of one modality: [BOI] rows and item tokens."""

    rows: Rows
    tokens: Tensor
    """Float ``[B, n, P]``; zeros at [BOI] and padding. An objective replaces them by a corrupted copy."""
    item: Tensor
    """Index of the media item in the batch, int64 ``[B, n]``; -1 at [BOI] and padding."""
    boundary: Tensor
    """True at [BOI], bool ``[B, n]``."""
    grid_row: Tensor
    """Row of the token in its item's grid, int64 ``[B, n]``."""
    grid_column: Tensor
    """Column of the token in its item's grid, int64 ``[B, n]``."""
    time: Tensor
    """Noise level of each item, float ``[N]``: 0 is clean, 1 is noise."""
    noised: Tensor
    """Which items an objective may corrupt, bool ``[N]``."""
    has_loss: Tensor
    """Which items are targets, bool ``[N]``."""
    largest_noise: Tensor
    """Noise levels of an item go from 0 to this, float ``[N]``."""
    group: Tensor
    """Group of near-identical items, int64 ``[N]``; -1 is none."""
    clean: Tensor | None = None
    """The clean tokens ``[B, n, P]`` once an objective has corrupted `tokens`."""
    target: Tensor | None = None
    """The head's target once an objective has corrupted `tokens`; only the objective knows its meaning."""

    def mean(self, per_row: Tensor) -> Tensor:
        """Means over the tokens of each item, ``[B, n, ...]`` -> ``[N, ...]``."""
        is_token, num_items = self.item >= 0, len(self.noised)
        sums = torch.zeros(num_items, *per_row.shape[2:], device=per_row.device, dtype=per_row.dtype)
        counts = torch.zeros(num_items, device=per_row.device, dtype=per_row.dtype)
        sums = sums.index_add(0, self.item[is_token], per_row[is_token])
        counts = counts.index_add(0, self.item[is_token], torch.ones_like(counts)[self.item[is_token]])
        return sums / counts.clamp(min=1).view(-1, *[1] * (sums.ndim - 1))

    def restored(self) -> MediaRows:
        """The rows as they were before any corruption: every item clean."""
        if self.clean is None:
            return self
        return replace(self, tokens=self.clean, time=torch.zeros_like(self.time), clean=None, target=None)

    def columns(self, indices: Tensor) -> MediaRows:
        """Some positions of every row, by int64 ``[k]``, with only their items."""
        per_row = ("tokens", "item", "boundary", "grid_row", "grid_column", "clean", "target")
        tables = {name: None if (table := getattr(self, name)) is None else table[:, indices] for name in per_row}
        return replace(self, rows=self.rows.columns(indices), **tables).index(torch.arange(len(self.item)))

    def index(self, rows: Tensor) -> MediaRows:
        """The batch rows ``rows`` (int64 ``[k]``), with only their items."""
        items = self.item[rows]
        item_ids, item_number = torch.unique(items, return_inverse=True)  # the place of an item among those that stay
        num_negative = int((item_ids < 0).sum())  # -1, [BOI] and padding, comes first where there is any
        item_ids = item_ids[num_negative:]
        per_position = ("tokens", "boundary", "grid_row", "grid_column", "clean", "target")
        per_item = ("time", "noised", "has_loss", "largest_noise", "group")
        return MediaRows(
            rows=self.rows.index(rows),
            item=torch.where(items >= 0, item_number - num_negative, -1),
            **{name: None if getattr(self, name) is None else getattr(self, name)[rows] for name in per_position},
            **{name: getattr(self, name)[item_ids] for name in per_item},
        )

    def at(self, per_item: Tensor, fill: float = 0.0) -> Tensor:
        """Spread a per-item value ``[N]``, bool or a number, over its positions ``[B, n]``; ``fill`` elsewhere."""
        if not len(per_item):
            return torch.full(self.item.shape, fill, dtype=per_item.dtype, device=self.item.device)
        values = per_item[self.item.clamp(min=0)]
        return torch.where(self.item >= 0, values, torch.full_like(values, fill))

    def to(self, device: torch.device | str) -> MediaRows:
        """The rows on a device."""
        return _to_device(self, device)


@dataclass(kw_only=True)
class Batch:
    """Packed sequences as tables, sorted by owner."""

    text: Rows
    text_ids: Tensor
    """int64 ``[B, n]``; `END_OF_MEDIA` at [EOI], 0 at padding."""
    labels: Tensor
    """Target token of each text position, int64 ``[B, n]``; `IGNORE` where there is no loss."""
    media: dict[str, MediaRows] = field(default_factory=dict)
    text_reads_media: bool = True
    """Whether any text position comes after a media item. If not, text states do not depend on media."""
    media_reads_text: bool = True
    """Whether any media position comes after text. If not, media states do not depend on text."""
    num_sequences: int = 0
    clean_ids: Tensor | None = None
    """The original ids ``[B, n]`` once an objective has masked some of `text_ids` by `END_OF_MEDIA`."""

    @property
    def num_positions(self) -> int:
        """Text and media positions of all rows, boundary rows included, without padding."""
        tables = [self.text, *(media.rows for media in self.media.values())]
        return sum(int((table.order >= 0).sum()) for table in tables)

    def with_media(self, modality: str, **changes) -> Batch:
        """A derived batch in which some fields of one modality's rows are replaced."""
        return replace(self, media={**self.media, modality: replace(self.media[modality], **changes)})

    def index(self, rows: Tensor) -> Batch:
        """The batch rows ``rows`` (int64 ``[k]``)."""
        text = self.text.index(rows)
        media = {name: media_rows.index(rows) for name, media_rows in self.media.items()}
        samples = torch.cat([text.sample, *(media_rows.rows.sample for media_rows in media.values())], dim=1)
        return replace(
            self,
            text=text,
            text_ids=self.text_ids[rows],
            labels=self.labels[rows],
            clean_ids=None if self.clean_ids is None else self.clean_ids[rows],
            media=media,
            num_sequences=int((samples.max(dim=1).values + 1).sum()),
        )

    def unmasked(self) -> Batch:
        """The batch with its original text ids."""
        return self if self.clean_ids is None else replace(self, text_ids=self.clean_ids, clean_ids=None)

    def words_alone(self) -> Batch:
        """The unmasked text positions, as if the batch had no media."""
        text = replace(self.text, after_media=torch.zeros_like(self.text.after_media))
        return replace(self.unmasked(), text=text, media={}, text_reads_media=False, media_reads_text=False)

    def media_alone(self) -> Batch:
        """The clean media positions, as if the batch had no text."""
        return replace(
            self,
            text=self.text.none(),
            text_ids=self.text_ids[:, :0],
            labels=self.labels[:, :0],
            clean_ids=None,
            media={name: rows.restored() for name, rows in self.media.items()},
            text_reads_media=False,
            media_reads_text=False,
        )

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device."""
        batch = _to_device(self, device)
        return replace(batch, media={name: rows.to(device) for name, rows in self.media.items()})


def _to_device(tables: Any, device: torch.device | str) -> Any:
    """A copy of a dataclass with its tensors and tables on a device."""
    values = ((f.name, getattr(tables, f.name)) for f in fields(tables))
    return replace(tables, **{name: value.to(device) for name, value in values if isinstance(value, (Tensor, Rows))})


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of name; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
