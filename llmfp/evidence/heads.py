"""Head symmetry: do the heads of two models, layer by layer, compute alike circuits under the same labels?

Query heads within a kv group, and kv groups within a layer, are exchangeable under initialisation and training. So for
models that were initialised independently the labels of one's heads are exchangeable given the other, and permuting
them within groups and groups within layers (S_g ≀ S_k in every layer) gives an exact test. What is compared does not
change under any rewrite inside a head, any rotation of the residual stream, or the folding of a norm (llmfp.circuits);
permuting the heads of one model defeats it. It needs equal numbers of heads, and heads without an index by design.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmfp.evidence.permutation import (
    Draw,
    Floats,
    Histogram,
    histogram,
    matched,
    neighbouring,
    permuted,
    total_scale,
    two_sided_p,
    upper_p,
)
from llmfp.evidence.residual import STRUCTURE_LEVEL, STRUCTURE_PERMUTATIONS, LayerMap, relative_layer_map
from llmfp.evidence.verdict import Missing
from llmfp.fingerprint import TowerFingerprint

NEGLIGIBLE = math.log(1e-3)
"""Below the layer's median log norm: such a head does nothing, and its vector is zero."""
BLOCKS = ("norms", "coherence", "spectra")
_FOR_DEVIATION = 1000
"""Permutations that z's standard deviation is taken from at least."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Outcome of the test.

    z             T over its standard deviation among the permutations drawn; for display
    p_value       (1 + #) / (1 + permutations), at least smallest_p
    smallest_p    the least that p_value can be: of the permutations drawn, or of all there are
    layers        layer pairs compared
    blocks        what the vectors hold: norms, and coherence or spectra
    structure     p of each model's self-check: does a head look like its neighbour?
    permuted      z of the permutations drawn, beside which z stands
    """

    z: float
    p_value: float
    smallest_p: float
    permutations: int
    layers: int
    heads: int
    kv_heads: int
    blocks: tuple[str, ...]
    structure: tuple[float, float]
    permuted: Histogram


