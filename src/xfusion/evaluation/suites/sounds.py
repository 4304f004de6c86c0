"""Naming and transcribing sounds: memorisation (``fit_``), and generalisation to what was never trained on (``held_``).

Names: the held-out sounds are other recordings of the trained names, which are the candidates. ``at_1`` is the share of sounds
whose true name has the best score, its mean log-likelihood per token with the sound minus the same without it. ``exact`` is
the share of greedy answers that equal the name. Scores come with ``chance_`` (a random order) and ``_blind`` (the sounds
permuted among the items).

Sentences: none of the held-out texts was trained (or nothing is held out, and the trained texts are too many to be names). The
candidates are then the held-out texts, and trained sounds are not ranked. ``word_errors`` is the word error rate of the greedy
answers (`xfusion.evaluation.metrics.word_errors`), with ``_interval`` (95 %, resampled sentences) and ``_blind``.

For a model that generates sound codes, ``made_`` measures whether the codes are those of the requested word. A generated sound
is represented by the counts of its codes, a name by the mean counts of trained recordings, and names are ranked by cosine.
No model is used as a judge. ``ceiling_made_`` is the same score for real held-out recordings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xfusion.data.sequence import Audio, XFusionError
from xfusion.data.sources import Sounds, Source, content_fingerprint, open_source
from xfusion.evaluation.metrics import captions, naming, word_errors
from xfusion.evaluation.metrics.blind import blind
from xfusion.evaluation.suites.emoji import Part, choose_examples
from xfusion.evaluation.unseen import held_out
from xfusion.generation import BATCH
from xfusion.objectives.codes import NextCode

LARGEST_NAMES = 100
"""Largest number of candidates, since each is scored after each sound."""
FEWEST_TOKENS = 8
"""Fewest tokens that an answer may have; where trained texts are longer, twice as many as the longest has."""
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
        source: the trained sounds: an open source, or a spec.
        held: held-out sounds, of other recordings or speakers, likewise. A spec stands for its held-out split, or for all of it
            if it has none. None uses the held-out split of ``source``; without one, only trained sounds are named.
        part: name only the groups of one part, as in the suite ``emoji``.
        seed: seed of the first generated sound.
        max_fit: name at most this many trained sounds (always the same ones); None is all.
        max_held: name at most this many held-out sounds; None is all.
        num_made: number of sounds to generate for each name, each with its own seed, if the model generates codes; 0 is
            none, and so is it for sentences.

    Returns:
        for each of ``fit`` and ``held`` the scores ``exact`` and, of sentences, ``word_errors``; for both, or of sentences
        for ``held`` alone, ``at_1`` and ``mrr``; each with its baselines; the scores ``made_`` if the model generates codes
        of names; and numbers of sounds and candidates.

    Raises:
        XFusionError: the model does not name sounds, a source has no sounds or none in the part, some held-out texts were
            trained and others not, or there are more than `LARGEST_NAMES` candidates.
    """
    if model.modality.name != "audio" or "caption" not in model.capabilities:
        raise XFusionError(f"this suite names sounds, but the model is of {model.modality.described}")
    trained = _open_sounds(source, "train")
    held_set = held_out(held, trained)
    held_sounds = None if held_set is None else _open_sounds(held_set, "held")
    parts = {"fit": (trained, max_fit)} | ({"held": (held_sounds, max_held)} if held_sounds else {})
    chosen: dict[str, list[int]] = {}
    for kind, (sounds, limit) in parts.items():
        chosen[kind] = choose_examples(sounds.examples, limit, part)
        if not chosen[kind]:
            raise XFusionError(f"{sounds.spec}: none of {len(sounds)} sounds falls into the part {part!r}")
    trained_names = _texts(trained, range(len(trained)))
    answer_tokens = max(FEWEST_TOKENS, 2 * max(len(model.backbone.encode(name)) for name in trained_names))
    are_sentences = _are_sentences(trained, trained_names, held_sounds, chosen.get("held", []))
    names, remedy = trained_names, ""
    if are_sentences:
        names, remedy = (_texts(held_sounds, chosen["held"]) if held_sounds else []), ": score fewer, by max_held"
    if len(names) > LARGEST_NAMES:
        spec = held_sounds.spec if are_sentences and held_sounds else trained.spec
        raise XFusionError(f"{spec}: {len(names)} different names, at most {LARGEST_NAMES} are ranked{remedy}")
    metrics: dict[str, Any] = {"num_names": len(names)}
    for kind, (sounds, _) in parts.items():
        indices = chosen[kind]
        metrics[f"num_{kind}"] = len(indices)
        if not are_sentences or kind == "held":
            metrics |= _ranks(model, sounds, indices, names, kind, progress)
        metrics |= _answer_scores(model, sounds, indices, answer_tokens, kind, progress, are_sentences)
    if isinstance(model.media_objective, NextCode) and num_made and not are_sentences:
        held_recordings = (held_sounds, chosen["held"]) if held_sounds else None
        metrics |= _generation_scores(model, trained, held_recordings, names, num_made, seed, progress)
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


