"""One model against every row of an index at once: by the published score, and by rotary coherence.

`coherence` is an estimate of what `evidence.coherence` finds where no layer was added or dropped: a layer's vector has
thousands of entries, so the index holds SKETCH numbers a model, into which all of them are added with signs and at
places drawn by a hash (a count sketch). The product of two sketches is the mean correlation of their layers but for
noise of 1/√SKETCH, 0.06; relatives have 0.3 and more. It ranks, and nothing else: the test looks at the fingerprints.

`pearson` is what `evidence.profile` computes pair by pair, to rounding. Rows whose curve of a role has the same number
of layers and the same gaps share one matrix, which interpolates and centres; a hundred thousand scores are then a few
matrix products, and rows that are constant to within rounding, or out of a float's middle, are left to the definition.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from llmfp.evidence import profile
from llmfp.evidence.alignment import without_trend
from llmfp.evidence.profile import MIN_LAYERS, Curve, StdCurves
from llmfp.fingerprint import TowerFingerprint
from llmfp.registry.index import ROLES

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
SKETCH = 256
_PLAIN = 1e-6
"""A curve that varies by less, relative to its mean, is left to the definition: centring leaves it too few digits."""
_AT_ONCE = 8192
"""Rows whose arrays stay in the processor's caches."""
_MIDDLE = 1e-100, 1e100


def pearson(std: StdCurves, table: pa.Table) -> Floats:
    """float64 [rows]: the mean over Q, K, V and O of the correlation of σ curves; NaN for a row with no score.

    table has the columns std_q, std_k, std_v and std_o. Checked against evidence.profile row by row.
    """
    scores = np.full((len(ROLES), table.num_rows), np.nan)

    def score(score: Floats, role: str) -> None:
        ours = profile.curve(std[role])
        if profile.unusable(ours) is None:
            start = 0
            for chunk in table[f"std_{role}"].chunks:
                values = chunk.values.to_numpy(zero_copy_only=False)  # null becomes NaN
                offsets = np.asarray(chunk.offsets)
                for first in range(0, len(chunk), _AT_ONCE):
                    for rows, theirs, depth in _alike(values, offsets[first : first + _AT_ONCE + 1]):
                        score[start + first + rows] = _correlations(ours, theirs, depth)
                start += len(chunk)

    # Products are small: BLAS's own threads would wait for each other longer than they compute.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor() as pool:
        list(pool.map(score, scores, ROLES))
    known = ~np.isnan(scores)
    counts = known.sum(axis=0)
    means: Floats = np.full(table.num_rows, np.nan)
    np.divide(np.where(known, scores, 0.0).sum(axis=0), counts, out=means, where=counts > 0)
    return means


def sketch(tower: TowerFingerprint) -> list[float] | None:
    """SKETCH numbers for a tower's rotary coherence, of length about 1; None where too few layers have any.

    Source: Charikar, Chen & Farach-Colton 2002. Checked against the correlations that it estimates.
    """
    vectors = tower.circuit("coherence")
    units = None if vectors is None else without_trend(vectors.astype(np.float64))
    if units is None:
        return None
    known = np.flatnonzero(np.isfinite(units).all(axis=1))
    total = np.zeros(SKETCH)
    for layer in known.tolist():
        drawn = _drawn(layer, units.shape[1])
        signs = 1.0 - 2.0 * ((drawn >> np.uint64(32)) & np.uint64(1)).astype(np.float64)
        places = (drawn % np.uint64(SKETCH)).astype(np.intp)
        total += np.bincount(places, weights=signs * units[layer], minlength=SKETCH)
    numbers: list[float] = (total / np.sqrt(len(known))).tolist()
    return numbers


def coherence(tower: TowerFingerprint, table: pa.Table) -> Floats:
    """float64 [rows]: about the mean correlation of layers' rotary coherence; NaN for rows that have none like it.

    table has the columns coherence, rotary_pairs and head_dim.
    """
    found = np.full(table.num_rows, np.nan)
    ours = sketch(tower) if tower.circuits is not None and tower.rotary is not None else None
    if ours is None or tower.rotary is None:
        return found
    start = 0
    for chunk in table["coherence"].chunks:
        rows = np.flatnonzero(np.diff(np.asarray(chunk.offsets)) == SKETCH)
        theirs = chunk.values.to_numpy(zero_copy_only=False)[chunk.offsets[0].as_py() : chunk.offsets[-1].as_py()]
        if len(theirs) == SKETCH * len(rows):  # rows have a whole sketch or none
            found[start + rows] = theirs.reshape(-1, SKETCH) @ np.array(ours, np.float32)
        start += len(chunk)
    for name, wanted in (("rotary_pairs", tower.rotary.pairs), ("head_dim", tower.head_dim)):
        found[table[name].to_numpy(zero_copy_only=False) != wanted] = np.nan
    return found


