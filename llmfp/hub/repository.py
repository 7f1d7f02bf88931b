"""A model of the Hub, or a weight file at an address, as a `Checkpoint`: the same parsers as for files on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from llmfp.checkpoint import Checkpoint, strict_json
from llmfp.checkpoint.directory import choose, is_inside, open_checkpoint, open_folder
from llmfp.checkpoint.stored_file import Folder, StoredFile
from llmfp.errors import CheckpointError, HubError, LlmfpError
from llmfp.hub.client import Client
from llmfp.hub.remote_file import RemoteFile, SmallRemoteFile
from llmfp.hub.settings import Settings, is_local
from llmfp.hub.source import HubId, WeightUrl, parse_source

_LISTING_BYTES = 64 << 20
_MOST_FILES = 200_000
_AT_ONCE = 8
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class RepoFile:
    """nbytes: None where the Hub does not say; oid: git's SHA-1; sha256: of git LFS, None for small files."""

    name: str
    nbytes: int | None
    oid: str | None
    sha256: str | None


@dataclass(frozen=True, slots=True)
class RepoInfo:
    """A model at one commit.

    base_models, relation   what its card declares: base_model and base_model_relation (finetune, adapter, merge,
                            quantized), empty and None where it declares nothing
    """

    repo: str
    revision: str
    files: Mapping[str, RepoFile]
    base_models: tuple[str, ...]
    relation: str | None
    pipeline_tag: str | None
    last_modified: str | None

    def weights_sha256(self, names: Sequence[str]) -> tuple[str, ...] | None:
        """The hashes of these files, by which identical uploads are known; None where any is missing."""
        found = [
            each.sha256 for name in names if (each := self.files.get(name)) is not None and each.sha256 is not None
        ]
        return tuple(found) if len(found) == len(names) else None


def describe(client: Client, repo: str, revision: str | None = None) -> RepoInfo:
    """What the Hub says of a model: its commit, files with hashes, and card. One API call. Raises HubError."""
    if client.settings.offline:
        raise HubError(f"{repo}: HF_HUB_OFFLINE is set", hint="unset it, or give the path of a local copy")
    what = quote(revision or "main", safe="")
    url = f"{client.settings.endpoint}/api/models/{repo}/revision/{what}?blobs=true"
    name = f"{repo}@{revision}" if revision else repo
    answer, _ = client.json(url, name, _LISTING_BYTES)
    return parse_info(answer, name)


def parse_info(answer: Any, name: str) -> RepoInfo:
    """The Hub's JSON about a model, checked. Raises HubError, naming `name`, for anything that is none."""
    from huggingface_hub import ModelInfo  # 0.2 s

    parsed: Callable[..., Any] = ModelInfo
    try:
        info = parsed(**answer)
        siblings = info.siblings or []
        if len(siblings) > _MOST_FILES:
            raise ValueError(f"{len(siblings)} files")
        files = {each.rfilename: RepoFile(each.rfilename, each.size, each.blob_id, _sha256(each)) for each in siblings}
        repo, sha = info.id, info.sha or ""
        if not isinstance(repo, str) or len(sha) != 40 or set(sha) - set("0123456789abcdef"):
            raise ValueError("no commit")
        for each in files.values():
            if type(each.nbytes) not in (int, type(None)) or not isinstance(each.name, str):
                raise ValueError("no size")
        return RepoInfo(
            repo, sha, {key: each for key, each in files.items() if is_inside(key)}, *_declared(info),
            pipeline_tag=info.pipeline_tag, last_modified=_date(answer.get("lastModified")),
        )  # fmt: skip
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HubError(f"{name}: the Hub's description cannot be understood ({error})") from None


def _sha256(sibling: Any) -> str | None:
    found = sibling.lfs["sha256"] if sibling.lfs else None
    if found is not None and (not isinstance(found, str) or len(found) != 64):
        raise ValueError("no hash")
    return found


