"""Student's t: its tail against numerical integration, and what a prediction interval promises."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmfp.evidence.student import predicted_p, upper_tail

NODES, WEIGHTS = np.polynomial.legendre.leggauss(120)


def integrated(t: float, df: int) -> float:
    """∫ from t of the density, by Gauss–Legendre in θ with x = √df · tan θ, where it is (cos θ)^(df − 1)."""
    low, high = math.atan(t / math.sqrt(df)), math.pi / 2
    theta = (high - low) / 2 * NODES + (high + low) / 2
    front = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    return float(front * (high - low) / 2 * (WEIGHTS * np.cos(theta) ** (df - 1)).sum())


@pytest.mark.parametrize("df", [1, 2, 3, 5, 12, 19, 23, 100, 1000])
@pytest.mark.parametrize("t", [0.0, 1e-3, 0.5, 1.0, 2.0, 4.0, 7.0, 15.0, 40.0])
def test_the_tail_is_the_integral_of_the_density(t: float, df: int) -> None:
    assert upper_tail(t, df) == pytest.approx(integrated(t, df), rel=1e-9)
    assert upper_tail(-t, df) == pytest.approx(1 - integrated(t, df), rel=1e-9)


def test_closed_forms_and_limits() -> None:
    for t in (0.3, 2.0, 50.0, 1e6):
        assert upper_tail(t, 1) == pytest.approx(math.atan2(1, t) / math.pi, rel=1e-9)
        assert upper_tail(t, 2) == pytest.approx(1 / (2 + t * t + t * math.sqrt(2 + t * t)), rel=1e-9)
    assert upper_tail(0, 7) == pytest.approx(0.5)
    assert upper_tail(1e30, 12) >= 0
    assert upper_tail(math.inf, 12) == 0
    tails = [upper_tail(t, 12) for t in np.linspace(-60, 60, 500)]
    assert tails == sorted(tails, reverse=True)


def test_a_prediction_is_uniform_for_one_more_draw() -> None:
    """Its error is the level even from few draws, which the normal tail's is not."""
    rng = np.random.default_rng(0)
    p = np.array([predicted_p(draws[0], draws[1:]) for draws in rng.normal(3, 2, (20_000, 6)).tolist()])
    for level in (0.001, 0.01, 0.1, 0.5):
        assert np.mean(p <= level) == pytest.approx(level, abs=4 * math.sqrt(level / len(p)))


def test_a_prediction_by_hand() -> None:
    seen = [1.0, 2.0, 4.0]
    deviation = math.sqrt(((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2)
    t = (9 - 7 / 3) / (deviation * math.sqrt(4 / 3))
    assert predicted_p(9.0, seen) == pytest.approx(integrated(t, 2), rel=1e-9)
