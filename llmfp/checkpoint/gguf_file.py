"""GGUF, versions 2 and 3: the header parsed in one bounded pass, split files put together.

Format: magic, version, counts, then key–value pairs and tensor descriptions, then tensors at aligned offsets. Arrays
are stepped over, not built: a vocabulary of 150,000 strings costs 30 ms. Stricter than llama.cpp's reader, and unlike
gguf's own it never trusts a length. Source: the GGUF specification in the ggml repository; checked against files that
the gguf package writes.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmfp.checkpoint.specs import Checkpoint, Shard, TensorSpec
from llmfp.checkpoint.stored_file import Folder, LocalFolder, StoredFile, opened
from llmfp.checkpoint.strict_json import MAX_BYTES, shown
from llmfp.encoding.ggml import REMOVED, TYPES
from llmfp.errors import CheckpointError

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_READ_BYTES = 4 << 20
_MOST_PAIRS, _MOST_TENSORS, _MOST_STRINGS = 100_000, 200_000, 4_000_000
_LONGEST_NAME = 1024
_LONGEST_KEPT = 4096
_MAX_RANK = 4
_ALIGNMENT, _MAX_ALIGNMENT = 32, 1 << 20
_MAX_INT = 2**63 - 1
_PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_CONFIG = {
    "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "embedding_length": "hidden_size", "nextn_predict_layers": "num_nextn_predict_layers",
    "rope.dimension_count": "rotary_dim",
}  # fmt: skip
"""GGUF's keys below the architecture's name → config.json's."""


def open_gguf(path: Path) -> Checkpoint:
    """The checkpoint in a GGUF file, and in its other parts where it is split. Raises CheckpointError."""
    return replace(open_gguf_of(LocalFolder(path.parent), path.name), path=path)


def open_gguf_of(folder: Folder, name: str) -> Checkpoint:
    """The same, of a file of that name in a folder."""
    files = _parts(folder, name)
    shards: list[Shard] = []
    tensors: dict[str, TensorSpec] = {}
    metadata: dict[str, Any] = {}
    for number, file in enumerate(files):
        shard, specs, pairs = _read_header(folder.file(file), number)
        _check_split(shard.path, pairs, number, len(files))
        shards.append(shard)
        metadata = metadata or pairs
        for spec in specs:
            if spec.name in tensors:
                other = files[tensors[spec.name].shard]
                raise CheckpointError(f"{shard.path}: tensor {spec.name!r} is stored in {other} too")
            tensors[spec.name] = spec
    stated = metadata.get("split.tensors.count")
    if len(files) > 1 and stated != len(tensors):
        raise CheckpointError(
            f"{shards[0].path}: split.tensors.count is {shown(stated)}, the parts hold {len(tensors)} tensors"
        )
    config = _config(metadata)
    return Checkpoint(folder.path, tuple(shards), tensors, config, None, tuple(_caveats(tensors)))


