"""Tensor names and shapes → which bytes are whose query, key, value and output projection.

Families are data (families/*.json), not branches: `families.py` reads them, `matching.py` recognises one and lays
`WeightView`s over its tensors.
"""

from llmfp.architecture.matching import match
from llmfp.architecture.specs import AttentionMap, NormGain, Projection, Role, Tower, WeightView

__all__ = ["AttentionMap", "NormGain", "Projection", "Role", "Tower", "WeightView", "match"]
