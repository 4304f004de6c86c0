"""Comparing texts and pictures: joint embeddings, image-text matching, and filling blanks in a text about a picture."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, cast

import torch
from PIL import Image as PILImage
from torch import Tensor

from xfusion.data.pack import pack
from xfusion.data.sequence import END_OF_MEDIA, Media, Sequence, Text, XFusionError
from xfusion.data.templates import with_begin
from xfusion.generation import base
from xfusion.generation.base import MediaInput, encode_prompt, media_segment
from xfusion.generation.words import score_names
from xfusion.model import Model

BLANK = "___"
"""The placeholder for a word to be filled in."""


@torch.no_grad()
def embed(
    model: Model,
    items: Seq[str | PILImage.Image],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Embeddings of texts and pictures in one space; a picture and a text that describes it have a large dot product.

    Args:
        model: a model that can embed, such as one of the recipe clip.
        items: texts and pictures, in any order.
        progress: called with the items done and the total.

    Returns:
        float32 ``[items, width]``, each of unit length.
    """
    model.require("embed", "train one with a contrastive objective, such as the recipe clip")
    if isinstance(items, (str, PILImage.Image)):
        raise XFusionError("embed takes a list of texts and pictures: write [item]")
    objective: Any = next(o for o in model.objectives if "embed" in o.gives)
    texts = [i for i, item in enumerate(items) if isinstance(item, str)]
    pictures = [i for i, item in enumerate(items) if not isinstance(item, str)]
    embeddings, done = torch.empty(len(items), objective.embedding_width), 0
    for indices, is_text in ((texts, True), (pictures, False)):
        for start in range(0, len(indices), base.BATCH):
            batch_indices = indices[start : start + base.BATCH]
            batch_items = [items[i] for i in batch_indices]
            segments = (
                [
                    with_begin(model.backbone.begin_ids, (Text(ids=encode_prompt(model, cast(str, t))),))
                    for t in batch_items
                ]
                if is_text
                else [(media,) for media in media_segment(model, cast("list[PILImage.Image]", batch_items))]
            )
            batch = pack([[Sequence(segments=s)] for s in segments]).to(model.device)
            vectors = objective.embed_text(model, batch) if is_text else objective.embed_media(model, batch)
            embeddings[batch_indices] = vectors.float().cpu()
            done += len(batch_indices)
            if progress:
                progress(done, len(items))
    return embeddings


def score(model: Model, picture: MediaInput | None, texts: Seq[str]) -> list[float]:
    """How well each text fits a picture; larger is better. Scores of different models are not comparable.

    For a model that captions, the score is the mean log-likelihood per token of the text after the picture (`score_names`), in
    nats and below 0. For a model that only embeds, it is the cosine of text and picture (`embed`), in [-1, 1].

    Args:
        model: a model that can caption or embed.
        picture: any size; or a sound, for a model that reads sounds. None scores the texts alone, if the model captions.
        texts: any number of texts.

    Raises:
        XFusionError: the model can do neither, or it only embeds and there is no picture.
    """
    if isinstance(texts, str):
        raise XFusionError("score takes a list of texts: write [text]")
    if "caption" not in model.capabilities and "embed" in model.capabilities:
        if picture is None:
            raise XFusionError("a model that embeds scores texts by their cosine to a picture: give one")
        vectors = embed(model, [cast(PILImage.Image, picture), *texts])
        return (vectors[1:] @ vectors[0]).tolist()
    model.require("caption", "take one that captions, of a recipe such as llava_1_5, or one that embeds, such as clip")
    return score_names(model, None if picture is None else [picture], texts)[0].tolist()


