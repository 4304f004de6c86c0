"""Masked tokens of names, one at a time: are they predicted, and how much does the picture contribute?

It works on any `Source`. ``fit_`` scores are on trained pictures and measure memory, ``held_`` scores on pictures of groups that
no training has seen. Beside a score stands ``_blind``, the same beside other pictures, and beside a ``fit_`` score ``by_heart_``,
what one would score who knows all names of the source and sees no picture: what lies above it is the picture's doing.
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
from xfusion.evaluation.metrics.blind import PERMUTATIONS, blind
from xfusion.evaluation.suites.emoji import Part
from xfusion.evaluation.suites.retrieval import parts
from xfusion.generation import BATCH, fill_tokens, media_segment


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
    """Scores of one model.

    Args:
        model: a model that can fill, such as one of the recipe lxmert.
        progress: see `evaluate`.
        source: the trained pictures, a `Source` or a spec such as "emoji:128".
        held: the held-out pictures, likewise; None takes the held-out split of the same spec, where it has one.
        max_fit: only so many of the trained pictures (always the same ones).
        max_held: only so many of the held-out ones; None is all.
        part: only groups of one part, "validation" (a fifth, to choose settings by) or "test" (the rest).

    Returns:
        ``at_1``, the share of tokens that come first among all of the vocabulary, and ``nats``, the mean of -log p of the true
        one; each beside its ``_blind``, the mean over five orders of the pictures, and its ``by_heart_``.

    Raises:
        XFusionError: the model cannot fill, or there is nothing to score.
    """
    if "fill" not in model.capabilities:
        able = ", ".join(sorted(model.capabilities))
        raise XFusionError(f"this suite scores masked words, but the model can only do: {able}")
    metrics: dict[str, float] = {}
    found, settings = parts(source, held, max_fit, max_held, part)
    for name, (pictures, scored) in found.items():
        said = _masked(model, [pictures.examples[i].captions[0] for i in scored])
        if not said:
            raise XFusionError(f"{pictures.spec}: no name of {len(scored)} has a token that could be masked")
        shown = []
        for start in range(0, len(scored), BATCH):
            progress(f"{name} pictures", start, len(scored))
            some = [pictures.picture(i, model.image.sizes[0]) for i in scored[start : start + BATCH]]
            shown += media_segment(model, some)
        measured = _measured(
            model, said, shown, lambda done, name=name: progress(f"{name} words", done, 1 + PERMUTATIONS)
        )
        for row, kind in enumerate(("nats", "at_1")):

            def score(order: Tensor, row: int = row, measured: Measured = measured) -> float:
                return float(measured(order)[row].mean())

            metrics[f"{name}_{kind}"] = score(torch.arange(len(scored)))
            metrics[f"{name}_{kind}_blind"] = blind(score, len(scored))
        if name == "fit":
            known = by_heart(said, _masked(model, [example.captions[0] for example in pictures.examples]))
            metrics |= {f"by_heart_{name}_{kind}": value for kind, value in known.items()}
        settings |= {f"num_{name}": len(scored), f"num_{name}_tokens": len(said)}
    return {**metrics, "settings": settings}


Blanked = tuple[int, tuple[int, ...], int]
"""Number of a name, its token ids with `END_OF_MEDIA` at one, and that one."""
Measured = Callable[[Tensor], Tensor]
"""An order of the pictures, int64 ``[pictures]`` -> of each masked token -log p and whether it came first, ``[2, tokens]``."""


def _measured(model: Any, said: list[Blanked], shown: list[Media], tell: Callable[[int], None]) -> Measured:
    """Each order is computed once."""
    known: dict[tuple[int, ...], Tensor] = {}

    def measured(order: Tensor) -> Tensor:
        which = tuple(order.tolist())
        if which not in known:
            tell(len(known))
            scores = fill_tokens(model, [shown[which[number]] for number, _, _ in said], [ids for _, ids, _ in said])
            truth = torch.tensor([token for _, _, token in said])
            own = torch.cat(scores)
            first = (own.argmax(dim=-1) == truth).double()
            known[which] = torch.stack([-own.gather(1, truth[:, None])[:, 0].double(), first])
        return known[which]

    return measured


def by_heart(said: list[Blanked], known: list[Blanked]) -> dict[str, float]:
    """``nats`` and ``at_1`` of masked tokens by how often each stands at the same blank of the names that are known, of which the
    scored ones are some; of the tokens that stand there most often one is taken by chance.
    """
    counts: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for _, ids, token in known:
        counts[ids][token] += 1
    nats = first = 0.0
    for _, ids, token in said:
        here = counts[ids]
        nats -= math.log(here[token] / here.total())
        best = max(here.values())
        first += (here[token] == best) / list(here.values()).count(best)
    return {"nats": nats / len(said), "at_1": first / len(said)}


def _masked(model: Any, names: list[str]) -> list[Blanked]:
    """Every token of every name masked once; the first position of a text never is."""
    out = []
    for number, name in enumerate(names):
        ids = model.backbone.encode(name)
        for place in range(0 if model.backbone.begin_ids else 1, len(ids)):
            out.append((number, (*ids[:place], END_OF_MEDIA, *ids[place + 1 :]), ids[place]))
    return out
