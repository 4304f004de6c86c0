"""Turn a request into jobs: check it against the limits, read it, and prepare it for the queue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from xfusion.apps.server import requests
from xfusion.apps.server.answers import Refused
from xfusion.apps.server.batches import Continue, Decide, Embed, Job, Repaint, Words, Work
from xfusion.apps.server.limits import Limits
from xfusion.data.sequence import Image, Text, XFusionError
from xfusion.generation import TextStream, TooLong, conversation, draw_size, ends_at_line, kinds_of, prompt_length
from xfusion.model import Model
from xfusion.objectives.next_token import GREEDY


def chat(params: requests.Chat, model: Model, limits: Limits, hosts: frozenset[str]) -> tuple[list[Job], int]:
    """The next turn of a conversation: its jobs, and the tokens of its prompt.

    Raises:
        Refused: it is beyond the limits, or this model cannot do it.
    """
    _check_number(params, limits)
    decides = params.draw == "auto" and "image" not in params.modalities
    draws = decides or "image" in params.modalities
    steps = params.drawing_steps(limits) if draws else 1
    turns = requests.messages(params, model, limits, hosts, own_pictures=not decides)
    if decides and model.opening is None:
        message = (
            "this model has no opening head, which decides whether to draw: leave draw out, or ask for a picture by"
        )
        raise Refused(400, f"{message} modalities", code="not_capable", param="draw")
    if decides and params.messages[-1].role != "user":
        raise Refused(400, "whether to draw is decided behind a turn of the user", param="messages")
    if "image" in params.modalities:
        if "draw" not in model.capabilities:
            raise requests.incapable(model, "draw", "xfusion")
        if "text" in params.modalities and "caption" not in model.capabilities:
            raise requests.incapable(model, "say words behind a picture", "xfusion")
        requests.trained_side(model)
        turns[-1]["content"].append(Image(size=params.side()))
        if "text" in params.modalities:
            turns[-1]["content"].append("")  # text follows the picture
    with _as_refusal():
        segments = conversation(model, turns, own_pictures=not decides)
        if decides:
            draw_size(model, params.side())
        prompt, kinds = prompt_length(model, segments), kinds_of(model, segments)
    if not any(isinstance(segment, Text) or segment for segment in segments):
        raise Refused(400, "the messages are empty", param="messages")
    call = Continue(
        model=model,
        kinds=kinds,
        steps=steps,
        guidance=params.guidance if draws else None,
        max_tokens=_max_tokens(params, model, limits, prompt),
        temperature=params.temperature or 0.0,
        top_p=1.0 if params.top_p is None else params.top_p,
        one_line=ends_at_line(turns),
    )
    is_greedy_text = call.temperature < GREEDY and all(kind == "text" for kind in kinds)
    work: Work = Words(model=model, rows=limits.words) if is_greedy_text else call
    if decides:
        work = Decide(answer=call, words=work, size=params.side())
    inputs = turns if decides else segments
    return _jobs(params, model, work, inputs, params.stops(), call.max_tokens), prompt


def _max_tokens(params: requests.Chat, model: Model, limits: Limits, prompt: int) -> int:
    requested = params.max_completion_tokens or params.max_tokens
    requests.within(requested or 1, limits.tokens, "max_tokens")
    max_positions = getattr(model.backbone.config, "max_position_embeddings", None) or 1 << 30
    available = max_positions - prompt - 8  # the start of a text, and the rows around pictures
    if (requested or 1) > available:
        raise Refused(
            400,
            f"the messages have {prompt} tokens and the answer may have {requested or 1}, but this model has"
            f" {max_positions} places",
            code="context_length_exceeded",
        )
    return requested or min(limits.tokens, available)


def images(params: requests.Images, model: Model, limits: Limits) -> list[Job]:
    """Pictures of a prompt.

    Raises:
        Refused: they are beyond the limits, or this model cannot draw.
    """
    steps = _check_drawing(params, model, limits)
    with _as_refusal():
        segments = [params.prompt, Image(size=params.side())]
        prompt_length(model, segments)
        kinds = kinds_of(model, segments)
    work = Continue(
        model=model,
        kinds=kinds,
        steps=steps,
        guidance=params.guidance,
        max_tokens=1,
        temperature=0.0,
        top_p=1.0,
    )
    return _jobs(params, model, work, segments)


def edit(params: requests.Images, model: Model, limits: Limits, image: bytes, mask: bytes | None) -> list[Job]:
    """Inpainting of a part of a picture.

    Raises:
        Refused: it is beyond the limits, picture and mask do not match, or this model cannot draw.
    """
    steps = _check_drawing(params, model, limits)
    side = requests.trained_side(model)
    if params.side() not in (None, side):
        raise Refused(400, f"size: pictures are edited at {side}x{side}, the trained size", param="size")
    picture, holes = requests.picture_and_mask(image, mask, model, limits)
    with _as_refusal():
        prompt_length(model, [params.prompt])
    work = Repaint(model=model, steps=steps, guidance=params.guidance)
    return _jobs(params, model, work, (picture, holes, params.prompt))


def embeddings(params: requests.Embeddings, model: Model, limits: Limits, hosts: frozenset[str]) -> tuple[Job, int]:
    """Embeddings of texts and pictures: the job, and the number of text tokens.

    Raises:
        Refused: they are beyond the limits, this model cannot read them, or its embeddings have another width.
    """
    objective: Any = next(candidate for candidate in model.objectives if "embed" in candidate.gives)
    width = objective.embedding_width
    if params.dimensions not in (None, width):
        message = f"dimensions is {params.dimensions}, but this model's vectors have {width}"
        raise Refused(400, message, param="dimensions")
    items = requests.embedding_inputs(params, model, limits, hosts)
    with _as_refusal():
        prompt = sum(prompt_length(model, [item]) for item in items)
    words = TextStream(model.backbone.decode)
    work = Embed(model=model)
    return Job(work=work, inputs=items, seed=0, index=0, words=words, notify=lambda job, new: None), prompt


def _check_drawing(params: requests.Images, model: Model, limits: Limits) -> int:
    """Check a request for pictures; returns its sampling steps."""
    _check_number(params, limits)
    steps = params.drawing_steps(limits)
    requests.within(len(params.prompt), limits.characters, "characters")
    if "draw" not in model.capabilities:
        raise requests.incapable(model, "draw", "xfusion")
    requests.trained_side(model)
    return steps


def _check_number(params: requests.Chat | requests.Images, limits: Limits) -> None:
    requests.within(params.n, min(limits.n, limits.queue), "n")


def _jobs(
    params: requests.Chat | requests.Images,
    model: Model,
    work: Work,
    inputs: Any,
    stops: tuple[str, ...] = (),
    max_tokens: int = 0,
) -> list[Job]:
    """One job per answer, with seeds that count up."""
    first_seed = params.first_seed()
    return [
        Job(
            work=work,
            inputs=inputs,
            seed=first_seed + i,
            index=i,
            words=TextStream(model.backbone.decode, stops, max_tokens),
            notify=lambda job, new: None,
        )
        for i in range(params.n)
    ]


@contextmanager
def _as_refusal() -> Iterator[None]:
    """Turn the library's errors about a request into `Refused`."""
    try:
        yield
    except XFusionError as error:
        raise as_refused(error) from error


def as_refused(error: Exception) -> Refused:
    """An error as `Refused`; internal errors are logged, and their details are not sent."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, XFusionError):
        return Refused(400, str(error), code="context_length_exceeded" if isinstance(error, TooLong) else None)
    return Refused(500, "the server failed to answer; its log says why", code="internal_error")
