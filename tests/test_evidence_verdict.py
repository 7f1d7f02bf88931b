"""The verdict against closed testing by brute force, over every choice of tests that could reject."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfp.evidence.verdict import Outcome, Verdict, decide, same_weights

ALPHA = 1e-3


def outcome(name: str, p: float, *, smallest: float = 0.0, basis: str = "exact", decides: bool = True) -> Outcome:
    return Outcome(name, basis, p, smallest, decides)


def selection(outcomes: list[Outcome], alpha: float) -> list[Outcome]:
    """The largest set of tests of which each could be the first to reject, by trying all of them.

    Among sets of one size, that of the smallest attainable p, the first listed among equals.
    """
    for size in range(len(outcomes), 0, -1):
        able = [
            chosen
            for chosen in itertools.combinations(outcomes, size)
            if all(each.smallest_p <= alpha / size for each in chosen)
        ]
        if able:
            return list(min(able, key=lambda chosen: sorted(each.smallest_p for each in chosen)))
    return []


def closed(outcomes: list[Outcome]) -> dict[str, float]:
    """Adjusted p by the closure of Bonferroni tests: of all intersections that a test is in, the largest p."""
    return {
        each.name: max(
            min(1.0, len(joint) * min(member.p_value for member in joint))
            for size in range(1, len(outcomes) + 1)
            for joint in itertools.combinations(outcomes, size)
            if each in joint
        )
        for each in outcomes
    }


P_VALUES = st.sampled_from([1.0, 0.4, 0.02, 1e-3, 5e-4, 1e-3 / 3, 2e-4, 1e-5, 1e-9, 0.0])
OUTCOMES = st.lists(
    st.tuples(P_VALUES, st.sampled_from([0.0, 1e-5, 2.5e-4, 4e-4, 6e-4, 1e-3, 0.25]), st.booleans()),
    min_size=0,
    max_size=4,
)


@given(
    rows=OUTCOMES,
    bases=st.lists(st.sampled_from(["exact", "conformal", "approximate"]), min_size=4, max_size=4),
    alpha=st.sampled_from([1e-3, 0.05, 0.3]),
)
def test_the_verdict_is_that_of_closed_testing(
    rows: list[tuple[float, float, bool]], bases: list[str], alpha: float
) -> None:
    outcomes = [
        Outcome(name, basis, max(p, smallest), smallest, decides)
        for name, basis, (p, smallest, decides) in zip("abcd", bases, rows, strict=False)
    ]
    counted = selection(outcomes, alpha)
    adjusted = closed(counted)
    found = decide(outcomes, alpha)
    assert len(found.left_out) == len(outcomes) - len(counted)
    if len({each.smallest_p for each in outcomes}) == len(outcomes):
        assert set(found.left_out) == {each.name for each in outcomes if each not in counted}
    else:  # which of equals is left out is not said; the brute force follows what was chosen
        counted = [each for each in outcomes if each.name not in found.left_out]
        adjusted = closed(counted)
    rejected = {name for name, p in adjusted.items() if p <= alpha}
    deciding = {each.name for each in counted if each.decides}
    by_name = {each.name: each for each in outcomes}
    if rejected:
        assert (found.word, set(found.rests_on)) == ("related", rejected)
        order = ["exact", "conformal", "approximate"]
        strongest = min((by_name[name].basis for name in rejected), key=order.index)
        assert found.basis == strongest
        assert found.p_value == pytest.approx(
            min(adjusted[name] for name in rejected if by_name[name].basis == strongest)
        )
    elif deciding:
        assert (found.word, set(found.rests_on)) == ("none_detected", deciding)
        assert found.p_value == pytest.approx(min(adjusted[name] for name in deciding))
        assert found.basis in {by_name[n].basis for n in deciding if math.isclose(adjusted[n], found.p_value or 0)}
    else:
        assert found == Verdict("inconclusive", None, None, (), found.left_out)


def test_by_hand() -> None:
    """Two tests at 1e-3: 6e-4 alone is not enough, beside 1e-5 it is."""
    assert decide([outcome("a", 6e-4), outcome("b", 0.5)], ALPHA).word == "none_detected"
    found = decide([outcome("a", 6e-4), outcome("b", 1e-5)], ALPHA)
    assert (found.word, found.rests_on, found.p_value) == ("related", ("b", "a"), 2e-5)
    assert decide([outcome("a", 6e-4)], ALPHA).word == "related"
    assert decide([], ALPHA) == Verdict("inconclusive", None, None, (), {})


def test_the_stronger_basis_is_named_first() -> None:
    found = decide([outcome("a", 1e-12, basis="approximate"), outcome("b", 2e-4)], ALPHA)
    assert (found.basis, found.p_value, found.rests_on) == ("exact", 2e-4, ("a", "b"))


def test_what_can_never_reject_is_left_out_and_costs_nothing() -> None:
    profile = outcome("profile", 0.33, smallest=0.33, basis="conformal", decides=False)
    found = decide([outcome("a", 9e-4, smallest=1e-5), profile], ALPHA)
    assert found.word == "related"
    assert found.left_out == {"profile": "its smallest attainable p, 0.33, is above 0.0005"}
    # 4e-4 could reject as one of two, not as one of three.
    three = [outcome("a", 1.0, smallest=1e-5), outcome("b", 1.0, smallest=1e-5), outcome("c", 1.0, smallest=4e-4)]
    assert list(decide(three, ALPHA).left_out) == ["c"]
    assert not decide(three[1:], ALPHA).left_out
    # Whatever p is: leaving out may not look at it.
    assert decide([replace(each, p_value=max(each.smallest_p, 1e-5)) for each in three], ALPHA).left_out.keys() == {"c"}


def test_a_test_that_does_not_decide_can_only_say_related() -> None:
    shy = outcome("a", 0.5, decides=False)
    assert decide([shy], ALPHA).word == "inconclusive"
    assert decide([replace(shy, p_value=1e-9)], ALPHA).word == "related"
    found = decide([shy, outcome("b", 0.2)], ALPHA)
    assert (found.word, found.rests_on, found.p_value) == ("none_detected", ("b",), 0.4)


def test_error_over_all_tests_is_the_level() -> None:
    """Of dependent uniform p-values; a coarse test beside them may not spoil it."""
    rng = np.random.default_rng(0)
    level, n = 0.05, 4000
    common = rng.random(n)
    found = 0
    for i in range(n):
        p = [common[i], *rng.random(2)]
        coarse = math.ceil(rng.random() * 10) / 10
        tests = [outcome(name, value) for name, value in zip("abc", p, strict=True)]
        found += decide([*tests, outcome("d", coarse, smallest=0.1)], level).word == "related"
    assert found / n == pytest.approx(level, abs=3 * math.sqrt(level / n))


def test_the_same_weights_need_no_test() -> None:
    nothing = same_weights(decide([], ALPHA))
    assert (nothing.word, nothing.basis, nothing.rests_on, nothing.p_value) == ("related", "exact", ("digest",), None)
    assert same_weights(decide([outcome("a", 1e-9)], ALPHA)).rests_on == ("digest", "a")
