"""JSON from strangers: bounded, without duplicate keys, without anything behind the closing brace."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from llmfp.checkpoint.stored_file import StoredFile, opened
from llmfp.errors import CheckpointError

MAX_BYTES = 100_000_000
_DENSE_FROM = 4 << 20
_MAX_DIGITS = 300
_LONGEST_QUOTE = 80


def read_object(path: Path | StoredFile, limit: int, *, constants: bool = False) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes. Raises CheckpointError, as `parse_object` does."""
    with opened(path) as file:
        if file.nbytes > limit:
            raise CheckpointError(f"{file.path}: {file.nbytes} bytes is over the limit of {limit}")
        return parse_object(file.read_at(0, file.nbytes), str(file.path), constants=constants)


def shown(value: object) -> str:
    """A value from outside as an error may quote it."""
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}…"


def parse_object(text: bytes, what: str, *, constants: bool = False) -> dict[str, Any]:
    """The JSON object in `text`. Raises CheckpointError, naming `what`, for anything else.

    A duplicate key is an error at every level: which of the two the writer meant cannot be known. Texts over 4 MiB
    that are mostly brackets are refused before parsing, since each pair would cost some 60 bytes of memory. What
    Python's parser lets pass and the standard (or safetensors') does not is refused too: half a surrogate pair, numbers
    that overflow, -0 for an integer; NaN and Infinity unless `constants` says that Python may have written the text.
    """
    if len(text) > _DENSE_FROM and text.count(b"[") + text.count(b"{") > len(text) // 10:
        raise CheckpointError(f"{what}: implausible JSON, mostly brackets")
    try:
        decoded = text.decode("utf-8").strip(" \t\r\n")
        value, end = json.JSONDecoder(
            object_pairs_hook=_without_duplicates,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=None if constants else _constant,
        ).raw_decode(decoded)
        if "\\u" in decoded:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{what}: {error.key!r} appears twice") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: not valid JSON ({_first_line(error)})") from None
    if rest := len(decoded) - end:
        raise CheckpointError(
            f"{what}: {rest} characters of trailing data after the JSON", hint="remove what follows the last brace"
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


def _integer(digits: str) -> int:
    if digits == "-0" or len(digits) > _MAX_DIGITS:
        raise ValueError(f"{digits[:20]} is out of range")
    return int(digits)


def _float(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError(f"{digits[:20]} is out of range")
    return value


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:200] or type(error).__name__
