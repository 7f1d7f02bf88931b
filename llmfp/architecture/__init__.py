"""Tensor names and shapes → which bytes are whose query, key, value and output projection.

Families are data (families/*.json), not branches: `families.py` reads them, `matching.py` recognises one, `layouts.py`
lays `WeightView`s over its tensors, `heads.py` counts heads.
"""

from llmfp.architecture.heads import layer_heads
from llmfp.architecture.matching import match
from llmfp.architecture.specs import (
    AttentionMap,
    HeadRows,
    LayerHeads,
    NormGain,
    Projection,
    Role,
    Rotary,
    Tower,
    Vector,
    WeightView,
)

__all__ = [
    "AttentionMap",
    "HeadRows",
    "LayerHeads",
    "NormGain",
    "Projection",
    "Role",
    "Rotary",
    "Tower",
    "Vector",
    "WeightView",
    "layer_heads",
    "match",
]
