"""Residual symmetry: do two models weigh the same residual coordinates alike?

Initialisation and the usual optimisers treat the d coordinates of the residual stream alike. So for two models that
were initialised independently, however similar otherwise, the labels of one's coordinates are exchangeable given the
other, and a permutation test is exact: no assumption about distributions, outlier dimensions or dependence between
layers. It needs equal hidden sizes, and permuting or rotating the residual basis of one model defeats it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from llmfp.architecture.specs import Role
from llmfp.evidence.permutation import (
    Floats,
    Histogram,
    histogram,
    matched,
    neighbouring,
    permuted,
    total_scale,
    two_sided_p,
    upper_p,
)
from llmfp.evidence.verdict import Missing
from llmfp.fingerprint import TowerFingerprint

BLOCK = 32
"""Labels are permuted within aligned blocks of 32 coordinates. What formats and recipes imprint on both models in index
order (groups of scales, sorting by importance, outlier channels) lies between blocks and is centred away with them."""
STRUCTURE_LEVEL = 1e-3
"""Scores follow their index where the self-check's p is at most this; in both models, and the test is not valid."""
STRUCTURE_PERMUTATIONS = 10_000

LayerMap = Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Residual:
    """Outcome of the test.

    z             T over its exact standard deviation under permutation; for display, no verdict uses normal tails
    p_value       (1 + #) / (1 + permutations), at least smallest_p
    smallest_p    the least that p_value can be: of the permutations drawn, or of all there are
    dims          coordinates compared, those padded with zeros left out
    layers, rows  layer pairs, and profiles (layer × role) compared
    structure     p of each model's self-check: does a coordinate's score follow its neighbour's?
    permuted      z of the permutations drawn, beside which z stands
    """

    z: float
    p_value: float
    smallest_p: float
    permutations: int
    dims: int
    block: int
    layers: int
    rows: int
    structure: tuple[float, float]
    permuted: Histogram


def residual_symmetry(
    a: TowerFingerprint,
    b: TowerFingerprint,
    *,
    permutations: int = 100_000,
    seed: int = 0,
    layer_map: LayerMap | None = None,
) -> Residual | Missing:
    """The permutation test on the residual profiles of two towers, or why there is none.

    layer_map  pairs of positions in `a.layers` and `b.layers`; by relative depth when None. Any map chosen without
               looking at the order of coordinates leaves the test exact.

    Per layer and role, log RMS along each coordinate becomes normal scores (ties share their mean rank), centred within
    blocks; with M = AᵀB summed over layers and roles, T = Σᵢ Mᵢᵢ, and only the blocks on M's diagonal are needed.
    Checked against a float64 loop, by enumeration of small groups, and by the distribution of p on independent models.
    """
    if a.hidden_size != b.hidden_size:
        return Missing(f"hidden sizes differ: {a.hidden_size} and {b.hidden_size}")
    pairs = relative_layer_map(len(a.layers), len(b.layers)) if layer_map is None else layer_map
    rows_a, rows_b, layers = _common_rows(a, b, pairs)
    if not len(rows_a):
        return Missing("no layer has residual profiles of the same role, finite in both models")
    kept = np.array(np.minimum(rows_a.max(axis=0), rows_b.max(axis=0)) > -np.inf)
    dims = int(np.count_nonzero(kept))
    if dims < BLOCK:
        return Missing(f"only {dims} residual coordinates carry weights in both models, and a block is {BLOCK}")
    blocks = _aligned_blocks(kept)
    scores_a, scores_b = (_centred(normal_scores(rows[:, kept]), blocks) for rows in (rows_a, rows_b))
    for name, scores in (("first", scores_a), ("second", scores_b)):
        if not scores.any():
            return Missing(f"the residual profiles of the {name} model are constant within every block")
    rng = np.random.default_rng(seed)
    structure = _neighbours_p(scores_a, blocks, rng), _neighbours_p(scores_b, blocks, rng)
    if max(structure) <= STRUCTURE_LEVEL:
        return Missing(
            "in both models a coordinate's profile follows its neighbour's "
            f"(p = {structure[0]:.2g} and {structure[1]:.2g}), so coordinates are not exchangeable"
        )
    diagonal = [scores_a[:, block].T @ scores_b[:, block] for block in blocks]
    deviation = math.sqrt(sum(float(np.square(m).sum()) / (len(m) - 1) for m in diagonal))
    if not deviation:
        return Missing("the residual profiles of the two models vary in no common block")
    totals = permuted(diagonal, matched, permutations, rng)
    observed = float(sum(np.trace(m) for m in diagonal))
    smallest_p = max(1 / (1 + permutations), math.exp(-sum(math.lgamma(len(m) + 1) for m in diagonal)))
    return Residual(
        z=observed / deviation,
        p_value=max(upper_p(totals, total_scale(diagonal)), smallest_p),
        smallest_p=smallest_p,
        permutations=permutations,
        dims=dims,
        block=BLOCK,
        layers=layers,
        rows=len(rows_a),
        structure=structure,
        permuted=histogram(totals[1:] / deviation),
    )


