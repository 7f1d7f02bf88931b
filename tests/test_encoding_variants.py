"""How quantisers vary one format from model to model: layers left as floats, widths of their own, what only the config
says. Each is read to the σ of its decoded values, or refused by name; none is read as something else.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmfp
from llmfp.checkpoint.specs import ITEM_BITS
from llmfp.errors import LlmfpError
from llmfp.kernels.codes import E2M1, fp8_table
from tests.checkpoints import Stored, as_bf16, bf16, build, stored, write_model
from tests.packing import nibbles, words
from tests.quantised import ROLES, check_statistics, error_of, plan_of, write_quantised
from tests.test_adapter import write_adapter
from tests.test_encoding_bitsandbytes import eight_bits, four_bits
from tests.test_encoding_gptq import awq, gptq
from tests.test_encoding_hqq import hqq
from tests.test_encoding_packed import positive, random_codes
from tests.test_encoding_scaled import e4m3, fp8

SIZE, HEADS = 96, 4
NATIVE = "native_cpu"
RNG = np.random.default_rng(7)


def scaled() -> tuple[dict[str, Any], Any]:
    codes, scale = e4m3(SIZE, SIZE), positive(3, 3)
    dense = fp8_table("F8_E4M3")[codes] * np.kron(scale.astype(np.float64), np.ones((32, 32)))
    return {"weight": fp8(codes), "weight_scale_inv": scale}, dense


def of(case: Any) -> tuple[dict[str, Any], Any]:
    return case.fields, case.dense


LEFT_AS_FLOATS = {
    "fp8, modules_to_not_convert": (
        scaled,
        {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": ["o_proj"]},
    ),
    "gptq, dynamic": (
        lambda: of(gptq(SIZE, SIZE, RNG)),
        {"quant_method": "gptq", "bits": 8, "group_size": 128, "dynamic": {"-:.*o_proj": {}, "+:.*": {"bits": 4}}},
    ),
    "awq, modules_to_not_convert": (
        lambda: of(awq(SIZE, SIZE, RNG)),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "modules_to_not_convert": ["o_proj"]},
    ),
    "auto-round, extra_config": (
        lambda: of(gptq(SIZE, SIZE, RNG, symmetric=True)),
        {
            "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32,
            "extra_config": {"model.layers.0.self_attn.o_proj": {"bits": 16}},
        },
    ),
    "bitsandbytes, llm_int8_skip_modules": (
        lambda: of(eight_bits((SIZE, SIZE), RNG)),
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["o_proj"]},
    ),
    "bitsandbytes, codes in bfloat16": (
        lambda: of(four_bits((SIZE, SIZE), RNG, nested=True, storage="BF16")),
        {"quant_method": "bitsandbytes", "bnb_4bit_quant_storage": "bfloat16", "llm_int8_skip_modules": ["o_proj"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_AS_FLOATS)
def test_layers_that_a_quantiser_left_alone_are_floats(case: str, tmp_path: Path) -> None:
    make, stated = LEFT_AS_FLOATS[case]
    made = {role: make() for role in "qkv"}
    plain = bf16(RNG.normal(0, 3, (SIZE, SIZE)))
    fields: dict[str, Any] = {**{role: fields for role, (fields, _) in made.items()}, "o": {"weight": as_bf16(plain)}}
    folder = write_quantised(tmp_path, fields, {"quantization_config": stated}, heads=HEADS)
    truth = {**{role: dense for role, (_, dense) in made.items()}, "o": plain.astype(np.float64)}
    check_statistics(folder, truth, NATIVE)
    encodings = {read["roles"][0]: read["encoding"] for read in plan_of(folder)["reads"]}
    assert encodings.pop("o") is None
    assert None not in encodings.values()
    assert not any("quant" in caveat for caveat in llmfp.scan(folder).caveats)


def test_experts_alone_may_be_quantised(tmp_path: Path) -> None:
    """As in gpt-oss: MXFP4 experts, attention in bfloat16."""
    model = build("llama", layers=2)
    expected = llmfp.scan(model.write(tmp_path / "plain"))
    experts = {
        f"model.layers.{layer}.mlp.experts.gate_up_proj_{part}": np.zeros(shape, np.uint8)
        for layer in range(2)
        for part, shape in (("blocks", (2, 8, 1, 16)), ("scales", (2, 8, 1)))
    }
    stated = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    config = {**(model.config or {}), "quantization_config": stated}
    folder = write_model(tmp_path / "experts", {**model.tensors, **experts}, config)
    found = llmfp.scan(folder)
    assert (found.digest, found.caveats) == (expected.digest, expected.caveats)
    skipped = {each["pattern"]: each["reason"] for each in plan_of(folder)["skipped"]}
    assert skipped["model.layers.{n}.mlp.experts.gate_up_proj_blocks"] == "expert weights, never read"


# --- MLX --------------------------------------------------------------------------------------------------------------


def affine(bits: int, group: int) -> tuple[dict[str, Any], Any]:
    codes, scale = random_codes(bits, SIZE * 2, SIZE * 2), positive(SIZE * 2, SIZE * 2 // group)
    bias = (-8 * scale).astype(np.float32)
    dense = codes * np.repeat(scale.astype(np.float64), group, 1) + np.repeat(bias.astype(np.float64), group, 1)
    return {"weight": words(codes, bits), "scales": scale, "biases": bias}, dense


def mxfp4() -> tuple[dict[str, Any], Any]:
    codes, scale = random_codes(4, SIZE * 2, SIZE * 2), RNG.integers(115, 125, (SIZE * 2, 6), np.uint8)
    dense = np.array(E2M1)[codes] * np.repeat(2.0 ** (scale.astype(float) - 127), 32, 1)
    return {"weight": words(codes, 4), "scales": scale}, dense


def mlx(folder: Path, stated: dict[str, Any], **projections: dict[str, Any]) -> Path:
    return write_quantised(folder, projections, stated, heads=HEADS)


def test_what_mlx_says_of_one_module_stands_alone(tmp_path: Path) -> None:
    """As its loader has it: of mode, bits and groups that are not said there, the library's defaults hold."""
    name = "model.layers.0.self_attn.{}_proj"
    plain = RNG.normal(0, 3, (SIZE * 2, SIZE * 2)).astype(np.float32)
    made = {"q": mxfp4(), "k": affine(8, 64), "v": affine(4, 64)}
    stated = {
        "group_size": 32, "bits": 4, "mode": "mxfp4", name.format("k"): {"group_size": 64, "bits": 8},
        name.format("v"): {"mode": "affine"}, name.format("o"): False, name.format("q"): True,
    }  # fmt: skip
    fields = {role: fields for role, (fields, _) in made.items()}
    folder = mlx(tmp_path, {"quantization": stated}, **fields, o={"weight": plain})
    truth = {**{role: dense for role, (_, dense) in made.items()}, "o": plain.astype(np.float64)}
    check_statistics(folder, truth, NATIVE)


