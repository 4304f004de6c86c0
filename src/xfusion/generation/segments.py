"""Lists of segments in, generated segments out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image as PILImage
from torch import Tensor

from xfusion.data.pack import pack
from xfusion.data.sequence import Audio, Image, Media, Sequence, Sound, Text, XFusionError
from xfusion.data.templates import IN_JSON, with_begin
from xfusion.generation import base
from xfusion.generation.base import (
    Listener,
    MediaInput,
    Progress,
    Segment,
    Viewer,
    draw_size,
    encode_prompt,
    media_segment,
    refuse_sampling,
    refuse_to_read,
    refuse_too_long,
    refuse_too_many_places,
    seeds_of,
    text_segment,
)
from xfusion.generation.drawing import codes, draw_tokens, pictures_of
from xfusion.generation.schema import schema_answers
from xfusion.generation.text_only import text_only_tokens
from xfusion.generation.words import answer_tokens
from xfusion.modalities.audio import AudioModality
from xfusion.model import Model
from xfusion.objectives.solvers import Solver


def generate(
    model: Model,
    items: Seq[Segment] | Seq[Seq[Segment]],
    *,
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
    one_line: bool = False,
    progress: Progress | None = None,
    listen: Listener | None = None,
    show: Viewer | None = None,
) -> list[Any]:
    """Continue a list of segments, or a batch of such lists.

    Each `Image` is a picture to draw at its place in the list, each `Audio` a sound to generate, returned as codes. A list
    that ends in text, a picture or a sound gets a text answer.
    Text-only lists are continued by the base model's own ``generate``, with the same result as
    ``generate(prompt, max_new_tokens=max_tokens, do_sample=temperature > 0, temperature=..., top_p=..., top_k=...)`` with
    `PLAIN`, and `PLAIN_SAMPLING` if it samples, after ``torch.manual_seed(seed)``.

    Args:
        model: a model.
        items: ``[str | PIL.Image | Sound | Image | Audio, ...]`` or a list of such lists; `Text` is a text given as
            token ids.
        seed: list i uses ``seed + i``. The first item generated in it uses this seed itself, each further one a seed derived
            from it.
        seeds: one seed per list instead.
        steps: steps from noise to picture.
        guidance: classifier-free guidance scale; None uses the model's own.
        solver: the solver to sample with (`xfusion.objectives.solvers`); None uses the model's own.
        max_tokens: longest answer in tokens.
        temperature: sampling temperature; 0, or anything below 1e-5, is greedy.
        top_p: nucleus sampling.
        top_k: sample from the k most likely tokens; 0 is all, whatever the base's generation_config says.
        schema: restrict text answers to the JSON texts of this schema (`schema_answers`). If the answers are objects, a
            question after a picture is phrased as in training (`xfusion.data.templates.in_json`). Models trained with
            ``json_share`` know which value belongs inside the braces, others do not.
        one_line: end a text answer that comes after media at its first line break. Text-only lists are not affected.
        progress: called while drawing.
        listen: called with every token of a text answer as it is generated.
        show: called with every picture or sound as soon as it is made.

    Returns:
        the generated segments (``str``, ``PIL.Image``, or codes of a sound, int64) of the list, or a list of such lists for a
        batch.

    Raises:
        XFusionError: the input has pictures or sounds, or asks for text after generated ones, and the model cannot caption;
            something is to be drawn and it cannot draw; a list is empty or contains something that is not a segment.
    """
    if isinstance(items, str) or not isinstance(items, (list, tuple)) or not items:
        raise XFusionError(
            "generate takes a list of segments such as ['a red apple', xfusion.Image()], or a list of lists"
        )
    single = not isinstance(items[0], (list, tuple))
    lists = [cast("Seq[Segment]", item) for item in ([items] if single else items)]
    for item in lists:
        if not isinstance(item, (list, tuple)) or not item:  # a str would be taken for a list of its letters
            raise XFusionError(f"a batch is of lists of segments, and {item!r:.80} is none: write [segment]")
    refuse_sampling(temperature, top_p, top_k, max_tokens)
    list_seeds = seeds_of(seed, seeds, len(lists), "lists")
    texts = None if schema is None else schema_answers(schema)
    allowed = None if texts is None else [model.backbone.encode(text) for text in texts]
    if allowed is not None and (longest := 1 + max(map(len, allowed))) > max_tokens:
        raise XFusionError(f"max_tokens {max_tokens} is too few for the schema's longest answer: give {longest}")
    settings = _Settings(
        steps=steps,
        guidance=guidance,
        solver=solver,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        allowed=allowed,
        in_json=texts is not None and all(text.startswith("{") for text in texts),
        one_line=one_line,
        progress=progress,
    )
    by_kinds: dict[tuple[Any, ...], list[int]] = {}
    for i, item in enumerate(lists):
        kinds = kinds_of(model, item)
        _refuse_unreadable(model, kinds)
        prompt_length(model, item, 0 if isinstance(kinds[-1], tuple) else max_tokens)
        by_kinds.setdefault(kinds, []).append(i)
    results: list[Any] = [None] * len(lists)
    for kinds, members in by_kinds.items():  # lists with the same kinds of segments run as one batch
        for start in range(0, len(members), base.BATCH):
            batch_indices = members[start : start + base.BATCH]
            batch_lists = [lists[i] for i in batch_indices]
            answers = _generate_batch(
                model,
                batch_lists,
                kinds,
                [list_seeds[i] for i in batch_indices],
                settings,
                listener_for(listen, batch_indices),
                viewer_for(show, batch_indices),
            )
            for i, answer in zip(batch_indices, answers, strict=True):
                results[i] = answer
    return results[0] if single else results


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Settings of `generate` shared by all of its lists."""

    steps: int
    guidance: float | None
    solver: Solver | None
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    allowed: Seq[tuple[int, ...]] | None
    """The allowed text answers, as tokens; None allows all."""
    in_json: bool
    """Whether all allowed answers are JSON objects, which the question then has to ask for."""
    one_line: bool
    """Whether a line break ends a text answer after media."""
    progress: Progress | None


