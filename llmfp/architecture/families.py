"""Families of architectures, read from families/*.json.

A family file says how attention tensors are named and laid out and what the norms around them do:

    {
      "model_types": ["gpt2"],                      config.json's model_type, to tell look-alikes apart
      "like": "llama",                              take everything not said here from that family
      "generic": true,                              wins among look-alikes when the config does not decide
      "towers": {
        "decoder": {
          "blocks": ["transformer.h.{layer}", …],   where layer number {layer} lives, wrappers stripped
          "q": "attn.q_proj.weight", "k": …, "v": …, "o": …,      separate tensors, or
          "qkv": "attn.c_attn.weight",              one tensor: all Q rows, then K rows, then V rows; or
          "qkv": {"tensor": …, "layout": …},        one tensor laid out in one of these ways:
              "layout": "concat"                    as the string alone
              "layout": "groups"                    [KV, H/KV + 2, head_dim]: per kv head its query heads, its key head,
                                                    its value head ([H, 3, head_dim] is KV = H; multi-query is KV = 1)
              "layout": "shards", "shards": 4       that many parts, each concatenated in itself
              "order": "qvk"                        order within a part; default "qkv"
              "groups_unless": "multi_query_…"      equal thirds are groups (KV = H) unless config.json says true
          "q": {"tensor": …, "layout": "gated"},    per head its query rows, then as many of a gate, which is not read
          "q_a", "q_b", "kv_a", "kv_b", "kv", "o_a", "o_b"        factors of latent attention
          "k_b", "v_b"                              kv_b in two tensors, [heads, latent, nope] and [heads, v, latent]
          "stored": "in_out",                       Conv1D: [in, out]; default [out, in]
          "witness": "mlp.c_fc_0.weight",           a name that look-alikes lack
          "draft": "eh_proj.weight",                a name only multi-token-prediction layers have, which are left out
          "linear": "self_attn.A_log",              a name only linear-attention layers have, which are left out
          "rotary": {                               how Q and K are turned; without it, not at all
            "pairs": "half" | "interleaved",        rows i and i + P of a head, or rows 2i and 2i + 1
            "interleaved_if": {"model_type": "…"},  rows 2i and 2i + 1 where config.json says this
            "half_if": {"model_type": "…"},         rows i and i + P where config.json says this
            "share": 0.25,                          of a head's rows, where config.json does not say; default 1
            "off_if": {"alibi": true},              no rotary embedding where config.json says this
            "nope": {"key": "no_rope_layers", "value": 0}   nor in layers with this value in a list of config.json
          },
          "indexed_if": {"alibi": true} | true,     heads differ by design where config.json says this, or always
          "adapter": "self_attn.…adapter….weight",  low-rank matrices added to q, k, v: not read, and a caveat says so
          "norm": {
            "kind": "layer" | "rms",
            "before": "ln_1.weight",                gain in front of Q, K, V; of several that are there, that listed
                                                    first
            "after": "post_norm.weight",            gain between O and the residual addition
            "q_latent": "q_a_layernorm.weight",     gain between q_a and q_b
            "kv_latent": "kv_a_layernorm.weight",   gain between kv_a and kv_b
            "offset": 1.0,                          effective gain is offset + weight (Gemma); default 0
            "post": true,                           no norm in front of Q, K, V (BERT, OLMo2)
            "post_if": {"do_layer_norm_before": false}    so where config.json says this: "before" follows the addition
            "after_if": {"norm_after": true}              so where config.json says this: "before" is "after"
          }
        }
      }
    }

A condition is an object of config.json's values, all of which must hold, each a value or a list of possible values; or
a list of such objects, one of which must. Wherever a name stands, a list of names that different checkpoints use may
stand. The bias of q, k, v or qkv is the tensor of the same name that ends in "bias".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from llmfp.architecture.config import rotary_rows
from llmfp.architecture.specs import Role, Rotary

Condition = bool | Mapping[str, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Slot:
    """What a tensor is, by its name: the part it plays (a role, "qkv", "before", …) in a tower of a family."""

    family: str
    tower: str
    part: str


@dataclass(frozen=True, slots=True)
class Fused:
    """How Q, K and V lie in one tensor; the words are those of the family file."""

    layout: str
    order: str
    shards: int
    groups_unless: str | None


@dataclass(frozen=True, slots=True)
class TowerNames:
    """One tower of a family, as its file has it; `parts`: the names, below a block, that fill a part."""

    blocks: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    fused: Fused
    gated: bool
    transposed: bool
    norm_kind: str
    norm_offset: float
    post_norm: bool
    post_if: Condition
    after_if: Condition
    rotary: Mapping[str, Any] | None
    indexed_if: Condition
    first_norm: str | None = "before"
    """The part that the tensor named as "before" plays: that, "after", or none next to attention."""

    def as_configured(self, config: Mapping[str, Any]) -> TowerNames:
        """With the norm where config.json puts it."""
        if _holds(self.after_if, config):
            return replace(self, post_norm=True, first_norm=NORM_PARTS[1])
        if _holds(self.post_if, config):
            return replace(self, post_norm=True, first_norm=None)
        return self

    def rotary_of(self, config: Mapping[str, Any], head_dim: int | None, rows: int | None = None) -> Rotary | None:
        """The rotary embedding of heads of this size; None without one. rows: those it turns, where shapes tell."""
        if self.rotary is None or head_dim is None or _holds(self.rotary.get("off_if", []), config):
            return None
        if rows is None:
            rows = rotary_rows(config, head_dim, self.rotary.get("share", 1.0))
        half = self.rotary["pairs"] == "half" and not _holds(self.rotary.get("interleaved_if", []), config)
        half = half or _holds(self.rotary.get("half_if", []), config)
        return Rotary(rows // 2, not half) if rows >= 2 else None

    def unrotated(self, config: Mapping[str, Any]) -> frozenset[int]:
        """Layers that config.json leaves without the rotary embedding of the others."""
        nope = (self.rotary or {}).get("nope")
        stated = config.get(nope["key"]) if nope is not None else None
        if nope is None or not isinstance(stated, list):
            return frozenset()
        return frozenset(layer for layer, value in enumerate(stated) if value == nope["value"])

    def has_indexed_heads(self, config: Mapping[str, Any]) -> bool:
        return _holds(self.indexed_if, config)


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    model_types: frozenset[str]
    generic: bool
    depth: int
    """Relatives it is described by: of two look-alikes with a witness each, the one further down is meant."""
    towers: Mapping[str, TowerNames]

    @property
    def has_witness(self) -> bool:
        """Whether look-alikes can be told apart by a tensor only this family has."""
        return any(WITNESS in names.parts for names in self.towers.values())


VISION = "vision"
TOWERS = ("decoder", "encoder", "cross", VISION)
"""All towers there are. That of a vision model is never taken for a language model's, and is read only on request."""
PARTS = (*(str(role) for role in Role), "qkv")
NORM_PARTS = ("before", "after", "q_latent", "kv_latent")
WITNESS = "witness"
DRAFT = "draft"
LINEAR = "linear"
ADAPTER = "adapter"
_HAVE_BIAS = ("q", "k", "v", "qkv")


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
                for part, suffixes in names.parts.items():
                    for suffix in suffixes:
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
    return {"model_types": own["model_types"], "depth": base.get("depth", 0) + 1, "towers": towers}


