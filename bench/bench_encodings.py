"""Quantised chunks on resident memory: stored bytes per second beside bf16's, and beside the libraries that dequantise.

All codes are those of random normal weights, quantised by gguf or here as quantisers do: every block's scale lets it
reach the last level. Every variant reduces the same number of stored
bytes, several times the last-level cache. Half of bf16's bytes at 4 bits is twice its elements a second, so every
variant is also held against what the sums of as many float32 elements take in the first-level cache.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
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
from llmfp.kernels.codes import AWQ_ORDER
from llmfp.kernels.reference import decode
from llmfp.marginals import Chunk, Coding, Marginals, unit_rows

ROWS, COLS = 2048, 4096
BUFFER_BYTES = 256 << 20
SHARE = ROWS // 8
"""Rows that a library is given."""
TARGET = 0.5
BLOCKS = ("Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "IQ3_S", "TQ2_0")
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the normal distribution (Dettmers et al. 2023, appendix E)."""
RNG = np.random.default_rng(0)


def _layouts() -> dict[str, Coding]:
    """By encoding: everything but the scales. An empty zero or shift is one that a quantiser has yet to choose."""
    table = np.array(NF4, np.float32).tobytes()
    whole, affine = partial(Coding, "row", 8), partial(Coding, zero=b"", row_block=128)
    return {
        "FP8 128×128": whole(levels="F8_E4M3", row_block=128, col_block=128),
        "FP8 per row": whole(levels="F8_E4M3", col_block=COLS),
        "int8 per row": whole(levels="int", col_block=COLS),
        "bitsandbytes int8": whole(levels="int", col_block=COLS),
        "GPTQ 8 bits": affine("down", 8),
        "GPTQ 4 bits": affine("down", 4),
        "AWQ 4 bits": affine("awq", 4),
        "compressed-tensors 4 bits": Coding("row", 4, levels="offset", col_block=128),
        "MLX 4 bits": Coding("row", 4, shift=b"", col_block=64),
        "NF4": Coding("row_high", 4, levels="table", table=table, col_block=64),
        "HQQ 8 bits": whole(zero=b"", col_block=64),
        "MXFP4": Coding("row", 4, levels="E2M1", col_block=32),
        "NVFP4": Coding("row", 4, levels="E2M1", col_block=16),
    }


