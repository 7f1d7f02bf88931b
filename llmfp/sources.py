"""What is known of a source beside its weights: its name, its revision, what its card declares, and whether its files
are those of another."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfp import api, engine
from llmfp.checkpoint.specs import sha256_of_hub_blob
from llmfp.errors import CheckpointError
from llmfp.fingerprint import Fingerprint
from llmfp.hub.settings import Settings
from llmfp.hub.source import HubId, WeightUrl, looks_remote, parse_source
from llmfp.model_card import UNDECLARED, Declaration, declaration, read_card
from llmfp.registry import Origin
from llmfp.report import printable

if TYPE_CHECKING:
    from llmfp.hub.client import Client

_CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")
COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
_LONGEST_SHOWN = 200
_MOST_FILES = 100_000
_VOLATILE = {"_name_or_path", "_commit_hash", "transformers_version", "use_cache", "torch_dtype", "dtype"}
"""What config.json may say otherwise though the model is the same."""


@dataclass(frozen=True, slots=True)
class Source:
    """One checkpoint. text: what `llmfp.scan` takes; revision: the commit, where it is known before reading.

    asked  what identifies it before anything was asked about it: revision, stamp, or the revision's name
    """

    text: str
    repo: str
    asked: str
    revision: str | None = None
    declared: Declaration = UNDECLARED
    weights: str | None = None
    stamp: str | None = None
    hub: HubId | None = None

    def origin(self, digest: str, config: str | None) -> Origin:
        """What the registry keeps beside the fingerprint with this digest."""
        return Origin(
            self.repo,
            self.revision or f"digest:{digest}",
            self.declared.base_models,
            self.declared.relation,
            self.weights,
            config,
            self.stamp,
        )


def known(text: str) -> Source:
    """The source that a text names: an existing local path before a model of the Hub. Raises LlmfpError for neither."""
    if not looks_remote(text):
        path = Path(text)
        try:
            there = path.exists()
        except (OSError, ValueError):  # longer than a name may be, or with a zero byte
            there = False
        if not there:
            raise CheckpointError(
                f"{text[:_LONGEST_SHOWN]}: no such file or directory",
                hint="give a path, ORG/NAME[@REVISION] or the address of a weight file",
            )
        return local(path)
    found = parse_source(text, Settings.from_environment().endpoint)
    if isinstance(found, WeightUrl):
        stamp = hashlib.sha256(found.shown.encode("utf-8", "surrogateescape")).hexdigest()
        return Source(text, printable(found.shown), stamp, stamp=stamp)
    return on_the_hub(found)


def on_the_hub(named: HubId) -> Source:
    """A model of the Hub, or one weight file of it, which is kept under a name of its own."""
    revision = named.revision or "main"
    repo = named.repo if named.file is None else f"{named.repo}/{named.file}"
    return Source(
        f"hf://{named}", repo, revision, revision if COMMIT.fullmatch(revision) else None, hub=named
    )  # fmt: skip


def fingerprinted(
    source: Source, reading: Mapping[str, Any], progress: engine.Progress | None = None
) -> tuple[Fingerprint, Origin]:
    """The fingerprint of a source and where it comes from. reading: what `llmfp.scan` takes beside the source."""
    configs: list[str] = []
    fingerprint = api.scan(
        source.text,
        planned=lambda plan: configs.append(config_of(plan.checkpoint.config)),
        progress=progress,
        **reading,
    )
    about = fingerprint.source
    if not configs:  # it was kept in a file, and knows best where it comes from
        source = replace(source, repo=printable(str(about["name"])), revision=None, weights=None)
    revision = about.get("revision")
    if source.revision is None and isinstance(revision, str):
        source = replace(source, revision=revision)
    return fingerprint, source.origin(fingerprint.digest, configs[0] if configs else None)


def local(path: Path) -> Source:
    """A directory or a file on this machine. Nothing of its weights is read, nor of their headers."""
    absolute = path.absolute()
    folder = absolute if absolute.is_dir() else absolute.parent
    cached = _CACHED.fullmatch(folder.parent.parent.name) if COMMIT.fullmatch(folder.name) else None
    repo = f"{cached['owner']}/{cached['name']}" if cached else printable(absolute.name) or "/"
    try:
        files = _files(absolute)
        stamp = _stamp(absolute, files)
    except OSError:
        files, stamp = [], hashlib.sha256(os.fsencode(absolute)).hexdigest()  # reading it will say what is wrong
    hashes = {file.name: sha256_of_hub_blob(file) for file in files if file.suffix in _WEIGHTS}
    revision = folder.name if cached and absolute.is_dir() else None
    declared = read_card(folder)
    return Source(os.fspath(path), repo, revision or stamp, revision, declared, weights_of(hashes), stamp)


def ask(source: Source, client: Client | None = None) -> Source:
    """The source with what the Hub says of it: commit, sha256 of the weights, declared bases. Raises HubError.

    Nothing is asked about other sources, nor offline, where only the Hub's cache can have it.
    """
    if source.hub is None:
        return source
    from llmfp.hub.client import Client as Conversation
    from llmfp.hub.repository import describe

    with Conversation() if client is None else client.branch() as own:
        if own.settings.offline:
            return source
        info = describe(own, source.hub.repo, source.hub.revision)
    at_commit = replace(source.hub, revision=info.revision)
    hashes = {name: file.sha256 for name, file in info.files.items() if name.endswith(_WEIGHTS)}
    declared = declaration({"base_model": list(info.base_models), "base_model_relation": info.relation})
    return replace(
        source,
        text=f"hf://{at_commit}",
        hub=at_commit,
        revision=info.revision,
        declared=declared,
        weights=weights_of(hashes) if source.hub.file is None else None,
    )


def weights_of(hashes: Mapping[str, str | None]) -> str | None:
    """One sha256 for the sha256 of all weight files by name; None where one is unknown, and for adapters, whose
    fingerprint depends on the model below."""
    chosen = {name: sha for name, sha in hashes.items() if name.endswith(".safetensors")} or hashes
    if not chosen or None in chosen.values() or any("adapter" in name for name in chosen):
        return None
    return hashlib.sha256("\n".join(sorted(map(str, chosen.values()))).encode()).hexdigest()


def config_of(config: Mapping[str, Any]) -> str:
    """sha256 of what a config.json says of a model, wherever it came from."""
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode("utf-8", "backslashreplace")).hexdigest()


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(itertools.islice(path.iterdir(), _MOST_FILES))


def _stamp(path: Path, files: Iterable[Path]) -> str:
    """sha256 over place, names, sizes and times of change: another stamp, and the files may be other ones."""
    hashed = hashlib.sha256(os.fsencode(path))
    for file in files:
        status = file.stat()
        if stat.S_ISREG(status.st_mode):
            hashed.update(os.fsencode(file.name) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return hashed.hexdigest()
