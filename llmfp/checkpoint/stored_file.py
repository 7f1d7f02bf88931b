"""One file of a checkpoint, wherever it lies: what header parsers read from.

A parser is given a path, or something that has what `StoredFile` asks for (llmfp.hub.remote_file), and `opened` makes
one of either. So the same strict parser reads a file on disk and one on a server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Protocol

from llmfp.checkpoint.specs import Shard, sha256_of_hub_blob, stamp
from llmfp.errors import CheckpointError


class StoredFile(Protocol):
    """path: what errors call the file; nbytes: its size."""

    @property
    def path(self) -> Path: ...

    @property
    def nbytes(self) -> int: ...

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """The bytes there; fewer only where the file ends. Raises OSError, CheckpointError."""

    def shard(self, header_bytes: int) -> Shard:
        """The file as it is now."""


class Folder(Protocol):
    """The files of a model: a directory, or a repository somewhere else. path: what errors call it."""

    @property
    def path(self) -> Path: ...

    def names(self) -> list[str]:
        """The files directly inside, sorted."""

    def has(self, name: str) -> bool:
        """Whether a file of that name is there, or below in a folder of its own."""

    def file(self, name: str) -> Path | StoredFile:
        """What a parser takes."""


class LocalFolder:
    """A directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        return sorted(file.name for file in self.path.iterdir())

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def file(self, name: str) -> Path:
        return self.path / name


class _OpenFile:
    """A regular file, opened."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path = path
        self._file = file
        self._status = os.fstat(file.fileno())

    @property
    def nbytes(self) -> int:
        return self._status.st_size

    def read_at(self, offset: int, nbytes: int) -> bytes:
        self._file.seek(offset)
        parts: list[bytes] = []
        while nbytes and (part := self._file.read(nbytes)):
            parts.append(part)
            nbytes -= len(part)
        return b"".join(parts)

    def shard(self, header_bytes: int) -> Shard:
        return Shard(self.path, self.nbytes, header_bytes, stamp(self._status), sha256_of_hub_blob(self.path))


@contextmanager
def opened(file: Path | StoredFile) -> Iterator[StoredFile]:
    """The file, opened for reading where it is a path. Raises CheckpointError, naming it, for what cannot be read."""
    try:
        if not isinstance(file, Path):
            yield file
            return
        if not file.is_file():  # opening a named pipe would wait for ever
            raise CheckpointError(f"{file}: {'not a regular file' if file.exists() else 'no such file'}")
        with file.open("rb", buffering=0) as descriptor:
            yield _OpenFile(file, descriptor)
    except OSError as error:
        path = file if isinstance(file, Path) else file.path
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
