"""The page that `compare` prints: the verdict in words, what it rests on, every score, what nothing here can see."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from llmfp.architecture.specs import ROLES
from llmfp.evidence.comparison import Comparison, Side
from llmfp.evidence.null import Place
from llmfp.report import printable, words
from llmfp.report.terminal import sparkline

_WIDTH = 80
_COLUMNS = ("q", "k", "v", "o", "mean")


def comparison_page(found: Comparison) -> str:
    """All of a comparison for a terminal of 80 columns."""
    lines = [*_wrapped(words.verdict(found.to_json())), "", *_side("A", found.a), *_side("B", found.b), ""]
    lines += [*_tests(found), ""]
    lines += [*_curves(found), *_scores(found), ""]
    for missed in found.missed:
        lines += _wrapped(missed, "would have escaped: ")
    for caveat in found.caveats:
        lines += _wrapped(caveat, "caveat: ")
    return "\n".join(lines).rstrip()


def _side(letter: str, side: Side) -> list[str]:
    shape = f"{side.architecture}, {side.tower} of {side.layers} layers, hidden {side.hidden_size}"
    return _wrapped(f"{side.name}: {shape}", f"{letter}  ")


def _tests(found: Comparison) -> Iterator[str]:
    if found.residual is not None:
        r = found.residual
        yield from _wrapped(
            f"z = {r.z:+.1f}, p = {words.p(r.p_value)} by {r.permutations:,} permutations within blocks of {r.block} "
            f"among {r.dims} coordinates, {r.rows} profiles in {r.layers} layers",
            f"{words.TITLES['residual']:<18} ",
        )
    if found.heads is not None:
        h = found.heads
        yield from _wrapped(
            f"z = {h.z:+.1f}, p = {words.p(h.p_value)} by {h.permutations:,} permutations of {h.heads} heads in "
            f"{h.kv_heads} groups, {h.layers} layers; of {', '.join(h.blocks)}",
            f"{words.TITLES['heads']:<18} ",
        )
    if found.coherence is not None:
        c = found.coherence
        strangers = f"{c.nulls} strangers of its kind" if c.nulls else "the laboratory's strangers"
        yield from _wrapped(
            f"r = {c.score:+.2f}, z = {c.z:+.1f} over {len(c.layer_map)} aligned layers, {c.excess:+.1f} sd above "
            f"chance; p = {words.p(c.p_value)} among {strangers} ({c.basis})",
            f"{words.TITLES['coherence']:<18} ",
        )
        yield from _wrapped(words.ranges(c.layer_map), f"{'  layers':<18} ")
    for name, reason in found.lost.items():
        yield from _wrapped(
            f"{'does not count: ' if _has(found, name) else 'not made: '}{reason}", f"{words.TITLES[name]:<18} "
        )


def _has(found: Comparison, name: str) -> bool:
    made = {"residual": found.residual, "heads": found.heads, "coherence": found.coherence, "profile": found.null}
    return made[name] is not None


def _curves(found: Comparison) -> Iterator[str]:
    """σ over layers of both models, each role from its lowest to its highest."""
    for role in map(str, ROLES):
        for letter, side in (("A", found.a), ("B", found.b)):
            if any(std is not None for std in side.std[role]):
                yield f"{f'σ {role.upper()} of {letter}':<18} {sparkline(side.std[role], _WIDTH - 19)}"
    yield ""


def _scores(found: Comparison) -> Iterator[str]:
    profile, null = found.profile, found.null
    yield f"{'profile of σ':<24}" + "".join(
        f"{column.upper() if len(column) == 1 else column:>9}" for column in _COLUMNS
    )
    rows = (
        ("Pearson", profile.pearson),
        ("  without cubic trend", profile.detrended),
        ("Wasserstein-1", profile.wasserstein),
        ("Kullback-Leibler", profile.kl),
    )
    for title, scores in rows:
        yield f"{title:<24}" + "".join(_cell(scores[column]) for column in _COLUMNS)
        if scores is profile.pearson and null is not None:
            yield f"{'  above so many strangers':<24}" + "".join(_rank(null, column) for column in _COLUMNS)
    if null is not None:
        yield from _wrapped(
            f"Strangers: one model per family, of every kind. Of its own kind, {null.kind}, the mean is "
            f"above {round(null.n * null.percentile / 100)} of {null.n}; p = {words.p(null.p_value)}, which cannot "
            f"fall below {words.p(null.smallest_p)}."
        )
    for what, reason in profile.reasons.items():
        yield from _wrapped(reason, f"  {what.upper() if len(what) == 1 else what}: ")


def _cell(score: float | None) -> str:
    return f"{'-':>9}" if score is None else f"{score:>9.3f}"


def _rank(null: Place, column: str) -> str:
    if column not in null.everywhere:
        return f"{'-':>9}"
    below, n = null.everywhere[column]
    return f"{f'{below}/{n}':>9}"


def _wrapped(text: str, head: str = "") -> list[str]:
    return textwrap.wrap(
        printable(text), _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False
    )
