"""Naming sounds: what was remembered (``fit_``), and what is understood of recordings that no training has heard (``held_``).

The answer is one of the names of the trained sounds. ``at_1`` is how often the true one has the best score (its mean
log-likelihood per token with the sound, less that without), ``exact`` how often the greedy answer is the name. Beside a
score stand ``chance_`` (a random order) and ``_blind`` (the sounds permuted among the items).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xfusion.data.sequence import XFusionError
from xfusion.data.sources import Sounds, open_source
from xfusion.evaluation.metrics import captions, naming
from xfusion.evaluation.metrics.blind import blind
from xfusion.evaluation.suites.emoji import chosen
from xfusion.generation import BATCH

LARGEST_NAMES = 100
"""Names that may be candidates: each is scored behind each sound."""


def run(
    model: Any,
    *,
    progress: Callable[[str, int, int], None],
    source: str = "digits/train.jsonl",
    held: str | None = None,
    max_fit: int | None = 200,
    max_held: int | None = None,
) -> dict[str, Any]:
    """Scores of one model.

    Args:
        model: hears, and captions.
        progress: see `evaluate`.
        source: the trained sounds; their names are the candidates.
        held: sounds to name that were not trained on, of other recordings or speakers; None names the trained ones alone.
        max_fit: name only so many of the trained sounds (always the same ones).
        max_held: name only so many of the others.

    Raises:
        XFusionError: a model of pictures, data that are no sounds, a held-out sound of another name.
    """
    if model.modality.name != "audio" or "caption" not in model.capabilities:
        raise XFusionError(f"this suite names sounds, but the model is of {model.modality.described}")
    trained = _sounds(source)
    names = list(dict.fromkeys(example.captions[0] for example in trained.examples))
    if len(names) > LARGEST_NAMES:
        raise XFusionError(f"{source}: {len(names)} different names, at most {LARGEST_NAMES} are ranked")
    metrics: dict[str, Any] = {"num_names": len(names)}
    parts = {"fit": (trained, max_fit)} | ({"held": (_sounds(held), max_held)} if held else {})
    alone = model.score_names(None, names)
    for part, (sounds, most) in parts.items():
        indices = chosen(sounds.examples, most)
        unknown = [sounds.examples[i] for i in indices if sounds.examples[i].captions[0] not in names]
        if unknown:
            raise XFusionError(f"{unknown[0].origin}: {unknown[0].captions[0]!r} is no name of {source}")
        metrics |= {f"num_{part}": len(indices)} | _named(model, sounds, indices, names, alone, part, progress)
    return {**metrics, "settings": {"data": source, "held": held, "names": names}}


def _sounds(spec: str) -> Sounds:
    opened = open_source(spec, split="all")
    if not isinstance(opened, Sounds):
        raise XFusionError(f"{spec}: holds no sounds, and this suite names sounds")
    return opened


def _named(
    model: Any,
    sounds: Sounds,
    indices: list[int],
    names: list[str],
    alone: Tensor,
    part: str,
    progress: Callable[[str, int, int], None],
) -> dict[str, float]:
    """Rank of the true name, and exact match of the greedy answer, each beside its blind base rate."""
    truth = [sounds.examples[i].captions[0] for i in indices]
    scores, answers, what = [], [], f"name {part} sounds"
    progress(what, 0, len(indices))
    for start in range(0, len(indices), BATCH):
        heard = [sounds.sound(i) for i in indices[start : start + BATCH]]
        scores.append(model.score_names(heard, names))
        answers += model.caption(heard, max_tokens=8)
        progress(what, min(start + BATCH, len(indices)), len(indices))
    pointwise = naming.pointwise(torch.cat(scores), alone)
    # By name and not by group: two speakers say the same word.
    hit = torch.tensor([[name == true for name in names] for true in truth])
    metrics = naming.beside(f"{part}_", pointwise, hit, ks=(1,))
    wordings = [(true,) for true in truth]
    metrics[f"{part}_exact"] = captions.exact_match(answers, wordings)
    metrics[f"{part}_exact_blind"] = blind(
        lambda order: captions.exact_match([answers[i] for i in order.tolist()], wordings), len(answers)
    )
    return metrics
