"""Infilling: a part of a picture is hidden, drawn anew from the rest, and compared with what was there.

It works on any model that draws pictures and on any `Source`. ``fit_`` scores are on trained pictures and measure memory;
``held_`` scores are on pictures of groups that were never trained on. The gaps are the ``right`` half of the tokens, those in
the ``middle``, and the ``top`` half. A model of codes without infilling draws a gap in reading order and knows only what stands
before each code, so of the ``top`` it knows nothing.

Scores come with ``_blind``, the same if each gap is filled from the rest of another picture (rests permuted), and with
``ceiling_``, the real picture through the codec.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Source
from xfusion.evaluation.metrics.blind import PERMUTATIONS, blind
from xfusion.evaluation.metrics.psnr import psnr
from xfusion.evaluation.suites.emoji import LOSSLESS_DB, Part
from xfusion.evaluation.suites.retrieval import scored_sets
from xfusion.generation import BATCH, draw_tokens, refuse_to_draw
from xfusion.generation.base import text_segment
from xfusion.objectives.codes import NextCode

MAY_BE_ZERO = {"max_held"}


def run(
    model: Any,
    *,
    progress: Callable[[str, int, int], None],
    source: Source | str = "emoji",
    held: Source | str | None = None,
    named: bool = False,
    seed: int = 0,
    steps: int = 25,
    guidance: float | None = None,
    max_fit: int | None = 64,
    max_held: int | None = 64,
    part: Part = "all",
) -> dict[str, Any]:
    """Infilling scores of one model.

    Args:
        model: a model that draws pictures.
        progress: see `evaluate`.
        source: the trained pictures: a `Source`, or a spec such as "emoji:128".
        held: the held-out pictures, likewise; None uses the held-out split of the same spec, if it has one.
        named: whether the picture's name is the prompt; without it, all that the model knows is the rest of the picture.
        seed: seed of the noise; picture number i of the source has ``seed + i``.
        steps: steps of a model that denoises.
        guidance: strength of classifier-free guidance if ``named``; None uses the model's own.
        max_fit: score at most this many trained pictures (always the same ones); None is all.
        max_held: score at most this many held-out pictures; None is all.
        part: score only groups of one part, "validation" (a fifth, for choosing settings) or "test" (the rest).

    Returns:
        per gap ``psnr_db``, the mean over pictures of the PSNR in the gap against the real picture, at most `LOSSLESS_DB`; and
        of models of codes ``accuracy``, the share in [0, 1] of the gap's codes that are those of the real picture. Each has
        ``_blind``, the mean over five permutations of the rests among the pictures; ``psnr_db`` also has ``ceiling_``.

    Raises:
        XFusionError: the model does not draw pictures, they have fewer than 3 x 3 tokens, or there is nothing to score.
    """
    refuse_to_draw(model)
    size = model.image.sizes[0]
    hidden = gaps(model.image.grid(size))
    sets, settings = scored_sets(source, held, max_fit, max_held, part)
    metrics: dict[str, float] = {}
    guidance = (model.guidance if guidance is None else guidance) if named else 1.0
    for name, (pictures, scored) in sets.items():
        prompts = [pictures.examples[i].captions[0] if named else "" for i in scored]
        images = model.image.from_pil([pictures.picture(i, size) for i in scored], size)
        truth = torch.cat([model.image.encode(batch.to(model.device), size).cpu() for batch in images.split(BATCH)])
        settings[f"num_{name}"] = len(scored)
        drawing = {"prompts": prompts, "seeds": [seed + i for i in scored], "steps": steps, "guidance": guidance}
        for gap_name, gap in hidden.items():
            filled = partial(fill, model, gap=gap, **drawing)
            title = f"{name} {gap_name}"
            for kind, value in _scores(
                model, images, truth, gap, filled, lambda done, title=title: progress(title, done, 1 + PERMUTATIONS)
            ).items():
                ceiling = "ceiling_" if kind.startswith("ceiling_") else ""
                metrics[f"{ceiling}{name}_{gap_name}_{kind.removeprefix(ceiling)}"] = value
    settings |= {"size": size, "named": named, "seed": seed, "steps": steps, "guidance": guidance}
    return {**metrics, "settings": settings}


def gaps(grid: tuple[int, int]) -> dict[str, Tensor]:
    """Which tokens of a picture each gap hides, bool ``[M]`` in reading order.

    Args:
        grid: rows and columns of the picture's tokens.

    Raises:
        XFusionError: there are fewer than 3 x 3 tokens, of which none would be left around the middle.
    """
    rows, columns = grid
    if min(grid) < 3:
        raise XFusionError(
            f"infilling hides a part of 3 x 3 tokens or more, but these pictures have {rows} x {columns}:"
            " take larger pictures, or smaller patches"
        )
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    top, left = max(rows // 4, 1), max(columns // 4, 1)
    middle = (row >= top) & (row < rows - top) & (column >= left) & (column < columns - left)
    masks = {"right": column >= columns // 2, "middle": middle, "top": row < rows // 2}
    return {name: mask.expand(rows, columns).flatten() for name, mask in masks.items()}


def fill(
    model: Any, known: Tensor, gap: Tensor, prompts: Sequence[str], *, seeds: Sequence[int], **settings: Any
) -> Tensor:
    """Pictures with a gap drawn anew.

    Args:
        model: a model that draws pictures.
        known: tokens ``[N, M, P]``; those in the gap are hidden from the model.
        gap: which tokens to draw, bool ``[M]``.
        prompts: a description of each picture; may be empty.
        seeds: one per picture.
        settings: steps and guidance of `draw_tokens`.

    Returns:
        tokens ``[N, M, P]``, those outside the gap as given.
    """
    visible, size = known.masked_fill(gap[:, None], 0), model.image.sizes[0]
    batches = [slice(start, start + BATCH) for start in range(0, len(known), BATCH)]
    filled = [
        draw_tokens(
            model,
            [text_segment(model, prompt) for prompt in prompts[batch]],
            size,
            seeds=seeds[batch],
            known=visible[batch],
            keep=(~gap).expand(len(visible[batch]), -1),
            **settings,
        ).cpu()
        for batch in batches
    ]
    return torch.cat(filled)


def _scores(
    model: Any,
    images: Tensor,
    truth: Tensor,
    gap: Tensor,
    filled: Callable[[Tensor], Tensor],
    report: Callable[[int], None],
) -> dict[str, float]:
    """Scores of one gap of some pictures.

    Args:
        model: the model that fills.
        images: the real pictures ``[N, 3, H, W]``.
        truth: their tokens ``[N, M, P]``.
        gap: the tokens of the gap, bool ``[M]``.
        filled: tokens with a gap -> the same with the gap drawn anew.
        report: told how many orders of the rests were filled, before each.
    """
    orders_done = itertools.count()

    @cache
    def scores(order: tuple[int, ...]) -> Tensor:
        """PSNR in dB and share of equal codes of each gap, filled from the rests in this order, ``[2, N]``."""
        report(next(orders_done))
        drawn = filled(truth[list(order)])
        # The rest is the picture's own again, so that a decoder that looks around shows the gap as the ceiling does.
        tokens = torch.where(gap[:, None], drawn, truth)
        is_equal = (drawn.round() == truth.round())[:, gap]
        return torch.stack([_psnr(model, tokens, images, gap), is_equal.double().mean(dim=(1, 2))])

    metrics = {"ceiling_psnr_db": float(_psnr(model, truth, images, gap).mean())}
    for row, kind in enumerate(
        ("psnr_db", "accuracy") if isinstance(model.media_objective, NextCode) else ("psnr_db",)
    ):

        def score(order: Tensor, row: int = row) -> float:
            return float(scores(tuple(order.tolist()))[row].mean())

        metrics[kind] = score(torch.arange(len(truth)))
        metrics[f"{kind}_blind"] = blind(score, len(truth))
    return metrics


def _psnr(model: Any, tokens: Tensor, images: Tensor, gap: Tensor) -> Tensor:
    """PSNR in dB inside the gap of pictures ``[N, M, P]`` against the real ``[N, 3, H, W]``, ``[N]``, at most `LOSSLESS_DB`."""
    size = images.shape[-1]
    decoded = torch.cat([model.image.decode(b.to(model.device), size).float().cpu() for b in tokens.split(BATCH)])
    rows, columns = model.image.grid(size)
    inside = gap.view(rows, columns).repeat_interleave(size // rows, 0).repeat_interleave(size // columns, 1)
    return psnr(decoded, images, inside.expand(len(images), 1, size, size)).clamp(max=LOSSLESS_DB)
