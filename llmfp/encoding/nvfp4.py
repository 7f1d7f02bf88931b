"""NVFP4: e2m1 codes, two to a byte, low half first, an e4m3 scale for every 16 of a row and one scale for the tensor.

compressed-tensors divides by the tensor's (`weight_global_scale`), ModelOpt multiplies by it (`weight_scale_2`).
Source: their documentation and code; checked against compressed-tensors 0.20.
"""

from __future__ import annotations

from dataclasses import replace

from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.encoding.specs import Siblings, refusal, small_floats, symmetric, unswizzled

_BLOCK = 16


def encode(checkpoint: Checkpoint, spec: TensorSpec, siblings: Siblings) -> TensorSpec:
    """See llmfp.encoding.encoded."""
    if spec.dtype != "U8" or len(spec.shape) != 2:
        raise refusal(
            checkpoint,
            spec,
            f"is {spec.dtype} {list(spec.shape)}, not bytes of two 4-bit floats each",
            "scan the unquantised checkpoint",
        )
    rows, cols = spec.shape[0], 2 * spec.shape[1]
    needed = rows, -(-cols // _BLOCK)
    unswizzled(checkpoint, spec, siblings.need("weight_scale", ("F8_E4M3", "U8")), needed)
    scale = replace(siblings.need("weight_scale", ("F8_E4M3", "U8"), needed), dtype="F8_E4M3")  # bytes hold the same
    symmetric(checkpoint, siblings)
    divisor = siblings.find("weight_global_scale", ("F32",))
    factor = divisor or siblings.need("weight_scale_2", ("F32",))
    if factor.nbytes != factor.itemsize:
        raise refusal(checkpoint, factor, f"has shape {list(factor.shape)}, not one scale", "fetch the file again")
    whole = "divisor" if divisor is not None else "factor"
    return small_floats(spec, cols, _BLOCK, (("scale", scale), (whole, factor)), "NVFP4, blocks of 16")
