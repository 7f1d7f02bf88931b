"""Invariants: the Triton kernels agree with the reference to 1e-6 at any shape, dtype, mean and magnitude; one launch
serves any number of chunks; repeated runs give the same bytes; and, compiled for GPUs that are not here, they read
weights 16 bytes at a time and spill nothing.

The kernels are loaded twice, side by side: interpreted, to run here, and as functions to compile. Triton decides which
when a kernel is defined, and is itself imported uninterpreted so that its own library functions can be compiled.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmfp.errors import BackendError, EncodingError
from llmfp.hardware import samples
from llmfp.kernels import triton_gpu
from llmfp.kernels.reference import BACKEND as REFERENCE
from llmfp.kernels.reference import decode
from llmfp.kernels.scaled import MAX_ROWS, scaled
from llmfp.marginals import Chunk, Coding, LowRank, Marginals, Moments
from llmfp.marginals import unit_rows as standard_unit_rows
from tests.packing import SCALED, gains, scaled_chunk

RTOL = 1e-6
BITS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
DTYPES = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
KERNELS_FILE = Path(triton_gpu.__file__).with_name("triton_marginals.py")


def _load_kernels(interpreted: bool) -> ModuleType:
    """A private copy of the kernels, interpreted or to be compiled; skips, saying why, where Triton is missing."""
    for library in ("torch", "triton"):
        if importlib.util.find_spec(library) is None:
            reason = f"{library} is not installed"
            if "triton_gpu" in os.environ.get("LLMFP_REQUIRE", "").split(","):
                pytest.fail(f"LLMFP_REQUIRE names triton_gpu, which cannot run here: {reason}")
            pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        importlib.import_module("triton.language")
        if interpreted:
            patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.spec_from_file_location(f"triton_marginals_{interpreted}", KERNELS_FILE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def backend() -> Iterator[triton_gpu.TritonGpu]:
    """The back end with interpreted kernels, on the CPU."""
    kernels = _load_kernels(interpreted=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(triton_gpu, "_kernels", lambda: kernels)
        yield triton_gpu.TritonGpu()


def encode(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    """x in a stored dtype, as its bits."""
    if dtype == "BF16":
        return (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype.startswith("F8"):
        torch = pytest.importorskip("torch")
        x = np.where(np.isinf(x), np.nan, x) if dtype == "F8_E4M3" else x
        stored = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
        return torch.from_numpy(np.asarray(x, np.float32)).to(stored).view(torch.uint8).numpy()
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


def arrays(moments: Moments) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.frombuffer(moments.mean), np.frombuffer(moments.m2)


def spread_of(chunk: Chunk) -> float:
    """The std of the chunk's finite elements, or their magnitude where they are all the same."""
    x = decode(chunk)
    x = x[np.isfinite(x)]
    return float(x.std() or np.abs(x).max(initial=1.0)) if x.size else 1.0


def assert_agrees(ours: Marginals, truth: Marginals, chunk: Chunk) -> None:
    """Every std within RTOL (plus float64's own noise about the mean), every mean within RTOL of a std; NaN alike."""
    assert ours.counts == truth.counts
    assert ours.nonfinite == truth.nonfinite
    # Of scaled elements the largest is a float32's rounding off.
    assert ours.abs_max == (truth.abs_max if chunk.coding is None else pytest.approx(truth.abs_max, rel=2.0**-23))
    lengths = {"row": chunk.cols, "weighted_row": chunk.cols}
    spread = spread_of(chunk)
    for name in ("row", "col", "weighted_row", "weighted_col"):
        mine, theirs = getattr(ours, name), getattr(truth, name)
        assert (mine is None) == (theirs is None), name
        if theirs is None:
            continue
        (mean, m2), (true_mean, true_m2) = arrays(mine), arrays(theirs)
        np.testing.assert_array_equal(np.isnan(m2), np.isnan(true_m2), name)
        np.testing.assert_array_equal(np.isnan(mean), np.isnan(true_mean), name)
        assert {v.tobytes() for v in mean[np.isnan(mean)]} <= {np.float64(np.nan).tobytes()}
        n = lengths.get(name) or np.repeat(truth.counts, chunk.cols)
        good = ~np.isnan(true_m2)
        std, true_std = np.sqrt(m2 / n)[good], np.sqrt(true_m2 / n)[good]
        magnitude = np.abs(true_mean[good])
        assert (np.abs(std - true_std) <= RTOL * true_std + 1e-15 * magnitude).all(), name
        assert (np.abs(mean - true_mean)[good] <= RTOL * np.maximum(true_std, spread)).all(), name
    assert (ours.cross is None) == (truth.cross is None)
    if truth.cross is not None and ours.cross is not None:
        mine_cross, true_cross = np.frombuffer(ours.cross), np.frombuffer(truth.cross)
        np.testing.assert_array_equal(np.isnan(mine_cross), np.isnan(true_cross))
        scale = np.nanmax(np.abs(true_cross), initial=0.0) + chunk.rows * truth.abs_max**2
        assert (np.abs(mine_cross - true_cross)[~np.isnan(true_cross)] <= RTOL * scale).all()


