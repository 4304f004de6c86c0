"""Conversations: how turns are formatted for a model, and whether the next turn is a picture."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, Literal, cast, get_args

from xfusion.data.requests import PICTURE
from xfusion.data.sequence import Audio, Image, Text, XFusionError
from xfusion.generation import base
from xfusion.generation.base import Listener, Progress, Segment, Viewer, seeds_of
from xfusion.generation.segments import generate, listener_for, viewer_for
from xfusion.model import Model
from xfusion.objectives.solvers import Solver

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
        XFusionError: there is no turn, or the base's template rejects these roles.
    """
    if not messages:
        raise XFusionError("there is no turn to answer: give at least one message")
    reads_own_pictures = own_pictures and "caption" in model.capabilities
    turns = [
        [m["content"]]
        if isinstance(m["content"], str)
        else [_as_text(m), *_requests(m)]
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
    messages: Seq[Message] | Seq[Seq[Message]],
    *,
    draw: DrawMode = "auto",
    size: int | None = None,
    seed: int = 0,
    seeds: Seq[int] | None = None,
    steps: int = 25,
    guidance: float | None = None,
    solver: Solver | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    schema: dict[str, Any] | None = None,
    progress: Progress | None = None,
    listen: Listener | None = None,
    show: Viewer | None = None,
) -> list[Any]:
    """The next turn of a conversation, or of each of several: text, or a picture optionally followed by text.

    A text answer is `generate`'s answer to `conversation`; for a text-only conversation it is the base's own. An answer about
    pictures is one line, unless they start the only turn (`ends_at_line`). Under ``auto``
    the pack's opening head reads the base's last hidden state, alongside the LM head, and decides whether the answer starts
    with a picture. Such an answer draws what the user's last message describes; a pack that can caption then adds a text
    describing the finished picture. Pictures drawn by the pack itself are replaced by the text ``(picture)`` in later turns,
    so that the base keeps answering. Pictures shown by the user are read, and the head is not used after one.

    Of several conversations, the head decides in one pass, and all pictures are drawn as one batch. The answers are those of
    single calls with the same seeds: text by the base alone is computed conversation by conversation, so that its tokens are
    the same; pictures and text about them agree as a batch of `generate` does.

    Args:
        model: a model.
        messages: as in `conversation`; or a list of such conversations.
        draw: ``never`` skips all of this, ``always`` draws at every turn.
        size: side of pictures in pixels; None uses the trained size.
        seed: conversation i uses ``seed + i``.
        seeds: one seed per conversation instead.
        steps: steps from noise to picture.
        guidance: classifier-free guidance scale; None uses the model's own.
        solver: the solver to sample with (`xfusion.objectives.solvers`); None uses the model's own.
        max_tokens: longest text in tokens.
        temperature: sampling temperature; 0, or anything below 1e-5, is greedy.
        top_p: nucleus sampling.
        top_k: sample from the k most likely tokens; 0 is all, whatever the base's generation_config says.
        schema: restrict texts to the JSON texts of this schema (see `generate`).
        progress: called while drawing.
        listen: called with the index of a conversation and every token of its text as it is generated.
        show: called with the index of a conversation and its picture as soon as it is drawn, before its text.

    Returns:
        ``[text]``, ``[picture]`` or ``[picture, text]``; a list of these for several conversations.

    Raises:
        XFusionError: the model cannot draw, or ``auto`` is used with a pack without an opening head.
    """
    single = not messages or isinstance(messages[0], dict)
    conversations = cast("Seq[Seq[Message]]", [messages] if single else messages)
    answer_seeds = seeds_of(seed, seeds, len(conversations), "conversations")
    prompts = openings(model, conversations, draw)
    results: list[Any] = [None] * len(conversations)
    lines = [ends_at_line(messages) for messages in conversations]
    for draws, one_line in ((False, False), (False, True), (True, False)):
        members = [i for i, p in enumerate(prompts) if (p is not None) == draws and (draws or lines[i] == one_line)]
        if not members:
            continue
        shared: dict[str, Any] = {
            "seeds": [answer_seeds[i] for i in members],
            "steps": steps,
            "guidance": guidance,
            "solver": solver,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "schema": schema,
            "one_line": one_line,
            "progress": progress,
            "listen": listener_for(listen, members),
            "show": viewer_for(show, members),
        }
        if draws:
            answers = answer_with_pictures(model, [cast("str", prompts[i]) for i in members], size=size, **shared)
        else:
            lists = [conversation(model, conversations[i], own_pictures=draw == "never") for i in members]
            answers = generate(model, lists, **shared)
        for i, turn in zip(members, answers, strict=True):
            results[i] = turn
    return results[0] if single else results


