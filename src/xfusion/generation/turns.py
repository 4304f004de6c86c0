"""Prefix cache for conversations with media: keys and values of what was read, and tokens of the media.

The next turn of a conversation starts with everything before it, so only the new part has to be read. A prefix is identified
by its tokens, its media and the weights that read it. Text-only conversations are answered by the base itself and are not
cached here: its bits must not depend on earlier requests.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from PIL import ExifTags
from PIL import Image as PILImage
from torch import Tensor

from xfusion.backbone import Cache
from xfusion.data.pack import pack
from xfusion.data.sequence import END_OF_MEDIA, Batch, Media, Sequence, Sound, Text
from xfusion.modalities.base import Modality
from xfusion.model import Model

KEPT_TURNS = 8
"""How many prefixes are cached; the least recently used are dropped."""
KEPT_SHOWN = 64
"""How many pictures and sounds have their tokens cached; the oldest are dropped."""
Unit = int | bytes
"""A token id, or a hash that identifies a picture or sound."""


@dataclass(frozen=True)
class Beginning:
    """The KV cache of a prefix, and the weights that computed it."""

    cache: Cache
    weights: tuple[tuple[int, int], ...]


def units(prompt: tuple[Text | Media, ...]) -> tuple[Unit, ...]:
    """The units of a prompt in reading order; the end of a medium is a token of its own."""
    out: list[Unit] = []
    for segment in prompt:
        if isinstance(segment, Text):
            out += segment.ids
        else:
            facts = (segment.modality, segment.grid, segment.state, segment.bidirectional, segment.shared_position)
            out += [hashlib.sha256(repr(facts).encode() + _bytes(segment.tokens)).digest(), END_OF_MEDIA]
    return tuple(out)


def begun(model: Model, prompt: tuple[Text | Media, ...], asked: tuple[Unit, ...]) -> tuple[Cache, Batch]:
    """The KV cache of the longest prefix of a prompt that was read before, and a batch of the rest (all of it if there is
    none). ``asked`` are the prompt's `units`.
    """
    whole, known = pack([[Sequence(segments=prompt)]]), model.engine.turns
    weights = _weights(model)
    for key in [key for key, found in known.items() if found.weights != weights]:
        del known[key]
    longest = max((key for key in known if len(key) < len(asked) and asked[: len(key)] == key), key=len, default=None)
    if longest is None:
        return model.backbone.new_cache(model.fusion.num_towers, 1), whole.to(model.device)
    known.move_to_end(longest)
    cache = known[longest].cache.copy()
    return cache, _behind(whole, int(cache.rows.order.max())).to(model.device)


def remember(model: Model, read: tuple[Unit, ...], cache: Cache) -> None:
    """Store a copy of a KV cache under the units ``read`` that it covers."""
    known = model.engine.turns
    known[read] = Beginning(cache.copy(), _weights(model))
    known.move_to_end(read)
    if len(known) > KEPT_TURNS:
        known.popitem(last=False)


def tokens_of(model: Model, media: Modality, shown: PILImage.Image | Sound, size: int) -> Tensor:
    """Tokens ``[1, M, P]`` of one medium, encoded alone and cached, so that its bits never depend on other inputs."""
    if isinstance(shown, Sound):
        what: object = (shown.rate, hashlib.sha256(_bytes(shown.samples)).digest())
    elif isinstance(shown, PILImage.Image):
        palette = shown.palette.getdata() if shown.palette else None
        turned = shown.getexif().get(ExifTags.Base.Orientation)
        facts = (shown.mode, shown.size, palette, shown.info.get("transparency"), turned)
        what = (facts, hashlib.sha256(shown.tobytes()).digest())
    else:
        return media.encode([shown], size).cpu()
    known, key = model.engine.shown, (media.name, size, what)
    if key not in known:
        known[key] = media.encode([shown], size).cpu()
        if len(known) > KEPT_SHOWN:
            known.popitem(last=False)
    return known[key]


def _behind(batch: Batch, last: int) -> Batch:
    """The positions of a one-row batch that come after ``last`` in reading order."""

    def later(order: Tensor) -> Tensor:
        return (order[0] > last).nonzero()[:, 0]

    words, names = later(batch.text.order), list(batch.media)
    left = {name: later(rows.rows.order) for name, rows in batch.media.items()}
    media = {name: batch.media[name].columns(places) for name, places in left.items() if len(places)}
    ids = batch.text_ids[:, words]
    for number, name in enumerate(media):  # ends of media are numbered by the modalities present
        ids = torch.where(ids == END_OF_MEDIA - names.index(name), END_OF_MEDIA - number, ids)
    return replace(batch, text=batch.text.columns(words), text_ids=ids, labels=batch.labels[:, words], media=media)


def _weights(model: Model) -> tuple[tuple[int, int], ...]:
    """A fingerprint that changes whenever a trained weight does."""
    return tuple((p.data_ptr(), p._version) for p in model.new_parameters())


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