def _parts(folder: Folder, name: str) -> list[str]:
    found = _PART.match(name)
    if found is None:
        return [name]
    count = int(found["count"])
    if not 1 <= int(found["number"]) <= count:
        raise CheckpointError(f"{folder.path / name}: part {found['number']} of {found['count']} cannot be")
    files = [f"{found['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    missing = [file for file in files if not folder.has(file)]
    if missing:
        raise CheckpointError(
            f"{folder.path / missing[0]}: missing part ({len(missing)} of {count} missing)", hint="fetch the file again"
        )
    return files


def _check_split(file: Path, metadata: Mapping[str, Any], number: int, count: int) -> None:
    stated = metadata.get("split.no", 0), metadata.get("split.count") or 1
    if stated != (number, count):
        raise CheckpointError(
            f"{file}: split.no {shown(stated[0])} of {shown(stated[1])}, and it is part {number} of {count}, from 0 on",
            hint="a split file's parts keep the names they were written with: NAME-00001-of-0000N.gguf",
        )


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata under config.json's names. Sizes that differ between layers give way to the commonest."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        return {}
    config: dict[str, Any] = {"model_type": f"gguf {architecture}"}
    for key, name in _CONFIG.items():
        value = metadata.get(f"{architecture}.{key}")
        if isinstance(value, list):
            positive = [n for n in value if isinstance(n, int) and n > 0]
            value = Counter(positive).most_common(1)[0][0] if positive else None
        if value is not None:
            config[name] = value
    return config


def _caveats(tensors: Mapping[str, TensorSpec]) -> list[str]:
    caveats = []
    if any(name.endswith("attn_k_b.weight") and name.replace("_k_b", "_kv_b") not in tensors for name in tensors):
        caveats.append("kv_b is stored as attn_k_b and attn_v_b: its σ is that of both, nothing is kept of its heads")
    return caveats


def _read_header(path: Path | StoredFile, shard: int) -> tuple[Shard, list[TensorSpec], dict[str, Any]]:
    """The file as a `Shard`, its tensors in the order of their descriptions, and the metadata that is kept."""
    with opened(path) as file:
        header = _Header(file)
        tensors, pairs = _parse(header)
        alignment = pairs.get("general.alignment", _ALIGNMENT)
        start = -(-header.position // alignment) * alignment
        return file.shard(header.position), _placed(file.path, shard, tensors, start, file.nbytes), pairs


class _Header:
    """A file's first bytes, read as they are needed, and a position in them that never leaves the file."""

    def __init__(self, file: StoredFile) -> None:
        self.path, self.position = file.path, 0
        self._file, self._size = file, file.nbytes
        self._data = bytearray()
        self._strings = 0

    def need(self, nbytes: int, what: str) -> None:
        """Makes `nbytes` from the position on available."""
        end = self.position + nbytes
        if end > self._size:
            raise CheckpointError(f"{self.path}: truncated, {what} ends at byte {end} of a file of {self._size}")
        if end > MAX_BYTES:
            raise CheckpointError(f"{self.path}: header is over the limit of {MAX_BYTES} bytes at {what}")
        while len(self._data) < end:
            part = self._file.read_at(len(self._data), max(_READ_BYTES, end - len(self._data)))
            if not part:
                raise CheckpointError(f"{self.path}: the file changed while it was read", hint="scan again")
            self._data += part

    def scalar(self, code: str, what: str) -> Any:
        size = struct.calcsize(code)
        self.need(size, what)
        if code == "<?" and self._data[self.position] > 1:
            raise CheckpointError(f"{self.path}: {what} is a truth value of {self._data[self.position]}")
        (value,) = struct.unpack_from(code, self._data, self.position)
        self.position += size
        return value

    def count(self, what: str, limit: int, item_bytes: int) -> int:
        """How many items follow, which the rest of the file must be able to hold."""
        n: int = self.scalar("<Q", what)
        if n > limit or n * item_bytes > self._size - self.position:
            raise CheckpointError(f"{self.path}: {what} is {n}, more than this file can hold")
        return n

    def string(self, what: str, longest: int) -> str:
        n = self.count(f"length of {what}", longest, 1)
        self.need(n, what)
        raw = bytes(self._data[self.position : self.position + n])
        self.position += n
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8") from None
        if "\0" in text:
            raise CheckpointError(f"{self.path}: {what} holds a NUL")
        return text

    def skip(self, nbytes: int, what: str) -> None:
        self.need(nbytes, what)
        self.position += nbytes

    def skip_strings(self, count: int, what: str) -> None:
        self._strings += count
        if self._strings > _MOST_STRINGS:
            raise CheckpointError(f"{self.path}: {what}: more than {_MOST_STRINGS} strings")
        length_at, position = struct.Struct("<Q").unpack_from, self.position
        for _ in range(count):
            if position + 8 > len(self._data):
                self.position = position
                self.need(8, what)
            position += 8 + length_at(self._data, position)[0]
            if position > len(self._data):
                self.position = position
                self.need(0, what)
        self.position = position


def _parse(header: _Header) -> tuple[list[tuple[str, str, tuple[int, ...], int, int]], dict[str, Any]]:
    """Tensors as (name, type, shape, bytes, offset below the data's start), and the kept metadata."""
    path = header.path
    header.need(4, "magic")
    if (magic := header.scalar("<I", "magic")) != 0x46554747:
        raise CheckpointError(f"{path}: not a GGUF file (it starts with {magic.to_bytes(4, 'little')!r})")
    version = header.scalar("<I", "version")
    if version not in (2, 3):
        kind = "big-endian" if version and version & 0xFFFF == 0 else f"version {version}"
        raise CheckpointError(
            f"{path}: GGUF of {kind} is not supported", hint="convert the model again: versions 2 and 3"
        )
    tensor_count = header.count("tensor count", _MOST_TENSORS, 25)
    pair_count = header.count("metadata count", _MOST_PAIRS, 13)
    pairs: dict[str, Any] = {}
    seen = set()
    for _ in range(pair_count):
        key = header.string("a metadata key", _LONGEST_NAME)
        if key in seen:
            raise CheckpointError(f"{path}: metadata key {shown(key)} appears twice")
        seen.add(key)
        if (value := _value(header, key)) is not None:
            pairs[key] = value
    alignment = pairs.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {shown(alignment)}, not a power of two")
    return [_tensor(header, alignment) for _ in range(tensor_count)], pairs


def _value(header: _Header, key: str) -> Any:
    """A metadata value that is a number, a short string or a short list of numbers; None for what is stepped over."""
    what = f"metadata {shown(key)}"
    kind = header.scalar("<I", f"type of {what}")
    if kind in _SCALARS:
        return header.scalar(_SCALARS[kind], what)
    if kind == _STRING:
        n = header.count(f"length of {what}", MAX_BYTES, 1)
        if n > _LONGEST_KEPT:
            return header.skip(n, what)
        header.position -= 8
        return header.string(what, n)
    if kind != _ARRAY:
        raise CheckpointError(f"{header.path}: {what} has the unknown type {kind}")
    item = header.scalar("<I", f"type of {what}")
    if item == _STRING:
        return header.skip_strings(header.count(f"length of {what}", MAX_BYTES, 8), what)
    if item not in _SCALARS:
        raise CheckpointError(f"{header.path}: {what} is an array of the unknown type {item}")
    size = struct.calcsize(_SCALARS[item])
    n = header.count(f"length of {what}", MAX_BYTES, size)
    if n > _LONGEST_KEPT:
        return header.skip(n * size, what)
    return [header.scalar(_SCALARS[item], what) for _ in range(n)]


def _tensor(header: _Header, alignment: int) -> tuple[str, str, tuple[int, ...], int, int]:
    name = header.string("a tensor's name", _LONGEST_NAME)
    where = f"{header.path}: tensor {shown(name)}"
    rank = header.scalar("<I", f"number of dimensions of {shown(name)}")
    if not 1 <= rank <= _MAX_RANK:
        raise CheckpointError(f"{where} has {rank} dimensions")
    shape = tuple(header.scalar("<Q", f"dimensions of {shown(name)}") for _ in range(rank))
    number = header.scalar("<I", f"type of {shown(name)}")
    offset = header.scalar("<Q", f"offset of {shown(name)}")
    if number not in TYPES:
        kind = f"the removed type {REMOVED[number]}" if number in REMOVED else f"the unknown type number {number}"
        raise CheckpointError(f"{where} is of {kind}", hint="convert the model again with a current llama.cpp")
    dtype, elements, nbytes = TYPES[number]
    if 0 in shape:
        raise CheckpointError(f"{where} has shape {list(reversed(shape))} and so no elements")
    if shape[0] % elements:
        raise CheckpointError(f"{where} has rows of {shape[0]} elements, no whole blocks of {elements} for {dtype}")
    total = nbytes * (shape[0] // elements)
    for n in shape[1:]:
        total *= n
    if total > _MAX_INT:
        raise CheckpointError(f"{where} has shape {list(reversed(shape))}, more than any file holds")
    if offset % alignment:
        raise CheckpointError(f"{where} is at offset {offset}, not a multiple of the alignment {alignment}")
    return name, dtype, tuple(reversed(shape)), total, offset


def _placed(
    path: Path, shard: int, tensors: list[tuple[str, str, tuple[int, ...], int, int]], start: int, size: int
) -> list[TensorSpec]:
    """The tensors at absolute offsets. Raises CheckpointError where they leave the file, overlap or repeat a name."""
    specs = [
        TensorSpec(name, dtype, shape, shard, start + offset, nbytes) for name, dtype, shape, nbytes, offset in tensors
    ]
    names: set[str] = set()
    for spec in specs:
        if spec.name in names:
            raise CheckpointError(f"{path}: tensor {shown(spec.name)} appears twice")
        names.add(spec.name)
        if spec.offset_bytes + spec.nbytes > size:
            raise CheckpointError(
                f"{path}: tensor {shown(spec.name)} ends at byte {spec.offset_bytes + spec.nbytes} of a file of {size}",
                hint="is the download complete?",
            )
    ordered = sorted(specs, key=lambda spec: spec.offset_bytes)
    for before, after in pairwise(ordered):
        if before.offset_bytes + before.nbytes > after.offset_bytes:
            raise CheckpointError(f"{path}: tensors {shown(before.name)} and {shown(after.name)} overlap")
    return specs
