"""The residual test against a loop in float64, against enumeration, and against what independent models make of it."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmfp.evidence import residual
from llmfp.evidence.residual import Residual, normal_scores, relative_layer_map, residual_symmetry
from llmfp.evidence.verdict import Missing
from llmfp.fingerprint import TowerFingerprint
from tests.lineage import KS_LIMIT, ROLES, Float64, ks_distance, tower_of

BLOCK = 32
Profiles = dict[str, NDArray[Any]]


def independent(rng: np.random.Generator, layers: int = 3, hidden: int = 64) -> Profiles:
    """Profiles of a model: every coordinate has a level of its own in all layers and roles, a few are outliers."""
    level = rng.normal(size=hidden) + 4 * (rng.random(hidden) < 0.05)
    return {role: -3 + 0.3 * level + 0.2 * rng.normal(size=(layers, hidden)) for role in ROLES}


def kept_as(profiles: Profiles) -> Profiles:
    return {role: rows.astype(np.float16).astype(np.float64) for role, rows in profiles.items()}


def scores_of(row: Float64) -> Float64:
    """Normal scores, one coordinate at a time: Φ⁻¹ of the middle of its rank's share, the mean rank among equals."""
    found = []
    for value in row:
        rank = sum(other < value for other in row) + (1 + sum(other == value for other in row)) / 2
        found.append(NormalDist().inv_cdf((rank - 0.5) / len(row)))
    return np.array(found)


def by_loops(a: Profiles, b: Profiles, pairs: list[tuple[int, int]]) -> tuple[float, float]:
    """T = Σᵢ (AᵀB)ᵢᵢ of scores centred within blocks of 32, and z = T / √(Σ ‖M_bb‖²/(b − 1))."""
    hidden = a["q"].shape[1]
    m = np.zeros((hidden, hidden))
    for role, (i, j) in itertools.product(ROLES, pairs):
        x, y = scores_of(a[role][i]), scores_of(b[role][j])
        for start in range(0, hidden, BLOCK):
            x[start : start + BLOCK] -= x[start : start + BLOCK].mean()
            y[start : start + BLOCK] -= y[start : start + BLOCK].mean()
        m += np.outer(x, y)
    variance = 0.0
    for start in range(0, hidden, BLOCK):
        block = m[start : start + BLOCK, start : start + BLOCK]
        variance += float((block**2).sum()) / (len(block) - 1)
    total = float(np.trace(m))
    return total, total / math.sqrt(variance)


def made(found: Residual | Missing) -> Residual:
    assert isinstance(found, Residual), found
    return found


def reason(a: TowerFingerprint, b: TowerFingerprint, **more: Any) -> str:
    found = residual_symmetry(a, b, **more)
    assert isinstance(found, Missing)
    return found.reason


@pytest.mark.parametrize("hidden", [64, 80, 32])
def test_z_is_that_of_a_loop(hidden: int) -> None:
    """80: the last block has 16 coordinates. Quarters make ties."""
    rng = np.random.default_rng(hidden)
    a, b = (independent(rng, hidden=hidden) for _ in "ab")
    a["q"], b["o"] = np.round(4 * a["q"]) / 4, np.round(4 * b["o"]) / 4
    for child in (b, {role: 0.5 * a[role] + rows for role, rows in b.items()}):
        found = made(residual_symmetry(tower_of(a), tower_of(child), permutations=100))
        assert found.z == pytest.approx(by_loops(kept_as(a), kept_as(child), [(i, i) for i in range(3)])[1], rel=1e-9)
        assert (found.dims, found.block, found.layers, found.rows) == (hidden, 32, 3, 12)


def test_a_layer_map_says_which_rows_meet() -> None:
    rng = np.random.default_rng(1)
    a, b = independent(rng, layers=5), independent(rng, layers=4)
    pairs = [(0, 0), (2, 1), (4, 3)]
    found = made(residual_symmetry(tower_of(a), tower_of(b), permutations=100, layer_map=pairs))
    assert found.z == pytest.approx(by_loops(kept_as(a), kept_as(b), pairs)[1], rel=1e-9)
    assert (found.layers, found.rows) == (3, 12)
    by_depth = made(residual_symmetry(tower_of(a), tower_of(b), permutations=100))
    assert by_depth.z == pytest.approx(by_loops(kept_as(a), kept_as(b), [(0, 0), (1, 1), (3, 2), (4, 3)])[1], rel=1e-9)


def test_layers_meet_at_the_same_relative_depth() -> None:
    assert list(relative_layer_map(4, 4)) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert list(relative_layer_map(3, 5)) == [(0, 0), (1, 2), (2, 4)]
    assert list(relative_layer_map(5, 3)) == [(0, 0), (2, 1), (4, 2)]
    assert list(relative_layer_map(1, 7)) == [(0, 0)]
    assert list(relative_layer_map(0, 7)) == []


