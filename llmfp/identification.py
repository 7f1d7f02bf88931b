"""Whose relative is this? A model against a registry: ranked, tested with the number of tests in mind, and held against
what its model card declares.

Ranking looks at every row: by the published score of σ profiles and, where both were scanned deep, by rotary
coherence. Neither changes when residual coordinates or heads are relabelled, so the exact tests on these labels
(evidence.residual, evidence.heads) are as valid on the candidates that ranking picked as on any others. They are made
of the nearest and of the declared bases, and Holm's correction over all of them keeps the chance of one false "related"
at alpha. Coherence was picked by, and so pays for every row that was searched. Profiles inform and decide nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llmfp.engine import Progress
from llmfp.errors import LlmfpError
from llmfp.fingerprint import Fingerprint, kind, main_tower
from llmfp.model_card import UNDECLARED, Declaration

if TYPE_CHECKING:
    import pyarrow as pa

    from llmfp.evidence.comparison import Comparison
    from llmfp.registry import Registry

SCHEMA = "llmfp.identification/1"
_COLUMNS = (
    "repo", "revision", "entry", "digest", "kind", "hidden_size", "head_dim", "rotary_pairs", "base_models", "added",
    "std_q", "std_k", "std_v", "std_o",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row of the registry that was looked at closely.

    verdict   related, none_detected or inconclusive, at the level of the whole search
    p_value   the smallest, corrected for the search; None where no test could be made that decides,
    reason    for which this is why
    rank      1 for the nearest of all rows; declared bases have theirs, however far
    declared  named as a base by the source's card; explained: the cards of both lead to a common base
    evidence  the pair alone, as `compare` gives it, whose own verdict knows nothing of a search
    """

    repo: str
    revision: str
    rank: int
    verdict: str
    p_value: float | None
    basis: str | None
    reason: str | None
    declared: bool
    explained: bool
    evidence: Comparison


@dataclass(frozen=True, slots=True)
class Finding:
    """What a card says, held against the weights.

    status  confirmed     declared, and related
            contradicted  declared, not detected though the test had power, and another model's relative instead
            undetected    declared, not detected though the test had power
            untested      declared, and no test that decides could be made
            unknown       declared, and not in the registry
            undeclared    related, and no card says so
    """

    status: str
    repo: str
    reason: str


