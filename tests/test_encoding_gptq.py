"""GPTQ and AWQ: every statistic is that of (code - zero) * scale in float64, of codes packed here as the formats say;
slices of real checkpoints decode to what the quantisers' own libraries make of them; what does not fit is refused.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import llmfp
from tests.checkpoints import Stored, as_bf16, bf16, write_model
from tests.packing import AWQ_PLACES, packed, packed_awq
from tests.quantised import DECODING, ROLES, check_statistics, decoded, error_of, plan_of, write_quantised

INPUTS, OUTPUTS = 96, 64
Q = "model.layers.0.self_attn.q_proj"


@dataclass
class Case:
    """A projection as stored, and the W [out, in] it stands for."""

    fields: dict[str, NDArray[Any] | Stored]
    dense: NDArray[np.float64]


def gptq(
    inputs: int,
    outputs: int,
    rng: np.random.Generator,
    *,
    bits: int = 4,
    group_size: int = 32,
    less_one: bool = True,
    order: str = "sorted",
    symmetric: bool = False,
    scale: str = "F16",
) -> Case:
    group_size = inputs if group_size == -1 else group_size
    groups, levels = -(-inputs // group_size), 1 << bits
    codes = rng.integers(0, levels, (inputs, outputs))
    zeros = rng.integers(1, levels, (groups, outputs))
    if symmetric:
        zeros[:] = levels // 2
    drawn = rng.uniform(0.001, 0.01, (groups, outputs)).astype(np.float32)
    scales = {"F16": drawn.astype(np.float16), "BF16": bf16(drawn), "F32": drawn}[scale]
    index = np.arange(inputs, dtype=np.int32) // group_size
    if order == "act":
        index = rng.permutation(index)
    fields: dict[str, NDArray[Any] | Stored] = {
        "qweight": packed(codes, bits),
        "qzeros": np.ascontiguousarray(packed((zeros - less_one).T, bits).T),
        "scales": as_bf16(scales) if scale == "BF16" else scales,
    }
    if order != "absent":
        fields["g_idx"] = index
    return Case(fields, ((codes - zeros[index]) * scales[index].astype(np.float64)).T)


def awq(inputs: int, outputs: int, rng: np.random.Generator, *, group_size: int = 32) -> Case:
    groups = inputs // group_size
    codes, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (groups, outputs))
    scales = rng.uniform(0.001, 0.01, (groups, outputs)).astype(np.float16)
    dense = (codes - zeros.repeat(group_size, 0)) * scales.repeat(group_size, 0).astype(np.float64)
    return Case({"qweight": packed_awq(codes), "qzeros": packed_awq(zeros), "scales": scales}, dense.T)


def layer(make: Callable[..., Case], inputs: int = INPUTS, **options: Any) -> dict[str, Case]:
    """Four different projections, of which O reads what V puts out."""
    sizes = dict.fromkeys("qkv", (inputs, OUTPUTS)) | {"o": (OUTPUTS, inputs)}
    return {role: make(*sizes[role], np.random.default_rng(seed), **options) for seed, role in enumerate(ROLES)}


def write(folder: Path, cases: dict[str, Case], stated: dict[str, Any]) -> Path:
    return write_quantised(folder, {role: case.fields for role, case in cases.items()}, stated, heads=OUTPUTS)


def config(method: str = "gptq", bits: Any = 4, group_size: Any = 32, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, "bits": bits, "group_size": group_size, **more}}


V2 = {"checkpoint_format": "gptq_v2"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"{bits} bits": ({"bits": bits}, config(bits=bits)) for bits in (2, 3, 4, 8)},
    **{f"{bits} bits, v2": ({"bits": bits, "less_one": False}, config(bits=bits, **V2)) for bits in (2, 3, 4, 8)},
    "symmetric": ({"symmetric": True}, config(sym=True)),
    "act-order": ({"order": "act"}, config(desc_act=True)),
    "act-order, 3 bits": ({"order": "act", "bits": 3}, config(bits=3)),
    "no g_idx": ({"order": "absent"}, config()),
    "one group": ({"group_size": -1}, config(group_size=-1)),
    "partial groups": ({"group_size": 40}, config(group_size=40)),
    "partial words": ({"inputs": 69, "group_size": 23}, config(group_size=23)),
    "bfloat16 scales": ({"scale": "BF16"}, config()),
    "float32 scales": ({"scale": "F32"}, config()),
    "AutoRound": ({}, config("auto-round", packing_format="auto_round:auto_gptq")),
    "other bits for some": ({"bits": 8, "group_size": 16}, config(dynamic={"+:.*_proj": {"bits": 8}})),
    "no config": ({"bits": 3}, {}),
    "no config, act-order": ({"bits": 2, "order": "act", "group_size": 24}, {}),
    "no config, no g_idx": ({"bits": 4, "order": "absent"}, {}),
}


@pytest.mark.parametrize("backend", DECODING)
@pytest.mark.parametrize("case", CASES)
def test_statistics_of_gptq_are_those_of_its_decoded_values(case: str, backend: str, tmp_path: Path) -> None:
    options, stated = CASES[case]
    cases = layer(gptq, **options)
    folder = write(tmp_path, cases, stated)
    check_statistics(folder, {role: each.dense for role, each in cases.items()}, backend)
    for role, each in cases.items():
        np.testing.assert_allclose(decoded(folder, role), each.dense, rtol=1e-7)


@pytest.mark.parametrize("backend", DECODING)
@pytest.mark.parametrize(
    ("group_size", "stated"),
    [
        (32, config("awq", version="gemm", zero_point=True)),
        (32, config("awq")),
        (16, config("auto-round", 4, 16, packing_format="auto_round:auto_awq")),
        (32, {}),
    ],
)
def test_statistics_of_awq_are_those_of_its_decoded_values(
    group_size: int, stated: dict[str, Any], backend: str, tmp_path: Path
) -> None:
    cases = layer(awq, group_size=group_size)
    folder = write(tmp_path, cases, stated)
    check_statistics(folder, {role: each.dense for role, each in cases.items()}, backend)
    for role, each in cases.items():
        np.testing.assert_allclose(decoded(folder, role), each.dense, rtol=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_of_nought_survives_the_subtraction_of_its_writer(bits: int, tmp_path: Path) -> None:
    """gptqmodel subtracts from whole words, so that a borrow reaches the next place; of 3 bits, from each place."""
    case = gptq(INPUTS, OUTPUTS, np.random.default_rng(0), bits=bits, less_one=False)
    zeros = np.random.default_rng(1).integers(0, 1 << bits, (INPUTS // 32, OUTPUTS))
    words = packed(zeros.T, bits).view(np.uint32)
    if bits == 3:
        less_one = packed((zeros.T - 1) % 8, 3)
    else:
        less_one = (words - np.uint32(sum(1 << place for place in range(0, 32, bits)))).view(np.int32)
    expected = []
    for qzeros, stated in ((words.view(np.int32), config(bits=bits, **V2)), (less_one, config(bits=bits))):
        fields = {**case.fields, "qzeros": np.ascontiguousarray(qzeros.T)}
        folder = write(tmp_path / str(len(expected)), {role: Case(fields, case.dense) for role in "qkv"}, stated)
        expected.append(decoded(folder, "q"))
    np.testing.assert_array_equal(expected[0], expected[1])


@pytest.mark.parametrize("backend", DECODING)
@pytest.mark.parametrize("make", [gptq, awq])
def test_queries_keys_and_values_in_one_tensor_are_its_columns(
    make: Callable[..., Case], backend: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    qkv, o = make(INPUTS, 64 + 24 + 24, rng), make(64, INPUTS, rng)
    tensors = {f"model.layers.0.self_attn.qkv_proj.{field}": tensor for field, tensor in qkv.fields.items()}
    tensors |= {f"model.layers.0.self_attn.o_proj.{field}": tensor for field, tensor in o.fields.items()}
    stated = {"model_type": "phi3", "num_attention_heads": 8, **config(make.__name__)}
    folder = write_model(tmp_path, tensors, stated)
    q, k, v = np.split(qkv.dense, [64, 64 + 24])
    check_statistics(folder, {"q": q, "o": o.dense}, backend)
    found = llmfp.scan(folder, backend=backend).main
    np.testing.assert_allclose([found.std["k"], found.std["v"]], [[k.std()], [v.std()]], rtol=1e-6)


# --- slices of real checkpoints --------------------------------------------------------------------------------------


def unpacked(words: NDArray[np.uint32], bits: int) -> NDArray[np.int64]:
    """Codes [n * 32 / bits, m] of words [n, m], of bits that divide 32."""
    places = [words >> np.uint32(place) & np.uint32((1 << bits) - 1) for place in range(0, 32, bits)]
    return np.stack(places, axis=1).reshape(-1, words.shape[1]).astype(np.int64)


def slice_of(path: Path, sizes: int) -> tuple[tuple[int, ...], list[NDArray[np.uint8]]]:
    """A slice's leading numbers, of which the last `sizes` say how long its parts are, and these."""
    content = path.read_bytes()
    head = struct.unpack_from(f"<{5 + sizes + (sizes == 5)}I", content)
    stops = len(content) - sum(head[-sizes:]) + np.cumsum(head[-sizes:-1])
    return head, np.split(np.frombuffer(content, np.uint8), [4 * len(head), *stops])[1:]


