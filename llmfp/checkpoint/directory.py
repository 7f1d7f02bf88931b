"""From a path to a `Checkpoint`: which files belong to it, and what its config says.

A directory is read as transformers would: model.safetensors, else the files its index names, else all shards; only
where there is no safetensors file, pytorch_model.bin, the files its index names, or its shards.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from llmfp.checkpoint import safetensors_file, strict_json
from llmfp.checkpoint.specs import Checkpoint, Shard, TensorSpec
from llmfp.checkpoint.stored_file import Folder, LocalFolder
from llmfp.errors import CheckpointError

INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
FINGERPRINT_SUFFIX = ".fp.safetensors"
_SHARD_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin|\.gguf)$")
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
_GGUF = ".gguf"
_ACCEPTED = "give a directory, a .safetensors or .gguf file, or a .bin, .pt or .pth file written by torch.save"
_MOST_NAMED = 4
_UNSUPPORTED = {
    ".h5": "Keras",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".npz": "NumPy archives",
    ".nemo": "NeMo archives",
}
_CONFIG_BYTES = 16 << 20
_SNAPSHOT = re.compile(r"/(?:models--(?P<repo>[^/]+)|[^/]+)/snapshots/(?P<sha>[0-9a-f]{40})$")


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a directory or a single weight file. Raises CheckpointError, naming the file."""
    try:
        if path.is_dir():
            return replace(open_folder(LocalFolder(path)), revision=_revision(path), repo=_repo(path))
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or directory", hint=_ACCEPTED)
        parent = path.parent
        checkpoint = open_folder(LocalFolder(parent), path.name)
        return replace(checkpoint, path=path, revision=_revision(parent), repo=_repo(parent))
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from None


def open_folder(folder: Folder, name: str | None = None) -> Checkpoint:
    """The checkpoint in a folder, or in its one weight file of that name. Raises CheckpointError, naming the file."""
    files, index = choose(folder) if name is None else ([_weight_file(folder, name)], None)
    if files[0].endswith(_GGUF):
        from llmfp.checkpoint.gguf_file import open_gguf_of  # most scans do not need it

        return open_gguf_of(folder, files[0])
    shards: list[Shard] = []
    tensors: dict[str, TensorSpec] = {}
    caveats: list[str] = []
    for number, (shard, specs) in enumerate(_headers(folder, files)):
        shards.append(shard)
        for spec in specs:
            if spec.name in tensors:
                other = files[tensors[spec.name].shard]
                raise CheckpointError(f"{folder.path / files[number]}: tensor {spec.name!r} is stored in {other} too")
            tensors[spec.name] = spec
    if index is not None:
        caveats += _check_index(index, files, tensors, folder.path / _index_name(files))
    return Checkpoint(folder.path, tuple(shards), tensors, _read_config(folder), None, tuple(caveats))


def _headers(folder: Folder, files: list[str]) -> Iterable[tuple[Shard, list[TensorSpec]]]:
    for number, name in enumerate(files):
        if name.endswith(_TORCH):
            from llmfp.checkpoint import torch_archive  # 4 ms of import that most scans do not need

            yield torch_archive.read_header(folder.file(name), number)
        else:
            yield safetensors_file.read_header(folder.file(name), number)


def _index_name(files: list[str]) -> str:
    return TORCH_INDEX if files[0].endswith(".bin") else INDEX


def _weight_file(folder: Folder, name: str) -> str:
    suffix = PurePosixPath(name).suffix
    if suffix in _UNSUPPORTED:
        raise CheckpointError(
            f"{folder.path / name}: {_UNSUPPORTED[suffix]} are not supported yet",
            hint="convert the model to safetensors",
        )
    if suffix not in (".safetensors", _GGUF, *_TORCH):
        raise CheckpointError(f"{folder.path / name}: not a weight file", hint=_ACCEPTED)
    return name


def choose(folder: Folder) -> tuple[list[str], dict[str, str] | None]:
    """The weight files of a folder in name order, and the index's weight map where an index says so."""
    if folder.has("model.safetensors"):
        return ["model.safetensors"], None
    if folder.has(INDEX):
        return _files_of_index(folder, INDEX)
    names = [name for name in folder.names() if name.endswith(".safetensors") and not name.endswith(FINGERPRINT_SUFFIX)]
    # Mistral ships the same weights twice, under two naming schemes; either alone is the whole model.
    names = [name for name in names if not name.startswith("consolidated")] or names
    if not names:
        return _torch_files(folder)
    _check_numbered(folder.path, names)
    return names, None