def test_normal_scores() -> None:
    rows = np.array([[0.1, -np.inf, 3.0, 0.1, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    found = normal_scores(rows)
    for row, expected in zip(found, rows, strict=True):
        np.testing.assert_allclose(row, scores_of(expected), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(normal_scores(np.exp(rows)), found)
    assert found[0][0] == found[0][3]


def test_p_is_that_of_the_whole_group() -> None:
    """Two coordinates left in every block of 32: 2^10 permutations, all of them summed."""
    rng = np.random.default_rng(2)
    hidden, blocks = 20 * BLOCK, 20
    here = np.concatenate([[BLOCK * n, BLOCK * n + 7] for n in range(blocks)])
    a, b = ({role: np.full((1, hidden), -np.inf) for role in ROLES} for _ in "ab")
    level = rng.normal(size=len(here))
    for role in ROLES:
        for each in (a, b):
            each[role][0, here] = 0.35 * level + rng.normal(size=len(here))
    found = made(residual_symmetry(tower_of(a), tower_of(b), permutations=40_000))
    assert found.dims == 2 * blocks
    assert found.smallest_p == pytest.approx(1 / 40_001)
    kept = [{role: rows[:, here] for role, rows in kept_as(each).items()} for each in (a, b)]
    gaps = np.zeros(blocks)  # of T, where the two coordinates of a block change places
    for role in ROLES:
        x, y = (scores_of(each[role][0]).reshape(-1, 2) for each in kept)
        gaps += (x[:, 0] - x[:, 1]) * (y[:, 0] - y[:, 1]) / 2
    signs = np.array(list(itertools.product((1, -1), repeat=blocks // 2)))
    halves = [signs @ gaps[:10], signs @ gaps[10:]]
    every = np.add.outer(*halves)
    exact = float((every >= gaps.sum() - 1e-9).mean())
    assert 0.001 < exact < 0.3
    assert found.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact / 1024))


def test_a_small_group_bounds_p() -> None:
    """32 coordinates, two to a block: 2^16 permutations can show 1.5e-5, whatever is drawn."""
    hidden = 16 * BLOCK
    here = np.concatenate([[BLOCK * n, BLOCK * n + 1] for n in range(16)])
    profiles = {role: np.full((1, hidden), -np.inf) for role in ROLES}
    for role in ROLES:
        profiles[role][0, here] = np.random.default_rng(0).normal(size=32)
    found = made(residual_symmetry(tower_of(profiles), tower_of(profiles), permutations=200_000))
    assert found.smallest_p == pytest.approx(2.0**-16)
    assert found.p_value == found.smallest_p


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "STRUCTURE_PERMUTATIONS", 200)


@pytest.mark.usefixtures("quick")
def test_p_is_uniform_on_independent_models() -> None:
    """Outlier coordinates persist over layers, where normal tails fail; the structure check refuses next to none."""
    rng = np.random.default_rng(6)
    drawn, p_values = 99, []
    for seed in range(250):
        pair = [tower_of(independent(rng)) for _ in "ab"]
        found = residual_symmetry(*pair, permutations=drawn, seed=seed)
        p_values += [found.p_value] if isinstance(found, Residual) else []
    assert len(p_values) >= 248
    assert ks_distance(p_values, drawn, rng) < KS_LIMIT


@pytest.mark.usefixtures("quick")
def test_what_lies_between_blocks_makes_no_agreement() -> None:
    """Both sorted by importance, or with the same groups of scales: unrestricted permutations would find strangers."""
    rng = np.random.default_rng(7)
    drawn, p_values = 99, []
    imprinted = np.repeat([0.0, 1.5, 3.0, 5.0], BLOCK)
    for seed in range(120):
        pair = [independent(rng, hidden=128) for _ in "ab"]
        pair = [{role: rows + imprinted for role, rows in each.items()} for each in pair]
        assert np.corrcoef(*(each["q"][0] for each in pair))[0, 1] > 0.5
        found = residual_symmetry(*map(tower_of, pair), permutations=drawn, seed=seed)
        p_values += [found.p_value] if isinstance(found, Residual) else []
    assert len(p_values) >= 118
    assert ks_distance(p_values, drawn, rng) < KS_LIMIT


def test_a_child_is_found_and_a_permuted_child_is_not() -> None:
    rng = np.random.default_rng(8)
    parent = independent(rng, layers=6)
    child = {role: rows + 0.3 * rng.normal(size=rows.shape) for role, rows in parent.items()}
    found = made(residual_symmetry(tower_of(parent), tower_of(child), permutations=999))
    assert found.z > 8
    assert found.p_value == found.smallest_p == 1e-3
    order = rng.permutation(64)
    lost = {role: rows[:, order] for role, rows in child.items()}
    assert made(residual_symmetry(tower_of(parent), tower_of(lost), permutations=999)).p_value > 0.01


def test_monotone_changes_of_a_profile_and_rotated_layers_change_nothing() -> None:
    """Ranks only: a scale per layer and role, or any bend, is no difference."""
    rng = np.random.default_rng(9)
    a, b = independent(rng), independent(rng)
    bent = {role: np.sign(rows) * np.abs(kept_as(b)[role]) ** 3 / 8 + 1 for role, rows in b.items()}
    assert all(
        len(np.unique(bent[role].astype(np.float16))) == len(np.unique(b[role].astype(np.float16))) for role in b
    )
    plain = residual_symmetry(tower_of(a), tower_of(b), permutations=99)
    assert residual_symmetry(tower_of(a), tower_of(bent), permutations=99) == plain


def test_the_other_way_round_z_is_the_same() -> None:
    rng = np.random.default_rng(10)
    a, b = tower_of(independent(rng)), tower_of(independent(rng))
    assert made(residual_symmetry(a, b, permutations=9)).z == pytest.approx(
        made(residual_symmetry(b, a, permutations=9)).z
    )


def test_a_seed_says_p() -> None:
    rng = np.random.default_rng(11)
    a, b = tower_of(independent(rng)), tower_of(independent(rng))
    first = residual_symmetry(a, b, permutations=500, seed=3)
    assert residual_symmetry(a, b, permutations=500, seed=3) == first
    assert residual_symmetry(a, b, permutations=500, seed=4) != first


def test_structure_over_the_index_in_both_models_is_no_evidence() -> None:
    """Neighbours alike, as under sinusoidal positions: labels carry meaning. In one model alone it costs nothing."""
    rng = np.random.default_rng(12)
    wave = 2 * np.sin(np.arange(64) / 3)
    smooth = [{role: rows + wave for role, rows in independent(rng).items()} for _ in "ab"]
    assert "follows its neighbour's" in reason(*map(tower_of, smooth), permutations=99)
    found = made(residual_symmetry(tower_of(smooth[0]), tower_of(independent(rng)), permutations=999))
    assert found.structure[0] <= residual.STRUCTURE_LEVEL < found.structure[1]
    assert found.p_value > 0.01


def test_padding_is_left_out() -> None:
    """Zero in one of the models is enough; blocks stay where they were."""
    rng = np.random.default_rng(13)
    a, b = independent(rng, hidden=128), independent(rng, hidden=128)
    for role in ROLES:
        a[role][:, 100:] = -np.inf
        b[role][:, 3] = -np.inf
    found = made(residual_symmetry(tower_of(a), tower_of(b), permutations=99))
    assert found.dims == 99
    b["q"][0, 50] = -np.inf  # silent in one layer and role: it stays, as the lowest
    assert made(residual_symmetry(tower_of(a), tower_of(b), permutations=99)).dims == 99


def test_layers_with_what_is_not_finite_are_left_out() -> None:
    rng = np.random.default_rng(14)
    a, b = independent(rng), independent(rng)
    whole = made(residual_symmetry(tower_of(a), tower_of(b), permutations=99))
    a["q"][1, 5], b["v"][0, 0] = np.nan, np.inf
    found = made(residual_symmetry(tower_of(a), tower_of(b), permutations=99))
    assert (whole.rows, found.rows, found.layers) == (12, 10, 3)
    for role in ROLES:
        a[role][2] = np.nan
    assert made(residual_symmetry(tower_of(a), tower_of(b), permutations=99)).layers == 2


def test_no_number_comes_from_nothing() -> None:
    rng = np.random.default_rng(15)
    a = independent(rng)
    whole = tower_of(a)
    assert reason(whole, tower_of(independent(rng, hidden=96))) == "hidden sizes differ: 64 and 96"
    flat = tower_of({role: np.full((3, 64), -2.0) for role in ROLES})
    assert reason(whole, flat) == "the residual profiles of the second model are constant within every block"
    assert "first model are constant" in reason(flat, whole)
    stairs = tower_of({role: np.tile(np.repeat([1.0, 2.0], BLOCK), (3, 1)) for role in ROLES})
    assert "constant within every block" in reason(stairs, whole)
    nothing = tower_of({role: np.full((3, 64), np.nan) for role in ROLES})
    assert reason(whole, nothing) == "no layer has residual profiles of the same role, finite in both models"
    silent = tower_of({role: np.full((3, 64), -np.inf) for role in ROLES})
    assert "only 0 residual coordinates" in reason(whole, silent)
    narrow = [tower_of(independent(rng, hidden=31)) for _ in "ab"]
    assert "only 31 residual coordinates" in reason(*narrow)
    apart = tower_of({"q": a["q"]}), tower_of({"o": a["o"]})
    assert "no layer" in reason(*apart)
    assert "no layer" in reason(whole, whole, layer_map=[])
