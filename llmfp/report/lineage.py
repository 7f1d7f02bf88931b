"""The lineage graph of an atlas: families, and where each of their models stands in a drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]

_ACROSS, _DOWN, _MARGIN = 230, 24, 14


@dataclass(frozen=True, slots=True)
class Family:
    """Models that edges hold together.

    places  by the model's number its x and y; those that are declared to descend from another stand right of it
    edges   as in the atlas, of this family
    """

    places: Mapping[int, tuple[int, int]]
    edges: tuple[Json, ...]
    width: int
    height: int


def lineage(found: Json) -> list[Family]:
    """The families of an atlas's JSON, the largest first; models without an edge have none."""
    neighbours: dict[int, set[int]] = {}
    children: dict[int, set[int]] = {}
    parents: dict[int, set[int]] = {}
    for edge in found["edges"]:
        a, b = edge["a"], edge["b"]
        neighbours.setdefault(a, set()).add(b)
        neighbours.setdefault(b, set()).add(a)
        if edge["declared"] is not None:
            base, child = (a, b) if edge["declared"] == "a" else (b, a)
            children.setdefault(base, set()).add(child)
            parents.setdefault(child, set()).add(base)
    families, seen = [], set[int]()
    for start in sorted(neighbours):
        if start in seen:
            continue
        members = _reached(start, neighbours)
        seen |= members
        families.append(_drawn(members, children, parents, [e for e in found["edges"] if e["a"] in members]))
    return sorted(families, key=lambda family: -len(family.places))


def _reached(start: int, neighbours: Mapping[int, set[int]]) -> set[int]:
    members, waiting = {start}, [start]
    while waiting:
        new = neighbours[waiting.pop()] - members
        members |= new
        waiting += new
    return members


def _drawn(
    members: set[int], children: Mapping[int, set[int]], parents: Mapping[int, set[int]], edges: list[Json]
) -> Family:
    """Depth first from those without a declared base, a line each; cards may contradict each other in circles."""
    depth: dict[int, int] = {}
    roots = sorted(member for member in members if not parents.get(member)) or sorted(members)
    for root in (*roots, *sorted(members)):
        waiting = [(root, 0)]
        while waiting:
            member, at = waiting.pop()
            if member in depth:
                continue
            depth[member] = at
            waiting += [(child, at + 1) for child in sorted(children.get(member, ()), reverse=True)]
    places = {
        member: (_MARGIN + _ACROSS * at, _MARGIN + _DOWN * line) for line, (member, at) in enumerate(depth.items())
    }
    across = max(x for x, _ in places.values()) + _ACROSS
    return Family(places, tuple(edges), across, _MARGIN + _DOWN * len(places))
