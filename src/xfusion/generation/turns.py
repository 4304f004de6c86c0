"""Prefix cache for conversations with media: keys and values of what was read, and tokens of the media.

The next turn of a conversation starts with everything before it, so only the new part has to be read. A prefix is identified
by its tokens, its media and the weights that read it. Text-only conversations are answered by the base itself and are not
cached here: its bits must not depend on earlier requests.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from PIL import ExifTags
from PIL import Image as PILImage
from torch import Tensor

from xfusion.backbone import Cache
from xfusion.data.pack import pack
from xfusion.data.sequence import END_OF_MEDIA, Batch, Media, Sequence, Sound, Text
from xfusion.modalities.base import Modality
from xfusion.model import Model

PREFIX_BYTES = 1 << 30
"""Bytes of keys and values of prefixes that are cached; the least recently used prefixes are dropped."""
MAX_MEDIA = 64
"""How many pictures and sounds have their tokens cached; the oldest are dropped."""
Unit = int | bytes
"""A token id, or a hash that identifies a picture or sound."""


@dataclass(frozen=True)
class CachedPrefix:
    """The KV cache of a prefix, and the weights that computed it."""

    cache: Cache
    weights: tuple[tuple[int, int], ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of its keys and values."""
        return sum(t.nbytes for slot in self.cache.slots for pair in slot.values() for t in pair)


def units(prompt: tuple[Text | Media, ...]) -> tuple[Unit, ...]:
    """The units of a prompt in reading order; the end of a medium is a token of its own."""
    prompt_units: list[Unit] = []
    for segment in prompt:
        if isinstance(segment, Text):
            prompt_units += segment.ids
        else:
            facts = (segment.modality, segment.grid, segment.state, segment.bidirectional, segment.shared_position)
            prompt_units += [hashlib.sha256(repr(facts).encode() + _bytes(segment.tokens)).digest(), END_OF_MEDIA]
    return tuple(prompt_units)


def resume_prefix(
    model: Model, prompt: tuple[Text | Media, ...], prompt_units: tuple[Unit, ...]
) -> tuple[Cache, Batch]:
    """The KV cache of the longest prefix of a prompt that was read before, and a batch of the rest (all of it if there is
    none). ``prompt_units`` are the prompt's `units`.
    """
    batch, prefixes = pack([[Sequence(segments=prompt)]]), model.engine.turns
    weights = _weights(model)
    for key in [key for key, entry in prefixes.items() if entry.weights != weights]:
        del prefixes[key]
    longest = max(
        (key for key in prefixes if len(key) < len(prompt_units) and prompt_units[: len(key)] == key),
        key=len,
        default=None,
    )
    if longest is None:
        return model.backbone.new_cache(model.fusion.num_towers, 1), batch.to(model.device)
    # Its own prefixes are of no use any more: a question that is asked again is looked up by what stands before it.
    for key in [key for key in prefixes if len(key) < len(longest) and longest[: len(key)] == key]:
        del prefixes[key]
    prefixes.move_to_end(longest)
    cache = prefixes[longest].cache.copy()
    return cache, _suffix(batch, int(cache.rows.order.max())).to(model.device)


def remember(model: Model, prefix_units: tuple[Unit, ...], cache: Cache) -> None:
    """Store a copy of a KV cache under the units of the prefix that it covers."""
    prefixes = model.engine.turns
    prefixes[prefix_units] = CachedPrefix(cache.copy(), _weights(model))
    prefixes.move_to_end(prefix_units)
    while len(prefixes) > 1 and sum(entry.nbytes for entry in prefixes.values()) > PREFIX_BYTES:
        prefixes.popitem(last=False)


def tokens_of(model: Model, media: Modality, item: PILImage.Image | Sound, size: int) -> Tensor:
    """Tokens ``[1, M, P]`` of one medium, encoded alone and cached, so that its bits never depend on other inputs."""
    if isinstance(item, Sound):
        identity: object = (item.rate, hashlib.sha256(_bytes(item.samples)).digest())
    elif isinstance(item, PILImage.Image):
        palette = item.palette.getdata() if item.palette else None
        orientation = item.getexif().get(ExifTags.Base.Orientation)
        facts = (item.mode, item.size, palette, item.info.get("transparency"), orientation)
        identity = (facts, hashlib.sha256(item.tobytes()).digest())
    else:
        return media.encode([item], size).cpu()
    cached, key = model.engine.media_tokens, (media.name, size, identity)
    if key not in cached:
        cached[key] = media.encode([item], size).cpu()
        if len(cached) > MAX_MEDIA:
            cached.popitem(last=False)
    return cached[key]


def _suffix(batch: Batch, last: int) -> Batch:
    """The positions of a one-row batch that come after ``last`` in reading order."""

    def columns_after(order: Tensor) -> Tensor:
        return (order[0] > last).nonzero()[:, 0]

    text_columns, names = columns_after(batch.text.order), list(batch.media)
    media_columns = {name: columns_after(rows.rows.order) for name, rows in batch.media.items()}
    media = {name: batch.media[name].columns(columns) for name, columns in media_columns.items() if len(columns)}
    ids = batch.text_ids[:, text_columns]
    for new_index, name in enumerate(media):  # ends of media are numbered by the modalities present
        ids = torch.where(ids == END_OF_MEDIA - names.index(name), END_OF_MEDIA - new_index, ids)
    return replace(
        batch, text=batch.text.columns(text_columns), text_ids=ids, labels=batch.labels[:, text_columns], media=media
    )


def _weights(model: Model) -> tuple[tuple[int, int], ...]:
    """A fingerprint that changes whenever a trained weight does."""
    return tuple((p.data_ptr(), p._version) for p in model.new_parameters())


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
