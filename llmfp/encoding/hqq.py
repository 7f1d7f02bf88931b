"""HQQ: codes in planes of bytes, with a scale and a zero per group of elements: (code - zero) * scale.

`W_q` is the matrix reshaped to [groups, group_size] (axis 1) or [group_size, groups] (axis 0) and cut into as many
equal parts as a byte holds codes, the first part in the highest bits, stored under any dtype. What describes a module
lies beside it, in tensors of a number or of a text's characters. Source: hqq.core.quantize and .bitpack, whose state
transformers stores too; checked against hqq 0.2.8.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.checkpoint.strict_json import shown
from llmfp.encoding.specs import Encoding, Siblings, kept_bytes, read_small, refusal
from llmfp.errors import EncodingError
from llmfp.marginals import Coding

_BITS = {"8bit_u8": 8, "4bit_u8": 4, "2bit_u8": 2, "1bit_u8": 1}
_INTEGERS = {"U8": "B", "I32": "i", "I64": "q"}
_FLOATS = ("F16", "BF16", "F32")
_NESTED = {"quant_zero": "zeros", "quant_scale": "scales"}
_ELSEWHERE = "scan the unquantised checkpoint"


def encode(checkpoint: Checkpoint, spec: TensorSpec, siblings: Siblings) -> TensorSpec:
    """See llmfp.encoding.encoded."""
    said = [(field, siblings.need(field, _INTEGERS)) for field in ("packing", "axis", "group_size", "shape")]
    said += [(field, flag) for field in _NESTED if (flag := siblings.find(field, _INTEGERS)) is not None]
    numbers = {field: _numbers(checkpoint, each) for field, each in said}
    packing = "".join(chr(n) if 31 < n < 127 else "?" for n in numbers["packing"])
    for field, what in _NESTED.items():
        if any(numbers.get(field, ())):
            raise refusal(checkpoint, spec, f"has {what} that are quantised, which is not supported", _ELSEWHERE)
    if packing not in _BITS:
        raise refusal(
            checkpoint, spec, f"is packed by HQQ as {shown(packing)}; {', '.join(_BITS)} are supported", _ELSEWHERE
        )
    bits = _BITS[packing]
    rows, cols, group_size, axis = _sizes(checkpoint, spec, dict(said), numbers, bits)
    groups = rows * cols // group_size
    coding = Coding("plane", bits, tensor_cols=cols)
    if axis == 1:
        entries, coding = (groups, 1), replace(coding, scale_cols=groups, flat_block=group_size)
    else:
        entries, coding = (1, groups), replace(coding, scale_rows=groups // cols, scale_cols=cols)
    parts = [
        *said,
        ("scale", siblings.need("scale", _FLOATS, entries)),
        ("zero", siblings.need("zero", _FLOATS, entries)),
    ]
    encoding = Encoding(
        label=f"HQQ, {bits} bits, groups of {group_size} along axis {axis}",
        packing="plane",
        bits=bits,
        row_bytes=cols,
        in_out=False,
        parts=tuple(parts),
        prepare=partial(_prepare, dict(parts), coding),
        kept_bytes=kept_bytes(parts, 2 * groups),
    )
    return replace(spec, shape=(rows, cols), encoding=encoding)


def _sizes(
    checkpoint: Checkpoint,
    spec: TensorSpec,
    said: Mapping[str, TensorSpec],
    numbers: Mapping[str, tuple[int, ...]],
    bits: int,
) -> tuple[int, int, int, int]:
    """Rows, columns, group size, axis."""

    def wrong(field: str, needed: str) -> EncodingError:
        return refusal(checkpoint, said[field], f"says {shown(numbers[field])}, not {needed}", "fetch the file again")

    if len(numbers["shape"]) != 2 or min(numbers["shape"]) < 1:
        raise wrong("shape", "that of a matrix")
    if numbers["axis"] not in ((0,), (1,)):
        raise wrong("axis", "0 or 1")
    (rows, cols), (axis,) = numbers["shape"], numbers["axis"]
    if rows * cols * bits != 8 * spec.nbytes:
        raise wrong("shape", f"one of as many elements as {spec.name!r} has codes, {8 * spec.nbytes // bits}")
    if len(numbers["group_size"]) != 1 or numbers["group_size"][0] < 1 or rows * cols % numbers["group_size"][0]:
        raise wrong("group_size", f"a number that divides {rows * cols} elements")
    (group_size,) = numbers["group_size"]
    if rows * bits % 8 or (axis == 0 and rows % group_size):
        raise refusal(
            checkpoint,
            spec,
            f"has {rows} rows, which {bits} bits and groups of {group_size} do not divide; that is not supported",
            _ELSEWHERE,
        )
    return rows, cols, group_size, axis


def _numbers(checkpoint: Checkpoint, spec: TensorSpec) -> tuple[int, ...]:
    stored = read_small(checkpoint, spec)
    return struct.unpack(f"<{len(stored) // spec.itemsize}{_INTEGERS[spec.dtype]}", stored)


def _prepare(parts: Mapping[str, TensorSpec], coding: Coding, stored: Mapping[str, bytes]) -> Coding:
    from llmfp.encoding import arrays

    scale, zero = (arrays.floats(stored[field], parts[field].dtype) for field in ("scale", "zero"))
    return replace(coding, scale=scale, zero=zero)
