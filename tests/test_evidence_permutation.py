"""Permutation p-values are what the enumeration of the whole group says, uniform where labels mean nothing, and never
below what the draws can show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from llmfp.evidence.permutation import (
    Evaluate,
    matched,
    neighbouring,
    permuted,
    total_scale,
    two_sided_p,
    upper_p,
)  # fmt: skip
from tests.lineage import KS_LIMIT, Float64, ks_distance


def group(blocks: list[Float64]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every permutation within blocks."""
    return itertools.product(*(itertools.permutations(range(len(block))) for block in blocks))


def of_matched(blocks: list[Float64], permutations: tuple[tuple[int, ...], ...]) -> float:
    return sum(b[i, p[i]] for b, p in zip(blocks, permutations, strict=True) for i in range(len(b)))


def of_neighbours(blocks: list[Float64], permutations: tuple[tuple[int, ...], ...]) -> float:
    return sum(b[p[i], p[i + 1]] for b, p in zip(blocks, permutations, strict=True) for i in range(len(b) - 1))


STATISTICS = [(matched, of_matched), (neighbouring, of_neighbours)]


def symmetric(rng: np.random.Generator, size: int) -> Float64:
    rows = rng.normal(size=(size, 3))
    gram: Float64 = rows @ rows.T
    return gram


@pytest.mark.parametrize(("evaluate", "reference"), STATISTICS)
@pytest.mark.parametrize("sizes", [(4,), (3, 4), (2, 2, 3), (5, 1)])
def test_p_is_that_of_the_whole_group(evaluate: Evaluate, reference: object, sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng([7, *sizes])
    for _ in range(3):
        blocks = [symmetric(rng, size) + 0.3 * np.eye(size) for size in sizes]
        every = np.array([reference(blocks, each) for each in group(blocks)])  # type: ignore[operator]
        assert len(every) == math.prod(map(math.factorial, sizes))
        observed = reference(blocks, next(group(blocks)))  # type: ignore[operator]
        exact = float(np.mean(every >= observed - 1e-9))
        assert exact >= 1 / len(every)
        drawn = 40_000
        totals = permuted(blocks, evaluate, drawn, np.random.default_rng(0))
        assert totals[0] == pytest.approx(observed)
        assert set(np.round(totals, 6)) == set(np.round(every, 6)), "the draws reach all of the group and nothing else"
        p = upper_p(totals, total_scale(blocks))
        # Draws come from pools of a thousand and more per block, so they vary more than drawn independently.
        assert p == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 1024) + 2 / drawn)


def test_every_permutation_is_drawn_equally_often() -> None:
    """On two blocks at once: 6 · 6 products, each about 1/36 of the draws."""
    powers = [10.0 ** np.arange(9).reshape(3, 3) / 1e9, 3 * 10.0 ** np.arange(9).reshape(3, 3)]
    totals = permuted(powers, matched, 72_000, np.random.default_rng(1))[1:]
    values, counts = np.unique(np.round(totals, 9), return_counts=True)
    assert len(values) == 36
    assert counts / counts.mean() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(("evaluate", "_"), STATISTICS)
def test_p_is_uniform_where_labels_mean_nothing(evaluate: Evaluate, _: object) -> None:
    """Many equal blocks, so that pools are shared; heavy tails, so that normal theory would fail."""
    rng = np.random.default_rng(3)
    drawn, p_values = 99, []
    for seed in range(1000):
        rows = [rng.standard_t(2, size=(2, 5, 2)) for _ in range(6)]
        blocks = [a @ (b if evaluate is matched else a).T for a, b in rows]
        totals = permuted(blocks, evaluate, drawn, np.random.default_rng(seed))
        p_values.append(upper_p(totals, total_scale(blocks)))
    assert ks_distance(p_values, drawn, rng) < KS_LIMIT
    for level in (0.01, 0.05, 0.2):
        error = np.mean(np.array(p_values) <= level + 1e-12)
        assert error == pytest.approx(level, abs=4 * math.sqrt(level / 1000))


@pytest.mark.parametrize(("evaluate", "_"), STATISTICS)
def test_error_stays_below_the_level_whatever_the_pool_holds(evaluate: Evaluate, _: object) -> None:
    few = np.array([[1, 2, 3, 4, 5, 0], [0, 2, 1, 3, 4, 5], [5, 3, 4, 0, 2, 1]])

    def draw(rng: np.random.Generator, count: int, size: int) -> NDArray[np.intp]:
        assert size == few.shape[1]
        return few[np.minimum(rng.integers(4, size=count), 2)]

    rng = np.random.default_rng(8)
    p_values = []
    for seed in range(1500):
        rows = rng.normal(size=(3, 2, 6, 2))
        blocks = [a @ (b if evaluate is matched else a).T for a, b in rows]
        totals = permuted(blocks, evaluate, 60, np.random.default_rng(seed), draw)
        p_values.append(upper_p(totals, total_scale(blocks)))
    for level in (0.05, 0.1, 0.3, 0.5):
        error = np.mean(np.array(p_values) <= level)
        assert 0.3 * level < error < level + 3 * math.sqrt(level / 1500)


def test_p_is_never_below_what_can_be_shown() -> None:
    rng = np.random.default_rng(0)
    strong = [np.eye(20) * 100 + rng.normal(size=(20, 20))]
    for drawn in (1, 9, 999):
        assert upper_p(permuted(strong, matched, drawn, np.random.default_rng(1)), 1.0) == 1 / (1 + drawn)
    pair = [np.eye(2)]  # a group of two
    assert upper_p(permuted(pair, matched, 9999, np.random.default_rng(1)), 2.0) == pytest.approx(0.5, abs=0.07)


def test_ties_count_against_the_observed() -> None:
    assert upper_p(np.array([1.0, 1.0, 1.0, 0.0]), 1.0) == 0.75
    assert upper_p(np.array([1.0, 1.0 - 1e-14, 0.5, 0.0]), 1.0) == 0.5, "rounding makes no difference"
    assert upper_p(np.array([1.0, 1.0 - 1e-9, 0.5, 0.0]), 1.0) == 0.25
    flat = [np.ones((6, 6))]
    assert upper_p(permuted(flat, matched, 500, np.random.default_rng(0)), total_scale(flat)) == 1.0
    # Sums of thirds in another order differ in the last bits.
    thirds = [np.full((8, 8), 1 / 3), np.full((5, 5), 1e-3)]
    assert upper_p(permuted(thirds, matched, 500, np.random.default_rng(0)), total_scale(thirds)) == 1.0


def test_two_sides() -> None:
    totals = np.arange(100.0)
    assert two_sided_p(totals, 1.0) == 2 * 0.01, "the smallest of a hundred"
    assert two_sided_p(totals[::-1], 1.0) == 2 * 0.01
    assert two_sided_p(np.array([5.0, *range(10)]), 1.0) == 1.0


def test_a_seed_says_which_draws() -> None:
    blocks = [np.random.default_rng(0).normal(size=(8, 8)) for _ in range(3)]

    def drawn(seed: int) -> NDArray[np.float64]:
        return permuted(blocks, matched, 50, np.random.default_rng(seed))

    np.testing.assert_array_equal(drawn(4), drawn(4))
    assert not np.array_equal(drawn(4)[1:], drawn(5)[1:])
