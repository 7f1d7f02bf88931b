"""Alignment against the enumeration of all increasing paths; what chance gives against an independent simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from llmfp.evidence.alignment import MIN_LAYERS, align, by_chance, contrast, layer_vectors, similarity
from tests.lineage import Float64, circuits_of, tower_of

Path = list[tuple[int, int]]


def paths(rows: int, cols: int) -> Iterator[Path]:
    """Every increasing path: as many rows as columns, in order."""
    for length in range(min(rows, cols) + 1):
        for up in itertools.combinations(range(rows), length):
            for across in itertools.combinations(range(cols), length):
                yield list(zip(up, across, strict=True))


def gain(matrix: Float64, path: Path) -> float:
    return sum(matrix[pair] for pair in path)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 4), (3, 3), (4, 5), (6, 4), (5, 5)])
def test_the_path_is_the_best_of_all(rows: int, cols: int) -> None:
    rng = np.random.default_rng([rows, cols])
    for _ in range(6):
        matrix = rng.normal(size=(rows, cols))
        found = align(matrix)
        assert found in list(paths(rows, cols)), "increasing in both"
        assert gain(matrix, found) == pytest.approx(max(gain(matrix, path) for path in paths(rows, cols)))
        np.testing.assert_array_equal(found, [(i, j) for j, i in align(matrix.T)] if found else [])


def test_a_layer_without_vector_is_never_aligned() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.uniform(0.1, 1, (5, 5))
    matrix[2], matrix[:, 4] = np.nan, np.nan
    rest = np.delete(np.delete(matrix, 2, 0), 4, 1)
    best = max(gain(rest, path) for path in paths(4, 4))
    assert all(i != 2 and j != 4 for i, j in align(matrix))
    assert gain(matrix, align(matrix)) == pytest.approx(best)
    assert align(np.full((3, 3), -0.5)) == []
    assert align(np.full((3, 3), np.nan)) == []


def test_dropped_and_doubled_layers_line_up() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(12, 40))
    kept = [0, 1, 2, 5, 6, 7, 8, 11]
    found = similarity(vectors, vectors[kept] + 0.1 * rng.normal(size=(8, 40)))
    assert found is not None
    assert align(found) == [(layer, n) for n, layer in enumerate(kept)]
    upscaled = [*range(8), *range(4, 12)]  # the first eight, then the last eight
    found = similarity(vectors, vectors[upscaled] + 0.1 * rng.normal(size=(16, 40)))
    assert found is not None
    pairs = align(found)
    assert [i for i, _ in pairs] == list(range(12))
    assert all(upscaled[j] == i for i, j in pairs)


def test_contrast_is_its_formula() -> None:
    rng = np.random.default_rng(2)
    matrix = rng.normal(size=(5, 7))
    matrix[3, 3] = np.nan
    pairs = [(0, 1), (2, 2), (4, 6)]
    matched = [matrix[pair] for pair in pairs]
    rest = [x for pair, x in np.ndenumerate(matrix) if pair not in pairs and not math.isnan(x)]
    mean, other = sum(matched) / 3, sum(rest) / len(rest)
    deviation = math.sqrt(sum((x - other) ** 2 for x in rest) / len(rest))
    score, z = contrast(matrix, pairs) or (0, 0)
    assert score == pytest.approx(mean)
    assert z == pytest.approx(math.sqrt(3) * (mean - other) / deviation)


def test_contrast_of_nothing_is_nothing() -> None:
    matrix = np.random.default_rng(3).normal(size=(4, 4))
    assert contrast(matrix, []) is None
    assert contrast(np.full((4, 4), np.nan), [(0, 0)]) is None
    assert contrast(np.ones((4, 4)), [(0, 0)]) is None
    assert contrast(matrix[:1, :2], [(0, 0)]) is None


def test_similarity_is_a_correlation_of_what_a_cubic_leaves() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(9, 30)), rng.normal(size=(7, 30))

    def rest(vectors: Float64) -> list[Float64]:
        depth = np.linspace(0, 1, len(vectors))
        columns = [column - np.polyval(np.polyfit(depth, column, 3), depth) for column in vectors.T]
        return list(np.array(columns).T)

    found = similarity(a, b)
    assert found is not None
    expected = [[np.corrcoef(x, y)[0, 1] for y in rest(b)] for x in rest(a)]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    # A level and a cubic trend of every entry, and a scale for the whole model, are no difference.
    depth = np.linspace(0, 1, 9)[:, None]
    bent = 3 * a + rng.normal(size=30) + depth * rng.normal(size=30) + depth**3 * rng.normal(size=30)
    np.testing.assert_allclose(similarity(bent, b), found, rtol=1e-7, atol=1e-9)


def test_a_layer_without_vector_keeps_its_depth() -> None:
    rng = np.random.default_rng(5)
    whole = rng.normal(size=(10, 20))
    holes = whole.copy()
    holes[3] = np.nan
    found = similarity(holes, whole)
    assert found is not None
    assert np.isnan(found[3]).all()
    assert np.isfinite(np.delete(found, 3, 0)).all()
    depth = np.delete(np.linspace(0, 1, 10), 3)
    rows = np.delete(whole, 3, 0)
    rest = rows - np.transpose([np.polyval(np.polyfit(depth, column, 3), depth) for column in rows.T])
    itself = similarity(holes, holes)
    assert itself is not None
    np.testing.assert_allclose(np.delete(np.delete(itself, 3, 0), 3, 1), np.corrcoef(rest), rtol=1e-9, atol=1e-12)


def test_too_little_to_compare() -> None:
    rng = np.random.default_rng(6)
    enough = rng.normal(size=(MIN_LAYERS, 20))
    assert similarity(enough, enough) is not None
    assert similarity(enough[1:], enough) is None
    holes = enough.copy()
    holes[0] = np.nan
    assert similarity(holes, enough) is None
    assert similarity(enough, rng.normal(size=(8, 21))) is None, "entries that do not mean the same"
    alike = np.tile(rng.normal(size=20), (8, 1))
    assert similarity(alike, enough) is None
    assert similarity(alike + np.linspace(0, 1, 8)[:, None] ** 3, enough) is None, "a cubic is all there is"


def simulated(rows: int, cols: int, draws: int, seed: int) -> Float64:
    """z of matrices of independent normal values, aligned by another program: of all paths, where they are few."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        matrix = rng.normal(size=(rows, cols))
        best = [[0.0] * (cols + 1) for _ in range(rows + 1)]
        came: dict[tuple[int, int], Path] = {(i, j): [] for i in range(rows + 1) for j in range(cols + 1)}
        for i, j in itertools.product(range(1, rows + 1), range(1, cols + 1)):
            options = [
                (best[i - 1][j - 1] + matrix[i - 1, j - 1], [*came[i - 1, j - 1], (i - 1, j - 1)]),
                (best[i - 1][j], came[i - 1, j]),
                (best[i][j - 1], came[i, j - 1]),
            ]
            best[i][j], came[i, j] = max(options, key=lambda option: option[0])
        path = came[rows, cols]
        matched = np.array([matrix[pair] for pair in path])
        others = np.array([x for pair, x in np.ndenumerate(matrix) if pair not in path])
        found.append(math.sqrt(len(path)) * (matched.mean() - others.mean()) / others.std())
    return np.array(found)