def _texts(sounds: Sounds, indices: Iterable[int]) -> list[str]:
    """The different texts of these sounds."""
    return list(dict.fromkeys(sounds.examples[i].captions[0] for i in indices))


def _are_sentences(trained: Sounds, names: list[str], held_sounds: Sounds | None, held_indices: list[int]) -> bool:
    """Whether the held-out texts are other than the trained ones; without any, whether these are too many to be names."""
    if held_sounds is None:
        return len(names) > LARGEST_NAMES
    examples = [held_sounds.examples[i] for i in held_indices]
    unknown = [example for example in examples if example.captions[0] not in names]
    if unknown and len(unknown) < len(examples):
        raise XFusionError(
            f"{unknown[0].origin}: {unknown[0].captions[0]!r} is no name of {trained.spec}, but {len(examples) - len(unknown)} of"
            f" {len(examples)} held-out texts are: hold out recordings of trained names, or sentences that are all new"
        )
    return bool(unknown)


def _ranks(
    model: Any,
    sounds: Sounds,
    indices: list[int],
    names: list[str],
    kind: str,
    progress: Callable[[str, int, int], None],
) -> dict[str, float]:
    """Rank of the true name, with its baselines."""
    scores, label = [], f"rank names of {kind} sounds"
    for batch_indices in _batches(indices, label, progress):
        scores.append(model.score_names([sounds.sound(i) for i in batch_indices], names))
    pointwise = naming.pointwise(torch.cat(scores), model.score_names(None, names))
    # A hit is an equal name, not an equal group: several speakers say one word.
    hit = torch.tensor([[name == sounds.examples[i].captions[0] for name in names] for i in indices])
    return naming.with_baselines(f"{kind}_", pointwise, hit, ks=(1,))


def _answer_scores(
    model: Any,
    sounds: Sounds,
    indices: list[int],
    max_tokens: int,
    kind: str,
    progress: Callable[[str, int, int], None],
    are_sentences: bool,
) -> dict[str, Any]:
    """Exact match of the greedy answers, and word errors of sentences, each with its blind base rate."""
    answers: list[str] = []
    for batch_indices in _batches(indices, f"name {kind} sounds", progress):
        answers += model.caption([sounds.sound(i) for i in batch_indices], max_tokens=max_tokens)
    texts = [sounds.examples[i].captions[0] for i in indices]
    wordings = [(text,) for text in texts]
    metrics: dict[str, Any] = {
        f"{kind}_exact": captions.exact_match(answers, wordings),
        f"{kind}_exact_blind": blind(
            lambda order: captions.exact_match([answers[i] for i in order.tolist()], wordings), len(answers)
        ),
    }
    return metrics | (word_errors.with_baselines(f"{kind}_", answers, texts) if are_sentences else {})


def _batches(indices: list[int], label: str, progress: Callable[[str, int, int], None]) -> Iterator[list[int]]:
    """Batches of indices; progress is reported after each."""
    progress(label, 0, len(indices))
    for start in range(0, len(indices), BATCH):
        yield indices[start : start + BATCH]
        progress(label, min(start + BATCH, len(indices)), len(indices))


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
