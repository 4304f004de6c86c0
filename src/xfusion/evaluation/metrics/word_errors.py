"""Word error rate of transcripts: substituted, missing and additional words per word of the true texts, by torchmetrics.

Texts and answers are compared after `normalised`. The errors of all sentences are divided by the words of all, so a long
sentence counts for more than a short one. 0 is perfect, an empty answer scores 1, and longer wrong answers score more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from xfusion.data.sequence import XFusionError
from xfusion.evaluation.metrics.blind import blind
from xfusion.evaluation.metrics.clusters import bootstrap

_WORD = re.compile(r"\w+(?:'\w+)*")


def normalised(text: str) -> str:
    """Lower-cased words without punctuation, one space apart; an apostrophe within a word stays: ``it's``."""
    return " ".join(_WORD.findall(text.lower().replace("’", "'")))


def word_errors(answers: Sequence[str], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Fewest substitutions, deletions and insertions of words from each text to its answer, and words of each text.

    Returns:
        two tensors of whole numbers, float64 ``[N]``.

    Raises:
        XFusionError: there is not one text per answer, or a text has no words; or torchmetrics is not installed.
    """
    if len(answers) != len(texts) or not len(answers):
        raise XFusionError(f"word errors need one text per answer: {len(answers)} answers, {len(texts)} texts")
    try:
        from torchmetrics.functional.text import word_error_rate
    except ImportError as error:
        raise XFusionError(f"word errors need the package {error.name}: pip install 'xfusion[eval]'") from error
    transcripts, references = list(map(normalised, answers)), list(map(normalised, texts))
    if "" in references:
        raise XFusionError(f"the text {texts[references.index('')]!r} has no words: there is nothing to transcribe")
    num_words = torch.tensor([len(reference.split()) for reference in references], dtype=torch.float64)
    rates = [
        float(word_error_rate([answer], [reference])) for answer, reference in zip(transcripts, references, strict=True)
    ]
    return (torch.tensor(rates, dtype=torch.float64) * num_words).round(), num_words


def with_baselines(prefix: str, answers: Sequence[str], texts: Sequence[str]) -> dict[str, float | list[float] | None]:
    """``PREFIXword_errors``, the rate in 0 and up; ``_interval``, 95 % over resampled sentences; and ``_blind``.

    Raises:
        XFusionError: as `word_errors`.
    """
    errors, num_words = word_errors(answers, texts)
    total = float(num_words.sum())

    def permuted(order: Tensor) -> float:
        return float(word_errors([answers[i] for i in map(int, order)], texts)[0].sum()) / total

    name = f"{prefix}word_errors"
    return {
        name: float(errors.sum()) / total,
        f"{name}_interval": bootstrap(
            lambda resampled: errors[resampled].sum(dim=1) / num_words[resampled].sum(dim=1), len(errors)
        ),
        f"{name}_blind": blind(permuted, len(errors)),
    }
