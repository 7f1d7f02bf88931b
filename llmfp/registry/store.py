"""Where a registry's files lie: names to bytes, each file whole or absent, whoever is killed when.

Names are relative, with "/" between parts, and made here from hex digits, never from a stranger's text. Two places:

    LocalStore   a directory. On Linux a file is written without a name, made durable, and then linked under its own:
                 a process that is killed leaves nothing at all. Elsewhere it is written beside and renamed.
    RemoteStore  any fsspec URL (s3://, gs://, memory://, …): written beside and moved, which is one rename on file
                 systems and a server-side copy on object stores; both appear whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from llmfp.errors import LlmfpError

PARTIAL = ".partial"
_STALE_SECONDS = 86_400
"""A partial file this old belongs to nobody who is still writing."""
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}
"""How kernels and file systems say that they know no unnamed files."""


class RegistryError(LlmfpError):
    """The registry cannot be read or written, or holds what no version of llmfp wrote."""


class Store(Protocol):
    """The few verbs a registry needs. All raise RegistryError, naming the file."""

    where: str

    def names(self, directory: str, prefix: str = "") -> list[str]:
        """The files of a directory whose own names begin so, as relative names; none where there is no directory."""

    def read(self, name: str, limit: int) -> bytes | None:
        """A file's content, None where there is no such file. Raises for one over `limit` bytes, before reading it."""

    def write(self, name: str, content: bytes) -> None:
        """Makes a file with this content, replacing what had the name."""

    def delete(self, name: str) -> None:
        """Removes a file; it may be gone already."""

    def path(self, name: str) -> AbstractContextManager[Path]:
        """A local path to read the file at; a copy where the store is remote."""

    def sweep(self) -> int:
        """Removes partial files that killed writers left long ago, and says how many."""


def open_store(where: str | os.PathLike[str]) -> Store:
    """The store at a directory or an fsspec URL."""
    text = os.fspath(where)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return RemoteStore(text) if "://" in text else LocalStore(Path(text))


class LocalStore:
    """A directory on this machine, or on a file system that many machines share."""

    def __init__(self, root: Path) -> None:
        self.where, self._root = str(root), root
        self._unnamed = hasattr(os, "O_TMPFILE")

    def names(self, directory: str, prefix: str = "") -> list[str]:
        try:
            with os.scandir(self._root / directory) as entries:
                found = [e.name for e in entries if e.name.startswith(prefix) and not e.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _failed(self._root / directory, error) from None
        return [f"{directory}/{name}" if directory else name for name in sorted(found)]

    def read(self, name: str, limit: int) -> bytes | None:
        path = self._root / name
        try:
            if path.exists() and not path.is_file():  # opening a named pipe would wait for ever
                raise RegistryError(f"{path}: not a regular file")
            with path.open("rb") as file:
                _check_size(str(path), os.fstat(file.fileno()).st_size, limit)
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _failed(path, error) from None

    def write(self, name: str, content: bytes) -> None:
        path = self._root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not (self._unnamed and self._link(path, content)):
                self._rename(path, content)
            _make_durable(path.parent)
        except OSError as error:
            raise _failed(path, error) from None

    def _link(self, path: Path, content: bytes) -> bool:
        """Writes a file that has no name until it is whole; False where the file system knows none."""
        try:
            descriptor = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
            self._unnamed = False
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
            try:
                # With a directory's descriptor, unused, Python calls linkat, which alone follows this link.
                os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor, follow_symlinks=True)
            except FileExistsError:
                return False  # rare: a name that is there is replaced by renaming
            except OSError:
                self._unnamed = False  # no /proc
                return False
        return True

    def _rename(self, path: Path, content: bytes) -> None:
        partial = path.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        try:
            (self._root / name).unlink(missing_ok=True)
        except OSError as error:
            raise _failed(self._root / name, error) from None

    @contextmanager
    def path(self, name: str) -> Iterator[Path]:
        yield self._root / name

    def sweep(self) -> int:
        swept, before = 0, time.time() - _STALE_SECONDS
        for partial in self._root.rglob(f".*{PARTIAL}"):
            with contextlib.suppress(OSError):
                if partial.stat().st_mtime < before:
                    partial.unlink()
                    swept += 1
        return swept


class RemoteStore:
    """What fsspec reaches by a URL."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError:
            raise RegistryError(f"{url}: fsspec is not installed", hint="pip install 'llmfp[registry]'") from None
        self.where = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError, OSError) as error:
            raise RegistryError(f"{url}: {_line(error)}", hint="give a directory or a URL that fsspec knows") from None

    def names(self, directory: str, prefix: str = "") -> list[str]:
        with self._explained(directory):
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(self._at(directory), detail=True)
            except FileNotFoundError:
                return []
            found = [str(e["name"]).rstrip("/").rsplit("/", 1)[-1] for e in entries]
            found = [name for name in found if name.startswith(prefix) and not name.startswith(".")]
            return [f"{directory}/{name}" if directory else name for name in sorted(found)]

    def read(self, name: str, limit: int) -> bytes | None:
        with self._explained(name):
            try:
                self._fs.invalidate_cache()
                _check_size(f"{self.where}/{name}", int(self._fs.size(self._at(name)) or 0), limit)
                content: bytes = self._fs.cat_file(self._at(name))
            except FileNotFoundError:
                return None
            return content

    def write(self, name: str, content: bytes) -> None:
        directory, _, own = name.rpartition("/")
        partial = f"{directory}/.{own}.{uuid.uuid4().hex}{PARTIAL}".lstrip("/")
        with self._explained(name):
            self._fs.makedirs(self._at(directory), exist_ok=True)
            self._fs.pipe_file(self._at(partial), content)
            self._fs.mv(self._at(partial), self._at(name))

    def delete(self, name: str) -> None:
        with self._explained(name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    @contextmanager
    def path(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="llmfp-") as directory:
            local = Path(directory) / name.rsplit("/", 1)[-1]
            with self._explained(name), contextlib.suppress(FileNotFoundError):
                self._fs.get_file(self._at(name), str(local))
            yield local

    def sweep(self) -> int:
        swept, before = 0, time.time() - _STALE_SECONDS
        with self._explained("."):
            for name, facts in self._fs.find(self._root, withdirs=False, detail=True).items():
                changed = facts.get("mtime") or facts.get("LastModified") or facts.get("created")
                seconds = changed.timestamp() if hasattr(changed, "timestamp") else changed
                if str(name).endswith(PARTIAL) and isinstance(seconds, int | float) and seconds < before:
                    self._fs.rm_file(name)
                    swept += 1
        return swept

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}".rstrip("/")

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Storage libraries raise what they like; the user gets one line."""
        try:
            yield
        except LlmfpError:
            raise
        except Exception as error:
            raise RegistryError(f"{self.where}/{name}: {_line(error)}") from None


def _check_size(what: str, nbytes: int, limit: int) -> None:
    if nbytes > limit:
        raise RegistryError(f"{what}: {nbytes} bytes is over the limit of {limit}")


def _make_durable(directory: Path) -> None:
    """Without this a power cut may keep a later file and lose an earlier one."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _failed(path: Path, error: OSError) -> RegistryError:
    return RegistryError(f"{path}: {error.strerror or error}")


def _line(error: Any) -> str:
    return str(error).split("\n", 1)[0][:200] or type(error).__name__
