"""Codes that a device makes numbers of itself: a byte each, times the scale of its tensor, row, column or block.

That is FP8 however it is scaled, and int8 without zero points: what is stored goes to the device as it is, with the
few scales that its rows take. Everything else (fewer than 8 bits, zero points, shifts, ggml's blocks, GPTQ's words) is
decoded on the host, by the definition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmfp.kernels import codes
from llmfp.marginals import Chunk

LEVELS = {"F8_E4M3": "F8_E4M3", "F8_E5M2": "F8_E5M2", "int": "I8"}
"""By a coding's levels, the dtype whose values they are."""
MAX_ROWS = 1 << 21
"""Rows of a unit and of one entry together, to which a kernel finds the entry: see triton_marginals.ROW_SHIFT."""
MAX_ENTRIES = 1 << 31
"""Entries that a unit takes, which a kernel counts in int32."""


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a chunk: element (i, j) takes table[(first_row + i) // row_block, (first_col + j) // col_block].

    levels     float64[256]: the level of every code
    table      float32[rows, cols], contiguous
    first_row  below row_block: the chunk may start inside a block
    first_col  below col_block
    """

    levels: NDArray[np.float64]
    table: NDArray[np.float32]
    row_block: int
    col_block: int
    first_row: int
    first_col: int


def scaled(chunk: Chunk) -> tuple[Chunk, Scales] | None:
    """The chunk as bytes of a plain dtype (F8_E4M3, F8_E5M2, I8) and their scales; None where it is not just that.

    None, too, where the coding contradicts itself: the definition says then what is wrong."""
    coding = chunk.coding
    if coding is None or chunk.low_rank is not None or (coding.packing, coding.bits) != ("row", 8):
        return None
    if coding.levels not in LEVELS or coding.scale is None or coding.zero is not None or coding.shift is not None:
        return None
    if coding.flat_block or coding.row_group is not None or coding.col_group is not None:
        return None
    if min(coding.row_block, coding.col_block, chunk.first_row + 1, chunk.first_col + 1, chunk.rows, chunk.cols) < 1:
        return None
    table = np.frombuffer(coding.scale, np.float32)
    top, left = chunk.first_row // coding.row_block, chunk.first_col // coding.col_block
    bottom = -(-(chunk.first_row + chunk.rows) // coding.row_block)
    right = -(-(chunk.first_col + chunk.cols) // coding.col_block)
    if len(table) != coding.scale_rows * coding.scale_cols or bottom > coding.scale_rows or right > coding.scale_cols:
        return None
    table = np.ascontiguousarray(table.reshape(coding.scale_rows, coding.scale_cols)[top:bottom, left:right])
    first_row, first_col = chunk.first_row % coding.row_block, chunk.first_col % coding.col_block
    # One entry for all has no edge to find: any alignment, any size.
    row_block = coding.row_block if len(table) > 1 else first_row + chunk.rows
    col_block = coding.col_block if table.shape[1] > 1 else first_col + chunk.cols
    unit_rows = min(chunk.unit_rows, chunk.rows)
    entries = (unit_rows // row_block + 2) * table.shape[1]
    if (len(table) > 1 and row_block + unit_rows > MAX_ROWS) or entries > MAX_ENTRIES:
        return None
    plain = replace(
        chunk,
        dtype=LEVELS[coding.levels],
        offset_bytes=chunk.offset_bytes + chunk.first_col,
        coding=None,
    )
    return plain, Scales(codes.levels(coding), table, row_block, col_block, first_row, first_col)
