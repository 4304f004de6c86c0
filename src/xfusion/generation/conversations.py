"""Conversations: how turns are formatted for a model, and whether the next turn is a picture."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, Literal, get_args

from xfusion.data.requests import PICTURE
from xfusion.data.sequence import Image, Text, XFusionError
from xfusion.generation.base import Segment
from xfusion.generation.segments import generate
from xfusion.model import Model

DrawMode = Literal["never", "auto", "always"]
"""When answers start with a picture: never, if one is requested, or at every turn."""
Message = dict[str, Any]
"""A turn of a conversation: ``role``, and ``content``, which is a text or a list of texts, pictures and sounds."""


def conversation(model: Model, messages: Seq[Message], *, own_pictures: bool = True) -> list[Segment]:
    """A conversation as a list of segments, to be continued by `generate`.

    A text-only conversation is formatted with the base's own chat template, and the base answers it as usual. If it contains
    a picture, or one to draw (`Image`), the turns are concatenated in reading order, one per line and without roles: that is
    how pictures and questions were laid out in training, and no template supports pictures.

    Args:
        model: a model.
        messages: ``{"role": ..., "content": text or a list of segments}``, oldest first.
        own_pictures: whether a model that can caption reads the assistant's pictures. Otherwise they are replaced by the text
            ``(picture)``, and the base answers if the user shows no pictures.

    Raises:
        XFusionError: the base's template rejects these roles.
    """
    reads_own_pictures = own_pictures and "caption" in model.capabilities
    turns = [
        [m["content"]]
        if isinstance(m["content"], str)
        else [_as_text(m)]
        if m["role"] == "assistant" and not reads_own_pictures
        else list(m["content"])
        for m in messages
    ]
    if all(isinstance(segment, str) for turn in turns for segment in turn):
        text_turns = [
            {"role": message["role"], "content": "".join(turn)} for message, turn in zip(messages, turns, strict=True)
        ]
        return [Text(ids=model.backbone.chat(text_turns))]
    segments: list[Segment] = []
    for index, turn in enumerate(turns):
        for segment in ["\n", *turn] if index else turn:
            if isinstance(segment, str) and segments and isinstance(segments[-1], str):
                segments[-1] += segment
            else:
                segments.append(segment)
    return segments


def answer(
    model: Model,
    messages: Seq[Message],
    *,
    draw: DrawMode = "auto",
    size: int | None = None,
    **settings: Any,
) -> list[Any]:
    """The next turn of a conversation: text, or a picture optionally followed by text.

    A text answer is `generate`'s answer to `conversation`; for a text-only conversation it is the base's own. Under ``auto``
    the pack's opening head reads the base's last hidden state, alongside the LM head, and decides whether the answer starts
    with a picture. Such an answer draws what the user's last message describes; a pack that can caption then adds a text
    describing the finished picture. Pictures drawn by the pack itself are replaced by the text ``(picture)`` in later turns,
    so that the base keeps answering. Pictures shown by the user are read, and the head is not used after one.

    Args:
        model: a model.
        messages: as in `conversation`.
        draw: ``never`` skips all of this, ``always`` draws at every turn.
        size: side of pictures in pixels; None uses the trained size.
        settings: settings of `generate`: ``seed``, ``steps``, ``guidance``, ``max_tokens``, ``listen``, ...

    Returns:
        ``[text]``, ``[picture]`` or ``[picture, text]``.

    Raises:
        XFusionError: the model cannot draw, or ``auto`` is used with a pack without an opening head.
    """
    drawing_prompt = opens(model, messages, draw)
    if drawing_prompt is None:
        return generate(model, conversation(model, messages, own_pictures=draw == "never"), **settings)
    drawing_settings = {name: settings[name] for name in _DRAWING_SETTINGS & set(settings)}
    (picture,) = generate(model, [drawing_prompt, Image(size=size)], **drawing_settings)
    return [picture, *(generate(model, [picture], **settings) if "caption" in model.capabilities else [])]


_DRAWING_SETTINGS = {"seed", "seeds", "steps", "guidance", "solver", "progress"}
"""Settings of `generate` that apply to drawing."""


def opens(model: Model, messages: Seq[Message], draw: DrawMode = "auto") -> str | None:
    """What the next turn of a conversation draws, as a prompt; None if the turn is text.

    The prompt is what the user's last turn describes, or an earlier turn if the last describes nothing ("another one"). It is
    the whole last turn if the pack has no opening head or the head finds nothing.

    Args:
        model: a model.
        messages: as in `conversation`.
        draw: see `answer`.

    Raises:
        XFusionError: see `answer`; or the conversation does not end with the user.
    """
    if draw not in get_args(DrawMode):
        raise XFusionError(f"draw {draw!r} is not one of {', '.join(get_args(DrawMode))}")
    if draw == "never":
        return None
    model.require("draw", "take draw='never'")
    head, text_messages = model.opening, [{"role": m["role"], "content": _as_text(m)} for m in messages]
    if draw == "auto":
        if head is None:
            raise XFusionError(
                "this pack has no opening head, which decides whether to draw: make one with xfusion train opening PACK,"
                " or take draw='never' or 'always'"
            )
        has_media = bool(messages) and _has_media(messages[-1])
        if has_media or head.probability(model.backbone, text_messages) <= 0.5:
            return None
    user_turns = [message["content"] for message in text_messages if message["role"] == "user"]
    if not user_turns:
        raise XFusionError("there is no turn of the user that could say what to draw")
    descriptions = (head.what(model.backbone, turn) for turn in reversed(user_turns)) if head else ()
    return next(filter(None, descriptions), user_turns[-1])


def _has_media(message: Message) -> bool:
    """Whether a turn contains media: the model then reads it, and the text-only opening head is not used."""
    return not isinstance(message["content"], str) and not all(isinstance(s, str) for s in message["content"])


def _as_text(message: Message) -> str:
    """The content of a turn as text, with `PICTURE` in place of each picture."""
    content = message["content"]
    segments = [content] if isinstance(content, str) else content
    return "\n".join(segment if isinstance(segment, str) else PICTURE for segment in segments)
