"""The nouns of a checkpoint: shards, tensors, and where their bytes are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmfp.errors import CheckpointError

if TYPE_CHECKING:
    from llmfp.encoding import Encoding
    from llmfp.hub.remote_file import RemoteFile

ITEM_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits per element of every dtype safetensors 0.8 knows."""


PLAIN_FLOATS = ("BF16", "F16", "F32", "F64")
"""Dtypes whose numbers are what is stored, without scales."""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """What an adapter adds to a matrix of [out, in]: scale · b @ a, of a [rank, in] and b [out, rank]."""

    a: TensorSpec
    b: TensorSpec
    scale: float


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One stored tensor: `nbytes` at absolute `offset_bytes` of shard number `shard`.

    encoding: of the codes of a quantised matrix, whose own shape `shape` then is (see llmfp.encoding).
    lora: what an adapter adds to it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset_bytes: int
    nbytes: int
    encoding: Encoding | None = None
    lora: LoraSpec | None = None

    @property
    def itemsize(self) -> int:
        """Bytes per element; only meaningful for dtypes of whole bytes."""
        return ITEM_BITS[self.dtype] // 8

    @property
    def stored_as(self) -> str:
        """Its dtype, or how its codes are called."""
        return self.dtype if self.encoding is None else self.encoding.label


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file as it was when its header was read; `stamp` tells later whether it is still that file.

    remote: where it is read from, when that is no file system; `path` then only names it.
    """

    path: Path
    nbytes: int
    header_bytes: int
    stamp: tuple[int, int, int]
    sha256: str | None
    remote: RemoteFile | None = None

    def check_unchanged(self, status: os.stat_result) -> None:
        """Raises CheckpointError when the open file is no longer the one whose header was read."""
        if stamp(status) != self.stamp or status.st_size != self.nbytes:
            raise CheckpointError(
                f"{self.path}: the file changed while it was read", hint="wait until it is written, then scan again"
            )


def stamp(status: os.stat_result) -> tuple[int, int, int]:
    """What identifies a file's content without reading it: device, inode, modification time in ns."""
    return status.st_dev, status.st_ino, status.st_mtime_ns


def sha256_of_hub_blob(path: Path) -> str | None:
    """The content hash, where it is free: the Hub's cache stores a file under its sha256 and links to it."""
    if not path.is_symlink():
        return None
    name = path.readlink().name
    return name if len(name) == 64 and set(name) <= set("0123456789abcdef") else None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's files. `config` is config.json or empty; `caveats` what a reader of the answer should know.

    base: the directory or file below an adapter, which `path` then is.
    repo: the Hub repository that it comes from; url: the web page, less whatever could be secret.
    """

    path: Path
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    revision: str | None
    caveats: tuple[str, ...]
    base: Path | None = None
    repo: str | None = None
    url: str | None = None
