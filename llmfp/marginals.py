"""What a kernel is given and what it gives back.

A kernel sees a `Chunk`: consecutive whole *units* (blocks of stored rows) of one weight view, and the bytes that hold
them. It returns `Marginals`: mean and centred sum of squares of every row and of every column. From these follow,
without a second pass, the tensor's mean and std, every head's std, and the profile along the residual stream.

All buffers are flat little-endian arrays behind the buffer protocol (bytes, bytearray, memoryview, NumPy arrays), so
that the native path never has to import NumPy, which alone would cost as much time as scanning 2 GB.
"""

from __future__ import annotations

from dataclasses import dataclass

Buffer = bytes | bytearray | memoryview

UNIT_ELEMENTS = 1 << 20
MIN_UNIT_ROWS, MAX_UNIT_ROWS = 32, 1024


def unit_rows(cols: int) -> int:
    """Rows in one unit of reduction for a matrix of `cols` stored columns.

    A function of the shape alone (never of budget, threads, reader or shard), which is what makes results
    bit-identical. About 2^20 elements: large enough that a unit's column partials (16 bytes a column) stay near 3 %
    of its bytes, small enough for several to fit any sensible budget. A multiple of 32, the kernels' folding block.
    """
    return max(MIN_UNIT_ROWS, min(MAX_UNIT_ROWS, UNIT_ELEMENTS // max(cols, 1) // 32 * 32))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive whole units of one weight view, in stored orientation, and the buffer that holds them.

    data              bytes-like; element (i, j) starts at byte offset_bytes + i * row_stride_bytes + j * itemsize
    dtype             safetensors name of the stored dtype: BF16, F16, F32, F64, F8_E4M3, F8_E5M2
    rows, cols        stored rows in this chunk, stored columns of the view
    unit_rows         rows per unit; the last unit of the chunk may be shorter
    col_weight        float32[cols] or None: the norm gain when it runs along the stored columns
    row_weight        float32[rows] or None: the norm gain when it runs along the stored rows (Conv1D); never both
    cross             also return the inner products a LayerNorm model needs (see Marginals.cross)
    """

    data: Buffer
    dtype: str
    rows: int
    cols: int
    offset_bytes: int
    row_stride_bytes: int
    unit_rows: int
    col_weight: Buffer | None = None
    row_weight: Buffer | None = None
    cross: bool = False


@dataclass(frozen=True, slots=True)
class Moments:
    """Means and centred sums of squares (M2), one float64 each per row, or per unit and column."""

    mean: Buffer
    m2: Buffer


@dataclass(frozen=True, slots=True)
class Marginals:
    """Row and column statistics of U consecutive units of R rows and C columns in all.

    counts        rows in each of the U units, in order; one entry after merging
    row           [R] over the elements of each stored row
    col           [U, C] over each unit's elements of every stored column
    weighted_row  [R] rows of the matrix weighted by `col_weight`, None without one
    weighted_col  [U, C] columns of the matrix weighted by `row_weight`, None without one
                  (along the other axis weighting is a mere factor and needs no statistics of its own)
    cross         [U, C] sum over the unit's rows i of m_i * x_ij, where x is the plain matrix and m_i its row's mean
                  (the weighted row's under `col_weight`); None unless asked for
    abs_max       largest finite |x|
    nonfinite     number of NaN and infinite elements; whatever such an element took part in is NaN (0x7ff8...)
    """

    counts: tuple[int, ...]
    row: Moments
    col: Moments
    weighted_row: Moments | None
    weighted_col: Moments | None
    cross: Buffer | None
    abs_max: float
    nonfinite: int
