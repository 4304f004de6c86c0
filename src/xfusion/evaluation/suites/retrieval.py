"""Pictures and words in one space: naming by the nearest words, search by the nearest pictures, by `Model.embed`.

It works on any `Source`. ``fit_`` scores are on trained pictures and measure memory, ``held_`` scores on pictures of groups
that no training has seen. Beside a score stand ``chance_`` (a random order) and ``_blind`` (pictures permuted).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Source, open_source
from xfusion.evaluation.metrics import naming
from xfusion.evaluation.suites.emoji import Part, chosen, held_split


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
        model: a model that can embed.
        progress: see `evaluate`.
        source: the trained pictures, a `Source` or a spec such as "emoji:128".
        held: the held-out pictures, likewise; None takes the held-out split of the same spec, where it has one.
        max_fit: only so many of the trained pictures (always the same ones) and their names.
        max_held: only so many of the held-out ones; None is all.
        part: only groups of one part, "validation" (a fifth, to choose settings by) or "test" (the rest).

    Returns:
        ``at_1``, ``at_10`` and ``mrr`` of ``naming`` (the true name among the names of all scored pictures) and of
        ``search`` (a picture of the name's group among all scored pictures).

    Raises:
        XFusionError: the model cannot embed, or there is nothing to score.
    """
    if "embed" not in model.capabilities:
        able = ", ".join(sorted(model.capabilities))
        raise XFusionError(f"this suite scores embedding, but the model can only do: {able}")
    source = open_source(source, split="train") if isinstance(source, str) else source
    metrics, settings = _scores(model, "fit", source, chosen(source.examples, max_fit, part), progress)
    held = held_split(source) if held is None else held
    held = open_source(held, split="held") if isinstance(held, str) else held
    scored = chosen(held.examples, max_held, part) if held else []
    if held and scored:
        more, numbers = _scores(model, "held", held, scored, progress)
        metrics, settings = metrics | more, settings | numbers
    return {**metrics, "settings": {"data": source.spec, "held": held.spec if held else None, "part": part, **settings}}


def _scores(
    model: Any, name: str, source: Source, scored: list[int], progress: Callable[[str, int, int], None]
) -> tuple[dict[str, float], dict[str, int]]:
    """All scores of some pictures of a source among themselves, and how many there were."""
    if not scored:
        raise XFusionError(f"{source.spec}: none of {len(source.examples)} pictures can be scored")
    examples = [source.examples[i] for i in scored]
    names = list(dict.fromkeys(example.captions[0] for example in examples))
    pictures, size = [], model.image.sizes[0]
    for start in range(0, len(scored), 64):  # a few at a time: pictures of a large encoder are many megabytes
        progress(f"{name} pictures", start, len(scored))
        pictures.append(model.embed([source.picture(i, size) for i in scored[start : start + 64]]))
    cosines = torch.cat(pictures) @ model.embed(names).T
    hit = naming.hits(examples, names)
    metrics: dict[str, float] = {}
    for task, scores, right in (("naming", cosines, hit), ("search", cosines.T, hit.T)):
        metrics |= naming.beside(f"{name}_{task}_", scores, right)
    return metrics, {f"num_{name}": len(scored), f"num_{name}_names": len(names)}
