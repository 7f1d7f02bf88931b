"""GGUF's block types: each block of a row holds its own scales, so nothing else has to be read.

What a block means is defined by ggml; the kernels decode it, checked against the gguf package.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.encoding.ggml import BLOCKS
from llmfp.encoding.specs import Encoding, refusal
from llmfp.marginals import Coding

NEVER_STORED = ("Q8_1", "Q8_K", "Q1_0")
"""What ggml makes of activations, and a type that no released converter writes."""


def encode(checkpoint: Checkpoint, spec: TensorSpec) -> TensorSpec:
    """See llmfp.encoding.encoded."""
    if spec.dtype in NEVER_STORED or spec.dtype not in BLOCKS:
        raise refusal(
            checkpoint,
            spec,
            f"is {spec.dtype}, which no converter writes for weights",
            "scan the file it was made from",
        )
    elements, nbytes = BLOCKS[spec.dtype]
    encoding = Encoding(
        label=f"{spec.dtype}, blocks of {elements}",
        packing=spec.dtype,
        bits=8 * nbytes // elements,
        row_bytes=spec.shape[-1] // elements * nbytes,
        in_out=False,
        parts=(),
        prepare=lambda _: Coding(spec.dtype, table=grid(spec.dtype)),
        kept_bytes=0,
    )
    return replace(spec, encoding=encoding)


@cache
def grid(name: str) -> bytes | None:
    """The points that IQ1, IQ2 and IQ3 take their values from, int8[n, 8 or 4], as the gguf package has them."""
    if not name.startswith(("IQ1", "IQ2", "IQ3")):
        return None
    from gguf import quants

    kind = getattr(quants, name)
    kind.init_grid()
    points: bytes = kind.grid.astype("int8").tobytes()
    return points
