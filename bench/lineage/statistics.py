"""What is said of many pairs: does a statistic tell kin from strangers, and are p-values what they claim to be?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FALSE_POSITIVES = 1e-3
QUANTILES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_ROUNDS = 1000


def auc(kin: Sequence[float], strangers: Sequence[float]) -> float:
    """The probability that kin score above strangers, ties counted half."""
    ordered = np.sort(strangers)
    below = np.searchsorted(ordered, kin, side="left") + np.searchsorted(ordered, kin, side="right")
    return float(below.mean() / (2 * len(ordered)))


def threshold(strangers: Sequence[float], share: float = FALSE_POSITIVES) -> float:
    """The least score that no more than this share of strangers exceeds: with fewer than 1/share their largest."""
    return float(np.sort(strangers)[-1 - math.floor(share * len(strangers))])


def kolmogorov_smirnov(p_values: Sequence[float] | Floats) -> float:
    """The largest distance between the p-values' distribution and the uniform."""
    ordered, n = np.sort(p_values), len(p_values)
    steps = np.arange(n + 1) / n
    return float(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))


def kolmogorov_p(distance: float, n: int) -> float:
    """P(D ≥ distance) for n independent uniforms, asymptotically. Source: Stephens 1970."""
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    if x < 0.3:
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 101)))


def uniformity(models: Sequence[str], p_values: Mapping[frozenset[str], float], seed: int = 0) -> dict[str, Any]:
    """Are p-values of all pairs of models uniform, given that pairs which share a model depend on each other?

    Models are resampled in two ways. `p, models drawn with replacement`: of the distance over all pairs, where the
    distance of resampled p-values from those found stands for the null (it errs to the side of too large a p, since a
    model drawn twice ties). `matchings`: pairs of a perfect matching share no model and are independent, so on each
    a plain test is valid; the share of random matchings that it rejects at 0.05, and the median p.
    """
    rng = np.random.default_rng(seed)
    square = np.full((len(models), len(models)), np.nan)
    for i, a in enumerate(models):
        for j, b in enumerate(models):
            square[i, j] = p_values.get(frozenset((a, b)), np.nan)
    matched = []
    for _ in range(_ROUNDS):
        order = rng.permutation(len(models))
        some = square[order[: len(order) // 2], order[len(order) // 2 :][: len(order) // 2]]
        some = some[~np.isnan(some)]
        matched.append(kolmogorov_p(kolmogorov_smirnov(some), len(some)))
    values = np.sort(list(p_values.values()))
    distance, distances = kolmogorov_smirnov(values), []
    for _ in range(_ROUNDS):
        drawn = rng.integers(len(models), size=len(models))
        some = square[np.ix_(drawn, drawn)][np.triu_indices(len(models), 1)]
        distances.append(_between(np.sort(some[~np.isnan(some)]), values))
    return {
        "models": len(models),
        "distance": round(distance, 4),
        "p, models drawn with replacement": round((1 + sum(each >= distance for each in distances)) / (1 + _ROUNDS), 3),
        "matchings": {
            "pairs each": len(models) // 2,
            "rejected at 0.05": round(float(np.mean(np.array(matched) <= 0.05)), 3),
            "median p": round(float(np.median(matched)), 3),
        },
    }


def distribution(p_values: Sequence[float]) -> dict[str, Any]:
    """Points of a Q–Q plot against the uniform: under it the quantile of q is q."""
    values = np.array(p_values)
    return {
        "pairs": len(values),
        "share at or below": {str(level): round(float((values <= level).mean()), 4) for level in (1e-3, 1e-2, 0.05)},
        "smallest": float(f"{values.min():.3g}"),
        "quantiles": {str(q): float(f"{np.quantile(values, q):.3g}") for q in QUANTILES},
    }


def _between(a: Floats, b: Floats) -> float:
    """The largest distance between two samples' distributions, both sorted."""
    both = np.concatenate([a, b])
    shares = [np.searchsorted(each, both, side="right") / len(each) for each in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max())