def relative_layer_map(layers_a: int, layers_b: int) -> LayerMap:
    """Each layer of the shallower model with the one at the same relative depth of the deeper; identity if equal."""
    shallow, deep = min(layers_a, layers_b), max(layers_a, layers_b)
    step = (deep - 1) / (shallow - 1) if shallow > 1 else 0.0
    pairs = [(i, math.floor(i * step + 0.5)) for i in range(shallow)]
    return [(j, i) for i, j in pairs] if layers_a > layers_b else pairs


def normal_scores(rows: NDArray[np.floating]) -> Floats:
    """Φ⁻¹((rank − ½)/d) along each row of [n, d]; tied values share their mean rank. −inf is the lowest value."""
    d = rows.shape[1]
    inverse_cdf = NormalDist().inv_cdf
    quantiles = np.array([inverse_cdf((half_ranks / 2 - 0.5) / d) for half_ranks in range(2, 2 * d + 1)])
    scores = np.empty(rows.shape)
    for row, out in zip(rows, scores, strict=True):
        _, place, counts = np.unique(row, return_inverse=True, return_counts=True)
        half_ranks = 2 * np.cumsum(counts) - counts + 1
        out[:] = quantiles[half_ranks - 2][place]
    return scores


def _common_rows(
    a: TowerFingerprint, b: TowerFingerprint, pairs: LayerMap
) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """Profiles [n, hidden] of both models, row by row of the same role and mapped layers, and the layers they cover.

    A row needs every coordinate in both: a NaN, which non-finite weights leave, or another width drops it.
    """
    first, second = np.array([i for i, _ in pairs], np.intp), np.array([j for _, j in pairs], np.intp)
    rows_a, rows_b, covered = [], [], np.zeros(len(pairs), np.bool_)
    for role in map(str, Role):
        if role not in a.statistics or role not in b.statistics:
            continue
        profiles = a.residual(role), b.residual(role)
        if {profile.shape[1] for profile in profiles} != {a.hidden_size}:
            continue
        ours, theirs = profiles[0][first].astype(np.float32), profiles[1][second].astype(np.float32)
        usable = (ours < np.inf).all(axis=1) & (theirs < np.inf).all(axis=1)  # False for NaN
        rows_a.append(ours[usable])
        rows_b.append(theirs[usable])
        covered |= usable
    empty = np.empty((0, a.hidden_size), np.float32)
    return np.concatenate([empty, *rows_a]), np.concatenate([empty, *rows_b]), int(np.count_nonzero(covered))


def _aligned_blocks(kept: NDArray[np.bool_]) -> list[slice]:
    """Where each aligned block lies among the coordinates kept; one of which fewer than two are left says nothing."""
    ends = np.cumsum([np.count_nonzero(kept[start : start + BLOCK]) for start in range(0, len(kept), BLOCK)]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False) if end - start > 1]


def _centred(scores: Floats, blocks: list[slice]) -> Floats:
    centred = np.zeros_like(scores)
    for block in blocks:
        centred[:, block] = scores[:, block] - scores[:, block].mean(axis=1, keepdims=True)
    return centred


def _neighbours_p(scores: Floats, blocks: list[slice], rng: np.random.Generator) -> float:
    """Two-sided p of the lag-1 autocovariance of centred scores within blocks, under the same permutations."""
    gram = [scores[:, block].T @ scores[:, block] for block in blocks]
    totals = permuted(gram, neighbouring, STRUCTURE_PERMUTATIONS, rng)
    return two_sided_p(totals, total_scale(gram))
