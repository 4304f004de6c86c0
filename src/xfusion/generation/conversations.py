"""Conversations: how turns are laid out for a model, and whether the next one is a picture."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, Literal, get_args

from xfusion.data.requests import PICTURE
from xfusion.data.sequence import Image, Text, XFusionError
from xfusion.generation.base import Segment
from xfusion.generation.segments import generate
from xfusion.model import Model

DrawMode = Literal["never", "auto", "always"]
"""Whether answers open with a picture: not at all, where one is asked for, at every turn."""
Message = dict[str, Any]
"""A turn of a conversation: ``role``, and ``content``, words or a list of words, pictures and sounds."""


def conversation(model: Model, messages: Seq[Message], *, own_pictures: bool = True) -> list[Segment]:
    """A conversation as a list of segments, to be continued by `generate`.

    Words alone stand in the base's own chat template, and the base answers them as it answers everyone. With a picture
    among them, or one to draw (`Image`), the turns stand in reading order, a line each and without roles: that is how a
    picture and a question stood in training, and no template knows pictures.

    Args:
        model: a model.
        messages: ``{"role": ..., "content": words or a list of segments}``, the oldest first.
        own_pictures: whether the assistant's pictures are looked at, by a model that can caption; else they are called
            ``(picture)``, and the base answers where the user shows none.

    Raises:
        XFusionError: the base's template refuses these roles.
    """
    looked_at = own_pictures and "caption" in model.capabilities
    turns = [
        [m["content"]]
        if isinstance(m["content"], str)
        else [_as_words(m)]
        if m["role"] == "assistant" and not looked_at
        else list(m["content"])
        for m in messages
    ]
    if all(isinstance(segment, str) for turn in turns for segment in turn):
        words = [
            {"role": message["role"], "content": "".join(turn)} for message, turn in zip(messages, turns, strict=True)
        ]
        return [Text(ids=model.backbone.chat(words))]
    out: list[Segment] = []
    for number, turn in enumerate(turns):
        for segment in ["\n", *turn] if number else turn:
            if isinstance(segment, str) and out and isinstance(out[-1], str):
                out[-1] += segment
            else:
                out.append(segment)
    return out


def answer(
    model: Model,
    messages: Seq[Message],
    *,
    draw: DrawMode = "auto",
    size: int | None = None,
    **settings: Any,
) -> list[Any]:
    """The next turn of a conversation, in words or in a picture with words behind it.

    In words it is `generate`'s answer to `conversation`; where all words are, that is the base's own. Under ``auto`` the
    pack's opening head reads the base's last hidden state, beside the vocabulary, and an answer that opens with a picture
    draws what the user's last words name; words behind it name the finished picture, by a pack that can. Pictures that
    the pack drew itself are then called ``(picture)`` among the words that follow, so that the base goes on answering;
    pictures that the user shows are looked at, and the head is not asked behind one.

    Args:
        model: a model.
        messages: as `conversation` takes them.
        draw: ``never`` runs nothing of this, ``always`` draws at every turn.
        size: side of pictures in pixels; None takes the trained one.
        settings: of `generate`: ``seed``, ``steps``, ``guidance``, ``max_tokens``, ``listen``, ...

    Returns:
        ``[words]``, ``[picture]`` or ``[picture, words]``.

    Raises:
        XFusionError: the model cannot draw, or ``auto`` is asked of a pack without an opening head.
    """
    what = opens(model, messages, draw)
    if what is None:
        return generate(model, conversation(model, messages, own_pictures=draw == "never"), **settings)
    drawing = {name: settings[name] for name in _DRAWING & set(settings)}
    (picture,) = generate(model, [what, Image(size=size)], **drawing)
    return [picture, *(generate(model, [picture], **settings) if "caption" in model.capabilities else [])]


_DRAWING = {"seed", "seeds", "steps", "guidance", "solver", "progress"}
"""Settings of `generate` that a picture takes."""


def opens(model: Model, messages: Seq[Message], draw: DrawMode = "auto") -> str | None:
    """What the next turn of a conversation draws; None where it is words.

    It is what the last turn of the user names, or the one before where that names nothing ("another one"); all of the
    last words where the pack has no opening head, or finds nothing.

    Args:
        model: a model.
        messages: as `conversation` takes them.
        draw: see `answer`.

    Raises:
        XFusionError: see `answer`; or the conversation does not end with the user.
    """
    if draw not in get_args(DrawMode):
        raise XFusionError(f"draw {draw!r} is not one of {', '.join(get_args(DrawMode))}")
    if draw == "never":
        return None
    model.require("draw", "take draw='never'")
    head, words = model.opening, [{"role": m["role"], "content": _as_words(m)} for m in messages]
    if draw == "auto":
        if head is None:
            raise XFusionError(
                "this pack has no opening head, which decides whether to draw: make one with xfusion train opening PACK,"
                " or take draw='never' or 'always'"
            )
        shows = bool(messages) and _shows(messages[-1])
        if shows or head.probability(model.backbone, words) <= 0.5:
            return None
    asked = [message["content"] for message in words if message["role"] == "user"]
    if not asked:
        raise XFusionError("there is no turn of the user that could say what to draw")
    found = (head.what(model.backbone, turn) for turn in reversed(asked)) if head else ()
    return next(filter(None, found), asked[-1])


def _shows(message: Message) -> bool:
    """Whether a turn holds media: it is then looked at, and the head, which reads words alone, is not asked."""
    return not isinstance(message["content"], str) and not all(isinstance(s, str) for s in message["content"])


def _as_words(message: Message) -> str:
    """The content of a turn, its pictures by what they are called."""
    content = message["content"]
    segments = [content] if isinstance(content, str) else content
    return "\n".join(segment if isinstance(segment, str) else PICTURE for segment in segments)
