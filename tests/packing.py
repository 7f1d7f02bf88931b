"""Codes laid into bytes as quantisers store them: what the tests of encodings and the lineage laboratory write with.

Written from the formats' descriptions by other means than llmfp/encoding reads them by.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

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
