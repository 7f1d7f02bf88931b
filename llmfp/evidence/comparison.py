"""Two fingerprints, every test that can be made of them, and what follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from llmfp import __version__
from llmfp.checkpoint.specs import PLAIN_FLOATS
from llmfp.errors import LlmfpError
from llmfp.evidence import null as nulls
from llmfp.evidence.alignment import align, layer_vectors, similarity
from llmfp.evidence.coherence import LEAST_EXCESS, LEAST_LAYERS, Coherence, rotary_coherence
from llmfp.evidence.heads import Heads, head_symmetry
from llmfp.evidence.profile import BINS, Profile, profile
from llmfp.evidence.residual import STRUCTURE_LEVEL, LayerMap, Residual, relative_layer_map, residual_symmetry
from llmfp.evidence.verdict import Missing, Outcome, Verdict, decide, same_weights
from llmfp.fingerprint import Fingerprint, TowerFingerprint, kind, main_tower

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from matplotlib.figure import Figure

SCHEMA = "llmfp.comparison/1"
TESTS = ("residual", "heads", "coherence", "profile")
"""By what they can show, strongest last resort first."""
ESCAPES = {
    "residual": "permuting or rotating the residual basis",
    "heads": "permuting heads",
    "coherence": "noise on input directions that the model hardly uses",
}
"""What each test cannot see: where several found nothing, all of it must have been done."""
MISSED = (
    "distillation or training on a model's outputs, which pass on no weights",
    "replacing or retraining the attention weights themselves",
)
"""What no test here can see."""
LARGEST = {"layers": 512, "heads": 512, "hidden size": 1 << 17}
"""Of a tower that is compared: time and memory go with the squares of layers and heads; a small file claims many."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two models, as far as the comparison speaks of it.

    std          σ by role, a number for each of layer_numbers; None where a layer has none
    source, run  where the fingerprint comes from, and what made it, as in its own JSON
    """

    name: str
    architecture: str
    tower: str
    layers: int
    hidden_size: int
    digest: str
    layer_numbers: tuple[int, ...]
    std: Mapping[str, Sequence[float | None]]
    source: Mapping[str, Any]
    run: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The evidence, and the verdict at level `alpha`.

    residual, heads, coherence, null
            None where `lost` says why; `lost` also names tests that were valid and could not count
    missed  what would have escaped the tests that found nothing; empty unless none was detected
    """

    a: Side
    b: Side
    alpha: float
    permutations: int
    seed: int
    decision: Verdict
    profile: Profile
    null: nulls.Place | None
    residual: Residual | None
    heads: Heads | None
    coherence: Coherence | None
    lost: Mapping[str, str]
    missed: tuple[str, ...]
    caveats: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """related, none_detected or inconclusive."""
        return self.decision.word

    @property
    def p_value(self) -> float | None:
        """What the verdict rests on, corrected for the number of tests."""
        return self.decision.p_value

    @property
    def basis(self) -> str | None:
        """exact, conformal or approximate."""
        return self.decision.basis

    def to_json(self) -> dict[str, Any]:
        """The object that `compare --json` prints."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "p_value": self.p_value,
            "basis": self.basis,
            "alpha": self.alpha,
            "permutations": self.permutations,
            "seed": self.seed,
            "versions": {"llmfp": __version__},
            "rests_on": list(self.decision.rests_on),
            "a": asdict(self.a),
            "b": asdict(self.b),
            "profile": {**asdict(self.profile), "bins": BINS, "null": _null_json(self.null)},
            "residual": None if self.residual is None else asdict(self.residual),
            "heads": None if self.heads is None else asdict(self.heads),
            "coherence": None if self.coherence is None else asdict(self.coherence),
            "lost": dict(self.lost),
            "missed": list(self.missed),
            "caveats": list(self.caveats),
        }

    def plot(self) -> Figure:
        """A Matplotlib figure of both models' σ and of every test. Raises LlmfpError where Matplotlib is missing."""
        from llmfp.report import figures

        return figures.of_comparison(self.to_json())

    def to_pandas(self) -> pd.DataFrame:
        """A row per test (report.tables.tests). Raises LlmfpError without pandas."""
        from llmfp.report import tables

        return tables.to_pandas(tables.tests(self.to_json()))

    def to_arrow(self) -> pa.Table:
        """The same rows for Arrow. Raises LlmfpError without pyarrow."""
        from llmfp.report import tables

        return tables.to_arrow(tables.tests(self.to_json()))

    def _repr_html_(self) -> str:
        from llmfp.report import page

        found = self.to_json()
        return page.fragment("notebook_comparison.html.jinja", found, tests=page.tests(found))