ONCE = ["marginal_tiles", "merge_partials", "exact_tiles", "merge_partials"]
"""What is launched for matrices of one kind."""


def launches(backend: triton_gpu.TritonGpu, patch: pytest.MonkeyPatch, wanted: list[int] | None = None) -> list[str]:
    """A list that grows by the kernel's name at each launch; wanted: by the tiles that exact_tiles was to do."""
    seen: list[str] = []
    launch = backend._launch

    def counting(kernel: Any, *args: Any, **constants: Any) -> None:
        seen.append(kernel.__name__)
        if wanted is not None and kernel.__name__ == "exact_tiles":
            wanted.append(int(args[5].sum()))
        launch(kernel, *args, **constants)

    patch.setattr(backend, "_launch", counting)
    return seen


SHAPES = [(1, 1), (1, 40), (40, 1), (5, 123), (33, 17)]
CASES = [(*case, shape) for case in product(DTYPES, ("plain", "columns", "rows")) for shape in SHAPES]
CASES += [(dtype, "columns", (257, 130)) for dtype in DTYPES]
CASES += [("BF16", "rows", (312, 520)), ("F16", "plain", (312, 520)), ("F32", "columns", (312, 520))]


@pytest.mark.parametrize(("dtype", "weighted", "shape"), CASES)
def test_agrees_with_the_reference(
    backend: triton_gpu.TritonGpu, dtype: str, weighted: str, shape: tuple[int, int]
) -> None:
    rng = np.random.default_rng(1)
    chunk = chunk_of(
        rng.normal(0.01, 1.0, shape),
        dtype,
        unit_rows=288 if shape[0] > 256 else 32,
        col_weight=rng.normal(1, 0.3, shape[1]) if weighted == "columns" else None,
        row_weight=rng.normal(1, 0.3, shape[0]) if weighted == "rows" else None,
        cross=True,
        pad=6 * (shape[1] % 2) * (8 if dtype in ("F32", "F64") else 1),
    )
    assert_agrees(backend.marginals(chunk), REFERENCE.marginals(chunk), chunk)


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "BF16"])
@pytest.mark.parametrize("spread", ["one mean", "a mean per column", "a mean per row"])
def test_a_mean_of_ten_thousand_stds_costs_no_digits(backend: triton_gpu.TritonGpu, dtype: str, spread: str) -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(0.0, 1e-4, (70, 136))
    sign = {"one mean": 1.0, "a mean per column": rng.choice([-1, 1], (1, 136)), "a mean per row": np.ones((70, 1))}
    x = x + sign[spread] * (1.0 if spread != "a mean per row" else rng.choice([-1.0, 1.0], (70, 1)))
    for weights in ({}, {"col_weight": np.full(136, 1.3)}, {"row_weight": np.full(70, 1.3)}):
        chunk = chunk_of(x, dtype, 64, **weights)
        assert_agrees(backend.marginals(chunk), REFERENCE.marginals(chunk), chunk)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F8_E4M3"])
