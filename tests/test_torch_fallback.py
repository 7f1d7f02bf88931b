"""Invariants: plain torch agrees with the reference to 1e-9 at any shape, dtype, mean, alignment and slicing, spoils
exactly what a non-finite element took part in, and never widens more than a slice of a unit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmfp.errors import EncodingError
from llmfp.kernels import torch_fallback
from llmfp.kernels.reference import BACKEND as REFERENCE
from llmfp.marginals import Chunk, Marginals
from tests.packing import SCALED, gains, scaled_chunk

RTOL = 1e-9
DTYPES = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
BITS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@pytest.fixture
def backend() -> torch_fallback.TorchFallback:
    backend = torch_fallback.TorchFallback()
    if reason := backend.why_unavailable():
        if "torch_fallback" in os.environ.get("LLMFP_REQUIRE", "").split(","):
            pytest.fail(f"LLMFP_REQUIRE names torch_fallback, which cannot run here: {reason}")
        pytest.skip(reason)
    return backend


def encode(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    """x in a stored dtype, as its bits; an 8-bit float is a random code that is finite, or NaN where x is not."""
    if dtype == "BF16":
        return (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype.startswith("F8"):
        codes = (np.abs(np.nan_to_num(x, posinf=0, neginf=0)) * 1e6).astype(np.int64) % 0x7B
        return np.where(np.isfinite(x), codes | np.where(x < 0, 0x80, 0), 0x7F).astype(np.uint8)
    return np.asarray(x).astype(BITS[dtype])


def chunk_of(
    x: NDArray[Any],
    dtype: str,
    unit_rows: int = 32,
    *,
    col_weight: NDArray[Any] | None = None,
    row_weight: NDArray[Any] | None = None,
    cross: bool = False,
    pad: int = 0,
    offset: int = 0,
) -> Chunk:
    """A chunk of x, each row followed by `pad` bytes and all preceded by `offset`, both of them NaN in any dtype."""
    bits = encode(x, dtype)
    stride = bits.shape[1] * bits.itemsize + pad
    data = np.full(offset + stride * len(x), 0xFF, np.uint8)
    data[offset:].reshape(len(x), stride)[:, : stride - pad] = bits.view(np.uint8).reshape(len(x), -1)
    return Chunk(
        data.tobytes(),
        dtype,
        *x.shape,
        offset,
        stride,
        unit_rows,
        None if col_weight is None else np.asarray(col_weight, np.float32).tobytes(),
        None if row_weight is None else np.asarray(row_weight, np.float32).tobytes(),
        cross,
    )


def assert_agrees(ours: Marginals, truth: Marginals) -> None:
    """Every std and mean within RTOL, plus what float64 itself rounds about a large mean; NaN in the same places."""
    assert ours.counts == truth.counts
    assert (ours.abs_max, ours.nonfinite) == (truth.abs_max, truth.nonfinite)
    for name in ("row", "col", "weighted_row", "weighted_col"):
        mine, theirs = getattr(ours, name), getattr(truth, name)
        assert (mine is None) == (theirs is None), name
        if theirs is None:
            continue
        mean, true_mean = np.frombuffer(mine.mean), np.frombuffer(theirs.mean)
        spread, true_spread = np.sqrt(np.frombuffer(mine.m2)), np.sqrt(np.frombuffer(theirs.m2))
        noise = 1e-13 * np.nanmax(np.abs(true_mean), initial=0.0)
        np.testing.assert_allclose(mean, true_mean, RTOL, noise, equal_nan=True, err_msg=name)
        np.testing.assert_allclose(spread, true_spread, RTOL, noise, equal_nan=True, err_msg=name)
        assert {v.tobytes() for v in mean[np.isnan(mean)]} <= {np.float64(np.nan).tobytes()}
    assert (ours.cross is None) == (truth.cross is None)
    if ours.cross is not None and truth.cross is not None:
        true_cross = np.frombuffer(truth.cross)
        scale = 1e-12 * sum(truth.counts) * truth.abs_max**2
        np.testing.assert_allclose(np.frombuffer(ours.cross), true_cross, RTOL, scale, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (5, 123), (33, 17), (257, 130), (96, 3000)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", ["plain", "columns", "rows"])
def test_agrees_with_the_reference(
    backend: torch_fallback.TorchFallback, dtype: str, shape: tuple[int, int], weighted: str
) -> None:
    rng = np.random.default_rng(1)
    chunk = chunk_of(
        rng.normal(0.1, 1, shape),
        dtype,
        96,
        col_weight=rng.normal(1, 0.3, shape[1]) if weighted == "columns" else None,
        row_weight=rng.normal(1, 0.3, shape[0]) if weighted == "rows" else None,
        cross=True,
        pad=5,
        offset=3,
    )
    assert_agrees(backend.marginals(chunk), REFERENCE.marginals(chunk))


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_a_mean_of_ten_thousand_stds_costs_no_digits(backend: torch_fallback.TorchFallback, dtype: str) -> None:
    x = np.random.default_rng(2).normal(1.0, 1e-4, (300, 700))
    for weights in ({}, {"col_weight": np.full(700, 1.3)}, {"row_weight": np.full(300, 1.3)}):
        chunk = chunk_of(x, dtype, 256, **weights)
        ours, truth = backend.marginals(chunk), REFERENCE.marginals(chunk)
        for name in ("row", "col", "weighted_row", "weighted_col"):
            if (mine := getattr(ours, name)) is not None:
                np.testing.assert_allclose(np.frombuffer(mine.m2), np.frombuffer(getattr(truth, name).m2), RTOL)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_spoils_its_row_and_column_only(
    backend: torch_fallback.TorchFallback, dtype: str, value: float
) -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(0, 1, (70, 40))
    x[36, 20] = value
    for weights in ({"col_weight": rng.normal(1, 0.1, 40)}, {"row_weight": rng.normal(1, 0.1, 70)}):
        chunk = chunk_of(x, dtype, cross=True, **weights)
        ours = backend.marginals(chunk)
        assert ours.nonfinite == 1
        assert np.isnan(np.frombuffer(ours.row.mean)).sum() == 1
        assert np.isnan(np.frombuffer(ours.col.mean)).sum() == 1
        assert_agrees(ours, REFERENCE.marginals(chunk))


@pytest.mark.parametrize("axis", ["col_weight", "row_weight"])
def test_a_gain_that_is_not_finite_spoils_weighted_statistics_only(
    backend: torch_fallback.TorchFallback, axis: str
) -> None:
    x = np.random.default_rng(5).normal(0, 1, (40, 40))
    gain = np.ones(40)
    gain[7] = np.inf
    chunk = chunk_of(x, "F32", **{axis: gain})
    ours = backend.marginals(chunk)
    assert ours.nonfinite == 0
    assert_agrees(ours, REFERENCE.marginals(chunk))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_every_code_of_an_eight_bit_float(backend: torch_fallback.TorchFallback, dtype: str) -> None:
    codes = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    chunk = Chunk(codes.tobytes(), dtype, 256, 3, 0, 3, 64)
    ours, truth = backend.marginals(chunk), REFERENCE.marginals(chunk)
    assert (ours.row.mean, ours.abs_max, ours.nonfinite) == (truth.row.mean, truth.abs_max, truth.nonfinite)


@pytest.mark.parametrize("elements", [1, 100, 1000])
def test_slicing_does_not_change_what_comes_out(
    backend: torch_fallback.TorchFallback, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice of one row, of a few, and one that does not divide the unit."""
    rng = np.random.default_rng(6)
    chunk = chunk_of(rng.normal(3, 1, (100, 37)), "F32", 64, row_weight=rng.normal(1, 0.1, 100), cross=True)
    monkeypatch.setattr(torch_fallback, "SLICE_ELEMENTS", elements)
    assert_agrees(backend.marginals(chunk), REFERENCE.marginals(chunk))