def head_symmetry(
    a: TowerFingerprint,
    b: TowerFingerprint,
    *,
    permutations: int = 100_000,
    seed: int = 0,
    layer_map: LayerMap | None = None,
) -> Heads | Missing:
    """The permutation test on the circuits of two towers' heads, or why there is none.

    layer_map  as for residual_symmetry; a map made of averages over heads leaves the test exact

    Each head has a vector: its log circuit norms, and its projected coherence (or, without rotary embedding, its
    spectra), each block divided by its root mean square over the model, with the layer's mean taken off. T is the sum
    over layers and heads of the inner products of equal labels. Checked against a loop, by enumeration of a small
    group, and by the distribution of p on independent models.
    """
    for name, tower in (("first", a), ("second", b)):
        if tower.circuits is None:
            return Missing(f"the {name} fingerprint holds no circuits of heads: it comes from a plain scan")
        if tower.indexed_heads:
            return Missing(f"heads of the {name} model differ by design, so their order carries meaning")
    groups = _groups(a)
    if (a.heads, groups) != (b.heads, _groups(b)) or a.heads is None or groups is None:
        return Missing(f"head counts differ: {a.heads} of {groups} groups and {b.heads} of {_groups(b)}")
    if a.heads % groups:
        return Missing(f"{a.heads} heads do not fall into {groups} groups of one size")
    found = [(name, _block(a, name), _block(b, name)) for name in BLOCKS]
    shared = [(name, x, y) for name, x, y in found if x is not None and y is not None and x.shape[2] == y.shape[2]]
    if not shared:
        return Missing("no layer's heads have circuits in both models")
    vectors_a, vectors_b = (np.concatenate([each[side] for each in shared], axis=2) for side in (1, 2))
    pairs = relative_layer_map(len(a.layers), len(b.layers)) if layer_map is None else layer_map
    both = [(vectors_a[i], vectors_b[j]) for i, j in pairs if vectors_a[i].any() and vectors_b[j].any()]
    if not both:
        return Missing("no pair of layers has circuits in both models")
    draw = _group_permutations(a.heads, groups)
    rng = np.random.default_rng(seed)
    structure = tuple(_neighbours_p([pair[side] for pair in both], draw, rng) for side in (0, 1))
    if max(structure) <= STRUCTURE_LEVEL:
        return Missing(
            f"in both models a head looks like its neighbour (p = {structure[0]:.2g} and {structure[1]:.2g}), "
            "so heads are not exchangeable"
        )
    products = [x @ y.T for x, y in both]
    totals = permuted(products, matched, max(permutations, _FOR_DEVIATION), rng, draw)
    log_group = len(products) * (math.lgamma(groups + 1) + groups * math.lgamma(a.heads // groups + 1))
    smallest_p = max(1 / (1 + permutations), math.exp(-log_group))
    deviation = float(totals[1:].std())
    if not deviation:
        return Missing("the heads of the two models differ in no common layer")
    return Heads(
        z=float((totals[0] - totals[1:].mean()) / deviation),
        p_value=max(upper_p(totals[: 1 + permutations], total_scale(products)), smallest_p),
        smallest_p=smallest_p,
        permutations=permutations,
        layers=len(both),
        heads=a.heads,
        kv_heads=groups,
        blocks=tuple(name for name, _, _ in shared),
        structure=(structure[0], structure[1]),
        permuted=histogram((totals[1:] - totals[1:].mean()) / deviation),
    )


def _groups(tower: TowerFingerprint) -> int | None:
    """Kv heads; in latent attention, which has none, every head makes keys and values of its own."""
    return tower.heads if tower.kv_heads is None else tower.kv_heads


def _block(tower: TowerFingerprint, name: str) -> Floats | None:
    """float64 [L, heads, numbers] of one kind, ready for inner products; zero where a head or a layer has none.

    So is a layer with other numbers of heads than most: its groups are others.
    """
    norms = tower.circuit("qk_norm")
    if norms is None or not (usual := _with_usual_heads(tower, norms)).any():
        return None
    match name:
        case "norms":
            ov = tower.circuit("ov_norm")
            values = np.stack([norms] if ov is None else [norms, ov], axis=2)
        case "coherence":
            stored = tower.circuit("head_coherence")
            if stored is None:
                return None
            values = stored.astype(np.float64)
        case _:
            spectra = [each for key in ("qk_spectrum", "ov_spectrum") if (each := tower.circuit(key)) is not None]
            if not spectra:
                return None
            values = np.concatenate(spectra, axis=2).astype(np.float64)
    values, norms = values[:, : tower.heads], norms[:, : tower.heads]
    with np.errstate(invalid="ignore"):
        acting = np.isfinite(values).all(axis=2) & (norms > np.median(norms, axis=1, keepdims=True) + NEGLIGIBLE)
        acting &= usual[:, None]
    centred = np.zeros(values.shape)
    for layer, (vectors, live) in enumerate(zip(values, acting, strict=True)):
        if live.any():
            centred[layer, live] = vectors[live] - vectors[live].mean(axis=0)
    size = float(np.sqrt(np.square(centred).sum() / max(np.count_nonzero(acting), 1)))
    return centred / size if size else None


def _with_usual_heads(tower: TowerFingerprint, norms: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[L]: which layers have as many heads and kv heads as most."""
    usual = np.array(np.count_nonzero(~np.isnan(norms), axis=1) == tower.heads)
    for layer, keys in enumerate(tower.statistics["k"]):
        if keys is not None and keys.head_std is not None:
            usual[layer] &= len(np.frombuffer(keys.head_std)) == _groups(tower)
    return usual


def _group_permutations(heads: int, kv_heads: int) -> Draw:
    group = heads // kv_heads

    def draw(rng: np.random.Generator, count: int, size: int) -> NDArray[np.intp]:
        """Random elements of S_g ≀ S_k: groups change places, and heads change places within them."""
        groups = np.argsort(rng.random((count, kv_heads)), axis=1)
        within = np.argsort(rng.random((count, kv_heads, group)), axis=2)
        return (groups[:, :, None] * group + within).reshape(count, size)

    return draw


def _neighbours_p(vectors: list[Floats], draw: Draw, rng: np.random.Generator) -> float:
    """Two-sided p of the inner products of neighbours, under the same permutations."""
    grams = [each @ each.T for each in vectors]
    return two_sided_p(permuted(grams, neighbouring, STRUCTURE_PERMUTATIONS, rng, draw), total_scale(grams))
