"""What is known of a source beside its weights: its name, its revision, what its card declares, and whether its files
are those of another."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmfp import api, engine
from llmfp.checkpoint.specs import sha256_of_hub_blob
from llmfp.errors import CheckpointError, LlmfpError
from llmfp.fingerprint import Fingerprint
from llmfp.model_card import UNDECLARED, Declaration, declaration, read_card
from llmfp.registry import Origin
from llmfp.report import printable

HUB = "hf://"
HUB_ID = re.compile(r"(?:hf://)?(?P<repo>\w[\w.-]*/\w[\w.-]*?)(?:@(?P<revision>[^@\s]+))?", re.ASCII)
_CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")
COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
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


def source(text: str) -> Source | None:
    """The source that a text names, or None where it names none. An existing local path wins over a Hub id."""
    with contextlib.suppress(OSError, ValueError):  # longer than a name may be, or with a zero byte: no path
        if Path(text).exists():
            return local(Path(text))
    if text.startswith("https://"):
        place = text.partition("?")[0]
        stamp = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()
        return Source(text, printable(place), stamp, stamp=stamp)
    found = HUB_ID.fullmatch(text)
    if found is None:
        return None
    revision = found["revision"] or "main"
    commit = revision if COMMIT.fullmatch(revision) else None
    return Source(f"{HUB}{found['repo']}@{revision}", found["repo"], revision, commit)


def known(text: str) -> Source:
    """As `source`. Raises CheckpointError where the text names none."""
    found = source(text)
    if found is None:
        raise CheckpointError(
            f"{text}: no such file or directory", hint="give a path, org/name[@revision] or an https URL"
        )
    return found


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
    if not configs:  # it was kept in a file, and knows best where it comes from
        about = fingerprint.source
        source = replace(source, repo=printable(str(about["name"])), revision=about.get("revision"), weights=None)
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


def ask(source: Source) -> Source:
    """The source with what the Hub says of it: commit, sha256 of the weights, declared bases. Raises LlmfpError."""
    if not source.text.startswith(HUB):
        return source
    revision = source.text.rpartition("@")[2]
    with explained(source.repo):
        info = hub_api().model_info(source.repo, revision=revision, files_metadata=True)
        if not info.sha or not COMMIT.fullmatch(info.sha):
            raise LlmfpError(f"{source.repo}: the Hub names no commit for {revision}")
        hashes = {
            each.rfilename: each.lfs.sha256 if each.lfs else None
            for each in info.siblings or []
            if each.rfilename.endswith(_WEIGHTS)
        }
        card = info.card_data.to_dict() if info.card_data else {}
    return replace(
        source,
        text=f"{HUB}{source.repo}@{info.sha}",
        revision=info.sha,
        declared=declaration(card),
        weights=weights_of(hashes),
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


def hub_api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


@contextmanager
def explained(what: str) -> Iterator[None]:
    """What the Hub's client raises becomes one line about this repo or author."""
    try:
        yield
    except LlmfpError:
        raise
    except Exception as error:
        import huggingface_hub.errors as hub

        match error:
            case hub.GatedRepoError():
                reason, hint = "gated: this token may not read it", "ask for access on its page and set HF_TOKEN"
            case hub.RevisionNotFoundError():
                reason, hint = "no such revision", "leave @revision out for the newest"
            case hub.RepositoryNotFoundError():
                reason, hint = "no such model, or a private one", "set HF_TOKEN where it is private"
            case hub.OfflineModeIsEnabled():
                reason, hint = "HF_HUB_OFFLINE is set", "unset it, or list local paths"
            case _:
                line = str(error).strip().split("\n", 1)[0][:200]
                reason, hint = f"the Hub does not answer ({line or type(error).__name__})", ""
        raise LlmfpError(f"{printable(what)}: {reason}", hint=hint) from None
