"""JSON from strangers: bounded, without duplicate keys, without anything behind the closing brace."""

from __future__ import annotations

import json
from typing import Any

from llmfp.errors import CheckpointError

MAX_BYTES = 100_000_000
_DENSE_FROM = 4 << 20


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises CheckpointError, naming `what`, for anything else.

    A duplicate key is an error at every level: which of the two the writer meant cannot be known. Texts over 4 MiB
    that are mostly brackets are refused before parsing, since each pair would cost some 60 bytes of memory.
    """
    if len(text) > _DENSE_FROM and text.count(b"[") + text.count(b"{") > len(text) // 10:
        raise CheckpointError(f"{what}: implausible JSON, mostly brackets")
    try:
        decoded = text.decode("utf-8")
        value, end = json.JSONDecoder(object_pairs_hook=_without_duplicates).raw_decode(decoded.lstrip(" \t\r\n"))
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{what}: {error.key!r} appears twice") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: not valid JSON ({_first_line(error)})") from None
    rest = decoded.lstrip(" \t\r\n")[end:].strip(" \t\r\n")
    if rest:
        raise CheckpointError(
            f"{what}: {len(rest)} characters of trailing data after the JSON", hint="remove what follows the last brace"
        )
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: holds a JSON {type(value).__name__}, not an object")
    return value


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return result


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200] or type(error).__name__