def _is_text_only(kinds: Seq[Any]) -> bool:
    """Whether a list is text-only, so that only the base reads it."""
    return all(kind == "text" for kind in kinds)


def listener_for(listen: Listener | None, list_indices: Seq[int]) -> Listener | None:
    """The listener with rows of a batch mapped to indices of the lists."""
    return None if listen is None else lambda row, token: listen(list_indices[row], token)


def viewer_for(show: Viewer | None, list_indices: Seq[int]) -> Viewer | None:
    """The viewer with rows of a batch mapped to indices of the lists."""
    return None if show is None else lambda row, item: show(list_indices[row], item)


def kinds_of(model: Model, items: Seq[Segment]) -> tuple[Any, ...]:
    """The kinds of a list's segments; `generate` batches lists of equal kinds.

    Raises:
        XFusionError: something is not a segment, or a picture has a size out of reach.
    """
    return tuple(_kind(model, segment) for segment in items)


def _kind(model: Model, segment: Segment) -> Any:
    if isinstance(segment, (str, Text)):
        return "text"
    if isinstance(segment, (PILImage.Image, Sound)):
        return model.reads(segment).name
    if isinstance(segment, Image):
        return ("draw", *draw_size(model, segment.size))
    if isinstance(segment, Audio):
        return ("sound", *_sound_size(model, segment))
    raise XFusionError(
        f"{segment!r:.80} ({type(segment).__name__}) is not a segment: give str, PIL.Image.Image, xfusion.Sound, xfusion.Image"
        " or xfusion.Audio"
    )


def _refuse_unreadable(model: Model, kinds: Seq[Any]) -> None:
    """Refuse media input, and text after generated media, if the model cannot read media."""
    has_media_input = any(isinstance(kind, str) and kind != "text" for kind in kinds)
    has_text_after_generated = any(isinstance(kind, tuple) for kind in kinds) and not isinstance(kinds[-1], tuple)
    if has_media_input or has_text_after_generated:
        refuse_to_read(model)


