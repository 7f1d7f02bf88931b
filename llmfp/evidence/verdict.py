"""What may be concluded from the tests that were valid: related, none detected, or inconclusive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

BASES = ("exact", "conformal", "approximate")
"""What a p-value rests on, strongest first."""


@dataclass(frozen=True, slots=True)
class Missing:
    """Why there is no number."""

    reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """A valid test: its p, the least that p could have been, and its basis: exact, conformal or approximate.

    decides  whether a p above the level says anything: that a relation it could have seen was not seen
    """

    name: str
    basis: str
    p_value: float
    smallest_p: float
    decides: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be concluded at the chosen level.

    word      related, none_detected or inconclusive
    p_value   Holm's adjusted p of the test that the verdict rests on first: of those that rejected one of the strongest
              basis, of those that did not the smallest; None when none counted
    basis     of that test
    rests_on  the tests that rejected; where none did, those that say so; "digest" where the weights are the same
    left_out  valid tests that did not count, and why
    """

    word: str
    p_value: float | None
    basis: str | None
    rests_on: tuple[str, ...]
    left_out: dict[str, str]


def decide(outcomes: Sequence[Outcome], alpha: float) -> Verdict:
    """The verdict at level `alpha`, by Holm's correction over the tests that could have rejected.

    A test whose smallest attainable p exceeds alpha over the number of tests can never reject first and would only cost
    the others power. It is left out before any p is looked at; of the possible selections the largest is taken.
    Source: Holm 1979; Tarone 1990 for leaving out. Checked against the definition by closed testing.
    """
    ordered = sorted(outcomes, key=lambda outcome: outcome.smallest_p)
    counted = max((m for m in range(1, len(ordered) + 1) if ordered[m - 1].smallest_p <= alpha / m), default=0)
    left_out = {
        outcome.name: f"its smallest attainable p, {outcome.smallest_p:.2g}, is above {alpha / (counted + 1):.2g}"
        for outcome in ordered[counted:]
    }
    tests = sorted(ordered[:counted], key=lambda outcome: outcome.p_value)
    if not tests:
        return Verdict("inconclusive", None, None, (), left_out)
    adjusted: list[float] = []
    for n, test in enumerate(tests):
        adjusted.append(min(1.0, max((len(tests) - n) * test.p_value, *adjusted[-1:], 0.0)))
    rejected = [n for n, p in enumerate(adjusted) if p <= alpha]
    if rejected:
        best = min(rejected, key=lambda n: (BASES.index(tests[n].basis), n))
        return Verdict("related", adjusted[best], tests[best].basis, tuple(tests[n].name for n in rejected), left_out)
    deciding = [n for n, test in enumerate(tests) if test.decides]
    if not deciding:
        return Verdict("inconclusive", None, None, (), left_out)
    rests_on = tuple(tests[n].name for n in deciding)
    return Verdict("none_detected", adjusted[deciding[0]], tests[deciding[0]].basis, rests_on, left_out)


def same_weights(verdict: Verdict) -> Verdict:
    """The verdict on two fingerprints of the same weights, to the bit: no test is needed, and none can overrule it."""
    return replace(verdict, word="related", basis="exact", rests_on=("digest", *verdict.rests_on))