def _declared(info: Any) -> tuple[tuple[str, ...], str | None]:
    """base_model of the card, a name or a list, else baseModels as the Hub has understood it."""
    card: Mapping[str, Any] = info.card_data.to_dict() if info.card_data else {}
    stated, relation = card.get("base_model"), card.get("base_model_relation")
    if not stated and isinstance(info.base_models, Mapping):
        stated = [each.get("id") for each in info.base_models.get("models", ())]
        relation = relation or info.base_models.get("relation")
    names = [stated] if isinstance(stated, str) else stated or []
    return tuple(each for each in names if isinstance(each, str)), relation if isinstance(relation, str) else None


def _date(value: object) -> str | None:
    return value if isinstance(value, str) else None


class HubFolder:
    """A model's files at one commit. Weight files expected soon are resolved, and their beginnings fetched, ahead."""

    def __init__(self, client: Client, info: RepoInfo) -> None:
        self.path = Path(f"{info.repo}@{info.revision[:12]}")
        self._client, self._info = client, info
        self._ahead: dict[str, Future[RemoteFile]] = {}
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="header")
        self._expected: list[str] = []

    def names(self) -> list[str]:
        return sorted(name for name in self._info.files if "/" not in name)

    def has(self, name: str) -> bool:
        return name in self._info.files

    def expect(self, names: Sequence[str]) -> None:
        """Says in which order weight files will be opened; only some are fetched ahead, so memory stays bounded."""
        self._expected = [name for name in names if name not in self._ahead]
        self._fetch_ahead()

    def file(self, name: str) -> StoredFile:
        if name in self._ahead:
            found = self._ahead.pop(name).result()
            self._fetch_ahead()
            return found
        if name.endswith(_WEIGHTS):
            return self._weights(name)
        listed = self._info.files[name]
        return SmallRemoteFile(
            self._client, self.path / name, self._url(name), strict_json.MAX_BYTES, oid=listed.oid, sha256=listed.sha256
        )

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _fetch_ahead(self) -> None:
        while self._expected and len(self._ahead) < 2 * _AT_ONCE:
            name = self._expected.pop(0)
            self._ahead[name] = self._pool.submit(self._begun, name)

    def _begun(self, name: str) -> RemoteFile:
        file = self._weights(name)
        file.prefetch()
        return file

    def _weights(self, name: str) -> RemoteFile:
        listed = self._info.files[name]
        return RemoteFile(
            self._client, self.path / name, self._url(name),
            nbytes=listed.nbytes, commit=self._info.revision, sha256=listed.sha256,
        )  # fmt: skip

    def _url(self, name: str) -> str:
        return f"{self._client.settings.endpoint}/{self._info.repo}/resolve/{self._info.revision}/{quote(name)}"


class _UrlFolder:
    """A weight file at an address, and the config.json beside it where there is one."""

    def __init__(self, client: Client, address: WeightUrl, name: str) -> None:
        self.path = Path(address.shown.partition("://")[2]).parent
        self._client, self._address, self._name = client, address, name
        self._config: SmallRemoteFile | None = None
        self._asked = False

    def names(self) -> list[str]:
        return [self._name]

    def has(self, name: str) -> bool:
        return name == self._name or (name == "config.json" and self._beside() is not None)

    def file(self, name: str) -> StoredFile:
        config = self._beside() if name != self._name else None
        return config or RemoteFile(self._client, self.path / name, self._address.url)

    def _beside(self) -> SmallRemoteFile | None:
        """A signed address says nothing about its neighbours; any other may have one."""
        if not self._asked and not urlsplit(self._address.url).query:
            url = urljoin(self._address.url, "config.json")
            config = SmallRemoteFile(self._client, self.path / "config.json", url, 1 << 24, oid=None, sha256=None)
            try:
                self._config = config if config.nbytes else None
            except HubError:
                self._config = None
        self._asked = True
        return self._config


