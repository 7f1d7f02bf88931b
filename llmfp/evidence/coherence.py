"""Rotary coherence: do the rotary pairs of two models' heads hang together alike, layer by layer?

The entries (llmfp.circuits) are all that the known function-preserving rewrites leave of Q and K: turning and scaling
rotary pairs, mixing V and O, permuting heads, folding norms, permuting or rotating the residual stream. Their average
over heads is compared after what all layers share, and a cubic trend over depth, are taken off; layers are aligned, and

    score  the mean correlation over the n aligned layer pairs
    z      √n·(mean over aligned pairs − mean over the others) / (sd over the others)

Strangers' z are above 0, since alignment looks for the best path, and depend on n; so z is no normal variable and p
comes from strangers. Where unrelated models of the same head size and rotary pairs are given, from these: base-fixed
conformal, p = (1 + #{null ≥ z}) / (1 + n), and below its floor, with MIN_PARAMETRIC of them or more, from the t
prediction interval over them. Else from STRANGERS, the laboratory's; then the test carries a verdict only at
z ≥ LEAST_Z with LEAST_LAYERS aligned pairs. The known attack: noise on input directions that the model hardly uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llmfp.evidence.alignment import MIN_LAYERS, align, contrast, similarity
from llmfp.evidence.permutation import Floats
from llmfp.evidence.student import predicted_p, upper_tail
from llmfp.evidence.verdict import Missing
from llmfp.fingerprint import TowerFingerprint

LEAST_LAYERS, LEAST_Z = 10, 8.0
MIN_PARAMETRIC = 20


@dataclass(frozen=True, slots=True)
class Calibration:
    """z of aligned strangers: how many independent models, mean and standard deviation over their pairs, largest."""

    models: int
    mean: float
    sd: float
    largest: float


STRANGERS = Calibration(models=0, mean=0.0, sd=1.0, largest=0.0)


@dataclass(frozen=True, slots=True)
class Coherence:
    """Outcome of the test.

    score, z    as above
    p_value     by `basis`: "conformal", or "approximate" (a t prediction over strangers)
    smallest_p  the least that p_value can be
    decides     whether a p above the level says anything: not without strangers of the same kind
    nulls       how many unrelated models p comes from
    layer_map   aligned layers, by their numbers in each model
    matrix      correlations of all layers with all layers, None where a layer has no coherence
    """

    score: float
    z: float
    p_value: float
    smallest_p: float
    basis: str
    decides: bool
    nulls: int
    layer_map: tuple[tuple[int, int], ...]
    matrix: tuple[tuple[float | None, ...], ...]

    @property
    def counts(self) -> bool:
        """Whether a verdict may rest on p."""
        return self.decides or (self.z >= LEAST_Z and len(self.layer_map) >= LEAST_LAYERS)


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
    found = _contrast(a, b)
    if found is None:
        return Missing(f"fewer than {MIN_LAYERS} layers of one model have rotary coherence, or all are alike")
    z = found.z
    turns = [(_contrast(a, other), _contrast(b, other)) for other in strangers if _comparable(a, other)]
    usable = [(first.z, second.z) for first, second in turns if first is not None and second is not None]
    nulls, n = list(map(list, zip(*usable, strict=True))), len(usable)
    if n:
        p_value, basis = max(_among(z, null) for null in nulls)
    else:
        p_value, basis = _among_laboratory(z), "approximate"
    return Coherence(
        score=found.score,
        z=z,
        p_value=p_value,
        smallest_p=1 / (1 + n) if 0 < n < MIN_PARAMETRIC else 0.0,
        basis=basis,
        decides=n > 0,
        nulls=n,
        layer_map=tuple((a.layers[i], b.layers[j]) for i, j in found.pairs),
        matrix=tuple(tuple(None if math.isnan(r) else r for r in row) for row in found.matrix.tolist()),
    )


def _comparable(a: TowerFingerprint, b: TowerFingerprint) -> bool:
    pairs_a, pairs_b = a.rotary and a.rotary.pairs, b.rotary and b.rotary.pairs
    return pairs_a is not None and (a.head_dim, pairs_a) == (b.head_dim, pairs_b)


def _contrast(a: TowerFingerprint, b: TowerFingerprint) -> _Contrast | None:
    vectors_a, vectors_b = a.circuit("coherence"), b.circuit("coherence")
    if vectors_a is None or vectors_b is None:
        return None
    matrix = similarity(vectors_a.astype(np.float64), vectors_b.astype(np.float64))
    if matrix is None:
        return None
    pairs = align(matrix)
    found = contrast(matrix, pairs)
    return None if found is None else _Contrast(*found, pairs, matrix)


class _Contrast(NamedTuple):
    score: float
    z: float
    pairs: list[tuple[int, int]]
    matrix: Floats


def _among(z: float, null: list[float]) -> tuple[float, str]:
    """p among strangers, and its basis: conformal, or below what that can show a t prediction."""
    p = (1 + sum(each >= z for each in null)) / (1 + len(null))
    if max(null) < z and len(null) >= MIN_PARAMETRIC:
        predicted = predicted_p(z, null)
        if predicted < p:
            return predicted, "approximate"
    return p, "conformal"


def _among_laboratory(z: float) -> float:
    t = (z - STRANGERS.mean) / (STRANGERS.sd * math.sqrt(1 + 1 / STRANGERS.models))
    return upper_tail(t, STRANGERS.models - 1)