@dataclass(frozen=True, slots=True)
class Identification:
    """What was found for `name`. rows: fingerprints searched; tests: of candidates, for all of which p is corrected."""

    name: str
    registry: str
    alpha: float
    rows: int
    tests: int
    relation: str | None
    candidates: tuple[Candidate, ...]
    findings: tuple[Finding, ...]
    caveats: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object that `identify --json` prints."""
        plain = {
            "name": self.name, "registry": self.registry, "alpha": self.alpha, "rows": self.rows, "tests": self.tests,
            "base_model_relation": self.relation,
        }  # fmt: skip
        keys = ("repo", "revision", "rank", "verdict", "p_value", "basis", "reason", "declared", "explained")
        candidates = [
            {**{key: getattr(each, key) for key in keys}, "evidence": each.evidence.to_json()}
            for each in self.candidates
        ]
        findings = [asdict(each) for each in self.findings]
        return {
            "schema": SCHEMA, **plain, "candidates": candidates, "findings": findings, "caveats": list(self.caveats),
        }  # fmt: skip


def identify(
    source: str | os.PathLike[str] | Fingerprint,
    registry: str | os.PathLike[str] | Registry,
    *,
    top: int = 10,
    alpha: float = 1e-3,
    permutations: int = 100_000,
    seed: int = 0,
    deep: bool = True,
    progress: Progress | None = None,
    **reading: Any,
) -> Identification:
    """The nearest relatives of a source, or a fingerprint, among a registry's, and what its card has to say to that.

    top           so many of the nearest are tested
    alpha         chance of calling any unrelated model related, over the whole search
    permutations  drawn for each test; no p is below 1 / (1 + permutations), so that Holm needs alpha / tests above it
    deep          as in `llmfp.scan`: without, coherence neither ranks nor tests
    progress      of reading the source, as in `llmfp.scan`
    reading       what `llmfp.scan` takes beside the source: threads, memory_bytes, …

    Raises LlmfpError, one line.
    """
    from llmfp.evidence import comparison
    from llmfp.evidence import null as nulls
    from llmfp.registry import Registry

    if top < 1:
        raise LlmfpError(f"the {top} nearest are none")
    kept = registry if isinstance(registry, Registry) else Registry.open(registry)
    subject, name, revision, declared = _subject(source, kept, {**reading, "deep": deep}, progress)
    table = kept.table(_COLUMNS if subject.main.circuits is None else (*_COLUMNS, "coherence"))
    own = _row_of(table, name, revision)
    declared = _declared_in(table, own) if declared == UNDECLARED else declared
    order = _ranked(subject, table, own)
    sizes = table["hidden_size"].to_numpy()
    testable = [row for row in order if sizes[row] == subject.main.hidden_size]
    wanted = _declared_rows(declared, table, own)
    chosen = sorted({*order[:top], *testable[:top], *wanted.values()}, key=_position(order))
    ranks = {row: rank for rank, row in enumerate(order, 1)}
    models = nulls.load()
    pairs = {}
    for row in chosen:
        other = kept.load(_facts(table, row))
        pairs[row] = comparison.compare(subject, other, alpha=alpha, permutations=permutations, null=models, seed=seed)
    judged, tests = _judged(pairs, alpha, len(order))
    explained = _explained(name, declared, table)
    candidates = tuple(
        Candidate(
            repo=facts["repo"],
            revision=facts["revision"],
            rank=ranks.get(row, len(order) + 1),
            verdict=judged[row].verdict,
            p_value=judged[row].p_value,
            basis=judged[row].basis,
            reason=judged[row].reason,
            declared=row in wanted.values(),
            explained=facts["repo"].casefold() in explained,
            evidence=pairs[row],
        )
        for row in chosen
        for facts in [_facts(table, row)]
    )
    return Identification(
        name=name,
        registry=kept.where,
        alpha=alpha,
        rows=len(order),
        tests=tests,
        relation=declared.relation,
        candidates=candidates,
        findings=tuple(_findings(declared, wanted, dict(zip(chosen, candidates, strict=True)))),
        caveats=_caveats(table.num_rows - (own is not None) - len(order), subject),
    )


def _subject(
    source: str | os.PathLike[str] | Fingerprint,
    kept: Registry,
    reading: Mapping[str, Any],
    progress: Progress | None,
) -> tuple[Fingerprint, str, str, Declaration]:
    """The fingerprint to identify, by what name and revision it would be kept, and what its card declares."""
    if isinstance(source, Fingerprint):
        name, revision = source.source["name"], source.source.get("revision") or f"digest:{source.digest}"
        return source, name, revision, UNDECLARED
    from llmfp.sources import ask, fingerprinted, known

    found = ask(known(os.fspath(source)))
    if found.revision is not None:
        table = kept.table(["repo", "revision", "entry"])
        own = _row_of(table, found.repo, found.revision)
        if own is not None:
            return kept.load(_facts(table, own)), found.repo, found.revision, found.declared
    fingerprint, origin = fingerprinted(found, reading, progress)
    return fingerprint, origin.repo, origin.revision, found.declared


def _ranked(subject: Fingerprint, table: pa.Table, own: int | None) -> list[int]:
    """Rows of the same kind, nearest first: equal weights, then those near by coherence and by profile in turns.

    A row's place is the better of its places in both orders; without coherence it has its place by profile alone.
    """
    import numpy as np

    from llmfp.registry import nearest

    same = table["digest"].to_numpy(zero_copy_only=False) == subject.digest
    alike = table["kind"].to_numpy(zero_copy_only=False) == kind(subject, main_tower(subject.towers))
    if own is not None:
        alike[own] = False
    rows = np.flatnonzero(alike)
    places = []
    nowhere = np.full(table.num_rows, np.nan)
    by_coherence = nearest.coherence(subject.main, table) if "coherence" in table.column_names else nowhere
    for scores in (by_coherence, nearest.pearson(subject.std, table)):
        score = scores[rows]
        place = np.empty(len(rows))
        place[np.argsort(-np.nan_to_num(score, nan=-2.0), kind="stable")] = np.arange(len(rows))
        places.append(np.where(np.isnan(score), len(rows), place))
    coherence, profile = places
    order = np.lexsort((profile, coherence > profile, np.minimum(coherence, profile), ~same[rows]))
    ranked: list[int] = rows[order].tolist()
    return ranked


@dataclass(frozen=True, slots=True)
class _Judged:
    verdict: str
    p_value: float | None
    basis: str | None
    reason: str | None


def _judged(pairs: Mapping[int, Comparison], alpha: float, rows: int) -> tuple[dict[int, _Judged], int]:
    """What follows for each row, in the order of rank, and how many tests were made.

    Exact tests, on labels of residual coordinates and of heads, which no ranking looked at: Holm over all of them.
    Coherence, which ranking did look at: Bonferroni over all rows. Where there are both, each has half of alpha, and
    every p here is doubled. Sources: Holm 1979; Tarone 1990 for leaving out exact tests that could never reject.
    """
    from llmfp.evidence.verdict import Outcome, decide

    outcomes = [
        Outcome(f"{row} {name}", "exact", test.p_value, test.smallest_p)
        for row, pair in pairs.items()
        for name, test in (("residual", pair.residual), ("heads", pair.heads))
        if test is not None
    ]
    coherent = {row: pair.coherence for row, pair in pairs.items() if pair.coherence is not None}
    share = 2 if outcomes and coherent else 1
    decision = decide(outcomes, alpha / share)
    counted = sorted((each for each in outcomes if each.name not in decision.left_out), key=lambda each: each.p_value)
    found: dict[int, list[tuple[float, str]]] = {row: [] for row in pairs}
    decides = {int(each.name.split()[0]) for each in counted} | {row for row, test in coherent.items() if test.decides}
    largest = 0.0
    for n, each in enumerate(counted):
        largest = max(largest, min(1.0, share * (len(counted) - n) * each.p_value))
        found[int(each.name.split()[0])].append((largest, "exact"))
    for row, test in coherent.items():
        if test.counts:
            found[row].append((min(1.0, share * rows * test.p_value), test.basis))
    judged = {}
    for row, pair in pairs.items():
        p_value, basis = min(found[row], default=(None, None))
        if "digest" in pair.decision.rests_on:
            judged[row] = _Judged("related", p_value, "exact", None)
        elif p_value is not None and (p_value <= alpha or row in decides):
            judged[row] = _Judged("related" if p_value <= alpha else "none_detected", p_value, basis, None)
        else:
            reason = decision.left_out.get(f"{row} residual") or pair.lost.get("residual")
            judged[row] = _Judged("inconclusive", None, None, reason)
    return judged, len(counted) + len(coherent)


def _findings(declared: Declaration, wanted: Mapping[str, int], candidates: Mapping[int, Candidate]) -> list[Finding]:
    """The card against the weights, declared bases first."""
    surprises = [each for each in candidates.values() if each.verdict == "related" and not each.explained]
    findings = []
    for base in declared.base_models:
        candidate = candidates[wanted[base]] if base in wanted else None
        if candidate is None:
            finding = Finding("unknown", base, "the registry holds no fingerprint of it")
        elif candidate.verdict == "related":
            finding = Finding("confirmed", base, _shown(candidate))
        elif candidate.verdict == "inconclusive":
            finding = Finding("untested", base, candidate.reason or "no test decides")
        elif surprises:
            instead = f"{surprises[0].repo} is related instead"
            finding = Finding("contradicted", base, f"not detected, {_shown(candidate)}; {instead}")
        else:
            finding = Finding("undetected", base, _shown(candidate))
        findings.append(finding)
    return findings + [Finding("undeclared", each.repo, _shown(each)) for each in surprises]


def _shown(candidate: Candidate) -> str:
    same = "digest" in candidate.evidence.decision.rests_on
    evidence = "the same weights" if same else f"p = {candidate.p_value:.2g}"
    return f"{evidence}, rank {candidate.rank}"


def _declared_rows(declared: Declaration, table: pa.Table, own: int | None) -> dict[str, int]:
    """The row of every declared base that the registry holds; of several revisions the last that was added."""
    wanted = {base.casefold(): base for base in declared.base_models}
    found: dict[str, int] = {}
    if not wanted:
        return found
    for row, repo in enumerate(table["repo"].to_pylist()):
        base = wanted.get(repo.casefold())
        if base is None or row == own:
            continue
        if base not in found or table["added"][row].as_py() > table["added"][found[base]].as_py():
            found[base] = row
    return found


def _explained(name: str, declared: Declaration, table: pa.Table) -> set[str]:
    """All repos that cards tie to the source, by whatever many steps; a repo's other revisions among them."""
    edges: dict[str, set[str]] = {}
    declarations = [(name, list(declared.base_models))]
    listed = table.select(["repo", "base_models"])
    declarations += [(row["repo"], row["base_models"]) for row in listed.to_pylist() if row["base_models"]]
    for repo, bases in declarations:
        for base in bases:
            edges.setdefault(repo.casefold(), set()).add(base.casefold())
            edges.setdefault(base.casefold(), set()).add(repo.casefold())
    reached, todo = {name.casefold()}, [name.casefold()]
    while todo:
        new = edges.get(todo.pop(), set()) - reached
        reached |= new
        todo += new
    return reached


def _row_of(table: pa.Table, repo: str, revision: str | None) -> int | None:
    from llmfp.registry.index import arrow

    pc = arrow().compute
    both = pc.and_(pc.equal(table["repo"], repo), pc.equal(table["revision"], revision))
    row: int = pc.index(both, True).as_py()
    return None if row < 0 else row


def _declared_in(table: pa.Table, row: int | None) -> Declaration:
    return UNDECLARED if row is None else Declaration(tuple(table["base_models"][row].as_py()))


def _facts(table: pa.Table, row: int) -> dict[str, str]:
    return {name: table[name][row].as_py() for name in ("repo", "revision", "entry")}


def _position(order: Sequence[int]) -> Any:
    places = {row: place for place, row in enumerate(order)}
    return lambda row: places.get(row, len(places))


def _caveats(passed_over: int, subject: Fingerprint) -> tuple[str, ...]:
    caveats = ["which of two models came first is not shown, nor is a relation that training or a rewrite has hidden"]
    if passed_over:
        caveats.append(f"{passed_over} fingerprints of other kinds of towers were passed over")
    return (*caveats, *subject.caveats)
