"""The definition of every kernel: NumPy, float64, two passes, obvious.

Each other back end is tested against this file. It is also what runs where the C++ extension could not be built.
Merging: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from llmfp.errors import EncodingError
from llmfp.kernels import codes
from llmfp.marginals import Buffer, Chunk, Marginals, Moments

Float64 = NDArray[np.float64]

_STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_STORED |= {"F8_E4M3": np.uint8, "F8_E5M2": np.uint8}


def decode(chunk: Chunk) -> Float64:
    """The chunk's elements as float64 [rows, cols]. Raises EncodingError for a dtype outside the six."""
    stored = _stored(chunk) if chunk.coding is None else codes.decode(chunk, chunk.coding)
    if (low_rank := chunk.low_rank) is None:
        return stored
    left = np.frombuffer(low_rank.left, np.float32).reshape(-1, low_rank.rank).astype(np.float64)
    right = np.frombuffer(low_rank.right, np.float32).reshape(low_rank.rank, -1).astype(np.float64)
    rows, cols = (slice(n, n + count) for n, count in ((chunk.first_row, chunk.rows), (chunk.first_col, chunk.cols)))
    return stored + left[rows] @ right[:, cols]


def decoded(chunk: Chunk, dtype: str = "F64") -> Chunk:
    """The same chunk for a back end that knows only plain dtypes: F64 or F32 where it is coded or adapted."""
    if chunk.coding is None and chunk.low_rank is None:
        return chunk
    values = decode(chunk).astype(_STORED[dtype])
    return replace(
        chunk,
        data=values.tobytes(),
        dtype=dtype,
        offset_bytes=0,
        row_stride_bytes=values.strides[0],
        coding=None,
        low_rank=None,
    )


def _stored(chunk: Chunk) -> Float64:
    if chunk.dtype not in _STORED:
        raise EncodingError(f"dtype {chunk.dtype} is not supported by back end reference")
    stored = np.dtype(_STORED[chunk.dtype])
    bits = np.ndarray(
        (chunk.rows, chunk.cols),
        stored,
        buffer=chunk.host_data,
        offset=chunk.offset_bytes,
        strides=(chunk.row_stride_bytes, stored.itemsize),
    )
    if stored == np.uint8:
        decoded: Float64 = codes.fp8_table(chunk.dtype)[bits]
        return decoded
    with np.errstate(invalid="ignore"):  # signalling NaN
        if chunk.dtype == "BF16":
            return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return bits.astype(np.float64)


def _units(x: Float64, unit_rows: int) -> list[Float64]:
    return [x[start : start + unit_rows] for start in range(0, len(x), unit_rows)]


def _moments(x: Float64, axis: int) -> Moments:
    """Mean and centred sum of squares along one axis; NaN where a non-finite element took part."""
    with np.errstate(invalid="ignore", over="ignore"):
        mean = x.mean(axis=axis, keepdims=True)
        m2 = np.square(x - mean).sum(axis=axis)
    good = np.isfinite(x).all(axis=axis)
    return Moments(np.where(good, mean.squeeze(axis), np.nan).tobytes(), np.where(good, m2, np.nan).tobytes())


def _joined(parts: Sequence[Moments]) -> Moments:
    """Consecutive parts laid end to end."""
    return Moments(b"".join(p.mean for p in parts), b"".join(p.m2 for p in parts))


def _fold(counts: Sequence[int], parts: Sequence[Moments]) -> Moments:
    """Column moments of all units as one, left to right (Chan 1979)."""
    joined = _joined(parts)
    means = np.frombuffer(joined.mean).reshape(len(counts), -1)
    m2s = np.frombuffer(joined.m2).reshape(len(counts), -1)
    total, mean, m2 = counts[0], means[0], m2s[0]
    for n, unit_mean, unit_m2 in zip(counts[1:], means[1:], m2s[1:], strict=True):
        delta, share = unit_mean - mean, n / (total + n)
        mean, m2, total = mean + delta * share, m2 + unit_m2 + delta * delta * (total * share), total + n
    return Moments(mean.tobytes(), m2.tobytes())


