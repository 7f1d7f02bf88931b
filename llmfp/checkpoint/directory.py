"""From a path to a `Checkpoint`: which files belong to it, and what its config says.

A directory is read as transformers would: model.safetensors, else the files its index names, else all shards; only
where there is no safetensors file, pytorch_model.bin, the files its index names, or its shards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from llmfp.checkpoint import safetensors_file, strict_json
from llmfp.checkpoint.specs import Checkpoint, Shard, TensorSpec
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


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a directory or a single weight file. Raises CheckpointError, naming the file."""
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
    if files[0].suffix == _GGUF:
        from llmfp.checkpoint.gguf_file import open_gguf  # most scans do not need it

        return replace(open_gguf(files[0]), path=path)
    shards: list[Shard] = []
    tensors: dict[str, TensorSpec] = {}
    caveats: list[str] = []
    for number, file in enumerate(files):
        shard, specs = _read_header(file, number)
        shards.append(shard)
        for spec in specs:
            if spec.name in tensors:
                other = files[tensors[spec.name].shard].name
                raise CheckpointError(f"{file}: tensor {spec.name!r} is stored in {other} too")
            tensors[spec.name] = spec
    if index is not None:
        name = TORCH_INDEX if files[0].suffix == ".bin" else INDEX
        caveats += _check_index(index, files, tensors, directory / name)
    return Checkpoint(path, tuple(shards), tensors, _read_config(directory), _revision(directory), tuple(caveats))


def _read_header(file: Path, number: int) -> tuple[Shard, list[TensorSpec]]:
    if file.suffix not in _TORCH:
        return safetensors_file.read_header(file, number)
    from llmfp.checkpoint import torch_archive  # 4 ms of import that most scans do not need

    return torch_archive.read_header(file, number)


def _weight_file(path: Path) -> Path:
    if path.suffix in _UNSUPPORTED:
        raise CheckpointError(
            f"{path}: {_UNSUPPORTED[path.suffix]} are not supported yet", hint="convert the model to safetensors"
        )
    if path.suffix not in (".safetensors", _GGUF, *_TORCH):
        raise CheckpointError(f"{path}: not a weight file", hint=_ACCEPTED)
    return path


def _files_of_directory(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files of a directory in name order, and the index's weight map where an index says so."""
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"], None
    if (path / INDEX).exists():
        return _files_of_index(path / INDEX)
    names = sorted(
        file.name
        for file in path.iterdir()
        if file.suffix == ".safetensors" and not file.name.endswith(FINGERPRINT_SUFFIX)
    )
    # Mistral ships the same weights twice, under two naming schemes; either alone is the whole model.
    names = [name for name in names if not name.startswith("consolidated")] or names
    if not names:
        return _torch_files_of_directory(path)
    _check_numbered(path, names)
    return [path / name for name in names], None


def _torch_files_of_directory(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """As above, for what torch.save wrote. Optimizer and random states lie in files of other names."""
    if (path / "pytorch_model.bin").is_file():
        return [path / "pytorch_model.bin"], None
    if (path / TORCH_INDEX).exists():
        return _files_of_index(path / TORCH_INDEX)
    files = sorted(path.glob("pytorch_model-*-of-*.bin")) or sorted(path.glob("consolidated*.pth"))
    if not files:
        return [_gguf_of_directory(path)], None
    if files[0].suffix == ".pth" and len(files) > 1:
        raise CheckpointError(
            f"{files[0]}: {len(files)} parts of tensors that were split for model parallelism are not supported",
            hint="convert the model to safetensors",
        )
    _check_numbered(path, [file.name for file in files])
    return files, None


def _gguf_of_directory(path: Path) -> Path:
    """The one GGUF model of a directory, by its first part. Projectors of vision models go by the name of mmproj."""
    files = sorted(file for file in path.glob(f"*{_GGUF}") if not file.name.startswith("mmproj"))
    models = [file for file in files if not (part := _SHARD_NAME.match(file.name)) or int(part["number"]) == 1]
    if len(models) > 1:
        names = ", ".join(file.name for file in models[:_MOST_NAMED]) + (", …" if len(models) > _MOST_NAMED else "")
        raise CheckpointError(
            f"{path}: {len(models)} GGUF models in this directory: {names}", hint="give one of the files"
        )
    if not files:
        raise CheckpointError(f"{path}: {_why_no_weights(path)}", hint=_ACCEPTED)
    return (models or files)[0]


def _files_of_index(index: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = _read_index(index)
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file}: missing shard, {index.name} names it", hint="fetch the file again")
    return files, weight_map


def _why_no_weights(path: Path) -> str:
    found = sorted({_UNSUPPORTED[file.suffix] for file in path.iterdir() if file.suffix in _UNSUPPORTED})
    if found:
        return f"only {', '.join(found)} found, not supported yet; no .safetensors, .gguf or pytorch_model.bin file"
    if any(path.iterdir()):
        return "no .safetensors, .gguf or pytorch_model.bin file in this directory"
    return "the directory is empty"


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


def _read_index(path: Path) -> dict[str, str]:
    suffix = ".bin" if path.name == TORCH_INDEX else ".safetensors"
    weight_map = strict_json.read_object(path, strict_json.MAX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_inside(name):
            raise CheckpointError(f"{path}: tensor {tensor!r} is placed in {str(name)[:80]!r}, outside the directory")
        if not name.endswith(suffix):
            raise CheckpointError(f"{path}: tensor {tensor!r} is placed in {name[:80]!r}, not a {suffix} file")
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
            raise CheckpointError(
                f"{path.parent / file}: tensor {name!r} is not in this shard, though {path.name} says so"
            )
    if extra := len(tensors) - len(weight_map):
        return [f"{extra} stored tensors are not named in {path.name}"]
    return []


def _read_config(directory: Path) -> dict[str, Any]:
    """config.json, or the params.json of Mistral's own layout, or nothing. Python's writers put Infinity into them."""
    for path in (directory / "config.json", directory / "params.json"):
        if path.exists():
            return strict_json.read_object(path, _CONFIG_BYTES, constants=True)
    return {}


def _revision(directory: Path) -> str | None:
    """The commit a Hub cache directory stands for: …/snapshots/<40 hex digits>."""
    name = directory.absolute().name
    known = directory.absolute().parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", name)
    return name if known else None


def _hint_for_missing(path: Path) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", str(path)):
        return "Hub ids are not supported yet; download the model and give its directory"
    return _ACCEPTED
