"""The native kernel: the definition's numbers from every bit pattern, the same bits at every SIMD level and split, and
no crash, whatever the arguments and whatever happens to a mapped file meanwhile."""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmfp.errors import BackendError
from llmfp.kernels import load
from llmfp.marginals import Buffer, Chunk, Marginals, Moments, unit_rows

NATIVE, REFERENCE = load("native_cpu"), load("reference")
if reason := NATIVE.why_unavailable():
    pytest.skip(reason, allow_module_level=True)

from llmfp import _native  # noqa: E402

Bits = NDArray[Any]
BITS: dict[str, np.dtype[Any]] = {
    name: np.dtype(f"u{size}")
    for name, size in (("BF16", 2), ("F16", 2), ("F32", 4), ("F64", 8), ("F8_E4M3", 1), ("F8_E5M2", 1))
}
INFINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF << 52, "F8_E4M3": 0x7F, "F8_E5M2": 0x7C}
DTYPES = tuple(BITS)
FAST = DTYPES[:3]
LEVELS = _native.levels()
SHAPES = [(1, 1), (1, 40), (5, 123), (33, 17), (100, 1), (3, 64), (70, 96), (257, 2049), (40, 16448 + 31)]
OPTIONS = ["plain", "col", "row", "cross", "col cross"]
RTOL = 1e-6


def stored(x: NDArray[Any], dtype: str) -> Bits:
    """x in the bits of a stored dtype, truncated where NumPy has no such type."""
    if dtype == "F64":
        return x.astype(np.float64).view(np.uint64)
    if dtype == "F32":
        return x.astype(np.float32).view(np.uint32)
    if dtype == "BF16":
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    half = x.astype(np.float16).view(np.uint16)
    if dtype == "F16":
        return half
    if dtype == "F8_E5M2":
        return (half >> 8).astype(np.uint8)
    magnitude = np.abs(x).astype(np.float64)
    codes = np.searchsorted(E4M3, magnitude, side="right") - 1
    return (codes + np.where(np.signbit(x), 128, 0)).astype(np.uint8)


E4M3 = np.array([m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127])
"""The finite non-negative values of F8_E4M3, in the order of their codes."""


def chunk_of(bits: Bits, dtype: str, option: str = "plain", units: int | None = None, seed: int = 0) -> Chunk:
    """A chunk over bits[rows, cols]; gains like a norm's, some negative, are added as `option` says."""
    rows, cols = bits.shape
    gain = np.random.default_rng(seed).normal(1, 0.5, max(rows, cols)).astype(np.float32)
    return Chunk(
        data=bits.tobytes(),
        dtype=dtype,
        rows=rows,
        cols=cols,
        offset_bytes=0,
        row_stride_bytes=cols * bits.itemsize,
        unit_rows=units or unit_rows(cols),
        col_weight=gain[:cols].tobytes() if "col" in option else None,
        row_weight=gain[:rows].tobytes() if "row" in option else None,
        cross="cross" in option,
    )


def doubles(data: Buffer | None) -> NDArray[np.float64]:
    return np.frombuffer(data or b"", np.float64)


def raw(m: Marginals) -> list[Any]:
    moments = [m.row, m.col, m.weighted_row, m.weighted_col]
    buffers = [bytes(b) for each in moments if each is not None for b in (each.mean, each.m2)]
    return [m.counts, *buffers, m.cross and bytes(m.cross), m.abs_max, m.nonfinite]


def assert_close(got: Moments | None, want: Moments | None, count: NDArray[np.int64] | int, rtol: float) -> None:
    assert (got is None) == (want is None)
    if got is None or want is None:
        return
    std, true = np.sqrt(doubles(got.m2) / count), np.sqrt(doubles(want.m2) / count)
    np.testing.assert_allclose(std, true, rtol=rtol, atol=0)
    scale = true + np.abs(doubles(want.mean))
    error = np.abs(doubles(got.mean) - doubles(want.mean))
    np.testing.assert_array_equal(np.isnan(doubles(got.mean)), np.isnan(doubles(want.mean)))
    assert np.all((error <= rtol * scale) | np.isnan(error))


def define(chunk: Chunk) -> Marginals:
    """The reference, which may warn about what a test puts into it on purpose."""
    with np.errstate(all="ignore"):
        return REFERENCE.marginals(chunk)


