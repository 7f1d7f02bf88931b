"""Rotary coherence: where its p comes from, what it may decide, and why there is none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llmfp.architecture import Rotary
from llmfp.evidence.alignment import by_chance
from llmfp.evidence.coherence import (
    LEAST_EXCESS,
    LEAST_LAYERS,
    LEAST_P,
    MIN_PARAMETRIC,
    STRANGERS,
    Coherence,
    rotary_coherence,
)  # fmt: skip
from llmfp.evidence.student import upper_tail
from llmfp.evidence.verdict import Missing
from llmfp.fingerprint import TowerFingerprint
from tests.lineage import KS_LIMIT, Float64, circuits_of, ks_distance, tower_of

ROTARY = Rotary(4, False)
ENTRIES = 40


def vectors(rng: np.random.Generator, layers: int = 12) -> Float64:
    """All layers share most, and drift with depth, as in real models."""
    depth = np.linspace(0, 1, layers)[:, None]
    found: Float64 = (
        -4 + 2 * rng.normal(size=ENTRIES) + depth * rng.normal(size=ENTRIES) + rng.normal(size=(layers, ENTRIES))
    )
    return found


def tower(coherence: Float64, rotary: Rotary | None = ROTARY, **more: Any) -> TowerFingerprint:
    circuits = [circuits_of(np.ones(4), coherence=row) for row in coherence]
    return tower_of(circuits=circuits, rotary=rotary, **more)


def made(found: Coherence | Missing) -> Coherence:
    assert isinstance(found, Coherence), found
    return found


def reason(a: TowerFingerprint, b: TowerFingerprint, strangers: tuple[TowerFingerprint, ...] = ()) -> str:
    found = rotary_coherence(a, b, strangers)
    assert isinstance(found, Missing)
    return found.reason


def related(
    rng: np.random.Generator, layers: int = 12, noise: float = 1.0
) -> tuple[TowerFingerprint, TowerFingerprint]:
    parent = vectors(rng, layers)
    return tower(parent), tower(parent + noise * rng.normal(size=parent.shape))


def strangers(rng: np.random.Generator, count: int) -> tuple[TowerFingerprint, ...]:
    return tuple(tower(vectors(rng, int(rng.integers(8, 14)))) for _ in range(count))


def test_score_z_and_excess_are_their_formulas() -> None:
    """Equal depth, and a relation so clear that layers align one to one."""
    rng = np.random.default_rng(0)
    a = vectors(rng)
    b = a + rng.normal(size=a.shape)
    found = made(rotary_coherence(tower(a), tower(b)))
    assert found.layer_map == tuple((i, i) for i in range(12))

    def rest(kept: Float64) -> Float64:
        kept = kept.astype(np.float16).astype(float)
        kept = kept - kept.mean(axis=0)
        depth = np.arange(12.0)
        return kept - np.transpose([np.polyval(np.polyfit(depth, column, 3), depth) for column in kept.T])

    correlations = np.corrcoef(rest(a), rest(b))[:12, 12:]
    np.testing.assert_allclose(found.matrix, correlations, rtol=1e-7, atol=1e-10)
    matched, others = np.diag(correlations), correlations[~np.eye(12, dtype=bool)]
    assert found.score == pytest.approx(matched.mean())
    assert found.z == pytest.approx(math.sqrt(12) * (matched.mean() - others.mean()) / others.std())
    mean, deviation = by_chance(12, 12)
    assert found.excess == pytest.approx((found.z - mean) / deviation)
    t = (found.excess - STRANGERS.mean) / (STRANGERS.sd * math.sqrt(1 + 1 / STRANGERS.models))
    assert found.p_value == pytest.approx(max(upper_tail(t, STRANGERS.models - 1), LEAST_P))
    assert (found.basis, found.decides, found.nulls, found.smallest_p) == ("approximate", False, 0, LEAST_P)
    assert found.counts


def test_strangers_of_the_same_kind_give_a_conformal_p() -> None:
    """Base-fixed, in both turns, of which the larger p is kept."""
    rng = np.random.default_rng(1)
    null = strangers(rng, 9)
    a, b = tower(vectors(rng)), tower(vectors(rng))
    found = made(rotary_coherence(a, b, null))
    turns = []
    for base in (a, b):
        scores = [made(rotary_coherence(base, other)).excess for other in null]
        turns.append((1 + sum(score >= found.excess for score in scores)) / 10)
    assert found.p_value == pytest.approx(max(turns))
    assert (found.basis, found.decides, found.nulls, found.smallest_p) == ("conformal", True, 9, 0.1)
    near = made(rotary_coherence(*related(rng), null))
    assert (near.p_value, near.basis) == (0.1, "conformal"), "no lower than the strangers can show"


def test_below_what_strangers_can_show_a_prediction_takes_over() -> None:
    rng = np.random.default_rng(2)
    null = strangers(rng, MIN_PARAMETRIC)
    a, b = related(rng)
    found = made(rotary_coherence(a, b, null))
    assert (found.basis, found.decides, found.nulls, found.smallest_p) == ("approximate", True, MIN_PARAMETRIC, LEAST_P)
    predicted = []
    for base in (a, b):
        scores = np.array([made(rotary_coherence(base, other)).excess for other in null])
        assert scores.max() < found.excess
        t = (found.excess - scores.mean()) / (scores.std(ddof=1) * math.sqrt(1 + 1 / MIN_PARAMETRIC))
        predicted.append(upper_tail(t, MIN_PARAMETRIC - 1))
    assert found.p_value == pytest.approx(max(*predicted, LEAST_P))
    assert found.p_value < 1 / (1 + MIN_PARAMETRIC)
    short = made(rotary_coherence(a, b, null[1:]))
    assert (short.p_value, short.basis, short.smallest_p) == (1 / 20, "conformal", 1 / 20)


def test_p_of_strangers_is_uniform() -> None:
    """At most: the larger of two turns is kept."""
    rng = np.random.default_rng(3)
    p_values = []
    for _ in range(40):
        null = strangers(rng, 9)
        p_values.append(made(rotary_coherence(*strangers(rng, 2), null)).p_value)
    for level in (0.1, 0.2, 0.5):
        assert np.mean(np.array(p_values) <= level + 1e-9) < level + 3 * math.sqrt(level / 40)
    assert np.mean(p_values) < 0.8


def test_strangers_excess_is_near_zero_and_one() -> None:
    rng = np.random.default_rng(4)
    models = strangers(rng, 16)
    excess = [made(rotary_coherence(x, y)).excess for n, x in enumerate(models) for y in models[:n]]
    assert np.mean(excess) == pytest.approx(0, abs=0.5)
    assert np.std(excess) == pytest.approx(1, abs=0.3)
    assert max(excess) < LEAST_EXCESS


def test_it_counts_without_strangers_only_when_clear_over_enough_layers() -> None:
    rng = np.random.default_rng(5)
    assert made(rotary_coherence(*related(rng))).counts
    parent, kept = vectors(rng, 24), slice(1, 3 * LEAST_LAYERS - 4, 3)
    few = made(rotary_coherence(tower(parent), tower(parent[kept])))
    assert few.excess > LEAST_EXCESS
    assert len(few.layer_map) == LEAST_LAYERS - 1
    assert not few.counts
    apart = made(rotary_coherence(tower(vectors(rng)), tower(vectors(rng))))
    assert apart.excess < LEAST_EXCESS
    assert not apart.counts
    assert made(rotary_coherence(*related(rng, layers=7), strangers(rng, 3))).counts, "with strangers it always does"


def test_layers_go_by_their_numbers() -> None:
    """Layers without attention between them, and a child that lost some."""
    rng = np.random.default_rng(6)
    parent = vectors(rng)
    kept = [0, 1, 2, 3, 5, 6, 8, 9, 10, 11]
    numbers = [3 * n + 1 for n in range(12)]
    a = tower(parent, layers=numbers)
    b = tower(parent[kept] + 0.5 * rng.normal(size=(10, ENTRIES)))
    found = made(rotary_coherence(a, b))
    assert found.layer_map == tuple((numbers[layer], n) for n, layer in enumerate(kept))
    assert found.counts


def test_a_layer_without_coherence_is_none_in_the_matrix() -> None:
    rng = np.random.default_rng(7)
    a, b = related(rng)
    circuits = [*(a.circuits or ())]
    circuits[4] = None
    found = made(rotary_coherence(tower_of(circuits=circuits, rotary=ROTARY), b))
    assert set(found.matrix[4]) == {None}
    assert all(None not in row for n, row in enumerate(found.matrix) if n != 4)
    assert 4 not in dict(found.layer_map)
    mean, deviation = by_chance(11, 12)
    assert found.excess == pytest.approx((found.z - mean) / deviation)


def test_strangers_of_another_kind_are_passed_over() -> None:
    rng = np.random.default_rng(8)
    a, b = related(rng)
    others = (
        tower(vectors(rng), head_dim=16), tower(vectors(rng), Rotary(3, False)), tower(vectors(rng), None),
        tower_of({"q": np.ones((3, 4))}, rotary=ROTARY), tower(vectors(rng, 5)),
    )  # fmt: skip
    assert made(rotary_coherence(a, b, others)).nulls == 0
    assert made(rotary_coherence(a, b, (*others, *strangers(rng, 2)))).nulls == 2


def test_interleaved_pairs_are_no_other_kind() -> None:
    rng = np.random.default_rng(9)
    parent = vectors(rng)
    found = made(rotary_coherence(tower(parent), tower(parent + 0.1, Rotary(4, True))))
    assert found.score > 0.99


def test_no_number_comes_from_nothing() -> None:
    rng = np.random.default_rng(10)
    a = tower(vectors(rng))
    plain = tower_of({"q": np.ones((3, 4))}, rotary=ROTARY)
    assert reason(a, plain) == "the second fingerprint holds no rotary coherence: it comes from a plain scan"
    assert reason(plain, a).startswith("the first fingerprint")
    assert reason(a, tower(vectors(rng), None)) == "the second model has no rotary embedding, or none that is known"
    assert (
        reason(a, tower(vectors(rng), Rotary(3, False))) == "rotary pairs differ: 4 in heads of 8 and 3 in heads of 8"
    )
    assert "4 in heads of 8 and 4 in heads of 16" in reason(a, tower(vectors(rng), head_dim=16))
    assert (
        reason(a, tower(vectors(rng, 5))) == "fewer than 6 layers of one model have rotary coherence, or all are alike"
    )
    assert "fewer than 6 layers" in reason(a, tower(np.ones((12, ENTRIES))))
    assert "fewer than 6 layers" in reason(a, tower(np.full((12, ENTRIES), np.nan)))
    assert "fewer than 6 layers" in reason(a, tower(vectors(rng)[:1]))
    holes = vectors(rng)
    holes[:, 3] = np.inf
    assert "fewer than 6 layers" in reason(a, tower(holes))
    none = tower_of(circuits=[None] * 12, rotary=ROTARY)
    assert "fewer than 6 layers" in reason(a, none)


def test_strangers_that_are_all_the_same_predict_nothing() -> None:
    rng = np.random.default_rng(11)
    one = tower(vectors(rng))
    found = made(rotary_coherence(*related(rng), (one,) * 25))
    assert (found.p_value, found.basis) == (1 / 26, "conformal")


def test_p_uniform_by_the_prediction_too() -> None:
    """The t interval of strangers' excess against one more: near enough to uniform."""
    rng = np.random.default_rng(12)
    from llmfp.evidence.student import predicted_p

    base = tower(vectors(rng))
    excess = [made(rotary_coherence(base, other)).excess for other in strangers(rng, 120)]
    p_values = [predicted_p(excess[n], excess[:n] + excess[n + 1 :]) for n in range(len(excess))]
    assert ks_distance(p_values, 10**9, rng) < KS_LIMIT
