"""When to refuse: the lowest confidence at which answers are right as often as asked, chosen on other questions."""

from __future__ import annotations

import math

from torch import Tensor


def threshold(confidence: Tensor, right: Tensor, wanted: float) -> float:
    """The lowest bound such that answers of at least this confidence are right in a share of ``wanted`` or more.

    Args:
        confidence: float ``[N]`` in [0, 1].
        right: bool ``[N]``.
        wanted: accuracy, in [0, 1].

    Returns:
        one of the confidences, or infinity where no bound does: then everything is refused.
    """
    fitting = [
        bound for bound in confidence.unique().tolist() if float(right[confidence >= bound].float().mean()) >= wanted
    ]
    return min(fitting, default=math.inf)


def refusal(confidence: Tensor, right: Tensor, bound: float) -> dict[str, float | None]:
    """Share of questions that are answered under a bound, and how often these answers are right.

    Returns:
        ``answered`` in [0, 1] and ``accuracy_answered``, None where nothing is answered.
    """
    kept = confidence >= bound
    share = float(kept.float().mean())
    return {"answered": share, "accuracy_answered": float(right[kept].float().mean()) if share else None}