def compare(
    a: Fingerprint,
    b: Fingerprint,
    *,
    tower: str | None = None,
    alpha: float = 1e-3,
    permutations: int = 100_000,
    null: tuple[nulls.NullModel, ...] | None = None,
    seed: int = 0,
) -> Comparison:
    """All the evidence that two fingerprints hold about one tower of each: the main ones unless `tower` is named.

    null  unrelated models, one a family; those shipped when None
    Raises LlmfpError for a level or a number of permutations that means nothing, and for a tower that is not there.
    """
    if not 0 < alpha < 1:
        raise LlmfpError(f"alpha is {alpha}, not between 0 and 1")
    if permutations < 1:
        raise LlmfpError(f"{permutations} permutations are none")
    (name_a, tower_a), (name_b, tower_b) = _tower(a, tower), _tower(b, tower)
    sides = _side(a, name_a, tower_a), _side(b, name_b, tower_b)
    scores = profile(tower_a.std, tower_b.std)
    known = nulls.load() if null is None else null
    models = [model for model in known if model.tower is None or not _same(model.tower, tower_a, tower_b)]
    strangers = [model.tower for model in models if model.tower is not None]
    coherence = rotary_coherence(tower_a, tower_b, strangers)
    aligned = _layer_map(tower_a, tower_b, coherence)
    residual = residual_symmetry(tower_a, tower_b, permutations=permutations, seed=seed, layer_map=aligned.pairs)
    heads = head_symmetry(tower_a, tower_b, permutations=permutations, seed=seed, layer_map=aligned.pairs)
    if sampled := [each.source["name"] for each in (a, b) if each.sample is not None]:
        absent = Missing(f"{' and '.join(sampled)}: a sample of rows holds nothing that this test compares")
        residual, heads, coherence = absent, absent, absent
    place = _place(kind(a, name_a), kind(b, name_b), tower_a, tower_b, models)
    found: dict[str, Outcome | Missing] = {
        "residual": _outcome("residual", "exact", residual),
        "heads": _outcome("heads", "exact", heads),
        "coherence": _coherence_outcome(coherence),
        "profile": _outcome("profile", "conformal", place, decides=False),
    }
    decision = decide([each for each in found.values() if isinstance(each, Outcome)], alpha)
    if _identical(a, b, tower_a, tower_b):
        decision = same_weights(decision)
    lost = {name: each.reason for name, each in found.items() if isinstance(each, Missing)} | decision.left_out
    return Comparison(
        a=sides[0],
        b=sides[1],
        alpha=alpha,
        permutations=permutations,
        seed=seed,
        decision=decision,
        profile=scores,
        null=None if isinstance(place, Missing) else place,
        residual=None if isinstance(residual, Missing) else residual,
        heads=None if isinstance(heads, Missing) else heads,
        coherence=None if isinstance(coherence, Missing) else coherence,
        lost={name: lost[name] for name in TESTS if name in lost},
        missed=_missed(decision),
        caveats=(*_caveats(a, b, sides, aligned, residual, coherence), *_their_caveats(a, b)),
    )


def _tower(fingerprint: Fingerprint, wanted: str | None) -> tuple[str, TowerFingerprint]:
    name = main_tower(fingerprint.towers) if wanted is None else wanted
    if name not in fingerprint.towers:
        raise LlmfpError(
            f"{fingerprint.source['name']}: no {name} tower, only {', '.join(fingerprint.towers)}",
            hint="leave --tower out to compare the main towers",
        )
    tower = fingerprint.towers[name]
    sizes = {"layers": len(tower.layers), "heads": tower.heads or 0, "hidden size": tower.hidden_size}
    for what, size in sizes.items():
        if size > LARGEST[what]:
            raise LlmfpError(
                f"{fingerprint.source['name']}: {what} {size}, and no more than {LARGEST[what]} are compared"
            )
    return name, tower


def _side(fingerprint: Fingerprint, name: str, tower: TowerFingerprint) -> Side:
    return Side(
        fingerprint.source["name"], fingerprint.architecture, name, len(tower.layers), tower.hidden_size,
        fingerprint.digest, tower.layers, tower.std, fingerprint.source, fingerprint.run,
    )  # fmt: skip


def _identical(a: Fingerprint, b: Fingerprint, tower_a: TowerFingerprint, tower_b: TowerFingerprint) -> bool:
    """Whether both come from the same weights; weights that are all alike come from nowhere, a sample is not all."""
    varied = any(std for column in tower_a.std.values() for std in column)
    return varied and a.sample is b.sample is None and a.digest == b.digest and _same(tower_a, tower_b)


def _same(one: TowerFingerprint, *others: TowerFingerprint) -> bool:
    """Whether all statistics of one are those of another, to the bit: a NaN is its own equal."""
    return any(_bits(one) == _bits(other) for other in others)


def _bits(tower: TowerFingerprint) -> list[tuple[str, list[object]]]:
    def exact(value: object) -> object:
        return value.hex() if isinstance(value, float) else value

    return [
        (role, [None if s is None else [exact(getattr(s, field)) for field in s.__slots__] for s in column])
        for role, column in sorted(tower.statistics.items())
    ]


class _Alignment(NamedTuple):
    """Pairs of positions in both towers' layers, and what they were found by."""

    pairs: LayerMap
    by: str


