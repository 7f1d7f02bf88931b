"""Which specimens are compared, and what each pair is: kin by construction, strangers, or a control."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
"""A specimen as the manifest describes it."""


@dataclass(frozen=True, slots=True)
class Pair:
    """kind: kin (a is an independently initialised model, b comes from it), cousins (both do), control, or strangers.

    label  for kin and controls how b came about; for strangers what they have in common
    """

    kind: str
    label: str
    a: str
    b: str


def pairs(records: Mapping[str, Record], shapes: Mapping[str, tuple[Any, ...]]) -> list[Pair]:
    """Every pair that is looked at. shapes: (architecture, layers, hidden size, heads) by name."""
    roots = [name for name, record in records.items() if record["relation"] in ("base", "other seed")]
    return [
        *_kin(records),
        *_cousins(records),
        *_controls(records),
        *(Pair("strangers", _alike(shapes[a], shapes[b]), a, b) for a, b in itertools.combinations(roots, 2)),
        *_worked_on(records, roots, shapes),
    ]


def relation(name: str, records: Mapping[str, Record]) -> str:
    """How a specimen came from its root, step by step; of continued training only how far it went."""
    steps: list[str] = []
    while (record := records[name])["parents"]:
        step = record["relation"]
        if not (steps and step.startswith("continued") and steps[0].startswith("continued")):
            steps.insert(0, step)
        if len(record["parents"]) > 1:
            break
        name = record["parents"][0]
    return ", then ".join(steps)


def _kin(records: Mapping[str, Record]) -> Iterator[Pair]:
    for name, record in records.items():
        for root in record["roots"]:
            if root != name and root in records:
                yield Pair("kin", relation(name, records), root, name)


def _cousins(records: Mapping[str, Record]) -> Iterator[Pair]:
    """Trained children of one root that were not made of each other; kin of which both sides were quantised alike."""
    stored = [name for name, record in records.items() if record["stored"] != "bf16"]
    for a, b in itertools.combinations(stored, 2):
        if records[a]["stored"] == records[b]["stored"] and records[a]["roots"] == records[b]["roots"]:
            yield Pair("cousins", f"both sides {records[a]['relation']}", a, b)
    trained = [name for name, record in records.items() if record["parents"] and record["tokens"]]
    for a, b in itertools.combinations(trained, 2):
        chained = all(records[name]["relation"].startswith("continued") for name in (a, b))
        if records[a]["roots"] == records[b]["roots"] and not chained and a not in records[b]["parents"]:
            yield Pair("cousins", "trained children of one model", a, b)


def _controls(records: Mapping[str, Record]) -> Iterator[Pair]:
    """One initial seed and other data; one behaviour and other weights."""
    for name, record in records.items():
        if record["relation"] == "same seed, other data":
            other = next(n for n, r in records.items() if r["relation"] == "base" and r["seed"] == record["seed"])
            yield Pair("control", record["relation"], other, name)
        if record["relation"] == "distilled":
            yield Pair("control", "distilled", record["parents"][0], name)


def _worked_on(
    records: Mapping[str, Record], roots: list[str], shapes: Mapping[str, tuple[Any, ...]]
) -> Iterator[Pair]:
    """Descendants of unlike roots: what was done to both alike; and each with one root that is not its own."""
    descendants = [name for name, record in records.items() if record["parents"] and record["roots"] != [name]]
    for a, b in itertools.combinations(descendants, 2):
        done = relation(a, records)
        if done == relation(b, records) and shapes[a] == shapes[b] and not _related(records[a], records[b]):
            yield Pair("strangers", "worked on, both alike", a, b)
    for turn, name in enumerate(descendants):
        unlike = [
            each for each in roots if not _related(records[name], records[each]) and shapes[each][0] == shapes[name][0]
        ]
        if unlike:
            yield Pair("strangers", "worked on, one of them", unlike[turn % len(unlike)], name)


def _related(a: Record, b: Record) -> bool:
    return bool(set(a["roots"]) & set(b["roots"]))


def _alike(a: tuple[Any, ...], b: tuple[Any, ...]) -> str:
    """Of two shapes (architecture, layers, hidden size, heads)."""
    if a[0] != b[0]:
        return f"{' and '.join(sorted({a[0], b[0]}))}"
    if a == b:
        return f"{a[0]}, same shape"
    return f"{a[0]}, other depth" if a[2:] == b[2:] else f"{a[0]}, other width"
