"""HQQ: every statistic is that of (code - zero) * scale in float64, of codes grouped and packed here as hqq says; what
describes a module is read from its own tensors, and what does not fit is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.checkpoints import Stored, as_bf16, bf16
from tests.packing import planes, text
from tests.quantised import DECODING, ROLES, check_statistics, decoded, error_of, plan_of, write_quantised

Q = "model.layers.0.self_attn.q_proj"
PACKING = {8: "8bit_u8", 4: "4bit_u8", 2: "2bit_u8", 1: "1bit_u8"}
INPUTS, OUTPUTS = 48, 64


@dataclass
class Case:
    """A projection as stored, and the W [out, in] it stands for."""

    fields: dict[str, NDArray[Any] | Stored]
    dense: NDArray[np.float64]


def longs(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def hqq(
    shape: tuple[int, int],
    rng: np.random.Generator,
    *,
    bits: int = 4,
    group_size: int = 16,
    axis: int = 1,
    scale: str = "F16",
    storage: str = "U8",
) -> Case:
    count = shape[0] * shape[1]
    grouped = (count // group_size, group_size) if axis == 1 else (group_size, count // group_size)
    per_group = (grouped[0], 1) if axis == 1 else (1, grouped[1])
    codes = rng.integers(0, 1 << bits, grouped)
    scales, zeros = (rng.uniform(*bounds, per_group).astype(np.float32) for bounds in ((0.01, 0.1), (0, 1 << bits)))
    to = {"F16": lambda x: x.astype(np.float16), "BF16": bf16, "F32": lambda x: x}[scale]
    scales, zeros = to(scales), to(zeros)
    content = planes(codes, bits)
    itemsize = {"U8": 1, "BF16": 2, "F32": 4}[storage]
    number = {"nbits": bits, "axis": axis, "group_size": group_size}
    flags = {"view_as_float": storage != "U8", "quant_zero": 0, "quant_scale": 0, "encoded_state_dict": 1}
    fields: dict[str, NDArray[Any] | Stored] = {
        "W_q": Stored(storage, (content.shape[0], content.shape[1] // itemsize), content.tobytes()),
        "scale": as_bf16(scales) if scale == "BF16" else scales,
        "zero": as_bf16(zeros) if scale == "BF16" else zeros,
        "shape": longs(*shape),
        "packing": text(PACKING[bits]),
        "compute_dtype": text("torch.float16"),
        **{field: np.array(value, np.int32) for field, value in number.items()},
        **{field: np.array(value, np.uint8) for field, value in flags.items()},
    }
    dense = (codes - zeros.astype(np.float64)) * scales.astype(np.float64)
    return Case(fields, dense.reshape(shape))


def layer(**options: Any) -> dict[str, Case]:
    """Four different projections, of which O reads what V puts out."""
    shapes = dict.fromkeys("qkv", (OUTPUTS, INPUTS)) | {"o": (INPUTS, OUTPUTS)}
    return {role: hqq(shapes[role], np.random.default_rng(seed), **options) for seed, role in enumerate(ROLES)}


def write(folder: Path, cases: dict[str, Case]) -> Path:
    stated = {"quantization_config": {"quant_method": "hqq", "quant_config": {}}}
    return write_quantised(folder, {role: case.fields for role, case in cases.items()}, stated, heads=OUTPUTS)


CASES: dict[str, dict[str, Any]] = {
    **{f"{bits} bits, axis {axis}": {"bits": bits, "axis": axis} for bits in PACKING for axis in (0, 1)},
    "groups across rows": {"group_size": 32},
    "groups of half a row": {"group_size": 8, "axis": 1},
    "small groups along the rows": {"group_size": 4, "axis": 0},
    "bfloat16": {"scale": "BF16", "storage": "BF16"},
    "float32": {"scale": "F32", "storage": "F32", "axis": 0},
}


@pytest.mark.parametrize("backend", DECODING)
@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_the_decoded_values(case: str, backend: str, tmp_path: Path) -> None:
    options = {"bits": 4, "group_size": 16, "axis": 1, **CASES[case]}
    cases = layer(**options)
    folder = write(tmp_path, cases)
    check_statistics(folder, {role: each.dense for role, each in cases.items()}, backend)
    for role, each in cases.items():
        np.testing.assert_allclose(decoded(folder, role), each.dense, rtol=1e-6)
    plan = plan_of(folder)
    label = f"HQQ, {options['bits']} bits, groups of {options['group_size']} along axis {options['axis']}"
    assert [read["encoding"] for read in plan["reads"]] == 4 * [label]


I32, U8 = np.int32, np.uint8
BAD: dict[str, tuple[dict[str, NDArray[Any] | Stored | None], str]] = {
    **{
        f"no {field}": ({field: None}, rf"'{Q}.W_q' is quantised, and {Q}.{field} is missing")
        for field in ("scale", "zero", "shape", "packing", "axis", "group_size")
    },
    "3 bits": ({"packing": text("3bit_32")}, rf"'{Q}.W_q' is packed by HQQ as '3bit_32'; 8bit_u8, 4bit_u8"),
    "no text": ({"packing": np.array([255, 0, 10], U8)}, rf"'{Q}.W_q' is packed by HQQ as '\?\?\?'; 8bit_u8"),
    "a long text": ({"packing": np.full(5000, 65, U8)}, rf"'{Q}.packing' has 5000 bytes, over 4096"),
    "quantised zeros": ({"quant_zero": np.array(1, U8)}, rf"'{Q}.W_q' has zeros that are quantised, which is not supp"),
    "quantised scales": ({"quant_scale": np.array(1, U8)}, rf"'{Q}.W_q' has scales that are quantised, which is not"),
    "another packing": ({"packing": text("2bit_u8")}, rf"'{Q}.shape' says \(64, 48\), not one of as many.* 6144$"),
    "three dimensions": ({"shape": longs(64, 12, 4)}, rf"'{Q}.shape' says \(64, 12, 4\), not that of a matrix"),
    "a negative shape": ({"shape": longs(-64, -48)}, rf"'{Q}.shape' says \(-64, -48\), not that of a matrix"),
    "an empty shape": ({"shape": longs()}, rf"'{Q}.shape' says \(\), not that of a matrix"),
    "a huge shape": ({"shape": longs(2**62, 2**62)}, rf"'{Q}.shape' says \(4611686018427387904, 4611.*not one of"),
    "a shape of floats": ({"shape": np.ones(2, np.float32)}, rf"'{Q}.shape' is F32, not I32 or I64 or U8"),
    "axis 2": ({"axis": np.array(2, I32)}, rf"'{Q}.axis' says \(2,\), not 0 or 1"),
    "two axes": ({"axis": np.array([0, 1], I32)}, rf"'{Q}.axis' says \(0, 1\), not 0 or 1"),
    "another axis": ({"axis": np.array(0, I32)}, rf"'{Q}.scale' has shape \[192, 1\]; .*needs \[1, 192\]"),
    "no groups": ({"group_size": np.array(0, I32)}, rf"'{Q}.group_size' says \(0,\), not a number that divides 3072"),
    "negative groups": ({"group_size": np.array(-16, I32)}, rf"'{Q}.group_size' says \(-16,\), not a number that"),
    "uneven groups": ({"group_size": np.array(17, I32)}, rf"'{Q}.group_size' says \(17,\), not a number that divides"),
    "no group size": ({"group_size": np.zeros(0, I32)}, rf"'{Q}.group_size' says \(\), not a number that divides"),
    "other groups": ({"group_size": np.array(32, I32)}, rf"'{Q}.scale' has shape \[192, 1\]; .*needs \[96, 1\]"),
    "few zeros": ({"zero": np.zeros((191, 1), np.float16)}, rf"'{Q}.zero' has shape \[191, 1\]; .*needs \[192, 1\]"),
    "zeros of bytes": ({"zero": np.zeros((192, 1), U8)}, rf"'{Q}.zero' is U8, not BF16 or F16 or F32"),
    "odd rows": (
        {"shape": longs(3, 1024), "axis": np.array(1, I32)}, rf"'{Q}.W_q' has 3 rows, which 4 bits and groups of 16",
    ),
    "large groups along rows": (
        {"axis": np.array(0, I32), "group_size": np.array(96, I32)},
        rf"'{Q}.W_q' has 64 rows, which 4 bits and groups of 96",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name(case: str, tmp_path: Path) -> None:
    changed, message = BAD[case]
    cases = layer()
    fields = {**cases["q"].fields, **changed}
    cases["q"].fields = {field: tensor for field, tensor in fields.items() if tensor is not None}
    found = error_of(write(tmp_path, cases))
    assert re.search(message, found), found
