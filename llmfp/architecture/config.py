"""What config.json says, under the many names that architectures have for the same thing.

Never trusted alone: where shapes say otherwise, shapes win.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "multi_query_group_num")
HEAD_DIM = ("head_dim", "d_kv", "kv_channels")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
_LANGUAGE_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_VISION_PARTS = ("vision_config", "vision_encoder", "vit_config")
DRAFT_LAYERS = ("num_nextn_predict_layers",)


def integer(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    """The first of these keys that holds a positive integer."""
    return next((config[key] for key in keys if type(config.get(key)) is int and config[key] > 0), None)


def rotary_rows(config: Mapping[str, Any], head_dim: int, share: float) -> int:
    """Rows of a head that a rotary embedding turns, an even number: as stated, else this share of them."""
    if (rows := integer(config, ("rotary_dim",))) is None:
        nested = config.get("rope_parameters")
        places = (config, nested if isinstance(nested, Mapping) else {})
        stated = (each.get(key) for each in places for key in ("partial_rotary_factor", "rotary_pct"))
        share = next((value for value in stated if isinstance(value, int | float) and 0 < value <= 1), share)
        rows = int(head_dim * share)
    return min(rows, head_dim) // 2 * 2


def model_types(config: Mapping[str, Any]) -> set[str]:
    nested = (value for value in config.values() if isinstance(value, Mapping))
    stated = (each.get("model_type") for each in (config, *nested))
    return {model_type for model_type in stated if isinstance(model_type, str)}


def of_language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the config that describes the language model."""
    for key in _LANGUAGE_PARTS:
        if isinstance(config.get(key), Mapping):
            return {**config, **config[key]}
    return config


def of_vision_tower(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the config that describes the vision tower; empty where there is none."""
    return next((config[key] for key in _VISION_PARTS if isinstance(config.get(key), Mapping)), {})
