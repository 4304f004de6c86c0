"""Naming sounds: memorisation (``fit_``), and generalisation to recordings that were never trained on (``held_``).

The candidates are the names of the trained sounds. ``at_1`` is the share of sounds whose true name has the best score, its mean
log-likelihood per token with the sound minus the same without it. ``exact`` is the share of greedy answers that equal the
name. Scores come with ``chance_`` (a random order) and ``_blind`` (the sounds permuted among the items).

For a model that generates sound codes, ``made_`` measures whether the codes are those of the requested word. A generated sound
is represented by the counts of its codes, a name by the mean counts of trained recordings, and names are ranked by cosine.
No model is used as a judge. ``ceiling_made_`` is the same score for real held-out recordings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xfusion.data.sequence import Audio, XFusionError
from xfusion.data.sources import Sounds, Source, content_fingerprint, open_source
from xfusion.evaluation.metrics import captions, naming
from xfusion.evaluation.metrics.blind import blind
from xfusion.evaluation.suites.emoji import Part, choose_examples
from xfusion.evaluation.unseen import held_out
from xfusion.generation import BATCH
from xfusion.objectives.codes import NextCode

LARGEST_NAMES = 100
"""Largest number of candidate names, since each is scored after each sound."""
PER_NAME = 20
"""Largest number of trained recordings per name that are averaged."""

MAY_BE_ZERO = {"max_held", "num_made"}


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
        model: a model that reads sounds and captions.
        progress: see `evaluate`.
        source: the trained sounds: an open source, or a spec. Their names are the candidates.
        held: held-out sounds, of other recordings or speakers, likewise. A spec stands for its held-out split, or for all of it
            if it has none. None uses the held-out split of ``source``; without one, only trained sounds are named.
        part: name only the groups of one part, as in the suite ``emoji``.
        seed: seed of the first generated sound.
        max_fit: name at most this many trained sounds (always the same ones); None is all.
        max_held: name at most this many held-out sounds; None is all.
        num_made: number of sounds to generate for each name, each with its own seed, if the model generates codes; 0 is
            none.

    Returns:
        for each of ``fit`` and ``held`` the scores ``at_1``, ``mrr`` and ``exact`` with their baselines, the scores ``made_`` if
        the model generates codes, and numbers of sounds and names.

    Raises:
        XFusionError: the model does not name sounds, a source has no sounds or none in the part, a held-out sound has a name that
            was not trained, or there are more than `LARGEST_NAMES` names.
    """
    if model.modality.name != "audio" or "caption" not in model.capabilities:
        raise XFusionError(f"this suite names sounds, but the model is of {model.modality.described}")
    trained = _open_sounds(source, "train")
    names = list(dict.fromkeys(example.captions[0] for example in trained.examples))
    if len(names) > LARGEST_NAMES:
        raise XFusionError(f"{trained.spec}: {len(names)} different names, at most {LARGEST_NAMES} are ranked")
    metrics: dict[str, Any] = {"num_names": len(names)}
    held_set = held_out(held, trained)
    held_sounds = None if held_set is None else _open_sounds(held_set, "held")
    parts = {"fit": (trained, max_fit)} | ({"held": (held_sounds, max_held)} if held_sounds else {})
    prior = model.score_names(None, names)
    for kind, (sounds, limit) in parts.items():
        indices = choose_examples(sounds.examples, limit, part)
        if not indices:
            raise XFusionError(f"{sounds.spec}: none of {len(sounds)} sounds falls into the part {part!r}")
        unknown = [sounds.examples[i] for i in indices if sounds.examples[i].captions[0] not in names]
        if unknown:
            raise XFusionError(f"{unknown[0].origin}: {unknown[0].captions[0]!r} is no name of {trained.spec}")
        metrics |= {f"num_{kind}": len(indices)} | _naming_scores(model, sounds, indices, names, prior, kind, progress)
    if isinstance(model.media_objective, NextCode) and num_made:
        held_set = (held_sounds, choose_examples(held_sounds.examples, max_held, part)) if held_sounds else None
        metrics |= _generation_scores(model, trained, held_set, names, num_made, seed, progress)
    settings = {
        "data": trained.spec,
        "data_fingerprint": content_fingerprint(trained),
        "held": held_sounds and held_sounds.spec,
        "held_fingerprint": held_sounds and content_fingerprint(held_sounds),
        "part": part,
        "seed": seed,
        "names": names,
    }
    return {**metrics, "settings": settings}


