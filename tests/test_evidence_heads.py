"""The head test against a loop in float64, against the enumeration of S_g ≀ S_k in every layer, and on independent
models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmfp
from llmfp.circuits import SKETCH
from llmfp.evidence import heads
from llmfp.evidence.heads import Heads, head_symmetry
from llmfp.evidence.verdict import Missing
from llmfp.fingerprint import TowerFingerprint
from llmfp.statistics import Statistics
from tests.lineage import KS_LIMIT, Float64, circuits_of, fingerprint_of, ks_distance, tower_of

Layers = list[dict[str, Float64]]


def independent(
    rng: np.random.Generator, layers: int = 4, count: int = 4, kinds: tuple[str, ...] = ("head_coherence",)
) -> Layers:
    """What a deep scan keeps of every layer: norms, and vectors of these kinds."""
    sizes = {"head_coherence": SKETCH, "qk_spectrum": 8, "ov_spectrum": 8}
    return [
        {
            "norms": rng.normal(2, 1, count),
            "ov_norms": rng.normal(size=count),
            **{kind: rng.normal(3, 2, (count, sizes[kind])) + rng.normal(size=(1, sizes[kind])) for kind in kinds},
        }
        for _ in range(layers)
    ]


def tower(layers: Layers, heads: int | None = 4, kv_heads: int | None = 2, **more: Any) -> TowerFingerprint:
    return tower_of(circuits=[circuits_of(**each) for each in layers], heads=heads, kv_heads=kv_heads, **more)


def products(a: Layers, b: Layers) -> list[Float64]:
    """Per layer, inner products of all heads of A with all of B.

    Each block of numbers, kept as float16 but for the norms, has the layer's mean taken off, and is divided by its
    root mean square over the model's heads: EVIDENCE.md, "blocks scaled equally, within-layer mean removed".
    """

    def vectors(layers: Layers, block: list[str]) -> list[Float64]:
        found = []
        for each in layers:
            parts = [each[name] if "norm" in name else each[name].astype(np.float16).astype(float) for name in block]
            joined = np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
            found.append(joined - sum(joined) / len(joined))
        square = sum(float(value**2) for each in found for value in each.ravel())
        count = sum(len(each) for each in found)
        return [each / math.sqrt(square / count) for each in found]

    total = [np.zeros((len(x["norms"]), len(y["norms"]))) for x, y in zip(a, b, strict=True)]
    for block in (["norms", "ov_norms"], ["head_coherence"], ["qk_spectrum", "ov_spectrum"]):
        if block[0] in a[0] and block[0] in b[0]:
            for layer, (x, y) in enumerate(zip(vectors(a, block), vectors(b, block), strict=True)):
                total[layer] += [[float(sum(u * v)) for v in y] for u in x]
    return total


def wreath(count: int, groups: int) -> Iterator[list[int]]:
    """S_g ≀ S_k: kv groups change places, heads change places within them."""
    size = count // groups
    for order in itertools.permutations(range(groups)):
        for within in itertools.product(itertools.permutations(range(size)), repeat=groups):
            yield [order[k] * size + i for k in range(groups) for i in within[k]]


def made(found: Heads | Missing) -> Heads:
    assert isinstance(found, Heads), found
    return found


def reason(a: TowerFingerprint, b: TowerFingerprint, **more: Any) -> str:
    found = head_symmetry(a, b, **more)
    assert isinstance(found, Missing)
    return found.reason


def child(rng: np.random.Generator, parent: Layers, noise: float = 0.5) -> Layers:
    """Norms move by one at most: a head a thousand times smaller than others would be taken for dead."""
    return [
        {
            key: value + min(noise, 1.0 if "norm" in key else noise) * rng.normal(size=value.shape)
            for key, value in each.items()
        }
        for each in parent
    ]


@pytest.mark.parametrize(("count", "groups"), [(4, 2), (4, 4), (3, 1), (6, 2)])
def test_p_is_that_of_the_whole_group(count: int, groups: int) -> None:
    rng = np.random.default_rng([count, groups])
    layers = 3 if count < 6 else 2
    a = independent(rng, layers, count)
    b = child(rng, a, 3.0)
    found = made(head_symmetry(tower(a, count, groups), tower(b, count, groups), permutations=30_000))
    tables = products(a, b)
    elements = np.array(list(wreath(count, groups)))
    assert len(elements) == math.factorial(groups) * math.factorial(count // groups) ** groups
    every = np.zeros(1)
    for table in tables:
        every = np.add.outer(every, table[np.arange(count), elements].sum(axis=1)).ravel()
    observed = sum(float(np.trace(table)) for table in tables)
    exact = float((every >= observed - 1e-6).mean())
    assert found.p_value == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000) + 2e-4)
    assert found.smallest_p == pytest.approx(max(1 / 30_001, 1 / len(elements) ** layers))
    assert found.z == pytest.approx((observed - every.mean()) / every.std(), abs=0.06 * max(1, abs(found.z)))
    assert (found.layers, found.heads, found.kv_heads, found.blocks) == (layers, count, groups, ("norms", "coherence"))


@pytest.mark.parametrize("kinds", [("head_coherence",), ("qk_spectrum", "ov_spectrum"), ()])
def test_t_is_that_of_a_loop(kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is permuted: the inner products of heads, layer by layer."""
    rng = np.random.default_rng(len(kinds))
    a, b = independent(rng, kinds=kinds), independent(rng, kinds=kinds)
    seen: list[Float64] = []
    permuted = heads.permuted

    def watched(blocks: list[Float64], *rest: Any) -> Float64:
        seen[:] = blocks
        return permuted(blocks, *rest)

    monkeypatch.setattr(heads, "permuted", watched)
    made(head_symmetry(tower(a), tower(b), permutations=99))
    np.testing.assert_allclose(seen, products(a, b), rtol=1e-9, atol=1e-12)


