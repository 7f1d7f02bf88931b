"""Tables of what a registry holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmfp.report import printable

_COMMIT_DIGITS = 12


def short(revision: str) -> str:
    """A revision as far as it is needed to tell it from others."""
    kind, colon, digits = revision.rpartition(":")
    return f"{kind}{colon}{digits[:_COMMIT_DIGITS]}"


def registry_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line a fingerprint: repo, revision, architecture, shape."""
    cells = [
        (
            f"{row['repo']}@{short(row['revision'])}",
            row["architecture"],
            f"{row['layers']} × {row['hidden_size']}",
            "-" if row["heads"] is None else f"{row['heads']}/{row['kv_heads'] or '-'}",
        )
        for row in rows
    ]
    titles = ("repo@revision", "architecture", "layers × hidden", "heads/kv")
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (titles, *cells)]
    return "\n".join([*(printable(line.rstrip()) for line in lines), "", f"{len(cells):,} fingerprints"])
