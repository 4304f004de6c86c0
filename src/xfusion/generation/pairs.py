"""Texts and pictures against each other: vectors in one space, and whether a text says what a picture shows."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, cast

import torch
from PIL import Image as PILImage
from torch import Tensor

from xfusion.data.pack import pack
from xfusion.data.sequence import Sequence, Text, XFusionError
from xfusion.data.templates import opened
from xfusion.generation import base
from xfusion.generation.base import encode_prompt, media_segment
from xfusion.model import Model


@torch.no_grad()
def embed(
    model: Model,
    items: Seq[str | PILImage.Image],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Vectors of texts and pictures in one space: those of a picture and of its words have a large product.

    Args:
        model: a model that can embed, such as one of the recipe clip.
        items: texts and pictures, in any order.
        progress: told items done and in all.

    Returns:
        float32 ``[items, width]``, each of unit length.
    """
    model.require("embed", "train one with a contrastive objective, such as the recipe clip")
    if isinstance(items, (str, PILImage.Image)):
        raise XFusionError("embed takes a list of texts and pictures: write [item]")
    objective: Any = next(o for o in model.objectives if "embed" in o.gives)
    texts = [i for i, item in enumerate(items) if isinstance(item, str)]
    pictures = [i for i, item in enumerate(items) if not isinstance(item, str)]
    out, done = torch.empty(len(items), objective.embedding_width), 0
    for members, of_words in ((texts, True), (pictures, False)):
        for start in range(0, len(members), base.BATCH):
            part = members[start : start + base.BATCH]
            chosen = [items[i] for i in part]
            segments = (
                [opened(model.backbone.begin_ids, (Text(ids=encode_prompt(model, cast(str, t))),)) for t in chosen]
                if of_words
                else [(media,) for media in media_segment(model, cast("list[PILImage.Image]", chosen))]
            )
            batch = pack([[Sequence(segments=s)] for s in segments]).to(model.device)
            vectors = objective.of_words(model, batch) if of_words else objective.of_media(model, batch)
            out[part] = vectors.float().cpu()
            done += len(part)
            if progress:
                progress(done, len(items))
    return out


@torch.no_grad()
def match(model: Model, pictures: Seq[PILImage.Image], texts: Seq[str]) -> Tensor:
    """Probability that a text says what a picture shows, by the head that learned to tell pairs.

    Args:
        model: a model that can match, such as one of the recipe blip.
        pictures: any size.
        texts: each is read behind each picture.

    Returns:
        float32 ``[pictures, texts]`` in [0, 1].
    """
    model.require("match", "train one with a matching objective, such as the recipe blip")
    if isinstance(texts, str):
        raise XFusionError("match takes a list of texts: write [text]")
    objective: Any = next(o for o in model.objectives if "match" in o.gives)
    begin, media = model.backbone.begin_ids, media_segment(model, pictures)
    said = [opened(begin, (Text(ids=encode_prompt(model, text)),)) for text in texts]
    pairs = [(i, j) for i in range(len(media)) for j in range(len(said))]
    out = torch.empty(len(media), len(said))
    for start in range(0, len(pairs), base.BATCH):
        part = pairs[start : start + base.BATCH]
        rows = [[Sequence(segments=(*said[j], media[i]))] for i, j in part]
        batch, own = pack(rows).to(model.device), torch.arange(len(part), device=model.device)
        probability = objective.judged(model, batch, own, own).float().softmax(dim=-1)[:, 1].cpu()
        for (i, j), value in zip(part, probability, strict=True):
            out[i, j] = value
    return out
