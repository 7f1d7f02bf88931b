"""Tail probabilities of Student's t, without a statistics library: what predicts one more draw from n seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def predicted_p(value: float, seen: Sequence[float]) -> float:
    """The probability that one more draw from the normal distribution that `seen` came from is at least `value`.

    (value − mean) / (sd·√(1 + 1/n)) follows Student's t with n − 1 degrees of freedom. Needs two draws that differ.
    """
    n = len(seen)
    return upper_tail((value - fmean(seen)) / (stdev(seen) * math.sqrt(1 + 1 / n)), n - 1)


def upper_tail(t: float, df: int) -> float:
    """P(T ≥ t) for Student's t with df degrees of freedom: ½·I_x(df/2, ½) at x = df / (df + t²) for t ≥ 0.

    Source: Abramowitz & Stegun 26.7.1, 26.5.8 (continued fraction). Checked against numerical integration.
    """
    if t < 0:
        return 1 - upper_tail(-t, df)
    x = df / (df + t * t)
    return 0.5 * _incomplete_beta(x, df / 2, 0.5)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    # Lentz's method: numerators of 1 + d₁/(1 + d₂/(1 + …)), until a factor no longer changes the product.
    c, d, product = 1.0, 0.0, 1.0
    for step in range(500):
        m = step // 2
        if step == 0:
            numerator = 1.0
        elif step % 2 == 0:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + numerator * d or 1e-300)
        c = 1 + numerator / c or 1e-300
        product *= c * d
        if step and abs(c * d - 1) < 1e-15:
            break
    return front * (product - 1)
