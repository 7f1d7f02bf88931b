"""The published score of one model against every row of an index at once.

`pearson` is what `evidence.profile` computes pair by pair, to rounding. Rows whose curve of a role has the same number
of layers and the same gaps share one matrix, which interpolates and centres; a hundred thousand scores are then a few
matrix products, and rows that are constant to within rounding, or out of a float's middle, are left to the definition.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmfp.evidence import profile
from llmfp.evidence.profile import MIN_LAYERS, Curve, StdCurves
from llmfp.registry.index import ROLES

if TYPE_CHECKING:
    import pyarrow as pa

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
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
    for score, role in zip(scores, ROLES, strict=True):
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
    known = ~np.isnan(scores)
    counts = known.sum(axis=0)
    means: Floats = np.full(table.num_rows, np.nan)
    np.divide(np.where(known, scores, 0.0).sum(axis=0), counts, out=means, where=counts > 0)
    return means


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


def _correlations(ours: Curve, theirs: Floats, depth: Floats) -> Floats:
    """float64 [rows]: the longer curve's depths carry the comparison, as in evidence.profile."""
    wanted = ours.depth if len(ours.std) >= len(depth) else depth
    x = np.interp(wanted, ours.depth, ours.std)
    interpolation = np.stack([np.interp(wanted, depth, unit) for unit in np.eye(len(depth))])
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