def test_what_float32_sums_are_trusted_with_is_accurate(
    backend: triton_gpu.TritonGpu, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Column means up to 0.75 stds from the tile's shift: close to the worst that float32 is trusted with."""
    rng = np.random.default_rng(3)
    x = rng.normal(0.0, 1.0, (256, 520)) + rng.uniform(-0.6, 0.6, (1, 520))
    chunk = chunk_of(x, dtype, 256, col_weight=rng.normal(1, 0.01, 520))
    wanted: list[int] = []
    seen = launches(backend, monkeypatch, wanted)
    assert_agrees(backend.marginals(chunk), REFERENCE.marginals(chunk), chunk)
    assert seen == ONCE
    assert wanted == [0]


@pytest.mark.parametrize(("value", "place"), [(np.nan, (0, 0)), (np.inf, (36, 20)), (-np.inf, (64, 39))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_spoils_its_row_and_column_only(
    backend: triton_gpu.TritonGpu, dtype: str, value: float, place: tuple[int, int]
) -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(0, 1, (70, 40))
    x[place] = value
    for weights in ({"col_weight": rng.normal(1, 0.1, 40)}, {"row_weight": rng.normal(1, 0.1, 70)}):
        chunk = chunk_of(x, dtype, 32, cross=True, **weights)
        ours = backend.marginals(chunk)
        assert ours.nonfinite == 1
        assert np.isnan(np.frombuffer(ours.row.mean)).sum() == 1
        assert np.isnan(np.frombuffer(ours.col.mean)).sum() == 1
        assert_agrees(ours, REFERENCE.marginals(chunk), chunk)


def test_nothing_but_nan(backend: triton_gpu.TritonGpu) -> None:
    chunk = chunk_of(np.full((3, 9), np.nan), "F32")
    ours = backend.marginals(chunk)
    assert (ours.abs_max, ours.nonfinite) == (0.0, 27)
    assert_agrees(ours, REFERENCE.marginals(chunk), chunk)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_every_code_of_an_eight_bit_float(backend: triton_gpu.TritonGpu, dtype: str) -> None:
    codes = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    chunk = Chunk(codes.tobytes(), dtype, 256, 3, 0, 3, 64)
    ours, truth = backend.marginals(chunk), REFERENCE.marginals(chunk)
    np.testing.assert_array_equal(np.frombuffer(ours.row.mean), np.frombuffer(truth.row.mean))
    assert (ours.abs_max, ours.nonfinite) == (truth.abs_max, truth.nonfinite)


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-18, 1e15, 1e19, 1e30, 3e37])
def test_extreme_magnitudes_neither_overflow_nor_vanish(backend: triton_gpu.TritonGpu, scale: float) -> None:
    x = np.random.default_rng(5).normal(0, scale, (40, 48)).astype(np.float32)
    chunk = chunk_of(x, "F32", col_weight=np.full(48, 0.7))
    assert_agrees(backend.marginals(chunk), REFERENCE.marginals(chunk), chunk)


def test_one_row_or_column_of_another_magnitude(backend: triton_gpu.TritonGpu) -> None:
    x = np.random.default_rng(6).normal(0, 1, (64, 48)).astype(np.float32)
    x[3] *= 1e-30
    x[:, 5] = np.where(np.arange(64) % 2, 1e-30, -1e-30)
    x[40] = 0.0
    chunk = chunk_of(x, "F32")
    assert_agrees(backend.marginals(chunk), REFERENCE.marginals(chunk), chunk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constant", [0.0, 0.1, -3.0])
def test_a_constant_has_no_spread(
    backend: triton_gpu.TritonGpu, dtype: str, constant: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[int] = []
    launches(backend, monkeypatch, wanted)
    chunk = chunk_of(np.full((37, 19), constant), dtype)
    ours = backend.marginals(chunk)
    assert not np.frombuffer(ours.row.m2).any()
    assert not np.frombuffer(ours.col.m2).any()
    assert ours.abs_max == REFERENCE.marginals(chunk).abs_max
    if constant == 0.0 and dtype != "F64":
        assert wanted == [0], "zeros need no second look"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 90),
    unit=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    mean=st.sampled_from([0.0, 0.5, 30.0]),
    weighted=st.sampled_from(["", "col_weight", "row_weight"]),
    cross=st.booleans(),
    offset=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    backend: triton_gpu.TritonGpu,
    rows: int,
    cols: int,
    unit: int,
    dtype: str,
    mean: float,
    weighted: str,
    cross: bool,
    offset: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    lengths = {"col_weight": cols, "row_weight": rows}
    weights = {weighted: rng.normal(1, 0.5, lengths[weighted])} if weighted else {}
    x = rng.normal(mean, 1, (rows, cols))
    chunk = chunk_of(x, dtype, 32 * unit, cross=cross, offset=offset, **weights)
    assert_agrees(backend.marginals(chunk), REFERENCE.marginals(chunk), chunk)


def test_scaling_by_a_power_of_two_scales_exactly(backend: triton_gpu.TritonGpu) -> None:
    x = np.random.default_rng(7).normal(0, 1, (60, 70)).astype(np.float32)
    once, twice = (backend.marginals(chunk_of(x * factor, "F32", 64)) for factor in (1.0, 8.0))
    np.testing.assert_array_equal(np.frombuffer(once.row.m2) * 64, np.frombuffer(twice.row.m2))
    np.testing.assert_array_equal(np.frombuffer(once.col.mean) * 8, np.frombuffer(twice.col.mean))


def several_chunks() -> list[Chunk]:
    rng = np.random.default_rng(8)
    shapes = [(90, 48), (32, 520), (288, 40), (64, 56), (300, 32), (64, 512), (60, 32)]
    return [chunk_of(rng.normal(0, 1, s), "BF16", 32 * (1 + i), cross=i == 2) for i, s in enumerate(shapes)]


def test_one_launch_serves_many_chunks(backend: triton_gpu.TritonGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven chunks of 1 to 5 units, one of which wants its cross products: three launches, twice, no other numbers."""
    chunks = several_chunks()
    alone = [backend.marginals(chunk) for chunk in chunks]
    seen = launches(backend, monkeypatch)
    together = backend.marginals_many(chunks)
    assert seen == [*ONCE[:2], "cross_products", *ONCE[2:], "cross_products"]
    assert together == alone
    for ours, chunk in zip(together, chunks, strict=True):
        assert_agrees(ours, REFERENCE.marginals(chunk), chunk)


# Bytes with scales.


@pytest.fixture(params=["converted", "by bits"])
def e4m3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to read an e4m3: the GPU's conversion, and integer arithmetic."""
    monkeypatch.setattr(triton_gpu.TritonGpu, "converts_e4m3", request.param == "converted")
    return str(request.param)


def packings(backend: triton_gpu.TritonGpu, patch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the bytes packed for the device."""
    packed: list[int] = []
    upload = backend._upload

    def noting(*arguments: Any) -> Any:
        sent, matrices = upload(*arguments)
        packed.append(sum(each.numel() * each.element_size() for each in sent))
        return sent, matrices

    patch.setattr(backend, "_upload", noting)
    return packed


@pytest.mark.parametrize("kind", ["columns", "rows"])
@pytest.mark.parametrize("name", SCALED)
def test_bytes_are_scaled_in_the_kernel(
    backend: triton_gpu.TritonGpu, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, at that; and nothing but codes, scales and weights is sent."""
    chunk = scaled_chunk(name)
    chunk = replace(chunk, **gains(kind, chunk.rows, chunk.cols))
    wanted: list[int] = []
    packed = packings(backend, monkeypatch)
    launches(backend, monkeypatch, wanted)
    ours = backend.marginals(chunk)
    assert_agrees(ours, REFERENCE.marginals(chunk), chunk)
    assert wanted == [0], "tiles for float64"
    assert chunk.coding is not None
    sent = [chunk.rows * chunk.cols, 4 * chunk.coding.scale_rows * chunk.coding.scale_cols]
    sent += [len(w) for w in (chunk.col_weight, chunk.row_weight) if w is not None]
    assert packed[0] <= sum(-(-n // 256) * 256 for n in sent)


@pytest.mark.parametrize("name", ["inside a block", "per tensor"])
def test_bytes_on_the_device_stay_there(
    backend: triton_gpu.TritonGpu, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = scaled_chunk(name, pad=16)
    packed = packings(backend, monkeypatch)
    assert_agrees(backend.marginals(on_the_device(chunk)), REFERENCE.marginals(chunk), chunk)
    assert chunk.coding is not None
    assert packed[0] <= 4 * chunk.coding.scale_rows * chunk.coding.scale_cols, "more than the scales"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("inside a block", "columns"),
        ("e5m2, any alignment", "rows"),
        ("per row", "rows"),
        ("per tensor", "columns"),
        ("int8 per row", "columns"),
    ],
)
def test_scales_of_any_magnitude(backend: triton_gpu.TritonGpu, name: str, kind: str) -> None:
    """What float32 cannot do is done in float64, from the codes: their products overflow float32, and vanish in it."""
    chunk = replace(scaled_chunk(name), rows=10)  # the interpreter takes long in float64
    assert chunk.coding is not None
    scale = np.frombuffer(chunk.coding.scale or b"", np.float32).astype(np.float64)
    for largest in (1e-37, 3e38):
        coding = replace(chunk.coding, scale=(scale / np.nanmax(np.abs(scale)) * largest).astype(np.float32).tobytes())
        scaled = replace(chunk, coding=coding, **gains(kind, chunk.rows, chunk.cols))
        assert_agrees(backend.marginals(scaled), REFERENCE.marginals(scaled), scaled)


@pytest.mark.parametrize("levels", ["F8_E4M3", "F8_E5M2", "int"])
def test_codes_and_scales_that_are_no_usual_numbers(backend: triton_gpu.TritonGpu, levels: str, e4m3: str) -> None:
    """Every code times every scale: NaN and infinity are where the definition has them, and 0 times infinity is NaN."""
    if levels != "F8_E4M3" and e4m3 == "by bits":
        pytest.skip("nothing is read by bits")
    scale = np.array([[1.0, np.nan, 0.0, 3e38], [2.0, 0.5, 1e-45, 1.0], [-np.inf, -3.0, 1.0, 0.25]], np.float32)
    table = {"scale": scale.tobytes(), "scale_rows": 3, "scale_cols": 4}
    coding = Coding("row", 8, levels=levels, row_block=16, col_block=16, **table)
    data = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (3, 4))
    for rows, cols in ((slice(0, 48), slice(0, 64)), (slice(16, 32), slice(32, 48)), (slice(20, 40), slice(0, 16))):
        place = {"first_row": rows.start, "first_col": cols.start}
        sizes = rows.stop - rows.start, cols.stop - cols.start
        chunk = Chunk(data[rows].tobytes(), "", *sizes, 0, 64, 32, coding=coding, **place)
        assert_agrees(backend.marginals(chunk), REFERENCE.marginals(chunk), chunk)


@pytest.mark.parametrize(("levels", "code"), [("F8_E4M3", 0x7F), ("F8_E4M3", 0xFF), ("F8_E5M2", 0xFC)])
def test_one_code_that_is_no_number_is_found(
    backend: triton_gpu.TritonGpu, levels: str, code: int, e4m3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among usual ones, whether it is converted to a NaN, or to 480 or 65536."""
    if levels == "F8_E5M2" and e4m3 == "by bits":
        pytest.skip("nothing is read by bits")
    codes = samples.encode(np.random.default_rng(14).normal(0, 1, (40, 48)).astype(np.float32), levels)
    codes[33, 7] = code
    scale = np.array([[0.5, 0.25, 2.0]], np.float32)
    coding = Coding("row", 8, levels=levels, scale=scale.tobytes(), scale_cols=3, row_block=40, col_block=16)
    chunk = Chunk(codes.tobytes(), "", 40, 48, 0, 48, 40, coding=coding)
    wanted: list[int] = []
    launches(backend, monkeypatch, wanted)
    ours = backend.marginals(chunk)
    assert ours.nonfinite == 1
    assert_agrees(ours, REFERENCE.marginals(chunk), chunk)
    assert wanted == [1], "the one tile there is"


def test_every_e4m3_by_its_bits(backend: triton_gpu.TritonGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU cannot convert it: a row of each code, so that means are codes."""
    monkeypatch.setattr(triton_gpu.TritonGpu, "converts_e4m3", False)
    codes = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, 1)
    chunk = Chunk(codes.tobytes(), "F8_E4M3", 256, 16, 0, 16, 64)
    ours, truth = backend.marginals(chunk), REFERENCE.marginals(chunk)
    np.testing.assert_array_equal(np.frombuffer(ours.row.mean), np.frombuffer(truth.row.mean))
    assert (ours.abs_max, ours.nonfinite) == (truth.abs_max, truth.nonfinite) == (448.0, 32)


@pytest.mark.parametrize("name", ["partial blocks", "per row"])
def test_usual_weights_by_their_bits(backend: triton_gpu.TritonGpu, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = scaled_chunk(name)
    converted = backend.marginals(chunk)
    monkeypatch.setattr(triton_gpu.TritonGpu, "converts_e4m3", False)
    wanted: list[int] = []
    launches(backend, monkeypatch, wanted)
    assert backend.marginals(chunk) == converted
    assert wanted == [0]


def test_one_launch_serves_all_ways_to_scale(backend: triton_gpu.TritonGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, rows and groups are one kind, host or device; what is not scaled is another. Repeated, the same bytes."""
    chunks = [scaled_chunk(name) for name in ("inside a block", "groups of columns", "per row")]
    chunks.append(on_the_device(chunks[0]))
    rng = np.random.default_rng(13)
    chunks.append(chunk_of(rng.normal(0, 1, (32, 48)), "F8_E4M3"))
    alone = [backend.marginals(chunk) for chunk in chunks]
    seen = launches(backend, monkeypatch)
    assert backend.marginals_many(chunks) == alone
    assert seen == ONCE * 2
    assert alone[0] == alone[3]


def test_scaled_units_merge_and_are_cut_anywhere(backend: triton_gpu.TritonGpu) -> None:
    """A chunk in two, in the middle of a block of scales, is the same to the bit; merged on the device to 1e-6."""
    whole = scaled_chunk("partial blocks")
    top = replace(whole, rows=64)
    rest = replace(whole, rows=96, first_row=64, offset_bytes=64 * whole.row_stride_bytes)
    parts = backend.marginals_many([top, rest])
    assert backend.merge(parts) == backend.merge([backend.marginals(whole)])
    truth = REFERENCE.merge([REFERENCE.marginals(whole)])
    assert_agrees(backend.marginals_many([whole], merged=True)[0], truth, whole)


@settings(max_examples=200, deadline=None)
@given(
    row_block=st.integers(1, MAX_ROWS - 1024) | st.integers(1, 300),
    first_row=st.integers(0, MAX_ROWS),
    start=st.integers(0, 1000),
    rows=st.integers(1, 1024),
)
def test_a_reciprocal_divides_exactly(row_block: int, first_row: int, start: int, rows: int) -> None:
    """In the kernel's integers: the product below 2^63, the entry that of a division."""
    scale = triton_gpu.Scale(0, 1, row_block, 1, first_row % row_block)
    address, _, reciprocal, before, *_ = scale.fields(start, rows)
    for row in {0, 1, rows - 1, row_block - 1 - before, row_block - before, 2 * row_block - before} & set(range(rows)):
        product = (before + row) * reciprocal
        assert product < 2**63
        assert address // 4 + (product >> triton_gpu.ROW_SHIFT) == (first_row % row_block + start + row) // row_block


NOT_JUST_SCALED: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4},
    "columns of words": {"packing": "down"},
    "offset levels": {"levels": "offset"},
    "zero points": {"zero": bytes(16)},
    "shifts": {"shift": bytes(16)},
    "flat blocks": {"flat_block": 64},
    "groups of rows": {"row_group": bytes(4 * 161)},
    "groups of columns": {"col_group": bytes(4 * 177)},
    "no scales": {"scale": None},
    "too few scales": {"scale": bytes(12)},
    "too few rows of scales": {"scale_rows": 1, "scale": bytes(8)},
    "too few columns of scales": {"scale_cols": 1, "scale": bytes(8)},
    "no rows to a scale": {"row_block": 0},
    "columns below 0": {"col_block": -1},
}


@pytest.mark.parametrize("change", NOT_JUST_SCALED)
def test_what_is_not_just_scaled_is_left_to_the_definition(change: str) -> None:
    chunk = scaled_chunk("partial blocks")
    assert chunk.coding is not None
    assert scaled(chunk) is not None
    assert scaled(replace(chunk, coding=replace(chunk.coding, **NOT_JUST_SCALED[change]))) is None
    assert scaled(replace(chunk, low_rank=LowRank(1, bytes(4 * 160), bytes(4 * 176)))) is None
    assert scaled(replace(chunk, first_row=-1)) is None
    assert scaled(replace(chunk, first_row=128)) is None


@pytest.mark.parametrize(("limit", "needed"), [("MAX_ROWS", 128 + 64), ("MAX_ENTRIES", 2 * 2)])
def test_what_a_kernel_cannot_index_is_left_to_the_definition(
    limit: str, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 128 rows and units of 64, of which one takes at most two rows of two scales."""
    chunk = scaled_chunk("partial blocks")
    monkeypatch.setattr(f"llmfp.kernels.scaled.{limit}", needed)
    assert scaled(chunk) is not None
    monkeypatch.setattr(f"llmfp.kernels.scaled.{limit}", needed - 1)
    assert scaled(chunk) is None


def on_the_device(chunk: Chunk) -> Chunk:
    """The same chunk with its bytes in a tensor, which on a GPU would be there."""
    torch = pytest.importorskip("torch")
    return replace(chunk, data=torch.frombuffer(bytearray(chunk.host_data), dtype=torch.uint8).clone())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pad", "offset"), [(0, 0), (16, 32), (8, 8)])
def test_a_chunk_on_the_device_is_reduced_where_it_lies(
    backend: triton_gpu.TritonGpu, dtype: str, pad: int, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy of it is packed: only the weights are."""
    rng = np.random.default_rng(12)
    chunk = chunk_of(rng.normal(0, 1, (70, 48)), dtype, 32, col_weight=rng.normal(1, 0.1, 48), pad=pad, offset=offset)
    packed = packings(backend, monkeypatch)
    here = backend.marginals(on_the_device(chunk))
    assert packed[-1] == 4 * 48, "the weights alone"
    assert_agrees(here, REFERENCE.marginals(chunk), chunk)


def test_chunks_here_and_there_share_a_launch(backend: triton_gpu.TritonGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = several_chunks()
    alone = [backend.marginals(chunk) for chunk in chunks]
    mixed = [on_the_device(chunk) if i % 2 else chunk for i, chunk in enumerate(chunks)]
    seen = launches(backend, monkeypatch)
    assert backend.marginals_many(mixed) == alone
    assert seen.count("marginal_tiles") == 1


def test_mixed_kinds_come_back_in_order(backend: triton_gpu.TritonGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches number the kinds, not the chunks; only the one unit that float32 cannot do is reduced again."""
    rng = np.random.default_rng(9)
    x = rng.normal(0, 1, (64, 64))
    spoiled = x.copy()
    spoiled[40, 3] = np.nan
    chunks = [chunk_of(x, "BF16"), chunk_of(x, "F32"), chunk_of(spoiled, "BF16"), chunk_of(x, "F32")]
    chunks += [chunk_of(x, "BF16", col_weight=rng.normal(1, 0.1, 64))]
    wanted: list[int] = []
    seen = launches(backend, monkeypatch, wanted)
    results = backend.marginals_many(chunks)
    assert seen.count("marginal_tiles") == 3
    assert sorted(wanted) == [0, 0, 1]
    for ours, chunk in zip(results, chunks, strict=True):
        assert_agrees(ours, REFERENCE.marginals(chunk), chunk)


@pytest.mark.parametrize("spoil", [False, True])
def test_merged_on_the_device_is_merged_on_the_host(backend: triton_gpu.TritonGpu, spoil: bool) -> None:
    rng = np.random.default_rng(10)
    x = rng.normal(0, 1, (340, 40))
    if spoil:
        x[300, 3] = np.inf
    weighted = {"row_weight": rng.normal(1, 0.2, 340)}, {"col_weight": rng.normal(1, 0.2, 40)}
    for weights in weighted[: 1 if spoil else 2]:
        for unit in (288,) if spoil else (128, 288):
            chunk = chunk_of(x, "F32", unit, cross=True, **weights)
            truth = REFERENCE.merge([REFERENCE.marginals(chunk)])
            assert_agrees(backend.marginals_many([chunk], merged=True)[0], truth, chunk)


def test_repeated_runs_give_the_same_bytes(backend: triton_gpu.TritonGpu) -> None:
    chunks = several_chunks()[:3]
    assert backend.marginals_many(chunks) == backend.marginals_many(chunks)


def test_standard_units_merge_to_the_tensors_std(backend: triton_gpu.TritonGpu) -> None:
    x = np.random.default_rng(11).normal(0, 1, (1100, 24))
    chunk = chunk_of(x, "F32", standard_unit_rows(24))
    merged = backend.merge([backend.marginals(chunk)])
    pooled = backend.pool(merged.row, 24, 1100)
    decoded = np.asarray(x, np.float32).astype(np.float64)
    assert np.sqrt(np.frombuffer(pooled.m2)[0] / x.size) == pytest.approx(decoded.std(), rel=RTOL)


@pytest.mark.parametrize("shift", [0, 2, 16])
def test_matrices_in_device_memory_at_any_alignment(backend: triton_gpu.TritonGpu, shift: int) -> None:
    """A matrix inside a larger allocation; loads of 16 bytes are taken only where every row is aligned to them."""
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(12).normal(0, 1, (70, 48)).astype(np.float16)
    memory = torch.zeros(70 * 128 + 32, dtype=torch.uint8)
    assert memory.data_ptr() % 16 == 0
    memory[shift : shift + 70 * 128].view(70, 128)[:, :96] = torch.from_numpy(x.view(np.uint8))
    matrix = triton_gpu.Matrix(memory.data_ptr() + shift, "F16", 70, 48, 128, 32)
    assert matrix.wide == (shift % 16 == 0)
    chunk = chunk_of(x, "F16")
    assert_agrees(backend.reduce([matrix])[0], REFERENCE.marginals(chunk), chunk)
    assert not replace(matrix, row_stride_bytes=130).wide
    assert not replace(matrix, cols=47).wide


def test_refusals_name_what_they_refuse(backend: triton_gpu.TritonGpu) -> None:
    with pytest.raises(EncodingError, match="Q4_K is not supported by back end triton_gpu"):
        backend.marginals(Chunk(b"", "Q4_K", 1, 1, 0, 1, 32))
    with pytest.raises(BackendError, match="stride of 3 bytes"):
        backend.reduce([triton_gpu.Matrix(16, "F16", 2, 1, 3, 32)])


def test_availability_is_a_reason_and_loading_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys, llmfp.kernels.triton_gpu; print({'torch', 'triton'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "set()"
    backend = triton_gpu.TritonGpu()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else object())
    assert backend.why_unavailable() == "triton is not installed"


def test_without_a_gpu_the_reason_says_how_to_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend = triton_gpu.TritonGpu()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reason = backend.why_unavailable()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton") is not None:
        assert reason == "no GPU that Triton supports (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
        assert backend.why_unavailable() is None
        assert backend.describe() == "triton interpreter"
        assert backend.versions().keys() == {"torch", "triton"}


# Compiled for GPUs that are not here.

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
PLAIN, BY_COLUMN, BY_ROW = (False, False), (True, False), (False, True)
KINDS = [("BF16", weights, False) for weights in (PLAIN, BY_COLUMN, BY_ROW)]
KINDS += [(dtype, BY_COLUMN, False) for dtype in ("F16", "F32", "F8_E4M3", "F8_E5M2")]
KINDS += [("BF16", BY_COLUMN, True), ("F64", BY_ROW, True), ("F8_E5M2", BY_COLUMN, True)]
SCALED_KINDS = [("F8_E4M3", weights, False) for weights in (PLAIN, BY_COLUMN, BY_ROW)]
SCALED_KINDS += [("I8", BY_COLUMN, False), ("F8_E4M3", BY_ROW, True)]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The kernels as functions to compile, and an empty compilation cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield _load_kernels(interpreted=False)


def compiled(kernel: Any, target: str, constants: dict[str, Any], acc: str = "fp32") -> Any:
    """The kernel compiled for a target, its pointers 16-byte aligned as torch's are."""
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.compiler")
    gpu_target = pytest.importorskip("triton.backends.compiler").GPUTarget(*TARGETS[target])
    types = {"units": "*i64", "tiles": "*i32", "jobs": "*i64", "blocks": "*i32", "doubts": "*i32", "wanted": "*i32"}
    types |= {"partials": f"*{acc}", "tile_stats": f"*{acc}", "merged": "*fp64", "row_means": "*fp64", "cross": "*fp64"}
    types |= {"plane": "i64", "merged_plane": "i64"}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = compiler.ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=gpu_target, options=triton_gpu.LAUNCH_OPTIONS)


def spilled_bytes(ptx: str, target: str, folder: Path) -> int:
    """What ptxas, from Triton's own wheel, says it stores in and loads from local memory."""
    tools = pytest.importorskip("triton").knobs.nvidia
    ptxas = (tools.ptxas_blackwell if target == "sm_90" else tools.ptxas).path
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    name = "sm_90a" if target == "sm_90" else target
    command = [ptxas, "-v", f"--gpu-name={name}", str(source), "-o", str(folder / "kernel.cubin")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    counts = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert len(counts) >= 2, report
    return sum(map(int, counts))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("dtype", "weights", "exact", "scaled"),
    [(*kind, False) for kind in KINDS] + [(*kind, True) for kind in SCALED_KINDS],
)
def test_compiles_with_wide_loads_and_no_spills(
    kernels: ModuleType,
    target: str,
    dtype: str,
    weights: tuple[bool, bool],
    exact: bool,
    scaled: bool,
    tmp_path: Path,
) -> None:
    options = triton_gpu.kernel_options(dtype, True, *weights, scaled, exact=exact, by_bits=target == "sm_80")
    kernel = kernels.exact_tiles if exact else kernels.marginal_tiles
    ptx = compiled(kernel, target, options, "fp64" if exact else "fp32").asm["ptx"]
    assert ".local" not in ptx
    assert spilled_bytes(ptx, target, tmp_path) == 0
    lane_bytes = options["block_rows"] * options["block_cols"] * triton_gpu.ITEMSIZES[dtype] // 32
    widest = min(16, lane_bytes)
    wide = len(
        re.findall(r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64)" if widest == 16 else r"ld\.global[\w.:]*v2\.b32", ptx)
    )
    assert wide >= lane_bytes // widest
    if triton_gpu.ITEMSIZES[dtype] < 4:
        assert not re.search(r"ld\.global[\w.:]*\.b(?:16|8)\s", ptx), "an element loaded by itself"


def test_scales_stay_in_their_lanes(kernels: ModuleType) -> None:
    """A lane multiplies what it loaded by what it loaded: scaling adds no shuffle, no shared memory and no barrier."""
    ptx = []
    for with_scales in (False, True):
        options = triton_gpu.kernel_options("F8_E4M3", True, *PLAIN, with_scales, exact=False)
        ptx.append(compiled(kernels.marginal_tiles, "sm_90", options).asm["ptx"])
    for exchange in ("bar.sync", "ld.shared", "st.shared", "ldmatrix"):
        assert ptx[0].count(exchange) == ptx[1].count(exchange), exchange
    # of the tile's largest |x|, there is one to every sixteen columns: the same five shuffles
    assert ptx[0].count("shfl.sync") == ptx[1].count("shfl.sync")


def test_narrow_matrices_get_narrow_loads(kernels: ModuleType) -> None:
    """Where a row may start anywhere, a 16-byte load would fault."""
    options = triton_gpu.kernel_options("BF16", False, *PLAIN, exact=False)
    ptx = compiled(kernels.marginal_tiles, "sm_90", options).asm["ptx"]
    assert not re.search(r"ld\.global[\w.:]*\.v4", ptx)
    assert re.search(r"ld\.global[\w.:]*\.b16\s", ptx)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_small_kernels_compile_without_spills(kernels: ModuleType, target: str, tmp_path: Path) -> None:
    constants = {
        "block_entries": triton_gpu.MERGE_BLOCK,
        "largest_finite": triton_gpu.LARGEST_FINITE["BF16"],
        "exact": False,
    }
    merge = compiled(kernels.merge_partials, target, constants)
    names = ("element", "pointee", "block_rows", "block_cols", "lane_elements", "scaled")
    built = [merge]
    for dtype in ("BF16", "F8_E4M3"):
        options = triton_gpu.kernel_options(dtype, True, *PLAIN, dtype != "BF16", exact=False, by_bits=True)
        cross = compiled(kernels.cross_products, target, {name: options[name] for name in names})
        assert re.search(r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64)", cross.asm["ptx"])
        built.append(cross)
    for kernel in built:
        assert ".local" not in kernel.asm["ptx"]
        assert spilled_bytes(kernel.asm["ptx"], target, tmp_path) == 0


@pytest.mark.parametrize(
    ("dtype", "weights", "scaled"),
    [
        ("BF16", PLAIN, False),
        ("F16", BY_COLUMN, False),
        ("F32", BY_ROW, False),
        ("F8_E5M2", PLAIN, False),
        ("F8_E4M3", BY_COLUMN, True),
    ],
)
def test_compiles_for_amd(kernels: ModuleType, dtype: str, weights: tuple[bool, bool], scaled: bool) -> None:
    options = triton_gpu.kernel_options(dtype, True, *weights, scaled, exact=False, by_bits=True)
    assembly = compiled(kernels.marginal_tiles, "gfx942", options).asm["amdgcn"]
    assert re.search(r"_load_dwordx4", assembly)
    assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", assembly) == ["0"]
    assert re.findall(r"\.private_segment_fixed_size:\s*(\d+)", assembly) == ["0"]
