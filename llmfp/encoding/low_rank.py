"""An adapter's factors as the kernels take them: float32, in the orientation of the tensor they are added to."""

from __future__ import annotations

from llmfp.checkpoint.specs import LoraSpec
from llmfp.encoding.arrays import packed, values
from llmfp.marginals import LowRank


def low_rank(lora: LoraSpec, a: bytes, b: bytes, *, in_out: bool) -> LowRank:
    """scale · b @ a, or its transpose for a tensor stored [in, out], as left @ right."""
    rank = lora.a.shape[0]
    inputs = values(a, lora.a.dtype).reshape(lora.a.shape)
    outputs = values(b, lora.b.dtype).reshape(lora.b.shape) * lora.scale
    left, right = (inputs.T, outputs.T) if in_out else (outputs, inputs)
    return LowRank(rank, packed(left), packed(right))