def test_a_model_that_was_quantised_before_mlx_took_it(tmp_path: Path) -> None:
    made = {role: affine(4, 64) for role in ROLES}
    config = {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "quantization": {"group_size": 64, "bits": 4},
    }
    folder = mlx(tmp_path, config, **{role: fields for role, (fields, _) in made.items()})
    check_statistics(folder, {role: dense for role, (_, dense) in made.items()}, NATIVE)


@pytest.mark.parametrize(
    ("right", "message"),
    [
        ("", "q_proj.weight' has 192 outputs where 'model.layers.0.self_attn.o_proj.weight' reads 96"),
        (
            "o",
            "is [192, 96] as MLX, 8 bits, groups of 32, and norm gain 'model.layers.0.input_layernorm.weight'",
        ),
        ("qkvo", ""),
    ],
)
def test_bits_and_groups_that_the_words_allow_and_other_shapes_deny(right: str, message: str, tmp_path: Path) -> None:
    """Words and scales of 4 bits in groups of 64 have the shapes of 8 bits in groups of 32."""
    fields = affine(4, 64)[0]
    tensors = {f"model.layers.0.self_attn.{r}_proj.{field}": tensor for r in ROLES for field, tensor in fields.items()}
    tensors["model.layers.0.input_layernorm.weight"] = np.ones(SIZE * 2, np.float32)
    own = {f"model.layers.0.self_attn.{role}_proj": {"bits": 4, "group_size": 64} for role in right}
    stated = {"model_type": "llama", "num_attention_heads": 4, "quantization": {"bits": 8, "group_size": 32, **own}}
    folder = write_model(tmp_path, tensors, stated)
    if message:
        assert message in error_of(folder)
    else:
        assert not llmfp.scan(folder).caveats


@pytest.mark.parametrize(
    "stated",
    [{"mode": ["mxfp4"]}, {"mode": {}}, {"mode": "mxfp5"}, {"bits": 4.0}, {"bits": True}, {"group_size": 64.0}],
)
def test_what_mlx_cannot_mean_is_refused(stated: dict[str, Any], tmp_path: Path) -> None:
    config = {"quantization": {"bits": 4, "group_size": 64, **stated}}
    assert "q_proj.weight" in error_of(mlx(tmp_path, config, **dict.fromkeys(ROLES, affine(4, 64)[0])))


