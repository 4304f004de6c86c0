"""When to refuse: the lowest confidence at which answers reach a wanted accuracy, chosen on other questions."""

from __future__ import annotations

import math

from torch import Tensor


def threshold(confidence: Tensor, is_right: Tensor, wanted: float) -> float:
    """The lowest bound such that answers of at least this confidence have an accuracy of ``wanted`` or more.

    Args:
        confidence: float ``[N]`` in [0, 1].
        is_right: bool ``[N]``.
        wanted: accuracy, in [0, 1].

    Returns:
        one of the confidences, or infinity if there is no such bound: then everything is refused.
    """
    bounds = [
        bound for bound in confidence.unique().tolist() if float(is_right[confidence >= bound].float().mean()) >= wanted
    ]
    return min(bounds, default=math.inf)


def refusal(confidence: Tensor, is_right: Tensor, bound: float) -> dict[str, float | None]:
    """Share of questions that are answered at a bound, and the accuracy of these answers.

    Returns:
        ``answered`` in [0, 1] and ``accuracy_answered``, None if nothing is answered.
    """
    is_answered = confidence >= bound
    share = float(is_answered.float().mean())
    return {"answered": share, "accuracy_answered": float(is_right[is_answered].float().mean()) if share else None}
