"""Prediction of masked tokens of names, one at a time, and how much the picture contributes to it.

It works on any `Source`. ``fit_`` scores are on trained pictures and measure memory; ``held_`` scores are on pictures of groups
that were never trained on. Scores come with ``_blind``, the same with pictures permuted among the names. ``fit_`` scores also
come with ``by_heart_``, the score of a guesser that knows all names of the source but sees no picture; only what exceeds it
comes from the picture.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xfusion.data.sequence import END_OF_MEDIA, Media, XFusionError
from xfusion.data.sources import Source
from xfusion.evaluation.abilities import refuse_unable
from xfusion.evaluation.metrics.blind import PERMUTATIONS, blind
from xfusion.evaluation.suites.emoji import Part
from xfusion.evaluation.suites.retrieval import scored_sets
from xfusion.generation import BATCH, fill_tokens, media_segment

MAY_BE_ZERO = {"max_held"}


def run(
    model: Any,
    *,
    progress: Callable[[str, int, int], None],
    source: Source | str = "emoji",
    held: Source | str | None = None,
    max_fit: int | None = 256,
    max_held: int | None = None,
    part: Part = "all",
) -> dict[str, Any]:
    """Masked word scores of one model.

    Args:
        model: a model that can fill, such as one of the recipe lxmert.
        progress: see `evaluate`.
        source: the trained pictures: a `Source`, or a spec such as "emoji:128".
        held: the held-out pictures, likewise; None uses the held-out split of the same spec, if it has one.
        max_fit: score at most this many trained pictures (always the same ones); None is all.
        max_held: score at most this many held-out pictures; None is all.
        part: score only groups of one part, "validation" (a fifth, for choosing settings) or "test" (the rest).

    Returns:
        ``at_1``, the share of masked tokens that rank first in the whole vocabulary, and ``nats``, the mean of -log p of the true
        token; each with ``_blind``, the mean over five permutations of the pictures, and for trained pictures ``by_heart_``.

    Raises:
        XFusionError: the model cannot fill, or there is nothing to score.
    """
    refuse_unable(model, {"fill"}, "scores masked words")
    metrics: dict[str, float] = {}
    sets, settings = scored_sets(source, held, max_fit, max_held, part)
    for name, (pictures, scored) in sets.items():
        blanks = _mask_each_token(model, [pictures.examples[i].captions[0] for i in scored])
        if not blanks:
            raise XFusionError(f"{pictures.spec}: no name of {len(scored)} has a token that could be masked")
        media = []
        for start in range(0, len(scored), BATCH):
            progress(f"{name} pictures", start, len(scored))
            batch_pictures = [pictures.picture(i, model.image.sizes[0]) for i in scored[start : start + BATCH]]
            media += media_segment(model, batch_pictures)
        score_by_order = _score_by_order(
            model, blanks, media, lambda done, name=name: progress(f"{name} words", done, 1 + PERMUTATIONS)
        )
        for row, kind in enumerate(("nats", "at_1")):

            def score(order: Tensor, row: int = row, score_by_order: ScoreByOrder = score_by_order) -> float:
                return float(score_by_order(order)[row].mean())

            metrics[f"{name}_{kind}"] = score(torch.arange(len(scored)))
            metrics[f"{name}_{kind}_blind"] = blind(score, len(scored))
        if name == "fit":
            baseline = by_heart(blanks, _mask_each_token(model, [example.captions[0] for example in pictures.examples]))
            metrics |= {f"by_heart_{name}_{kind}": value for kind, value in baseline.items()}
        settings |= {f"num_{name}": len(scored), f"num_{name}_tokens": len(blanks)}
    return {**metrics, "settings": settings}


Blank = tuple[int, tuple[int, ...], int]
"""A masked token: the index of its name, the name's token ids with `END_OF_MEDIA` in its place, and its id."""
ScoreByOrder = Callable[[Tensor], Tensor]
"""Order of the pictures, int64 ``[pictures]`` -> for each masked token -log p, and 1 if it ranks first, ``[2, tokens]``."""


def _score_by_order(model: Any, blanks: list[Blank], media: list[Media], report: Callable[[int], None]) -> ScoreByOrder:
    """Scores of all masked tokens as a function of the order of the pictures; each order is computed only once."""
    cache: dict[tuple[int, ...], Tensor] = {}

    def score_order(order: Tensor) -> Tensor:
        key = tuple(order.tolist())
        if key not in cache:
            report(len(cache))
            scores = fill_tokens(
                model, [media[key[name_index]] for name_index, _, _ in blanks], [ids for _, ids, _ in blanks]
            )
            labels = torch.tensor([token for _, _, token in blanks])
            log_probs = torch.cat(scores)
            is_first = (log_probs.argmax(dim=-1) == labels).double()
            cache[key] = torch.stack([-log_probs.gather(1, labels[:, None])[:, 0].double(), is_first])
        return cache[key]

    return score_order


def by_heart(blanks: list[Blank], all_blanks: list[Blank]) -> dict[str, float]:
    """``nats`` and ``at_1`` of a guesser that knows all names but sees no picture.

    Its probability of a token is the token's relative frequency at the same blank among ``all_blanks``, which include
    ``blanks``. For ``at_1`` it guesses the most frequent token, at random if several are equally frequent.
    """
    counts: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for _, ids, token in all_blanks:
        counts[ids][token] += 1
    nats = first = 0.0
    for _, ids, token in blanks:
        token_counts = counts[ids]
        nats -= math.log(token_counts[token] / token_counts.total())
        best = max(token_counts.values())
        first += (token_counts[token] == best) / list(token_counts.values()).count(best)
    return {"nats": nats / len(blanks), "at_1": first / len(blanks)}


def _mask_each_token(model: Any, names: list[str]) -> list[Blank]:
    """All names with each token masked once. The first position of a text is never masked."""
    blanks = []
    for name_index, name in enumerate(names):
        ids = model.backbone.encode(name)
        for position in range(0 if model.backbone.begin_ids else 1, len(ids)):
            blanks.append((name_index, (*ids[:position], END_OF_MEDIA, *ids[position + 1 :]), ids[position]))
    return blanks
