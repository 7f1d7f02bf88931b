"""The header of a PyTorch file (pytorch_model.bin, .pt, .pth): where each tensor lies, found without running anything.

Since PyTorch 1.6 (2020) torch.save writes a zip of stored members under one folder: data.pkl, the pickle of what was
saved, in which tensors refer to storages by key; data/<key>, each storage's bytes, aligned to 64; byteorder; version.
`stored_zip` finds the members and `tensor_pickle` reads the pickle without executing it; what both claim is checked
against each other here, so that the bytes of a tensor can be streamed straight from the file, as from safetensors.

The state dict is what was saved or, where that is a dict with one of `WRAPPERS` in it that holds tensors, the one in
there, under its own names; values that are not tensors are left out. A tensor whose elements do not lie in C order
(the transpose of another) gets a dtype that says so and that no back end reads: it is refused, by name, only if needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmfp.checkpoint import tensor_pickle
from llmfp.checkpoint.specs import ITEM_BITS, Shard, TensorSpec
from llmfp.checkpoint.stored_file import StoredFile, opened
from llmfp.checkpoint.stored_zip import StoredZip
from llmfp.checkpoint.tensor_pickle import Dict, PickleRefusedError, Tensor
from llmfp.errors import CheckpointError

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training loops keep the state dict."""

_RESAVE = "load it with the library that wrote it and save its state dict as safetensors"
_MAX_INT = 2**63 - 1
_MAX_RANK = 64
_MAX_TENSORS = 1 << 18


def read_header(path: Path | StoredFile, shard: int) -> tuple[Shard, list[TensorSpec]]:
    """The file as a `Shard` and its tensors in file order, located absolutely. Reads directory, headers and pickle."""
    with opened(path) as file:
        magic = file.read_at(0, 4)
        if magic != b"PK\3\4":
            raise _not_an_archive(file.path, magic)
        archive = StoredZip(file)
        tensors = _tensors(archive, file.path, shard)
        return file.shard(len(magic) + archive.bytes_read), tensors


def _not_an_archive(path: Path, magic: bytes) -> CheckpointError:
    if magic[:1] == b"\x80":
        return CheckpointError(
            f"{path}: a plain pickle, as PyTorch wrote before 1.6, which cannot be mapped",
            hint="load it with torch.load(…, weights_only=True) and save it with torch.save, or as safetensors",
        )
    problem = "truncated" if len(magic) < 4 else "not a PyTorch zip archive"
    return CheckpointError(f"{path}: {problem}", hint="fetch the file again, or convert the model to safetensors")


def _tensors(archive: StoredZip, path: Path, shard: int) -> list[TensorSpec]:
    roots = {name.split("/", 1)[0] for name in archive}
    root = next(iter(roots), "")
    if len(roots) != 1 or f"{root}/data.pkl" not in archive:
        raise CheckpointError(f"{path}: a zip archive without one data.pkl, so not written by torch.save")
    if f"{root}/constants.pkl" in archive:
        raise CheckpointError(f"{path}: a TorchScript program, not a state dict", hint=_RESAVE)
    if f"{root}/byteorder" in archive and (order := archive.read(f"{root}/byteorder", 16)) != b"little":
        raise CheckpointError(f"{path}: byte order {order!r} is not supported, only little", hint=_RESAVE)
    try:
        saved = tensor_pickle.parse(archive.read(f"{root}/data.pkl", tensor_pickle.MAX_BYTES))
    except PickleRefusedError as error:
        raise CheckpointError(f"{path}: {root}/data.pkl: {error}", hint=_RESAVE) from None
    located: dict[str, tuple[int, int, str]] = {}
    specs = []
    for name, tensor in _state_dict(saved, path).items():
        where = f"{path}: tensor {name[:200]!r}"
        dtype, item, numel = _element(tensor, where)
        key = tensor.storage.key
        if not isinstance(key, str) or (member := f"{root}/data/{key}") not in archive:
            raise CheckpointError(f"{where}: its storage is not in the archive")
        if key not in located:
            located[key] = (*archive.locate(member), dtype)
        start, nbytes, dtype_of_storage = located[key]
        if dtype != dtype_of_storage:
            raise CheckpointError(f"{where}: is {dtype} in a storage of {dtype_of_storage}")
        if numel * item != nbytes:
            raise CheckpointError(f"{where}: its storage should hold {numel * item} bytes, {member} holds {nbytes}")
        size, stride = _naturals(tensor.size), _naturals(tensor.stride)
        offset = tensor.offset
        if size is None or stride is None or len(size) != len(stride) or type(offset) is not int or offset < 0:
            raise CheckpointError(f"{where}: its size, strides or offset are no natural numbers")
        extent = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if (offset + extent) * item > nbytes:
            raise CheckpointError(f"{where}: reaches element {offset + extent} of a storage of {nbytes // item}")
        if not _in_c_order(size, stride):
            dtype = f"{dtype} with strides {list(stride)}"
        if _is_lazy(tensor.metadata):
            dtype = f"{dtype} still to be negated or conjugated"
        specs.append(TensorSpec(name, dtype, size, shard, start + offset * item, extent * item))
    return sorted(specs, key=lambda spec: (spec.offset_bytes, spec.nbytes))