def _quantised(layout: Coding, values: NDArray[np.float32]) -> tuple[Coding, NDArray[np.uint8]]:
    """A layout with its scales, and codes [ROWS, COLS], as quantisers choose them for each block of `values`: from its
    largest magnitude to the largest level, or from its least to its most where there is a zero or a shift."""
    level = _levels(layout)
    order = np.argsort(level)[: np.isfinite(level).sum()]
    size = (ROWS // layout.row_block, layout.row_block, COLS // layout.col_block, layout.col_block)
    blocks = values.reshape(size)
    least, most = blocks.min((1, 3), keepdims=True), blocks.max((1, 3), keepdims=True)
    if layout.zero is None and layout.shift is None:
        scale, zero = np.maximum(most, -least) / np.float32(np.nanmax(level)), np.float32(0)
    else:
        scale = (most - least) / np.float32(level[order[-1]])
        zero = np.round(-least / scale)
    between = (level[order][1:] + level[order][:-1]) / 2
    codes = order.astype(np.uint8)[np.searchsorted(between, blocks / scale + zero)].reshape(ROWS, COLS)
    named = {"scale": scale.tobytes(), "scale_rows": size[0], "scale_cols": size[2]}
    if layout.zero is not None:
        named["zero"] = zero.tobytes()
    if layout.shift is not None:
        named["shift"] = (-zero * scale).tobytes()
    return replace(layout, **named), codes


def _levels(coding: Coding) -> NDArray[np.float64]:
    count = 1 << coding.bits
    one = {"scale": np.ones(1, np.float32).tobytes(), "scale_rows": 1, "scale_cols": 1, "row_block": 1}
    plain = replace(coding, packing="plane", zero=None, shift=None, col_block=count, **one)
    return decode(Chunk(bytes(range(count)), "", 1, count, 0, count, 1, coding=plain))[0]


def _packed(coding: Coding, codes: NDArray[np.uint8]) -> tuple[bytes, int]:
    """Codes as stored, and from one stored row to the next."""
    if coding.packing == "down":
        each = 32 // coding.bits
        shifts = (np.arange(each, dtype=np.uint32) * np.uint32(coding.bits))[:, None]
        words = codes.reshape(ROWS // each, each, COLS).astype(np.uint32) << shifts
        return np.bitwise_or.reduce(words, axis=1).tobytes(), 4 * COLS
    if coding.packing == "awq":
        codes = codes.reshape(ROWS, COLS // 8, 8)[..., np.argsort(AWQ_ORDER)].reshape(ROWS, COLS)
    if coding.bits == 8:
        return codes.tobytes(), COLS
    first, second = codes[:, ::2], codes[:, 1::2]
    if coding.packing == "row_high":
        first, second = second, first
    return (first | second << np.uint8(4)).tobytes(), COLS // 2


def test_encodings(benchmark: Benchmark) -> None:
    comparison = Comparison("encodings", "marginals of quantised weights", MEMORY.replace("1 GiB", "256 MiB"))
    _add_ceiling(comparison)
    values = RNG.normal(0, 0.02, (ROWS, COLS)).astype(np.float32)
    bf16 = to_bfloat16(values)
    _add(comparison, "BF16", Chunk(bf16.tobytes(), "BF16", ROWS, COLS, 0, 2 * COLS, unit_rows(COLS)))
    for name, layout in _layouts().items():
        coding, codes = _quantised(layout, values)
        chunk = _chunk(*_packed(coding, codes), coding)
        _add(comparison, name, chunk)
        _add_library(comparison, name, chunk)
    for name in BLOCKS:
        stored = _blocks(name, values)
        chunk = _chunk(stored.tobytes(), stored.shape[1], Coding(name, table=grid(name)))
        _add(comparison, f"GGUF {name}", chunk)
        kind = gguf.GGMLQuantizationType[name]
        _add_peer(
            comparison, f"GGUF {name}", "gguf.dequantize, std", chunk, partial(gguf.dequantize, stored[:SHARE], kind)
        )
    comparison.leave_out("GPTQ and AWQ: gptqmodel", "no wheel for CPUs; its source was not built within five minutes")
    comparison.run(benchmark, rounds(5))


def _add_ceiling(comparison: Comparison) -> None:
    """What the sums alone take: float32 in the first-level cache, on every core."""
    aligned = np.zeros(5 * 512 + 16, np.float32)
    aligned = aligned[-aligned.ctypes.data // 4 % 16 :][: 5 * 512]
    rows, gain = aligned[: 4 * 512], aligned[4 * 512 :]
    rows[:], gain[:] = RNG.standard_normal(rows.size), 1
    squares, repetitions, threads = float(np.square(rows.astype(np.float64)).sum()), 50_000, ceilings.cores()
    for kind, weight in (("plain", None), ("weighted", gain)):

        def work(weight: NDArray[np.float32] | None = weight) -> list[float]:
            return in_threads(threads, lambda: ceilings.sum_floats(rows, weight, repetitions))

        def check(answers: list[float]) -> None:
            np.testing.assert_allclose(answers, squares * repetitions, rtol=1e-5)

        elements = threads * repetitions * rows.size
        name = f"sums alone {kind}, threads: {threads}"
        comparison.add(name, timed(work, check), nbytes=4 * elements, threads=threads, elements=elements)


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
        elements = copies * chunk.rows * chunk.cols
        comparison.add(row, timed(work, partial(_check, expected)), nbytes=nbytes, threads=threads, elements=elements)
        if name != "BF16":
            claim = f"{name} {kind}: at least 0.5 of bf16's stored bytes per second"
            comparison.at_least(claim, row, [f"BF16 {kind}, threads: {threads}"], TARGET)
        claim = f"{name} {kind}: at least 0.5 of the elements per second that the sums alone allow"
        comparison.at_least(claim, row, [f"sums alone {kind}, threads: {threads}"], TARGET, counting="elements")


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


def _add_peer(comparison: Comparison, name: str, how: str, chunk: Chunk, dequantise: Callable[[], Any]) -> None:
    """A library's dequantise and std, on the first rows of one chunk; and what that is of our own time for a byte."""
    expected = float(decode(chunk)[:SHARE].std())

    def work() -> float:
        numbers = dequantise()
        return float(numbers.std(correction=0) if hasattr(numbers, "detach") else np.std(numbers, dtype=np.float64))

    def check(answer: float) -> None:
        assert abs(answer / expected - 1) < 5e-4, (answer, expected)

    row = f"{name}: {how}"
    comparison.add(row, timed(work, check), nbytes=len(chunk.data) * SHARE // ROWS, threads=None)
    own = f"{name} plain, threads: {ceilings.cores()}"
    comparison.at_least(f"{name} plain: at least 10 times as fast as {how}", own, [row], 10)


def _add_library(comparison: Comparison, name: str, chunk: Chunk) -> None:
    module, how, dequantise = LIBRARIES[name]
    try:
        importlib.import_module(module)
    except ImportError as error:
        comparison.leave_out(f"{name}: {how}", f"not installed: {error}")
        return
    _add_peer(comparison, name, how, chunk, dequantise(chunk))


def _tensor(data: Any, dtype: str, rows: int) -> Any:
    """Of a buffer over all rows, or groups of them, the share that peers are given: [rows, ...]."""
    import torch

    stored = torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype))
    return stored.reshape(rows, -1)[: max(1, rows * SHARE // ROWS)].contiguous()


def _scale(chunk: Chunk) -> Any:
    assert chunk.coding is not None
    return _tensor(chunk.coding.scale, "float32", chunk.coding.scale_rows)


def _ct_scaled(strategy: str, dtype: str, kind: str) -> Callable[[Chunk], Callable[[], Any]]:
    def prepare(chunk: Chunk) -> Callable[[], Any]:
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        structure = {"block_structure": [128, 128]} if strategy == "block" else {}
        args = QuantizationArgs(num_bits=8, type=kind, strategy=strategy, symmetric=True, **structure)
        return partial(dequantize, _tensor(chunk.data, dtype, ROWS), _scale(chunk), args=args)

    return prepare


def _ct_packed(chunk: Chunk) -> Callable[[], Any]:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed, scale = _tensor(chunk.data, "int32", ROWS), _scale(chunk)
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=128, symmetric=True)
    shape = torch.Size((SHARE, COLS))
    return lambda: dequantize(unpack_from_int32(packed, 4, shape), scale, args=args)


def _ct_fp4(size: int) -> Callable[[Chunk], Callable[[], Any]]:
    def prepare(chunk: Chunk) -> Callable[[], Any]:
        import torch
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        packed, scale = _tensor(chunk.data, "uint8", ROWS), _scale(chunk)
        args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=size, symmetric=True)
        return lambda: dequantize(unpack_fp4_from_uint8(packed, SHARE, COLS, torch.float32), scale, args=args)

    return prepare


def _bnb_nf4(chunk: Chunk) -> Callable[[], Any]:
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    assert chunk.coding is not None
    codes, scale = _tensor(chunk.data, "uint8", ROWS).reshape(-1, 1), _scale(chunk).flatten()
    table = torch.frombuffer(bytearray(chunk.coding.table or b""), dtype=torch.float32)
    state = QuantState(
        absmax=scale, shape=torch.Size((SHARE, COLS)), code=table, blocksize=64, quant_type="nf4", dtype=torch.float32
    )
    return partial(dequantize_4bit, codes, state)


def _bnb_int8(chunk: Chunk) -> Callable[[], Any]:
    from bitsandbytes.functional import int8_vectorwise_dequant

    return partial(int8_vectorwise_dequant, _tensor(chunk.data, "int8", ROWS), 127 * _scale(chunk).flatten())


def _hqq(chunk: Chunk) -> Callable[[], Any]:
    import torch
    from hqq.core.quantize import Quantizer

    assert chunk.coding is not None
    codes = _tensor(chunk.data, "uint8", ROWS).reshape(-1, 64)
    zero = _tensor(chunk.coding.zero, "float32", ROWS).reshape(-1, 1)
    meta = {"scale": _scale(chunk).reshape(-1, 1), "zero": zero, "shape": torch.Size((SHARE, COLS))}
    meta |= {"packing": "8bit_u8", "axis": 1, "group_size": 64, "nbits": 8, "compute_dtype": torch.float32}
    meta |= {"unpack_view_dtype": torch.uint8, "view_as_float": False, "quant_scale": False, "quant_zero": False}
    return partial(Quantizer.dequantize, codes, meta)


def _torch_words(chunk: Chunk) -> Callable[[], Any]:
    """As gptqmodel's and AutoAWQ's torch back ends unpack: shifts, a mask, (code - zero) * scale."""
    import torch

    coding = chunk.coding
    assert coding is not None
    down, each = coding.packing == "down", 32 // coding.bits
    words = _tensor(chunk.data, "int32", ROWS // each if down else ROWS)
    shifts = torch.tensor(AWQ_ORDER if not down else range(each), dtype=torch.int32) * coding.bits
    zero = _tensor(coding.zero, "float32", coding.scale_rows).repeat_interleave(128, 0)
    scale = _scale(chunk).repeat_interleave(128, 0)

    def dequantise() -> Any:
        codes = words[:, None, :] >> shifts[None, :, None] if down else words[:, :, None] >> shifts[None, None, :]
        return ((codes & (1 << coding.bits) - 1).reshape(SHARE, COLS) - zero) * scale

    return dequantise


def _mlx(chunk: Chunk) -> Callable[[], Any]:
    import mlx.core as mx

    coding = chunk.coding
    assert coding is not None
    parts = [_tensor(chunk.data, "int32", ROWS).numpy().view(np.uint32)]
    parts += [_tensor(each, "float32", ROWS).numpy() for each in (coding.scale, coding.shift)]
    arrays = [mx.array(part) for part in parts]
    return lambda: np.array(mx.dequantize(*arrays, group_size=64, bits=4))


CT = "compressed_tensors"
LIBRARIES: dict[str, tuple[str, str, Callable[[Chunk], Callable[[], Any]]]] = {
    "FP8 128×128": (CT, "compressed-tensors dequantize, std", _ct_scaled("block", "float8_e4m3fn", "float")),
    "FP8 per row": (CT, "compressed-tensors dequantize, std", _ct_scaled("channel", "float8_e4m3fn", "float")),
    "int8 per row": (CT, "compressed-tensors dequantize, std", _ct_scaled("channel", "int8", "int")),
    "bitsandbytes int8": ("bitsandbytes", "bitsandbytes int8_vectorwise_dequant, std", _bnb_int8),
    "GPTQ 8 bits": ("torch", "torch shifts, (code - zero) * scale, std", _torch_words),
    "GPTQ 4 bits": ("torch", "torch shifts, (code - zero) * scale, std", _torch_words),
    "AWQ 4 bits": ("torch", "torch shifts, (code - zero) * scale, std", _torch_words),
    "compressed-tensors 4 bits": (CT, "compressed-tensors unpack, dequantize, std", _ct_packed),
    "MLX 4 bits": ("mlx.core", "mlx.dequantize, std", _mlx),
    "NF4": ("bitsandbytes", "bitsandbytes dequantize_4bit, std", _bnb_nf4),
    "HQQ 8 bits": ("hqq", "hqq dequantize, std", _hqq),
    "MXFP4": (CT, "compressed-tensors unpack, dequantize, std", _ct_fp4(32)),
    "NVFP4": (CT, "compressed-tensors unpack, dequantize, std", _ct_fp4(16)),
}
"""By encoding: the module a peer needs, what it does, and what prepares it."""
