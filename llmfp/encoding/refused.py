"""Formats that are recognised and not read: a value is no code times a scale, or lies where a GPU kernel wants it.

Scanning the unquantised checkpoint is always the better answer, so each is named and left at that.
"""

from __future__ import annotations

from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.checkpoint.specs import ITEM_BITS
from llmfp.encoding.specs import Siblings, refusal, stated_method

_KERNEL = "its codes lie in the order of a GPU kernel"
_SUBCLASS = "how it takes a tensor apart depends on its version"
_VECTORS = "its codes stand for vectors of codebooks"
CODES = {
    "q_weight": ("EXL2", "its rows are shuffled and have bits of their own"),
    "trellis": ("EXL3", "its values come out of a trellis, transformed"),
    "_data": ("Quanto", _SUBCLASS),
    "qdata": ("torchao", _SUBCLASS),
    "_weight_qdata": ("torchao", _SUBCLASS),
    "weight:qdata": ("torchao", _SUBCLASS),
    "codes": ("AQLM", _VECTORS),
    "indices": ("VPTQ", _VECTORS),
    "Qidxs": ("QuIP#", _VECTORS),
    "dense_weights": ("SpQR", "its outliers are stored apart"),
    "compressed": ("sparse compressed-tensors", "its zeros are left out"),
    "B": ("Marlin", _KERNEL),
    "B_24": ("sparse Marlin", _KERNEL),
}
"""Last component of a name that holds codes → its format, and why that is not read."""
BESIDE = {"tables": ("HIGGS", _VECTORS), "weight_scales": ("EETQ", _KERNEL)}
"""The same by what lies beside a `weight` of codes."""


def encode(checkpoint: Checkpoint, spec: TensorSpec, siblings: Siblings) -> TensorSpec:
    """Raises EncodingError, always. See llmfp.encoding.encoded."""
    beside = (BESIDE[field] for field in BESIDE if siblings.find(field, ITEM_BITS) is not None)
    form, why = CODES.get(spec.name.rpartition(".")[2]) or next(beside)
    raise refusal(
        checkpoint,
        spec,
        f"is {spec.dtype} {list(spec.shape)} of {form}{stated_method(checkpoint)}, which is not supported: {why}",
        "scan the unquantised checkpoint",
    )
