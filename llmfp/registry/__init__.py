"""Fingerprints that are kept: immutable files keyed by (repo, revision), and a Parquet index over them.

    REGISTRY/registry.json                                the schema
    REGISTRY/fingerprints/ab/<key>-<entry>.fp.safetensors what `scan` made; key = sha256 of repo and revision
    REGISTRY/index/*.parquet                              a row each (index.py); DuckDB, pandas, datasets read it
    REGISTRY/removed/<entry>                              which of them no longer count
    REGISTRY/failures/<key>.json                          what a batch could not read, and why

A fingerprint's file is written before its row. Between the two a writer may be killed; whoever adds the same key next
finds the file and writes the row alone. No file is ever changed, so any number of writers need no lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from llmfp import fingerprint as fingerprints
from llmfp.checkpoint import strict_json
from llmfp.errors import CheckpointError, FingerprintError
from llmfp.fingerprint import Fingerprint, TowerFingerprint, kind, main_tower
from llmfp.registry.index import ROLES, Compaction, Index
from llmfp.registry.store import RegistryError, Store, open_store
from llmfp.report import printable

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Failure", "Origin", "Problem", "Registry", "RegistryError"]

SCHEMA = "llmfp.registry/1"
_ABOUT, _FILES, _FAILURES = "registry.json", "fingerprints", "failures"
_MAX_SMALL_BYTES = 1 << 20
_MAX_FINGERPRINT_BYTES = 256 << 20
_LONGEST_NAME = 512
_MOST_BASES = 64
_ENTRY = re.compile(r"[0-9a-f]{32}")
_FILE = re.compile(rf"(?P<key>[0-9a-f]{{64}})-(?P<entry>[0-9a-f]{{32}}){re.escape(fingerprints.SUFFIX)}")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a fingerprint comes from, as far as the fingerprint does not say so itself.

    revision             the commit, or "digest:…" of the weights where there is none
    base_models          what the model card declares, and base_model_relation how (finetune, adapter, merge, quantized)
    weights              sha256 over the sha256 of all weight files, where those are known; config: over what
                         config.json says of the model. Both equal: the same fingerprint, whatever the repo
    stamp                sha256 over place, size and time of change of local files, which tells that they are unchanged
    """

    repo: str
    revision: str
    base_models: tuple[str, ...] = ()
    base_model_relation: str | None = None
    weights: str | None = None
    config: str | None = None
    stamp: str | None = None

    @property
    def key(self) -> str:
        return key_of(self.repo, self.revision)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a model could not be fingerprinted. revision: the commit, or the stamp of local files."""

    repo: str
    revision: str
    reason: str


@dataclass(frozen=True, slots=True)
class Problem:
    """What `verify` found wrong: with which file, and what."""

    file: str
    reason: str


class Registry:
    """A registry at a directory or an fsspec URL. Safe for any number of writers and readers at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._index = Index(store)

    @classmethod
    def open(cls, where: str | os.PathLike[str], *, create: bool = False) -> Registry:
        """The registry there; `create` makes one where there is nothing. Raises RegistryError, naming the place."""
        store = open_store(where)
        content = store.read(_ABOUT, _MAX_SMALL_BYTES)
        if content is None:
            if not create:
                raise RegistryError(
                    f"{where}: no registry", hint="llmfp-fast registry add and llmfp-fast batch make one"
                )
            if store.names(""):
                raise RegistryError(f"{where}: not empty, and no registry", hint="name a new or an empty directory")
            store.write(_ABOUT, json.dumps({"schema": SCHEMA}).encode())
            return cls(store)
        try:
            schema = strict_json.parse_object(content, f"{where}/{_ABOUT}").get("schema")
        except CheckpointError as error:
            raise RegistryError(str(error)) from None
        if schema != SCHEMA:
            raise RegistryError(
                f"{where}: schema {strict_json.shown(schema)} is not {SCHEMA}", hint="a newer llmfp may read it"
            )
        return cls(store)

    @property
    def where(self) -> str:
        return self._store.where

    # --- what is in it

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The index in the order of (repo, revision), a row for each key; docs/registry.md says what columns mean."""
        return self._index.read(columns)

    def load(self, row: Mapping[str, Any]) -> Fingerprint:
        """The fingerprint of a row with repo, revision and entry."""
        name = _file_name(key_of(row["repo"], row["revision"]), row["entry"])
        with self._store.path(name) as path:
            return fingerprints.load(path)

    def digest(self) -> str:
        """sha256 over (repo, revision, digest) of every row: the same models with the same numbers, however added."""
        hashed = hashlib.sha256()
        for row in self.table(["repo", "revision", "digest"]).to_pylist():
            hashed.update(json.dumps([row["repo"], row["revision"], row["digest"]]).encode() + b"\n")
        return hashed.hexdigest()

    # --- what changes it

    def add(self, added: Iterable[tuple[Fingerprint, Origin]]) -> list[dict[str, Any]]:
        """Keeps fingerprints; returns their rows. What is there already, under the same key, stays as it is.

        Raises RegistryError for a key that holds other numbers, for samples, and for what the store will not write.
        """
        rows = []
        for fingerprint, origin in added:
            origin = _checked(origin)
            if fingerprint.sample is not None:
                raise RegistryError(
                    f"{origin.repo}: rests on a sample, and a registry keeps what whole scans found",
                    hint="scan it without --sample",
                )
            held = self._held(origin)
            if held is None:
                content, entry = fingerprint.to_bytes(), uuid.uuid4().hex
                self._store.write(_file_name(origin.key, entry), content)
            else:
                kept, content, entry = held
                if kept.digest != fingerprint.digest:
                    raise RegistryError(
                        f"{self.where}: {origin.repo}@{origin.revision} is kept with digest {kept.digest[:16]}…, not "
                        f"{fingerprint.digest[:16]}…",
                        hint="fingerprints do not change; remove the one that is wrong with registry rm",
                    )
                fingerprint = kept
            rows.append(_row(fingerprint, origin, entry, hashlib.sha256(content).hexdigest()))
        if rows:
            self._index.append(rows)
        return rows

    def adopt(self, origin: Origin) -> dict[str, Any] | None:
        """The row of a fingerprint whose writer was killed before it wrote one, now written; None if there is none."""
        origin = _checked(origin)
        held = self._held(origin)
        return None if held is None else self.add([(held[0], origin)])[0]

    def remove(self, repo: str, revision: str | None = None) -> list[tuple[str, str]]:
        """Takes out a repo's fingerprints, all or those whose revision begins so; returns the keys that are gone."""
        rows = [
            row
            for row in self._index.read_all(["repo", "revision", "entry"]).to_pylist()
            if row["repo"] == repo and row["revision"].startswith(revision or "")
        ]
        self._discard(rows)
        return sorted({(row["repo"], row["revision"]) for row in rows})

    def compact(self) -> Compaction:
        """Puts the index into one file, and lets go of what was added twice."""
        self._discard(self._index.superseded())
        self._store.sweep()
        return self._index.compact()

    def index_files(self) -> int:
        """How many files the index has; each costs a reader about a millisecond."""
        return self._index.files()

    def verify(self) -> Iterator[Problem]:
        """Reads every fingerprint and yields what does not hold: a missing or altered file, a file without a row."""
        rows = self._index.read_all().to_pylist()
        expected = set()
        for row in rows:
            name = row["file"]
            expected.add(name)
            if not _ENTRY.fullmatch(row["entry"]) or name != _file_name(
                key_of(row["repo"], row["revision"]), row["entry"]
            ):
                yield Problem(name, f"is not where {row['repo']}@{row['revision']} belongs")
            elif reason := self._amiss(row):
                yield Problem(name, reason)
        removed = self._index.removed()
        for directory in (_directory(f"{n:02x}") for n in range(256)):
            for name in self._store.names(directory):
                entry = _FILE.fullmatch(name.rsplit("/", 1)[-1])
                if entry is None:
                    yield Problem(name, "is no fingerprint of this registry")
                elif name not in expected:
                    gone = entry["entry"] in removed
                    yield Problem(
                        name, "was removed" if gone else "has no row; adding the same model again will write it"
                    )

    # --- what could not be read

    def failures(self) -> list[Failure]:
        found = []
        for name in self._store.names(_FAILURES):
            content = self._store.read(name, _MAX_SMALL_BYTES)
            if content is None:
                continue
            try:
                saved = strict_json.parse_object(content, f"{self.where}/{name}")
                failure = Failure(*(str(saved[key]) for key in ("repo", "revision", "reason")))
            except (CheckpointError, KeyError) as error:
                raise RegistryError(f"{self.where}/{name}: not a failure's record ({error})") from None
            found.append(failure)
        return found

    def fail(self, failure: Failure) -> None:
        saved = {"repo": failure.repo, "revision": failure.revision, "reason": failure.reason}
        self._store.write(_failure_name(failure.repo, failure.revision), json.dumps(saved).encode())

    def forgive(self, repo: str, revision: str) -> None:
        """Forgets a failure."""
        self._store.delete(_failure_name(repo, revision))

    # --- files

    def _held(self, origin: Origin) -> tuple[Fingerprint, bytes, str] | None:
        """The fingerprint that is kept under a key, its bytes and its entry, whether or not a row says so."""
        prefix = f"{origin.key}-"
        names = self._store.names(_directory(origin.key), prefix)
        removed = self._index.removed() if names else set()
        for name in names:
            found = _FILE.fullmatch(name.rsplit("/", 1)[-1])
            if found is None or found["entry"] in removed:
                continue
            content = self._store.read(name, _MAX_FINGERPRINT_BYTES)
            if content is None:
                continue
            with self._store.path(name) as path:
                return fingerprints.load(path), content, found["entry"]
        return None

    def _amiss(self, row: Mapping[str, Any]) -> str | None:
        content = self._store.read(row["file"], _MAX_FINGERPRINT_BYTES)
        if content is None:
            return "is missing"
        if hashlib.sha256(content).hexdigest() != row["sha256"]:
            return "is not the file that was added: its sha256 is another"
        try:
            kept = self.load(row)
        except FingerprintError as error:
            return str(error)
        return None if kept.digest == row["digest"] else "has another digest than its row"

    def _discard(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """First entries no longer count, then their files go."""
        gone = {row["entry"]: _file_name(key_of(row["repo"], row["revision"]), row["entry"]) for row in rows}
        self._index.remove(gone)
        for name in gone.values():
            self._store.delete(name)


def key_of(repo: str, revision: str) -> str:
    """64 hex digits. A repo's name is a stranger's text and never part of a path."""
    return hashlib.sha256(json.dumps([repo, revision]).encode()).hexdigest()


def _directory(key: str) -> str:
    return f"{_FILES}/{key[:2]}"


def _file_name(key: str, entry: str) -> str:
    if not _ENTRY.fullmatch(entry):
        raise RegistryError(f"entry {strict_json.shown(entry)} is not 32 hex digits")
    return f"{_directory(key)}/{key}-{entry}{fingerprints.SUFFIX}"


def _failure_name(repo: str, revision: str) -> str:
    return f"{_FAILURES}/{key_of(repo, revision)}.json"


def _checked(origin: Origin) -> Origin:
    """The origin as it may be kept: one line of valid text each, and no more of it than a name needs."""
    for what, text in (("repo", origin.repo), ("revision", origin.revision)):
        if not text or len(text) > _LONGEST_NAME:
            raise RegistryError(f"the {what} {strict_json.shown(text)} has {len(text)} characters, not 1 to 512")
    bases = tuple(printable(base)[:_LONGEST_NAME] for base in origin.base_models[:_MOST_BASES])
    relation = origin.base_model_relation
    return replace(
        origin,
        repo=printable(origin.repo),
        revision=printable(origin.revision),
        base_models=bases,
        base_model_relation=None if relation is None else printable(relation)[:_LONGEST_NAME],
    )


def _row(fingerprint: Fingerprint, origin: Origin, entry: str, sha256: str) -> dict[str, Any]:
    """The row of a fingerprint. The tower is the main one; σ are its."""
    tower, main = main_tower(fingerprint.towers), fingerprint.main
    return {
        "repo": origin.repo,
        "revision": origin.revision,
        "entry": entry,
        "file": _file_name(origin.key, entry),
        "sha256": sha256,
        "digest": _text(fingerprint.digest),
        "architecture": _text(fingerprint.architecture),
        "tower": tower,
        "kind": kind(fingerprint, tower),
        "model_type": _text(fingerprint.source.get("model_type")),
        "heads": main.heads,
        "kv_heads": main.kv_heads,
        "head_dim": main.head_dim,
        "layers": len(main.layers),
        "hidden_size": main.hidden_size,
        **{f"std_{role}": main.std[role] for role in ROLES},
        "rotary_pairs": None if main.rotary is None else main.rotary.pairs,
        "coherence": _sketch(main),
        "base_models": list(origin.base_models),
        "base_model_relation": origin.base_model_relation,
        "weights": origin.weights,
        "config": origin.config,
        "stamp": origin.stamp,
        "bytes_read": int(fingerprint.run["bytes_read"]),
        "bytes_total": int(fingerprint.run["bytes_total"]),
        "added": datetime.now(UTC),
    }


def _sketch(tower: TowerFingerprint) -> list[float] | None:
    if tower.circuits is None:
        return None
    from llmfp.registry.nearest import sketch

    return sketch(tower)


def _text(value: object) -> str | None:
    """What a stranger's file calls something, as it may be kept."""
    return printable(value)[:_LONGEST_NAME] if isinstance(value, str) else None