def _sound_size(model: Model, request: Audio) -> tuple[int, int]:
    """Frames of a generated sound, twice (native and wanted size): sounds always have the model's trained length."""
    audio = model.modality
    if not isinstance(audio, AudioModality) or "draw" not in model.capabilities:
        able = ", ".join(sorted(model.capabilities))
        raise XFusionError(f"this model makes no sound: it can {able}; take a pack of a recipe such as audiopalm")
    seconds = audio.config.seconds
    if request.seconds not in (None, seconds):
        raise XFusionError(f"this model makes sounds of {seconds:g} s, not of {request.seconds:g}: leave seconds out")
    return audio.sizes[0], audio.sizes[0]


def _generate_batch(
    model: Model,
    lists: Seq[Seq[Segment]],
    kinds: Seq[Any],
    seeds: Seq[int],
    settings: _Settings,
    listen: Listener | None,
    show: Viewer | None,
) -> list[list[Any]]:
    """Continuations of lists that have the same kinds of segments."""
    contexts: list[tuple[Text | Media, ...]] = [() for _ in lists]
    results: list[list[Any]] = [[] for _ in lists]
    num_generated, text_only = 0, _is_text_only(kinds)
    for place, kind in enumerate(kinds):
        if kind == "text":
            text_segments = [
                text_segment(model, cast("str | Text", item[place]), text_only=text_only) for item in lists
            ]
            contexts = [(*context, *segment) for context, segment in zip(contexts, text_segments, strict=True)]
        elif isinstance(kind, str):
            media_segments = media_segment(model, [cast("MediaInput", item[place]) for item in lists])
            contexts = [(*context, media) for context, media in zip(contexts, media_segments, strict=True)]
        else:
            task, native, output_size = kind
            tokens = draw_tokens(
                model,
                contexts,
                native,
                seeds=[_seed_of(seed, num_generated) for seed in seeds],
                steps=settings.steps,
                guidance=settings.guidance,
                solver=settings.solver,
                progress=settings.progress,
            )
            generated = (
                pictures_of(model, tokens, native, output_size) if task == "draw" else codes(model, tokens, native)
            )
            for row, (answer, item) in enumerate(zip(results, generated, strict=True)):
                answer.append(item)
                if show is not None:
                    show(row, item)
            num_generated += 1
            grid = model.modality.grid(native)
            # The finished item is clean context for everything later.
            contexts = [
                (*context, model.modality.segment(t, grid)) for context, t in zip(contexts, tokens.cpu(), strict=True)
            ]
    if isinstance(kinds[-1], tuple):
        return results
    if any(isinstance(segment, Media) for segment in contexts[0]):
        ids = answer_tokens(
            model,
            [
                _with_question_ending(model, context, item, settings.in_json)
                for context, item in zip(contexts, lists, strict=True)
            ],
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seeds=seeds,
            allowed=settings.allowed,
            one_line=settings.one_line,
            listen=listen,
        )
    else:
        # One by one: each equals its single call, sampled or not.
        ids = [
            tokens
            for i, (context, s) in enumerate(zip(contexts, seeds, strict=True))
            for tokens in text_only_tokens(
                model,
                [tuple(token for segment in context if isinstance(segment, Text) for token in segment.ids)],
                max_tokens=[settings.max_tokens],
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                seed=s,
                allowed=settings.allowed,
                listen=listener_for(listen, [i]),
            )
        ]
    for answer, tokens in zip(results, ids, strict=True):
        answer.append(model.backbone.decode(tokens))
    return results


def _seed_of(seed: int, index: int) -> int:
    """The seed of the generated item number ``index`` (from 0) of a list. With equal noise, two pictures would be the same."""
    if not index:
        return seed
    digest = hashlib.sha256(f"{seed}/made/{index}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _with_question_ending(
    model: Model, context: tuple[Text | Media, ...], item: Seq[Segment], in_json: bool = False
) -> tuple[Text | Media, ...]:
    """A context with media, completed at the end of its list: a question after a picture gets the ending used in training."""
    last_segment = item[-1]
    if not (isinstance(last_segment, (str, Text)) and last_segment):
        return context
    ending = f"{IN_JSON}\n" if in_json else "\n"
    if isinstance(last_segment, Text):
        return (*context, Text(ids=model.backbone.encode(ending)))
    # Encoded in one piece, as in training: tokenizers merge "?" with the newline, or put a space before either part.
    prefix = context[: len(context) - len(text_segment(model, last_segment))]
    return (*prefix, Text(ids=model.backbone.encode(f"{last_segment}{ending}")))


