"""Families of architectures, read from families/*.json.

A family file says how attention tensors are named and what the norms around them do:

    {
      "model_types": ["gpt2"],                      config.json's model_type, to tell look-alikes apart
      "like": "llama",                              take everything not said here from that family
      "generic": true,                              wins among look-alikes when the config does not decide
      "towers": {
        "decoder": {
          "blocks": ["transformer.h.{layer}", …],   where layer number {layer} lives, wrappers stripped
          "q": "attn.q_proj.weight", "k": …, "v": …, "o": …,      separate tensors, or
          "qkv": "attn.c_attn.weight",              one tensor: Q rows, then K rows, then V rows
          "stored": "in_out",                       Conv1D: [in, out]; default [out, in]
          "witness": "mlp.c_fc_0.weight",           a name that look-alikes lack
          "draft": "eh_proj.weight",                a name only multi-token-prediction layers have, which are left out
          "norm": {
            "kind": "layer" | "rms",
            "before": "ln_1.weight",                gain in front of Q, K, V
            "after": "post_norm.weight",            gain between O and the residual addition
            "offset": 1.0,                          effective gain is offset + weight (Gemma); default 0
            "post": true                            no norm in front of Q, K, V (BERT, OLMo2)
          }
        }
      }
    }
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmfp.architecture.specs import ROLES


@dataclass(frozen=True, slots=True)
class Slot:
    """What a tensor is, by its name: the part it plays (a role, "qkv", "before", …) in a tower of a family."""

    family: str
    tower: str
    part: str


@dataclass(frozen=True, slots=True)
class TowerNames:
    """One tower of a family, as its file has it."""

    blocks: tuple[str, ...]
    parts: Mapping[str, str]
    transposed: bool
    norm_kind: str
    norm_offset: float
    post_norm: bool


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    model_types: frozenset[str]
    generic: bool
    towers: Mapping[str, TowerNames]

    @property
    def has_witness(self) -> bool:
        """Whether look-alikes can be told apart by a tensor only this family has."""
        return any(WITNESS in names.parts for names in self.towers.values())


PARTS = (*(str(role) for role in ROLES), "qkv")
NORM_PARTS = ("before", "after")
WITNESS = "witness"
DRAFT = "draft"


@cache
def families() -> Mapping[str, Family]:
    """All families by name."""
    folder = Path(__file__).parent / "families"
    raw = {file.stem: json.loads(file.read_bytes()) for file in sorted(folder.glob("*.json"))}
    return {name: _family(name, _inherited(name, raw)) for name in raw}


@cache
def slots() -> Mapping[str, tuple[Slot, ...]]:
    """Every tensor name the families know, {layer} in place of the number, with all it can be."""
    table: dict[str, list[Slot]] = {}
    for family in families().values():
        for tower, names in family.towers.items():
            for block in names.blocks:
                for part, suffix in names.parts.items():
                    table.setdefault(f"{block}.{suffix}", []).append(Slot(family.name, tower, part))
    return {name: tuple(found) for name, found in table.items()}


def _inherited(name: str, raw: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    own = raw[name]
    if "like" not in own:
        return own
    base = _inherited(own["like"], raw)
    towers = {}
    for tower, names in base["towers"].items():
        change = own.get("towers", {}).get(tower, {})
        towers[tower] = {key: value for key, value in {**names, **change}.items() if value is not None}
    return {"model_types": own["model_types"], "towers": towers}


def _family(name: str, raw: Mapping[str, Any]) -> Family:
    towers = {}
    for tower, names in raw["towers"].items():
        parts = {part: names[part] for part in (*PARTS, WITNESS, DRAFT) if part in names}
        parts |= {part: names["norm"][part] for part in NORM_PARTS if part in names["norm"]}
        towers[tower] = TowerNames(
            blocks=tuple(names["blocks"]),
            parts=parts,
            transposed=names.get("stored") == "in_out",
            norm_kind=names["norm"]["kind"],
            norm_offset=float(names["norm"].get("offset", 0.0)),
            post_norm=names["norm"].get("post", False),
        )
    return Family(name, frozenset(raw["model_types"]), raw.get("generic", False), towers)