class Reference:
    name = "reference"
    dtypes = frozenset(_STORED)
    library_bytes = 24 << 20
    scratch_per_element = 48
    scratch_per_code = 96
    takes_tensors = False
    guards_mapped_pages = False

    def why_unavailable(self) -> str | None:
        return None

    def describe(self) -> str:
        return "numpy"

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}

    def marginals(self, chunk: Chunk) -> Marginals:
        stored = decode(chunk)
        units = _units(stored, chunk.unit_rows)
        finite = np.isfinite(stored)
        row = [_moments(x, 1) for x in units]
        col = [_moments(x, 0) for x in units]
        weighted_row = weighted_col = cross = None
        centre = np.frombuffer(_joined(row).mean)
        if chunk.col_weight is not None:
            gain = np.frombuffer(chunk.col_weight, np.float32).astype(np.float64)
            weighted_row = _joined([_moments(x * gain, 1) for x in units])
            centre = np.frombuffer(weighted_row.mean)
        if chunk.row_weight is not None:
            gain = np.frombuffer(chunk.row_weight, np.float32).astype(np.float64)[:, None]
            weighted_col = _joined([_moments(x, 0) for x in _units(stored * gain, chunk.unit_rows)])
        if chunk.cross:
            products = [part.sum(axis=0) for part in _units(centre[:, None] * stored, chunk.unit_rows)]
            cross = b"".join(np.where(np.isfinite(p), p, np.nan).tobytes() for p in products)
        return Marginals(
            counts=tuple(len(x) for x in units),
            row=_joined(row),
            col=_joined(col),
            weighted_row=weighted_row,
            weighted_col=weighted_col,
            cross=cross,
            abs_max=float(np.abs(stored[finite]).max(initial=0.0)),
            nonfinite=int(finite.size - finite.sum()),
        )

    def expand(self, chunk: Chunk, out: Buffer) -> None:
        values = decode(chunk)
        if chunk.col_weight is not None:
            values = values * np.frombuffer(chunk.col_weight, np.float32)
        if chunk.row_weight is not None:
            values = values * np.frombuffer(chunk.row_weight, np.float32)[:, None]
        with np.errstate(over="ignore"):
            single = values.astype(np.float32)
        np.frombuffer(out, np.float32)[:] = np.where(np.isfinite(single), single, np.nan).ravel()

    def merge(self, parts: Sequence[Marginals]) -> Marginals:
        counts = [n for part in parts for n in part.counts]
        weighted_rows = [p.weighted_row for p in parts if p.weighted_row is not None]
        weighted_cols = [p.weighted_col for p in parts if p.weighted_col is not None]
        crosses = [p.cross for p in parts if p.cross is not None]
        return Marginals(
            counts=(sum(counts),),
            row=_joined([p.row for p in parts]),
            col=_fold(counts, [p.col for p in parts]),
            weighted_row=_joined(weighted_rows) if weighted_rows else None,
            weighted_col=_fold(counts, weighted_cols) if weighted_cols else None,
            cross=np.frombuffer(b"".join(crosses)).reshape(len(counts), -1).sum(axis=0).tobytes() if crosses else None,
            abs_max=max(p.abs_max for p in parts),
            nonfinite=sum(p.nonfinite for p in parts),
        )

    def pool(self, moments: Moments, count: int, block: int) -> Moments:
        mean = np.frombuffer(moments.mean).reshape(-1, block)
        m2 = np.frombuffer(moments.m2).reshape(-1, block)
        pooled = mean.mean(axis=1, keepdims=True)
        between = np.square(mean - pooled).sum(axis=1)
        return Moments(pooled.tobytes(), (m2.sum(axis=1) + count * between).tobytes())

    def log_rms(
        self,
        moments: Moments,
        count: int,
        weight: Buffer | None = None,
        cross: Buffer | None = None,
        centre_square: float = 0.0,
    ) -> Buffer:
        w = 1.0 if weight is None else np.frombuffer(weight, np.float32).astype(np.float64)
        square = w * w * (np.square(np.frombuffer(moments.mean)) + np.frombuffer(moments.m2) / count)
        if cross is not None:
            square = np.maximum(square - 2.0 * w * np.frombuffer(cross) / count + centre_square, 0.0)
        with np.errstate(divide="ignore"):
            return (0.5 * np.log(square)).astype(np.float16).tobytes()


BACKEND = Reference()
