"""Kernels on resident memory: every back end and dtype, plain and weighted, against the read ceiling of this run.

The buffer is several times the last-level cache, cut into the 8 MiB chunks that the engine would hand out. All chunks
hold the same bytes, so one float64 reference answers for each of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bench import ceilings
from bench.harness import Benchmark, Comparison, in_threads, rounds, timed
from llmfp.hardware.samples import encode, stored_type
from llmfp.kernels import BACKENDS, Backend, load
from llmfp.kernels.reference import decode
from llmfp.marginals import Chunk, Marginals, unit_rows

COLS = 4096
CHUNK_BYTES = 8 << 20
BUFFER_BYTES = 1 << 30
SLOW_BYTES = 16 << 20
"""What back ends, SIMD levels and peers that manage about 1 GB/s or less are given."""
MEMORY = "memory: 1 GiB of anonymous memory, twice the largest last-level cache met so far"
DTYPES = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
NUMKONG = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
NUMKONG |= {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
TORCH |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
TARGET_DTYPES = {"BF16", "F16", "F32", "F8_E4M3", "F8_E5M2"}
KERNEL_TARGET = 0.6


@dataclass(frozen=True)
class Memory:
    """One chunk's bytes repeated through a buffer."""

    dtype: str
    buffer: NDArray[Any]
    gain: NDArray[np.float32]

    @cached_property
    def itemsize(self) -> int:
        return self.buffer.dtype.itemsize

    @property
    def rows(self) -> int:
        return CHUNK_BYTES // COLS // self.itemsize

    def chunks(self, nbytes: int, **weights: Any) -> Iterator[Chunk]:
        data = self.buffer.data.cast("B")
        for offset in range(0, nbytes, CHUNK_BYTES):
            yield Chunk(data, self.dtype, self.rows, COLS, offset, COLS * self.itemsize, unit_rows(COLS), **weights)

    @cached_property
    def std(self) -> float:
        return float(decode(next(self.chunks(CHUNK_BYTES))).std())


