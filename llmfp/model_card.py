"""What a model card says of a model's descent: `base_model` and `base_model_relation` between its first two `---`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CARD = "README.md"
_MAX_CARD_BYTES = 4 << 20
_MAX_METADATA_BYTES = 256 << 10
_MOST_BASES = 64
_LONGEST_NAME = 512
_RULE = "---"


@dataclass(frozen=True, slots=True)
class Declaration:
    """The models that a card names as this one's base, and how it came from them: finetune, adapter, merge, quantized.

    Nothing where the card says nothing, which most do.
    """

    base_models: tuple[str, ...] = ()
    relation: str | None = None


UNDECLARED = Declaration()
"""What most cards say."""


def read_card(folder: Path) -> Declaration:
    """What the card in a model's directory declares; nothing where there is no card, or none that can be read.

    A card is a stranger's text about weights that speak for themselves: one that is damaged is no reason to stop.
    """
    path = folder / CARD
    try:
        if not path.is_file() or path.stat().st_size > _MAX_CARD_BYTES:
            return UNDECLARED
        with path.open("rb") as file:
            text = file.read(_MAX_METADATA_BYTES).decode("utf-8", "replace")
    except OSError:
        return UNDECLARED
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != _RULE:
        return UNDECLARED
    end = next((n for n, line in enumerate(lines[1:], 1) if line.rstrip() == _RULE), None)
    return UNDECLARED if end is None else declaration(_yaml("\n".join(lines[1:end])))


def declaration(metadata: Mapping[str, Any]) -> Declaration:
    """What a card's metadata, already parsed, declare; names that are no text, or endless, are passed over."""
    named = metadata.get("base_model")
    listed = named if isinstance(named, list) else [named]
    bases = [base.strip() for base in listed if isinstance(base, str) and 0 < len(base.strip()) <= _LONGEST_NAME]
    relation = metadata.get("base_model_relation")
    known = isinstance(relation, str) and len(relation) <= _LONGEST_NAME
    return Declaration(tuple(dict.fromkeys(bases))[:_MOST_BASES], relation if known else None)


def _yaml(text: str) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError:
        return {}
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
