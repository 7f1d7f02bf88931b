"""bitsandbytes: 4-bit codes of a table (NF4, FP4) with a scale per run of elements, and 8-bit ones with one per row.

Four bits: `weight` holds two codes a byte, the first in the high half, under any dtype; its shape and the size of a run
are in a JSON text beside it. The scales may be 8-bit codes of a table themselves. Eight bits: value = code * SCB / 127.
Source: bitsandbytes.functional; checked against bitsandbytes 0.50 and slices of real checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.checkpoint.strict_json import parse_object, shown
from llmfp.encoding.specs import Encoding, Siblings, kept_bytes, read_small, refusal
from llmfp.marginals import Coding

_TABLES = ("nf4", "fp4")
_AGAIN = "fetch the file again, or save the model with today's bitsandbytes"


def encode(checkpoint: Checkpoint, spec: TensorSpec, siblings: Siblings) -> TensorSpec:
    """See llmfp.encoding.encoded."""
    if (scale := siblings.find("SCB", ("F32",))) is None:
        return _four_bits(checkpoint, spec, siblings)
    if spec.dtype != "I8" or len(spec.shape) != 2:
        raise refusal(
            checkpoint,
            spec,
            f"is {spec.dtype} {list(spec.shape)} with {scale.name} beside it, not I8 of two dimensions",
            _AGAIN,
        )
    parts = [("SCB", siblings.need("SCB", ("F32",), spec.shape[:1]))]
    order = siblings.find("weight_format", ("U8",), ())
    if order is not None:
        parts.append(("weight_format", order))
        if (stored := read_small(checkpoint, order)) != b"\0":
            raise refusal(
                checkpoint,
                spec,
                f"lies in an order of GPU kernels (weight_format is {stored[0]}, not 0), which is not supported",
                _AGAIN,
            )
    rows, cols = spec.shape
    coding = Coding("row", 8, levels="int", scale_rows=rows, col_block=cols)
    encoding = Encoding(
        label="bitsandbytes int8 with a scale per row",
        packing="row",
        bits=8,
        row_bytes=cols,
        in_out=False,
        parts=tuple(parts),
        prepare=partial(_rows, coding),
        kept_bytes=kept_bytes(parts, rows),
    )
    return replace(spec, encoding=encoding)


def _rows(coding: Coding, stored: Mapping[str, bytes]) -> Coding:
    from llmfp.encoding import arrays

    return replace(coding, scale=arrays.packed(arrays.values(stored["SCB"], "F32") / 127))


def _four_bits(checkpoint: Checkpoint, spec: TensorSpec, siblings: Siblings) -> TensorSpec:
    fields = [f"weight.quant_state.bitsandbytes__{kind}" for kind in _TABLES]
    found = [(field, state) for field in fields if (state := siblings.find(field, ("U8",))) is not None]
    if len(found) != 1:
        raise refusal(
            checkpoint,
            spec,
            f"is {spec.dtype}; {spec.name}.absmax needs one {' or '.join(fields)} beside it, not {len(found)}",
            _AGAIN,
        )
    ((field, state),) = found
    path = checkpoint.shards[state.shard].path
    said = parse_object(read_small(checkpoint, state), f"{path}: tensor {state.name!r}")
    kind = field[-3:]
    if said.get("quant_type") != kind:
        raise refusal(checkpoint, state, f"says quant_type {shown(said.get('quant_type'))}, not {kind!r}", _AGAIN)
    rows, cols = _shape(checkpoint, state, said)
    if spec.nbytes != -(-rows * cols // 2):
        raise refusal(
            checkpoint,
            state,
            f"says shape {shown([rows, cols])}; {spec.name!r} has {spec.nbytes} bytes, two codes each",
            _AGAIN,
        )
    if cols % 2:
        raise refusal(
            checkpoint,
            spec,
            f"has rows of {cols} codes, an odd number, which is not supported",
            "scan the unquantised checkpoint",
        )
    block = min(_size(checkpoint, state, said, "blocksize"), rows * cols)
    blocks = -(-rows * cols // block)
    parts = [(field, state), ("weight.quant_map", siblings.need("weight.quant_map", ("F32",), (1 << 4,)))]
    nested_block, offset = 0, 0.0
    if siblings.find("weight.nested_absmax", ("F32",)) is None and "nested_blocksize" not in said:
        parts.append(("weight.absmax", siblings.need("weight.absmax", ("F32",), (blocks,))))
    else:
        nested_block = min(_size(checkpoint, state, said, "nested_blocksize"), blocks)
        stated = said.get("nested_offset")
        if not isinstance(stated, int | float) or isinstance(stated, bool):
            raise refusal(checkpoint, state, f"says nested_offset {shown(stated)}, which is no number", _AGAIN)
        offset = float(stated)
        for name, dtype, size in (
            ("absmax", "U8", blocks),
            ("nested_absmax", "F32", -(-blocks // nested_block)),
            ("nested_quant_map", "F32", 1 << 8),
        ):
            parts.append((f"weight.{name}", siblings.need(f"weight.{name}", (dtype,), (size,))))
    coding = Coding("row_high", 4, levels="table", scale_cols=blocks, flat_block=block, tensor_cols=cols)
    encoding = Encoding(
        label=f"bitsandbytes {kind}, blocks of {block}" + (", nested scales" if nested_block else ""),
        packing="row_high",
        bits=4,
        row_bytes=cols // 2,
        in_out=False,
        parts=tuple(parts),
        prepare=partial(_prepare, coding, nested_block, offset),
        kept_bytes=kept_bytes(parts, blocks),
    )
    return replace(spec, shape=(rows, cols), encoding=encoding)


def _shape(checkpoint: Checkpoint, state: TensorSpec, said: Mapping[str, Any]) -> tuple[int, int]:
    shape = said.get("shape")
    if isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape):
        return shape[0], shape[1]
    raise refusal(checkpoint, state, f"says shape {shown(shape)}, which is not that of a matrix", _AGAIN)


def _size(checkpoint: Checkpoint, state: TensorSpec, said: Mapping[str, Any], field: str) -> int:
    size = said.get(field)
    if type(size) is int and size > 0:
        return size
    raise refusal(checkpoint, state, f"says {field} {shown(size)}, which is no number of elements", _AGAIN)


def _prepare(coding: Coding, nested_block: int, offset: float, stored: Mapping[str, bytes]) -> Coding:
    import numpy as np

    from llmfp.encoding import arrays

    scale = stored["weight.absmax"]
    if nested_block:
        outer = arrays.values(stored["weight.nested_absmax"], "F32").repeat(nested_block)
        codes = np.frombuffer(scale, np.uint8)
        scale = arrays.packed(
            arrays.values(stored["weight.nested_quant_map"], "F32")[codes] * outer[: len(codes)] + offset
        )
    return replace(coding, table=stored["weight.quant_map"], scale=scale)
