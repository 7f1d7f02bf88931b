"""compressed-tensors, MXFP4, NVFP4 and MLX: packed here by other means than they are unpacked by.

When this was written, also compared by hand with what compressed-tensors 0.20 packs (2 to 8 bits, with and without
zeros) and what mlx 0.32 makes of its own quantize, in every mode and width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmfp.kernels.codes import E2M1, fp8_table
from tests.checkpoints import Stored
from tests.packing import nibbles, words
from tests.quantised import DECODING, ROLES, check_statistics, decoded, error_of, plan_of, write_quantised

HEADS, SIZE = 4, 96
RNG = np.random.default_rng(0)


def random_codes(bits: int, *shape: int) -> NDArray[np.int64]:
    return RNG.integers(0, 1 << bits, shape)


def positive(*shape: int) -> NDArray[np.float32]:
    return RNG.uniform(0.01, 0.02, shape).astype(np.float32)


def packed_config(bits: int, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"weights": {"num_bits": bits, **weights}, "targets": ["Linear"]}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


@pytest.mark.parametrize("backend", DECODING)
@pytest.mark.parametrize("kind", ["groups", "rows", "tensor", "zeros", "int8 zeros", "act-order", "no act-order"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_compressed_tensors(bits: int, kind: str, backend: str, tmp_path: Path) -> None:
    projections, truth = {}, {}
    for role in ROLES:
        codes = random_codes(bits, SIZE, SIZE)
        shape = {"rows": (SIZE, 1), "tensor": (1,)}.get(kind, (SIZE, 3))
        scale = positive(*shape)
        column = np.arange(SIZE) * shape[-1] // SIZE
        fields: dict[str, Any] = {
            "weight_packed": words(codes, bits).view(np.int32),
            "weight_scale": scale,
            "weight_shape": np.array([SIZE, SIZE], np.int64),
        }
        if kind == "act-order":
            column = RNG.integers(0, 3, SIZE)
            fields["weight_g_idx"] = column.astype(np.int32)
        if kind == "no act-order":
            fields["weight_g_idx"] = np.full(SIZE, -1, np.int32)
        zero: NDArray[Any] = np.full((SIZE, 3), 1 << (bits - 1))
        if kind == "zeros":
            zero = random_codes(bits, SIZE, 3)
            fields["weight_zero_point"] = np.ascontiguousarray(words(zero.T, bits).T).view(np.int32)
        if kind == "int8 zeros":
            zero = random_codes(bits, SIZE, 3)
            fields["weight_zero_point"] = (zero - (1 << (bits - 1))).astype(np.int8)
        full = np.broadcast_to(scale.reshape(-1, shape[-1]), (SIZE, shape[-1]))[:, column].astype(np.float64)
        truth[role] = (codes - (zero[:, column] if shape[-1] == 3 else zero[:, :1])) * full
        projections[role] = fields
    folder = write_quantised(tmp_path, projections, packed_config(bits), heads=HEADS)
    check_statistics(folder, truth, backend)
    np.testing.assert_allclose(decoded(folder, "o"), truth["o"], rtol=1e-6)
    assert all(f"{bits} bits" in read["encoding"] for read in plan_of(folder)["reads"])


def e4m3_scales(*shape: int) -> tuple[Stored, NDArray[np.float64]]:
    codes = RNG.integers(0x20, 0x7E, shape, np.uint8)
    return Stored("F8_E4M3", shape, codes.tobytes()), fp8_table("F8_E4M3")[codes]


@pytest.mark.parametrize("backend", DECODING)
@pytest.mark.parametrize("kind", ["nvfp4 divided", "nvfp4 multiplied", "mxfp4", "mxfp4 unpacked name", "mxfp4 blocks"])
def test_four_bit_floats(kind: str, backend: str, tmp_path: Path) -> None:
    projections, truth = {}, {}
    for role in ROLES:
        codes = random_codes(4, SIZE, SIZE)
        values = np.array(E2M1)[codes]
        fields: dict[str, Any]
        if kind.startswith("nvfp4"):
            stored, scale = e4m3_scales(SIZE, SIZE // 16)
            whole = np.array([300.0 if "divided" in kind else 0.003], np.float32)
            names = ("weight_packed", "weight_global_scale") if "divided" in kind else ("weight", "weight_scale_2")
            fields = {names[0]: nibbles(codes), "weight_scale": stored, names[1]: whole}
            scale = scale / float(whole[0]) if "divided" in kind else scale * float(whole[0])
            truth[role] = values * np.repeat(scale, 16, 1)
        else:
            exponent = RNG.integers(115, 125, (SIZE, SIZE // 32), np.uint8)
            truth[role] = values * np.repeat(2.0 ** (exponent.astype(float) - 127), 32, 1)
            fields = {"weight_packed": nibbles(codes), "weight_scale": exponent}
            if "name" in kind:
                fields = {"weight": nibbles(codes), "weight_scale": exponent}
            if "blocks" in kind:
                fields = {"weight_blocks": nibbles(codes).reshape(SIZE, -1, 16), "weight_scales": exponent}
        projections[role] = fields
    folder = write_quantised(tmp_path, projections, heads=HEADS)
    check_statistics(folder, truth, backend)
    assert all("FP4" in read["encoding"] for read in plan_of(folder)["reads"])


@pytest.mark.parametrize("backend", DECODING)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx(bits: int, backend: str, tmp_path: Path) -> None:
    projections, truth = {}, {}
    for role in ROLES:
        width = 8 if role == "v" else bits  # said of this module alone
        codes, scale, bias = random_codes(width, SIZE, SIZE), positive(SIZE, 3), -8 * positive(SIZE, 3)
        projections[role] = {"weight": words(codes, width), "scales": scale, "biases": bias.astype(np.float16)}
        stored = bias.astype(np.float16).astype(np.float64)
        truth[role] = codes * np.repeat(scale.astype(np.float64), 32, 1) + np.repeat(stored, 32, 1)
    own = {"model.layers.0.self_attn.v_proj": {"bits": 8, "group_size": 32}}
    config = {"quantization": {"bits": bits, "group_size": 32, **own}}
    folder = write_quantised(tmp_path, projections, config, heads=HEADS)
    check_statistics(folder, truth, backend)
    labels = {read["roles"][0]: read["encoding"] for read in plan_of(folder)["reads"]}
    assert (labels["q"], labels["v"]) == (f"MLX, {bits} bits, groups of 32", "MLX, 8 bits, groups of 32")


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_mlx_s_small_floats(mode: str, tmp_path: Path) -> None:
    projections, truth = {}, {}
    for role in ROLES:
        bits, block = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}[mode]
        codes = random_codes(4, SIZE, SIZE) if bits == 4 else RNG.integers(0, 127, (SIZE, SIZE))
        scale = RNG.integers(0x30, 0x60, (SIZE, SIZE // block), np.uint8)
        values = np.array(E2M1)[codes] if bits == 4 else fp8_table("F8_E4M3")[codes]
        factor = fp8_table("F8_E4M3")[scale] if mode == "nvfp4" else 2.0 ** (scale.astype(float) - 127)
        projections[role] = {"weight": words(codes, bits), "scales": scale}
        truth[role] = values * np.repeat(factor, block, 1)
    config = {"quantization": {"bits": bits, "group_size": block, "mode": mode}}
    folder = write_quantised(tmp_path, projections, config, heads=HEADS)
    check_statistics(folder, truth, "native_cpu")
    assert {read["encoding"] for read in plan_of(folder)["reads"]} == {f"MLX {mode}, blocks of {block}"}


CT: dict[str, Any] = {
    "weight_packed": words(random_codes(4, SIZE, SIZE), 4).view(np.int32),
    "weight_scale": positive(SIZE, 3),
    "weight_shape": np.array([SIZE, SIZE], np.int64),
}
FP4: dict[str, Any] = {
    "weight_packed": nibbles(random_codes(4, SIZE, SIZE)),
    "weight_scale": e4m3_scales(SIZE, SIZE // 16)[0],
    "weight_global_scale": np.ones(1, np.float32),
}
MLX: dict[str, Any] = {
    "weight": words(random_codes(4, SIZE, SIZE), 4),
    "scales": positive(SIZE, 3),
    "biases": positive(SIZE, 3),
}
BROKEN: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (CT, {"weight_scale": None}, ["q_proj.weight_packed", "weight_scale is missing"]),
    (CT, {"weight_shape": None}, ["weight_shape is missing"]),
    (CT, {"weight_packed": None}, ["q"]),
    (CT, {"weight_packed": CT["weight_packed"].astype(np.float32)}, ["q_proj.weight_packed", "F32"]),
    (CT, {"weight_packed": CT["weight_packed"][:, :-1]}, ["q_proj.weight_packed", "[96, 11]", "4 bits"]),
    (CT, {"weight_scale": positive(SIZE, 5)}, ["q_proj.weight_scale", "[96, 5]"]),
    (CT, {"weight_scale": positive(SIZE + 1, 3)}, ["q_proj.weight_scale", "[97, 3]"]),
    (CT, {"weight_shape": np.array([SIZE, -1], np.int64)}, ["q_proj.weight_shape", "-1"]),
    (CT, {"weight_shape": np.array([SIZE, 2**62], np.int64)}, ["q_proj.weight_packed"]),
    (CT, {"weight_shape": np.array([SIZE], np.int64)}, ["q_proj.weight_shape", "[1]"]),
    (CT, {"weight_shape": np.zeros(2000, np.int64)}, ["q_proj.weight_shape", "[2000]"]),
    (CT, {"weight_g_idx": np.full(SIZE, 3, np.int32)}, ["q_proj.weight_g_idx", "holds 3", "3 groups"]),
    (CT, {"weight_g_idx": np.full(SIZE, -2, np.int32)}, ["q_proj.weight_g_idx", "holds -2"]),
    (CT, {"weight_g_idx": np.zeros(SIZE - 1, np.int32)}, ["q_proj.weight_g_idx", "[95]"]),
    (CT, {"weight_zero_point": np.zeros((SIZE, 3), np.int32)}, ["q_proj.weight_zero_point", "[96, 3]"]),
    (CT, {"weight_zero_point": np.zeros((12, 3), np.int8)}, ["q_proj.weight_zero_point", "[12, 3]"]),
    (FP4, {"weight_scale": None}, ["q_proj.weight_packed", "weight_scale is missing"]),
    (FP4, {"weight_global_scale": None}, ["q_proj.weight_scale", "F8_E4M3"]),
    (FP4, {"weight_global_scale": np.ones(2, np.float32)}, ["q_proj.weight_global_scale", "[2]"]),
    (FP4, {"weight_scale": e4m3_scales(128, SIZE // 16)[0]}, ["q_proj.weight_scale", "[128, 6]"]),
    (MLX, {"biases": None}, ["q_proj.weight", "biases is missing"]),
    (MLX, {"scales": None}, ["q_proj"]),
    (MLX, {"scales": positive(SIZE, 4)}, ["q_proj.biases", "[96, 3]"]),
    (MLX, {"scales": positive(SIZE, 4), "biases": positive(SIZE, 4)}, ["q_proj.scales", "[96, 4]"]),
    (MLX, {"weight": MLX["weight"][:, :-1]}, ["q_proj.scales"]),
    (MLX, {"weight": np.ones((SIZE, SIZE), np.float32)}, ["q_proj.weight", "F32"]),
]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_what_contradicts_itself_is_refused(number: int, tmp_path: Path) -> None:
    good, change, expected = BROKEN[number]
    fields = {key: value for key, value in {**good, **change}.items() if value is not None}
    config = {**packed_config(4), "quantization": {"bits": 4, "group_size": 32}}
    if good is not CT:
        del config["quantization_config"]
    folder = write_quantised(tmp_path, {role: good if role != "q" else fields for role in ROLES}, config, heads=HEADS)
    message = error_of(folder)
    for word in expected:
        assert word in message


@pytest.mark.parametrize("stated", [{}, {"bits": 4}, {"bits": 7, "group_size": 32}, {"bits": 4, "group_size": 0}])
def test_what_mlx_s_config_does_not_say_is_not_guessed(stated: dict[str, Any], tmp_path: Path) -> None:
    folder = write_quantised(tmp_path, dict.fromkeys(ROLES, MLX), {"quantization": stated}, heads=HEADS)
    assert "config.json" in error_of(folder)


@pytest.mark.parametrize("bits", [3, 9, None, "4", [4], {}])
def test_bits_that_do_not_make_these_words_are_refused(bits: Any, tmp_path: Path) -> None:
    folder = write_quantised(tmp_path, dict.fromkeys(ROLES, CT), packed_config(bits), heads=HEADS)
    assert "weight_packed" in error_of(folder)


def test_zeros_that_config_json_promises_must_be_there(tmp_path: Path) -> None:
    folder = write_quantised(tmp_path, dict.fromkeys(ROLES, CT), packed_config(4, symmetric=False), heads=HEADS)
    assert "weight_zero_point is missing" in error_of(folder)


@pytest.mark.parametrize("form", ["marlin-24", "sparse-24-bitmask"])
def test_other_formats_of_the_library_are_refused_by_name(form: str, tmp_path: Path) -> None:
    config = packed_config(4)
    config["quantization_config"]["format"] = form
    assert form in error_of(write_quantised(tmp_path, dict.fromkeys(ROLES, CT), config, heads=HEADS))
