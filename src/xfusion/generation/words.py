"""Words behind pictures and sounds: answers, and how likely given ones are."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from xfusion.backbone import Cache
from xfusion.data.pack import pack
from xfusion.data.sequence import Batch, Media, Rows, Sequence, Text
from xfusion.data.templates import opened, question_text
from xfusion.generation import base
from xfusion.generation.base import Listener, Shown, media_segment, refuse_one, refuse_to_read
from xfusion.generation.schema import restricted
from xfusion.generation.turns import begun, remember, units
from xfusion.model import Model

LENGTH_GROUPS = 4
"""Groups of like length that candidate answers are scored in, at most: there are no more than lengths."""


@torch.no_grad()
def answer_tokens(
    model: Model,
    contexts: Seq[tuple[Text | Media, ...]],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seeds: Seq[int],
    top_k: int = 0,
    allowed: Seq[tuple[int, ...]] | None = None,
    listen: Listener | None = None,
) -> list[list[int]]:
    """Continue contexts that hold media with text, with keys and values kept per tower.

    With ``allowed`` every answer is one of these token sequences: at each step no token can be chosen but those with which one
    of them goes on. An answer ends where it is one of them and the end token is chosen, or none goes on.
    """
    # An empty text behind the media makes [EOI] appear: the first word is read from it.
    prompts = [c if isinstance(c[-1], Text) else (*c, Text(ids=())) for c in contexts]
    prompts = [opened(model.backbone.begin_ids, prompt) for prompt in prompts]
    asked = units(prompts[0]) if len(prompts) == 1 else None
    if asked is not None:  # a conversation goes on where it was left
        cache, batch = begun(model, prompts[0], asked)
    else:
        batch = pack([[Sequence(segments=segments)] for segments in prompts]).to(model.device)
        cache = model.backbone.new_cache(model.fusion.num_towers, len(prompts))
    hidden, run = model.run_pass(batch, cache=cache, update=True)
    if asked is not None:
        remember(model, asked, cache)
    rows = torch.arange(len(prompts), device=model.device)
    tail = batch.text.order.argmax(dim=1)
    logits = model.engine.backbone.logits(hidden[:, run.slices["text"]][rows, tail][:, None])[:, 0]
    order = cache.rows.order.amax(dim=1).cpu()
    position = cache.rows.position.amax(dim=1).cpu()
    read = cache.rows.count
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    ends = set(model.backbone.end_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for done in range(max_tokens):
        if allowed is not None:
            logits = restricted(logits, answers, allowed, model.backbone.end_ids[0])
        token = model.text_objective.choose(logits.cpu(), temperature, top_p, generators, top_k)
        for i in sorted(open_rows):
            if int(token[i]) in ends:
                open_rows.discard(i)
            else:
                answers[i].append(int(token[i]))
                if listen and not listen(i, int(token[i])):
                    open_rows.discard(i)
        if not open_rows or done == max_tokens - 1:
            break
        order, position = order + 1, position + 1
        following = _following(token[:, None], order[:, None], position[:, None])
        hidden, _ = model.run_pass(following.to(model.device), cache=cache, update=True)
        logits = model.engine.backbone.logits(hidden)[:, 0]
    if asked is not None and (said := tuple(answers[0][: cache.rows.count - read])):
        remember(model, asked + said, cache)
    return answers


def _following(ids: Tensor, order: Tensor, position: Tensor) -> Batch:
    """Words ``[B, n]`` behind a cached beginning with media; where the order is -1 is nothing."""
    words = order >= 0
    table = Rows(
        order=order,
        sample=torch.where(words, 0, -1),
        position=position,
        segment=torch.full_like(order, 1 << 20),
        bidirectional=torch.zeros_like(words),
        visible_to_later=torch.ones_like(words),
        after_media=torch.ones_like(words),
    )
    return Batch(text=table, text_ids=ids, labels=ids)


def caption(
    model: Model,
    pictures: Seq[Shown],
    *,
    question: str = "",
    size: int | None = None,
    max_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[str]:
    """Say what pictures show, or sounds say.

    Args:
        model: a model that can caption.
        pictures: any size; cut to the middle square and resized as in training. Or sounds, for a model that hears.
        question: what to ask, or nothing.
        size: side in pixels that pictures are read at, one that the model was made for (None: the first).
        max_tokens: longest answer.
        temperature: 0 is greedy, and so is less than 1e-5.
        top_p: nucleus sampling.
        top_k: sample among the so many likeliest tokens; 0 is all.
        seed: answer i has the seed ``seed + i``.

    Raises:
        XFusionError: the model cannot caption, was not made for this size, or not for what is shown.
    """
    refuse_to_read(model)
    refuse_one(pictures)
    asked = model.backbone.encode(question_text(question))
    tail: tuple[Text, ...] = (Text(ids=asked),) if asked else ()
    out: list[str] = []
    for start in range(0, len(pictures), base.BATCH):
        contexts = [(media, *tail) for media in media_segment(model, pictures[start : start + base.BATCH], size)]
        seeds = [seed + start + i for i in range(len(contexts))]
        ids = answer_tokens(
            model, contexts, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seeds=seeds
        )
        out += [model.backbone.decode(i).strip() for i in ids]
    return out


@torch.no_grad()
def score_names(
    model: Model,
    pictures: Seq[Shown] | None,
    names: Seq[str],
    *,
    size: int | None = None,
    question: str = "",
    summed: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Mean log-likelihood per token (end token included) of each name after each picture.

    Args:
        model: a model that can caption.
        pictures: or sounds; None scores the names behind an empty picture slot: [EOI] alone.
        names: candidate answers.
        size: side in pixels that pictures are read at, one that the model was made for (None: the first).
        question: what stands between picture and answer, or nothing.
        summed: the log-likelihood of the whole name instead, of which `exp` is a probability.
        progress: told pictures done and in all.

    Returns:
        float32 ``[pictures, names]``, one row without pictures.

    Raises:
        XFusionError: the model cannot caption, was not made for this size, or not for what is shown.
    """
    refuse_to_read(model)
    asked, end = model.backbone.encode(question_text(question)), model.backbone.end_ids[0]
    answers = [(*model.backbone.encode(name), end) for name in names]
    ranked = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    num_groups = min(LENGTH_GROUPS, len(set(map(len, answers))))
    width = -(-len(ranked) // num_groups)  # names of like length go through together: less padding
    groups = [ranked[start : start + width] for start in range(0, len(ranked), width)]
    media = media_segment(model, pictures, size) if pictures is not None else [None]
    out = torch.empty(len(media), len(names))
    for done, item in enumerate(media, start=1):
        cache, first = _before_answers(model, item, asked)
        for group in groups:
            chosen = [answers[i] for i in group]
            lengths = torch.tensor([len(answer) if summed else 1 for answer in chosen])
            out[done - 1, group] = _mean_likelihood(model, cache, first, chosen).cpu() * lengths
        if progress:
            progress(done, len(media))
    return out


def _before_answers(model: Model, item: Media | None, asked: tuple[int, ...] = ()) -> tuple[Cache, Tensor]:
    """Keys and values of a picture, its [EOI] and a question, and the log-probabilities ``[V]`` of the first token behind it."""
    blank = model.modality.segment(torch.zeros(1, model.modality.token_width), (1, 1))
    prompt = opened(model.backbone.begin_ids, (item or blank, Text(ids=asked)))
    batch = pack([[Sequence(segments=prompt)]]).to(model.device)
    if item is None:  # the end-of-media row without what stands before it, as if the picture were not there
        place = torch.arange(batch.text.count, device=model.device)[None]
        batch = replace(batch, media={}, text=replace(batch.text, order=place, position=place))
    cache = model.backbone.new_cache(model.fusion.num_towers, 1)
    hidden, run = model.run_pass(batch, cache=cache, update=True)
    logits = model.engine.backbone.logits(hidden[:, run.slices["text"]][:, -1:])
    return cache, logits.float().log_softmax(dim=-1)[0, 0]


def _mean_likelihood(model: Model, cache: Cache, first: Tensor, answers: Seq[tuple[int, ...]]) -> Tensor:
    """Mean log-likelihood per token of each answer behind a cached beginning, ``[answers]``."""
    device, count, length = model.device, len(answers), max(map(len, answers))
    ids = torch.tensor([[*a[:-1], *[0] * (length - len(a))] for a in answers], dtype=torch.int64, device=device)
    labels = torch.tensor([[*a, *[-1] * (length - len(a))] for a in answers], device=device)
    total = first[labels[:, 0]]
    if length > 1:
        offset = torch.arange(1, length, device=device)
        valid = labels[:, 1:] >= 0
        order = torch.where(valid, cache.rows.order.max() + offset, -1)
        following = _following(ids, order, (cache.rows.position.max() + offset).expand(count, -1))
        wide = cache.index(torch.zeros(count, dtype=torch.int64, device=device))
        hidden, _ = model.run_pass(following, cache=wide)
        chosen = model.engine.backbone.logits(hidden[valid][None])[0].float()
        found = chosen.log_softmax(dim=-1).gather(1, labels[:, 1:][valid][:, None])[:, 0]
        total = total.index_add(0, valid.nonzero()[:, 0], found)
    return total / (labels >= 0).sum(dim=1)
