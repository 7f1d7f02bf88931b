"""compressed-tensors' packed codes: 2 to 8 bits as one run of bits per row of 32-bit words, scales per group of a row.

Symmetric codes stand for themselves less 2^(bits - 1); zeros, where there are any, are packed alike, down the rows.
`weight_shape` holds the matrix's shape, since the last word of a row may be part empty; `weight_g_idx` each column's
group, which act-order shuffles. Bits other than 1, 2, 4 and 8 are those of version 0.11 on, which splits codes between
words. Source: compressed-tensors; checked against its version 0.20.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.encoding import mxfp4, nvfp4
from llmfp.encoding.specs import Encoding, Siblings, kept_bytes, read_small, refusal, settings
from llmfp.marginals import Chunk, Coding

_FLOATS = ("F16", "BF16", "F32")
_REFUSED = ("marlin-24", "sparse-24-bitmask", "sparse-bitmask", "mxfp6-pack-quantized")
_INTEGERS = {"I64": "<2q", "I32": "<2i"}
_BELONG = "do config.json and the weights belong together?"


def encode(checkpoint: Checkpoint, spec: TensorSpec, siblings: Siblings) -> TensorSpec:
    """See llmfp.encoding.encoded."""
    if (form := settings(checkpoint).get("format")) in _REFUSED:
        raise refusal(
            checkpoint, spec, f"is stored as {form}, which is not supported", "scan the unquantised checkpoint"
        )
    if spec.dtype == "U8":
        if siblings.find("weight_global_scale", ("F32",)) is not None:
            return nvfp4.encode(checkpoint, spec, siblings)
        return mxfp4.encode(checkpoint, spec, siblings)
    if spec.dtype != "I32" or len(spec.shape) != 2 or 0 in spec.shape:
        raise refusal(
            checkpoint, spec, f"is {spec.dtype} {list(spec.shape)}, not I32 of two dimensions", "fetch the file again"
        )
    rows, cols = _shape(checkpoint, siblings.need("weight_shape", tuple(_INTEGERS), (2,)))
    bits = _bits(checkpoint, spec, rows, cols)
    scale = siblings.need("weight_scale", _FLOATS)
    index = siblings.find("weight_g_idx", ("I32", "I64"), (cols,))
    entries, size = _groups(checkpoint, scale, rows, cols)
    zero = (siblings.find if _symmetric(checkpoint) else siblings.need)("weight_zero_point", ("I32", "I8"))
    if zero is not None:
        packed = -(-entries[0] * bits // 32) if zero.dtype == "I32" else entries[0]
        siblings.find("weight_zero_point", (zero.dtype,), (packed, entries[1]))
    named = {"weight_scale": scale, "weight_zero_point": zero, "weight_g_idx": index}
    parts = tuple((field, part) for field, part in named.items() if part is not None)
    coding = Coding(
        "row",
        bits,
        levels="uint" if zero is not None and zero.dtype == "I32" else "offset",
        scale_rows=entries[0],
        scale_cols=entries[1],
        row_block=rows if entries[0] == 1 else 1,
        col_block=size,
    )
    encoding = Encoding(
        label=f"compressed-tensors, {bits} bits, " + ("a scale per row" if entries[1] == 1 else f"groups of {size}"),
        packing="row",
        bits=bits,
        row_bytes=4 * spec.shape[1],
        in_out=False,
        parts=parts,
        prepare=partial(_prepare, checkpoint, dict(parts), coding),
        kept_bytes=kept_bytes(parts, 2 * entries[0] * entries[1] + cols),
    )
    return replace(spec, shape=(rows, cols), encoding=encoding)


def _shape(checkpoint: Checkpoint, spec: TensorSpec) -> tuple[int, int]:
    rows, cols = struct.unpack(_INTEGERS[spec.dtype], read_small(checkpoint, spec))
    if rows < 1 or cols < 1:
        raise refusal(checkpoint, spec, f"holds [{rows}, {cols}], no shape of a matrix", "fetch the file again")
    return rows, cols


def _stated_weights(checkpoint: Checkpoint) -> list[Mapping[str, Any]]:
    """What config.json says of weights, once per group of layers."""
    groups = settings(checkpoint).get("config_groups")
    weights = (
        [each.get("weights") for each in groups.values() if isinstance(each, dict)] if isinstance(groups, dict) else []
    )
    return [each for each in weights if isinstance(each, dict)]


def _symmetric(checkpoint: Checkpoint) -> bool:
    """Whether there may be no zeros: some layers' codes stand for themselves, or nothing is said."""
    stated = _stated_weights(checkpoint)
    return not stated or any(weights.get("symmetric") is not False for weights in stated)


def _bits(checkpoint: Checkpoint, spec: TensorSpec, rows: int, cols: int) -> int:
    """The number of bits, of those config.json states for any layers, that makes rows of so many words."""
    numbers = [weights.get("num_bits") for weights in _stated_weights(checkpoint)]
    stated = {bits for bits in numbers if isinstance(bits, int) and 2 <= bits <= 8}
    possible = sorted(bits for bits in stated if spec.shape == (rows, -(-cols * bits // 32)))
    if len(possible) == 1:
        return possible[0]
    raise refusal(
        checkpoint,
        spec,
        f"has shape {list(spec.shape)}, which holds no [{rows}, {cols}] of the "
        f"{' or '.join(map(str, sorted(stated))) or 'unstated'} bits that config.json states",
        _BELONG,
    )


def _groups(checkpoint: Checkpoint, scale: TensorSpec, rows: int, cols: int) -> tuple[tuple[int, int], int]:
    """Rows and columns of scales, and columns that share one."""
    if scale.nbytes == scale.itemsize:
        return (1, 1), cols
    if scale.shape in ((rows,), (rows, 1)):
        return (rows, 1), cols
    if len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] and cols % scale.shape[1] == 0:
        return (rows, scale.shape[1]), cols // scale.shape[1]
    raise refusal(
        checkpoint, scale, f"has shape {list(scale.shape)}, no equal groups of a matrix [{rows}, {cols}]", _BELONG
    )


def _prepare(
    checkpoint: Checkpoint, parts: Mapping[str, TensorSpec], coding: Coding, stored: Mapping[str, bytes]
) -> Coding:
    import numpy as np

    from llmfp.encoding import arrays
    from llmfp.kernels import codes

    coding = replace(coding, scale=arrays.floats(stored["weight_scale"], parts["weight_scale"].dtype))
    if (zero := parts.get("weight_zero_point")) is not None and zero.dtype == "I8":
        coding = replace(coding, zero=arrays.floats(stored["weight_zero_point"], "I8"))
    elif zero is not None:
        rows, cols = coding.scale_rows, coding.scale_cols
        plain = Coding("down", coding.bits, scale=np.ones(1, np.float32).data, row_block=rows, col_block=cols)
        zeros = codes.decode(Chunk(stored["weight_zero_point"], "", rows, cols, 0, 4 * cols, rows), plain)
        coding = replace(coding, zero=arrays.packed(zeros))
    if (index := parts.get("weight_g_idx")) is None:
        return coding
    group = np.frombuffer(stored["weight_g_idx"], "<i4" if index.dtype == "I32" else "<i8")
    if (group == -1).all():  # written where there is no act-order
        return coding
    if group.min() < 0 or group.max() >= coding.scale_cols:
        raise refusal(
            checkpoint,
            index,
            f"holds {group.min() if group.min() < 0 else group.max()}, and there are {coding.scale_cols} groups",
            "fetch the file again",
        )
    return replace(coding, col_group=group.astype(np.int32).tobytes())