def from_bf16(stored: NDArray[np.uint8]) -> NDArray[np.float64]:
    return (stored.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("backend", DECODING)
@pytest.mark.parametrize("name", ["gptq/falcon3_1b_int4", "gptq/llama_3_2_1b_gptqmodel_int8", "awq/falcon3_1b_awq"])
def test_slices_of_real_checkpoints(name: str, backend: str, shared_data: Path, tmp_path: Path) -> None:
    method = name.split("/")[0]
    path = shared_data / "quantized_slices" / f"{name}.bin"
    (bits, group_size, inputs, outputs, *_), stored = slice_of(path, 5 if method == "gptq" else 4)
    qweight, scales, qzeros = stored[0].view("<u4"), stored[1].view("<f2").reshape(-1, outputs), stored[2].view("<u4")
    if method == "gptq":
        qweight, qzeros = qweight.reshape(-1, outputs), qzeros.reshape(len(scales), -1)
        codes, zeros = unpacked(qweight, bits), unpacked(qzeros.T, bits).T + 1
    else:
        qweight, qzeros = qweight.reshape(inputs, -1), qzeros.reshape(len(scales), -1)
        codes, zeros = (
            unpacked(each.T, 4).T.reshape(len(each), -1, 8)[..., np.argsort(AWQ_PLACES)].reshape(len(each), -1)
            for each in (qweight, qzeros)
        )
    group = np.arange(inputs) // group_size
    dense = ((codes - zeros[group]) * scales.astype(np.float64)[group]).T
    fields = {"qweight": qweight.view(np.int32), "scales": scales, "qzeros": qzeros.view(np.int32)}
    if method == "gptq":
        fields["g_idx"] = stored[3].view("<i4")
    folder = write_quantised(tmp_path, dict.fromkeys(ROLES, fields), config(method, bits, group_size), heads=outputs)
    check_statistics(folder, dict.fromkeys(ROLES, dense), backend)
    np.testing.assert_allclose(decoded(folder, "q"), dense, rtol=1e-7)
    by_library = from_bf16(stored[-1]).reshape(inputs, outputs).T
    np.testing.assert_allclose(decoded(folder, "q"), by_library, rtol=2.0**-8)


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_a_plan_says_how_it_is_encoded_and_what_is_read(tmp_path: Path) -> None:
    for method, cases, stated, label in (
        ("gptq", layer(gptq, less_one=False), config(**V2), "GPTQ v2, 4 bits, groups of 32"),
        ("awq", layer(awq), config("awq"), "AWQ, 4 bits, groups of 32"),
    ):
        plan = plan_of(write(tmp_path / method, cases, stated))
        assert [read["encoding"] for read in plan["reads"]] == 4 * [label]
        assert plan["skipped"] == []
        assert plan["bytes_read"] == plan["bytes_total"]


I32, F16 = np.int32, np.float16
BAD: dict[str, tuple[dict[str, NDArray[Any] | None], dict[str, Any], str]] = {
    "no scales": ({"scales": None}, config(), rf"'{Q}.qweight' is quantised, and {Q}.scales is missing"),
    "no zeros": ({"qzeros": None}, config(), rf"'{Q}.qweight' is quantised, and {Q}.qzeros is missing"),
    "codes of bytes": ({"qweight": np.zeros((48, 64), np.uint8)}, config(), rf"'{Q}.qweight' is U8 \[48, 64\], not"),
    "codes of one dimension": ({"qweight": np.zeros(768, I32)}, config(), rf"'{Q}.qweight' is I32 \[768\], not I32 of"),
    "integer scales": ({"scales": np.zeros((3, 64), I32)}, config(), rf"'{Q}.scales' is I32, not BF16 or F16 or F32"),
    "flat scales": ({"scales": np.zeros(192, F16)}, config(), rf"'{Q}.scales' has shape \[192\], not \[groups, out"),
    "empty scales": ({"scales": np.zeros((0, 64), F16)}, config(), rf"'{Q}.scales' has shape \[0, 64\], not"),
    "float zeros": ({"qzeros": np.zeros((3, 8), F16)}, config(), rf"'{Q}.qzeros' is F16, not I32"),
    "few zeros": ({"qzeros": np.zeros((2, 8), I32)}, config(), rf"'{Q}.qzeros' has shape \[2, 8\].*needs \[3, 8\]"),
    "float g_idx": ({"g_idx": np.zeros(96, F16)}, config(), rf"'{Q}.g_idx' is F16, not I32 or I64"),
    "short g_idx": ({"g_idx": np.zeros(80, I32)}, config(), rf"'{Q}.qweight'.*g_idx of \[80\] needs \[10, 64\]"),
    "empty": (
        {"g_idx": np.zeros(0, I32), "qweight": np.zeros((0, 64), I32)},
        config(group_size=-1),
        rf"'{Q}.qweight' has shape \[0, 64\]",
    ),
    "group over the last": ({"g_idx": np.full(96, 3, I32)}, config(), rf"'{Q}.g_idx' holds 3, and there are 3 groups"),
    "group below nought": ({"g_idx": np.full(96, -2, I32)}, config(), rf"'{Q}.g_idx' holds -2, and there are 3 groups"),
    "other bits stated": ({}, config(bits=8), rf"'{Q}.qweight' has shape \[12, 64\]; GPTQ of 8 bits.*needs \[24, 64\]"),
    "unknown bits": ({}, config(bits=5), rf"'{Q}.qweight' has 5 bits, says config.json; 2 or 3 or 4 or 8 are"),
    "absurd bits": ({}, config(bits=["4"]), rf"'{Q}.qweight' has \['4'\] bits, says config.json"),
    "other groups stated": ({}, config(group_size=48), rf"'{Q}.scales' has 3 groups; 96 inputs in groups of 48"),
    "one group stated": ({}, config(group_size=-1), rf"'{Q}.scales' has 3 groups; 96 inputs in groups of 96"),
    "absurd groups": ({}, config(group_size="32"), rf"'{Q}.scales' has 3 groups; 96 inputs in groups of 32"),
    "no groups": ({}, config(group_size=0), rf"'{Q}.scales' has 3 groups; 96 inputs in groups of 0"),
    "nothing says the bits": ({"qzeros": np.zeros((3, 7), I32)}, {}, rf"'{Q}.qzeros' has shape \[3, 7\], which is not"),
    "nothing says the groups": (
        {"g_idx": None, "scales": np.ones((5, 64), F16), "qzeros": np.zeros((5, 8), I32)},
        {},
        rf"'{Q}.scales' has 5 groups of 96 inputs, and config.json says no group_size",
    ),
    "marlin": ({}, config(checkpoint_format="marlin"), rf"'{Q}.qweight' is quantised as 'gptq', format 'marlin', says"),
    "planes": ({}, config(checkpoint_format="gptq_p"), rf"'{Q}.qweight' is quantised as 'gptq', format 'gptq_p'"),
    "gemv": ({}, config("awq", version="GEMV"), rf"'{Q}.qweight' is quantised as 'awq', format 'gemv'"),
    "gemv_fast": ({}, config("awq", version="gemv_fast"), rf"'{Q}.qweight' is quantised as 'awq', format 'gemv_fast'"),
    "AutoRound alone": ({}, config("auto-round"), rf"'{Q}.qweight' is quantised as 'auto-round', format 'None'"),
    "another method": ({}, config("paroquant"), rf"'{Q}.qweight' is quantised as 'paroquant'"),
    "absurd method": ({}, config(["gptq"]), rf"'{Q}.qweight' is quantised as \"\['gptq'\]\""),
    "GPTQ stated as AWQ": ({}, config("awq"), rf"'{Q}.qweight' has shape \[12, 64\]; AWQ of 4 bits.*needs \[12, 8\]"),
    "AWQ of 8 bits": ({}, config("awq", 8), rf"'{Q}.qweight' has 8 bits, says config.json; 4 are supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(case: str, tmp_path: Path) -> None:
    changed, stated, message = BAD[case]
    cases = layer(gptq)
    fields = {**cases["q"].fields, **changed}
    cases["q"].fields = {field: tensor for field, tensor in fields.items() if tensor is not None}
    found = error_of(write(tmp_path, {"q": cases["q"], **cases}, stated))
    assert re.search(message, found), found


def test_awq_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    for number, (field, shape, message) in enumerate((
        ("qweight", (96, 7), rf"'{Q}.qweight' has shape \[96, 7\]; AWQ of 4 bits.*needs \[96, 8\]"),
        ("qzeros", (3, 7), rf"'{Q}.qzeros' has shape \[3, 7\].*needs \[3, 8\]"),
        ("scales", (2, 64), rf"'{Q}.scales' has 2 groups; 96 inputs in groups of 32"),
    )):  # fmt: skip
        cases = layer(awq)
        cases["q"].fields[field] = np.zeros(shape, F16 if field == "scales" else I32)
        if field == "scales":
            cases["q"].fields["qzeros"] = np.zeros((2, 8), I32)
        found = error_of(write(tmp_path / str(number), cases, config("awq")))
        assert re.search(message, found), found