def test_p_is_uniform_on_independent_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one model hold the same few kinds of heads, in any order, as trained ones do; tails are heavy."""
    monkeypatch.setattr(heads, "STRUCTURE_PERMUTATIONS", 200)
    rng = np.random.default_rng(1)
    drawn, p_values = 99, []
    for seed in range(200):
        pair = []
        for _ in "ab":
            layers = independent(rng, layers=5)
            sorts = rng.standard_t(2, size=(4, SKETCH))
            for each in layers:
                each["head_coherence"] += 2 * sorts[rng.permutation(4)]
            pair.append(tower(layers))
        found = head_symmetry(*pair, permutations=drawn, seed=seed)
        p_values += [found.p_value] if isinstance(found, Heads) else []
    assert len(p_values) >= 198
    assert ks_distance(p_values, drawn, rng) < KS_LIMIT


def test_a_child_is_found_whatever_its_scale_and_a_permuted_one_is_not() -> None:
    rng = np.random.default_rng(2)
    parent = independent(rng, layers=8)
    near = child(rng, parent, 1.0)
    found = made(head_symmetry(tower(parent), tower(near), permutations=999))
    assert found.p_value == 1e-3
    louder = [{key: 3 * value + 1 for key, value in each.items()} for each in near]
    assert made(head_symmetry(tower(parent), tower(louder), permutations=999)).z == pytest.approx(found.z, rel=0.01)
    elements = list(wreath(4, 2))
    lost = [{key: value[elements[rng.integers(len(elements))]] for key, value in each.items()} for each in near]
    assert made(head_symmetry(tower(parent), tower(lost), permutations=999)).p_value > 0.01


def test_dead_heads_are_silent() -> None:
    """A head below a thousandth of the layer's median says nothing, and the others' mean is their own."""
    rng = np.random.default_rng(3)
    parent = independent(rng, layers=8)
    near = child(rng, parent)
    clear = made(head_symmetry(tower(parent), tower(near), permutations=99)).z
    for each in (*parent[:3], *near[:3]):
        each["norms"][1] = -np.inf
        each["head_coherence"][1] = 1e4 * rng.normal(size=SKETCH)
    assert made(head_symmetry(tower(parent), tower(near), permutations=99)).z > 0.7 * clear


def test_a_seed_says_p() -> None:
    rng = np.random.default_rng(4)
    a, b = tower(independent(rng)), tower(independent(rng))
    first = head_symmetry(a, b, permutations=300, seed=1)
    assert head_symmetry(a, b, permutations=300, seed=1) == first
    assert head_symmetry(a, b, permutations=300, seed=2) != first


def test_layers_without_circuits_are_passed_over() -> None:
    rng = np.random.default_rng(5)
    a, b = independent(rng, layers=6), independent(rng, layers=6)
    towers = [tower(each) for each in (a, b)]
    gone = [*(towers[0].circuits or ())]
    gone[2] = None
    pair = tower_of(circuits=gone), towers[1]
    assert made(head_symmetry(*pair, permutations=99)).layers == 5
    b[4]["norms"][0] = np.nan  # what a damaged file may hold
    assert made(head_symmetry(pair[0], tower(b), permutations=99)).layers >= 4
    assert made(head_symmetry(*pair, permutations=99, layer_map=[(2, 2), (0, 5), (1, 1)])).layers == 2


def test_layers_with_other_numbers_of_heads_are_left_out() -> None:
    """Their groups are others, and what they are filled up with would look alike in any two models."""
    rng = np.random.default_rng(8)
    fewer, more = (independent(rng, layers=1, count=count)[0] for count in (2, 6))
    a, b = independent(rng, layers=6), independent(rng, layers=6)
    for each in (a, b):
        each[1], each[4] = fewer, more
    found = made(head_symmetry(tower(a), tower(b), permutations=999))
    assert found.layers == 4
    assert found.p_value > 0.01
    rest = [[each for n, each in enumerate(layers) if n not in (1, 4)] for layers in (a, b)]
    assert made(head_symmetry(*map(tower, rest), permutations=999)).z == pytest.approx(found.z, rel=1e-6)
    keys = [replace(each, head_std=bytes(8 * (4 if n == 2 else 2))) for n, each in enumerate(columns(tower(a))) if each]
    other = tower(a)
    regrouped = replace(other, statistics={**other.statistics, "k": tuple(keys)})
    assert made(head_symmetry(regrouped, tower(b), permutations=99)).layers == 3
    assert reason(tower(a, 4, 3), tower(b, 4, 3)) == "4 heads do not fall into 3 groups of one size"


def columns(found: TowerFingerprint) -> tuple[Statistics | None, ...]:
    return found.statistics["k"]


def test_layers_of_unequal_heads_come_back_from_a_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    layers = [independent(rng, layers=1, count=count)[0] for count in (4, 2, 3)]
    kept = fingerprint_of(tower(layers))
    kept.save(tmp_path / "x.fp.safetensors")
    assert llmfp.load(tmp_path / "x.fp.safetensors") == kept


def test_no_number_comes_from_nothing() -> None:
    rng = np.random.default_rng(6)
    a = tower(independent(rng))
    assert (
        reason(a, tower_of(circuits=None))
        == "the second fingerprint holds no circuits of heads: it comes from a plain scan"
    )
    assert "the first model differ by design" in reason(tower(independent(rng), indexed_heads=True), a)
    other = tower(independent(rng, count=6), 6, 2)
    assert reason(a, other) == "head counts differ: 4 of 2 groups and 6 of 2"
    assert "head counts differ" in reason(tower(independent(rng), None, None), tower(independent(rng), None, None))
    assert "head counts differ" in reason(a, tower(independent(rng), 4, 4))
    none = tower_of(circuits=[None] * 4)
    assert reason(a, none) == "no layer's heads have circuits in both models"
    alike = tower([{key: np.ones_like(value) for key, value in each.items()} for each in independent(rng)])
    assert "no layer's heads" in reason(a, alike)
    halves = tower(independent(rng, 4)), tower(independent(rng, 4))
    assert "no pair of layers" in reason(*halves, layer_map=[])
    single = [tower(independent(rng, count=1), 1, 1) for _ in "ab"]
    assert "no layer's heads" in reason(*single), "one head has nothing to change places with"


def test_neighbours_alike_in_both_models_are_no_evidence() -> None:
    rng = np.random.default_rng(7)

    def ordered() -> TowerFingerprint:
        layers = independent(rng, layers=10, count=8)
        for each in layers:
            each["head_coherence"] += 5 * np.linspace(-1, 1, 8)[:, None] * rng.normal(size=SKETCH)
        return tower(layers, 8, 8)

    assert "a head looks like its neighbour" in reason(ordered(), ordered(), permutations=99)
    found = made(head_symmetry(ordered(), tower(independent(rng, layers=10, count=8), 8, 8), permutations=99))
    assert found.structure[0] <= heads.STRUCTURE_LEVEL < found.structure[1]