@pytest.mark.parametrize(("rows", "cols", "draws"), [(6, 6, 400), (12, 12, 150), (16, 8, 150)])
def test_chance_is_what_an_independent_simulation_finds(rows: int, cols: int, draws: int) -> None:
    z = simulated(rows, cols, draws, seed=7)
    mean, deviation = by_chance(rows, cols)
    assert mean == pytest.approx(z.mean(), abs=4 * deviation * math.sqrt(1 / draws + 1 / 500))
    assert deviation == pytest.approx(z.std(), rel=4 * math.sqrt(0.5 / draws + 0.5 / 500) + 0.05)


def test_chance_grows_with_depth_as_documented() -> None:
    for layers, mean, deviation in ((12, 4.2, 0.6), (48, 8.4, 0.5)):
        found = by_chance(layers, layers)
        assert found[0] == pytest.approx(mean, abs=0.15)
        assert found[1] == pytest.approx(deviation, abs=0.08)
    assert by_chance(9, 17)[0] == pytest.approx(by_chance(17, 9)[0], rel=0.03)


def test_layers_are_compared_by_coherence_or_else_by_spectra() -> None:
    rng = np.random.default_rng(8)
    norms = np.ones(4)
    rotary = tower_of(circuits=[circuits_of(norms, coherence=rng.normal(size=6)) for _ in range(3)])
    kind, vectors = layer_vectors(rotary) or ("", np.zeros(0))
    assert (kind, vectors.shape, vectors.dtype) == ("coherence", (3, 6), np.float64)
    spectra = rng.normal(size=(3, 2, 4, 5)).astype(np.float16)
    plain = tower_of(circuits=[circuits_of(norms, qk_spectrum=qk, ov_spectrum=ov) for qk, ov in spectra])
    kind, vectors = layer_vectors(plain) or ("", np.zeros(0))
    assert kind == "spectra"
    np.testing.assert_allclose(vectors, spectra.astype(float).mean(axis=2).reshape(3, 10))
    order = rng.permutation(4)
    shuffled = tower_of(
        circuits=[circuits_of(norms, qk_spectrum=qk[order], ov_spectrum=ov[order]) for qk, ov in spectra]
    )
    np.testing.assert_allclose((layer_vectors(shuffled) or ("", 0))[1], vectors, err_msg="heads' labels do not show")
    assert layer_vectors(tower_of(circuits=[None, None])) is None
    assert layer_vectors(tower_of({"q": np.ones((3, 4))})) is None
