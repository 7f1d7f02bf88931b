"""Codes laid into bytes as quantisers store them: what the tests of encodings and the lineage laboratory write with.

Written from the formats' descriptions by other means than llmfp/encoding reads them by.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmfp.hardware import samples
from llmfp.marginals import Chunk, Coding

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns each half byte of a word holds, from the least significant up."""
NF4 = np.array([
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.24611229, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
], np.float32)  # fmt: skip
FP4 = np.float32([0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3]) / np.float32(12)


def packed(codes: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """Codes [n, m] down their columns, each as one run of bits, in words [ceil(n * bits / 32), m]; bit by bit."""
    words = np.zeros((-(-len(codes) * bits // 32), codes.shape[1]), np.uint32)
    for place in range(len(codes) * bits):
        bit = codes[place // bits] >> (place % bits) & 1
        words[place // 32] |= (bit << (place % 32)).astype(np.uint32)
    return words.view(np.int32)


def packed_awq(codes: NDArray[np.int64]) -> NDArray[np.int32]:
    by_word = codes.reshape(len(codes), -1, 8)[..., AWQ_PLACES]
    return (by_word << np.arange(0, 32, 4)).sum(axis=2).astype(np.uint32).view(np.int32)


def words(codes: NDArray[np.integer[Any]], bits: int) -> NDArray[np.uint32]:
    """Each row's codes as one number, lowest first, in 32-bit words."""
    count = -(-codes.shape[1] * bits // 32)
    rows = [sum(int(code) << (bits * j) for j, code in enumerate(row)) for row in codes]
    return np.array([[row >> (32 * n) & 0xFFFFFFFF for n in range(count)] for row in rows], np.uint32)


def nibbles(codes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Two codes a byte, the first in its lower half."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)


def planes(codes: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """HQQ's: equal parts of the rows on top of each other, the first in the highest bits."""
    parts = np.stack(np.split(codes, 8 // bits))
    shifts = 8 - bits * np.arange(1, 8 // bits + 1)
    return (parts << shifts[:, None, None]).sum(axis=0).astype(np.uint8)


def text(characters: str | bytes) -> NDArray[np.uint8]:
    """What a tensor of bytes holds."""
    return np.frombuffer(characters if isinstance(characters, bytes) else characters.encode(), np.uint8)


SCALED: dict[str, tuple[str, int, int, int, int, int, int]] = {
    # levels, rows and columns per scale, rows and columns of the chunk, its first row and column in the tensor
    "partial blocks": ("F8_E4M3", 128, 128, 160, 176, 0, 0),
    "inside a block": ("F8_E4M3", 32, 128, 45, 272, 40, 144),
    "e5m2, any alignment": ("F8_E5M2", 48, 40, 45, 107, 21, 5),
    "blocks that lanes straddle": ("F8_E4M3", 16, 32, 33, 96, 0, 5),
    "groups of columns": ("F8_E4M3", 1, 32, 37, 96, 3, 32),
    "odd groups": ("F8_E4M3", 7, 24, 40, 96, 5, 0),
    "per row": ("F8_E4M3", 1, 560, 40, 544, 7, 16),
    "per tensor": ("F8_E5M2", 90, 77, 64, 64, 20, 13),
    "int8 per row": ("int", 1, 80, 37, 80, 0, 0),
    "one element": ("int", 3, 3, 1, 1, 4, 4),
}
"""Bytes with scales, as devices decode them: edges, offsets, and blocks that 16-byte loads fit and do not fit."""


def scaled_chunk(name: str, *, pad: int = 0, **rest: Any) -> Chunk:
    """A chunk of SCALED in units of 64 rows: normal levels, scales of either sign, elements beyond any level.

    What lies around it, in its rows and in the table of scales, is no usual number."""
    levels, row_block, col_block, rows, cols, first_row, first_col = SCALED[name]
    rng = np.random.default_rng(len(name))
    values = rng.normal(0, 20 if levels == "int" else 1, (rows, cols)).astype(np.float32)
    codes = np.rint(values).astype(np.int8).view(np.uint8) if levels == "int" else samples.encode(values, levels)
    stored = np.full((rows, first_col + cols + pad), 0x7F, np.uint8)
    stored[:, first_col : first_col + cols] = codes
    shape = -(-(first_row + rows + 1) // row_block), -(-(first_col + cols + 1) // col_block)
    scale = 1e3 * (1 + rng.uniform(-0.5, 0.5, shape)) * rng.choice([-1, 1], shape)
    taken = np.zeros(shape, np.bool_)
    taken[first_row // row_block : (first_row + rows - 1) // row_block + 1, first_col // col_block :] = True
    taken[:, (first_col + cols - 1) // col_block + 1 :] = False
    scale = np.where(taken, scale, np.nan).astype(np.float32)
    table = {"scale": scale.tobytes(), "scale_rows": shape[0], "scale_cols": shape[1]}
    coding = Coding("row", 8, levels=levels, row_block=row_block, col_block=col_block, **table)
    place = {"coding": coding, "first_row": first_row, "first_col": first_col}
    return Chunk(stored.tobytes(), "", rows, cols, 0, stored.shape[1], 64, **place, **rest)


def gains(kind: str, rows: int, cols: int) -> dict[str, Any]:
    """A norm's gain for the columns or the rows of a chunk, cross products with it; or none."""
    gain = np.random.default_rng(1).normal(1, 0.3, max(rows, cols)).astype(np.float32)
    if kind == "columns":
        return {"col_weight": gain[:cols].tobytes(), "cross": True}
    return {"row_weight": gain[:rows].tobytes()} if kind == "rows" else {}
