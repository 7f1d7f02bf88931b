"""The published score: do σ of the attention matrices run alike over the layers of two models?

For each of Q, K, V and O the population std of a model's weights, layer after layer, is a curve over relative depth.
Two curves are compared by Pearson's correlation, the shorter linearly interpolated to the longer (arXiv 2507.03014;
z-scoring the curves first, as there, changes no correlation), by the same after a cubic trend over relative depth is
removed, and, whatever their order, as sets of σ/mean(σ). It is the only statistic that compares models of any two
shapes, and unrelated models often score high, so it is always given beside its place among unrelated models (`null`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from llmfp.architecture.specs import ROLES
from llmfp.evidence.permutation import Floats

BINS = 10
"""Of the histograms whose Kullback–Leibler divergence is given: equal widths over the range of both sets."""
MIN_LAYERS = 3
DETREND_MIN_LAYERS = 6
"""Two degrees of freedom beyond the four of a cubic, as three layers leave beyond the mean; with five a correlation of
what remains is ±1 whatever the curves."""
_TREND_DEGREE = 3
ROUNDING = 1e-9
"""Values that differ by less, relative to the largest, are the same."""

StdCurves = Mapping[str, Sequence[float | None]]
"""σ of every layer by role, "q", "k", "v", "o"; None where a layer has none."""
Scores = Mapping[str, float | None]
"""By role, and "mean" over those roles that have one."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Scores by role and their mean; None where `reasons` says why.

    pearson, detrended  correlation of σ curves, and of what a cubic trend leaves of them
    wasserstein         Wasserstein-1 distance between the sets of σ/mean(σ)
    kl                  Kullback–Leibler divergence of the first model's histogram from the second's, in nats; BINS
                        shared bins, one added to every count
    """

    pearson: Scores
    detrended: Scores
    wasserstein: Scores
    kl: Scores
    reasons: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Curve:
    """float64 [n] both: relative depth in [0, 1], increasing, and σ there."""

    depth: Floats
    std: Floats


def profile(a: StdCurves, b: StdCurves) -> Profile:
    """All scores of two models. Checked against loops in float64 and against published correlations."""
    reasons: dict[str, str] = {}
    columns: dict[str, dict[str, float | None]] = {name: {} for name in ("pearson", "detrended", "wasserstein", "kl")}
    for role in map(str, ROLES):
        pair = curve(a[role]), curve(b[role])
        reason = next((found for found in map(unusable, pair) if found), None)
        if reason is not None:
            reasons[role] = reason
        columns["pearson"][role] = None if reason else pearson(*pair)
        columns["detrended"][role] = None if reason else detrended(*pair)
        columns["wasserstein"][role] = None if reason else wasserstein(*pair)
        columns["kl"][role] = None if reason else kl(*pair)
        if reason is None and columns["detrended"][role] is None:
            reasons[f"detrended {role}"] = (
                f"a cubic trend needs at least {DETREND_MIN_LAYERS} layers, and must leave something"
            )
    for scores in columns.values():
        scores["mean"] = mean(scores.values())
    return Profile(**columns, reasons=reasons)


def pearson_mean(a: StdCurves, b: StdCurves, roles: Sequence[str]) -> float | None:
    """The published score over these roles; None unless every one of them has a correlation."""
    found = []
    for role in roles:
        pair = curve(a[role]), curve(b[role])
        if any(map(unusable, pair)) or (score := pearson(*pair)) is None:
            return None
        found.append(score)
    return mean(found)


def curve(stds: Sequence[float | None]) -> Curve:
    """The layers that have a σ, each at its own relative depth."""
    known = [i for i, std in enumerate(stds) if std is not None]
    depth = np.array(known, np.float64) / max(len(stds) - 1, 1)
    return Curve(depth, np.array([stds[i] for i in known], np.float64))


def unusable(one: Curve) -> str | None:
    """Why a curve gives no score, or None."""
    if len(one.std) < MIN_LAYERS:
        return f"fewer than {MIN_LAYERS} layers have a σ"
    return "σ is the same in every layer" if _constant(one.std, float(np.abs(one.std).max())) else None


def pearson(a: Curve, b: Curve) -> float | None:
    """Correlation over relative depth; None where interpolation leaves one of them constant."""
    longer, shorter = (a, b) if len(a.std) >= len(b.std) else (b, a)
    return _correlation(longer.std, np.interp(longer.depth, shorter.depth, shorter.std))


def detrended(a: Curve, b: Curve) -> float | None:
    """Correlation after each curve's own least-squares cubic over relative depth is removed."""
    if min(len(a.std), len(b.std)) < DETREND_MIN_LAYERS:
        return None
    rest = [Curve(each.depth, each.std - _trend(each)) for each in (a, b)]
    if any(_constant(left.std, float(np.abs(whole.std).max())) for left, whole in zip(rest, (a, b), strict=True)):
        return None
    return pearson(*rest)


def wasserstein(a: Curve, b: Curve) -> float:
    """∫ |F⁻¹ − G⁻¹| between the two sets of σ/mean(σ)."""
    x, y = np.sort(_relative(a)), np.sort(_relative(b))
    cuts = np.union1d(np.arange(1, len(x) + 1) / len(x), np.arange(1, len(y) + 1) / len(y))
    widths = np.diff(cuts, prepend=0.0)
    middles = cuts - widths / 2
    apart = np.abs(x[(middles * len(x)).astype(np.intp)] - y[(middles * len(y)).astype(np.intp)])
    return float(widths @ apart)


def kl(a: Curve, b: Curve) -> float:
    """Σ p ln(p/q) over the histograms of σ/mean(σ)."""
    x, y = _relative(a), _relative(b)
    edges = np.linspace(min(x.min(), y.min()), max(x.max(), y.max()), BINS + 1)
    p, q = ((1 + np.histogram(each, edges)[0]) / (BINS + len(each)) for each in (x, y))
    return float(np.sum(p * np.log(p / q)))


def mean(scores: Iterable[float | None]) -> float | None:
    """Over those that are known; None where none is."""
    known = [score for score in scores if score is not None]
    return fmean(known) if known else None


def _correlation(x: Floats, y: Floats) -> float | None:
    if _constant(x, float(np.abs(x).max())) or _constant(y, float(np.abs(y).max())):
        return None
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # no square under- or overflows
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def _constant(values: Floats, scale: float) -> bool:
    """Whether values differ by no more than rounding, relative to `scale`."""
    return bool(np.ptp(values) <= ROUNDING * scale)


def _trend(one: Curve) -> Floats:
    powers = np.vander(2 * one.depth - 1, _TREND_DEGREE + 1)
    coefficients = np.linalg.lstsq(powers, one.std / np.abs(one.std).max(), rcond=None)[0]
    trend: Floats = powers @ coefficients * np.abs(one.std).max()
    return trend


def _relative(one: Curve) -> Floats:
    relative: Floats = one.std / one.std.mean()
    return relative