# --- compressed-tensors, ModelOpt -------------------------------------------------------------------------------------


def integers(group: int) -> tuple[dict[str, Any], Any]:
    codes, scale = RNG.integers(-8, 8, (SIZE, SIZE)).astype(np.int8), positive(SIZE, SIZE // group)
    return {"weight": codes, "weight_scale": scale}, codes * np.repeat(scale.astype(np.float64), group, 1)


def packed(group: int, *, zeros: bool) -> tuple[dict[str, Any], Any]:
    codes, scale = random_codes(4, SIZE, SIZE), positive(SIZE, SIZE // group)
    zero = random_codes(4, SIZE, SIZE // group) if zeros else np.full((SIZE, SIZE // group), 8)
    fields = {
        "weight_packed": words(codes, 4).view(np.int32),
        "weight_scale": as_bf16(scale := bf16(scale)),
        "weight_shape": np.array([SIZE, SIZE], np.int64),
    }
    if zeros:
        fields["weight_zero_point"] = np.ascontiguousarray(words(zero.T, 4).T).view(np.int32)
    return fields, (codes - np.repeat(zero, group, 1)) * np.repeat(scale.astype(np.float64), group, 1)


def small_floats(dtype: str = "F8_E4M3") -> tuple[dict[str, Any], Any]:
    codes, scale = random_codes(4, SIZE, SIZE), RNG.integers(0x20, 0x7E, (SIZE, SIZE // 16), np.uint8)
    whole = np.array([300.0], np.float32)
    fields = {
        "weight_packed": nibbles(codes),
        "weight_scale": Stored(dtype, scale.shape, scale.tobytes()),
        "weight_global_scale": whole,
    }
    return fields, np.array(E2M1)[codes] * np.repeat(fp8_table("F8_E4M3")[scale] / 300.0, 16, 1)


def microscaled(dtype: str) -> tuple[dict[str, Any], Any]:
    codes, scale = e4m3(SIZE, SIZE), RNG.integers(110, 130, (SIZE, 3), np.uint8)
    fields = {"weight": fp8(codes), "weight_scale": Stored(dtype, scale.shape, scale.tobytes())}
    return fields, fp8_table("F8_E4M3")[codes] * np.repeat(2.0 ** (scale.astype(float) - 127), 32, 1)


def blocks_of_32() -> tuple[dict[str, Any], Any]:
    fields, dense = scaled()
    return {"weight": fields["weight"], "weight_scale": fields["weight_scale_inv"]}, dense


def grouped(*groups: dict[str, Any], form: str = "") -> dict[str, Any]:
    numbered = {f"group_{n}": {"targets": ["Linear"], "weights": weights} for n, weights in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": numbered}


CHANNEL = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": False}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
VARIANTS = {
    "pack-quantized, channels with zeros": (lambda: packed(SIZE, zeros=True), grouped(CHANNEL, form="pack-quantized")),
    "pack-quantized, groups with zeros": (
        lambda: packed(32, zeros=True),
        grouped({**CHANNEL, "strategy": "group", "group_size": 32}, form="pack-quantized"),
    ),
    "pack-quantized, symmetric": (lambda: packed(32, zeros=False), grouped({"num_bits": 4, "symmetric": True})),
    "naive-quantized": (lambda: integers(16), grouped({"num_bits": 4, "group_size": 16}, form="naive-quantized")),
    "int-quantized beside NVFP4": (lambda: integers(SIZE), grouped(NVFP4, {"num_bits": 8}, form="mixed-precision")),
    "float-quantized, blocks": (blocks_of_32, grouped({"strategy": "block", "block_structure": [32, 32]})),
    "float-quantized, blocks as a text": (blocks_of_32, grouped({"strategy": "block", "block_structure": "32x32"})),
    "nvfp4-pack-quantized": (small_floats, grouped(NVFP4, form="nvfp4-pack-quantized")),
    "NVFP4, scales as bytes": (lambda: small_floats("U8"), grouped(NVFP4)),
    "mxfp8-quantized": (lambda: microscaled("U8"), grouped({"num_bits": 8, "group_size": 32}, form="mxfp8-quantized")),
    "MXFP8 of ModelOpt": (lambda: microscaled("U8"), {"quant_method": "modelopt", "quant_algo": "MXFP8"}),
    "MXFP8, no config": (lambda: microscaled("F8_E8M0"), None),
    "GPTQ v2 as its writer's own name says": (
        lambda: of(gptq(SIZE, SIZE, RNG, less_one=False)),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "format": "gptq_v2"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", VARIANTS)
def test_a_variant_is_read_to_its_decoded_values(case: str, tmp_path: Path) -> None:
    make, stated = VARIANTS[case]
    made = {role: make() for role in ROLES}
    config = {} if stated is None else {"quantization_config": stated}
    fields = {role: fields for role, (fields, _) in made.items()}
    folder = write_quantised(tmp_path, fields, config, heads=HEADS)
    check_statistics(folder, {role: dense for role, (_, dense) in made.items()}, NATIVE)
    plan = plan_of(folder)
    assert all(read["encoding"] for read in plan["reads"])
    assert plan["caveats"] == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "zeros of 4-bit floats": (
        {**small_floats()[0], "weight_zero_point": np.zeros((SIZE, 6), np.int8)},
        "q_proj.weight_zero_point' shifts 4-bit floats",
    ),
    "inputs that are scaled": (
        {**small_floats()[0], "pre_quant_scale": np.ones(SIZE, np.float32)},
        "q_proj.pre_quant_scale' multiplies the inputs of",
    ),
    "zeros left out": (
        {"compressed": Stored("BF16", (SIZE, 48), bytes(2 * SIZE * 48)), "bitmask": np.zeros((SIZE, 12), np.uint8)},
        "q_proj.compressed' is BF16 [96, 48] of sparse compressed-tensors",
    ),
    "absurd blocks": ({**blocks_of_32()[0]}, "q_proj.weight_scale' has shape [3, 3], and config.json states no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_read_wrongly_is_refused_by_name(case: str, tmp_path: Path) -> None:
    fields, message = REFUSED[case]
    config = {"quantization_config": grouped({"block_structure": "x32x", "strategy": "block"})}
    found = error_of(write_quantised(tmp_path, dict.fromkeys(ROLES, fields), config, heads=HEADS))
    assert message in found


def test_mlx_s_scale_of_a_whole_tensor_is_refused_by_name(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"weight": words(random_codes(4, SIZE, SIZE), 4), "scales": np.ones((SIZE, 6), np.uint8)}
    fields["global_scale"] = np.ones(1, np.float32)
    config = {"quantization": {"bits": 4, "group_size": 16, "mode": "nvfp4"}}
    folder = mlx(tmp_path, config, **dict.fromkeys(ROLES, fields))
    assert "q_proj.global_scale' scales" in error_of(folder)


@pytest.mark.parametrize(
    ("stated", "words_"),
    [
        ({"quant_method": "new\nmethod"}, "quant_method 'new\\nmethod', which is not known"),
        ({"quant_method": ["fp8"]}, "quant_method ['fp8'], which is not known"),
        ({"quant_method": "fp8", "transform_config": {"config_groups": {"R1": {}}}}, "weights were turned"),
    ],
)
def test_what_the_tensors_do_not_show_is_said(stated: dict[str, Any], words_: str, tmp_path: Path) -> None:
    made = {role: scaled() for role in ROLES}
    config = {"quantization_config": {**stated, "weight_block_size": [32, 32]}}
    folder = write_quantised(tmp_path, {r: fields for r, (fields, _) in made.items()}, config, heads=HEADS)
    check_statistics(folder, {role: dense for role, (_, dense) in made.items()}, NATIVE)
    (caveat,) = plan_of(folder)["caveats"]
    assert words_ in caveat


def test_a_signalling_scale_is_not_a_number_and_no_warning(tmp_path: Path) -> None:
    made = {role: eight_bits((SIZE, SIZE), RNG) for role in ROLES}
    made["q"].fields["SCB"] = Stored("F32", (SIZE,), np.full(SIZE, 0x7F800001, "<u4").tobytes())
    found = llmfp.scan(write_quantised(tmp_path, {role: case.fields for role, case in made.items()}, heads=HEADS))
    assert found.std["q"] == [None]
    assert any(f"holds {SIZE * SIZE} non-finite values" in caveat for caveat in found.caveats)


# --- every tensor of every format, missing or of another size ---------------------------------------------------------


def mlx_of_32() -> tuple[dict[str, Any], Any]:
    codes, scale = random_codes(4, SIZE, SIZE), positive(SIZE, 3)
    return {"weight": words(codes, 4), "scales": scale, "biases": scale.copy()}, None


WHOLE: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (lambda: of(gptq(SIZE, SIZE, RNG)), {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "awq": (lambda: of(awq(SIZE, SIZE, RNG)), {"quant_method": "awq", "bits": 4, "group_size": 32}),
    "pack-quantized": (lambda: packed(32, zeros=True), grouped({**CHANNEL, "strategy": "group", "group_size": 32})),
    "nvfp4": (small_floats, grouped(NVFP4)),
    "mxfp4": (
        lambda: ({"weight_packed": np.ones((SIZE, 48), np.uint8), "weight_scale": np.ones((SIZE, 3), np.uint8)}, None),
        grouped({"num_bits": 4}),
    ),
    "fp8": (scaled, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "nf4": (lambda: of(four_bits((SIZE, SIZE), RNG, nested=True)), {"quant_method": "bitsandbytes"}),
    "int8": (lambda: of(eight_bits((SIZE, SIZE), RNG)), {"quant_method": "bitsandbytes"}),
    "mlx": (mlx_of_32, {"bits": 4, "group_size": 32}),
    "hqq": (lambda: of(hqq((SIZE, SIZE), RNG)), {"quant_method": "hqq"}),
}
STILL_GOOD = {("gptq", "g_idx", "missing"), ("int8", "weight_format", "missing")}
UNREAD = {"nbits", "compute_dtype", "view_as_float", "encoded_state_dict", "quant_zero", "quant_scale"}
"""What HQQ keeps beside, and needs no one for the values."""


def changes(fields: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, what is done to it, what it is then): left out, and each dimension at its edges, and one more."""
    found: list[tuple[str, Any, Any]] = []
    for field, tensor in fields.items():
        found.append((field, "missing", None))
        as_stored = stored(tensor)
        for position, size in enumerate(as_stored.shape):
            for new in {0, 1, size - 1, size + 1, 2 * size} - {size}:
                shape = (*as_stored.shape[:position], new, *as_stored.shape[position + 1 :])
                nbytes = -(-math.prod(shape) * ITEM_BITS[as_stored.dtype] // 8)
                content = (as_stored.content * 3)[:nbytes].ljust(nbytes, b"\0")
                found.append((field, shape, Stored(as_stored.dtype, shape, content)))
    return found


@pytest.mark.parametrize("form", WHOLE)
def test_a_tensor_that_is_missing_or_of_another_size_is_named(form: str, tmp_path: Path) -> None:
    make, method = WHOLE[form]
    fields, _ = make()
    plain = np.ones((SIZE, SIZE), np.float32)
    others = {f"model.layers.0.self_attn.{role}_proj.weight": plain for role in "kvo"}
    others["model.layers.0.input_layernorm.weight"] = np.ones(SIZE, np.float32)
    config = {"model_type": "llama", "num_attention_heads": HEADS, "quantization_config": method}
    accepted = set()
    for number, (field, what, tensor) in enumerate(changes(fields)):
        q = {name: each for name, each in {**fields, field: tensor}.items() if each is not None}
        tensors = {f"model.layers.0.self_attn.q_proj.{name}": each for name, each in q.items()}
        folder = write_model(tmp_path / str(number), {**tensors, **others}, config)
        try:
            llmfp.scan(folder, backend=NATIVE)
        except LlmfpError as error:
            message = str(error)
            assert "model.layers.0.self_attn.q_proj." in message, (field, what)
            assert str(folder) in message
            assert "\n" not in message
        else:
            accepted.add((form, field, what))
    assert {each for each in accepted if each[1] not in UNREAD} == {each for each in STILL_GOOD if each[0] == form}


@pytest.mark.parametrize("form", ["gptq", "awq", "pack-quantized", "fp8", "nf4", "int8", "hqq"])
def test_an_adapter_adds_to_what_codes_stand_for(form: str, tmp_path: Path) -> None:
    make, method = WHOLE[form]
    fields, dense = make()
    plain = RNG.normal(0, 1, (SIZE, SIZE)).astype(np.float32)
    projections: dict[str, Any] = {**{role: {"weight": plain} for role in "kvo"}, "q": fields}
    base = write_quantised(tmp_path / "base", projections, {"quantization_config": method}, heads=HEADS)
    a, b = (RNG.normal(0, 0.1, shape).astype(np.float32) for shape in ((3, SIZE), (SIZE, 3)))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "adapter", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b})
    found = llmfp.scan(adapter, base=base)
    whole = dense + 2.0 * b.astype(np.float64) @ a.astype(np.float64)  # alpha over rank of tests.test_adapter's config
    assert found.std["q"] == pytest.approx([whole.std()], rel=1e-6)
    assert found.std["k"] == pytest.approx([plain.astype(np.float64).std()], rel=1e-6)
