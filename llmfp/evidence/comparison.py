"""Two fingerprints, every test that can be made of them, and what follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmfp.errors import LlmfpError
from llmfp.evidence import null as nulls
from llmfp.evidence.profile import BINS, Profile, profile
from llmfp.evidence.residual import STRUCTURE_LEVEL, Residual, residual_symmetry
from llmfp.evidence.verdict import Missing, Outcome, Verdict, decide, same_weights
from llmfp.fingerprint import Fingerprint, TowerFingerprint, main_tower, tower_kind

SCHEMA = "llmfp.comparison/1"
TESTS = ("residual", "heads", "coherence", "profile")
"""By what they can show, strongest last resort first."""
MISSED = (
    "a permutation or rotation of the residual basis",
    "distillation or training on a model's outputs, which pass on no weights",
    "replacing or retraining the attention weights themselves",
)
"""What the residual test cannot see: said wherever it found nothing."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two models, as far as the comparison speaks of it."""

    name: str
    architecture: str
    tower: str
    layers: int
    hidden_size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """The evidence, and the verdict at level `alpha`.

    residual, null  None where `lost` says why; `lost` also names tests that were valid and could not count
    missed          what would have escaped the tests that found nothing; empty unless none was detected
    """

    a: Side
    b: Side
    alpha: float
    decision: Verdict
    profile: Profile
    null: nulls.Place | None
    residual: Residual | None
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
            "rests_on": list(self.decision.rests_on),
            "a": asdict(self.a),
            "b": asdict(self.b),
            "profile": {**asdict(self.profile), "bins": BINS, "null": _null_json(self.null)},
            "residual": None if self.residual is None else asdict(self.residual),
            "heads": None,
            "coherence": None,
            "lost": dict(self.lost),
            "missed": list(self.missed),
            "caveats": list(self.caveats),
        }


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
    residual = residual_symmetry(tower_a, tower_b, permutations=permutations, seed=seed)
    place = _place(_kind(a, name_a), _kind(b, name_b), tower_a, tower_b, nulls.load() if null is None else null)
    found: dict[str, Outcome | Missing] = {
        "residual": _outcome("residual", "exact", residual),
        "heads": Missing("the fingerprints hold no norms of head circuits"),
        "coherence": Missing("the fingerprints hold no rotary coherence"),
        "profile": _outcome("profile", "conformal", place),
    }
    decision = decide([each for each in found.values() if isinstance(each, Outcome)], alpha)
    if _identical(a, b, tower_a, tower_b):
        decision = same_weights(decision)
    lost = {name: each.reason for name, each in found.items() if isinstance(each, Missing)} | decision.left_out
    return Comparison(
        a=sides[0],
        b=sides[1],
        alpha=alpha,
        decision=decision,
        profile=scores,
        null=None if isinstance(place, Missing) else place,
        residual=None if isinstance(residual, Missing) else residual,
        lost={name: lost[name] for name in TESTS if name in lost},
        missed=MISSED if decision.word == "none_detected" else (),
        caveats=(*_caveats(a, b, sides, residual), *_their_caveats(a, b)),
    )


def _tower(fingerprint: Fingerprint, wanted: str | None) -> tuple[str, TowerFingerprint]:
    name = main_tower(fingerprint.towers) if wanted is None else wanted
    if name not in fingerprint.towers:
        raise LlmfpError(
            f"{fingerprint.source['name']}: no {name} tower, only {', '.join(fingerprint.towers)}",
            hint="leave --tower out to compare the main towers",
        )
    return name, fingerprint.towers[name]


def _side(fingerprint: Fingerprint, name: str, tower: TowerFingerprint) -> Side:
    return Side(
        fingerprint.source["name"], fingerprint.architecture, name, len(tower.layers), tower.hidden_size,
        fingerprint.digest,
    )  # fmt: skip


def _identical(a: Fingerprint, b: Fingerprint, tower_a: TowerFingerprint, tower_b: TowerFingerprint) -> bool:
    """Whether both come from the same weights; weights that are all alike come from nowhere."""
    varied = any(std for column in tower_a.std.values() for std in column)
    return varied and a.digest == b.digest and tower_a.statistics == tower_b.statistics


def _kind(fingerprint: Fingerprint, tower: str) -> str:
    return tower_kind(fingerprint.towers, tower)


def _place(
    kind_a: str, kind_b: str, a: TowerFingerprint, b: TowerFingerprint, models: tuple[nulls.NullModel, ...]
) -> nulls.Place | Missing:
    if kind_a != kind_b:
        return Missing(f"the towers are of different kinds: {kind_a} and {kind_b}")
    return nulls.place(a.std, b.std, kind_a, models)


def _outcome(name: str, basis: str, found: Residual | nulls.Place | Missing) -> Outcome | Missing:
    return found if isinstance(found, Missing) else Outcome(name, basis, found.p_value, found.smallest_p)


def _caveats(a: Fingerprint, b: Fingerprint, sides: tuple[Side, Side], residual: Residual | Missing) -> list[str]:
    caveats = []
    for fingerprint, side in zip((a, b), sides, strict=True):
        if len(fingerprint.towers) > 1:
            caveats.append(f"{side.name}: of the towers {', '.join(fingerprint.towers)} only {side.tower} is compared")
    if sides[0].tower != sides[1].tower:
        caveats.append(f"unlike towers are compared: {sides[0].tower} and {sides[1].tower}")
    if sides[0].layers != sides[1].layers:
        caveats.append(f"{sides[0].layers} and {sides[1].layers} layers are matched by relative depth")
    if isinstance(residual, Residual):
        caveats.append("the residual test takes the order of coordinates for meaningless in at least one of the models")
        if min(residual.structure) <= STRUCTURE_LEVEL:
            caveats.append("in one model a coordinate's profile follows its neighbour's; the test stands on the other")
        if residual.dims < sides[0].hidden_size:
            caveats.append(f"{sides[0].hidden_size - residual.dims} residual coordinates without weights are left out")
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
    }  # fmt: skip