def ends_at_line(messages: Seq[Message]) -> bool:
    """Whether a line break ends the answer to a conversation, if it contains media.

    Such a conversation has one turn per line (`conversation`), so a line break ends the answer like any other turn: after
    text before a picture, packs that were trained on pictures alone predict it instead of the end token, and then go on with
    further turns. A single turn that starts with its media is what packs are trained on. Its answer may have several lines.
    """
    content = messages[0]["content"] if messages else ""
    return len(messages) != 1 or isinstance(content, str) or not content or isinstance(content[0], str)


def answer_with_pictures(
    model: Model,
    prompts: Seq[str],
    *,
    size: int | None = None,
    seeds: Seq[int],
    steps: int = 25,
    guidance: float | None = None,
    solver: Solver | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    schema: dict[str, Any] | None = None,
    one_line: bool = False,
    progress: Progress | None = None,
    listen: Listener | None = None,
    show: Viewer | None = None,
) -> list[Any]:
    """Answers that start with a picture: drawn of a prompt each, then described by a pack that can caption.

    Args:
        model: a model that can draw.
        prompts: what to draw, as from `openings`.
        size: side of the pictures in pixels; None uses the trained size.
        seeds: one per prompt.

    The other settings are those of `generate`.

    Returns:
        ``[picture]`` or ``[picture, text]`` of each prompt.
    """
    requests = [[prompt, Image(size=size)] for prompt in prompts]
    drawn = generate(
        model, requests, seeds=seeds, steps=steps, guidance=guidance, solver=solver, progress=progress, show=show
    )
    if "caption" not in model.capabilities:
        return drawn
    texts = generate(
        model,
        drawn,
        seeds=seeds,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        schema=schema,
        one_line=one_line,
        listen=listen,
    )
    return [[*picture, *text] for picture, text in zip(drawn, texts, strict=True)]


def opens(model: Model, messages: Seq[Message], draw: DrawMode = "auto") -> str | None:
    """`openings` of one conversation."""
    return openings(model, [messages], draw)[0]


def openings(model: Model, conversations: Seq[Seq[Message]], draw: DrawMode = "auto") -> list[str | None]:
    """What the next turn of each conversation draws, as a prompt; None where the turn is text.

    The prompt is what the user's last turn describes, or an earlier turn if the last describes nothing ("another one"). It is
    the whole last turn if the pack has no opening head or the head finds nothing.

    Args:
        model: a model.
        conversations: each as in `conversation`.
        draw: see `answer`.

    Raises:
        XFusionError: see `answer`; or a conversation does not end with the user.
    """
    if draw not in get_args(DrawMode):
        raise XFusionError(f"draw {draw!r} is not one of {', '.join(get_args(DrawMode))}")
    if draw == "never":
        return [None] * len(conversations)
    model.require("draw", "take draw='never'")
    head = model.opening
    text_conversations = [[{"role": m["role"], "content": _as_text(m)} for m in messages] for messages in conversations]
    drawing = list(range(len(conversations)))
    if draw == "auto":
        if head is None:
            raise XFusionError(
                "this pack has no opening head, which decides whether to draw: make one with xfusion train opening PACK,"
                " or take draw='never' or 'always'"
            )
        undecided = [i for i in drawing if not (conversations[i] and _has_media(conversations[i][-1]))]
        drawing = []
        for start in range(0, len(undecided), base.BATCH):
            indices = undecided[start : start + base.BATCH]
            probabilities = head.probabilities(model.backbone, [text_conversations[i] for i in indices])
            drawing += [i for i, probability in zip(indices, probabilities, strict=True) if probability > 0.5]
    prompts: list[str | None] = [None] * len(conversations)
    for i in drawing:
        user_turns = [message["content"] for message in text_conversations[i] if message["role"] == "user"]
        if not user_turns:
            raise XFusionError("there is no turn of the user that could say what to draw")
        descriptions = (head.what(model.backbone, turn) for turn in reversed(user_turns)) if head else ()
        prompts[i] = next(filter(None, descriptions), user_turns[-1])
    return prompts


def _has_media(message: Message) -> bool:
    """Whether a turn contains media: the model then reads it, and the text-only opening head is not used."""
    return not isinstance(message["content"], str) and not all(isinstance(s, str) for s in message["content"])


def _as_text(message: Message) -> str:
    """The content of a turn as text, with `PICTURE` in place of each picture."""
    content = message["content"]
    segments = [content] if isinstance(content, str) else content
    shown = (segment for segment in segments if not isinstance(segment, (Image, Audio)))
    return "\n".join(segment if isinstance(segment, str) else PICTURE for segment in shown)


def _requests(message: Message) -> list[Image | Audio]:
    """The pictures and sounds of a turn that are yet to be made."""
    return [segment for segment in message["content"] if isinstance(segment, (Image, Audio))]