def test_no_more_than_a_slice_is_widened(
    backend: torch_fallback.TorchFallback, monkeypatch: pytest.MonkeyPatch
) -> None:
    widened: list[int] = []
    moments = torch_fallback._moments

    def watching(x: Any, dim: int) -> Any:
        widened.append(x.numel())
        return moments(x, dim)

    monkeypatch.setattr(torch_fallback, "_moments", watching)
    backend.marginals(chunk_of(np.zeros((600, 1000)), "BF16", 512))
    assert max(widened) <= torch_fallback.SLICE_ELEMENTS
    assert sum(widened) == 2 * 600 * 1000


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 90),
    cols=st.integers(1, 90),
    unit=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    mean=st.sampled_from([0.0, 0.5, 30.0]),
    weighted=st.sampled_from(["", "col_weight", "row_weight"]),
    cross=st.booleans(),
    offset=st.integers(0, 7),
    pad=st.integers(0, 7),
    seed=st.integers(0, 1000),
)
def test_any_shape_at_any_alignment(
    backend: torch_fallback.TorchFallback,
    rows: int,
    cols: int,
    unit: int,
    dtype: str,
    mean: float,
    weighted: str,
    cross: bool,
    offset: int,
    pad: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    lengths = {"col_weight": cols, "row_weight": rows}
    weights = {weighted: rng.normal(1, 0.5, lengths[weighted])} if weighted else {}
    x = rng.normal(mean, 1, (rows, cols))
    chunk = chunk_of(x, dtype, 32 * unit, cross=cross, offset=offset, pad=pad, **weights)
    assert_agrees(backend.marginals(chunk), REFERENCE.marginals(chunk))


def test_repeated_runs_give_the_same_bytes(backend: torch_fallback.TorchFallback) -> None:
    chunk = chunk_of(np.random.default_rng(8).normal(0, 1, (300, 500)), "BF16", 128, cross=True)
    assert backend.marginals(chunk) == backend.marginals(chunk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["", "col_weight", "row_weight"])
def test_a_tensor_is_reduced_on_its_device(backend: torch_fallback.TorchFallback, dtype: str, weight: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(9)
    weights = {weight: rng.normal(1, 0.1, {"col_weight": 48, "row_weight": 70}[weight])} if weight else {}
    chunk = chunk_of(rng.normal(0, 1, (70, 48)), dtype, 32, cross=True, pad=8, offset=3, **weights)
    here = replace(chunk, data=torch.frombuffer(bytearray(chunk.host_data), dtype=torch.uint8))
    assert backend.marginals(here) == backend.marginals(chunk)
    out = bytearray(4 * 70 * 48)
    REFERENCE.expand(chunk, out)
    for each in (here, chunk):
        expanded = torch_fallback.expanded(each, "cpu").numpy()
        np.testing.assert_allclose(expanded, np.frombuffer(out, np.float32).reshape(70, 48), rtol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "columns", "rows"])
@pytest.mark.parametrize("name", SCALED)
def test_bytes_are_scaled_on_the_device(
    backend: torch_fallback.TorchFallback, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is decoded on the host, and slices find their scales."""
    torch = pytest.importorskip("torch")
    chunk = scaled_chunk(name, pad=3)
    chunk = replace(chunk, **gains(kind, chunk.rows, chunk.cols))
    truth, out = REFERENCE.marginals(chunk), bytearray(4 * chunk.rows * chunk.cols)
    REFERENCE.expand(chunk, out)
    monkeypatch.setattr(torch_fallback, "decoded", None)
    monkeypatch.setattr(torch_fallback, "SLICE_ELEMENTS", 9 * chunk.cols)
    here = replace(chunk, data=torch.frombuffer(bytearray(chunk.host_data), dtype=torch.uint8))
    for each in (chunk, here):
        assert_agrees(backend.marginals(each), truth)
        expanded = torch_fallback.expanded(each, "cpu").numpy()
        np.testing.assert_allclose(expanded, np.frombuffer(out, np.float32).reshape(expanded.shape), rtol=1e-6)


def test_a_device_without_float64_is_good_to_a_hundred_thousandth(
    backend: torch_fallback.TorchFallback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What mps does, on the CPU: float32 within a unit, at a mean of three stds."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(backend, "_real", lambda _: torch.float32)
    rng = np.random.default_rng(10)
    chunk = chunk_of(rng.normal(3, 1, (600, 400)), "F32", 256, col_weight=rng.normal(1, 0.1, 400), cross=True)
    ours, truth = backend.marginals(chunk), REFERENCE.marginals(chunk)
    for name in ("row", "col", "weighted_row"):
        for part in ("mean", "m2"):
            mine, theirs = (np.frombuffer(getattr(getattr(each, name), part)) for each in (ours, truth))
            np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_refusals_name_what_they_refuse(backend: torch_fallback.TorchFallback) -> None:
    with pytest.raises(EncodingError, match="Q4_K is not supported by back end torch_fallback"):
        backend.marginals(Chunk(b"", "Q4_K", 1, 1, 0, 1, 32))


def test_availability_is_a_reason_and_loading_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys, llmfp.kernels.torch_fallback; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert torch_fallback.TorchFallback().why_unavailable() == "torch is not installed"


def test_a_device_that_is_not_there_is_named(backend: torch_fallback.TorchFallback) -> None:
    reason = torch_fallback.TorchFallback("xpu:99").why_unavailable()
    assert reason is not None
    assert reason.startswith("torch cannot use device xpu:99")
    assert backend.describe() == "torch cpu"
    assert backend.versions().keys() == {"torch"}