@torch.no_grad()
def match(model: Model, pictures: Seq[PILImage.Image], texts: Seq[str]) -> Tensor:
    """Probability that a text describes a picture, according to the model's matching head.

    Args:
        model: a model that can match, such as one of the recipes blip and lxmert.
        pictures: any size.
        texts: each is paired with each picture.

    Returns:
        float32 ``[pictures, texts]`` in [0, 1].
    """
    model.require("match", "train one with a matching objective, such as the recipe blip")
    if isinstance(texts, str):
        raise XFusionError("match takes a list of texts: write [text]")
    objective: Any = next(o for o in model.objectives if "match" in o.gives)
    begin, media = model.backbone.begin_ids, media_segment(model, pictures)
    text_segments = [with_begin(begin, (Text(ids=encode_prompt(model, text)),)) for text in texts]
    pairs = [(i, j) for i in range(len(media)) for j in range(len(text_segments))]
    probabilities = torch.empty(len(media), len(text_segments))
    for start in range(0, len(pairs), base.BATCH):
        batch_pairs = pairs[start : start + base.BATCH]
        rows = [[Sequence(segments=(*text_segments[j], media[i]))] for i, j in batch_pairs]
        batch, row_index = pack(rows).to(model.device), torch.arange(len(batch_pairs), device=model.device)
        probability = objective.match_logits(model, batch, row_index, row_index).float().softmax(dim=-1)[:, 1].cpu()
        for (i, j), value in zip(batch_pairs, probability, strict=True):
            probabilities[i, j] = value
    return probabilities


def fill(
    model: Model, picture: PILImage.Image, texts: Seq[str], *, most: int = 5
) -> list[list[list[tuple[str, float]]]]:
    """Most likely words for the blanks in texts that describe a picture.

    Args:
        model: a model that can fill, such as one of the recipe lxmert.
        picture: any size.
        texts: texts with a ``___`` for each missing token of the base's vocabulary; a common word is one token.
        most: number of words to return for each blank.

    Returns:
        For each text and each of its blanks, the words with their probabilities, most likely first. Blanks of one text are
        filled independently of each other.

    Raises:
        XFusionError: a text has no blank, or the model cannot fill blanks.
    """
    if isinstance(texts, str):
        raise XFusionError("fill takes a list of texts: write [text]")
    media = media_segment(model, [picture]) * len(texts)
    log_probs = fill_tokens(model, media, [_with_blanks(model, text) for text in texts])
    answers = []
    for blank_log_probs in log_probs:
        best = blank_log_probs.exp().topk(min(most, blank_log_probs.shape[-1]), dim=-1)
        blanks = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        answers.append(
            [[(model.backbone.decode([i]).strip(), p) for i, p in zip(*blank, strict=True)] for blank in blanks]
        )
    return answers


@torch.no_grad()
def fill_tokens(model: Model, pictures: Seq[Media], texts: Seq[tuple[int, ...]]) -> list[Tensor]:
    """Log-probabilities of every token at the blanks of each text, given the text's own picture.

    Args:
        model: a model that can fill.
        pictures: one for each text, as returned by `media_segment`.
        texts: token ids, with `END_OF_MEDIA` at each blank.

    Returns:
        For each text, float32 ``[blanks, V]``.
    """
    model.require("fill", "train one that learns masked words, such as the recipe lxmert")
    objective: Any = next(o for o in model.objectives if "fill" in o.gives)
    begin, log_probs = model.backbone.begin_ids, []
    for start in range(0, len(texts), base.BATCH):
        batch_texts, batch_pictures = texts[start : start + base.BATCH], pictures[start : start + base.BATCH]
        text_segments = [with_begin(begin, (Text(ids=ids),)) for ids in batch_texts]
        rows = [
            [Sequence(segments=(*segments, media))]
            for segments, media in zip(text_segments, batch_pictures, strict=True)
        ]
        scores = objective.masked_logits(model, pack(rows).to(model.device)).float().log_softmax(dim=-1).cpu()
        log_probs += scores.split([ids.count(END_OF_MEDIA) for ids in batch_texts])
    return log_probs


def _with_blanks(model: Model, text: str) -> tuple[int, ...]:
    """Token ids of a text with `END_OF_MEDIA` at each blank. A blank absorbs the space before it, as a word's token does."""
    first_part, *other_parts = text.split(BLANK)
    if not other_parts:
        raise XFusionError(f"{text!r} has no blank: write {BLANK} where a word is to be found")
    ids = list(encode_prompt(model, first_part.removesuffix(" ")))
    for index, part in enumerate(other_parts, start=1):
        ids += [END_OF_MEDIA, *encode_prompt(model, part if index == len(other_parts) else part.removesuffix(" "))]
    return tuple(ids)