@contextmanager
def _closing(folder: HubFolder, client: Client) -> Iterator[HubFolder]:
    """Ends what is fetched ahead; after an error at once, by ending every connection."""
    try:
        yield folder
    except BaseException:
        client.close()
        raise
    finally:
        folder.close()


def open_remote(client: Client, text: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at a Hub id or an address, headers only; a copy of the same commit in the Hub's cache, if whole.

    The client is closed where this fails. Raises HubError for what servers do, CheckpointError for what the files hold.
    """
    source = parse_source(text, client.settings.endpoint)
    if isinstance(source, WeightUrl):
        return _open_url(client, source)
    if client.settings.offline:
        return _open_cached(client.settings, source)
    info = describe(client, source.repo, source.revision)
    with _closing(HubFolder(client, info), client) as folder:
        names, index = (
            choose(folder) if source.file is None and not _is_adapter(folder) else ([source.file or ""], None)
        )
        if source.file is None and names == [""]:
            raise CheckpointError(
                f"{folder.path}: an adapter; adapters are not read from the Hub", hint="download it, and give --base"
            )
        if source.file is not None and not folder.has(source.file):
            raise CheckpointError(f"{folder.path / source.file}: no such file in this model")
        if (local := _cached(client.settings, info, names, source.file)) is not None:
            return local
        if index is not None or len(names) > 1 or not names[0].endswith(".gguf"):
            folder.expect(names)
        checkpoint = open_folder(folder, source.file)
    return replace(checkpoint, revision=info.revision, repo=info.repo)


def _is_adapter(folder: Folder) -> bool:
    models = [name for name in folder.names() if name.endswith(_WEIGHTS) and not name.startswith("adapter_model")]
    return folder.has(_ADAPTER) and not models


def _open_url(client: Client, address: WeightUrl) -> Checkpoint:
    parts = urlsplit(address.url)
    if parts.scheme == "http" and not is_local(parts.hostname):
        raise HubError(f"{address}: http is read from this machine and private networks alone", hint="use https")
    if client.settings.offline:
        raise HubError(f"{address}: HF_HUB_OFFLINE is set", hint="unset it, or give the path of a local copy")
    name = PurePosixPath(parts.path).name
    if not name or not is_inside(name):
        raise HubError(f"{address}: not the address of a file")
    checkpoint = open_folder(_UrlFolder(client, address, name), name)
    return replace(checkpoint, path=Path(name), url=address.shown)


# --- the cache of huggingface_hub


def _cached(settings: Settings, info: RepoInfo, names: Sequence[str], file: str | None) -> Checkpoint | None:
    """The copy of this commit in the cache, where every file that would be read is there, of the right size."""
    snapshot = _snapshot(settings, info.repo, info.revision)
    needed = [*names, *(name for name in ("config.json",) if name in info.files and file is None)]
    try:
        for name in needed:
            if (snapshot / name).stat().st_size != info.files[name].nbytes:
                return None
        return open_checkpoint(snapshot if file is None else snapshot / file)
    except (OSError, LlmfpError):
        return None


def _open_cached(settings: Settings, source: HubId) -> Checkpoint:
    """Offline: the commit that the cache knows by that name."""
    name = source.revision or "main"
    folder = settings.cache / f"models--{source.repo.replace('/', '--')}"
    try:
        sha = (folder / "refs" / name).read_text(encoding="ascii").strip() if is_inside(name) else name
    except (OSError, UnicodeDecodeError):
        sha = name
    snapshot = _snapshot(settings, source.repo, sha)
    if len(sha) != 40 or set(sha) - set("0123456789abcdef") or not snapshot.is_dir():
        raise HubError(
            f"{source}: not in the Hub's cache, and HF_HUB_OFFLINE is set", hint="unset it, or hf download the model"
        )
    return open_checkpoint(snapshot if source.file is None else snapshot / source.file)


def _snapshot(settings: Settings, repo: str, sha: str) -> Path:
    return settings.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / sha
