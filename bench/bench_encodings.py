"""Quantised chunks on resident memory: stored bytes per second beside bf16's, and beside the libraries that dequantise.

The codes are those of random normal weights where a library quantises them here (GGUF, MLX), else random codes around
their zero. Every variant reduces the same number of stored bytes, several times the last-level cache.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from bench import ceilings
from bench.bench_kernels import MEMORY
from bench.harness import Benchmark, Comparison, in_threads, rounds, timed
from llmfp.encoding.blocks import grid
from llmfp.hardware.samples import to_bfloat16
from llmfp.kernels import load
from llmfp.kernels.reference import decode
from llmfp.marginals import Chunk, Coding, Marginals, unit_rows

ROWS, COLS = 2048, 4096
BUFFER_BYTES = 256 << 20
TARGET = 0.5
BLOCKS = ("Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "IQ3_S", "TQ2_0")
RNG = np.random.default_rng(0)


def _scales(rows: int, cols: int) -> dict[str, Any]:
    scale = RNG.uniform(0.01, 0.02, (rows, cols)).astype(np.float32)
    return {"scale": scale.tobytes(), "scale_rows": rows, "scale_cols": cols}


def _like(rows: int, cols: int, value: float) -> bytes:
    return np.full((rows, cols), value, np.float32).tobytes()


def _codings() -> dict[str, tuple[Coding, int, int]]:
    """Coding, stored rows and bytes of each, by format."""
    groups = ROWS // 128
    table = np.linspace(-1, 1, 16, dtype=np.float32).tobytes()
    nested = {"row_block": 128, **_scales(groups, COLS)}
    half = COLS // 2
    return {
        "FP8 128×128": (
            Coding("row", 8, levels="F8_E4M3", row_block=128, col_block=128, **_scales(groups, COLS // 128)), ROWS, COLS
        ),
        "FP8 per row": (Coding("row", 8, levels="F8_E4M3", col_block=COLS, **_scales(ROWS, 1)), ROWS, COLS),
        "int8 per row": (Coding("row", 8, levels="int", col_block=COLS, **_scales(ROWS, 1)), ROWS, COLS),
        "GPTQ 8 bits": (Coding("down", 8, zero=_like(groups, COLS, 128), **nested), ROWS // 4, 4 * COLS),
        "GPTQ 4 bits": (Coding("down", 4, zero=_like(groups, COLS, 8), **nested), ROWS // 8, 4 * COLS),
        "AWQ 4 bits": (Coding("awq", 4, zero=_like(groups, COLS, 8), **nested), ROWS, half),
        "compressed-tensors 4 bits": (
            Coding("row", 4, levels="offset", col_block=128, **_scales(ROWS, COLS // 128)), ROWS, half
        ),
        "MLX 4 bits": (
            Coding("row", 4, shift=_like(ROWS, COLS // 64, -0.11), col_block=64, **_scales(ROWS, COLS // 64)),
            ROWS, half,
        ),
        "NF4": (
            Coding("row_high", 4, levels="table", table=table, col_block=64, **_scales(ROWS, COLS // 64)), ROWS, half
        ),
        "MXFP4": (Coding("row", 4, levels="E2M1", col_block=32, **_scales(ROWS, COLS // 32)), ROWS, half),
        "NVFP4": (Coding("row", 4, levels="E2M1", col_block=16, **_scales(ROWS, COLS // 16)), ROWS, half),
    }  # fmt: skip


def test_encodings(benchmark: Benchmark) -> None:
    comparison = Comparison("encodings", "marginals of quantised weights", MEMORY.replace("1 GiB", "256 MiB"))
    values = RNG.normal(0, 0.02, (ROWS, COLS)).astype(np.float32)
    bf16 = to_bfloat16(values)
    _add(comparison, "BF16", Chunk(bf16.tobytes(), "BF16", ROWS, COLS, 0, 2 * COLS, unit_rows(COLS)))
    for name, (coding, stored_rows, row_bytes) in _codings().items():
        codes = RNG.integers(0, 256, stored_rows * row_bytes, np.uint8)
        if coding.levels.startswith("F8"):
            codes &= np.uint8(0xBF)  # half of all exponents, and no NaN
        _add(comparison, name, _chunk(codes.tobytes(), row_bytes, coding))
    for name in BLOCKS:
        stored = _blocks(name, values)
        chunk = _chunk(stored.tobytes(), stored.shape[1], Coding(name, table=grid(name)))
        _add(comparison, f"GGUF {name}", chunk)
        kind = gguf.GGMLQuantizationType[name]
        _add_peer(
            comparison, f"GGUF {name}", "gguf.dequantize, std", chunk, partial(gguf.dequantize, stored[:256], kind), 8
        )
    _add_mlx(comparison, values)
    comparison.run(benchmark, rounds(5))


def _chunk(data: bytes, row_bytes: int, coding: Coding) -> Chunk:
    return Chunk(data, "", ROWS, COLS, 0, row_bytes, unit_rows(COLS), coding=coding)


def _add(comparison: Comparison, name: str, chunk: Chunk) -> None:
    """The native kernel on copies of a chunk: plain and weighted, on as many threads as there are cores."""
    backend, threads = load("native_cpu"), ceilings.cores()
    copies = max(2, BUFFER_BYTES // len(chunk.data))
    buffers = [bytes(bytearray(chunk.data)) for _ in range(copies)]
    gain = (1 + RNG.standard_normal(COLS) / 4).astype(np.float32).tobytes()
    for kind, weight in (("plain", None), ("weighted", gain)):
        chunks = [Chunk(each, *_rest(chunk), col_weight=weight, coding=chunk.coding) for each in buffers]
        expected = load("reference").marginals(chunks[0])

        def work(chunks: list[Chunk] = chunks) -> list[Marginals]:
            shared = iter(chunks)
            return in_threads(threads, lambda: [backend.marginals(each) for each in shared][-1:])[0] or [
                backend.marginals(chunks[0])
            ]

        row = f"{name} {kind}, threads: {threads}"
        nbytes = copies * len(chunk.data)
        comparison.add(row, timed(work, partial(_check, expected)), nbytes=nbytes, threads=threads)
        if name != "BF16":
            claim = f"{name} {kind}: at least 0.5 of bf16's stored bytes per second"
            comparison.at_least(claim, row, [f"BF16 {kind}, threads: {threads}"], TARGET)


def _rest(chunk: Chunk) -> tuple[str, int, int, int, int, int]:
    return chunk.dtype, chunk.rows, chunk.cols, chunk.offset_bytes, chunk.row_stride_bytes, chunk.unit_rows


def _check(expected: Marginals, answers: list[Marginals]) -> None:
    for answer in answers:
        np.testing.assert_allclose(np.frombuffer(answer.row.m2), np.frombuffer(expected.row.m2), rtol=1e-5)
        np.testing.assert_allclose(np.frombuffer(answer.col.m2), np.frombuffer(expected.col.m2), rtol=1e-5)


def _blocks(name: str, values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Quantised by the package where it can, else random blocks with moderate scales."""
    kind = gguf.GGMLQuantizationType[name]
    try:
        quantised: NDArray[np.uint8] = gguf.quantize(values, kind)
    except NotImplementedError:
        elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = RNG.integers(0, 256, (ROWS, COLS // elements, nbytes), np.uint8)
        where = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(name, 0)
        scale = RNG.uniform(0.001, 0.002, (*blocks.shape[:2], 1)).astype(np.float16)
        blocks[..., where : where + 2] = scale.view(np.uint8)
        if middle := {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}.get(name):  # weights lie around zero
            blocks[..., where + 2 : where + 4] = (scale * np.float16(middle)).view(np.uint8)
        return blocks.reshape(ROWS, -1)
    return quantised


def _add_peer(
    comparison: Comparison, name: str, how: str, chunk: Chunk, dequantise: Callable[[], Any], share: int
) -> None:
    """A library's dequantise and NumPy's std, on a share of one chunk's rows."""
    expected = float(decode(chunk)[: ROWS // share].std())

    def work() -> float:
        return float(np.asarray(dequantise()).std(dtype=np.float64))

    def check(answer: float) -> None:
        assert abs(answer / expected - 1) < 1e-4, (answer, expected)

    comparison.add(f"{name}: {how}", timed(work, check), nbytes=len(chunk.data) // share, threads=None)


def _add_mlx(comparison: Comparison, values: NDArray[np.float32]) -> None:
    try:
        mx = importlib.import_module("mlx.core")
    except ImportError:
        comparison.leave_out("MLX 4 bits: mlx.dequantize, std", "not installed: pip install 'mlx[cpu]'")
        return
    stored = [np.array(part) for part in mx.quantize(mx.array(values), group_size=64, bits=4)]
    entries = {"scale_rows": ROWS, "scale_cols": COLS // 64, "col_block": 64}
    coding = Coding("row", 4, scale=stored[1].tobytes(), shift=stored[2].tobytes(), **entries)
    parts = [mx.array(part[: ROWS // 8]) for part in stored]
    chunk = _chunk(stored[0].tobytes(), COLS // 2, coding)
    dequantise = partial(mx.dequantize, *parts, group_size=64, bits=4)
    _add_peer(comparison, "MLX 4 bits", "mlx.dequantize, std", chunk, dequantise, 8)