@pytest.fixture(scope="module", params=DTYPES)
def memory(request: pytest.FixtureRequest) -> Memory:
    dtype = str(request.param)
    generator = np.random.default_rng(0)
    itemsize = stored_type(dtype).itemsize
    scale = 0.02 if itemsize > 1 else 1.0  # 8-bit weights are stored scaled up, to stay clear of the subnormals
    values = (generator.standard_normal(CHUNK_BYTES // itemsize) * scale).astype(np.float32)
    buffer = np.tile(encode(values, dtype), BUFFER_BYTES // CHUNK_BYTES)
    return Memory(dtype, buffer, (1 + generator.standard_normal(COLS) / 4).astype(np.float32))


def test_kernels(memory: Memory, benchmark: Benchmark) -> None:
    comparison = Comparison("kernels", f"marginals of {memory.dtype}", MEMORY)
    threads = sorted({1, ceilings.cores()})
    expected = ceilings.sum_words(memory.buffer, 1)
    assert expected == int(memory.buffer.view(np.uint64).sum(dtype=np.uint64))
    for n in threads:
        comparison.add(
            f"read ceiling, threads: {n}",
            timed(partial(ceilings.sum_words, memory.buffer, n), partial(_check_equal, expected)),
            nbytes=BUFFER_BYTES,
            threads=n,
        )
    for name in BACKENDS:
        _add_backend(comparison, memory, name, threads)
    _add_numkong(comparison, memory)
    _add_torch(comparison, memory)
    comparison.run(benchmark, rounds(5))


def _add_backend(comparison: Comparison, memory: Memory, name: str, threads: list[int]) -> None:
    backend = load(name)
    if reason := backend.why_unavailable():
        comparison.leave_out(name, reason)
        return
    if memory.dtype not in backend.dtypes:
        comparison.leave_out(name, f"does not read {memory.dtype}")
        return
    native = name == "native_cpu"
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "weighted": {"col_weight": memory.gain.data.cast("B")}}
    if native and memory.dtype == "BF16":
        kinds["weighted by rows"] = {"row_weight": memory.gain[: memory.rows].data.cast("B")}
        kinds["centred"] = {**kinds["weighted"], "cross": True}
    nbytes = BUFFER_BYTES if native else SLOW_BYTES
    for kind, weights in kinds.items():
        expected = load("reference").marginals(next(memory.chunks(CHUNK_BYTES, **weights)))
        check = partial(_check_marginals, expected, memory.std)
        chunks = list(memory.chunks(nbytes, **weights))
        if not native:
            work = _reduction(backend, chunks, 1)
            comparison.add(f"{name} {kind}", timed(work, check), nbytes=nbytes, threads=None, simd=backend.describe())
            continue
        for n in threads:
            row = f"{name} {kind}, threads: {n}"
            work = _reduction(backend, chunks, n)
            comparison.add(row, timed(work, check), nbytes=nbytes, threads=n, simd=backend.describe())
            if memory.dtype in TARGET_DTYPES and kind in ("plain", "weighted"):
                claim = f"{memory.dtype} {kind}, threads {n}: at least 0.6 of the read ceiling"
                comparison.at_least(claim, row, [f"read ceiling, threads: {n}"], KERNEL_TARGET)
        for level in _native_levels()[1:] if kind == "weighted" else []:
            level_bytes = SLOW_BYTES if level == "scalar" else nbytes
            work = _at_level(level, _reduction(backend, chunks[: level_bytes // CHUNK_BYTES], 1))
            row = f"{name} {kind}, {level}, threads: 1"
            comparison.add(row, timed(work, check), nbytes=level_bytes, threads=1, simd=level)


def _native_levels() -> list[str]:
    """SIMD levels this machine can run, best first."""
    from llmfp import _native

    return list(_native.levels())


def _at_level(level: str, work: Callable[[], list[Marginals]]) -> Callable[[], list[Marginals]]:
    def run() -> list[Marginals]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLMFP_SIMD", level)
            return work()

    return run


def _reduction(backend: Backend, chunks: list[Chunk], threads: int) -> Callable[[], list[Marginals]]:
    """Threads take chunks in turn, as in the engine; each returns its last result."""

    def run() -> list[Marginals]:
        shared = iter(chunks)

        def work() -> Marginals:
            # A thread that finds nothing left to do still has an answer to show.
            result = None
            for chunk in shared:
                result = backend.marginals(chunk)
            return result or backend.marginals(chunks[0])

        return in_threads(threads, work)

    return run


def _add_numkong(comparison: Comparison, memory: Memory) -> None:
    """The plain sum and sum of squares of everything: no marginals. Holds the GIL, so one thread is all it uses."""
    try:
        numkong = importlib.import_module("numkong")
    except ImportError:
        comparison.leave_out("NumKong moments", "not installed")
        return

    def run() -> float:
        total, squares = numkong.moments(memory.buffer, dtype=NUMKONG[memory.dtype])
        mean = total / memory.buffer.size
        return float(np.sqrt(squares / memory.buffer.size - mean * mean))

    check = partial(_check_std, memory.std, 1e-3)
    comparison.add("NumKong moments", timed(run, check), nbytes=BUFFER_BYTES, threads=1)


def _add_torch(comparison: Comparison, memory: Memory) -> None:
    try:
        import torch
    except ImportError:
        comparison.leave_out("torch", "not installed")
        return
    bits = memory.buffer[: SLOW_BYTES // memory.itemsize]
    tensor = torch.from_numpy(bits).view(getattr(torch, TORCH[memory.dtype]))
    threads = torch.get_num_threads()
    facts: dict[str, Any] = {"nbytes": SLOW_BYTES, "threads": threads}

    def converted() -> float:
        return float(tensor.float().std(correction=0))

    def direct() -> float:
        return float(tensor.std(correction=0))

    comparison.add("torch x.float().std()", timed(converted, partial(_check_std, memory.std, 1e-4)), **facts)
    if memory.itemsize > 1:  # torch does not reduce 8-bit floats
        comparison.add("torch x.std()", timed(direct, partial(_check_std, memory.std, 5e-3)), **facts)


def _check_equal(expected: int, answer: int) -> None:
    assert answer == expected


def _check_std(expected: float, tolerance: float, answer: float) -> None:
    assert abs(answer / expected - 1) <= tolerance, (answer, expected)


def _check_marginals(expected: Marginals, std: float, answers: list[Marginals]) -> None:
    for answer in answers:
        assert (answer.counts, answer.nonfinite, answer.abs_max) == (expected.counts, 0, expected.abs_max)
        for kind in ("row", "col", "weighted_row", "weighted_col"):
            got, want = getattr(answer, kind), getattr(expected, kind)
            assert (got is None) == (want is None), kind
            if got is not None:
                np.testing.assert_allclose(np.frombuffer(got.m2), np.frombuffer(want.m2), rtol=1e-5)
                np.testing.assert_allclose(np.frombuffer(got.mean), np.frombuffer(want.mean), atol=1e-5 * std, rtol=0)
        assert (answer.cross is None) == (expected.cross is None)
        if answer.cross is not None and expected.cross is not None:
            np.testing.assert_allclose(np.frombuffer(answer.cross), np.frombuffer(expected.cross), atol=1e-5, rtol=0)
