"""A projection whose heads lie in several runs of stored columns: one kernel call per run, and one answer of all.

Quantisers that store [in, out] turn the rows that NeoX, BLOOM, Falcon and gated queries interleave per head into
columns. A run's rows are parts of the projection's rows, so their moments are pooled (Chan 1979); its columns are
whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from llmfp.kernels import Backend
from llmfp.marginals import Buffer, Chunk, Marginals, Moments


def runs_of(chunk: Chunk) -> list[Chunk]:
    """The chunk's runs of columns, each as a kernel takes it."""
    if chunk.col_runs == 1:
        return [chunk]
    if chunk.coding is not None and not isinstance(chunk.data, Buffer):  # codes are decoded on the host: copied once
        chunk = replace(chunk, data=chunk.data.cpu().numpy().data)
    cols = chunk.cols // chunk.col_runs
    weight = None if chunk.col_weight is None else memoryview(chunk.col_weight).cast("B")
    return [
        replace(
            chunk,
            cols=cols,
            offset_bytes=chunk.offset_bytes + run * chunk.run_bytes,
            col_weight=None if weight is None else weight[4 * cols * run : 4 * cols * (run + 1)],
            first_col=chunk.first_col + run * chunk.run_cols,
            col_runs=1,
        )
        for run in range(chunk.col_runs)
    ]


def marginals(backend: Backend, chunk: Chunk) -> Marginals:
    """The chunk's marginals, whatever runs its columns lie in; those of the same columns side by side, to rounding.

    Traffic: each run reads its own columns once. A chunk of several runs has no inner products to be asked for: where
    outputs run along the stored columns, the residual stream does not.
    """
    parts = [backend.marginals(run) for run in runs_of(chunk)]
    if len(parts) == 1:
        return parts[0]
    units, cols = len(parts[0].counts), chunk.cols // chunk.col_runs
    weighted_rows = [part.weighted_row for part in parts if part.weighted_row is not None]
    weighted_cols = [part.weighted_col for part in parts if part.weighted_col is not None]
    return Marginals(
        counts=parts[0].counts,
        row=_pooled(backend, [part.row for part in parts], cols),
        col=_beside([part.col for part in parts], units),
        weighted_row=_pooled(backend, weighted_rows, cols) if weighted_rows else None,
        weighted_col=_beside(weighted_cols, units) if weighted_cols else None,
        cross=None,
        abs_max=max(part.abs_max for part in parts),
        nonfinite=sum(part.nonfinite for part in parts),
    )


def _pooled(backend: Backend, rows: list[Moments], cols: int) -> Moments:
    """Of every row, the moments of its parts in all runs as one."""
    return backend.pool(_beside(rows, len(rows[0].mean) // 8), cols, len(rows))


def _beside(parts: list[Moments], lines: int) -> Moments:
    """Arrays of `lines` lines each, joined line by line."""
    return Moments(_joined([part.mean for part in parts], lines), _joined([part.m2 for part in parts], lines))


def _joined(parts: Iterable[Buffer], lines: int) -> bytes:
    import numpy as np  # heads lie in columns of quantised tensors alone, whose scales have imported it

    arrays = [np.frombuffer(part, np.float64).reshape(lines, -1) for part in parts]
    return np.concatenate(arrays, axis=1).tobytes()


__all__ = ["marginals", "runs_of"]
