"""What `llmfp-fast bench` found: one record a row, tables of them, and two machines side by side."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmfp.checkpoint import strict_json
from llmfp.errors import LlmfpError
from llmfp.report import printable

SCHEMA = "llmfp.machine/1"
UNITS = {
    "samples_ns": "nanoseconds of one repetition, in the order of measuring",
    "gbps": "1e9 bytes per second: bytes over the median",
    "spread": "half the distance of the quartiles over the median",
    "ceiling_percent": "gbps as a share of the row named by ceiling, measured in the same run",
    "error": "largest relative deviation of a std from NumPy's in float64; 0 for reads whose sums of words are right",
}
_MAX_FILE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One row. `status` is ok or skipped, with the `reason`; numbers are None where nothing was measured.

    ceiling   the test that limits this one, None for a ceiling itself
    device    what did the work: cpu, or a GPU's model
    """

    group: str
    test: str
    device: str
    driver: str | None
    threads: int | None
    bytes: int | None
    samples_ns: tuple[int, ...]
    median_ns: float | None
    gbps: float | None
    spread: float | None
    ceiling: str | None
    ceiling_percent: float | None
    error: float | None
    status: str
    reason: str | None


def measured(
    group: str, test: str, nbytes: int, samples_ns: Sequence[int], ceiling: Record | None, error: float, **where: Any
) -> Record:
    """A row of samples; `where`: device, driver, threads."""
    median = statistics.median(samples_ns)
    quartiles = statistics.quantiles(samples_ns, n=4) if len(samples_ns) > 1 else [median] * 3
    gbps = nbytes / median
    percent = 100 * gbps / ceiling.gbps if ceiling is not None and ceiling.gbps else None
    return Record(
        group=group,
        test=test,
        device=where.get("device", "cpu"),
        driver=where.get("driver"),
        threads=where.get("threads"),
        bytes=nbytes,
        samples_ns=tuple(samples_ns),
        median_ns=median,
        gbps=gbps,
        spread=(quartiles[2] - quartiles[0]) / 2 / median,
        ceiling=None if ceiling is None else ceiling.test,
        ceiling_percent=percent,
        error=error,
        status="ok",
        reason=None,
    )


def skipped(group: str, test: str, reason: str, device: str = "cpu") -> Record:
    nothing = dict.fromkeys(("driver", "threads", "bytes", "median_ns", "gbps", "spread", "ceiling"))
    return Record(
        group=group, test=test, device=device, samples_ns=(), ceiling_percent=None, error=None, status="skipped",
        reason=reason, **nothing,
    )  # fmt: skip


def flat(records: Sequence[Record], machine: Mapping[str, Any], versions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every record with what it depends on, as llama-bench writes them: each line can stand alone."""
    return [{**machine, "versions": dict(versions), **asdict(record)} for record in records]


def submission(records: Sequence[Record], machine: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    """One object that says what it is: for `--compare` on another machine."""
    return {
        "schema": SCHEMA,
        "machine": dict(machine),
        "versions": dict(versions),
        "units": UNITS,
        "records": [asdict(record) for record in records],
    }


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: json.dumps(v) if isinstance(v, dict | tuple) else v for key, v in row.items()})
    return out.getvalue().rstrip("\n")


def as_markdown(records: Sequence[Record], machine: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """A table, what was left out and why, and what a scan waits for here."""
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "",
        "| | test | device | threads | MB | GB/s | ± % | of ceiling | error |",
        "|---|---|---|--:|--:|--:|--:|---|--:|",
    ]
    for r in records:
        if r.gbps is None or r.spread is None or r.bytes is None:
            continue
        ceiling = "" if r.ceiling_percent is None else f"{r.ceiling_percent:.0f} % of {r.ceiling}"
        error = "" if r.error is None else f"{r.error:.0e}" if r.error else "0"
        lines.append(
            f"| {r.group} | {r.test} | {r.device} | {r.threads or ''} | {r.bytes / 1e6:.0f} | {r.gbps:.2f} "
            f"| {100 * r.spread:.0f} | {ceiling} | {error} |"
        )
    out = [f"skipped: {r.test} ({r.reason})" for r in records if r.status != "ok"]
    return "\n".join(map(printable, [*lines, "", *out, *([""] if out else []), *_limits(records)]))


def _limits(records: Sequence[Record]) -> list[str]:
    """What a scan waits for, warm and cold."""
    lines = []
    for r in records:
        if r.group == "scan" and r.ceiling_percent is not None:
            limit = f"{r.ceiling}" if r.ceiling_percent >= 75 else f"arithmetic and start, not {r.ceiling}"
            lines.append(f"{r.test}: {r.gbps:.2f} GB/s, {r.ceiling_percent:.0f} % of {r.ceiling}: limited by {limit}")
    return lines


def load(path: Path) -> dict[str, Any]:
    """A file that --submit-format wrote. Raises LlmfpError for anything else."""
    found = strict_json.read_object(path, _MAX_FILE_BYTES)
    if found.get("schema") != SCHEMA:
        raise LlmfpError(
            f"{path}: not a bench of schema {SCHEMA}", hint="make one with llmfp-fast bench --submit-format > FILE"
        )
    machine, rows = found.get("machine"), found.get("records")
    if not isinstance(machine, dict) or not isinstance(machine.get("cpu"), str) or not isinstance(rows, list):
        raise LlmfpError(f"{path}: machine or records are missing")
    for row in rows:
        well = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("group", "test", "device"))
        if not well or not isinstance(row.get("gbps"), int | float | None) or isinstance(row.get("gbps"), bool):
            raise LlmfpError(f"{path}: a record without group, test, device or gbps")
    return found


def comparison(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of two files, by test and kind of device: GB/s of each and their ratio, None where one has none."""

    def rates(bench: Mapping[str, Any]) -> dict[tuple[str, str, str], float | None]:
        return {
            (row["group"], row["test"], "cpu" if row["device"] == "cpu" else "gpu"): row["gbps"]
            for row in bench["records"]
        }

    first, second = rates(a), rates(b)
    rows = []
    for key in dict.fromkeys([*first, *second]):
        x, y = first.get(key), second.get(key)
        rows.append({"group": key[0], "test": key[1], "a_gbps": x, "b_gbps": y, "b_over_a": y / x if x and y else None})
    return rows


def comparison_table(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    lines = [f"A: {a['machine']['cpu']}", f"B: {b['machine']['cpu']}", "", "| | test | A GB/s | B GB/s | B / A |"]
    lines.append("|---|---|--:|--:|--:|")
    for row in comparison(a, b):
        cells = [("" if row[key] is None else f"{row[key]:.2f}") for key in ("a_gbps", "b_gbps", "b_over_a")]
        lines.append(f"| {row['group']} | {row['test']} | {' | '.join(cells)} |")
    return "\n".join(map(printable, lines))