def _family(name: str, raw: Mapping[str, Any]) -> Family:
    towers = {}
    for tower, names in raw["towers"].items():
        norm = names["norm"]
        parts = {part: _suffixes(names[part]) for part in (*PARTS, WITNESS, DRAFT, LINEAR, ADAPTER) if part in names}
        parts |= {part: _suffixes(norm[part]) for part in NORM_PARTS if part in norm}
        parts |= {f"{part}_bias": tuple(map(_bias, parts[part])) for part in _HAVE_BIAS if part in parts}
        towers[tower] = TowerNames(
            blocks=tuple(names["blocks"]),
            parts=parts,
            fused=_fused(names.get("qkv")),
            gated=isinstance(names.get("q"), Mapping) and names["q"]["layout"] == "gated",
            transposed=names.get("stored") == "in_out",
            norm_kind=norm["kind"],
            norm_offset=float(norm.get("offset", 0.0)),
            post_norm=norm.get("post", False),
            post_if=norm.get("post_if", []),
            after_if=norm.get("after_if", []),
            rotary=names.get("rotary"),
            indexed_if=names.get("indexed_if", []),
        )
    return Family(name, frozenset(raw["model_types"]), raw.get("generic", False), raw.get("depth", 0), towers)


def _holds(condition: Condition, config: Mapping[str, Any]) -> bool:
    if isinstance(condition, bool):
        return condition
    if isinstance(condition, Mapping):
        condition = [condition]
    return any(all(_is(config.get(key), value) for key, value in each.items()) for each in condition)


def _is(stated: Any, wanted: Any) -> bool:
    """Whether config.json's value is the wanted one, or one of several; 1 is not true."""
    possible = wanted if isinstance(wanted, list) else [wanted]
    return any(type(stated) is type(value) and stated == value for value in possible)


def _suffixes(value: Any) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        value = value["tensor"]
    return (value,) if isinstance(value, str) else tuple(value)


def _bias(suffix: str) -> str:
    return suffix.removesuffix("weight") + "bias"


def _fused(value: Any) -> Fused:
    said = value if isinstance(value, Mapping) else {}
    return Fused(
        layout=said.get("layout", "concat"),
        order=said.get("order", "qkv"),
        shards=said.get("shards", 1),
        groups_unless=said.get("groups_unless"),
    )
