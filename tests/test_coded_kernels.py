"""Quantised chunks and adapters: every back end against codes.decode, and that against the formats' own words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from llmfp.encoding import ggml
from llmfp.encoding.blocks import NEVER_STORED, grid
from llmfp.kernels import Backend, codes, load
from llmfp.kernels.reference import decode
from llmfp.marginals import Chunk, Coding, LowRank, Marginals

BLOCKS = sorted(set(ggml.BLOCKS) - set(NEVER_STORED))
RNG = np.random.default_rng(0)


def floats(*shape: int) -> bytes:
    return RNG.normal(0, 1, shape).astype(np.float32).tobytes()


def chunk_of(
    coding: Coding, rows: int, cols: int, first_row: int = 0, first_col: int = 0, offset: int = 0, **rest: Any
) -> Chunk:
    """Random codes for these rows and columns of a tensor."""
    stop = first_col + cols
    match coding.packing:
        case "down":
            stored_rows, row_bytes = -(-rows * coding.bits // 32), 4 * stop
        case "awq":
            stored_rows, row_bytes = rows, -(-stop // 8) * 4
        case "plane":
            stored_rows, row_bytes = rows, stop
        case _:
            stored_rows, row_bytes = rows, -(-stop * coding.bits // 8)
    stride = row_bytes + 4 * (offset > 0)
    data = RNG.integers(0, 256, offset + stored_rows * stride, np.uint8).tobytes()
    return Chunk(
        data, "", rows, cols, offset, stride, 32, coding=coding, first_row=first_row, first_col=first_col, **rest
    )


def scales(rows: int, cols: int, **rest: Any) -> dict[str, Any]:
    return {"scale": floats(rows, cols), "scale_rows": rows, "scale_cols": cols, **rest}


def groups(count: int, below: int) -> bytes:
    return RNG.integers(0, below, count, dtype=np.int32).tobytes()


TABLE = np.linspace(-1, 1.1, 16, dtype=np.float32).tobytes()
CODINGS: dict[str, Coding] = {
    "fp8 blocks": Coding("row", 8, levels="F8_E4M3", **scales(3, 5, row_block=32, col_block=128)),
    "e5m2 tensor": Coding("row", 8, levels="F8_E5M2", **scales(1, 1, row_block=96, col_block=640)),
    "int8 rows": Coding("row", 8, levels="int", **scales(96, 1, col_block=640)),
    "int8 zero": Coding("row", 8, levels="int", zero=floats(96, 1), **scales(96, 1, col_block=640)),
    **{f"offset {bits}": Coding("row", bits, levels="offset", **scales(96, 20, col_block=32)) for bits in range(1, 9)},
    "mlx 4": Coding("row", 4, shift=floats(96, 10), **scales(96, 10, col_block=64)),
    "mlx 3": Coding("row", 3, shift=floats(96, 10), **scales(96, 10, col_block=64)),
    "act-order": Coding("row", 4, levels="offset", col_group=groups(640, 7), **scales(96, 7)),
    "mxfp4": Coding("row", 4, levels="E2M1", **scales(96, 20, col_block=32)),
    "nf4": Coding("row_high", 4, levels="table", table=TABLE, **scales(96, 10, col_block=64)),
    "nf4 straddling": Coding(
        "row_high", 4, levels="table", table=TABLE, flat_block=64, tensor_cols=640, **scales(1, 960)
    ),
    **{
        f"gptq {bits}": Coding("down", bits, zero=floats(3, 640), row_block=32, **scales(3, 640))
        for bits in (2, 3, 4, 8)
    },
    "gptq groups of 16": Coding("down", 4, zero=floats(6, 640), row_block=16, **scales(6, 640)),
    "gptq act-order": Coding("down", 4, zero=floats(5, 640), row_group=groups(96, 5), **scales(5, 640)),
    "awq": Coding("awq", 4, zero=floats(3, 640), row_block=32, **scales(3, 640)),
    "hqq high": Coding("plane", 4, place=4, zero=floats(96, 10), **scales(96, 10, col_block=64)),
    "hqq 2, axis 0": Coding("plane", 2, place=2, zero=floats(8, 640), **scales(8, 640)),
}
WIDE_COLS = 2352
WIDE: dict[str, Coding] = {
    "groups of 48": Coding("row", 4, levels="offset", **scales(43, 49, col_block=48)),
    "groups of 16": Coding("row", 4, levels="E2M1", **scales(43, 147, col_block=16)),
    "groups of 2048": Coding("row", 8, levels="F8_E4M3", **scales(2, 2, row_block=32, col_block=2048)),
    "uint8, groups with zeros": Coding("row", 8, zero=floats(43, 37), **scales(43, 37, col_block=64)),
    "uint8, groups with shifts": Coding("row", 8, shift=floats(43, 74), **scales(43, 74, col_block=32)),
    "wide int8 rows": Coding("row", 8, levels="int", **scales(43, 1, col_block=WIDE_COLS)),
    "int 3, rows with zeros": Coding("row", 3, levels="int", zero=floats(43, 1), **scales(43, 1, col_block=WIDE_COLS)),
    "runs of 48": Coding(
        "row_high", 4, levels="table", table=TABLE, flat_block=48, tensor_cols=WIDE_COLS, **scales(1, 43 * 49)
    ),
    "words of 8": Coding("down", 8, zero=floats(2, WIDE_COLS), row_block=32, **scales(2, WIDE_COLS)),
    "words of 4, act-order": Coding(
        "down", 4, zero=floats(5, WIDE_COLS), row_group=groups(43, 5), **scales(5, WIDE_COLS)
    ),
    "words of 3": Coding("down", 3, zero=floats(2, WIDE_COLS), row_block=32, **scales(2, WIDE_COLS)),
    "wide awq": Coding("awq", 4, zero=floats(2, WIDE_COLS), row_block=32, **scales(2, WIDE_COLS)),
    "planes": Coding("plane", 8, zero=floats(2, WIDE_COLS), row_block=32, **scales(2, WIDE_COLS)),
    "e5m2 words": Coding("down", 8, levels="F8_E5M2", **scales(1, 1, row_block=43, col_block=WIDE_COLS)),
}
"""Codings of 43 rows, wider than what the native kernel takes at a time, each found by another of its ways."""

LAST_OF_FLOATS = {"F8_E4M3": 0xFE, "F8_E5M2": 0xFB}
"""Bits of 8-bit floats that leave the codes without infinities and NaN, none of them the sign."""


def around_zero(coding: Coding) -> Coding:
    """The same with zeros or shifts by which the middle of the levels stands for a number near zero, as usual."""
    middle = ((1 << coding.bits) - 1) / 2 if coding.levels == "uint" else 0
    scale = np.frombuffer(coding.scale or b"", np.float32)
    near = middle + np.frombuffer(floats(len(scale)), np.float32) / 4
    zero = near.astype(np.float32).tobytes() if coding.zero else None
    shift = (-near * scale).astype(np.float32).tobytes() if coding.shift else None
    return replace(coding, zero=zero, shift=shift)


def weights_of(name: str, rows: int, cols: int, **rest: Any) -> Chunk:
    """Numbers around zero, all finite: what kernels are fast for. Codes of CODINGS and WIDE, blocks of BLOCKS."""
    if name in BLOCKS:
        stored = blocks_of(name, rows, cols, around_zero=True)
        coding = Coding(name, table=grid(name))
        return Chunk(stored.tobytes(), "", rows, cols, 0, stored.shape[1], 32, coding=coding, **rest)
    chunk = chunk_of(around_zero(CODINGS.get(name) or WIDE[name]), rows, cols, **rest)
    assert chunk.coding is not None
    kept = np.uint8(LAST_OF_FLOATS.get(chunk.coding.levels, 0xFF))
    return replace(chunk, data=(np.frombuffer(chunk.host_data, np.uint8) & kept).tobytes())


WEIGHTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "by column": {"col_weight": RNG.uniform(0.5, 2, 640).astype(np.float32).tobytes()},
    "centred": {"col_weight": RNG.uniform(0.5, 2, 640).astype(np.float32).tobytes(), "cross": True},
    "by row": {"row_weight": RNG.uniform(0.5, 2, 96).astype(np.float32).tobytes()},
}


def weights_for(kind: str, rows: int, cols: int) -> dict[str, Any]:
    cut = {"col_weight": 4 * cols, "row_weight": 4 * rows}
    return {key: value[: cut[key]] if key in cut else value for key, value in WEIGHTS[kind].items()}


def assert_agrees(found: Marginals, truth: Marginals, chunk: Chunk) -> None:
    """1e-6 of the std of the row, column or whole chunk; the same elements non-finite."""
    values = decode(chunk)
    spread = float(np.nanstd(np.where(np.isfinite(values), values, np.nan)))
    assert found.nonfinite == truth.nonfinite
    assert found.abs_max == pytest.approx(truth.abs_max, rel=1e-6)
    for name in ("row", "col", "weighted_row", "weighted_col"):
        mine, theirs = getattr(found, name), getattr(truth, name)
        assert (mine is None) == (theirs is None), name
        if mine is None:
            continue
        mean, wanted = np.frombuffer(mine.mean), np.frombuffer(theirs.mean)
        np.testing.assert_allclose(mean, wanted, rtol=1e-6, atol=4e-6 * spread, err_msg=name)
        m2, wanted = np.frombuffer(mine.m2), np.frombuffer(theirs.m2)
        np.testing.assert_allclose(m2, wanted, rtol=4e-6, atol=1e-9 * spread**2, err_msg=name)
    if truth.cross is not None:
        cross, wanted = np.frombuffer(found.cross or b""), np.frombuffer(truth.cross)
        np.testing.assert_allclose(cross, wanted, rtol=1e-5, atol=1e-4 * spread**2, err_msg="cross")


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", CODINGS)
def test_every_coding_is_reduced_as_it_is_defined(name: str, kind: str, backend: Backend) -> None:
    coding = CODINGS[name]
    for rows, cols, first_row, first_col in ((96, 640, 0, 0), (33, 530, 32, 64), (32, 1, 0, 8), (1, 37, 64, 16)):
        chunk = chunk_of(coding, rows, cols, first_row, first_col, **weights_for(kind, rows, cols))
        assert_agrees(backend.marginals(chunk), load("reference").marginals(chunk), chunk)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", WIDE)
def test_more_columns_than_are_taken_at_a_time(name: str, kind: str, backend: Backend) -> None:
    for rows, cols, first_col in ((43, WIDE_COLS, 0), (9, 2075, 272), (13, 1030, 40)):
        chunk = chunk_of(WIDE[name], rows, cols, 0, first_col, **weights_wide(kind, rows, cols))
        assert_agrees(backend.marginals(chunk), load("reference").marginals(chunk), chunk)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", [*CODINGS, *WIDE, *BLOCKS])
def test_codes_of_numbers_around_zero(name: str, kind: str, backend: Backend) -> None:
    """Codes at random are mostly NaN or far from zero, which kernels leave to their slow, exact part."""
    rows, cols = (43, WIDE_COLS) if name in WIDE else (75, 768 if name in BLOCKS else 613)
    chunk = weights_of(name, rows, cols, **weights_wide(kind, rows, cols))
    assert_agrees(backend.marginals(chunk), load("reference").marginals(chunk), chunk)


@pytest.mark.parametrize("kind", ["plain", "by column", "by row"])
@pytest.mark.parametrize("name", CODINGS)
def test_every_coding_expands_to_its_numbers_times_the_weights(name: str, kind: str, backend: Backend) -> None:
    for rows, cols, first_row, first_col in ((96, 640, 0, 0), (33, 530, 32, 64), (1, 37, 64, 16)):
        chunk = chunk_of(CODINGS[name], rows, cols, first_row, first_col, **weights_for(kind, rows, cols))
        expected = decode(chunk)
        for weight, shape in ((chunk.col_weight, (1, -1)), (chunk.row_weight, (-1, 1))):
            if weight is not None:
                expected = expected * np.frombuffer(weight, np.float32).reshape(shape)
        out = np.full((rows, cols), np.inf, np.float32)
        backend.expand(chunk, out.data.cast("B"))
        expected = np.where(np.isfinite(expected), expected, np.nan)
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6 * float(np.nanmax(np.abs(expected))))


def test_codes_lie_where_the_formats_say() -> None:
    """Built up bit by bit, in the words of Coding."""
    one = {"scale": np.ones(1, np.float32).tobytes(), "row_block": 999, "col_block": 999}
    for bits in range(1, 9):
        chunk = chunk_of(Coding("row", bits, **one), 3, 21)
        for i in range(3):
            row = int.from_bytes(bytes(chunk.data)[i * chunk.row_stride_bytes :][: chunk.row_stride_bytes], "little")
            assert decode(chunk)[i].tolist() == [row >> (bits * j) & ((1 << bits) - 1) for j in range(21)]
        chunk = chunk_of(Coding("down", bits, **one), 64, 3)
        words = np.frombuffer(chunk.data, "<u4").reshape(-1, 3)
        for j in range(3):
            column = sum(int(word) << (32 * n) for n, word in enumerate(words[:, j]))
            assert decode(chunk)[:, j].tolist() == [column >> (bits * i) & ((1 << bits) - 1) for i in range(64)]
    chunk = chunk_of(Coding("row_high", 4, **one), 2, 6)
    assert decode(chunk)[1].tolist() == [int(digit, 16) for digit in bytes(chunk.data)[3:6].hex()]
    chunk = chunk_of(Coding("awq", 4, **one), 1, 8)
    word = int.from_bytes(bytes(chunk.data), "little")
    assert [word >> (4 * k) & 15 for k in range(8)] == decode(chunk)[0][[0, 2, 4, 6, 1, 3, 5, 7]].tolist()
    chunk = chunk_of(Coding("plane", 2, place=4, **one), 1, 5)
    assert decode(chunk)[0].tolist() == [byte >> 4 & 3 for byte in bytes(chunk.data)]


def test_values_follow_the_formula() -> None:
    """Every way to find an entry of the scale, element by element."""
    for name, coding in CODINGS.items():
        chunk = chunk_of(coding, 32, 77, 32, 24)
        plain = {"scale": np.ones(1, np.float32).tobytes(), "scale_rows": 1, "scale_cols": 1}
        at = {"row_block": 10**6, "col_block": 10**6, "flat_block": 0, "row_group": None, "col_group": None}
        level = decode(replace(chunk, coding=replace(coding, zero=None, shift=None, **plain, **at)))
        arrays = [np.frombuffer(x, np.float32) if x else None for x in (coding.scale, coding.zero, coding.shift)]
        scale, zero, shift = arrays
        assert scale is not None
        row_group, col_group = (np.frombuffer(x, np.int32) if x else None for x in (coding.row_group, coding.col_group))
        for i, j in ((0, 0), (1, 76), (31, 5), (17, 40)):
            row, col = 32 + i, 24 + j
            index = (row * 640 + col) // coding.flat_block if coding.flat_block else None
            if index is None:
                r = row_group[row] if row_group is not None else row // coding.row_block % coding.scale_rows
                index = r * coding.scale_cols + (col_group[col] if col_group is not None else col // coding.col_block)
            expected = (level[i, j] - (zero[index] if zero is not None else 0.0)) * float(scale[index])
            expected += shift[index] if shift is not None else 0.0
            assert decode(chunk)[i, j] == pytest.approx(expected, rel=1e-12, nan_ok=True), name


MIDDLE = {"Q4_1": 7.5, "Q5_1": 15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}
"""Of the levels of types with minima."""


def blocks_of(name: str, rows: int, cols: int, around_zero: bool = False) -> NDArray[np.uint8]:
    """Random blocks; scales that float16 holds as finite, moderate numbers."""
    kind = gguf.GGMLQuantizationType[name]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    stored = RNG.integers(0, 256, (rows, cols // elements, nbytes), np.uint8)
    half = RNG.uniform(0.001, 0.1, (rows, cols // elements, 2)).astype(np.float16).view(np.uint8)
    where = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208, "TQ1_0": 52, "TQ2_0": 64}.get(name, 0)
    if name == "MXFP4":
        stored[..., 0] = RNG.integers(110, 135, stored.shape[:2])
    elif name == "IQ1_M":
        stored[..., 55] = 0x20 | stored[..., 55] & 15  # the highest part of its scale
    elif name != "NVFP4":
        stored[..., where : where + 2] = half[..., :2]
        if middle := MIDDLE.get(name):
            least = half[..., :2].copy().view(np.float16) * np.float16(middle if name[3:] == "K" else -middle)
            stored[..., where + 2 : where + 4] = least.view(np.uint8) if around_zero else half[..., 2:]
    return stored.reshape(rows, -1)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_every_ggml_block_is_reduced_as_gguf_defines_it(name: str, kind: str, backend: Backend) -> None:
    rows, cols = 37, 768
    stored = blocks_of(name, rows, cols)
    coding = Coding(name, table=grid(name))
    row_bytes = stored.shape[1]
    chunk = Chunk(stored.tobytes(), "", rows, cols, 0, row_bytes, 32, coding=coding, **weights_wide(kind, rows, cols))
    truth = gguf.dequantize(stored, gguf.GGMLQuantizationType[name]).astype(np.float64)
    np.testing.assert_allclose(decode(chunk), truth, rtol=1e-12)
    assert_agrees(backend.marginals(chunk), load("reference").marginals(chunk), chunk)


def weights_wide(kind: str, rows: int, cols: int) -> dict[str, Any]:
    gain = RNG.uniform(0.5, 2, max(rows, cols)).astype(np.float32)
    made = {"col_weight": gain[:cols].tobytes(), "row_weight": gain[:rows].tobytes()}
    return {key: made.get(key, value) for key, value in WEIGHTS[kind].items()}


@pytest.mark.parametrize("weight", ["col_weight", "row_weight"])
@pytest.mark.parametrize("around", ["zero", "anything"])
@pytest.mark.parametrize("name", [*CODINGS, *WIDE, *BLOCKS, "low rank"])
def test_all_simd_levels_agree_to_the_bit(name: str, around: str, weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native = load("native_cpu")
    if native.why_unavailable():
        pytest.skip("the C++ extension was not built")
    from llmfp import _native

    rows, cols = (43, WIDE_COLS) if name in WIDE else (65, 768 if name in BLOCKS or name == "low rank" else 530)
    count = cols if weight == "col_weight" else rows
    rest: dict[str, Any] = {weight: RNG.uniform(0.5, 2, count).astype(np.float32).tobytes()}
    rest["cross"] = weight == "col_weight"
    if name == "low rank":
        data = RNG.normal(0, 1, (rows, cols)).astype(np.float16).tobytes()
        chunk = Chunk(data, "F16", rows, cols, 0, 2 * cols, 32, low_rank=low_rank(rows, cols), **rest)
    elif around == "zero":
        chunk = weights_of(name, rows, cols, **rest)
    elif name in BLOCKS:
        stored = blocks_of(name, rows, cols)
        coding = Coding(name, table=grid(name))
        chunk = Chunk(stored.tobytes(), "", rows, cols, 0, stored.shape[1], 32, coding=coding, **rest)
    else:
        chunk = chunk_of(CODINGS.get(name) or WIDE[name], rows, cols, **rest)
    best = native.marginals(chunk)
    for level in _native.levels()[1:]:
        monkeypatch.setenv("LLMFP_SIMD", level)
        assert native.marginals(chunk) == best, level


def low_rank(rows: int, cols: int, rank: int = 5) -> LowRank:
    return LowRank(rank, floats(rows, rank), floats(rank, cols))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"])
def test_an_adapter_adds_to_plain_weights(dtype: str, backend: Backend) -> None:
    size = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}.get(dtype, 1)
    values = RNG.normal(0, 1, 40 * 700)
    as_stored: NDArray[Any] = values.astype(np.float64)
    if dtype == "BF16":
        as_stored = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    elif size == 1:
        as_stored = RNG.integers(0, 120, values.size).astype(np.uint8)
    else:
        as_stored = values.astype(f"<f{size}")
    plain = Chunk(as_stored.tobytes(), dtype, 40, 700, 0, 700 * size, 32, first_row=3, first_col=2)
    chunk = replace(plain, low_rank=low_rank(43, 702))
    assert chunk.low_rank is not None
    left = np.frombuffer(chunk.low_rank.left, np.float32).reshape(43, 5).astype(np.float64)
    right = np.frombuffer(chunk.low_rank.right, np.float32).reshape(5, 702).astype(np.float64)
    np.testing.assert_allclose(decode(chunk), decode(plain) + left[3:] @ right[:, 2:], rtol=1e-12, atol=1e-12)
    assert_agrees(backend.marginals(chunk), load("reference").marginals(chunk), chunk)


def test_an_adapter_adds_to_codes(backend: Backend) -> None:
    chunk = chunk_of(CODINGS["gptq 4"], 64, 300, 32, 8, low_rank=low_rank(96, 640))
    assert_agrees(backend.marginals(chunk), load("reference").marginals(chunk), chunk)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, 1e-45, 3e38])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_scales_that_are_no_usual_numbers(bad: float, kind: str, backend: Backend) -> None:
    coding = CODINGS["mxfp4"]
    scale = np.frombuffer(coding.scale or b"", np.float32).copy()
    scale[[3, 500, 501]] = bad
    chunk = chunk_of(replace(coding, scale=scale.tobytes()), 96, 640, **weights_for(kind, 96, 640))
    if backend.name == "triton_gpu" and bad in (1e-45, 3e38):
        pytest.skip("a float32 copy cannot hold products beyond float32")
    found, truth = backend.marginals(chunk), load("reference").marginals(chunk)
    if bad == 3e38:  # six times that is beyond float32, not beyond float64
        assert found.nonfinite >= truth.nonfinite
        return
    assert_agrees(found, truth, chunk)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_rows_of_blocks_weighted_by_no_usual_number(name: str, bad: float, backend: Backend) -> None:
    """A column that overflows is looked at again, element by element."""
    stored = blocks_of(name, 40, 768)
    weight = RNG.uniform(0.5, 2, 40).astype(np.float32)
    weight[7] = bad
    coding = Coding(name, table=grid(name))
    chunk = Chunk(stored.tobytes(), "", 40, 768, 0, stored.shape[1], 32, row_weight=weight.tobytes(), coding=coding)
    if backend.name == "triton_gpu":
        pytest.skip("a float32 copy cannot hold products beyond float32")
    with np.errstate(all="ignore"):
        assert_agrees(backend.marginals(chunk), load("reference").marginals(chunk), chunk)


def test_chunks_do_not_show_in_the_result(backend: Backend) -> None:
    whole = chunk_of(CODINGS["gptq 3"], 96, 400)
    top = replace(whole, rows=32)
    rest = replace(whole, rows=64, first_row=32, offset_bytes=3 * whole.row_stride_bytes)
    parts = [backend.marginals(part) for part in (top, rest)]
    assert backend.merge(parts) == backend.merge([backend.marginals(whole)])


BREAK: dict[str, dict[str, Any]] = {
    "packing": {"packing": "sideways"},
    "levels": {"levels": "roman"},
    "bits": {"bits": 9},
    "no bits": {"bits": 0},
    "place": {"packing": "plane", "place": 5},
    "short scale": {"scale": bytes(8)},
    "no scale": {"scale": None},
    "short zero": {"zero": bytes(4)},
    "too few columns of scales": {"col_block": 8},
    "row_block": {"row_block": 0},
    "row_group": {"row_group": np.full(96, 96, np.int32).tobytes()},
    "negative row_group": {"row_group": np.full(96, -1, np.int32).tobytes()},
    "short row_group": {"row_group": bytes(8)},
    "col_group": {"col_group": np.full(640, 20, np.int32).tobytes()},
    "flat_block": {"flat_block": 1, "tensor_cols": 640},
    "flat_block without columns": {"flat_block": 64},
    "huge": {"scale_rows": 2**62, "scale_cols": 2**62},
    "both": {"zero": bytes(4 * 96 * 20), "shift": bytes(4 * 96 * 20)},
    "table": {"levels": "table"},
    "fp8 of 4 bits": {"levels": "F8_E4M3"},
    "ggml without whole blocks": {"packing": "Q4_K"},
    "grid": {"packing": "IQ3_S", "table": bytes(5)},
}


@pytest.mark.parametrize("name", BREAK)
def test_what_makes_no_sense_is_refused_before_memory_is_touched(name: str) -> None:
    native = load("native_cpu")
    if native.why_unavailable():
        pytest.skip("the C++ extension was not built")
    chunk = chunk_of(CODINGS["offset 4"], 96, 600 if "whole" in name else 640)
    assert chunk.coding is not None
    native.marginals(chunk)
    with pytest.raises(ValueError):  # noqa: PT011
        native.marginals(replace(chunk, coding=replace(chunk.coding, **BREAK[name])))


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 97},
        {"cols": 648},
        {"first_col": 8},
        {"first_row": -1},
        {"first_row": 2**62},
        {"row_stride_bytes": 8},
        {"offset_bytes": 1},
        {"low_rank": LowRank(0, b"", b"")},
        {"low_rank": LowRank(2, bytes(8 * 95), bytes(8 * 640))},
        {"low_rank": LowRank(2, bytes(8 * 96), bytes(8 * 639))},
        {"low_rank": LowRank(2, bytes(8 * 96), bytes(8 * 640 + 4))},
    ],
)
def test_what_reaches_beyond_its_buffers_is_refused(change: dict[str, Any]) -> None:
    native = load("native_cpu")
    if native.why_unavailable():
        pytest.skip("the C++ extension was not built")
    with pytest.raises(ValueError):  # noqa: PT011
        native.marginals(replace(chunk_of(CODINGS["offset 4"], 96, 640), **change))


def test_all_fp8_codes_have_a_value() -> None:
    """Against torch's own conversion."""
    torch = pytest.importorskip("torch")
    every = torch.arange(256, dtype=torch.uint8)
    for dtype, name in (("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")):
        np.testing.assert_array_equal(codes.fp8_table(dtype), every.view(getattr(torch, name)).double().numpy())