def _open_sounds(source: Source | str, split: str) -> Sounds:
    """The source, opened if it is a spec; refused if it has no sounds."""
    sounds = open_source(source, split=split) if isinstance(source, str) else source
    if not isinstance(sounds, Sounds):
        raise XFusionError(f"{sounds.spec}: holds no sounds, and this suite names sounds")
    return sounds


def _naming_scores(
    model: Any,
    sounds: Sounds,
    indices: list[int],
    names: list[str],
    prior: Tensor,
    kind: str,
    progress: Callable[[str, int, int], None],
) -> dict[str, float]:
    """Rank of the true name, and exact match of the greedy answer, each with its blind base rate."""
    true_names = [sounds.examples[i].captions[0] for i in indices]
    scores, answers, label = [], [], f"name {kind} sounds"
    progress(label, 0, len(indices))
    for start in range(0, len(indices), BATCH):
        batch_sounds = [sounds.sound(i) for i in indices[start : start + BATCH]]
        scores.append(model.score_names(batch_sounds, names))
        answers += model.caption(batch_sounds, max_tokens=8)
        progress(label, min(start + BATCH, len(indices)), len(indices))
    pointwise = naming.pointwise(torch.cat(scores), prior)
    # A hit is an equal name, not an equal group: several speakers say one word.
    hit = torch.tensor([[name == true for name in names] for true in true_names])
    metrics = naming.with_baselines(f"{kind}_", pointwise, hit, ks=(1,))
    wordings = [(true,) for true in true_names]
    metrics[f"{kind}_exact"] = captions.exact_match(answers, wordings)
    metrics[f"{kind}_exact_blind"] = blind(
        lambda order: captions.exact_match([answers[i] for i in order.tolist()], wordings), len(answers)
    )
    return metrics


def _generation_scores(
    model: Any,
    trained: Sounds,
    held_sounds: tuple[Sounds, list[int]] | None,
    names: list[str],
    num_made: int,
    first_seed: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, float]:
    """Rank of the requested name by the generated codes, and of the true name by the codes of held-out recordings."""
    trained_indices = [
        [i for i, e in enumerate(trained.examples) if e.captions[0] == name][:PER_NAME] for name in names
    ]
    trained_codes = [_codes(model, trained, indices) for indices in trained_indices]
    generated: list[Tensor] = []
    for index in range(num_made):
        progress("make sounds", index, num_made)
        seed = first_seed + len(names) * index
        generated += [codes for (codes,) in model.generate([[name, Audio()] for name in names], seed=seed)]
    progress("make sounds", num_made, num_made)
    codes_by_prefix = {"made_": (torch.stack(generated), names * num_made)}
    if held_sounds is not None:
        sounds, indices = held_sounds
        codes_by_prefix["ceiling_made_"] = (
            _codes(model, sounds, indices),
            [sounds.examples[i].captions[0] for i in indices],
        )
    entries = 1 + max(int(codes.max()) for codes in [*trained_codes, *(codes for codes, _ in codes_by_prefix.values())])
    means = functional.normalize(torch.stack([_counts(codes, entries).mean(0) for codes in trained_codes]), dim=1)
    metrics: dict[str, float] = {"num_made": len(generated)}
    for prefix, (codes, true_names) in codes_by_prefix.items():
        hit = torch.tensor([[name == true for name in names] for true in true_names])
        metrics |= naming.with_baselines(prefix, _counts(codes, entries) @ means.T, hit, ks=(1,))
    return metrics


def _codes(model: Any, sounds: Sounds, indices: list[int]) -> Tensor:
    """Codes of recordings, int64 ``[N, frames]``."""
    size = model.modality.sizes[0]
    batches = (indices[start : start + BATCH] for start in range(0, len(indices), BATCH))
    frames = [
        model.modality.decode(model.modality.encode([sounds.sound(i) for i in batch_indices], size), size)
        for batch_indices in batches
    ]
    return torch.cat(frames)[..., 0].round().long()


def _counts(codes: Tensor, entries: int) -> Tensor:
    """Counts of the codes of each sound, normalised to length 1: int64 ``[N, frames]`` -> float32 ``[N, entries]``."""
    return functional.normalize(functional.one_hot(codes, entries).sum(1).float(), dim=1)
