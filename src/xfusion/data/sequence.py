"""The sample (an ordered list of segments), its batch of position tables, and who may see whom.

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
Seeing = Seq[Tensor]
"""Order, sample, segment, whether seen both ways and whether visible to later: of positions, in any shape."""
IGNORE = -100
"""Label of a text position without a loss."""


class XFusionError(ValueError):
    """Bad input, said in one line: the thing, the values that disagree, and what to do."""

    told_elsewhere = False
    """Whether another process of the same run tells it, so that people read it once."""


class Unreadable(XFusionError):
    """Examples that were sound when the data was opened, or not looked at, and cannot be read when they are needed, or are more
    than the model takes.

    Args:
        message: what is wrong with the first of them.
        examples: for each its number in the source, and what is wrong, where whoever raises it knows the numbers.
    """

    def __init__(self, message: str, examples: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.examples = dict(examples or {})


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip() or repr(error)).splitlines()[0]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One picture or sound of a data source, without its pixels or samples."""

    id: str
    """Unique within the source."""
    captions: tuple[str, ...]
    """``captions[0]`` is the name (the answer when captioning); the others are wordings that mean the same picture."""
    group: str
    """Near-identical pictures share a group: a split never divides one, a hit on any member counts."""
    origin: str
    """Where it stands, for messages: ``file.jsonl:12`` or ``folder/a.png``."""
    question: str = ""
    """What is asked behind it, to which ``captions[0]`` is the answer; empty where the data asks nothing."""
    content: str = ""
    """Hash of its file, or of its address with the commit where nobody reads that ahead; empty where the source never changes."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """A picture to draw, in a list given to ``generate``: the place and the output size in pixels."""

    size: int | None = None
    """Side in pixels; None takes the size that the model was trained at."""


@dataclass(frozen=True, kw_only=True)
class Audio:
    """A sound to make, in a list given to ``generate``: the place and the length."""

    seconds: float | None = None
    """Length in seconds; None takes the length that the model was trained at."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sound:
    """A sound that is shown to a model, one channel; `xfusion.read_sound` makes one of a file."""

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
    """Whether the model is trained to say these tokens."""
    unread_end: bool = False
    """Whether the last token of an answer is only learned, and read by nothing behind it. It is so at the end of a sequence,
    too; before another picture it lets an answer end that a prompt would give without its end token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Media:
    """One media item: its tokens, and what is done with them."""

    tokens: Tensor
    """Linear patches of the clean item, float ``[M, P]``."""
    grid: tuple[int, int]
    """Rows and columns of tokens; their product is ``M``."""
    modality: str = "image"
    """Name of the modality that made the tokens."""
    state: Literal["clean", "noised"] = "clean"
    """Clean items are context; noised ones are corrupted by the media objective."""
    has_loss: bool = False
    """Whether the model is trained to produce this item."""
    visible_to_later: bool = True
    """Whether positions after the item may see it (a noised copy beside a clean one is not)."""
    largest_noise: float = 1.0
    """Noise levels of a noised item go from 0 to this."""
    bidirectional: bool = True
    """Whether the item's tokens see each other both ways; else in reading order."""
    shared_position: bool = False
    """Whether all tokens of the item have one rotary position; rows and columns tell them apart."""
    behind_begin: bool = False
    """Whether the base's own beginning of text stands before the item where it opens a sequence."""
    group: int = -1
    """Items of one group are near-identical: none is a wrong answer for another. -1 is like no other."""


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
    """Number of the segment within the row, int64."""
    bidirectional: Tensor
    """True where the positions of one segment see each other both ways, bool."""
    visible_to_later: Tensor
    """False where only the position's own segment may see it, bool."""
    after_media: Tensor
    """True from the first media token ([BOI]) of a sequence on, bool: only there may anything new act on words."""

    @property
    def count(self) -> int:
        return self.order.shape[1]

    @property
    def seeing(self) -> Seeing:
        """The tables that say who sees whom, as `sees` takes them."""
        return self.order, self.sample, self.segment, self.bidirectional, self.visible_to_later

    @classmethod
    def empty(cls, batch: int, device: torch.device | str = "cpu") -> Rows:
        """Tables without positions for ``batch`` rows."""
        whole = torch.empty(batch, 0, dtype=torch.int64, device=device)
        flag = torch.empty(batch, 0, dtype=torch.bool, device=device)
        return cls(
            order=whole,
            sample=whole,
            position=whole,
            segment=whole,
            bidirectional=flag,
            visible_to_later=flag,
            after_media=flag,
        )

    @classmethod
    def cat(cls, tables: Seq[Rows]) -> Rows:
        """The tables side by side, ``[B, sum n]``."""
        return cls(**{f.name: torch.cat([getattr(t, f.name) for t in tables], dim=1) for f in fields(cls)})

    def columns(self, chosen: Tensor | slice) -> Rows:
        """Some positions of every row, by int64 ``[k]`` or a slice."""
        return Rows(**{f.name: getattr(self, f.name)[:, chosen] for f in fields(self)})

    def none(self) -> Rows:
        """Tables of the same rows without positions."""
        return self.columns(slice(0, 0))

    def index(self, rows: Tensor) -> Rows:
        """The batch rows ``rows`` (int64 ``[k]``), e.g. to repeat a batch for guidance."""
        return Rows(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def to(self, device: torch.device | str) -> Rows:
        """The tables on a device."""
        return _moved(self, device)


def seen(query: Rows, key: Rows, window: int | None = None) -> Tensor:
    """Which keys each query may attend to: causal over a sequence, both ways inside a media item.

    Args:
        query: tables ``[B, q]``.
        key: tables ``[B, k]``.
        window: a sliding window: keys ``order_q - window < order_k``; a media item stays whole.

    Returns:
        bool ``[B, q, k]``; a padded query sees nothing, and so does one before all of the keys.
    """
    queries, keys = [table[:, :, None] for table in query.seeing], [table[:, None, :] for table in key.seeing]
    return sees(queries, keys, window)


def sees(query: Seeing, key: Seeing, window: int | None = None) -> Tensor:
    """The rule itself, of `Rows.seeing` of queries and keys in any shapes that broadcast: who sees whom stands here alone."""
    q_order, q_sample, q_segment, q_both, _ = query
    k_order, k_sample, k_segment, k_both, k_later = key
    same_segment = q_segment == k_segment
    both_ways = same_segment & q_both & k_both
    causal = (k_order <= q_order) & (k_later | same_segment)
    if window is not None:
        causal = causal & (k_order > q_order - window)
    return (causal | both_ways) & (q_sample == k_sample) & (k_order >= 0) & (q_order >= 0)


def visible(query: Rows, key: Rows, window: int | None = None) -> Tensor:
    """`seen`, but a query that sees nothing (padding) sees position 0 of the keys: no row of a softmax is empty."""
    return never_blind(seen(query, key, window))


def never_blind(found: Tensor) -> Tensor:
    """Bool ``[..., q, k]`` in which a query that sees nothing sees the first key."""
    first = torch.zeros_like(found)
    first[..., 0] = True
    return torch.where(found.any(dim=-1, keepdim=True), found, first)


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
    """Which items are near-identical, int64 ``[N]``; those of -1 are like no other."""
    clean: Tensor | None = None
    """The clean tokens ``[B, n, P]`` once an objective has corrupted `tokens`."""
    target: Tensor | None = None
    """What the head shall predict, once an objective has corrupted `tokens`; it alone knows what that means."""

    def mean(self, per_row: Tensor) -> Tensor:
        """Means over the tokens of each item, ``[B, n, ...]`` -> ``[N, ...]``."""
        inside, count = self.item >= 0, len(self.noised)
        total = torch.zeros(count, *per_row.shape[2:], device=per_row.device, dtype=per_row.dtype)
        tokens = torch.zeros(count, device=per_row.device, dtype=per_row.dtype)
        total = total.index_add(0, self.item[inside], per_row[inside])
        tokens = tokens.index_add(0, self.item[inside], torch.ones_like(tokens)[self.item[inside]])
        return total / tokens.clamp(min=1).view(-1, *[1] * (total.ndim - 1))

    def restored(self) -> MediaRows:
        """The rows as they were before any corruption: every item clean."""
        if self.clean is None:
            return self
        return replace(self, tokens=self.clean, time=torch.zeros_like(self.time), clean=None, target=None)

    def columns(self, chosen: Tensor) -> MediaRows:
        """Some positions of every row, by int64 ``[k]``, with their items alone."""
        per_row = ("tokens", "item", "boundary", "grid_row", "grid_column", "clean", "target")
        cut = {name: None if (t := getattr(self, name)) is None else t[:, chosen] for name in per_row}
        return replace(self, rows=self.rows.columns(chosen), **cut).index(torch.arange(len(self.item)))

    def index(self, rows: Tensor) -> MediaRows:
        """The batch rows ``rows`` (int64 ``[k]``), with their items alone."""
        chosen = self.item[rows]
        kept, number = torch.unique(chosen, return_inverse=True)  # the place of an item among those that stay
        first = int((kept < 0).sum())  # -1, [BOI] and padding, comes first where there is any
        kept = kept[first:]
        whole = ("tokens", "boundary", "grid_row", "grid_column", "clean", "target")
        per_item = ("time", "noised", "has_loss", "largest_noise", "group")
        return MediaRows(
            rows=self.rows.index(rows),
            item=torch.where(chosen >= 0, number - first, -1),
            **{name: None if getattr(self, name) is None else getattr(self, name)[rows] for name in whole},
            **{name: getattr(self, name)[kept] for name in per_item},
        )

    def at(self, per_item: Tensor, fill: float = 0.0) -> Tensor:
        """Spread a per-item value ``[N]``, bool or a number, over its positions ``[B, n]``; ``fill`` elsewhere."""
        if not len(per_item):
            return torch.full(self.item.shape, fill, dtype=per_item.dtype, device=self.item.device)
        spread = per_item[self.item.clamp(min=0)]
        return torch.where(self.item >= 0, spread, torch.full_like(spread, fill))

    def to(self, device: torch.device | str) -> MediaRows:
        """The rows on a device."""
        return _moved(self, device)


@dataclass(kw_only=True)
class Batch:
    """Packed sequences as tables, sorted by owner."""

    text: Rows
    text_ids: Tensor
    """int64 ``[B, n]``; `END_OF_MEDIA` at [EOI], 0 at padding."""
    labels: Tensor
    """The token that each text position must predict, int64 ``[B, n]``; `IGNORE` where there is no loss."""
    media: dict[str, MediaRows] = field(default_factory=dict)
    text_reads_media: bool = True
    """Whether any text position comes after a media item. Where False, the text states do not depend on the media."""
    media_reads_text: bool = True
    """Whether any media position comes after text. Where False, the media states do not depend on the text."""
    num_sequences: int = 0
    clean_ids: Tensor | None = None
    """The words ``[B, n]`` once an objective has masked some in `text_ids`, where `END_OF_MEDIA` then stands."""

    def with_media(self, modality: str, **changes) -> Batch:
        """A derived batch in which some fields of one modality's rows are replaced."""
        return replace(self, media={**self.media, modality: replace(self.media[modality], **changes)})

    def index(self, rows: Tensor) -> Batch:
        """The batch rows ``rows`` (int64 ``[k]``)."""
        text = self.text.index(rows)
        media = {name: own.index(rows) for name, own in self.media.items()}
        last = torch.cat([text.sample, *(own.rows.sample for own in media.values())], dim=1)
        return replace(
            self,
            text=text,
            text_ids=self.text_ids[rows],
            labels=self.labels[rows],
            clean_ids=None if self.clean_ids is None else self.clean_ids[rows],
            media=media,
            num_sequences=int((last.max(dim=1).values + 1).sum()),
        )

    def unmasked(self) -> Batch:
        """The batch with all of its words."""
        return self if self.clean_ids is None else replace(self, text_ids=self.clean_ids, clean_ids=None)

    def words_alone(self) -> Batch:
        """The text positions, unmasked, as if no media stood among them."""
        text = replace(self.text, after_media=torch.zeros_like(self.text.after_media))
        return replace(self.unmasked(), text=text, media={}, text_reads_media=False, media_reads_text=False)

    def media_alone(self) -> Batch:
        """The media positions, clean, as if no words stood among them."""
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
        moved = _moved(self, device)
        return replace(moved, media={name: rows.to(device) for name, rows in self.media.items()})


def _moved(tables: Any, device: torch.device | str) -> Any:
    """A copy of a dataclass whose tensors and tables lie on a device."""
    values = ((f.name, getattr(tables, f.name)) for f in fields(tables))
    return replace(tables, **{name: v.to(device) for name, v in values if isinstance(v, (Tensor, Rows))})


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of name; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
