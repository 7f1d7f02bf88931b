"""What a kernel is given and what it gives back.

A kernel sees a `Chunk`: consecutive whole *units* (blocks of stored rows) of one weight view, and the bytes that hold
them. It returns `Marginals`: mean and centred sum of squares of every row and of every column. From these follow,
without a second pass, the tensor's mean and std, every head's std, and the profile along the residual stream.

All buffers are flat little-endian arrays behind the buffer protocol (bytes, bytearray, memoryview, NumPy arrays), so
that the native path never has to import NumPy, which alone would cost as much time as scanning 2 GB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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
class Coding:
    """How a quantised tensor's codes become numbers: element (i, j) is scale * (level(code) - zero) + shift.

    packing  where the code of element (i, j) lies, counted from the start of the chunk's first row:
             "row"       `bits` bits from bit j * bits of row i, least significant bit of a byte first
             "row_high"  4 bits: byte j // 2 of row i, the high half first
             "down"      `bits` bits from bit i * bits of column j, which runs down 32-bit words: word w of column j is
                         at w * row_stride_bytes + 4 * j; 32 rows take `bits` words, the chunk starts at such 32 rows
             "awq"       4 bits: word j // 8 of row i, places 0 4 1 5 2 6 3 7 from the least significant half byte up
             "plane"     byte j of row i, `bits` bits from bit `place` up
             or the name of a ggml block type, Q4_K for example, whose blocks follow each other along the row and hold
             their own scales (the rest is then unused, but for `table`: IQ1, IQ2 and IQ3 take their values from a grid,
             int8[points, 8 or 4])
    bits     1 to 8
    place    see "plane"
    levels   level of a code: "uint", itself; "int", two's complement; "offset", itself less 2^(bits - 1);
             "F8_E4M3", "F8_E5M2", "E2M1" (OCP floats), "table": `table`[code]
    table    float32[2^bits] for "table", at most 16 entries
    scale    float32[scale_rows, scale_cols]
    zero     the same shape, or None for 0
    shift    the same shape, or None for 0
    row_block, col_block   rows and columns of the tensor that share an entry of the scale: its indexes are
             i // row_block % scale_rows and j // col_block; or, where row_group or col_group (int32, one per row or
             column of the tensor, all below scale_rows or scale_cols) is given, row_group[i] and col_group[j];
             or, where flat_block is not 0 (scale_rows is 1), the one index (i * tensor_cols + j) // flat_block
    tensor_cols  columns of the whole tensor
    """

    packing: str
    bits: int = 4
    place: int = 0
    levels: str = "uint"
    table: Buffer | None = None
    scale: Buffer | None = None
    zero: Buffer | None = None
    shift: Buffer | None = None
    scale_rows: int = 1
    scale_cols: int = 1
    row_block: int = 1
    col_block: int = 1
    flat_block: int = 0
    row_group: Buffer | None = None
    col_group: Buffer | None = None
    tensor_cols: int = 0


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a tensor: left @ right, of rank `rank`.

    left   float32[rows of the tensor, rank]
    right  float32[rank, columns of the tensor]
    """

    rank: int
    left: Buffer
    right: Buffer


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive whole units of one weight view, in stored orientation, and the buffer that holds them.

    data              bytes-like, or, for back ends that take tensors, a flat uint8 tensor; in the only run of columns
                      element (i, j) starts at byte offset_bytes + i * row_stride_bytes + j * itemsize;
                      of coded elements, the row with element (0, 0) starts at offset_bytes
    dtype             safetensors name of the stored dtype: BF16, F16, F32, F64, F8_E4M3, F8_E5M2; "" where `coding`
                      says what the bytes mean
    rows, cols        stored rows in this chunk, stored columns of the view, those of all its runs
    unit_rows         rows per unit; the last unit of the chunk may be shorter
    col_weight        float32[cols] or None: the norm gain when it runs along the stored columns
    row_weight        float32[rows] or None: the norm gain when it runs along the stored rows (Conv1D); never both
    cross             also return the inner products a LayerNorm model needs (see Marginals.cross)
    coding            of quantised elements
    low_rank          what is added to every element
    first_row, first_col   where the chunk lies in its tensor: what `coding` and `low_rank` are indexed by
    col_runs          runs of equal length that the columns lie in, of heads that are interleaved along the stored rows.
                      A kernel is given one run at a time (`llmfp.column_runs`)
    run_cols          columns of the tensor from the start of one run to that of the next
    run_bytes         the same in bytes; 0 of coded elements, whose rows are found by offset_bytes alone
    """

    data: Buffer | torch.Tensor
    dtype: str
    rows: int
    cols: int
    offset_bytes: int
    row_stride_bytes: int
    unit_rows: int
    col_weight: Buffer | None = None
    row_weight: Buffer | None = None
    cross: bool = False
    coding: Coding | None = None
    low_rank: LowRank | None = None
    first_row: int = 0
    first_col: int = 0
    col_runs: int = 1
    run_cols: int = 0
    run_bytes: int = 0

    @property
    def host_data(self) -> Buffer:
        """The data, of a chunk that lies in host memory."""
        if not isinstance(self.data, Buffer):
            raise TypeError(f"the chunk lies on {self.data.device}")
        return self.data


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
