"""The family atlas: every model of a registry beside every other, and which of them share ancestry.

Similarity is the published score of all pairs; the tree over it is average linkage. Neither says that two models are
related. Edges do: those that model cards declare, and those that tests detect. Tested are the pairs that cards declare
and, of every model, the nearest by that score and those with the same digest: all of equal width. Only the exact tests
count (residual and head symmetry, Holm over both, at alpha a pair), whose labels the score does not look at, so that
they stay valid for pairs picked by it. Of the pairs tested, alpha times their number may be false: the atlas says so.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmfp import __version__
from llmfp.registry import nearest
from llmfp.registry.index import ROLES

if TYPE_CHECKING:
    import pyarrow as pa

    from llmfp.registry import Registry

SCHEMA = "llmfp.atlas/1"
UNKNOWN = 255
"""The code of a similarity that is not known; others are the score from -1 to 1 in steps of 1/127, from 0."""
_SHOWN = ("repo", "revision", "architecture", "kind", "layers", "hidden_size", "heads", "kv_heads", "digest")
_COLUMNS = (*_SHOWN, "entry", "base_models", "base_model_relation", *(f"std_{role}" for role in ROLES))

Floats = NDArray[np.float64]
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Merge:
    """A node of the tree: numbers of what it joins (models, then earlier merges), at which distance, 1 - score."""

    left: int
    right: int
    height: float


def atlas(
    registry: Registry,
    *,
    alpha: float = 1e-3,
    permutations: int = 100_000,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The object that `atlas --json` prints.

    alpha     level of each pair
    progress  called with (pairs tested, pairs in all)
    """
    table = registry.table(_COLUMNS)
    similar = similarity(table)
    declared = _declared(table)
    pairs = sorted({*declared, *_nearest(table, similar)})
    tested: dict[Pair, dict[str, Any]] = {}
    for n, pair in enumerate(pairs, 1):
        tested[pair] = _tested(registry, table, pair, alpha, permutations)
        if progress is not None:
            progress(n, len(pairs))
    edges = [
        {"a": a, "b": b, "declared": declared.get((a, b)), **tested[a, b]}
        for a, b in pairs
        if (a, b) in declared or tested[a, b]["detected"]
    ]
    return described(table, similar, edges, alpha=alpha, permutations=permutations, tested=len(pairs))


def described(
    table: pa.Table, similar: Floats, edges: list[dict[str, Any]], *, alpha: float, permutations: int, tested: int
) -> dict[str, Any]:
    """The JSON object of what was found."""
    merges = average_linkage(similar)
    codes = np.where(np.isnan(similar), UNKNOWN, np.round((np.clip(similar, -1, 1) + 1) * 127)).astype(np.uint8)
    upper = codes[np.triu_indices(len(codes), 1)]
    beside = np.nan_to_num(similar, nan=-2.0) - 4 * np.eye(len(similar))
    best = beside.argmax(axis=1) if len(similar) > 1 else np.zeros(len(similar), np.intp)
    rows = table.select([*_SHOWN, "base_models", "base_model_relation"]).to_pylist()
    models = [
        {**row, "nearest": None if beside[i, best[i]] < -1 else [int(best[i]), float(beside[i, best[i]])]}
        for i, row in enumerate(rows)
    ]
    return {
        "schema": SCHEMA,
        "alpha": alpha,
        "permutations": permutations,
        "pairs_tested": tested,
        "versions": {"llmfp": __version__},
        "models": models,
        "edges": edges,
        "order": leaves(merges, len(models)),
        "merges": [[merge.left, merge.right, round(merge.height, 4)] for merge in merges],
        "similarity": base64.b64encode(upper.tobytes()).decode(),
    }


def similarity(table: pa.Table) -> Floats:
    """float64 [n, n], symmetric: mean Pearson of σ curves; NaN where two models have none."""
    n = table.num_rows
    columns = {role: table[f"std_{role}"].to_pylist() for role in ROLES}
    scores = np.full((n, n), np.nan)
    for row in range(n):
        scores[row] = nearest.pearson({role: columns[role][row] for role in ROLES}, table)
    both: Floats = (scores + scores.T) / 2
    return both


