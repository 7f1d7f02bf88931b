"""Tables of what a registry holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmfp.report import printable

if TYPE_CHECKING:
    import pyarrow as pa

_COMMIT_DIGITS = 12


def short(revision: str) -> str:
    """A revision as far as it is needed to tell it from others."""
    kind, colon, digits = revision.rpartition(":")
    return f"{kind}{colon}{digits[:_COMMIT_DIGITS]}"


def registry_table(table: pa.Table) -> str:
    """One line a fingerprint: repo, revision, architecture, shape. Columns and not rows: there may be 100,000."""
    repo, revision, architecture, layers, hidden, heads, kv_heads = (
        table[name].to_pylist()
        for name in ("repo", "revision", "architecture", "layers", "hidden_size", "heads", "kv_heads")
    )
    columns = {
        "repo@revision": [f"{one}@{short(other)}" for one, other in zip(repo, revision, strict=True)],
        "architecture": architecture,
        "layers × hidden": [f"{one} × {other}" for one, other in zip(layers, hidden, strict=True)],
        "heads/kv": [
            "-" if one is None else f"{one}/{other or '-'}" for one, other in zip(heads, kv_heads, strict=True)
        ],
    }
    first, second, third = (max(map(len, (title, *column))) for title, column in list(columns.items())[:3])
    lines = [
        f"{a:<{first}}  {b:<{second}}  {c:<{third}}  {d}"
        for a, b, c, d in ([*columns], *zip(*columns.values(), strict=True))
    ]
    return "\n".join([*map(printable, lines), "", f"{table.num_rows:,} fingerprints"])
