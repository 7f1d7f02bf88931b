"""The C++ kernel: every SIMD level gives the same bits, every code its exact value, and no input brings it down."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmfp.api import scan
from llmfp.errors import BackendError
from llmfp.kernels import Backend, load
from llmfp.marginals import Chunk
from tests.checkpoints import as_bf16, write_model
from tests.test_kernels import REFERENCE, doubles, part, raw

native = load("native_cpu")
pytestmark = pytest.mark.skipif(native.why_unavailable() is not None, reason=str(native.why_unavailable()))

if native.why_unavailable() is None:
    from llmfp import _native

    LEVELS = _native.levels()
else:
    LEVELS = ("scalar",)

DTYPES = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32, "F64": np.float64}
DTYPES |= {"F8_E4M3": np.uint8, "F8_E5M2": np.uint8}


@pytest.fixture
def level(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    yield lambda name: monkeypatch.setenv("LLMFP_SIMD", name)
    monkeypatch.delenv("LLMFP_SIMD", raising=False)


def ordinary(dtype: str, rows: int, cols: int, seed: int = 0) -> NDArray[Any]:
    """Stored bits of normal values, std about 0.02 (for fp8 about 20: its range is small)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 0.02, (rows, cols))
    if dtype == "BF16":
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype == "F16":
        return x.astype(np.float16).view(np.uint16)
    if dtype.startswith("F8"):
        return rng.integers(0, 0x70, (rows, cols)).astype(np.uint8) | (rng.integers(0, 2, (rows, cols)) << 7).astype(
            np.uint8
        )
    return x.astype(DTYPES[dtype])


def chunk_of(bits: NDArray[Any], dtype: str, unit: int = 32, *, offset: int = 0, pad: int = 0, **more: Any) -> Chunk:
    """The bits in a buffer that starts `offset` bytes early and has `pad` bytes behind every row."""
    rows, cols = bits.shape
    line = b"".join(row.tobytes() + b"\xa5" * pad for row in bits)
    return Chunk(b"\x5a" * offset + line, dtype, rows, cols, offset, cols * bits.itemsize + pad, unit, **more)


def weights(kind: str, rows: int, cols: int) -> dict[str, Any]:
    gain = np.random.default_rng(1).uniform(0.5, 2, rows if kind == "row" else cols).astype(np.float32).tobytes()
    return {"none": {"cross": True}, "col": {"col_weight": gain, "cross": True}, "row": {"row_weight": gain}}[kind]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 123), (33, 17), (100, 1), (70, 2049)])
@pytest.mark.parametrize("kind", ["none", "col", "row"])
def test_every_level_gives_the_same_bits_near_the_reference(
    dtype: str, rows: int, cols: int, kind: str, level: Any
) -> None:
    chunk = chunk_of(ordinary(dtype, rows, cols), dtype, offset=3, pad=5, **weights(kind, rows, cols))
    results = []
    for name in LEVELS:
        level(name)
        results.append(native.marginals(chunk))
        assert native.describe() == name
    assert all(raw(each) == raw(results[0]) for each in results)
    assert_close(native, chunk)