@torch.no_grad()
def log_likelihoods(model: Model, items: Seq[Segment], answers: Seq[str]) -> list[tuple[float, bool]]:
    """Log-likelihoods of text answers after a list of segments, and whether greedy decoding would start with them.

    Args:
        model: a model; it must caption if there is a picture or a sound among the segments.
        items: texts, pictures and sounds as in `generate`, but none to be generated.
        answers: texts, each scored independently.

    Returns:
        for each answer the sum of its tokens' log-likelihoods (natural logarithm, without an end token), and whether every
        token is the most likely one.

    Raises:
        XFusionError: there is nothing to answer, an answer has no tokens, something is to be generated, or there are media and
            the model cannot caption.
    """
    context: tuple[Text | Media, ...] = ()
    kinds = kinds_of(model, items)
    _refuse_unreadable(model, kinds)
    for segment, kind in zip(items, kinds, strict=True):
        if isinstance(kind, tuple):
            raise XFusionError("what is still to be made has no answers that could be likely: generate it first")
        text_segments = (
            text_segment(model, cast("str | Text", segment), text_only=_is_text_only(kinds)) if kind == "text" else None
        )
        context = (
            *context,
            *(media_segment(model, [cast("MediaInput", segment)]) if text_segments is None else text_segments),
        )
    if not context:
        raise XFusionError("there is nothing to answer: the prompt is empty")
    results = []
    for answer in answers:
        ids = model.backbone.encode(answer)
        if not ids:
            raise XFusionError(f"the answer {answer!r} has no tokens: name words")
        logits = _answer_logits(model, context, items, ids).float().cpu()
        log_probs = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None])
        results.append((float(log_probs.sum()), logits.argmax(dim=-1).tolist() == list(ids)))
    return results


def _answer_logits(
    model: Model, context: tuple[Text | Media, ...], items: Seq[Segment], ids: tuple[int, ...]
) -> Tensor:
    """Logits ``[n, V]`` that predict the tokens of an answer."""
    if not any(isinstance(segment, Media) for segment in context):
        token_ids = [*(i for segment in context if isinstance(segment, Text) for i in segment.ids), *ids]
        logits = model.text_model()(torch.tensor([token_ids], device=model.backbone.device)).logits[0]
    else:
        segments = with_begin(model.backbone.begin_ids, (*_with_question_ending(model, context, items), Text(ids=ids)))
        hidden, run = model.run_pass(pack([[Sequence(segments=segments)]]).to(model.device))
        logits = model.engine.backbone.logits(hidden[:, run.slices["text"]][:, -len(ids) - 1 :])[0]
    return logits[-len(ids) - 1 : -1]


def prompt_length(model: Model, items: Seq[Segment], max_tokens: int = 0) -> int:
    """Number of tokens of a list of segments: its texts, pictures and sounds, both given and to be generated.

    Args:
        model: a model.
        items: the segments.
        max_tokens: longest answer in tokens, for which places must be left; 0 if none is asked for.

    Raises:
        TooLong: there are more tokens than allowed.
        XFusionError: a picture's size is out of reach.
    """
    words, total, places, kinds = 0, 0, 0, kinds_of(model, items)
    text_only = _is_text_only(kinds)
    for segment, kind in zip(items, kinds, strict=True):
        if kind == "text":
            words += len(encode_prompt(model, cast("str | Text", segment), text_only=text_only))
        else:
            media = model.modality if isinstance(kind, tuple) else model.reads(segment)
            rows, columns = media.grid(kind[1] if isinstance(kind, tuple) else media.sizes[0])
            total += rows * columns
            places += 1 if media.config.position == "shared" else rows * columns
    if text_only:
        refuse_too_long(model, words, text_only=True)
    refuse_too_many_places(model, words + places, max_tokens)
    return words + total
