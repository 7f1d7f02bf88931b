"""Results as columns, for pandas, Arrow and pipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmfp.errors import LlmfpError
from llmfp.report import printable, words

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from llmfp.fingerprint import Fingerprint

Json = Mapping[str, Any]
Columns = dict[str, list[Any]]

_STATISTICS = ("std", "mean", "abs_max", "count", "nonfinite")


def statistics(fingerprint: Fingerprint) -> Columns:
    """A row per tower, role and layer that has weights: tower, role, layer, std, mean, abs_max, count, nonfinite."""
    columns: Columns = {name: [] for name in ("tower", "role", "layer", *_STATISTICS)}
    for name, tower in fingerprint.towers.items():
        for role, column in tower.statistics.items():
            for layer, one in zip(tower.layers, column, strict=True):
                if one is None:
                    continue
                for key, value in (("tower", name), ("role", role), ("layer", layer)):
                    columns[key].append(value)
                for key in _STATISTICS:
                    columns[key].append(getattr(one, key))
    return columns


def tests(found: Json) -> Columns:
    """A row per test of a comparison: test, score, z, p_value, basis, decided, reason; None where there is none.

    decided  whether the verdict rests on it
    reason   why it was not made, or does not count
    """
    columns: Columns = {name: [] for name in ("test", "score", "z", "p_value", "basis", "decided", "reason")}
    for name in words.TITLES:
        if name == "digest":
            continue
        made = found["profile"]["null"] if name == "profile" else found[name]
        row = {
            "test": name,
            "score": found["profile"]["pearson"]["mean"] if name == "profile" else (made or {}).get("score"),
            "z": (made or {}).get("z"),
            "p_value": (made or {}).get("p_value"),
            "basis": None if made is None else _BASIS.get(name) or made["basis"],
            "decided": name in found["rests_on"],
            "reason": found["lost"].get(name),
        }
        for key, value in row.items():
            columns[key].append(value)
    return columns


_BASIS = {"residual": "exact", "heads": "exact", "profile": "conformal"}


def to_pandas(columns: Columns) -> pd.DataFrame:
    """Raises LlmfpError where pandas is not installed."""
    try:
        import pandas as pd
    except ImportError:
        raise _missing("pandas") from None
    return pd.DataFrame(columns)


def to_arrow(columns: Columns) -> pa.Table:
    """Raises LlmfpError where pyarrow is not installed."""
    try:
        import pyarrow as pa
    except ImportError:
        raise _missing("pyarrow") from None
    return pa.table(columns)


def plain(columns: Columns) -> str:
    """Lines of fields with a tab between, the first of names; numbers in full, nothing where there is none."""
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    return "\n".join("\t".join("" if cell is None else printable(str(cell)) for cell in row) for row in rows)


def _missing(library: str) -> LlmfpError:
    return LlmfpError(f"{library} is not installed", hint="pip install 'llmfp[notebook]'")
