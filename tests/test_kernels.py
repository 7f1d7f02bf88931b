"""What every back end must do, whoever wrote it: agree with the definition, split anywhere, merge in any grouping."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmfp.errors import BackendError
from llmfp.kernels import BACKENDS, Backend, load, select
from llmfp.kernels.reference import decode
from llmfp.marginals import MAX_UNIT_ROWS, MIN_UNIT_ROWS, UNIT_ELEMENTS, Buffer, Chunk, Marginals, Moments, unit_rows

REFERENCE = load("reference")
STORED = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def chunk_of(x: NDArray[Any], dtype: str, units: int = 32, **more: Any) -> Chunk:
    """A chunk that holds exactly x, stored as F64, F32, F16 or BF16 (truncated)."""
    if dtype == "BF16":
        stored: NDArray[Any] = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    else:
        stored = x.astype(STORED[dtype])
    rows, cols = x.shape
    return Chunk(stored.tobytes(), dtype, rows, cols, 0, cols * stored.itemsize, units, **more)


def part(chunk: Chunk, start: int, stop: int) -> Chunk:
    """Rows start to stop of a chunk, over the same buffer."""
    weight = None if chunk.row_weight is None else chunk.row_weight[4 * start : 4 * stop]
    offset = chunk.offset_bytes + start * chunk.row_stride_bytes
    return replace(chunk, rows=stop - start, offset_bytes=offset, row_weight=weight)


def doubles(data: Buffer | None) -> NDArray[np.float64]:
    assert data is not None
    return np.frombuffer(data, np.float64)


def total_std(backend: Backend, marginals: Marginals, cols: int) -> float:
    rows = sum(marginals.counts)
    return math.sqrt(doubles(backend.pool(marginals.row, cols, rows).m2)[0] / (rows * cols))


def raw(marginals: Marginals) -> list[bytes]:
    """Every array of the marginals, to compare bit for bit."""
    moments = (marginals.row, marginals.col, marginals.weighted_row, marginals.weighted_col)
    arrays = [b for m in moments if m is not None for b in (m.mean, m.m2)]
    return [bytes(b) for b in (*arrays, marginals.cross or b"")]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 123), (33, 17), (70, 256)])
@pytest.mark.parametrize("weight", ["none", "col", "row"])
def test_every_std_is_within_tolerance_of_the_definition(
    backend: Backend, dtype: str, rows: int, cols: int, weight: str
) -> None:
    rng = np.random.default_rng(rows * cols)
    more: dict[str, Any] = {"cross": weight != "row"}
    if weight != "none":
        more[f"{weight}_weight"] = rng.uniform(0.5, 2, cols if weight == "col" else rows).astype(np.float32).tobytes()
    chunk = chunk_of(rng.normal(0.001, 0.02, (rows, cols)), dtype, **more)
    got, want = backend.marginals(chunk), REFERENCE.marginals(chunk)
    assert got.counts == want.counts
    assert (got.abs_max, got.nonfinite) == (want.abs_max, want.nonfinite)
    pairs: list[tuple[Moments | None, Moments | None]] = [(got.row, want.row), (got.col, want.col)]
    pairs += [(got.weighted_row, want.weighted_row), (got.weighted_col, want.weighted_col)]
    for mine, true in pairs:
        assert (mine is None) == (true is None)
        if mine is not None and true is not None:
            assert np.sqrt(doubles(mine.m2)) == pytest.approx(np.sqrt(doubles(true.m2)), rel=1e-6, abs=1e-12)
            assert doubles(mine.mean) == pytest.approx(doubles(true.mean), rel=1e-6, abs=1e-8)
    if want.cross is not None:
        assert doubles(got.cross) == pytest.approx(doubles(want.cross), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_a_mean_ten_thousand_times_the_std_costs_no_precision(backend: Backend, dtype: str) -> None:
    x = np.random.default_rng(3).normal(1e4, 1.0, (64, 96))
    chunk = chunk_of(x, dtype)
    stored = x.astype(STORED[dtype]).astype(np.float64)
    assert total_std(backend, backend.marginals(chunk), 96) == pytest.approx(stored.std(), rel=1e-6)


def test_float64_input_keeps_nine_digits(backend: Backend) -> None:
    x = np.random.default_rng(4).normal(10.0, 1.0, (64, 96))
    assert total_std(backend, backend.marginals(chunk_of(x, "F64")), 96) == pytest.approx(x.std(), rel=1e-9)


@given(seed=st.integers(0, 2**32 - 1), cuts=st.sets(st.integers(1, 5)), rows=st.integers(161, 192))
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("name", ["native_cpu", "torch_fallback", "reference"])
def test_splitting_at_units_and_merging_changes_no_bit(name: str, seed: int, cuts: set[int], rows: int) -> None:
    backend = load(name)
    if reason := backend.why_unavailable():
        pytest.skip(reason)
    rng = np.random.default_rng(seed)
    gain = rng.uniform(0.5, 2, 37).astype(np.float32).tobytes()
    chunk = chunk_of(rng.normal(0, 0.02, (rows, 37)), "F32", col_weight=gain, cross=True)
    edges = [0, *(32 * cut for cut in sorted(cuts)), rows]
    parts = [backend.marginals(part(chunk, a, b)) for a, b in itertools.pairwise(edges)]
    whole = backend.merge([backend.marginals(chunk)])
    assert raw(backend.merge(parts)) == raw(whole)
    grown = backend.merge(parts[:1])
    for each in parts[1:]:
        grown = backend.merge([grown, each])
    assert raw(grown) == raw(whole)
    assert grown.counts == whole.counts == (rows,)


def test_merging_is_associative_to_rounding(backend: Backend) -> None:
    rng = np.random.default_rng(6)
    a, b, c = (backend.marginals(chunk_of(rng.normal(k, 1, (32, 48)), "F32")) for k in (0, 3, -5))
    left, right = backend.merge([backend.merge([a, b]), c]), backend.merge([a, backend.merge([b, c])])
    assert doubles(left.col.mean) == pytest.approx(doubles(right.col.mean), rel=1e-12, abs=1e-12)
    assert doubles(left.col.m2) == pytest.approx(doubles(right.col.m2), rel=1e-12)
    assert bytes(left.row.m2) == bytes(right.row.m2)


@given(exponent=st.integers(-40, 40), sign=st.sampled_from([-1.0, 1.0]))
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("name", ["native_cpu", "torch_fallback", "reference"])
def test_scaling_by_a_power_of_two_scales_the_std_exactly(name: str, exponent: int, sign: float) -> None:
    backend = load(name)
    if reason := backend.why_unavailable():
        pytest.skip(reason)
    x = np.random.default_rng(7).normal(0.1, 1, (40, 50)).astype(np.float32)
    scale = sign * 2.0**exponent
    plain = total_std(backend, backend.marginals(chunk_of(x, "F32")), 50)
    scaled = total_std(backend, backend.marginals(chunk_of(x * np.float32(scale), "F32")), 50)
    assert scaled == pytest.approx(abs(scale) * plain, rel=1e-7)


def test_pooling_gives_the_std_of_every_head(backend: Backend) -> None:
    x = np.random.default_rng(8).normal(0.3, 1, (96, 40))
    marginals = backend.marginals(chunk_of(x, "F64", units=96))
    pooled = backend.pool(marginals.row, 40, 24)
    for head in range(4):
        block = x[24 * head : 24 * (head + 1)]
        assert doubles(pooled.mean)[head] == pytest.approx(block.mean(), rel=1e-9)
        assert math.sqrt(doubles(pooled.m2)[head] / block.size) == pytest.approx(block.std(), rel=1e-9)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_log_rms_is_that_of_the_effective_matrix(backend: Backend, centred: bool, weighted: bool) -> None:
    rng = np.random.default_rng(9)
    x = rng.normal(0.5, 1, (64, 40)).astype(np.float32).astype(np.float64)
    gain = rng.uniform(0.5, 2, 40).astype(np.float32)
    weight = gain.tobytes() if weighted else None
    marginals = backend.merge([backend.marginals(chunk_of(x, "F32", col_weight=weight, cross=centred))])
    effective = x * gain if weighted else x
    square = 0.0
    if centred:
        centres = effective.mean(axis=1)
        effective, square = effective - centres[:, None], float(np.square(centres).mean())
    got = backend.log_rms(marginals.col, 64, weight, marginals.cross, square)
    want = 0.5 * np.log(np.square(effective).mean(axis=0))
    assert np.frombuffer(got, np.float16) == pytest.approx(want, abs=2e-3)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("weight", ["none", "col", "row"])
def test_expanding_gives_every_element_times_its_weight(backend: Backend, dtype: str, weight: str) -> None:
    """A part of a chunk whose rows lie apart; NaN where an element is not finite, and nowhere else."""
    x = np.random.default_rng(3).normal(size=(9, 531))
    x[4, 7], x[8, 530] = np.inf, np.nan
    gain = {"col": np.linspace(-1, 2, 531, dtype=np.float32), "row": np.linspace(-1, 2, 9, dtype=np.float32)}
    more = {} if weight == "none" else {f"{weight}_weight": gain[weight].tobytes()}
    whole = chunk_of(x, dtype, **more)
    chunk = part(whole, 2, 9)
    values = decode(whole)[2:]
    if weight != "none":
        values = values * (gain["col"] if weight == "col" else gain["row"][2:, None])
    out = np.full((7, 531), np.inf, np.float32)
    backend.expand(chunk, out.data.cast("B"))
    expected = np.where(np.isfinite(values), values, np.nan).astype(np.float32)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"out|size|reshape|broadcast"):
        backend.expand(chunk, bytearray(4 * 7 * 530))


def test_the_unit_depends_on_the_width_alone_and_suits_the_folding_block() -> None:
    for cols in (1, 7, 64, 384, 1024, 4096, 5120, 8192, 16384, 1 << 20):
        rows = unit_rows(cols)
        assert rows % 32 == 0
        assert MIN_UNIT_ROWS <= rows <= MAX_UNIT_ROWS
        assert rows * cols <= max(UNIT_ELEMENTS, MIN_UNIT_ROWS * cols)


def test_every_back_end_says_whether_it_can_run() -> None:
    for name in BACKENDS:
        backend = load(name)
        assert backend.name == name
        reason = backend.why_unavailable()
        assert reason is None or 0 < len(reason) < 200


def test_an_unknown_back_end_is_refused_with_the_list() -> None:
    with pytest.raises(BackendError, match="no back end named 'magic'"):
        select("magic")