def assert_close(backend: Backend, chunk: Chunk, rel: float = 1e-6) -> None:
    """Every std of rows, columns and weighted matrix within `rel` of the definition."""
    got, want = backend.marginals(chunk), REFERENCE.marginals(chunk)
    assert (got.abs_max, got.nonfinite, got.counts) == (want.abs_max, want.nonfinite, want.counts)
    for mine, true in zip(
        (got.row, got.col, got.weighted_row, got.weighted_col),
        (want.row, want.col, want.weighted_row, want.weighted_col),
        strict=True,
    ):
        if true is None or mine is None:
            assert mine is true is None
            continue
        std = np.sqrt(doubles(true.m2))
        assert np.sqrt(doubles(mine.m2)) == pytest.approx(std, rel=rel, nan_ok=True)
        scale = np.nanmax(np.abs(doubles(true.mean)), initial=1e-300) + np.nanmax(std, initial=0.0)
        assert doubles(mine.mean) == pytest.approx(doubles(true.mean), abs=1e-6 * scale, nan_ok=True)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_every_code_has_its_exact_value(dtype: str, level: Any) -> None:
    """Rows of equal codes: the row's mean is the code's value, exactly, and NaN where it is not finite."""
    codes = np.arange(1 << (8 * DTYPES[dtype](0).itemsize)).astype(DTYPES[dtype])
    for name in LEVELS:
        level(name)
        for rows in np.array_split(codes, max(1, len(codes) // 4096)):
            chunk = chunk_of(np.repeat(rows[:, None], 2, axis=1), dtype, 32)
            got, want = native.marginals(chunk), REFERENCE.marginals(chunk)
            assert bytes(got.row.mean) == bytes(want.row.mean)
            assert bytes(got.row.m2) == bytes(want.row.m2)
            assert (got.abs_max, got.nonfinite) == (want.abs_max, want.nonfinite)


def hard(kind: str) -> NDArray[np.float32]:
    """float32 matrices that plain float32 sums would get wrong."""
    rng = np.random.default_rng(5)
    x = rng.normal(0, 1, (64, 700))
    if kind == "offset":
        x += 1e4
    elif kind == "one row offset":
        x[17] += 1e4
    elif kind == "one column offset":
        x[:, 5] += 1e4
    elif kind == "constant":
        x[:] = 0.1
    elif kind == "two values":
        x = np.where(rng.random(x.shape) < 0.5, 0.1, -0.1)
    elif kind == "zero":
        x[:] = 0
    elif kind == "zero rows and columns":
        x[3], x[:, 9] = 0, 0
    elif kind == "huge":
        x *= 1e30
    elif kind == "tiny":
        x *= 1e-30
    elif kind == "tiny row":
        x[11] *= 1e-25
    elif kind == "subnormal":
        x *= 1e-40
    elif kind == "heavy tail":
        x = rng.standard_cauchy(x.shape)
    return x.astype(np.float32)


@pytest.mark.parametrize(
    "kind",
    [
        "offset", "one row offset", "one column offset", "constant", "two values", "zero", "zero rows and columns",
        "huge", "tiny", "tiny row", "subnormal", "heavy tail",
    ],
)  # fmt: skip
@pytest.mark.parametrize("weight", ["none", "col", "row"])
def test_hard_values_keep_their_digits(kind: str, weight: str, level: Any) -> None:
    chunk = chunk_of(hard(kind), "F32", 32, **weights(weight, 64, 700))
    results = set()
    for name in LEVELS:
        level(name)
        results.add(b"".join(raw(native.marginals(chunk))))
    assert len(results) == 1
    assert_close(native, chunk)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"])
def test_non_finite_elements_void_their_rows_and_columns_only(dtype: str) -> None:
    bits = ordinary(dtype, 70, 90)
    not_a_number = {"BF16": 0x7FC1, "F16": 0xFE00, "F8_E4M3": 0xFF, "F8_E5M2": 0x7C}.get(dtype, np.nan)
    bits[40, 8] = bits[3, 5] = bits[3, 60] = not_a_number
    chunk = chunk_of(bits, dtype, 32)
    got = native.marginals(chunk)
    assert got.nonfinite == 3
    assert set(np.flatnonzero(np.isnan(doubles(got.row.mean)))) == {3, 40}
    assert set(map(tuple, np.argwhere(np.isnan(doubles(got.col.m2).reshape(3, 90))))) == {(0, 5), (0, 60), (1, 8)}
    assert_close(native, chunk)
    voids = doubles(got.row.mean)[[3, 40]].view(np.uint64)
    assert set(voids) == {0x7FF8000000000000}


def test_parts_of_a_chunk_merge_to_the_same_bits() -> None:
    chunk = chunk_of(ordinary("BF16", 300, 129), "BF16", 64, **weights("row", 300, 129))
    parts = [native.marginals(part(chunk, a, b)) for a, b in ((0, 64), (64, 256), (256, 300))]
    assert raw(native.merge(parts)) == raw(native.merge([native.marginals(chunk)]))


def test_merge_and_pool_equal_the_reference() -> None:
    chunk = chunk_of(ordinary("F32", 160, 75), "F32", 32, cross=True)
    parts = [native.marginals(part(chunk, a, a + 32)) for a in range(0, 160, 32)]
    mine, true = native.merge(parts), REFERENCE.merge(parts)
    for a, b in zip(raw(mine), raw(true), strict=True):
        assert np.frombuffer(a) == pytest.approx(np.frombuffer(b), rel=1e-12, abs=1e-15)
    pooled, wanted = native.pool(mine.row, 75, 40), REFERENCE.pool(true.row, 75, 40)
    assert doubles(pooled.m2) == pytest.approx(doubles(wanted.m2), rel=1e-12)


def test_half_precision_profiles_round_as_numpy_does() -> None:
    squares = np.exp(np.random.default_rng(2).uniform(-90, 90, 4096))
    squares[:4] = 0.0, np.inf, np.nan, 1.0
    from llmfp.marginals import Moments

    moments = Moments(np.zeros(4096).tobytes(), squares.tobytes())
    with np.errstate(divide="ignore"):
        want = (0.5 * np.log(squares)).astype(np.float16)
    got = np.frombuffer(native.log_rms(moments, 1), np.float16)
    assert np.array_equal(got, want, equal_nan=True)


def test_a_mapped_file_that_shrinks_is_an_error_in_any_thread(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        os.truncate(path, 4096)
        chunk = Chunk(mapped, "BF16", 256, 2048, 0, 4096, 256)  # type: ignore[arg-type]
        errors: list[BaseException] = []

        def reduce() -> None:
            try:
                native.marginals(chunk)
            except OSError as error:
                errors.append(error)

        threads = [threading.Thread(target=reduce) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        reduce()
        assert len(errors) == 4
        with pytest.raises(OSError, match="shrank"):
            _native.copy(mapped, 0, bytearray(1 << 20))
        with pytest.raises(OSError, match="Input/output"):
            _native.populate(mapped, 0, 1 << 20)
        assert native.marginals(replace(chunk, rows=1)).nonfinite == 0


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 0}, {"cols": 0}, {"unit_rows": 0}, {"rows": -1}, {"cols": 1 << 62}, {"rows": 1 << 62},
        {"offset_bytes": -1}, {"offset_bytes": 1 << 62}, {"offset_bytes": 65}, {"row_stride_bytes": 1 << 62},
        {"row_stride_bytes": 1}, {"row_stride_bytes": -64}, {"rows": 5}, {"cols": 17}, {"dtype": "I8"},
        {"col_weight": bytes(60)}, {"row_weight": bytes(64)},
        {"row_weight": bytes(16), "cross": True}, {"row_weight": bytes(16), "col_weight": bytes(64)},
    ],
)  # fmt: skip
def test_a_chunk_that_reaches_outside_its_buffers_is_refused(change: dict[str, Any]) -> None:
    good = Chunk(bytes(4 * 16 * 4), "F32", 4, 16, 0, 64, 32)
    native.marginals(good)
    with pytest.raises((ValueError, OverflowError)):
        native.marginals(replace(good, **change))


def test_other_threads_run_while_a_chunk_is_reduced() -> None:
    """With the GIL held for the whole call, the flag could only be set before or after it."""
    x = np.zeros((1024, 16384), np.float32)
    chunk = Chunk(memoryview(x).cast("B"), "F32", 1024, 16384, 0, 65536, 64)
    began, ended, seen = threading.Event(), threading.Event(), []

    def watch() -> None:
        began.wait()
        while not ended.is_set():
            seen.append(ended.is_set())

    thread = threading.Thread(target=watch)
    thread.start()
    began.set()
    for _ in range(3):
        native.marginals(chunk)
    ended.set()
    thread.join()
    assert len(seen) > 10


def test_the_environment_forces_a_level_and_an_unknown_one_is_refused(level: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        f"model.layers.0.self_attn.{role}_proj.weight": as_bf16(rng.normal(size=(96, 96)).astype(np.float32))
        for role in "qkvo"
    }
    source = write_model(tmp_path, tensors)
    digests = set()
    for name in LEVELS:
        level(name)
        fingerprint = scan(source, backend="native_cpu")
        assert fingerprint.run["simd"] == name
        digests.add(fingerprint.digest)
    assert len(digests) == 1
    level("sse9")
    with pytest.raises(BackendError, match="LLMFP_SIMD=sse9"):
        scan(source, backend="native_cpu")
