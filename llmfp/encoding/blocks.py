"""GGUF's block types: each block of a row holds its own scales, so nothing else has to be read.

What a block means is defined by ggml; the kernels decode it, checked against the gguf package.
"""

from __future__ import annotations

from dataclasses import replace

from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.encoding.ggml import BLOCKS
from llmfp.encoding.specs import Encoding, refusal
from llmfp.marginals import Coding

_NEVER_STORED = ("Q8_1", "Q8_K")


def encode(checkpoint: Checkpoint, spec: TensorSpec) -> TensorSpec:
    """See llmfp.encoding.encoded."""
    if spec.dtype in _NEVER_STORED or spec.dtype not in BLOCKS:
        raise refusal(
            checkpoint,
            spec,
            f"is {spec.dtype}, which no converter writes for weights",
            "scan the file it was made from",
        )
    elements, nbytes = BLOCKS[spec.dtype]
    coding = Coding(spec.dtype, tensor_cols=spec.shape[-1])
    encoding = Encoding(
        label=f"{spec.dtype}, blocks of {elements}",
        packing=spec.dtype,
        bits=8 * nbytes // elements,
        row_bytes=spec.shape[-1] // elements * nbytes,
        in_out=False,
        parts=(),
        prepare=lambda _: coding,
        kept_bytes=0,
    )
    return replace(spec, encoding=encoding)
