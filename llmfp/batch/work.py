"""One checkpoint of a batch, from its source into the registry: what a process of its own does, here or elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmfp.errors import LlmfpError
from llmfp.registry import Registry, RegistryError
from llmfp.sources import Source, fingerprinted


@dataclass(frozen=True, slots=True)
class Outcome:
    """row: as the registry keeps it, without σ; None where `reason` says why there is none."""

    row: Mapping[str, Any] | None
    reason: str | None
    seconds: float


def fingerprint_into(registry: str, source: Source, reading: Mapping[str, Any]) -> Outcome:
    """Scans a source and keeps the fingerprint. reading: what `llmfp.scan` takes beside the source.

    A model that cannot be read is an outcome; a registry that cannot be written raises RegistryError.
    """
    start = time.perf_counter()
    kept = Registry.open(registry)
    try:
        row = kept.adopt(source.origin("", None)) if source.revision else None
        if row is None:
            row = kept.add([fingerprinted(source, reading)])[0]
    except RegistryError:
        raise
    except LlmfpError as error:
        reason = f"{error}; {error.hint}" if error.hint else str(error)
        return Outcome(None, reason, time.perf_counter() - start)
    except Exception as error:  # a bug of ours, or what a stranger's file found: the others go on
        return Outcome(None, f"{type(error).__name__}: {error}", time.perf_counter() - start)
    shown = {name: value for name, value in row.items() if not name.startswith("std_")}
    return Outcome(shown, None, time.perf_counter() - start)