def average_linkage(similar: Floats) -> list[Merge]:
    """The tree of average linkage over 1 - score, an unknown score for 0; merges by height.

    Nearest-neighbour chain, O(n²): Müllner 2011, arXiv 1109.2378, algorithm 3. Checked against the definition.
    """
    n = len(similar)
    distance = 1 - np.nan_to_num(similar, nan=0.0)
    np.fill_diagonal(distance, np.inf)
    size, alive = np.ones(n), np.ones(n, np.bool_)
    found: list[tuple[int, int, float]] = []
    chain: list[int] = []
    while len(found) < n - 1:
        if not chain:
            chain = [int(np.flatnonzero(alive)[0])]
        here = chain[-1]
        near = np.where(alive, distance[here], np.inf)
        there = int(near.argmin())
        if len(chain) > 1 and near[chain[-2]] <= near[there]:
            there = chain[-2]
            del chain[-2:]
            found.append((there, here, float(near[there])))
            merged = (size[here] * distance[here] + size[there] * distance[there]) / (size[here] + size[there])
            merged[here] = merged[there] = np.inf
            distance[there], distance[:, there] = merged, merged
            size[there] += size[here]
            alive[here] = False
        else:
            chain.append(there)
    return _numbered(found, n)


def _numbered(found: list[tuple[int, int, float]], n: int) -> list[Merge]:
    """Merges in the order of their heights, each naming what stood for its two members by then."""
    stands = list(range(2 * n))

    def root(node: int) -> int:
        while stands[node] != node:
            stands[node] = stands[stands[node]]
            node = stands[node]
        return node

    merges = []
    for number, (a, b, height) in enumerate(sorted(found, key=lambda each: each[2]), n):
        left, right = root(a), root(b)
        stands[left] = stands[right] = number
        merges.append(Merge(left, right, height))
    return merges


def leaves(merges: list[Merge], n: int) -> list[int]:
    """Models in the order in which the tree's lines do not cross."""
    order: list[int] = []
    stack = [n + len(merges) - 1] if n else []
    while stack:
        node = stack.pop()
        if node < n:
            order.append(node)
        else:
            stack += [merges[node - n].right, merges[node - n].left]
    return order


def _declared(table: pa.Table) -> dict[Pair, str]:
    """Pairs of which one's card names the other: which of both is the base, "a" or "b"."""
    repos: dict[str, list[int]] = {}
    for row, repo in enumerate(table["repo"].to_pylist()):
        repos.setdefault(repo.casefold(), []).append(row)
    found: dict[Pair, str] = {}
    for row, bases in enumerate(table["base_models"].to_pylist()):
        for base in bases or ():
            for other in repos.get(base.casefold(), ()):
                if other != row:
                    found[min(row, other), max(row, other)] = "a" if other < row else "b"
    return found


def _nearest(table: pa.Table, similar: Floats) -> set[Pair]:
    """Of every model the nearest of its width and kind, and whoever has the same digest."""
    widths, kinds = table["hidden_size"].to_numpy(), table["kind"].to_numpy(zero_copy_only=False)
    digests = table["digest"].to_numpy(zero_copy_only=False)
    found: set[Pair] = set()
    for row in range(table.num_rows):
        alike = (widths == widths[row]) & (kinds == kinds[row])
        alike[row] = False
        scores = np.where(alike, np.nan_to_num(similar[row], nan=-2.0), -3.0)
        others = [int(scores.argmax())] if alike.any() else []
        others += np.flatnonzero(alike & (digests == digests[row])).tolist()[:1]
        found |= {(min(row, other), max(row, other)) for other in others}
    return found


def _tested(registry: Registry, table: pa.Table, pair: Pair, alpha: float, permutations: int) -> dict[str, Any]:
    """Whether the exact tests detect a relation, p, and why there is none."""
    from llmfp.evidence import comparison
    from llmfp.evidence.verdict import Outcome, decide

    facts: list[Mapping[str, Any]] = [
        {key: table[key][row].as_py() for key in ("repo", "revision", "entry")} for row in pair
    ]
    found = comparison.compare(*map(registry.load, facts), alpha=alpha, permutations=permutations, null=())
    tests = [("residual", found.residual), ("heads", found.heads)]
    exact = [Outcome(name, "exact", test.p_value, test.smallest_p) for name, test in tests if test is not None]
    decision = decide(exact, alpha)
    same = "digest" in found.decision.rests_on
    return {
        "detected": same or decision.word == "related",
        "same": same,
        "p_value": decision.p_value,
        "reason": None if decision.p_value is not None else found.lost.get("residual"),
    }