def assert_as_defined(chunk: Chunk, rtol: float = RTOL) -> Marginals:
    """Native against reference: every std and mean, cross products against the size of their terms."""
    got, want = NATIVE.marginals(chunk), define(chunk)
    assert (got.counts, got.abs_max, got.nonfinite) == (want.counts, want.abs_max, want.nonfinite)
    rows = np.repeat(np.array(want.counts), chunk.cols)
    assert_close(got.row, want.row, chunk.cols, rtol)
    assert_close(got.weighted_row, want.weighted_row, chunk.cols, rtol)
    assert_close(got.col, want.col, rows, rtol)
    assert_close(got.weighted_col, want.weighted_col, rows, rtol)
    assert (got.cross is None) == (want.cross is None)
    if want.cross is not None:
        centre = np.sqrt(np.nanmax(np.square(doubles((want.weighted_row or want.row).mean)), initial=0))
        size = rows * centre * want.abs_max
        ours, true = doubles(got.cross), doubles(want.cross)
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(true))
        assert np.all((np.abs(ours - true) <= rtol * size) | np.isnan(true))
    for nan in doubles(got.row.mean)[np.isnan(doubles(got.row.mean))]:
        assert nan.tobytes() == np.float64(np.nan).tobytes()
    return got


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("LLMFP_SIMD", request.param)
    assert NATIVE.describe() == request.param
    yield request.param
    monkeypatch.undo()
    NATIVE.describe()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes(dtype: str, option: str) -> None:
    for rows, cols in SHAPES:
        x = np.random.default_rng(rows + cols).normal(0.001, 0.02, (rows, cols))
        assert_as_defined(chunk_of(stored(x, dtype), dtype, option, units=64), 1e-9 if dtype == "F64" else RTOL)


def _matrices() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((96, 200))
    row, col = x.copy(), x.copy()
    row[41] += 1e4
    col[:, 77] += 1e4
    dead = x.copy()
    dead[:, 60:90], dead[10:20] = 0, 0
    hidden = np.where(rng.random((96, 200)) < 0.5, -(2.0**-80), 2.0**-80)
    hidden[:, 3] = 1.0
    hidden_row, hidden_col = x.copy(), x.copy()
    hidden_row[7] = np.where(np.arange(200) % 2, 2.0**-80, -(2.0**-80))
    hidden_col[:, 7] = np.where(np.arange(96) % 2, 2.0**-80, -(2.0**-80))
    return {
        "huge mean": x + 1e4,
        "one row far off": row,
        "one column far off": col,
        "mean of four std": x + 4,
        "constant": np.full((96, 200), 0.3),
        "zero": np.zeros((96, 200)),
        "negative zero": np.full((96, 200), -0.0),
        "both signs of one value": np.where(x < 0, -0.3, 0.3),
        "dead rows and columns": dead,
        "heavy tails": rng.standard_t(1.5, (96, 200)),
        "squares that underflow": hidden,
        "a row whose squares underflow": hidden_row,
        "a column whose squares underflow": hidden_col,
        "subnormal": x * 1e-40,
        "huge": x * 1e37,
        "tiny": x * 1e-20,
    }


MATRICES = _matrices()


