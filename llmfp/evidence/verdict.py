"""What may be concluded from the tests that were valid: related, none detected, or inconclusive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


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
    p_value   the smallest p of the tests that counted, corrected for their number; None when none counted
    basis     of the test with that p
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
    rejected = []
    for n, test in enumerate(tests):
        if test.p_value > alpha / (len(tests) - n):
            break
        rejected.append(test.name)
    corrected = min(1.0, len(tests) * tests[0].p_value)
    if rejected:
        return Verdict("related", corrected, tests[0].basis, tuple(rejected), left_out)
    deciding = [test for test in tests if test.decides]
    if not deciding:
        return Verdict("inconclusive", None, None, (), left_out)
    return Verdict("none_detected", corrected, deciding[0].basis, tuple(test.name for test in deciding), left_out)


def same_weights(verdict: Verdict) -> Verdict:
    """The verdict on two fingerprints of the same weights, to the bit: no test is needed, and none can overrule it."""
    return replace(verdict, word="related", basis="exact", rests_on=("digest", *verdict.rests_on))
