"""MXFP4: e2m1 codes, two to a byte, low half first, and a power of two (E8M0) for every 32 of a row.

As compressed-tensors ("mxfp4-pack-quantized"), Quark and gpt-oss (`*_blocks`, `*_scales`) store it. Source: OCP
Microscaling Formats v1.0; checked against compressed-tensors 0.20.
"""

from __future__ import annotations

from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.encoding.specs import Siblings, refusal, small_floats, symmetric, unswizzled

_BLOCK = 32


def encode(checkpoint: Checkpoint, spec: TensorSpec, siblings: Siblings) -> TensorSpec:
    """See llmfp.encoding.encoded."""
    blocks = spec.name.endswith("_blocks")  # [rows, blocks, 16]
    if spec.dtype != "U8" or len(spec.shape) != 2 + blocks or (blocks and spec.shape[2] != _BLOCK // 2):
        raise refusal(
            checkpoint,
            spec,
            f"is {spec.dtype} {list(spec.shape)}, not bytes of two 4-bit floats each",
            "scan the unquantised checkpoint",
        )
    cols = 2 * spec.nbytes // max(spec.shape[0], 1)
    field, needed = "weight_scales" if blocks else "weight_scale", (spec.shape[0], -(-cols // _BLOCK))
    unswizzled(checkpoint, spec, siblings.need(field, ("U8", "F8_E8M0")), needed)
    scale = siblings.need(field, ("U8", "F8_E8M0"), needed)
    symmetric(checkpoint, siblings)
    return small_floats(spec, cols, _BLOCK, (("scale", scale),), "MXFP4, blocks of 32")