def _torch_files(folder: Folder) -> tuple[list[str], dict[str, str] | None]:
    """As above, for what torch.save wrote. Optimizer and random states lie in files of other names."""
    if folder.has("pytorch_model.bin"):
        return ["pytorch_model.bin"], None
    if folder.has(TORCH_INDEX):
        return _files_of_index(folder, TORCH_INDEX)
    names = folder.names()
    files = fnmatch.filter(names, "pytorch_model-*-of-*.bin") or fnmatch.filter(names, "consolidated*.pth")
    if not files:
        return [_gguf_file(folder)], None
    if files[0].endswith(".pth") and len(files) > 1:
        raise CheckpointError(
            f"{folder.path / files[0]}: {len(files)} parts of tensors that were split for model parallelism are not "
            "supported",
            hint="convert the model to safetensors",
        )
    _check_numbered(folder.path, files)
    return files, None


def _gguf_file(folder: Folder) -> str:
    """The one GGUF model of a folder, by its first part. Projectors of vision models go by the name of mmproj."""
    files = [name for name in folder.names() if name.endswith(_GGUF) and not name.startswith("mmproj")]
    models = [name for name in files if not (part := _SHARD_NAME.match(name)) or int(part["number"]) == 1]
    if len(models) > 1:
        names = ", ".join(models[:_MOST_NAMED]) + (", …" if len(models) > _MOST_NAMED else "")
        raise CheckpointError(
            f"{folder.path}: {len(models)} GGUF models in this directory: {names}", hint="give one of the files"
        )
    if not files:
        raise CheckpointError(f"{folder.path}: {_why_no_weights(folder)}", hint=_ACCEPTED)
    return (models or files)[0]


def _files_of_index(folder: Folder, index: str) -> tuple[list[str], dict[str, str]]:
    weight_map = _read_index(folder, index)
    files = sorted(set(weight_map.values()))
    for name in files:
        if not folder.has(name):
            raise CheckpointError(f"{folder.path / name}: missing shard, {index} names it", hint="fetch the file again")
    return files, weight_map


def _why_no_weights(folder: Folder) -> str:
    names = folder.names()
    found = sorted({_UNSUPPORTED[suffix] for name in names if (suffix := PurePosixPath(name).suffix) in _UNSUPPORTED})
    if found:
        return f"only {', '.join(found)} found, not supported yet; no .safetensors, .gguf or pytorch_model.bin file"
    return "no .safetensors, .gguf or pytorch_model.bin file in this directory" if names else "the directory is empty"


def _check_numbered(path: Path, names: Iterable[str]) -> None:
    """Shards that number themselves must all be there."""
    present: dict[tuple[str, int, str], set[int]] = {}
    for name in names:
        if match := _SHARD_NAME.match(name):
            present.setdefault((match["stem"], int(match["count"]), match["suffix"]), set()).add(int(match["number"]))
    for (stem, count, suffix), numbers in present.items():
        if missing := count - len(numbers & set(range(1, count + 1))):
            number = next(n for n in range(1, count + 1) if n not in numbers)
            raise CheckpointError(
                f"{path}/{stem}-{number:05d}-of-{count:05d}{suffix}: missing shard ({missing} of {count} missing)",
                hint="fetch the file again",
            )


def _read_index(folder: Folder, index: str) -> dict[str, str]:
    path, suffix = folder.path / index, ".bin" if index == TORCH_INDEX else ".safetensors"
    weight_map = strict_json.read_object(folder.file(index), strict_json.MAX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_inside(name):
            raise CheckpointError(f"{path}: tensor {tensor!r} is placed in {str(name)[:80]!r}, outside the directory")
        if not name.endswith(suffix):
            raise CheckpointError(f"{path}: tensor {tensor!r} is placed in {name[:80]!r}, not a {suffix} file")
    return weight_map


def is_inside(name: str) -> bool:
    """Whether a file name from outside stays below its directory, on any platform. Links are the owner's choice."""
    pure = PurePosixPath(name)
    return not (pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or "\0" in name or not name)


def _check_index(weight_map: dict[str, str], files: list[str], tensors: dict[str, TensorSpec], path: Path) -> list[str]:
    for name, file in weight_map.items():
        spec = tensors.get(name)
        if spec is None or files[spec.shard] != file:
            raise CheckpointError(
                f"{path.parent / file}: tensor {name!r} is not in this shard, though {path.name} says so"
            )
    if extra := len(tensors) - len(weight_map):
        return [f"{extra} stored tensors are not named in {path.name}"]
    return []


def _read_config(folder: Folder) -> dict[str, Any]:
    """config.json, or the params.json of Mistral's own layout, or nothing. Python's writers put Infinity into them."""
    for name in ("config.json", "params.json"):
        if folder.has(name):
            return strict_json.read_object(folder.file(name), _CONFIG_BYTES, constants=True)
    return {}


def _revision(directory: Path) -> str | None:
    """The commit a Hub cache directory stands for: …/snapshots/<40 hex digits>."""
    found = _SNAPSHOT.search(directory.absolute().as_posix())
    return found["sha"] if found else None


def _repo(directory: Path) -> str | None:
    """The repository a Hub cache directory belongs to: …/models--<org>--<name>/snapshots/<40 hex digits>."""
    found = _SNAPSHOT.search(directory.absolute().as_posix())
    return found["repo"].replace("--", "/", 1) if found and found["repo"] else None
