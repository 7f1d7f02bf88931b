"""bitsandbytes: every statistic is that of table[code] * absmax, or code * SCB / 127, in float64; slices of real
checkpoints decode to what the library makes of them. The JSON beside the codes is hostile, and what does not fit is
refused.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.checkpoints import Stored
from tests.packing import FP4, NF4, text
from tests.quantised import DECODING, ROLES, check_statistics, decoded, error_of, plan_of, write_quantised
from tests.test_encoding_gptq import from_bf16

STATE = "weight.quant_state.bitsandbytes__nf4"
Q = "model.layers.0.self_attn.q_proj"
INPUTS, OUTPUTS = 48, 40


@dataclass
class Case:
    """A projection as stored, and the W [out, in] it stands for."""

    fields: dict[str, NDArray[Any] | Stored]
    dense: NDArray[np.float64]


def as_json(said: dict[str, Any] | bytes) -> NDArray[np.uint8]:
    return text(said if isinstance(said, bytes) else json.dumps(said))


def four_bits(
    shape: tuple[int, int],
    rng: np.random.Generator,
    *,
    kind: str = "nf4",
    block: int = 64,
    nested: bool = False,
    storage: str = "U8",
) -> Case:
    rows, cols = shape
    table, codes = NF4 if kind == "nf4" else FP4, rng.integers(0, 16, rows * cols)
    blocks = -(-rows * cols // block)
    absmax = rng.uniform(0.01, 0.1, blocks).astype(np.float32)
    said: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    nested_fields: dict[str, NDArray[Any] | Stored] = {}
    scale = absmax.astype(np.float64)
    if nested:
        outer, offset = rng.uniform(0.01, 0.1, -(-blocks // 16)).astype(np.float32), 0.07
        table2, absmax = np.linspace(-1, 1, 256, dtype=np.float32), rng.integers(0, 256, blocks).astype(np.uint8)
        said |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": offset}
        scale = table2[absmax].astype(np.float64) * outer[np.arange(blocks) // 16] + offset
        nested_fields = {"weight.nested_absmax": outer, "weight.nested_quant_map": table2}
    pairs = (codes[0::2] << 4 | codes[1::2]).astype(np.uint8)
    itemsize = {"U8": 1, "BF16": 2, "F32": 4}[storage]
    fields: dict[str, NDArray[Any] | Stored] = {
        "weight": Stored(storage, (len(pairs) // itemsize, 1), pairs.tobytes()),
        "weight.absmax": absmax,
        "weight.quant_map": table,
        f"weight.quant_state.bitsandbytes__{kind}": as_json(said),
        **nested_fields,
    }
    dense = table[codes].astype(np.float64) * scale[np.arange(rows * cols) // block]
    return Case(fields, dense.reshape(shape))


def eight_bits(shape: tuple[int, int], rng: np.random.Generator, *, order: bool = True) -> Case:
    codes, scb = rng.integers(-127, 128, shape), rng.uniform(0.1, 1, shape[0]).astype(np.float32)
    fields: dict[str, NDArray[Any] | Stored] = {"weight": codes.astype(np.int8), "SCB": scb}
    if order:
        fields["weight_format"] = np.zeros((), np.uint8)
    return Case(fields, codes * scb.astype(np.float64)[:, None] / 127)


def layer(make: Callable[..., Case], shape: tuple[int, int] = (OUTPUTS, INPUTS), **options: Any) -> dict[str, Case]:
    """Four different projections, of which O reads what V puts out."""
    shapes = dict.fromkeys("qkv", shape) | {"o": shape[::-1]}
    return {role: make(shapes[role], np.random.default_rng(seed), **options) for seed, role in enumerate(ROLES)}


def write(folder: Path, cases: dict[str, Case]) -> Path:
    return write_quantised(folder, {role: case.fields for role, case in cases.items()}, heads=OUTPUTS)


CASES: dict[str, tuple[dict[str, Case], str]] = {
    "nf4": (layer(four_bits), "bitsandbytes nf4, blocks of 64"),
    "fp4": (layer(four_bits, kind="fp4", block=128), "bitsandbytes fp4, blocks of 128"),
    "nested": (layer(four_bits, nested=True), "bitsandbytes nf4, blocks of 64, nested scales"),
    "blocks across rows": (layer(four_bits, block=256), "bitsandbytes nf4, blocks of 256"),
    "a larger block": (layer(four_bits, block=4096), "bitsandbytes nf4, blocks of 1920"),
    "stored as bfloat16": (layer(four_bits, storage="BF16"), "bitsandbytes nf4, blocks of 64"),
    "stored as float32": (layer(four_bits, storage="F32"), "bitsandbytes nf4, blocks of 64"),
    "int8": (layer(eight_bits), "bitsandbytes int8 with a scale per row"),
    "int8, older": (layer(eight_bits, order=False), "bitsandbytes int8 with a scale per row"),
}


@pytest.mark.parametrize("backend", DECODING)
@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_the_decoded_values(case: str, backend: str, tmp_path: Path) -> None:
    cases, label = CASES[case]
    folder = write(tmp_path, cases)
    check_statistics(folder, {role: each.dense for role, each in cases.items()}, backend)
    for role, each in cases.items():
        np.testing.assert_allclose(decoded(folder, role), each.dense, rtol=1e-6)
    plan = plan_of(folder)
    assert [read["encoding"] for read in plan["reads"]] == 4 * [label]
    assert plan["skipped"] == []
    assert plan["bytes_read"] == plan["bytes_total"]


# --- slices of real checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", DECODING)
@pytest.mark.parametrize("shape", [(64, 64), (16, 256)])
@pytest.mark.parametrize("name", ["llama_1b_nf4", "llama_1b_nf4_double_quant"])
def test_slices_of_four_bits(
    name: str, shape: tuple[int, int], backend: str, shared_data: Path, tmp_path: Path
) -> None:
    """Elements of a real checkpoint, whose rows were longer."""
    content = (shared_data / "quantized_slices" / "bnb" / f"{name}.bin").read_bytes()
    _, elements, block, *sizes = struct.unpack_from("<9I", content)
    stops = 40 + np.cumsum(sizes)
    _, weight, absmax, table, outer, table2, expected = np.split(np.frombuffer(content, np.uint8), [40, *stops[:-1]])
    said = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    fields: dict[str, NDArray[Any] | Stored] = {"weight": weight[:, None], "weight.quant_map": table.view("<f4")}
    scale = absmax.view("<f4").astype(np.float64) if not len(outer) else np.empty(0)
    if len(outer):
        offset = struct.unpack_from("<f", content, 36)[0]
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        fields |= {"weight.nested_absmax": outer.view("<f4"), "weight.nested_quant_map": table2.view("<f4")}
        scale = table2.view("<f4").astype(np.float64)[absmax] * outer.view("<f4")[0] + offset
    fields |= {"weight.absmax": absmax if len(outer) else absmax.view("<f4"), STATE: as_json(said)}
    codes = np.stack([weight >> 4, weight & 15], axis=1).reshape(-1)
    dense = (table.view("<f4")[codes].astype(np.float64) * scale.repeat(block)).reshape(shape)
    folder = write_quantised(tmp_path, dict.fromkeys("qkv", fields), heads=shape[0])
    check_statistics(folder, dict.fromkeys("qkv", dense), backend)
    np.testing.assert_allclose(decoded(folder, "q"), from_bf16(expected).reshape(shape), rtol=2.0**-8)
    assert elements == dense.size


@pytest.mark.parametrize("backend", DECODING)
def test_a_slice_of_eight_bits(backend: str, shared_data: Path, tmp_path: Path) -> None:
    content = (shared_data / "quantized_slices" / "bnb" / "llama_1b_int8.bin").read_bytes()
    _, rows, cols, *sizes = struct.unpack_from("<6I", content)
    stops = 24 + np.cumsum(sizes)
    _, weight, scb, expected = np.split(np.frombuffer(content, np.uint8), [24, *stops[:-1]])
    codes, scale = weight.view(np.int8).reshape(rows, cols), scb.view("<f4").astype(np.float64)
    fields = {"weight": codes, "SCB": scb.view("<f4"), "weight_format": np.zeros((), np.uint8)}
    folder = write_quantised(tmp_path, dict.fromkeys(ROLES, fields), heads=rows)
    check_statistics(folder, dict.fromkeys(ROLES, codes * scale[:, None] / 127), backend)
    np.testing.assert_allclose(decoded(folder, "q"), from_bf16(expected).reshape(rows, cols), rtol=2.0**-8)


# --- what does not fit -----------------------------------------------------------------------------------------------

SAID = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [OUTPUTS, INPUTS]}
NESTED = {**SAID, "nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.1}
F32, U8 = np.float32, np.uint8
Changed = dict[str, NDArray[Any] | None]
STATES: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "nothing": (b"", "not valid JSON"),
    "no JSON": (b"\x80\x04quant", "not valid JSON"),
    "half": (b'{"shape": [40,', "not valid JSON"),
    "more behind it": (json.dumps(SAID).encode() + b"{}", "2 characters of trailing data"),
    "a list": (b"[1]", "a JSON list, not an object"),
    "a key twice": (b'{"blocksize": 64, "blocksize": 32}', "'blocksize' appears twice"),
    "deep": (b'{"shape": ' + 4000 * b"[", "not valid JSON"),
    "long": (b" " * 4097, "has 4097 bytes, over 4096"),
    "another type": ({**SAID, "quant_type": "fp4"}, "says quant_type 'fp4', not 'nf4'"),
    "no shape": ({**SAID, "shape": None}, "says shape None, which is not that of a matrix"),
    "a long shape": ({**SAID, "shape": [2] * 999}, "says shape "),
    "three dimensions": ({**SAID, "shape": [40, 12, 4]}, "says shape [40, 12, 4], which is not that of a matrix"),
    "a negative shape": ({**SAID, "shape": [-40, -48]}, "says shape [-40, -48], which is not that of a matrix"),
    "an empty shape": ({**SAID, "shape": [0, 48]}, "says shape [0, 48], which is not that of a matrix"),
    "a shape of text": ({**SAID, "shape": ["40", "48"]}, "says shape ['40', '48'], which is not"),
    "a shape of truth": ({**SAID, "shape": [True, 1920]}, "says shape [True, 1920], which is not that of a matrix"),
    "a fractional shape": ({**SAID, "shape": [40.0, 48.0]}, "says shape [40.0, 48.0], which is not"),
    "a huge shape": ({**SAID, "shape": [10**250, 10**250]}, "has 960 bytes, two codes each"),
    "another shape": ({**SAID, "shape": [40, 50]}, "says shape [40, 50]; "),
    "odd rows": ({**SAID, "shape": [128, 15]}, "has rows of 15 codes, an odd number"),
    "no blocks": ({**SAID, "blocksize": 0}, "says blocksize 0, which is no number of elements"),
    "negative blocks": ({**SAID, "blocksize": -64}, "says blocksize -64, which is no number of elements"),
    "blocks of text": ({**SAID, "blocksize": "64"}, "says blocksize '64', which is no number of elements"),
    "other blocks": ({**SAID, "blocksize": 128}, "weight.absmax' has shape [30]; "),
    "huge blocks": ({**SAID, "blocksize": 10**200}, "weight.absmax' has shape [30]; "),
    "NaN": (json.dumps({**NESTED, "nested_offset": float("nan")}).encode(), "NaN is not JSON"),
    "an infinite offset": (json.dumps(NESTED).encode().replace(b"0.1", b"1e999"), "1e999 is out of range"),
    "no offset": ({**NESTED, "nested_offset": None}, "says nested_offset None, which is no number"),
    "an offset of text": ({**NESTED, "nested_offset": "0.1"}, "says nested_offset '0.1', which is no number"),
    "no nested blocks": ({**NESTED, "nested_blocksize": 0}, "says nested_blocksize 0, which is no number of elements"),
    "nested, and its tensors missing": (NESTED, "weight.absmax' is F32, not U8"),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_a_hostile_state_is_refused_by_name(case: str, tmp_path: Path) -> None:
    said, message = STATES[case]
    cases = layer(four_bits)
    cases["q"].fields[STATE] = as_json(said)
    found = error_of(write(tmp_path, cases))
    assert f"'{Q}.weight" in found
    assert message in found
    assert len(found) < 500 + len(str(tmp_path))


FOUR, NESTING, EIGHT = partial(layer, four_bits), partial(layer, four_bits, nested=True), partial(layer, eight_bits)
TENSORS: dict[str, tuple[Callable[[], dict[str, Case]], Changed, str]] = {
    "no state": (FOUR, {STATE: None}, rf"'{Q}.weight' is U8; {Q}.weight.absmax needs one .*, not 0$"),
    "two states": (
        FOUR,
        {"weight.quant_state.bitsandbytes__fp4": as_json(SAID)},
        rf"'{Q}.weight' is U8; {Q}.weight.absmax needs one weight.quant_state.*, not 2$",
    ),
    "no scales": (FOUR, {"weight.absmax": None}, rf"'{Q}.weight' is quant.* {Q}.weight.absmax is miss"),
    "no table": (FOUR, {"weight.quant_map": None}, rf"'{Q}.weight' .* {Q}.weight.quant_map is missing"),
    "a short table": (
        FOUR, {"weight.quant_map": np.zeros(15, F32)}, rf"'{Q}.weight.quant_map' has shape \[15\]",
    ),
    "a table of bytes": (FOUR, {"weight.quant_map": np.zeros(16, U8)}, rf"'{Q}.weight.quant_map' is U8"),
    "few scales": (FOUR, {"weight.absmax": np.zeros(29, F32)}, rf"'{Q}.weight.absmax' has shape \[29"),
    "few codes": (
        FOUR, {"weight": np.zeros((959, 1), U8)}, rf"{STATE}' says shape .*'{Q}.weight' has 959 bytes",
    ),
    "no nested scales": (
        NESTING, {"weight.nested_absmax": None}, rf"{Q}.weight.nested_absmax is missing",
    ),
    "no nested table": (
        NESTING, {"weight.nested_quant_map": None}, rf"{Q}.weight.nested_quant_map is miss",
    ),
    "few nested scales": (
        NESTING,
        {"weight.nested_absmax": np.zeros(1, F32)},
        rf"'{Q}.weight.nested_absmax' has shape \[1\]",
    ),
    "int8 without its scales": (EIGHT, {"SCB": None}, rf"'{Q}.weight' is stored as I8"),
    "few SCB": (EIGHT, {"SCB": np.zeros(39, F32)}, rf"'{Q}.SCB' has shape \[39\]"),
    "SCB of bytes": (EIGHT, {"SCB": np.zeros(40, U8)}, rf"'{Q}.SCB' is U8, not F32"),
    "codes of floats": (EIGHT, {"weight": np.zeros((40, 48), F32)}, rf"'{Q}.weight' is F32 .* not I8"),
    "GPU order": (
        EIGHT, {"weight_format": np.ones((), U8)}, rf"'{Q}.weight' lies in an order .*_format is 1, not",
    ),
    "orders": (EIGHT, {"weight_format": np.ones(2, U8)}, rf"'{Q}.weight_format' has shape \[2\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_what_does_not_fit_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, changed, message = TENSORS[case]
    cases = make()
    fields = {**cases["q"].fields, **changed}
    cases["q"].fields = {field: tensor for field, tensor in fields.items() if tensor is not None}
    found = error_of(write(tmp_path, cases))
    assert re.search(message, found), found
