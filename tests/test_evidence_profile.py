"""The published score and the distances beside it, against loops in float64, closed forms, published correlations."""

from __future__ import annotations

import itertools
import json
import math
import zlib
from bisect import bisect_right
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfp.evidence.profile import BINS, DETREND_MIN_LAYERS, MIN_LAYERS, pearson_mean, profile
from tests.lineage import ROLES

Curves = dict[str, list[float | None]]


def curves(rng: np.random.Generator, layers: int) -> Curves:
    return {role: rng.uniform(0.01, 0.1, layers).tolist() for role in ROLES}


def everywhere(column: list[float | None]) -> Curves:
    return dict.fromkeys(ROLES, column)


def points(column: list[float | None]) -> list[tuple[float, float]]:
    """(relative depth, σ) of the layers that have one."""
    return [(i / (len(column) - 1), std) for i, std in enumerate(column) if std is not None]


def correlation(x: list[float], y: list[float]) -> float:
    a, b = sum(x) / len(x), sum(y) / len(y)
    product = sum((u - a) * (v - b) for u, v in zip(x, y, strict=True))
    return product / math.sqrt(sum((u - a) ** 2 for u in x) * sum((v - b) ** 2 for v in y))


def interpolated(at: float, curve: list[tuple[float, float]]) -> float:
    """Linear between neighbours, constant beyond the ends."""
    n = bisect_right([depth for depth, _ in curve], at)
    if n == 0:
        return curve[0][1]
    if n == len(curve):
        return curve[-1][1]
    (x0, y0), (x1, y1) = curve[n - 1], curve[n]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def pearson_loop(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    return correlation([std for _, std in longer], [interpolated(depth, shorter) for depth, _ in longer])


def without_cubic(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    depth, std = np.transpose(curve)
    return list(zip(depth.tolist(), (std - np.polyval(np.polyfit(depth, std, 3), depth)).tolist(), strict=True))


def relative(curve: list[tuple[float, float]]) -> list[float]:
    stds = [std for _, std in curve]
    return [std * len(stds) / sum(stds) for std in stds]


def wasserstein_loop(a: list[float], b: list[float]) -> float:
    """∫ |F − G| dx over the line, where quantile functions are integrated in the code."""
    cuts = sorted({*a, *b})
    total = 0.0
    for low, high in itertools.pairwise(cuts):
        below = [sum(x <= low for x in each) / len(each) for each in (a, b)]
        total += abs(below[0] - below[1]) * (high - low)
    return total


def kl_loop(a: list[float], b: list[float]) -> float:
    """Ten equal bins over the range of both, one added to every count."""
    low, high = min(*a, *b), max(*a, *b)
    counts = [[1] * 10 for _ in "ab"]
    for each, values in zip(counts, (a, b), strict=True):
        for value in values:
            each[min(int((value - low) / (high - low) * 10), 9)] += 1
    shares = [[count / sum(each) for count in each] for each in counts]
    return sum(p * math.log(p / q) for p, q in zip(*shares, strict=True))


@pytest.mark.parametrize(("layers_a", "layers_b"), [(12, 12), (12, 7), (6, 33), (3, 3), (3, 40), (48, 64)])
def test_every_score_is_that_of_a_loop(layers_a: int, layers_b: int) -> None:
    rng = np.random.default_rng([layers_a, layers_b])
    for holes in (False, True):
        a, b = curves(rng, layers_a), curves(rng, layers_b)
        if holes and min(layers_a, layers_b) > DETREND_MIN_LAYERS:
            a["q"][2], a["k"][0], b["o"][-1] = None, None, None
        found = profile(a, b)
        for role in ROLES:
            x, y = points(a[role]), points(b[role])
            assert found.pearson[role] == pytest.approx(pearson_loop(x, y), abs=1e-12)
            assert found.wasserstein[role] == pytest.approx(wasserstein_loop(relative(x), relative(y)), rel=1e-9)
            assert found.kl[role] == pytest.approx(kl_loop(relative(x), relative(y)), abs=1e-12)
            if min(layers_a, layers_b) >= DETREND_MIN_LAYERS:
                expected = pearson_loop(without_cubic(x), without_cubic(y))
                assert found.detrended[role] == pytest.approx(expected, abs=1e-9)
            else:
                assert found.detrended[role] is None
        for scores in (found.pearson, found.wasserstein, found.kl):
            assert scores["mean"] == pytest.approx(sum(scores[role] or 0 for role in ROLES) / 4)
        assert pearson_mean(a, b, ROLES) == found.pearson["mean"]
    assert BINS == 10


def test_closed_forms() -> None:
    """[1, 3] and [2, 2] apart by half; a curve and its interpolation."""
    a = everywhere([0.5, 1.0, 1.5])
    b = everywhere([1.0, 1.0, 1.0 + 1e-6])
    found = profile(a, b)
    assert found.wasserstein["q"] == pytest.approx(1 / 3, abs=1e-6)
    assert found.pearson["q"] == pytest.approx(math.sqrt(3) / 2)
    line = everywhere([0.1 + 0.01 * n for n in range(5)])
    finer = everywhere([0.2 + 0.001 * n for n in range(23)])
    assert profile(line, finer).pearson["mean"] == pytest.approx(1)
    assert profile(line, finer).wasserstein["q"] > 0


@given(
    layers=st.tuples(st.integers(3, 20), st.integers(3, 20)),
    seed=st.integers(0, 999),
    scale=st.sampled_from([1e-150, 1e-12, 1.0, 7.5, 1e12, 1e150]),
)
@settings(max_examples=60, deadline=None)
def test_scale_order_and_identity(layers: tuple[int, int], seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = curves(rng, layers[0]), curves(rng, layers[1])
    found = profile(a, b)
    scaled = profile({role: [scale * (x or 0) for x in column] for role, column in a.items()}, b)
    back = profile(b, a)
    itself = profile(a, a)
    for role in (*ROLES, "mean"):
        assert scaled.pearson[role] == pytest.approx(found.pearson[role], abs=1e-9)
        assert scaled.detrended[role] == pytest.approx(found.detrended[role], abs=1e-6)
        assert scaled.wasserstein[role] == pytest.approx(found.wasserstein[role], rel=1e-9)
        assert back.wasserstein[role] == pytest.approx(found.wasserstein[role], rel=1e-9)
        assert back.detrended[role] == pytest.approx(found.detrended[role], abs=1e-12)
        assert itself.pearson[role] == pytest.approx(1)
        assert (itself.wasserstein[role], itself.kl[role]) == (pytest.approx(0, abs=1e-12), 0)
        assert (found.wasserstein[role] or 0) >= 0
        assert (found.kl[role] or 0) >= 0
        assert -1 <= (found.pearson[role] or 0) <= 1
    if layers[0] != layers[1]:
        assert back.pearson == found.pearson, "the shorter is interpolated, whichever it is"


def test_what_gives_no_score_has_a_reason() -> None:
    rng = np.random.default_rng(0)
    b = curves(rng, 12)
    a = curves(rng, 12)
    a["q"] = [0.02] * 12
    a["k"] = [None] * 10 + [0.1, 0.2]
    a["v"] = [0.1 + n**3 * 1e-4 for n in range(12)]  # a cubic, and nothing else
    found = profile(a, b)
    assert found.reasons["q"] == "σ is the same in every layer"
    assert found.reasons["k"] == f"fewer than {MIN_LAYERS} layers have a σ"
    assert "must leave something" in found.reasons["detrended v"]
    for scores in (found.pearson, found.detrended, found.wasserstein, found.kl):
        assert scores["q"] is scores["k"] is None
    assert found.detrended["v"] is None
    assert found.pearson["mean"] == pytest.approx(((found.pearson["v"] or 0) + (found.pearson["o"] or 0)) / 2)
    assert pearson_mean(a, b, ROLES) is None
    assert pearson_mean(a, b, ["v", "o"]) == found.pearson["mean"]
    nothing = everywhere([None] * 4)
    found = profile(nothing, b)
    assert set(found.pearson.values()) == {None}
    assert set(found.reasons) == set(ROLES)
    single = profile(everywhere([0.1]), b)
    assert set(single.kl.values()) == {None}
    assert set(profile(everywhere([]), b).pearson.values()) == {None}
    assert set(profile(everywhere([0.0] * 5), b).wasserstein.values()) == {None}, "σ of 0 is constant"


def test_a_curve_that_interpolation_flattens_has_no_correlation() -> None:
    """The shorter varies only where the longer has no layer to ask it at: nothing to correlate, not ±1."""
    a: Curves = everywhere([0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1])
    b: Curves = everywhere([0.1, None, 0.2, 0.3, 0.5, None, None, None, None, None, 0.4, 0.2, 0.1])
    found = profile(a, b)
    values = {scores for scores in found.pearson.values() if scores is not None}
    assert all(abs(value) <= 1 for value in values)


def test_published_correlations(shared_data: Path) -> None:
    """EVIDENCE: 31 % of pairs of one recipe's translation models score above 0.7, 9 % above 0.9."""
    bank = json.loads((shared_data / "sigma_bank.json").read_text())["models"]
    names = sorted(name for name in bank if name.startswith("opus-mt"))
    sample = [name for name in names if zlib.crc32(name.encode()) % 3 == 0]
    scores = [
        pearson_mean(bank[x]["std"], bank[y]["std"], ROLES) or 0 for n, x in enumerate(sample) for y in sample[:n]
    ]
    assert len(scores) > 500
    assert np.mean(np.array(scores) > 0.7) == pytest.approx(0.31, abs=0.12)
    assert np.mean(np.array(scores) > 0.9) == pytest.approx(0.09, abs=0.07)
