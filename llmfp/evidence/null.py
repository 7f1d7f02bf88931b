"""Unrelated models, whose profiles say how well a score must be to mean anything.

A null file is one JSON object: `schema` "llmfp.null/1", `source`, and `models`, a list of {name, family, kind,
decimals, std}. Models that share weights, a teacher, or authors and recipe have one family, since their scores are no
separate witnesses; the first listed stands for it. `kind` is the tower ("decoder", "encoder", "vision"), after
"seq2seq " where that belongs to an encoder-decoder. `decimals` is the number to which `std` was rounded, null if it was
not. One such file is shipped; bench/lineage/null.py made it. A directory of fingerprints, each of a model related to
none of the others, serves as well, and rotary coherence with it.

The p-value is base-fixed conformal: one of the two models is held fixed and scored against one model of every family of
its kind; p = (1 + #{null ≥ score}) / (1 + n). It holds where the other model, if unrelated, is one more draw of such a
family; pooling all pairs of n models instead counts dependent scores as if they were separate. Both models take their
turn as the fixed one, and the larger p is kept.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmfp.architecture.specs import ROLES
from llmfp.checkpoint import strict_json
from llmfp.errors import LlmfpError
from llmfp.evidence.profile import StdCurves, pearson_mean
from llmfp.evidence.verdict import Missing
from llmfp.fingerprint import SUFFIX, TowerFingerprint, kind, main_tower
from llmfp.fingerprint import load as load_fingerprint

SCHEMA = "llmfp.null/1"
KINDS = tuple(prefix + tower for prefix in ("", "seq2seq ") for tower in ("decoder", "encoder", "vision", "cross"))
_LIMIT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class NullModel:
    """A model that stands for its family; `tower` where more than its σ is known."""

    name: str
    family: str
    kind: str
    decimals: int | None
    std: StdCurves
    tower: TowerFingerprint | None = None


@dataclass(frozen=True, slots=True)
class Stranger:
    """A family's model beside each of the two that are compared: mean Pearson over the roles that these share."""

    family: str
    kind: str
    a: float
    b: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pair's mean Pearson stands among the n families of its kind; the less favourable of both turns.

    percentile  per cent of the families whose score is below the pair's
    p_value     (1 + #{null ≥ score}) / (1 + n), at least smallest_p
    everywhere  by role and for the mean, over families of every kind: (scores below the pair's, families); for display
    strangers   every family that has a score, whatever its kind; for display
    """

    kind: str
    families: tuple[str, ...]
    n: int
    percentile: float
    p_value: float
    smallest_p: float
    everywhere: dict[str, tuple[int, int]]
    strangers: tuple[Stranger, ...]


def place(a: StdCurves, b: StdCurves, kind: str, models: Sequence[NullModel]) -> Place | Missing:
    """The place of two models' score among those of unrelated families. Checked against a plain loop."""
    roles = [role for role in map(str, ROLES) if pearson_mean(a, b, [role]) is not None]
    if not roles:
        return Missing("no role has a score")
    below, families = _below(a, b, [model for model in models if model.kind == kind], roles)
    n = len(families)
    if not n:
        return Missing(f"no unrelated {kind} is known whose σ these could be scored against")
    everywhere = {}
    for name, scored in (*((role, [role]) for role in roles), ("mean", roles)):
        count, others = _below(a, b, models, scored)
        everywhere[name] = count, len(others)
    return Place(
        kind, families, n, 100 * below / n, (1 + n - below) / (1 + n), 1 / (1 + n), everywhere,
        _strangers(a, b, models, roles),
    )  # fmt: skip


def _strangers(a: StdCurves, b: StdCurves, models: Sequence[NullModel], roles: Sequence[str]) -> tuple[Stranger, ...]:
    found = []
    for model in models:
        beside_a, beside_b = (pearson_mean(each, model.std, roles) for each in (a, b))
        if beside_a is not None and beside_b is not None:
            found.append(Stranger(model.family, model.kind, beside_a, beside_b))
    return tuple(found)


def load(path: str | os.PathLike[str] | None = None) -> tuple[NullModel, ...]:
    """One model per family: those shipped, then those of a file or of a directory of fingerprints, each a family.

    Raises LlmfpError, naming file and model.
    """
    models = _read(Path(str(files("llmfp.evidence") / "null.json")))
    if path is not None:
        models += _fingerprints(Path(path)) if Path(path).is_dir() else _read(Path(path))
    first: dict[tuple[str, str], NullModel] = {}
    for model in models:
        first.setdefault((model.kind, model.family), model)
    return tuple(first.values())


def _fingerprints(folder: Path) -> tuple[NullModel, ...]:
    files_ = sorted(folder.rglob(f"*{SUFFIX}"))
    if not files_:
        raise LlmfpError(f"{folder}: no fingerprints (*{SUFFIX}) in it", hint="llmfp-fast scan SOURCE --out makes one")
    models: list[NullModel] = []
    seen: dict[str, Path] = {}
    for file in files_:
        found = load_fingerprint(file)
        if (other := seen.setdefault(found.digest, file)) != file:
            raise LlmfpError(f"{file}: the same weights as {other}", hint="keep one fingerprint of every family")
        name = main_tower(found.towers)
        tower = found.towers[name]
        models.append(
            NullModel(
                found.source["name"], file.relative_to(folder).as_posix(), kind(found, name), None, tower.std, tower
            )
        )
    return tuple(models)


def _below(
    a: StdCurves, b: StdCurves, models: Sequence[NullModel], roles: Sequence[str]
) -> tuple[int, tuple[str, ...]]:
    """How many of these models score below the pair, in the less favourable turn, and the families with a score."""
    families, counts = [], [0, 0]
    for model in models:
        turns = [_ranks_below(base, other, model, roles) for base, other in ((a, b), (b, a))]
        if None not in turns:
            families.append(model.family)
            counts = [count + bool(turn) for count, turn in zip(counts, turns, strict=True)]
    return min(counts), tuple(families)


def _ranks_below(base: StdCurves, other: StdCurves, model: NullModel, roles: Sequence[str]) -> bool | None:
    """Whether the base scores lower with the null model than with the other, rounded alike; None without a score."""
    null = pearson_mean(base, model.std, roles)
    score = pearson_mean(base, _rounded(other, model.decimals), roles)
    return None if null is None or score is None else null < score


def _rounded(stds: StdCurves, decimals: int | None) -> StdCurves:
    """Rounding costs correlation. Whoever is ranked among models known to 3 decimals is known to 3 decimals."""
    if decimals is None:
        return stds
    return {role: [None if std is None else round(std, decimals) for std in column] for role, column in stds.items()}


def _read(path: Path) -> list[NullModel]:
    content = strict_json.read_object(path, _LIMIT_BYTES)
    if content.get("schema") != SCHEMA:
        raise LlmfpError(f"{path}: schema {strict_json.shown(content.get('schema'))} is not {SCHEMA}")
    models = content.get("models")
    if not isinstance(models, list):
        raise LlmfpError(f"{path}: 'models' is not a list")
    return [_model(each, f"{path}: model {n}") for n, each in enumerate(models)]


def _model(content: Any, where: str) -> NullModel:
    if not isinstance(content, dict):
        raise LlmfpError(f"{where} is not an object")
    for key in ("name", "family", "kind"):
        if not isinstance(content.get(key), str):
            raise LlmfpError(f"{where}: {key!r} is not a text")
    if content["kind"] not in KINDS:
        raise LlmfpError(f"{where}: kind {strict_json.shown(content['kind'])} is none of {', '.join(KINDS)}")
    decimals, std = content.get("decimals"), content.get("std")
    if decimals is not None and (type(decimals) is not int or not 0 <= decimals <= 20):
        raise LlmfpError(f"{where}: 'decimals' is not a number of decimals")
    if not isinstance(std, dict) or set(std) != set(map(str, ROLES)):
        raise LlmfpError(f"{where}: 'std' does not hold q, k, v and o")
    for role, column in std.items():
        if not isinstance(column, list) or not all(each is None or _is_std(each) for each in column):
            raise LlmfpError(f"{where}: std of {role} is not a list of standard deviations")
    return NullModel(content["name"], content["family"], content["kind"], decimals, std)


def _is_std(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e300
