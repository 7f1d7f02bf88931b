"""The definition of every coding: codes → numbers in NumPy, float64, obvious. See llmfp.marginals.Coding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmfp.marginals import Chunk, Coding

Float64 = NDArray[np.float64]

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which half byte of a 32-bit word, from the least significant up, holds each of its eight columns."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""All values of a 4-bit float (OCP Microscaling Formats v1.0)."""


def fp8_table(dtype: str) -> Float64:
    """All 256 values of an 8-bit float (OCP OFP8 v1.0): e5m2 is half a float16; e4m3 has bias 7, NaN only at 0x7f."""
    code = np.arange(256)
    if dtype == "F8_E5M2":
        return (code << 8).astype(np.uint16).view(np.float16).astype(np.float64)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    return np.where(code & 127 == 127, np.nan, np.where(code >= 128, -value, value))


def decode(chunk: Chunk, coding: Coding) -> Float64:
    """The chunk's elements, without what an adapter adds, as float64 [rows, cols]."""
    if coding.packing[0].isupper():
        return _ggml(chunk, coding)
    level = levels(coding)[_codes(chunk, coding)]
    scale = np.frombuffer(coding.scale or b"", np.float32).astype(np.float64)
    entry = _entries(chunk, coding)
    if coding.zero is not None:
        level = level - np.frombuffer(coding.zero, np.float32)[entry]
    with np.errstate(invalid="ignore"):  # a scale may be infinite
        value: Float64 = level * scale[entry]
    return value if coding.shift is None else value + np.frombuffer(coding.shift, np.float32)[entry]


def _rows(chunk: Chunk, count: int, row_bytes: int) -> NDArray[np.uint8]:
    """`row_bytes` of each of `count` stored rows."""
    return np.ndarray(
        (count, row_bytes),
        np.uint8,
        buffer=chunk.host_data,
        offset=chunk.offset_bytes,
        strides=(chunk.row_stride_bytes, 1),
    )


def _codes(chunk: Chunk, coding: Coding) -> NDArray[np.uint8]:
    """[rows, cols], each below 2^bits."""
    bits, stop = coding.bits, chunk.first_col + chunk.cols
    if coding.packing == "down":
        words = -(-chunk.rows * bits // 32)
        stored = _rows(chunk, words, 4 * stop).reshape(words, stop, 4)[:, chunk.first_col :]
        run = np.unpackbits(stored.transpose(1, 0, 2).reshape(chunk.cols, -1), axis=1, bitorder="little")
        return _numbers(run, chunk.rows, bits).T
    if coding.packing == "plane":
        stored = _rows(chunk, chunk.rows, stop)[:, chunk.first_col :]
        return stored >> np.uint8(coding.place) & np.uint8((1 << bits) - 1)
    if coding.packing == "awq":
        words = -(-stop // 8)
        run = np.unpackbits(_rows(chunk, chunk.rows, 4 * words), axis=1, bitorder="little")
        places = _numbers(run, 8 * words, 4).reshape(chunk.rows, words, 8)
        return places[..., AWQ_ORDER].reshape(chunk.rows, -1)[:, chunk.first_col : stop]
    stored = _rows(chunk, chunk.rows, -(-stop * bits // 8))
    if coding.packing == "row_high":
        stored = stored >> np.uint8(4) | stored << np.uint8(4)
    run = np.unpackbits(stored, axis=1, bitorder="little")
    return _numbers(run, stop, bits)[:, chunk.first_col :]


def _numbers(run: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.uint8]:
    """[n, count] numbers of `bits` bits from bits [n, at least count * bits], least significant first."""
    each = run[:, : count * bits].reshape(len(run), count, bits)
    return np.packbits(each, axis=2, bitorder="little")[:, :, 0]


def levels(coding: Coding) -> Float64:
    """[2^bits]: the level of every code."""
    code = np.arange(1 << coding.bits, dtype=np.float64)
    half = 1 << (coding.bits - 1)
    match coding.levels:
        case "int":
            return np.where(code < half, code, code - 2 * half)
        case "offset":
            return code - half
        case "E2M1":
            return np.array(E2M1)
        case "table":
            return np.frombuffer(coding.table or b"", np.float32).astype(np.float64)
        case "F8_E4M3" | "F8_E5M2":
            return fp8_table(coding.levels)
    return code


def _entries(chunk: Chunk, coding: Coding) -> NDArray[np.intp]:
    """[rows, cols]: the entry of the scale that each element takes."""
    i = np.arange(chunk.first_row, chunk.first_row + chunk.rows)
    j = np.arange(chunk.first_col, chunk.first_col + chunk.cols)
    if coding.flat_block:
        flat: NDArray[np.intp] = (i[:, None] * coding.tensor_cols + j) // coding.flat_block
        return flat
    row, col = i // coding.row_block % coding.scale_rows, j // coding.col_block
    if coding.row_group is not None:
        row = np.frombuffer(coding.row_group, np.int32)[i].astype(np.intp)
    if coding.col_group is not None:
        col = np.frombuffer(coding.col_group, np.int32)[j].astype(np.intp)
    return row[:, None] * coding.scale_cols + col


def _ggml(chunk: Chunk, coding: Coding) -> Float64:
    import gguf

    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[coding.packing]]
    stop = chunk.first_col + chunk.cols
    stored = np.ascontiguousarray(_rows(chunk, chunk.rows, -(-stop // block) * nbytes))
    with np.errstate(all="ignore"):
        value = gguf.dequantize(stored, gguf.GGMLQuantizationType[coding.packing])
    return np.asarray(value[:, chunk.first_col : stop], np.float64)