@pytest.mark.parametrize("name", MATRICES)
def test_difficult_values(name: str) -> None:
    for dtype in ("BF16", "F32", "F64"):
        for option in OPTIONS:
            assert_as_defined(chunk_of(stored(MATRICES[name], dtype), dtype, option, units=64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_nan_and_infinity_spoil_their_row_and_column_alone(dtype: str, option: str) -> None:
    bits = stored(np.random.default_rng(2).standard_normal((130, 150)), dtype)
    infinite = INFINITE[dtype]
    for row, col, code in ((3, 5, infinite), (3, 149, infinite | 1), (70, 31, infinite)):
        bits[row, col] = code
    bits[71, 33] = infinite | 1 | 1 << (8 * bits.itemsize - 1)
    got = assert_as_defined(chunk_of(bits, dtype, option, units=64))
    assert got.nonfinite == 4
    assert np.flatnonzero(np.isnan(doubles(got.row.m2))).tolist() == [3, 70, 71]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.usefixtures("level")
def test_every_code_is_decoded(dtype: str) -> None:
    """One code per row: the row's mean is its value. Below, each finite code beside its negative: the fast path."""
    codes = np.arange(1 << 8 * BITS[dtype].itemsize, dtype=np.uint32).astype(BITS[dtype])
    got = assert_as_defined(chunk_of(codes[:, None], dtype, units=64))
    true = define(chunk_of(codes[:, None], dtype, units=64))
    assert bytes(got.row.mean) == bytes(true.row.mean)
    finite = codes[np.isfinite(doubles(true.row.mean))]
    sign = codes.dtype.type(1 << (8 * codes.itemsize - 1))
    assert_as_defined(chunk_of(np.repeat(np.stack([finite, finite ^ sign], 1), 17, axis=1), dtype, "plain", units=64))


@pytest.mark.parametrize("dtype", FAST)
def test_the_ends_of_the_fast_range(dtype: str) -> None:
    x = np.random.default_rng(8).standard_normal((64, 96))
    for exponent in (-126, -64, -52, -50, -48, 14, 58, 60, 62, 120):
        with np.errstate(over="ignore"):
            assert_as_defined(chunk_of(stored(x * 2.0**exponent, dtype), dtype))


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-30, 1e-17, 1e17, 1e30, 1e38])
@pytest.mark.parametrize("option", ["col cross", "row"])
def test_extreme_gains(scale: float, option: str) -> None:
    for dtype in ("BF16", "F8_E4M3", "F64"):
        chunk = chunk_of(stored(np.random.default_rng(9).standard_normal((64, 96)), dtype), dtype, option)
        name = "col_weight" if chunk.col_weight is not None else "row_weight"
        gain = np.frombuffer(getattr(chunk, name), np.float32) * np.float32(scale)
        assert_as_defined(replace(chunk, **{name: gain.tobytes()}))


