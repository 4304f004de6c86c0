"""Retrieval between pictures and texts: naming (the best text for a picture) and search (the best pictures for a text).

Similarity comes from `Model.embed` (cosines), from `Model.match` (probabilities), or from both, scored separately. It works on
any `Source`. ``fit_`` scores are on trained pictures and measure memory; ``held_`` scores are on pictures of groups that were
never trained on. Scores come with ``chance_`` (a random order) and ``_blind`` (pictures permuted among the items).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Source, content_fingerprint, open_source
from xfusion.evaluation.abilities import refuse_unable
from xfusion.evaluation.metrics import naming
from xfusion.evaluation.suites.emoji import Part, choose_examples
from xfusion.evaluation.unseen import held_out

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
    """Retrieval scores of one model.

    Args:
        model: a model that can embed or match.
        progress: see `evaluate`.
        source: the trained pictures: a `Source`, or a spec such as "emoji:128".
        held: the held-out pictures, likewise; None uses the held-out split of the same spec, if it has one.
        max_fit: score at most this many trained pictures (always the same ones) and their names; None is all.
        max_held: score at most this many held-out pictures; None is all.
        part: score only groups of one part, "validation" (a fifth, for choosing settings) or "test" (the rest).

    Returns:
        ``at_1``, ``at_10`` (shares in [0, 1]) and ``mrr`` (mean reciprocal rank) of ``naming``, the rank of the true name among
        the names of all scored pictures, and of ``search``, the rank of a picture of the name's group among all scored
        pictures. They are by cosine, or by matching probability if the model only matches; if it does both, the latter are
        ``match_naming`` and ``match_search``. A model that matches also has ``match``: its balanced accuracy on true and wrong
        pairs at a probability of 0.5; chance is 0.5.

    Raises:
        XFusionError: the model neither embeds nor matches, or there is nothing to score.
    """
    refuse_unable(model, {"embed", "match"}, "scores embedding and matching")
    metrics: dict[str, float] = {}
    sets, settings = scored_sets(source, held, max_fit, max_held, part)
    for name, (pictures, scored) in sets.items():
        set_metrics, set_settings = _scores(model, name, pictures, scored, progress)
        metrics, settings = metrics | set_metrics, settings | set_settings
    return {**metrics, "settings": settings}


def scored_sets(
    source: Source | str, held: Source | str | None, max_fit: int | None, max_held: int | None, part: Part
) -> tuple[dict[str, tuple[Source, list[int]]], dict[str, Any]]:
    """The pictures to score: ``fit``, and ``held`` if there are any, each with its source and picture indices.

    The arguments are those of `run`.

    Returns:
        the sets by name, and settings to record.

    Raises:
        XFusionError: there is nothing to score.
    """
    source = open_source(source, split="train") if isinstance(source, str) else source
    sets = {"fit": (source, choose_examples(source.examples, max_fit, part))}
    if not sets["fit"][1]:
        raise XFusionError(f"{source.spec}: none of {len(source.examples)} pictures can be scored")
    held = held_out(held, source)
    scored = choose_examples(held.examples, max_held, part) if held else []
    if held and scored:
        sets["held"] = (held, scored)
    settings = {"data": source.spec, "held": held.spec if held else None, "part": part}
    fingerprints = {"data": content_fingerprint(source), "held": content_fingerprint(held) if held else None}
    return sets, settings | {f"{name}_fingerprint": value for name, value in fingerprints.items()}


def _scores(
    model: Any, name: str, source: Source, scored: list[int], progress: Callable[[str, int, int], None]
) -> tuple[dict[str, float], dict[str, int]]:
    """All scores of some pictures of a source, ranked among themselves, and the numbers of pictures and names."""
    examples = [source.examples[i] for i in scored]
    names = list(dict.fromkeys(example.captions[0] for example in examples))
    size, hit = model.image.sizes[0], naming.hits(examples, names)
    rows: dict[str, list[Tensor]] = {method: [] for method in ("embed", "match") if method in model.capabilities}
    name_embeddings = model.embed(names).T if "embed" in rows else None
    step = 1 if "match" in rows else 64  # a few at a time: pictures of a large encoder are many megabytes
    for start in range(0, len(scored), step):
        progress(f"{name} pictures", start, len(scored))
        pictures = [source.picture(i, size) for i in scored[start : start + step]]
        if name_embeddings is not None:
            rows["embed"].append(model.embed(pictures) @ name_embeddings)
        if "match" in rows:
            rows["match"].append(torch.tensor([model.match(pictures[0], names)]))
    metrics: dict[str, float] = {}
    for method, batches in rows.items():
        similarity, prefix = torch.cat(batches), f"{name}_match_" if method == "match" and len(rows) > 1 else f"{name}_"
        for task, scores, hits in (("naming", similarity, hit), ("search", similarity.T, hit.T)):
            metrics |= naming.with_baselines(f"{prefix}{task}_", scores, hits)
        if method == "match":
            true_accepted, wrong_rejected = similarity[hit] > 0.5, similarity[~hit] <= 0.5
            metrics[f"{name}_match"] = float(true_accepted.double().mean() + wrong_rejected.double().mean()) / 2
    return metrics, {f"num_{name}": len(scored), f"num_{name}_names": len(names)}
