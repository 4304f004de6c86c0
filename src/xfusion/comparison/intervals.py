"""Student's t: intervals, paired differences, and the number of seeds that a difference needs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

FEWEST_RUNS = 5
"""Fewest runs for which an interval is given."""
MOST_SEEDS = 1000
"""Largest number of seeds to report as needed."""
POWER = 0.8
"""Statistical power for which the number of seeds is computed."""


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t-distribution, for integer degrees of freedom, to 1e-12.

    The probability of a range around 0 is a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4), inverted by bisection.
    """
    if degrees < 1 or not 0 < probability < 1:
        raise ValueError(f"t_quantile({probability}, {degrees}): a probability within 0 to 1, and 1 degree or more")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    target, low, high = 2 * probability - 1, 0.0, 1.0
    while _central_probability(high, degrees) < target:
        high *= 2
    for _ in range(100):
        midpoint = (low + high) / 2
        low, high = (midpoint, high) if _central_probability(midpoint, degrees) < target else (low, midpoint)
    return (low + high) / 2


def _central_probability(t: float, degrees: int) -> float:
    """Probability that ``|T| < t``."""
    angle = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = (cosine if degrees > 1 else 0.0) if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """The t-interval of the mean; None over fewer than five values."""
    if len(values) < FEWEST_RUNS:
        return None
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    half_width = t_quantile(0.5 + confidence / 2, len(values) - 1) * deviation / math.sqrt(len(values))
    return mean - half_width, mean + half_width


def seeds_needed(difference: float, deviation: float, power: float = POWER) -> int | None:
    """Pairs of runs at which a paired t-test at 95 % finds a difference of this size with this chance.

    Args:
        difference: mean of the paired differences.
        deviation: their standard deviation.
        power: the chance.

    Returns:
        five or more; None where more than 1,000 would be needed, or there is no difference.
    """
    if not difference:
        return None
    # The normal distribution needs a few fewer, so that the search starts just below the answer.
    normal = statistics.NormalDist()
    z_sum = normal.inv_cdf(0.975) + normal.inv_cdf(power)
    start = (z_sum * deviation / abs(difference)) ** 2
    if start > MOST_SEEDS:
        return None
    count = max(FEWEST_RUNS, math.floor(start))
    while (t_quantile(0.975, count - 1) + t_quantile(power, count - 1)) * deviation > abs(difference) * math.sqrt(
        count
    ):
        count += 1
    return count


def paired(
    values: Mapping[int, float], reference: Mapping[int, float], better: str = "higher"
) -> dict[str, Any] | None:
    """The difference of two recipes over the seeds that both ran; None if there is no such seed.

    Args:
        values: seed -> score.
        reference: the same for the reference recipe.
        better: whether a higher or a lower score is better.

    Returns:
        ``num_pairs``, ``values`` by seed, ``mean``, ``deviation``, ``interval`` (None below five pairs), ``verdict``
        ("better", "worse" or "not decidable") and ``seeds_needed``.
    """
    seeds = sorted(set(values) & set(reference))
    if not seeds:
        return None
    differences = [values[seed] - reference[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    deviation = statistics.stdev(differences) if len(seeds) > 1 else None
    bounds, verdict = interval(differences), "not decidable"
    if bounds and (bounds[0] > 0 or bounds[1] < 0):
        verdict = "better" if (mean > 0) == (better == "higher") else "worse"
    return {
        "num_pairs": len(seeds),
        "values": {str(seed): value for seed, value in zip(seeds, differences, strict=True)},
        "mean": mean,
        "deviation": deviation,
        "interval": bounds and list(bounds),
        "verdict": verdict,
        "seeds_needed": None if deviation is None else seeds_needed(mean, deviation),
    }
