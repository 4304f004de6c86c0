"""Naming sounds: memorisation (``fit_``), and generalisation to recordings that were never trained on (``held_``).

The answer is one of the names of the trained sounds. ``at_1`` is how often the true one has the best score (its mean
log-likelihood per token with the sound, less that without), ``exact`` how often the greedy answer is the name. Beside a
score stand ``chance_`` (a random order) and ``_blind`` (the sounds permuted among the items).

Of a model that says codes ``made_`` is how well these are those of the word that was asked for: the names are ordered by the
cosine between the codes that a sound is made of, counted without their order, and the mean of such counts over trained
recordings of the name. No model judges; ``ceiling_made_`` is the same of the recordings that no training has heard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xfusion.data.sequence import Audio, XFusionError
from xfusion.data.sources import Sounds, Source, open_source
from xfusion.evaluation.metrics import captions, naming
from xfusion.evaluation.metrics.blind import blind
from xfusion.evaluation.suites.emoji import Part, chosen
from xfusion.evaluation.unseen import held_out
from xfusion.generation import BATCH
from xfusion.objectives.codes import NextCode

LARGEST_NAMES = 100
"""Largest number of candidate names: each is scored after each sound."""
PER_NAME = 20
"""Largest number of trained recordings per name whose codes describe its sound."""


def run(
    model: Any,
    *,
    progress: Callable[[str, int, int], None],
    source: Source | str = "digits/train.jsonl",
    held: Source | str | None = None,
    part: Part = "all",
    seed: int = 0,
    max_fit: int | None = 200,
    max_held: int | None = None,
    num_made: int = 10,
) -> dict[str, Any]:
    """Scores of one model.

    Args:
        model: hears, and captions.
        progress: see `evaluate`.
        source: the trained sounds, opened or a spec; their names are the candidates.
        held: sounds to name that were not trained on, of other recordings or speakers, likewise: of a spec the held-out split, or
            all where it has none; None takes the held-out split of the same spec, and names the trained ones alone where there is
            none.
        part: name only the groups of one part, as the suite ``emoji`` has them.
        seed: of the first made sounds.
        max_fit: name only so many of the trained sounds (always the same ones).
        max_held: name only so many of the others.
        num_made: sounds made of each name, one seed each, by a model that says codes; 0 makes none.

    Raises:
        XFusionError: a model of pictures, data that are no sounds, a held-out sound of another name.
    """
    if model.modality.name != "audio" or "caption" not in model.capabilities:
        raise XFusionError(f"this suite names sounds, but the model is of {model.modality.described}")
    trained = _sounds(source, "train")
    names = list(dict.fromkeys(example.captions[0] for example in trained.examples))
    if len(names) > LARGEST_NAMES:
        raise XFusionError(f"{trained.spec}: {len(names)} different names, at most {LARGEST_NAMES} are ranked")
    metrics: dict[str, Any] = {"num_names": len(names)}
    unheard = held_out(held, trained)
    others = None if unheard is None else _sounds(unheard, "held")
    parts = {"fit": (trained, max_fit)} | ({"held": (others, max_held)} if others else {})
    alone = model.score_names(None, names)
    for kind, (sounds, most) in parts.items():
        indices = chosen(sounds.examples, most, part)
        if not indices:
            raise XFusionError(f"{sounds.spec}: none of {len(sounds)} sounds falls into the part {part!r}")
        unknown = [sounds.examples[i] for i in indices if sounds.examples[i].captions[0] not in names]
        if unknown:
            raise XFusionError(f"{unknown[0].origin}: {unknown[0].captions[0]!r} is no name of {trained.spec}")
        metrics |= {f"num_{kind}": len(indices)} | _named(model, sounds, indices, names, alone, kind, progress)
    if isinstance(model.media_objective, NextCode) and num_made:
        unheard = (others, chosen(others.examples, max_held, part)) if others else None
        metrics |= _made(model, trained, unheard, names, num_made, seed, progress)
    settings = {"data": trained.spec, "held": others and others.spec, "part": part, "seed": seed, "names": names}
    return {**metrics, "settings": settings}


def _sounds(source: Source | str, split: str) -> Sounds:
    opened = open_source(source, split=split) if isinstance(source, str) else source
    if not isinstance(opened, Sounds):
        raise XFusionError(f"{opened.spec}: holds no sounds, and this suite names sounds")
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


def _made(
    model: Any,
    trained: Sounds,
    others: tuple[Sounds, list[int]] | None,
    names: list[str],
    num_made: int,
    first: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, float]:
    """Rank of the asked name among all by the codes that were made; and of the true one by those of other recordings."""
    learned = [[i for i, e in enumerate(trained.examples) if e.captions[0] == name][:PER_NAME] for name in names]
    known = [_codes(model, trained, indices) for indices in learned]
    made: list[Tensor] = []
    for number in range(num_made):
        progress("make sounds", number, num_made)
        seed = first + len(names) * number
        made += [codes for (codes,) in model.generate([[name, Audio()] for name in names], seed=seed)]
    progress("make sounds", num_made, num_made)
    judged = {"made_": (torch.stack(made), names * num_made)}
    if others is not None:
        sounds, indices = others
        judged["ceiling_made_"] = (_codes(model, sounds, indices), [sounds.examples[i].captions[0] for i in indices])
    entries = 1 + max(int(codes.max()) for codes in [*known, *(codes for codes, _ in judged.values())])
    means = functional.normalize(torch.stack([_counts(codes, entries).mean(0) for codes in known]), dim=1)
    found: dict[str, float] = {"num_made": len(made)}
    for prefix, (codes, truth) in judged.items():
        hit = torch.tensor([[name == true for name in names] for true in truth])
        found |= naming.beside(prefix, _counts(codes, entries) @ means.T, hit, ks=(1,))
    return found


def _codes(model: Any, sounds: Sounds, indices: list[int]) -> Tensor:
    """Codes of recordings, int64 ``[N, frames]``."""
    size = model.modality.sizes[0]
    parts = (indices[start : start + BATCH] for start in range(0, len(indices), BATCH))
    frames = [
        model.modality.decode(model.modality.encode([sounds.sound(i) for i in part], size), size) for part in parts
    ]
    return torch.cat(frames)[..., 0].round().long()


def _counts(codes: Tensor, entries: int) -> Tensor:
    """How often each code occurs, at length one: ``[N, frames]`` -> ``[N, entries]``."""
    return functional.normalize(functional.one_hot(codes, entries).sum(1).float(), dim=1)