@pytest.mark.parametrize("option", ["col", "row"])
def test_products_that_overflow_are_nan(option: str) -> None:
    x = np.full((64, 40), 1.0)
    x[5, 7] = 1e300
    chunk = chunk_of(stored(x, "F64"), "F64", option)
    name = f"{option}_weight"
    gain = np.full(64 if option == "row" else 40, 1e30, np.float32).tobytes()
    assert_as_defined(replace(chunk, **{name: gain}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_simd_level_gives_the_same_bits(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    matrices = [rng.normal(0.001, 0.02, shape) for shape in [(5, 123), (33, 17), (100, 1), (97, 2049), (3, 16448)]]
    matrices += [MATRICES[name] for name in ("one column far off", "heavy tails", "huge mean")]
    for x in matrices:
        bits = stored(x, dtype)
        for option in OPTIONS:
            chunk, seen = chunk_of(bits, dtype, option, units=64), []
            for each in LEVELS:
                monkeypatch.setenv("LLMFP_SIMD", each)
                one = NATIVE.marginals(chunk)
                seen.append((raw(one), raw(NATIVE.merge([one]))))
            assert all(other == seen[0] for other in seen)


def test_non_finite_bits_are_the_same_at_every_level(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = np.random.default_rng(12).integers(0, 1 << 16, (64, 333)).astype(np.uint16)
    seen = []
    for each in LEVELS:
        monkeypatch.setenv("LLMFP_SIMD", each)
        seen.append([raw(NATIVE.marginals(chunk_of(bits, "BF16", option))) for option in OPTIONS])
    assert all(other == seen[0] for other in seen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_offset_stride_and_splits_change_no_bit(dtype: str, option: str) -> None:
    bits = stored(np.random.default_rng(13).normal(0, 0.02, (200, 101)), dtype)
    bits[150, 3] = INFINITE[dtype]  # the third unit takes the exact path
    chunk = chunk_of(bits, dtype, option, units=64)
    whole = NATIVE.marginals(chunk)
    stride, offset = 101 * bits.itemsize + 13, 7
    spread = bytearray(b"\x55" * (offset + 200 * stride))
    for i, row in enumerate(bits):
        spread[offset + i * stride : offset + i * stride + row.nbytes] = row.tobytes()
    moved = replace(chunk, data=memoryview(spread), offset_bytes=offset, row_stride_bytes=stride)
    assert raw(NATIVE.marginals(moved)) == raw(whole)
    merged = raw(NATIVE.merge([whole]))
    for edges in ([0, 64, 200], [0, 128, 200], [0, 64, 128, 192, 200]):
        parts = []
        for a, b in pairwise(edges):
            weight = None if chunk.row_weight is None else chunk.row_weight[4 * a : 4 * b]
            parts.append(
                NATIVE.marginals(replace(moved, rows=b - a, offset_bytes=offset + a * stride, row_weight=weight))
            )
        assert raw(NATIVE.merge(parts)) == merged
    assert_close(NATIVE.merge([whole]).col, REFERENCE.merge([define(chunk)]).col, 200, RTOL)


def test_nothing_is_read_behind_the_last_element(tmp_path: Path) -> None:
    """It ends where its page does, and the next page is gone: reading there would be an OSError."""
    page = mmap.PAGESIZE
    content = np.random.default_rng(14).integers(0, 100, page).astype(np.uint8).tobytes()
    path = tmp_path / "weights"
    path.write_bytes(content * 2)
    with path.open("r+b") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        file.truncate(page)
        for dtype in DTYPES:
            item = BITS[dtype].itemsize
            for cols in (1, 31, 33, 64, 65, 100):
                chunk = Chunk(mapped, dtype, 3, cols, page - 3 * cols * item, cols * item, 32)
                for option in ({}, {"cross": True}):
                    expected = NATIVE.marginals(replace(chunk, data=content, **option))
                    assert raw(NATIVE.marginals(replace(chunk, **option))) == raw(expected)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 0},
        {"cols": 0},
        {"rows": -1},
        {"cols": -1},
        {"unit_rows": 0},
        {"offset_bytes": -1},
        {"offset_bytes": 1},
        {"offset_bytes": 2**63 - 1},
        {"row_stride_bytes": -1},
        {"row_stride_bytes": 0},
        {"row_stride_bytes": 15},
        {"row_stride_bytes": 17},
        {"row_stride_bytes": 2**63 - 1},
        {"rows": 5},
        {"rows": 2**62, "row_stride_bytes": 4},
        {"rows": 2**62 + 1, "cols": 1, "row_stride_bytes": 4},
        {"rows": 2**63 - 1, "row_stride_bytes": 2**63 - 1},
        {"cols": 5},
        {"cols": 2**62},
        {"cols": 2**63 - 1},
        {"dtype": "I8"},
        {"data": b""},
        {"col_weight": bytes(12)},
        {"row_weight": bytes(20)},
        {"col_weight": bytes(16), "row_weight": bytes(16)},
        {"row_weight": bytes(16), "cross": True},
    ],
)
def test_arguments_that_reach_outside_are_refused(change: dict[str, Any]) -> None:
    chunk = Chunk(bytes(64), "F32", 4, 4, 0, 16, 32)
    NATIVE.marginals(chunk)
    taken = [name for name in chunk.__slots__ if name not in ("col_runs", "run_cols", "run_bytes")]  # one run at a time
    arguments = {name: getattr(replace(chunk, **change), name) for name in taken}
    with pytest.raises(ValueError, match=r"\w"):
        _native.marginals(LEVELS[0], *arguments.values())


def test_merging_pooling_and_copying_refuse_what_does_not_fit() -> None:
    eight, level = bytes(8), LEVELS[0]
    for call in (
        lambda: _native.merge(level, []),
        lambda: _native.merge(level, [((), b"", b"")]),
        lambda: _native.merge(level, [((1,), eight, b"")]),
        lambda: _native.merge(level, [((1,), eight, eight), ((1,), eight * 2, eight * 2)]),
        lambda: _native.merge(level, [((0,), eight, eight)]),
        lambda: _native.merge("sse", [((1,), eight, eight)]),
        lambda: _native.add([eight], 2),
        lambda: _native.add([eight], 0),
        lambda: _native.pool(eight, eight * 2, 1, 1),
        lambda: _native.pool(eight, eight, 1, 2),
        lambda: _native.pool(eight, eight, 1, 0),
        lambda: _native.log_rms(eight, eight, 0, None, None, 0.0),
        lambda: _native.log_rms(eight, eight, 1, eight, None, 0.0),
        lambda: _native.log_rms(eight, eight, 1, None, bytes(4), 0.0),
        lambda: _native.copy(eight, 1, bytearray(8)),
        lambda: _native.copy(eight, -1, bytearray(1)),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            call()
    with pytest.raises(BufferError):
        _native.copy(eight, 0, bytes(8))


def test_an_unavailable_level_is_refused_with_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFP_SIMD", "sse9")
    with pytest.raises(BackendError, match="sse9") as error:
        NATIVE.marginals(Chunk(bytes(4), "F32", 1, 1, 0, 4, 32))
    assert LEVELS[0] in error.value.hint


def test_log_rms_rounds_as_numpy_does() -> None:
    """Squares that put half a logarithm on, and next to, every float16 boundary between -11 and 11."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    halves = np.unique(halves[np.abs(halves) < 11])
    middles = (halves[1:] + halves[:-1]) / 2
    wanted = np.concatenate([halves, np.nextafter(middles, 99) * (1 + 1e-12), np.nextafter(middles, -99) * (1 - 1e-12)])
    mean = np.concatenate([np.exp(wanted), [0.0, 1e-300, 1e-160, 1e150, np.nan, 5e-324]])
    moments = Moments(mean.tobytes(), bytes(8 * mean.size))
    got, true = (np.frombuffer(b.log_rms(moments, 3), np.float16) for b in (NATIVE, REFERENCE))
    np.testing.assert_array_equal(got, true)
    assert np.isneginf(got[wanted.size])


def test_log_rms_with_weights_and_centring() -> None:
    rng = np.random.default_rng(15)
    moments = Moments(rng.normal(0, 1, 999).tobytes(), rng.uniform(0, 99, 999).tobytes())
    weight, cross = rng.normal(1, 0.5, 999).astype(np.float32).tobytes(), rng.normal(0, 9, 999).tobytes()
    for arguments in ((weight,), (None, cross, 0.5), (weight, cross, 0.5), (weight, cross, -99.0)):
        got, true = (np.frombuffer(b.log_rms(moments, 64, *arguments), np.float16) for b in (NATIVE, REFERENCE))
        np.testing.assert_array_equal(got, true)


def test_pool_and_merge_agree_with_the_definition() -> None:
    rng = np.random.default_rng(16)
    moments = Moments(rng.normal(0, 1, 960).tobytes(), rng.uniform(0, 99, 960).tobytes())
    for block in (1, 2, 3, 5, 64, 960):
        got, true = NATIVE.pool(moments, 50, block), REFERENCE.pool(moments, 50, block)
        np.testing.assert_allclose(doubles(got.mean), doubles(true.mean), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(doubles(got.m2), doubles(true.m2), rtol=1e-12)
    chunk = chunk_of(stored(rng.standard_normal((150, 70)), "F64"), "F64", "col cross", units=32)
    part = define(chunk)
    assert raw(NATIVE.merge([part, part])) == raw(REFERENCE.merge([part, part]))


def test_an_infinite_pool_is_the_one_canonical_nan() -> None:
    infinite = np.array([np.inf, -np.inf])
    pooled = NATIVE.pool(Moments(infinite.tobytes(), infinite.tobytes()), 1, 2)
    assert bytes(pooled.mean) == bytes(pooled.m2) == np.float64(np.nan).tobytes()


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("call", ["marginals", "copy"])
def test_a_file_that_shrinks_under_the_reader_is_an_error(tmp_path: Path, call: str, in_thread: bool) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    caught: list[OSError] = []

    def read() -> None:
        try:
            if call == "copy":
                _native.copy(mapped, 0, bytearray(len(mapped)))
            else:
                NATIVE.marginals(Chunk(memoryview(mapped), "BF16", 512, 1024, 0, 2048, 64))
        except OSError as error:
            caught.append(error)

    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        read()
        assert not caught
        file.truncate(300_000)
        for attempt in (1, 2):
            if in_thread:
                thread = threading.Thread(target=read)
                thread.start()
                thread.join()
            else:
                read()
            assert [error.errno for error in caught] == [errno.EIO] * attempt
    NATIVE.marginals(Chunk(bytes(64), "F32", 4, 4, 0, 16, 32))


def test_the_gil_is_released() -> None:
    """Another thread counts while this one is inside one long call: it cannot have waited for the call to end."""
    bits = np.zeros((4096, 4096), np.uint16)
    chunk = chunk_of(bits, "BF16", "col cross")
    counted, inside, done = 0, threading.Event(), threading.Event()

    def count() -> None:
        nonlocal counted
        inside.wait()
        while not done.is_set():
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    inside.set()
    before = counted
    for _ in range(50):
        NATIVE.marginals(chunk)
        if counted > before:
            break
    during = counted
    done.set()
    thread.join()
    assert during > before
