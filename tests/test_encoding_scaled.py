"""8-bit codes with scales: FP8 by tensor, row and block, int8; real slices; files that contradict themselves."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmfp.kernels.codes import fp8_table
from tests.checkpoints import Stored, as_bf16
from tests.quantised import DECODING, ROLES, check_statistics, decoded, error_of, plan_of, write_quantised

HEADS = 4
BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
RNG = np.random.default_rng(0)


def e4m3(*shape: int) -> NDArray[np.uint8]:
    """Codes of any finite value."""
    codes = RNG.integers(0, 127, shape, np.uint8)
    return codes | (RNG.integers(0, 2, shape, np.uint8) << np.uint8(7))


def fp8(codes: NDArray[np.uint8], dtype: str = "F8_E4M3") -> Stored:
    return Stored(dtype, codes.shape, codes.tobytes())


def positive(*shape: int) -> NDArray[np.float32]:
    return RNG.uniform(0.01, 0.02, shape).astype(np.float32)


def spread(scale: NDArray[Any], rows: int, cols: int, block: int = 128) -> NDArray[np.float64]:
    """A scale for every element, from one per block."""
    return np.kron(scale.astype(np.float64), np.ones((block, block)))[:rows, :cols]


@pytest.mark.parametrize("backend", [*DECODING, "torch_fallback"])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("kind", ["tensor", "row", "column of rows", "block", "E8M0", "short name"])
def test_every_kind_of_scale(kind: str, dtype: str, backend: str, tmp_path: Path) -> None:
    if backend == "torch_fallback":
        pytest.importorskip("torch")
    projections, truth = {}, {}
    for role in ROLES:
        rows, cols = (288, 160) if role != "o" else (160, 288)  # neither is a multiple of 128
        codes = e4m3(rows, cols) if dtype == "F8_E4M3" else RNG.integers(0, 0x7C, (rows, cols), np.uint8)
        values = fp8_table(dtype)[codes]
        field: str = "weight_scale"
        scale: NDArray[Any] | Stored
        match kind:
            case "tensor":
                scale = positive()
                truth[role] = values * float(scale)
            case "row" | "column of rows":
                scale = positive(rows, 1) if kind == "row" else positive(rows)
                truth[role] = values * scale.reshape(-1, 1).astype(np.float64)
            case "E8M0":
                exponents = RNG.integers(110, 130, (-(-rows // 128), -(-cols // 128)), np.uint8)
                scale, field = Stored("F8_E8M0", exponents.shape, exponents.tobytes()), "weight_scale_inv"
                truth[role] = values * spread(2.0 ** (exponents.astype(float) - 127), rows, cols)
            case _:
                scale = positive(-(-rows // 128), -(-cols // 128))
                field = "weight_scale_inv" if kind == "block" else "scale"
                truth[role] = values * spread(scale, rows, cols)
        projections[role] = {"weight": fp8(codes, dtype), field: scale, "input_scale": positive()}
    folder = write_quantised(tmp_path, projections, BLOCKS, heads=HEADS)
    check_statistics(folder, truth, backend)
    np.testing.assert_allclose(decoded(folder, "q"), truth["q"], rtol=1e-6)
    assert all("scale per" in read["encoding"] for read in plan_of(folder)["reads"])


@pytest.mark.parametrize("backend", DECODING)
@pytest.mark.parametrize("zeros", [False, True])
def test_int8_of_compressed_tensors(zeros: bool, backend: str, tmp_path: Path) -> None:
    projections, truth = {}, {}
    for role in ROLES:
        codes = RNG.integers(-128, 128, (64, 64)).astype(np.int8)
        scale, zero = positive(64, 4), RNG.integers(-20, 20, (64, 4)).astype(np.int8)
        projections[role] = {"weight": codes, "weight_scale": as_bf16(scale)}
        stored = (scale.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
        if zeros:
            projections[role]["weight_zero_point"] = zero
        shifted = codes.astype(np.float64) - (np.repeat(zero, 16, 1) if zeros else 0)
        truth[role] = shifted * np.repeat(stored, 16, 1)
    stated = {"quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": 8, "group_size": 16}}}}}
    check_statistics(write_quantised(tmp_path, projections, stated, heads=HEADS), truth, backend)


@pytest.mark.parametrize("backend", [*DECODING, "torch_fallback"])
def test_real_slices(backend: str, tmp_path: Path, shared_data: Path) -> None:
    """Slices of real FP8 checkpoints, against float64, and against what their library made of them in bf16."""
    if backend == "torch_fallback":
        pytest.importorskip("torch")
    paths = sorted((shared_data / "quantized_slices" / "fp8").glob("*.bin"))
    assert len(paths) == 3
    for path in paths:
        content = path.read_bytes()
        scheme, scale_code, rows, cols, weight_bytes, scale_bytes, expected_bytes = struct.unpack_from("<7I", content)
        codes = np.frombuffer(content, np.uint8, weight_bytes, 28).reshape(rows, cols)
        raw = content[28 + weight_bytes :][:scale_bytes]
        shape = {0: (-(-rows // 128), -(-cols // 128)), 1: (1,), 2: (rows, 1)}[scheme]
        dtype, width = {0: ("F32", 4), 1: ("BF16", 2), 2: ("F16", 2)}[scale_code]
        numbers = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[dtype])
        if dtype == "BF16":
            numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
        assert width * numbers.size == scale_bytes
        scale = numbers.astype(np.float64).reshape(shape)
        truth = fp8_table("F8_E4M3")[codes] * (spread(scale, rows, cols) if scheme == 0 else scale)
        bits = (
            np.frombuffer(content, "<u2", expected_bytes // 2, 28 + weight_bytes + scale_bytes).astype(np.uint32) << 16
        )
        np.testing.assert_allclose(truth.ravel(), bits.view(np.float32), rtol=2.0**-8, atol=1e-12)
        field = "weight_scale_inv" if scheme == 0 else "weight_scale"
        quantised = {"weight": fp8(codes), field: Stored(dtype, shape, raw)}
        plain = {"weight": truth}
        projections = {"q": quantised, "k": quantised, "v": quantised, "o": {"weight": np.ones((cols, rows), "f4")}}
        folder = write_quantised(tmp_path / path.stem, projections, BLOCKS, heads=1)
        check_statistics(folder, dict.fromkeys("qkv", plain["weight"]), backend)


def broken(tmp_path: Path, change: dict[str, Any], config: dict[str, Any] | None = None) -> str:
    good: dict[str, Any] = {"weight": fp8(e4m3(256, 256)), "weight_scale_inv": positive(2, 2)}
    projections = {role: dict(good) for role in ROLES}
    projections["q"] = {key: value for key, value in {**good, **change}.items() if value is not None}
    return error_of(write_quantised(tmp_path, projections, BLOCKS if config is None else config, heads=HEADS))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_scale_inv": None}, ["q_proj.weight", "scales are missing"]),
        ({"weight_scale_inv": positive(2, 3)}, ["q_proj.weight_scale_inv", "[2, 3]", "128×128"]),
        ({"weight_scale_inv": positive(3, 2)}, ["q_proj.weight_scale_inv", "[3, 2]"]),
        ({"weight_scale_inv": positive(2, 2).astype(np.int32)}, ["q_proj.weight_scale_inv", "I32"]),
        ({"weight": np.ones((256, 256), np.float32)}, ["q_proj.weight", "F32", "weight_scale_inv"]),
        ({"weight": fp8(e4m3(256, 256), "F8_E4M3FNUZ")}, ["q_proj.weight", "F8_E4M3FNUZ"]),
        ({"weight_zero_point": np.zeros((1, 2), np.int8)}, ["q_proj.weight_zero_point", "[1, 2]"]),
    ],
)
def test_what_contradicts_itself_is_refused(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    message = broken(tmp_path, change)
    for word in words:
        assert word in message


@pytest.mark.parametrize("size", [None, [0, 128], [-1, 128], [128], "128", [True, 1], [128.0, 128.0], [2**70, 1]])
def test_block_sizes_that_are_none_are_refused(size: Any, tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": size}}
    assert "weight_scale_inv" in broken(tmp_path, {}, config)


@pytest.mark.parametrize("role", "qkvo")
@pytest.mark.parametrize("field", ["weight_scale_inv", "qzeros", "SCB", "weight.absmax"])
def test_scales_without_their_codes_are_named(field: str, role: str, tmp_path: Path) -> None:
    """Not a projection that the layer lacks by design."""
    whole = {"weight": np.ones((16, 16), np.float32)}
    parts: dict[str, Any] = {**dict.fromkeys("qkvo", whole), role: {field: np.ones((1, 1), np.float32)}}
    found = error_of(write_quantised(tmp_path, parts, heads=4))
    module = f"model.layers.0.self_attn.{role}_proj"
    assert (
        f"tensor '{module}.{field}' is there, and the codes that it belongs to, {module}.weight, are missing" in found
    )
