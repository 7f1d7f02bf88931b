"""pytest-benchmark's JSON → a Markdown table with ratios, and bench/results/<suite>-<processor>.json.

    python -m bench.report FILE

Only what a comparison put together goes further: pytest-benchmark's own record of the machine (host name, user's paths)
is left behind.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import ceilings
from llmfp.hardware.machine import processor, versions

RESULTS = Path(__file__).parent / "results"
SCHEMA = "llmfp.bench/1"
LIBRARIES = (
    "numpy", "safetensors", "torch", "numkong", "runai-model-streamer", "fastsafetensors", "transformers",
    "bitsandbytes", "compressed-tensors", "gguf", "hqq", "mlx",
)  # fmt: skip
Json = dict[str, Any]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m bench.report FILE", file=sys.stderr)
        return 2
    report(Path(arguments[0]))
    return 0


def report(measured: Path, *, keep: bool = True) -> None:
    """Prints every comparison and what became of its claims; stores one file for each suite unless told not to."""
    suites: defaultdict[str, list[Json]] = defaultdict(list)
    for entry in json.loads(measured.read_text())["benchmarks"]:
        comparison = entry["extra_info"]["comparison"]
        suites[comparison["suite"]].append(comparison)
    machine = describe_machine()
    print(f"{machine['processor']}, {machine['cores']} cores, load {machine['load']} at the end\n")
    for comparisons in suites.values():
        for comparison in comparisons:
            print(table(comparison))
    print(claims(comparison for comparisons in suites.values() for comparison in comparisons))
    if keep:
        for suite, comparisons in suites.items():
            print(f"kept in {store(suite, comparisons, machine).relative_to(RESULTS.parent.parent)}")


def table(comparison: Json) -> str:
    """One comparison. `slower` is a variant's median time (per byte) as a multiple of the fastest row's."""
    rows = comparison["rows"]
    same_work = any(row["bytes"] is None for row in rows)
    peaks = any("peak_rss_bytes" in row for row in rows)
    per_byte = [row["median"] / (1 if same_work else row["bytes"]) for row in rows]
    lines = [
        f"### {comparison['title']}",
        f"{comparison['cache']}\n",
        "| variant | threads | MB | median s | min – max s | GB/s | slower |" + (" peak MiB |" if peaks else ""),
        "|---|--:|--:|--:|--:|--:|--:|" + ("--:|" if peaks else ""),
    ]
    for row, cost in zip(rows, per_byte, strict=True):
        cells = (
            row["variant"],
            _or_blank(row["threads"], "{}"),
            _or_blank(row["bytes"] and row["bytes"] / 1e6, "{:.0f}"),
            f"{row['median']:.4f}",
            f"{row['min']:.4f} – {row['max']:.4f}",
            _or_blank(row.get("gbps"), "{:.2f}"),
            f"{cost / min(per_byte):.2f}×",
            *([f"{row['peak_rss_bytes'] / 2**20:.0f}" if "peak_rss_bytes" in row else ""] if peaks else []),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\nleft out: {name} ({reason})" for name, reason in comparison["left_out"].items()]
    return "\n".join(lines) + "\n"


def claims(comparisons: Iterable[Json]) -> str:
    """Every target: the median over rounds of the ratio within a round, its extremes, and whether it holds."""
    lines = ["### targets\n", "| target | measured | min – max | |", "|---|--:|--:|---|"]
    for comparison in comparisons:
        for claim in comparison["claims"]:
            off = claim["median"] / claim["wanted"] - 1
            verdict = "met" if claim["met"] else f"missed by {abs(off):.0%}"
            spread = f"{claim['min']:.2f} – {claim['max']:.2f}"
            lines.append(f"| {claim['claim']} | {claim['median']:.2f} | {spread} | {verdict} |")
    return "\n".join(lines) + "\n"


def store(suite: str, comparisons: list[Json], machine: Json) -> Path:
    path = RESULTS / f"{suite}-{machine['slug']}.json"
    RESULTS.mkdir(exist_ok=True)
    record = {
        "schema": SCHEMA,
        "suite": suite,
        "machine": machine,
        "versions": {**versions(LIBRARIES), "commit": _commit()},
        "comparisons": comparisons,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def describe_machine() -> Json:
    """What the numbers depend on, and nothing that says whose machine it is."""
    name = processor()
    cores = ceilings.cores()
    return {
        "processor": name,
        "cores": cores,
        "slug": f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{cores}c",
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": ".".join(platform.release().split("-")[0].split(".")[:2]),
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    return done.stdout.strip() or "unknown"


def _or_blank(value: object, form: str) -> str:
    return form.format(value) if value else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