def _layer_map(a: TowerFingerprint, b: TowerFingerprint, coherence: Coherence | Missing) -> _Alignment:
    """By coherence where depths differ or it is clear; else by spectra where depths differ; else by relative depth."""
    unlike = len(a.layers) != len(b.layers)
    if isinstance(coherence, Coherence) and (unlike or coherence.counts):
        pairs = [(a.layers.index(i), b.layers.index(j)) for i, j in coherence.layer_map]
        return _Alignment(pairs, "rotary coherence")
    vectors = (layer_vectors(a), layer_vectors(b)) if unlike else (None, None)
    if vectors[0] is not None and vectors[1] is not None and vectors[0][0] == vectors[1][0]:
        matrix = similarity(vectors[0][1], vectors[1][1])
        if matrix is not None and (pairs := align(matrix)):
            return _Alignment(pairs, f"the {vectors[0][0]} of circuits")
    return _Alignment(relative_layer_map(len(a.layers), len(b.layers)), "relative depth")


def _missed(decision: Verdict) -> tuple[str, ...]:
    """What would have escaped the tests that found nothing."""
    if decision.word != "none_detected":
        return ()
    together = [ESCAPES[name] for name in decision.rests_on if name in ESCAPES]
    return (" and, at once, ".join(together), *MISSED) if together else MISSED


def _place(
    kind_a: str, kind_b: str, a: TowerFingerprint, b: TowerFingerprint, models: Sequence[nulls.NullModel]
) -> nulls.Place | Missing:
    if kind_a != kind_b:
        return Missing(f"the towers are of different kinds: {kind_a} and {kind_b}")
    return nulls.place(a.std, b.std, kind_a, models)


def _coherence_outcome(found: Coherence | Missing) -> Outcome | Missing:
    if isinstance(found, Missing):
        return found
    if not found.decides and len(found.layer_map) < LEAST_LAYERS:
        return Missing(f"{len(found.layer_map)} layers aligned; without strangers of its kind it takes {LEAST_LAYERS}")
    return Outcome(
        "coherence", found.basis, found.p_value if found.counts else 1.0, found.smallest_p, decides=found.decides
    )


def _outcome(
    name: str, basis: str, found: Residual | Heads | nulls.Place | Missing, *, decides: bool = True
) -> Outcome | Missing:
    return found if isinstance(found, Missing) else Outcome(name, basis, found.p_value, found.smallest_p, decides)


def _caveats(
    a: Fingerprint,
    b: Fingerprint,
    sides: tuple[Side, Side],
    aligned: _Alignment,
    residual: Residual | Missing,
    coherence: Coherence | Missing,
) -> list[str]:
    caveats = []
    for fingerprint, side in zip((a, b), sides, strict=True):
        quantised = [name for name in fingerprint.source.get("stored_as", []) if name not in PLAIN_FLOATS]
        if quantised:
            caveats.append(f"{side.name}: quantised weights ({', '.join(quantised)}), compared as they are rounded")
        if len(fingerprint.towers) > 1:
            caveats.append(f"{side.name}: of the towers {', '.join(fingerprint.towers)} only {side.tower} is compared")
    if sides[0].tower != sides[1].tower:
        caveats.append(f"unlike towers are compared: {sides[0].tower} and {sides[1].tower}")
    if sides[0].layers != sides[1].layers:
        caveats.append(f"{sides[0].layers} and {sides[1].layers} layers are matched by {aligned.by}")
    if isinstance(residual, Residual):
        caveats.append("the residual test takes the order of coordinates for meaningless in at least one of the models")
        if min(residual.structure) <= STRUCTURE_LEVEL:
            caveats.append("in one model a coordinate's profile follows its neighbour's; the test stands on the other")
        if residual.dims < sides[0].hidden_size:
            caveats.append(f"{sides[0].hidden_size - residual.dims} residual coordinates without weights are left out")
    if isinstance(coherence, Coherence):
        caveats.append(f"rotary coherence can be destroyed by {ESCAPES['coherence']}, at no loss")
        if not coherence.decides:
            caveats.append(
                f"without strangers of its kind (--null) rotary coherence counts only {LEAST_EXCESS:g} standard "
                f"deviations above what alignment alone gives, with {LEAST_LAYERS} aligned layers"
            )
    return caveats


def _their_caveats(a: Fingerprint, b: Fingerprint) -> list[str]:
    return [f"{each.source['name']}: {caveat}" for each in (a, b) for caveat in each.caveats]


def _null_json(place: nulls.Place | None) -> dict[str, Any] | None:
    if place is None:
        return None
    everywhere = {role: {"below": below, "n": n} for role, (below, n) in place.everywhere.items()}
    return {
        "n": place.n, "percentile": place.percentile, "p_value": place.p_value, "kind": place.kind,
        "families": list(place.families), "everywhere": everywhere,
        "strangers": [asdict(each) for each in place.strangers],
    }  # fmt: skip
