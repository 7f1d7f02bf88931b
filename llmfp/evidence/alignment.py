"""Which layer of one model goes with which of another: correlation of every layer with every layer, then one path.

A layer's vector must mean the same in both models and must not depend on how the residual stream's or the heads' labels
run, so that a map made of it leaves the permutation tests exact: the average over heads of rotary coherence, or of
circuit spectra where there is no rotary embedding (llmfp.circuits).
"""

from __future__ import annotations

from functools import cache

import numpy as np

from llmfp.evidence.permutation import Floats
from llmfp.fingerprint import TowerFingerprint

MIN_LAYERS = 6
"""A cubic trend leaves two degrees of freedom at least."""
_TREND_DEGREE = 3
_DRAWS = 500


def layer_vectors(tower: TowerFingerprint) -> tuple[str, Floats] | None:
    """What layers are compared by, and float64 [L, entries], NaN where a layer has none; None where none has."""
    if (coherence := tower.circuit("coherence")) is not None:
        return "coherence", coherence.astype(np.float64)
    spectra = [each for key in ("qk_spectrum", "ov_spectrum") if (each := tower.circuit(key)) is not None]
    if not spectra:
        return None
    return "spectra", np.concatenate([each.astype(np.float64).mean(axis=1) for each in spectra], axis=1)


def similarity(a: Floats, b: Floats) -> Floats | None:
    """float64 [L_a, L_b]: correlations of what a cubic trend over depth leaves of each model's vectors.

    a, b  [L, entries], rows of NaN where a layer has no vector: its correlations are NaN
    None where fewer than MIN_LAYERS of a model have one, or entries differ in number.
    """
    if a.shape[1] != b.shape[1]:
        return None
    rests = [without_trend(each) for each in (a, b)]
    if rests[0] is None or rests[1] is None:
        return None
    return rests[0] @ rests[1].T


def align(similar: Floats) -> list[tuple[int, int]]:
    """The increasing path of layer pairs whose correlations have the largest sum; layers may be left out on both sides.

    So a layer-dropped or deepened child lines up, and a graft shows as a partial map. Dynamic programming, O(L_a·L_b).
    Checked against the enumeration of all paths.
    """
    gains = np.nan_to_num(similar, nan=-1.0)
    rows, cols = gains.shape
    best = np.zeros((rows + 1, cols + 1))
    for i in range(rows):
        for j in range(cols):
            best[i + 1, j + 1] = max(best[i + 1, j], best[i, j + 1], best[i, j] + gains[i, j])
    pairs, i, j = [], rows, cols
    while i and j:
        if best[i, j] == best[i, j - 1]:
            j -= 1
        elif best[i, j] == best[i - 1, j]:
            i -= 1
        else:
            pairs.append((i - 1, j - 1))
            i, j = i - 1, j - 1
    return pairs[::-1]


def contrast(similar: Floats, pairs: list[tuple[int, int]]) -> tuple[float, float] | None:
    """Mean correlation of the pairs, and z = √n·(mean of pairs − mean of the rest) / (sd of the rest)."""
    chosen = np.zeros(similar.shape, np.bool_)
    chosen[tuple(np.transpose(pairs))] = True
    known = np.isfinite(similar)
    matched, rest = similar[chosen & known], similar[~chosen & known]
    if not len(matched) or len(rest) < 2 or not rest.std():
        return None
    score = float(matched.mean())
    return score, float(np.sqrt(len(matched)) * (score - rest.mean()) / rest.std())


@cache
def by_chance(rows: int, cols: int) -> tuple[float, float]:
    """Mean and standard deviation of z, aligned and contrasted as above, where no layer goes with any other.

    Alignment looks for the best path, so z grows with depth, as √L: about 4.2 ± 0.6 for 12 layers, 8.4 ± 0.5 for 48.
    Made by simulation: _DRAWS matrices of independent normal correlations, always the same ones.
    """
    rng = np.random.default_rng(0)
    # Of the best path to every cell of one row: its sum, its length, its sum of squares; one of each a draw.
    above = np.zeros((3, cols + 1, _DRAWS))
    total = np.zeros((2, _DRAWS))
    for _ in range(rows):
        gains = rng.standard_normal((cols, _DRAWS))
        total += gains.sum(axis=0), np.square(gains).sum(axis=0)
        here = np.zeros_like(above)
        for j in range(cols):
            longer = above[:, j] + (gains[j], np.ones(_DRAWS), np.square(gains[j]))
            best = np.where(here[0, j] >= above[0, j + 1], here[:, j], above[:, j + 1])
            here[:, j + 1] = np.where(longer[0] > best[0], longer, best)
        above = here
    path, length, squares = above[:, -1]
    rest = rows * cols - length
    mean = (total[0] - path) / rest
    z = np.sqrt(length) * (path / length - mean) / np.sqrt((total[1] - squares) / rest - np.square(mean))
    return float(z.mean()), float(z.std())


def without_trend(vectors: Floats) -> Floats | None:
    """Each layer's vector of length 1 around its mean, after every entry's cubic over relative depth is taken off."""
    known = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    if len(known) < MIN_LAYERS:
        return None
    trends = np.linalg.qr(np.vander(np.linspace(-1.0, 1.0, len(vectors))[known], _TREND_DEGREE + 1))[0]
    rest = vectors[known] - trends @ (trends.T @ vectors[known])
    rest -= rest.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(rest, axis=1, keepdims=True)
    if (lengths <= 1e-9 * np.abs(vectors[known]).max() * np.sqrt(vectors.shape[1])).any():
        return None  # layers that are alike to rounding have no order
    units = np.full(vectors.shape, np.nan)
    units[known] = rest / lengths
    return units
