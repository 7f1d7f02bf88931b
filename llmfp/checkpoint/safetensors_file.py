"""The header of a safetensors file, validated before anything else happens.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes without a hole. Rules as
the safetensors library 0.8 enforces them, plus duplicate names, which it lets pass (the last one wins there).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from llmfp.checkpoint import strict_json
from llmfp.checkpoint.specs import ITEM_BITS, Shard, TensorSpec
from llmfp.checkpoint.stored_file import StoredFile, opened
from llmfp.errors import CheckpointError

_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_INT = 2**63 - 1
_MAX_RANK = 64


def read_header(path: Path | StoredFile, shard: int) -> tuple[Shard, list[TensorSpec]]:
    """The file as a `Shard` and its tensors in file order, located absolutely. Reads the header and nothing else."""
    with opened(path) as file:
        path, size = file.path, file.nbytes
        length = int.from_bytes(_exactly(file.read_at(0, 8), 8, path), "little")
        if length > strict_json.MAX_BYTES:
            raise CheckpointError(f"{path}: header of {length} bytes is over the limit of {strict_json.MAX_BYTES}")
        if length > size - 8:
            raise CheckpointError(f"{path}: truncated, header of {length} bytes in a file of {size}")
        text = _exactly(file.read_at(8, length), length, path)
        header = strict_json.parse_object(text, f"{path}: header")
        tensors = _tensors(header, path, shard, 8 + length)
        _check_layout(tensors, path, 8 + length, size)
        return file.shard(8 + length), tensors


def _exactly(data: bytes, nbytes: int, path: Path) -> bytes:
    if len(data) != nbytes:
        raise CheckpointError(f"{path}: truncated, {len(data)} of {nbytes} header bytes")
    return data


def _tensors(header: dict[str, Any], path: Path, shard: int, data_start: int) -> list[TensorSpec]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a map of strings")
    specs = []
    for name, entry in header.items():
        where = f"{path}: tensor {name!r}"
        if not isinstance(entry, dict) or not entry.keys() >= _FIELDS:
            raise CheckpointError(f"{where}: dtype, shape or data_offsets is missing")
        if any(isinstance(entry[field], dict | list) for field in entry.keys() - _FIELDS):
            raise CheckpointError(f"{where}: fields other than {', '.join(sorted(_FIELDS))} must be plain values")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_BITS:
            raise CheckpointError(f"{where}: unknown dtype {str(dtype)[:40]!r}")
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            raise CheckpointError(f"{where}: shape and data_offsets must be lists of non-negative integers")
        if len(shape) > _MAX_RANK:
            raise CheckpointError(f"{where}: {len(shape)} dimensions are more than {_MAX_RANK}")
        start, stop = offsets
        # A zero must not hide dimensions whose product overflows whatever reads the file next.
        if math.prod(filter(None, shape)) * ITEM_BITS[dtype] > 8 * _MAX_INT:
            raise CheckpointError(f"{where}: shape {shape} of {dtype} is beyond {_MAX_INT} bytes")
        bits = math.prod(shape) * ITEM_BITS[dtype]
        if bits % 8:
            raise CheckpointError(f"{where}: shape {shape} of {dtype} is no whole number of bytes")
        if stop - start != bits // 8:
            raise CheckpointError(f"{where}: shape {shape} of {dtype} needs {bits // 8} bytes, has {stop - start}")
        specs.append(TensorSpec(name, dtype, tuple(shape), shard, data_start + start, stop - start))
    return sorted(specs, key=lambda spec: (spec.offset_bytes, spec.nbytes))


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_INT for item in value)


def _check_layout(tensors: list[TensorSpec], path: Path, data_start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    end = data_start
    for spec in tensors:
        if spec.offset_bytes + spec.nbytes > size:
            raise CheckpointError(
                f"{path}: tensor {spec.name!r} ends at byte {spec.offset_bytes + spec.nbytes} of a file of {size}",
                hint="the file is truncated or its header lies; fetch it again",
            )
        if spec.offset_bytes != end:
            problem = "overlaps the one before it" if spec.offset_bytes < end else "follows a hole"
            raise CheckpointError(f"{path}: tensor {spec.name!r} {problem}")
        end = spec.offset_bytes + spec.nbytes
    if end != size:
        raise CheckpointError(f"{path}: {size - end} trailing bytes belong to no tensor")