def _state_dict(saved: object, path: Path) -> dict[str, Tensor]:
    """The tensors of the model by name, from whatever was saved."""
    if not isinstance(saved, Dict):
        raise CheckpointError(f"{path}: holds a {type(saved).__name__.lower()}, not a state dict", hint=_RESAVE)
    wrapped = [
        (key, value)
        for key, value in saved.items
        if isinstance(key, str) and key in WRAPPERS and isinstance(value, Dict) and _holds_tensors(value)
    ]
    if len(wrapped) > 1:
        keys = ", ".join(repr(key) for key, _ in wrapped)
        raise CheckpointError(f"{path}: {keys} all hold tensors; which is the model is not clear", hint=_RESAVE)
    tensors: dict[str, Tensor] = {}
    for name, value in (wrapped[0][1] if wrapped else saved).items:
        if not isinstance(value, Tensor):
            continue
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: a tensor is named by a {type(name).__name__}", hint=_RESAVE)
        if name in tensors:
            raise CheckpointError(f"{path}: tensor {name[:200]!r} is there twice")
        if len(tensors) == _MAX_TENSORS:
            raise CheckpointError(f"{path}: more than {_MAX_TENSORS} tensors")
        tensors[name] = value
    if not tensors:
        keys = ", ".join(repr(key[:40]) for key, _ in saved.items[:8] if isinstance(key, str))
        raise CheckpointError(f"{path}: no tensors at the top of what was saved (keys: {keys or 'none'})", hint=_RESAVE)
    return tensors


def _holds_tensors(value: Dict) -> bool:
    return any(isinstance(item, Tensor) for _, item in value.items)


def _element(tensor: Tensor, where: str) -> tuple[str, int, int]:
    """dtype, bytes per element, and elements in the storage; an untyped storage counts bytes."""
    if tensor.dtype is None:
        raise CheckpointError(f"{where}: neither the tensor nor its storage has a dtype")
    item = 16 if tensor.dtype == "C128" else ITEM_BITS[tensor.dtype] // 8
    numel = tensor.storage.numel
    if type(numel) is not int or not 0 <= numel <= _MAX_INT:
        raise CheckpointError(f"{where}: its storage has no valid size")
    if tensor.storage.dtype not in (None, tensor.dtype):
        raise CheckpointError(f"{where}: is {tensor.dtype} in a storage of {tensor.storage.dtype}")
    if tensor.storage.dtype is None:
        if numel % item:
            raise CheckpointError(f"{where}: its storage of {numel} bytes is no whole number of {tensor.dtype}")
        numel //= item
    return tensor.dtype, item, numel


def _naturals(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, tuple) or len(value) > _MAX_RANK:
        return None
    return value if all(type(each) is int and 0 <= each <= _MAX_INT for each in value) else None


def _in_c_order(size: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for n, step in zip(reversed(size), reversed(stride), strict=True):
        if n != 1 and step != expected:
            return 0 in size
        expected *= n
    return True


def _is_lazy(metadata: object) -> bool:
    """Whether torch put off a negation or conjugation until the elements are used; nothing else is known to be here."""
    return not (metadata is None or (isinstance(metadata, Dict) and all(on is False for _, on in metadata.items)))
