"""Captions against accepted wordings: exact match and token F1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from xfusion.data.sequence import Example, XFusionError

_TOKEN = re.compile(r"\w+")


def accepted(examples: Sequence[Example], among: Sequence[Example] | None = None) -> list[tuple[str, ...]]:
    """For each example, all wordings of all members of its group, its own first.

    among: where to look for members; None looks in `examples`.
    """
    wordings: dict[str, list[str]] = {}
    for example in [*examples, *(among or ())]:
        wordings.setdefault(example.group, []).extend(example.captions)
    return [tuple(dict.fromkeys([*example.captions, *wordings[example.group]])) for example in examples]


def exact_match(answers: Sequence[str], wordings: Sequence[Sequence[str]]) -> float:
    """Share of answers that equal one of their accepted wordings, both lower-cased and stripped."""
    _check(answers, wordings)
    hits = [
        _plain(answer) in {_plain(reference) for reference in references}
        for answer, references in zip(answers, wordings, strict=True)
    ]
    return sum(hits) / len(hits)


def token_f1(answers: Sequence[str], wordings: Sequence[Sequence[str]]) -> float:
    """Mean over the answers of the best F1, with any wording, of shared words (lower-cased, without punctuation)."""
    _check(answers, wordings)
    best = [
        max((_f1(answer, reference) for reference in references), default=0.0)
        for answer, references in zip(answers, wordings, strict=True)
    ]
    return sum(best) / len(best)


def _plain(text: str) -> str:
    return text.lower().strip()


def _f1(answer: str, wording: str) -> float:
    answer_words, wording_words = Counter(_TOKEN.findall(answer.lower())), Counter(_TOKEN.findall(wording.lower()))
    shared = (answer_words & wording_words).total()
    return 2 * shared / (answer_words.total() + wording_words.total()) if shared else 0.0


def _check(answers: Sequence[str], wordings: Sequence[Sequence[str]]) -> None:
    if len(answers) != len(wordings) or not len(answers):
        raise XFusionError(
            f"captions need one set of wordings per answer: {len(answers)} answers, {len(wordings)} sets"
        )
