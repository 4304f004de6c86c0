"""What all of sampling shares: the kinds of segments, how a prompt and a picture that is shown become parts of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

from PIL import Image as PILImage
from torch import Tensor

from xfusion.data.sequence import Audio, Image, Media, Sound, Text, XFusionError
from xfusion.generation.turns import tokens_of
from xfusion.model import Model

Progress = Callable[[int, int, Tensor | None], None]
"""Called with steps done, steps in all, and the current clean estimate ``[N, M, P]`` while drawing."""
Listener = Callable[[int, int], bool]
"""Called with the number of a list and each token of its answer as it is chosen; False ends that answer."""

MAX_PROMPT_TOKENS = 2048
"""Longest words among media, where the base could read more: who sees whom is then a mask of all pairs of positions, made for
every list of a batch, and no recipe trains at such a length. Words alone go to the base itself, as long as it can read them."""
BATCH = 64
"""Items per forward pass when many are asked for."""

Segment = str | Text | PILImage.Image | Image | Sound | Audio
Shown = PILImage.Image | Sound
"""What a model is shown: a picture or a sound, whichever it knows."""


class TooLong(XFusionError):
    """A prompt of more tokens than can be read."""


def encode_prompt(model: Model, text: str | Text, *, alone: bool = False) -> tuple[int, ...]:
    """Token ids of words.

    Args:
        model: whose base reads them.
        text: the words.
        alone: whether no media stand among them, so that the base alone reads them.

    Raises:
        TooLong: there are more than are read.
    """
    ids = text.ids if isinstance(text, Text) else model.backbone.encode(text)
    refuse_too_long(model, len(ids), alone=alone)
    return ids


def refuse_too_long(model: Model, count: int, *, alone: bool) -> None:
    """Refuse more tokens of words than are read; `encode_prompt` says what ``alone`` is.

    Raises:
        TooLong: there are more.
    """
    limits = [model.backbone.context_length, None if alone else MAX_PROMPT_TOKENS]
    limit = min((found for found in limits if found is not None), default=count)
    if count > limit:
        raise TooLong(f"the prompt has {count} tokens, more than the {limit} that are allowed: shorten it")


def refuse_to_draw(model: Model) -> None:
    """Refuse a model that cannot draw.

    Raises:
        XFusionError: it learned something else.
    """
    model.require("draw", "train one with a media objective, such as the recipe xfusion")


def refuse_to_read(model: Model) -> None:
    """Refuse a model that says no words behind pictures or sounds: what it would say was never learned.

    Raises:
        XFusionError: it learned something else.
    """
    model.require("caption", "take one that answers in words, of a recipe such as llava_1_5, or qwen_audio for sounds")


def refuse_one(shown: Any) -> None:
    """Refuse one picture or sound where a list of them is expected.

    Raises:
        XFusionError: it is one.
    """
    if isinstance(shown, (PILImage.Image, Sound)):
        what = "sound" if isinstance(shown, Sound) else "picture"
        raise XFusionError(f"one {what} was given where a list of them is expected: write [{what}]")


def seeds_of(seed: int, seeds: Seq[int] | None, count: int, what: str) -> list[int]:
    """A seed for each of ``count`` items: ``seeds``, or from ``seed`` on.

    Raises:
        XFusionError: ``seeds`` are not as many.
    """
    chosen = list(seeds) if seeds is not None else [seed + i for i in range(count)]
    if len(chosen) != count:
        raise XFusionError(f"{len(chosen)} seeds for {count} {what}: give one each")
    return chosen


def draw_size(model: Model, size: int | None) -> tuple[int, int]:
    """The size that a picture is drawn at and the size that it is returned at.

    A picture is drawn at the nearest size that the model was made for and resized; beyond 4 times that is refused.
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


def text_segment(model: Model, text: str | Text, *, alone: bool = False) -> tuple[Text, ...]:
    """Words as a part of a sequence; none where there are no words. ``alone`` as `encode_prompt` takes it."""
    ids = encode_prompt(model, text, alone=alone)
    return (Text(ids=ids),) if ids else ()


def media_segment(model: Model, shown: Seq[Shown], size: int | None = None) -> list[Media]:
    """Pictures, or sounds, as clean parts of a sequence; ``size`` is one of the modality's (None: the first).

    Raises:
        XFusionError: the model was not made for this size, or not for what is shown; or one thing is shown instead of a list, or
            a list as one thing.
    """
    refuse_one(shown)
    if any(isinstance(item, (list, tuple)) for item in shown):
        raise XFusionError("a list was given where one picture or sound is expected: ask about each of them")
    if not shown:
        return []
    media = model.reads(shown[0])
    if any(model.reads(item) is not media for item in shown):
        return [segment for item in shown for segment in media_segment(model, [item], size)]
    wanted = media.sizes[0] if size is None else size
    if wanted not in media.sizes:
        raise XFusionError(
            f"pictures of {wanted} px cannot be read: the model was made for {', '.join(map(str, media.sizes))} px,"
            " choose one of these"
        )
    alone = len(shown) == 1
    tokens = tokens_of(model, media, shown[0], wanted) if alone else media.encode(list(shown), wanted).cpu()
    return [media.segment(t, media.grid(wanted)) for t in tokens]
