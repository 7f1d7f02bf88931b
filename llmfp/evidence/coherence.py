"""Rotary coherence: do the rotary pairs of two models' heads hang together alike, layer by layer?

The entries (llmfp.circuits) are all that the known function-preserving rewrites leave of Q and K: turning and scaling
rotary pairs, mixing V and O, permuting heads, folding norms, permuting or rotating the residual stream. Their average
over heads is compared after what all layers share, and a cubic trend over depth, are taken off; layers are aligned, and

    score   the mean correlation over the n aligned layer pairs
    z       √n·(mean over aligned pairs − mean over the others) / (sd over the others)
    excess  z less what alignment alone gives models of these depths, over its standard deviation (alignment.by_chance)

Strangers' z is above 0, since alignment looks for the best path, and the deeper the models the more; their excess is
near 0 ± 1. p comes from strangers: base-fixed conformal, p = (1 + #{null ≥ excess}) / (1 + n), where unrelated models
of the same head size and rotary pairs are given, and below its floor, with MIN_PARAMETRIC of them or more, from the t
prediction interval over them. Else from STRANGERS, those of bench/lineage; then the test carries a verdict only at an
excess of LEAST_EXCESS or more with LEAST_LAYERS aligned pairs. The known attack: noise on input directions that the
model hardly uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llmfp.evidence.alignment import MIN_LAYERS, align, by_chance, contrast, similarity
from llmfp.evidence.permutation import Floats
from llmfp.evidence.student import predicted_p, upper_tail
from llmfp.evidence.verdict import Missing
from llmfp.fingerprint import TowerFingerprint

LEAST_LAYERS, LEAST_EXCESS = 8, 5.0
MIN_PARAMETRIC = 20
LEAST_P = 1e-6
"""A tail that was fitted to some thousand pairs of strangers is not followed further: p is no smaller."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Excess of strangers: how many independent models, and mean, standard deviation and largest over their pairs."""

    models: int
    mean: float
    sd: float
    largest: float


STRANGERS = Calibration(models=48, mean=0.54, sd=1.02, largest=3.94)


@dataclass(frozen=True, slots=True)
class Coherence:
    """Outcome of the test.

    score, z, excess  as above
    p_value     by `basis`: "conformal", or "approximate" (a t prediction over strangers)
    smallest_p  the least that p_value can be
    decides     whether a p above the level says anything: not without strangers of the same kind
    nulls       how many unrelated models p comes from
    layer_map   aligned layers, by their numbers in each model
    matrix      correlations of all layers with all layers, None where a layer has no coherence
    strangers   excess of each model beside every unrelated one
    """

    score: float
    z: float
    excess: float
    p_value: float
    smallest_p: float
    basis: str
    decides: bool
    nulls: int
    layer_map: tuple[tuple[int, int], ...]
    matrix: tuple[tuple[float | None, ...], ...]
    strangers: tuple[tuple[float, float], ...]

    @property
    def counts(self) -> bool:
        """Whether a verdict may rest on p."""
        return self.decides or (self.excess >= LEAST_EXCESS and len(self.layer_map) >= LEAST_LAYERS)


def rotary_coherence(
    a: TowerFingerprint, b: TowerFingerprint, strangers: Sequence[TowerFingerprint] = ()
) -> Coherence | Missing:
    """The test on two towers, or why there is none.

    strangers  models related to neither and not to each other, one a family; those of another head size or number of
               rotary pairs are passed over
    """
    for name, tower in (("first", a), ("second", b)):
        if tower.circuits is None:
            return Missing(f"the {name} fingerprint holds no rotary coherence: it comes from a plain scan")
        if tower.rotary is None:
            return Missing(f"the {name} model has no rotary embedding, or none that is known")
    if not _comparable(a, b):
        return Missing(
            "rotary pairs differ: "
            + " and ".join(f"{t.rotary.pairs} in heads of {t.head_dim}" for t in (a, b) if t.rotary is not None)
        )
    if 0 not in (_entries(a), _entries(b)) and _entries(a) != _entries(b):
        return Missing("in one model queries read a latent and keys do not, so that the two hold different entries")
    found = _contrast(a, b)
    if found is None:
        return Missing(f"fewer than {MIN_LAYERS} layers of one model have rotary coherence, or all are alike")
    turns = [(_contrast(a, other), _contrast(b, other)) for other in strangers if _comparable(a, other)]
    usable = [(first.excess, second.excess) for first, second in turns if first is not None and second is not None]
    nulls, n = list(map(list, zip(*usable, strict=True))), len(usable)
    if n:
        p_value, basis = max(_among(found.excess, null) for null in nulls)
    else:
        p_value, basis = _among_laboratory(found.excess), "approximate"
    return Coherence(
        score=found.score,
        z=found.z,
        excess=found.excess,
        p_value=p_value,
        smallest_p=1 / (1 + n) if 0 < n < MIN_PARAMETRIC else LEAST_P,
        basis=basis,
        decides=n > 0,
        nulls=n,
        layer_map=tuple((a.layers[i], b.layers[j]) for i, j in found.pairs),
        matrix=tuple(tuple(None if math.isnan(r) else r for r in row) for row in found.matrix.tolist()),
        strangers=tuple(usable),
    )


def _comparable(a: TowerFingerprint, b: TowerFingerprint) -> bool:
    pairs_a, pairs_b = a.rotary and a.rotary.pairs, b.rotary and b.rotary.pairs
    return pairs_a is not None and (a.head_dim, pairs_a) == (b.head_dim, pairs_b)


def _entries(tower: TowerFingerprint) -> int:
    """How many entries a layer has: without those of queries with keys where these read different spaces."""
    vectors = tower.circuit("coherence")
    return 0 if vectors is None else vectors.shape[1]


def _contrast(a: TowerFingerprint, b: TowerFingerprint) -> _Contrast | None:
    vectors_a, vectors_b = a.circuit("coherence"), b.circuit("coherence")
    if vectors_a is None or vectors_b is None:
        return None
    matrix = similarity(vectors_a.astype(np.float64), vectors_b.astype(np.float64))
    if matrix is None:
        return None
    pairs = align(matrix)
    if (found := contrast(matrix, pairs)) is None:
        return None
    mean, sd = by_chance(*(int(np.isfinite(matrix).any(axis=axis).sum()) for axis in (1, 0)))
    return _Contrast(*found, (found[1] - mean) / sd, pairs, matrix)


class _Contrast(NamedTuple):
    score: float
    z: float
    excess: float
    pairs: list[tuple[int, int]]
    matrix: Floats


def _among(excess: float, null: list[float]) -> tuple[float, str]:
    """p among strangers, and its basis: conformal, or below what that can show a t prediction."""
    p = (1 + sum(each >= excess for each in null)) / (1 + len(null))
    if min(null) < max(null) < excess and len(null) >= MIN_PARAMETRIC:
        predicted = max(predicted_p(excess, null), LEAST_P)
        if predicted < p:
            return predicted, "approximate"
    return p, "conformal"


def _among_laboratory(excess: float) -> float:
    t = (excess - STRANGERS.mean) / (STRANGERS.sd * math.sqrt(1 + 1 / STRANGERS.models))
    return max(upper_tail(t, STRANGERS.models - 1), LEAST_P)
