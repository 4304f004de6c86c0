"""Shared by all sampling code: the kinds of segments, and how prompts and input pictures become parts of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

from PIL import Image as PILImage
from torch import Tensor

from xfusion.data.sequence import Audio, Image, Media, Sound, Text, TooLong, XFusionError
from xfusion.generation.turns import tokens_of
from xfusion.model import Model
from xfusion.objectives.next_token import check_sampling

Progress = Callable[[int, int, Tensor | None], None]
"""Called while drawing with the steps done, the total steps, and the current clean estimate ``[N, M, P]``."""
Listener = Callable[[int, int], bool]
"""Called with the index of a list and each token of its answer as it is generated; False ends that answer."""
Viewer = Callable[[int, Any], None]
"""Called with the index of a list and each picture or sound of its answer as soon as it is made, before any text after it."""

MAX_PROMPT_TOKENS = 2048
"""Longest prompt text in tokens if there are media, even if the base has a longer context. The attention mask then covers
all pairs of positions for every list of a batch, and no recipe trains at such a length. Text-only prompts go to the base
itself and are limited only by its context length."""
BATCH = 64
"""Largest number of items per forward pass."""

SEEDS = 2**63
"""Seeds go from minus this number to below it."""

Segment = str | Text | PILImage.Image | Image | Sound | Audio
MediaInput = PILImage.Image | Sound
"""A model's media input: a picture or a sound, depending on what it supports."""


def encode_prompt(model: Model, text: str | Text, *, text_only: bool = False) -> tuple[int, ...]:
    """Token ids of a text.

    Args:
        model: the model whose base reads the text.
        text: the text.
        text_only: whether the prompt has no media, so that only the base reads it.

    Raises:
        TooLong: the text has more tokens than allowed.
    """
    ids = text.ids if isinstance(text, Text) else model.backbone.encode(text)
    refuse_too_long(model, len(ids), text_only=text_only)
    return ids


def refuse_too_long(model: Model, count: int, *, text_only: bool) -> None:
    """Refuse texts with more tokens than allowed; ``text_only`` is as in `encode_prompt`.

    Raises:
        TooLong: there are more.
    """
    limits = [model.backbone.context_length, None if text_only else MAX_PROMPT_TOKENS]
    limit = min((bound for bound in limits if bound is not None), default=count)
    if count > limit:
        raise TooLong(f"the prompt has {count} tokens, more than the {limit} that are allowed: shorten it")


def refuse_too_many_places(model: Model, count: int, max_tokens: int) -> None:
    """Refuse a prompt of texts and media with more positions than the base's context has, or, with its answer, than the base
    has learned: nothing could be computed behind them.

    Args:
        model: the model.
        count: positions of the prompt.
        max_tokens: longest answer in tokens; 0 if none is asked for.

    Raises:
        TooLong: there are more.
    """
    context, learned = model.backbone.context_length, model.backbone.longest
    if context is not None and count > context:
        raise TooLong(f"the prompt takes {count} places, more than the {context} that are allowed: shorten it")
    last = count + max(max_tokens, 1) - 1  # nothing is read behind the last token
    if learned is not None and last > learned:
        raise TooLong(
            f"the prompt takes {count} places and its answer up to {max_tokens}, more than the {learned} that the base has"
            " learned: shorten the prompt, or give fewer max_tokens"
        )


def refuse_to_draw(model: Model) -> None:
    """Refuse a model that cannot draw.

    Raises:
        XFusionError: the model was not trained to draw.
    """
    model.require("draw", "train one with a media objective, such as the recipe xfusion")


def refuse_to_read(model: Model) -> None:
    """Refuse a model that was not trained to generate text after pictures or sounds.

    Raises:
        XFusionError: the model was not trained to caption.
    """
    model.require("caption", "take one that answers in words, of a recipe such as llava_1_5, or qwen_audio for sounds")


def refuse_one(inputs: Any) -> None:
    """Refuse a single picture or sound where a list of them is expected.

    Raises:
        XFusionError: a single one was given.
    """
    if isinstance(inputs, (PILImage.Image, Sound)):
        kind = "sound" if isinstance(inputs, Sound) else "picture"
        raise XFusionError(f"one {kind} was given where a list of them is expected: write [{kind}]")


def refuse_sampling(temperature: float, top_p: float, top_k: int, max_tokens: int) -> None:
    """Refuse settings of text generation that mean nothing, before anything is computed.

    Raises:
        XFusionError: one is out of its range, or not a number.
    """
    check_sampling(temperature, top_p, top_k)
    if max_tokens < 1:
        raise XFusionError(f"max_tokens {max_tokens}: an answer has at least 1")


def seeds_of(seed: int, seeds: Seq[int] | None, count: int, what: str) -> list[int]:
    """A seed for each of ``count`` items: ``seeds``, or ``seed``, ``seed + 1``, ...

    Raises:
        XFusionError: the number of ``seeds`` is not ``count``, or torch has no generator of such a seed.
    """
    item_seeds = list(seeds) if seeds is not None else [seed + i for i in range(count)]
    if len(item_seeds) != count:
        raise XFusionError(f"{len(item_seeds)} seeds for {count} {what}: give one each")
    for item_seed in item_seeds:
        if not -SEEDS <= item_seed < SEEDS:
            raise XFusionError(f"seed {item_seed}: choose a whole number from -2^63 to 2^63 - 1")
    return item_seeds


def draw_size(model: Model, size: int | None) -> tuple[int, int]:
    """The size at which a picture is drawn and the size at which it is returned.

    A picture is drawn at the nearest size that the model supports, then resized. A factor of more than 4 is refused.
    """
    sizes = model.image.sizes
    if size is None:
        return sizes[0], sizes[0]
    if size < 1:
        raise XFusionError(f"picture size {size} must be at least 1 pixel")
    native = min(sizes, key=lambda s: (abs(s - size), s))
    if not native / 4 <= size <= 4 * native:
        legal = ", ".join(f"{-(-s // 4)} to {4 * s}" for s in sizes)
        raise XFusionError(f"picture size {size} is out of reach of the trained sizes {sizes}: choose {legal} pixels")
    return native, size


def text_segment(model: Model, text: str | Text, *, text_only: bool = False) -> tuple[Text, ...]:
    """Text as a part of a sequence; empty if the text has no tokens. ``text_only`` is as in `encode_prompt`."""
    ids = encode_prompt(model, text, text_only=text_only)
    return (Text(ids=ids),) if ids else ()


def media_segment(model: Model, inputs: Seq[MediaInput], size: int | None = None) -> list[Media]:
    """Pictures or sounds as clean parts of a sequence; ``size`` is one of the modality's sizes (None: the first).

    Raises:
        XFusionError: the model does not support this size or this kind of media; or a single item was given instead of a list,
            or a list instead of a single item.
    """
    refuse_one(inputs)
    if any(isinstance(item, (list, tuple)) for item in inputs):
        raise XFusionError("a list was given where one picture or sound is expected: ask about each of them")
    if not inputs:
        return []
    media = model.reads(inputs[0])
    if any(model.reads(item) is not media for item in inputs):
        return [segment for item in inputs for segment in media_segment(model, [item], size)]
    side = media.sizes[0] if size is None else size
    if side not in media.sizes:
        raise XFusionError(
            f"pictures of {side} px cannot be read: the model was made for {', '.join(map(str, media.sizes))} px,"
            " choose one of these"
        )
    is_single = len(inputs) == 1
    tokens = tokens_of(model, media, inputs[0], side) if is_single else media.encode(list(inputs), side).cpu()
    return [media.segment(t, media.grid(side)) for t in tokens]