def _drawn(layer: int, entries: int) -> NDArray[np.uint64]:
    """64 bits for every entry of a layer, the same on every machine. Source: splitmix64, Steele et al. 2014."""
    with np.errstate(over="ignore"):
        x = (np.arange(entries, dtype=np.uint64) + np.uint64((layer + 1) << 32)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _alike(values: Floats, offsets: NDArray[np.int32]) -> Iterator[tuple[Rows, Floats, Floats]]:
    """Groups of rows with equally many layers and equal gaps: which, their σ [rows, n], and relative depths [n]."""
    lengths = np.diff(offsets)
    gappy = np.zeros(len(lengths), np.bool_)
    nans = offsets[0] + np.flatnonzero(np.isnan(values[offsets[0] : offsets[-1]]))
    gappy[np.searchsorted(offsets, nans, side="right") - 1] = True
    for length in np.unique(lengths):
        whole, broken = (np.flatnonzero((lengths == length) & (gappy == with_gaps)) for with_gaps in (False, True))
        groups = [(whole, np.arange(length)), *_same_gaps(values, offsets, broken, length)]
        for rows, known in groups:
            if len(rows) and len(known) >= MIN_LAYERS:
                yield rows, values.take(offsets[rows][:, None] + known), known / (length - 1)


def _same_gaps(values: Floats, offsets: NDArray[np.int32], rows: Rows, length: int) -> Iterator[tuple[Rows, Rows]]:
    """Which of the rows share a pattern of gaps, and the layers it leaves. Hybrids have few patterns, others none."""
    gaps = np.isnan(values.take(offsets[rows][:, None] + np.arange(length)))
    patterns: dict[bytes, list[int]] = {}
    for row, pattern in zip(rows.tolist(), gaps, strict=True):
        patterns.setdefault(pattern.tobytes(), []).append(row)
    for key, members in patterns.items():
        yield np.array(members), np.flatnonzero(~np.frombuffer(key, np.bool_))


@lru_cache(maxsize=1024)
def _interpolation(depth: bytes, wanted: bytes) -> Floats:
    """float64 [depths, wanted]: what takes values at some depths to those at others. Rows of equal depths share it."""
    at, to = np.frombuffer(depth), np.frombuffer(wanted)
    return np.stack([np.interp(to, at, unit) for unit in np.eye(len(at))])


def _correlations(ours: Curve, theirs: Floats, depth: Floats) -> Floats:
    """float64 [rows]: the longer curve's depths carry the comparison, as in evidence.profile."""
    wanted = ours.depth if len(ours.std) >= len(depth) else depth
    x = np.interp(wanted, ours.depth, ours.std)
    interpolation = _interpolation(depth.tobytes(), wanted.tobytes())
    means = interpolation.mean(axis=1, keepdims=True)
    y, level = theirs @ (interpolation - means), np.abs(theirs @ means[:, 0])
    norms = np.sqrt(np.einsum("ij,ij->i", y, y))
    x_norm, x_level = np.linalg.norm(x - x.mean()), abs(x.mean())
    with np.errstate(all="ignore"):  # what is not plain is computed again
        found: Floats = np.clip(y @ (x - x.mean()) / (norms * x_norm), -1.0, 1.0)
        plain = (norms > _PLAIN * level) & (level > _MIDDLE[0]) & (level < _MIDDLE[1])
        plain &= (x_norm > _PLAIN * x_level) & (x_level > _MIDDLE[0]) & (x_level < _MIDDLE[1])
    for row in np.flatnonzero(~plain):
        other = Curve(depth, theirs[row])
        score = None if profile.unusable(other) else profile.pearson(ours, other)
        found[row] = np.nan if score is None else score
    return found
