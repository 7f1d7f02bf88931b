"""8-bit codes, one per byte, times a scale: of the tensor, of each row, or of each block of rows and columns.

FP8 as DeepSeek, Qwen, Mistral, compressed-tensors ("float-quantized"), fbgemm and ModelOpt store it, and the int8 of
compressed-tensors ("int-quantized"). Block sizes come from the config, never from shapes: edge blocks are partial.
Scales are floats, or powers of two (E8M0). Source: transformers' fine-grained FP8 and compressed-tensors; checked
against slices of real checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.encoding import mxfp4
from llmfp.encoding.specs import SCALES, Encoding, Siblings, kept_bytes, refusal, settings, stated_method
from llmfp.marginals import Coding

_CODES = {"F8_E4M3": "F8_E4M3", "F8_E5M2": "F8_E5M2", "I8": "int"}
_SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale_weight", "scale")
_ZERO = "weight_zero_point"
_EXPONENTS = ("U8", "F8_E8M0")
_MICROSCALING_BLOCK = 32
"""What shares an exponent in a row of MXFP8, where nothing else is stated (OCP Microscaling Formats v1.0)."""


def encode(checkpoint: Checkpoint, spec: TensorSpec, siblings: Siblings) -> TensorSpec:
    """See llmfp.encoding.encoded."""
    field, scale = next((f, s) for f in _SCALES if (s := siblings.find(f, SCALES)) is not None)
    if spec.dtype == "U8" and scale.dtype in _EXPONENTS:  # two 4-bit floats to a byte, as Quark names them
        return mxfp4.encode(checkpoint, spec, siblings)
    if spec.dtype not in _CODES or len(spec.shape) != 2:
        raise refusal(
            checkpoint,
            spec,
            f"is {spec.dtype} {list(spec.shape)}, with {scale.name!r} beside it{stated_method(checkpoint)}, "
            "which is no known format",
            "scan the unquantised checkpoint",
        )
    rows, cols = spec.shape
    row_block, col_block = _blocks(checkpoint, spec, scale)
    entries = -(-rows // row_block), -(-cols // col_block)
    parts = [(field, scale)]
    if (zero := siblings.find(_ZERO, ("I8", "F32", "BF16", "F16"), scale.shape)) is not None:
        parts.append((_ZERO, zero))
    where = {(rows, cols): "tensor", (1, cols): "row"}.get((row_block, col_block), f"{row_block}×{col_block} block")
    prepare = partial(
        _prepare,
        dict(parts),
        Coding(
            "row",
            8,
            levels=_CODES[spec.dtype],
            scale_rows=entries[0],
            scale_cols=entries[1],
            row_block=row_block,
            col_block=col_block,
        ),
    )
    encoding = Encoding(
        label=f"{spec.dtype} with a scale per {where}",
        packing="row",
        bits=8,
        row_bytes=cols,
        in_out=False,
        parts=tuple(parts),
        prepare=prepare,
        kept_bytes=kept_bytes(parts, entries[0] * entries[1] * len(parts)),
    )
    return replace(spec, encoding=encoding)


def _blocks(checkpoint: Checkpoint, spec: TensorSpec, scale: TensorSpec) -> tuple[int, int]:
    """Rows and columns per scale."""
    rows, cols = spec.shape
    stated = settings(checkpoint).get("weight_block_size") or _of_groups(settings(checkpoint))
    size = 1
    for n in scale.shape:
        size *= n
    if size == 1:
        return rows, cols
    if scale.shape in ((rows,), (rows, 1)):
        return 1, cols
    if (
        isinstance(stated, list | tuple)
        and len(stated) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in stated)
    ):
        row_block, col_block = stated
        if scale.shape == (-(-rows // row_block), -(-cols // col_block)):
            return row_block, col_block
        raise refusal(
            checkpoint,
            scale,
            f"has shape {list(scale.shape)}, which is not one scale per {row_block}×{col_block} block of "
            f"{list(spec.shape)}",
            "do config.json and the weights belong together?",
        )
    if scale.dtype in _EXPONENTS and scale.shape == (rows, -(-cols // _MICROSCALING_BLOCK)):
        return 1, _MICROSCALING_BLOCK
    raise refusal(
        checkpoint,
        scale,
        f"has shape {list(scale.shape)}, and config.json states no weight_block_size for {list(spec.shape)}",
        "put the model's config.json beside its weights",
    )


def _of_groups(stated: Mapping[str, Any]) -> object:
    """The block size as compressed-tensors states it: below each group of layers, of which the first tells."""
    groups = stated.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            size = weights.get("block_structure")
            if isinstance(size, str):  # "128x128", as the library wrote it at first
                return [int(n) for n in size.split("x") if n.isascii() and n.isdigit() and len(n) < 10]
            if isinstance(size, list):
                return size
            if isinstance(size := weights.get("group_size"), int) and size > 0:
                return [1, size]
    return None


def _prepare(specs: Mapping[str, TensorSpec], coding: Coding, stored: Mapping[str, bytes]) -> Coding:
    from llmfp.encoding import arrays

    scale, *zero = (arrays.floats(stored[field], spec.dtype) for field, spec in specs.items())
    return replace(coding, scale=scale, zero=zero[0] if zero else None)
