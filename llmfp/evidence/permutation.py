"""Exact tests by permuting labels within blocks: 10⁵ draws for the price of a thousand.

A sum over B blocks, each permuted on its own, is drawn from tables: a pool of K permutations is evaluated once per
block, and each draw picks one entry of every block's table, so that K^B different permutations are in reach. Picking
from a pool is not drawing from the whole group, and counting such draws against the identity would not be exact. So
the data are first taken as scrambled by the inverse of a draw of their own, g₀: what was observed is then the
statistic of g₀, and under the null g₀, …, g_N are exchangeable whatever the pool holds. The rank of the observed value
among N + 1 is therefore uniform, ties counted against the observed. The order matters: g₀⁻¹ first, then g; the other
way round is as good only where one side's labels alone are permuted. (The same device: Ramdas, Barber, Candès &
Tibshirani 2023, "Permutation tests using arbitrary permutation distributions".)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Evaluate = Callable[[Floats, NDArray[np.intp]], Floats]
"""(a block [s, s], permutations [K, s]) → the statistic of the block under each, [K]."""
Draw = Callable[[np.random.Generator, int, int], NDArray[np.intp]]
"""(generator, K, s) → K random elements of a group of permutations of s labels, [K, s]."""

_POOL = 1024
_BARS = 40


@dataclass(frozen=True, slots=True)
class Histogram:
    """Of what permutation gives: counts in bars of equal width, the first of which begins at `start`.

    For people to look at, in units of z; p is counted on the values themselves.
    """

    start: float
    width: float
    counts: tuple[int, ...]


def histogram(values: Floats) -> Histogram:
    """In 40 bars from the least value to the largest; one bar where all are equal."""
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return Histogram(low, 0.0, (len(values),))
    counts, edges = np.histogram(values, _BARS, (low, high))
    return Histogram(low, float(edges[1] - edges[0]), tuple(counts.tolist()))


def any_permutation(rng: np.random.Generator, count: int, size: int) -> NDArray[np.intp]:
    """Random elements of the whole symmetric group."""
    return np.argsort(rng.random((count, size)), axis=1)


def permuted(
    blocks: Sequence[Floats],
    evaluate: Evaluate,
    permutations: int,
    rng: np.random.Generator,
    draw: Draw = any_permutation,
) -> Floats:
    """The sum of `evaluate` over blocks, float64 [1 + permutations]: first as observed, then under random permutations.

    blocks  square, of any sizes; each is permuted independently of the others
    draw    what they are permuted by
    Takes O(B · (permutations + K · s)). Checked against the enumeration of whole groups.
    """
    totals = np.zeros(1 + permutations)
    pool_size = max(_POOL, -(-permutations // max(len(blocks), 1)))
    pools: dict[int, NDArray[np.intp]] = {}
    for block in blocks:
        size = len(block)
        if size not in pools:
            pools[size] = draw(rng, pool_size, size)
        pool = pools[size]
        drawn = rng.integers(pool_size, size=1 + permutations)
        unscramble = np.argsort(pool[drawn[0]])
        totals += evaluate(block, unscramble[pool])[drawn]  # first scrambled back, then by each
    return totals


def upper_p(totals: Floats, scale: float) -> float:
    """(1 + #{permuted ≥ observed}) / (1 + N); what differs by rounding, relative to `scale`, counts as equal."""
    return _p(totals[1:] >= totals[0] - 1e-12 * scale)


def two_sided_p(totals: Floats, scale: float) -> float:
    """Twice the smaller of both tails' p, at most 1."""
    return min(1.0, 2 * upper_p(totals, scale), 2 * upper_p(-totals, scale))


def matched(block: Floats, permutations: NDArray[np.intp]) -> Floats:
    """Σᵢ M[i, π(i)]: how well equal labels agree."""
    total: Floats = block[np.arange(len(block)), permutations].sum(axis=1)
    return total


def neighbouring(block: Floats, permutations: NDArray[np.intp]) -> Floats:
    """Σᵢ G[π(i), π(i + 1)]: how alike neighbours are."""
    total: Floats = block[permutations[:, :-1], permutations[:, 1:]].sum(axis=1)
    return total


def total_scale(blocks: Sequence[Floats]) -> float:
    """What rounding is relative to in sums over these blocks."""
    return float(sum(np.abs(block).sum() for block in blocks))


def _p(reached: NDArray[Any]) -> float:
    return (1 + int(np.count_nonzero(reached))) / (1 + len(reached))
