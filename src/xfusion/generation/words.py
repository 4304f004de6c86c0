"""Text after pictures and sounds: generating answers and scoring given ones."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from xfusion.backbone import Cache
from xfusion.data.pack import pack
from xfusion.data.sequence import Batch, Media, Rows, Sequence, Text
from xfusion.data.templates import question_text, with_begin
from xfusion.generation import base
from xfusion.generation.base import (
    Listener,
    MediaInput,
    encode_prompt,
    media_segment,
    refuse_one,
    refuse_sampling,
    refuse_to_read,
    refuse_too_many_places,
)
from xfusion.generation.schema import restrict_logits
from xfusion.generation.turns import remember, resume_prefix, units
from xfusion.model import Model

LENGTH_GROUPS = 4
"""Maximum number of groups of similar length in which candidate answers are scored; never more than distinct lengths."""
SCORED_POSITIONS, SCORED_TOKENS = 1 << 15, 1 << 12
"""Positions, those of the prefix included, and tokens that one pass over candidate answers may have: keys and values of the
prefix are copied for each answer, and each token has logits of the whole vocabulary. Groups with more are divided."""


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
    one_line: bool = False,
    listen: Listener | None = None,
) -> list[list[int]]:
    """Generate text after contexts that contain media, with a KV cache per tower.

    With ``allowed``, every answer is one of these token sequences: each step is restricted to tokens that continue one of
    them. An answer ends when it is complete and the end token is chosen, or when no allowed sequence continues it. With
    ``one_line``, a token with a line break ends an answer, too, unless it is the answer's first.
    """
    # An empty text after the media adds [EOI], from which the first token is predicted.
    prompts = [c if isinstance(c[-1], Text) else (*c, Text(ids=())) for c in contexts]
    prompts = [with_begin(model.backbone.begin_ids, prompt) for prompt in prompts]
    # Of weights loaded in inference mode nothing says whether they were changed.
    keeps = len(prompts) == 1 and not model.fusion.reads_ahead
    keeps = keeps and not any(weight.is_inference() for weight in model.new_parameters())
    prompt_units = units(prompts[0]) if keeps else None
    if prompt_units is not None:  # continue a conversation from its cached prefix
        cache, batch = resume_prefix(model, prompts[0], prompt_units)
    else:
        batch = pack([[Sequence(segments=segments)] for segments in prompts]).to(model.device)
        cache = model.backbone.new_cache(model.fusion.num_towers, len(prompts))
    places = [int(t.position.max()) for t in (batch.text, *(m.rows for m in batch.media.values())) if t.count]
    refuse_too_many_places(model, 1 + max(places), max_tokens)
    hidden, run = model.run_pass(batch, cache=cache, update=True)
    if prompt_units is not None:
        remember(model, prompt_units, cache)
    rows = torch.arange(len(prompts), device=model.device)
    last_text = batch.text.order.argmax(dim=1)
    logits = model.engine.backbone.logits(hidden[:, run.slices["text"]][rows, last_text][:, None])[:, 0]
    order = cache.rows.order.amax(dim=1).cpu()
    position = cache.rows.position.amax(dim=1).cpu()
    prefix_length = cache.rows.count
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    ends = set(model.backbone.end_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    active_rows = set(range(len(prompts)))
    for step in range(max_tokens):
        if allowed is not None:
            logits = restrict_logits(logits, answers, allowed, model.backbone.end_id)
        token = model.text_objective.choose(logits.cpu(), temperature, top_p, generators, top_k)
        for i in sorted(active_rows):
            ends_line = one_line and answers[i] and "\n" in model.backbone.decode([int(token[i])])
            if int(token[i]) in ends or ends_line:
                active_rows.discard(i)
            else:
                answers[i].append(int(token[i]))
                if listen and not listen(i, int(token[i])):
                    active_rows.discard(i)
        if not active_rows or step == max_tokens - 1:
            break
        order, position = order + 1, position + 1
        next_batch = _continuation_batch(token[:, None], order[:, None], position[:, None])
        hidden, _ = model.run_pass(next_batch.to(model.device), cache=cache, update=True)
        logits = model.engine.backbone.logits(hidden)[:, 0]
    if prompt_units is not None and (cached_answer := tuple(answers[0][: cache.rows.count - prefix_length])):
        remember(model, prompt_units + cached_answer, cache)
    return answers


def _continuation_batch(ids: Tensor, order: Tensor, position: Tensor) -> Batch:
    """A batch of text tokens ``[B, n]`` after a cached prefix with media; an order of -1 is padding."""
    is_token = order >= 0
    rows = Rows(
        order=order,
        sample=torch.where(is_token, 0, -1),
        position=position,
        segment=torch.full_like(order, 1 << 20),
        bidirectional=torch.zeros_like(is_token),
        visible_to_later=torch.ones_like(is_token),
        after_media=torch.ones_like(is_token),
    )
    return Batch(text=rows, text_ids=ids, labels=ids)


def caption(
    model: Model,
    pictures: Seq[MediaInput],
    *,
    question: str = "",
    size: int | None = None,
    max_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[str]:
    """Describe pictures or sounds, or answer a question about them.

    Args:
        model: a model that can caption.
        pictures: any size; cropped to the middle square and resized as in training. Or sounds, for a model that reads sounds.
        question: the question; may be empty.
        size: side in pixels at which pictures are read, one that the model supports (None: the first).
        max_tokens: longest answer in tokens.
        temperature: sampling temperature; 0, or anything below 1e-5, is greedy.
        top_p: nucleus sampling.
        top_k: sample from the k most likely tokens; 0 is all.
        seed: answer i uses the seed ``seed + i``.

    Raises:
        TooLong: the question has more tokens than allowed.
        XFusionError: the model cannot caption, or does not support this size or this kind of media.
    """
    refuse_to_read(model)
    refuse_one(pictures)
    refuse_sampling(temperature, top_p, top_k, max_tokens)
    question_ids = encode_prompt(model, question_text(question))
    question_segments: tuple[Text, ...] = (Text(ids=question_ids),) if question_ids else ()
    captions: list[str] = []
    for start in range(0, len(pictures), base.BATCH):
        contexts = [
            (media, *question_segments) for media in media_segment(model, pictures[start : start + base.BATCH], size)
        ]
        seeds = [seed + start + i for i in range(len(contexts))]
        ids = answer_tokens(
            model, contexts, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seeds=seeds
        )
        captions += [model.backbone.decode(i).strip() for i in ids]
    return captions


@torch.no_grad()
def score_names(
    model: Model,
    pictures: Seq[MediaInput] | None,
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
        pictures: pictures or sounds; None scores the names after an empty picture slot, [EOI] alone.
        names: candidate answers.
        size: side in pixels at which pictures are read, one that the model supports (None: the first).
        question: the text between picture and answer; may be empty.
        summed: return the log-likelihood of the whole name instead; its `exp` is a probability.
        progress: called with the pictures done and the total.

    Returns:
        float32 ``[pictures, names]``, one row without pictures.

    Raises:
        XFusionError: the model cannot caption, or does not support this size or this kind of media.
    """
    refuse_to_read(model)
    question_ids, end = encode_prompt(model, question_text(question)), model.backbone.end_id
    answers = [(*model.backbone.encode(name), end) for name in names]
    by_length = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    num_groups = max(1, min(LENGTH_GROUPS, len(set(map(len, answers)))))
    width = max(1, -(-len(by_length) // num_groups))  # batches names of similar length: less padding
    groups = [by_length[start : start + width] for start in range(0, len(by_length), width)]
    media = media_segment(model, pictures, size) if pictures is not None else [None]
    scores = torch.empty(len(media), len(names))
    for done, item in enumerate(media, start=1):
        cache, first_log_probs = _prefill(model, item, question_ids)
        for group in groups:
            longest = len(answers[group[-1]])
            per_pass = max(1, min(SCORED_POSITIONS // (cache.rows.count + longest), SCORED_TOKENS // longest))
            for start in range(0, len(group), per_pass):
                part = group[start : start + per_pass]
                candidates = [answers[i] for i in part]
                lengths = torch.tensor([len(answer) if summed else 1 for answer in candidates])
                scores[done - 1, part] = _mean_likelihood(model, cache, first_log_probs, candidates).cpu() * lengths
        if progress:
            progress(done, len(media))
    return scores


def _prefill(model: Model, item: Media | None, question_ids: tuple[int, ...] = ()) -> tuple[Cache, Tensor]:
    """KV cache of a picture, its [EOI] and a question, and the log-probabilities ``[V]`` of the first token after them."""
    blank = model.modality.segment(torch.zeros(1, model.modality.token_width), (1, 1))
    prompt = with_begin(model.backbone.begin_ids, (item or blank, Text(ids=question_ids)))
    batch = pack([[Sequence(segments=prompt)]]).to(model.device)
    if item is None:  # the end-of-media row without anything before it, as if there were no picture
        positions = torch.arange(batch.text.count, device=model.device)[None]
        batch = replace(batch, media={}, text=replace(batch.text, order=positions, position=positions))
    cache = model.backbone.new_cache(model.fusion.num_towers, 1)
    hidden, run = model.run_pass(batch, cache=cache, update=True)
    logits = model.engine.backbone.logits(hidden[:, run.slices["text"]][:, -1:])
    return cache, logits.float().log_softmax(dim=-1)[0, 0]


def _mean_likelihood(model: Model, cache: Cache, first_log_probs: Tensor, answers: Seq[tuple[int, ...]]) -> Tensor:
    """Mean log-likelihood per token of each answer after a cached prefix, ``[answers]``."""
    device, count, length = model.device, len(answers), max(map(len, answers))
    ids = torch.tensor([[*a[:-1], *[0] * (length - len(a))] for a in answers], dtype=torch.int64, device=device)
    labels = torch.tensor([[*a, *[-1] * (length - len(a))] for a in answers], device=device)
    total = first_log_probs[labels[:, 0]]
    if length > 1:
        offset = torch.arange(1, length, device=device)
        valid = labels[:, 1:] >= 0
        order = torch.where(valid, cache.rows.order.max() + offset, -1)
        next_batch = _continuation_batch(ids, order, (cache.rows.position.max() + offset).expand(count, -1))
        expanded_cache = cache.index(torch.zeros(count, dtype=torch.int64, device=device))
        hidden, _ = model.run_pass(next_batch, cache=expanded_cache)
        logits = model.engine.backbone.logits(hidden[valid][None])[0].float()
        token_log_probs = logits.log_softmax(dim=-1).gather(1, labels[:, 1:][valid][:, None])[:, 0]
        total = total.index_add(0, valid.nonzero()[:, 0], token_log_probs)
    return total / (labels >= 0).sum(dim=1)


class TextStream:
    """A streamed text answer: cut at a stop sequence, and sent as soon as later tokens cannot change it."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = (), max_tokens: int = 0):
        self.decode, self.stop = decode, stop
        self.max_tokens = max_tokens
        """Longest answer in tokens; whoever computes it ends it there."""
        self.ids: list[int] = []
        self.sent = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that may be sent after one more token."""
        self.ids.append(token)
        text = self.decode(self.ids)
        stop_positions = [position for position in (text.find(stop) for stop in self.stop) if position >= 0]
        if stop_positions:
            self.stopped = True
            return self._send(text[: min(stop_positions)])
        # Hold back an incomplete character, and text that may become a stop sequence.
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        max_length = len(text) + 1
        partial_stops = [
            k for stop in self.stop for k in range(1, min(len(stop), max_length)) if text.endswith(stop[:k])
        ]
        return self._send(text[: len(text) - max(partial_stops, default=0)])

    def rest(self) -> str:
        """The text still to be sent at the end of the answer."""
        return "" if self.stopped else self._send(self.decode(self.ids))

    def _send(self, text: str) -> str:
        # A tokenizer that decodes single bytes, or cleans up spaces, may change what was sent. What follows is still sent.
        if len(text) <= len(self.sent):
            return ""
        new, self.sent = text[len(self.sent) :], text
        return new
