"""Paired differences over few seeds: their 95 % interval, and which difference so many seeds could tell from none."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Student's t of 1 to 9 degrees of freedom: two-sided 95 %, and the quantile of 80 %.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_POWER = (1.376, 1.061, 0.978, 0.941, 0.920, 0.906, 0.896, 0.889, 0.883)


def interval(own: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean difference of two sides, seed by seed; a side that diverges is worst."""
    differences = [a - b for a, b in zip(own, other, strict=True)]
    mean = statistics.fmean(differences)
    if not math.isfinite(mean):
        diverged = tuple(not all(map(math.isfinite, side)) for side in (own, other))
        return {(True, False): (math.inf, math.inf), (False, True): (-math.inf, -math.inf)}.get(
            diverged, (-math.inf, math.inf)
        )
    half = _STUDENT[len(differences) - 2] * error(differences) if len(differences) > 1 else 0.0
    return mean - half, mean + half


def error(values: Sequence[float]) -> float:
    """Return the standard error of a mean."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) / math.sqrt(len(values)) if all(map(math.isfinite, values)) else math.inf


def detectable(low: float, high: float, seeds: int) -> float:
    """Return the difference that as many seeds, spread as these, separate from none four times out of five."""
    if not 1 < seeds <= len(_STUDENT) + 1 or not math.isfinite(high - low):
        return 0.0
    return (high - low) / 2 * (1 + _POWER[seeds - 2] / _STUDENT[seeds - 2])
