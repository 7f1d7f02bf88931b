"""From a path to a `Checkpoint`: which files belong to it, and what its config says.

A directory is read as transformers would: model.safetensors, else the files its index names, else all shards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from llmfp.checkpoint import safetensors_file, strict_json
from llmfp.checkpoint.specs import Checkpoint, Shard, TensorSpec
from llmfp.errors import CheckpointError

INDEX = "model.safetensors.index.json"
FINGERPRINT_SUFFIX = ".fp.safetensors"
_SHARD_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")
_UNSUPPORTED = {
    ".bin": "PyTorch pickle archives",
    ".pt": "PyTorch pickle archives",
    ".pth": "PyTorch pickle archives",
    ".ckpt": "PyTorch pickle archives",
    ".gguf": "GGUF",
    ".h5": "Keras",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".npz": "NumPy archives",
    ".nemo": "NeMo archives",
}
_CONFIG_BYTES = 16 << 20


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a directory or a single .safetensors file. Raises CheckpointError, naming the file."""
    try:
        if path.is_dir():
            files, index = _files_of_directory(path)
            directory = path
        elif path.exists():
            files, index, directory = [_weight_file(path)], None, path.parent
        else:
            raise CheckpointError(f"{path}: no such file or directory", hint=_hint_for_missing(path))
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from None
    shards: list[Shard] = []
    tensors: dict[str, TensorSpec] = {}
    caveats: list[str] = []
    for number, file in enumerate(files):
        shard, specs = safetensors_file.read_header(file, number)
        shards.append(shard)
        for spec in specs:
            if spec.name in tensors:
                other = files[tensors[spec.name].shard].name
                raise CheckpointError(f"{file}: tensor {spec.name!r} is stored in {other} too")
            tensors[spec.name] = spec
    if index is not None:
        caveats += _check_index(index, files, tensors, directory / INDEX)
    return Checkpoint(path, tuple(shards), tensors, _read_config(directory), _revision(directory), tuple(caveats))


def _weight_file(path: Path) -> Path:
    if path.suffix in _UNSUPPORTED:
        raise CheckpointError(
            f"{path}: {_UNSUPPORTED[path.suffix]} are not supported yet", hint="convert the model to safetensors"
        )
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: not a weight file", hint="give a directory or a .safetensors file")
    return path


def _files_of_directory(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a directory in name order, and the index's weight map where an index says so."""
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"], None
    if (path / INDEX).exists():
        weight_map = _read_index(path / INDEX)
        files = [path / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.exists():
                raise CheckpointError(f"{file}: missing shard, {INDEX} names it", hint="fetch the file again")
        return files, weight_map
    names = sorted(
        file.name
        for file in path.iterdir()
        if file.suffix == ".safetensors" and not file.name.endswith(FINGERPRINT_SUFFIX)
    )
    # Mistral ships the same weights twice, under two naming schemes; either alone is the whole model.
    names = [name for name in names if not name.startswith("consolidated")] or names
    if not names:
        raise CheckpointError(f"{path}: {_why_no_weights(path)}", hint="give a directory with .safetensors files")
    _check_numbered(path, names)
    return [path / name for name in names], None


def _why_no_weights(path: Path) -> str:
    found = sorted({_UNSUPPORTED[file.suffix] for file in path.iterdir() if file.suffix in _UNSUPPORTED})
    if found:
        return f"only {', '.join(found)} found, not supported yet; no .safetensors file"
    return "no .safetensors file in this directory" if any(path.iterdir()) else "the directory is empty"


def _check_numbered(path: Path, names: Iterable[str]) -> None:
    """Shards that number themselves must all be there."""
    present: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := _SHARD_NAME.match(name):
            present.setdefault((match["stem"], int(match["count"])), set()).add(int(match["number"]))
    for (stem, count), numbers in present.items():
        if missing := count - len(numbers & set(range(1, count + 1))):
            number = next(n for n in range(1, count + 1) if n not in numbers)
            raise CheckpointError(
                f"{path}/{stem}-{number:05d}-of-{count:05d}.safetensors: missing shard ({missing} of {count} missing)",
                hint="fetch the file again",
            )


def _read_index(path: Path) -> dict[str, str]:
    weight_map = strict_json.parse_object(_read_small(path, strict_json.MAX_BYTES), str(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_inside(name):
            raise CheckpointError(f"{path}: tensor {tensor!r} is placed in {str(name)[:80]!r}, outside the directory")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: tensor {tensor!r} is placed in {name[:80]!r}, not a .safetensors file")
    return weight_map


def _is_inside(name: str) -> bool:
    """Whether a file name from an index stays below its directory, on any platform. Links are the owner's choice."""
    pure = PurePosixPath(name)
    return not (pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or "\0" in name or not name)


def _check_index(
    weight_map: dict[str, str], files: list[Path], tensors: dict[str, TensorSpec], path: Path
) -> list[str]:
    for name, file in weight_map.items():
        spec = tensors.get(name)
        if spec is None or files[spec.shard] != path.parent / file:
            raise CheckpointError(f"{path.parent / file}: tensor {name!r} is not in this shard, though {INDEX} says so")
    if extra := len(tensors) - len(weight_map):
        return [f"{extra} stored tensors are not named in {INDEX}"]
    return []


def _read_config(directory: Path) -> dict[str, Any]:
    """config.json, or the params.json of Mistral's own layout, or nothing. Python's writers put Infinity into them."""
    for path in (directory / "config.json", directory / "params.json"):
        if path.exists():
            return strict_json.parse_object(_read_small(path, _CONFIG_BYTES), str(path), constants=True)
    return {}


def _read_small(path: Path, limit: int) -> bytes:
    try:
        if not path.is_file():  # opening a named pipe would wait for ever
            raise CheckpointError(f"{path}: not a regular file")
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size} bytes is over the limit of {limit}")
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def _revision(directory: Path) -> str | None:
    """The commit a Hub cache directory stands for: …/snapshots/<40 hex digits>."""
    name = directory.absolute().name
    known = directory.absolute().parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", name)
    return name if known else None


def _hint_for_missing(path: Path) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", str(path)):
        return "Hub ids are not supported yet; download the model and give its directory"
    return "give a directory or a .safetensors file"
