"""A model in memory as a `Checkpoint`: the tensors of a torch.nn.Module, or of a mapping from names to tensors.

Tensors are laid end to end, in order, into one imaginary file that bears the model's class name, so that everything
behind it (matching, planning, the engine) is what it is for files. Nothing is copied and torch is not imported: a
tensor says by itself what it is. Tied parameters share their place, as they share their memory.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmfp.checkpoint.live_adapter import Adapters, Factors, adapters_of, with_factors
from llmfp.checkpoint.specs import Checkpoint, Shard, TensorSpec
from llmfp.errors import CheckpointError

if TYPE_CHECKING:
    import torch

DTYPES = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16",
    "int32": "I32", "uint32": "U32", "int64": "I64", "uint64": "U64", "complex64": "C64",
}  # fmt: skip
"""torch's names → safetensors'."""

_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")
"""Components that activation checkpointing and torch.compile put into names."""
_MERGE = "give the model itself, not its state dict, or save it and scan the adapter's directory with its base"


class Place(NamedTuple):
    """Where a tensor lies in the imaginary file."""

    offset_bytes: int
    name: str
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class LiveCheckpoint(Checkpoint):
    """A checkpoint whose one shard is no file: `places`, in order, hold its bytes."""

    places: tuple[Place, ...] = ()

    def place(self, offset_bytes: int) -> Place:
        """The tensor that holds the byte at this offset."""
        return self.places[bisect_right(self.places, offset_bytes, key=lambda place: place.offset_bytes) - 1]

    def read_small(self, spec: TensorSpec) -> bytes:
        """A small tensor's bytes, copied. Raises CheckpointError for one that holds none."""
        tensor = self.place(spec.offset_bytes).tensor
        if reason := why_unreadable(tensor):
            raise CheckpointError(f"{self.path}: tensor {spec.name!r} {reason}")
        return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(sys.modules["torch"].uint8).numpy())


def open_live(
    source: torch.nn.Module | Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = None
) -> LiveCheckpoint:
    """The checkpoint that a model, or its state dict, is.

    config  what config.json would say; a model's own when None

    Raises CheckpointError for a mapping without tensors, and for a model wrapped by the first FSDP, whose parameters
    are flat pieces of several; and for what PEFT adapts otherwise than by plain LoRA.
    """
    name = type(source).__name__ if not isinstance(source, Mapping) else "state dict"
    adapters = Adapters({}, {})
    if isinstance(source, Mapping):
        tensors: Mapping[str, Any] = source
    elif not hasattr(source, "state_dict"):
        raise CheckpointError(
            f"{name}: neither a path nor a model", hint="give a torch.nn.Module, or tensors by their names"
        )
    else:
        if wrapped := _flattened(source):
            raise CheckpointError(
                f"{name}: {wrapped} is wrapped by FullyShardedDataParallel, whose parameters are flattened",
                hint="scan inside FullyShardedDataParallel.summon_full_params(model), shard with fully_shard, or give "
                "a full state dict",
            )
        adapters = adapters_of(source)
        tensors = source.state_dict()
        own = _config(source)
        config = own if config is None else config
        revision = own.get("_commit_hash")
    specs: dict[str, TensorSpec] = {}
    places: dict[tuple[object, ...], Place] = {}
    end = 0
    for key, tensor in tensors.items():
        if not (hasattr(tensor, "dtype") and hasattr(tensor, "element_size")):
            continue  # what get_extra_state() returns, or an optimizer's numbers
        plain = adapters.plain(str(key)) if adapters.names else str(key)
        if plain is None:
            continue
        plain = _unwrapped(plain)
        dtype = str(tensor.dtype).removeprefix("torch.")
        nbytes = tensor.numel() * tensor.element_size()
        place = places.setdefault(_identity(plain, tensor), Place(end, plain, tensor))
        if place.offset_bytes == end:
            end += max(nbytes, 1)
        specs[plain] = TensorSpec(plain, DTYPES.get(dtype, dtype), tuple(tensor.shape), 0, place.offset_bytes, nbytes)
    if not specs:
        raise CheckpointError(f"{name}: holds no tensor", hint="give a torch.nn.Module, or tensors by their names")
    adapter = next((key for key in specs if ".lora_A." in key), None)
    if adapter is not None and not adapters.names:
        raise CheckpointError(f"{name}: tensor {adapter!r} belongs to a LoRA adapter", hint=_MERGE)
    factors = {
        _unwrapped(key): Factors(_unwrapped(a), _unwrapped(b), scale) for key, (a, b, scale) in adapters.factors.items()
    }
    return LiveCheckpoint(
        path=Path(name),
        shards=(Shard(Path(name), end, 0, (0, 0, 0), None),),
        tensors=with_factors(specs, factors),
        config=dict(config or {}),
        revision=revision if not isinstance(source, Mapping) and isinstance(revision, str) else None,
        caveats=(f"the model merged of a base and an adapter: {len(factors)} tensors adapted",) if factors else (),
        places=tuple(places.values()),
    )


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor: FSDP2's and tensor parallelism's parameters."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def why_unreadable(tensor: torch.Tensor) -> str | None:
    """What a tensor is where its elements are not simply in memory; None where they are, or can be gathered."""
    torch = sys.modules["torch"]
    kind = type(tensor)
    if is_sharded(tensor):
        return None
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {kind.__name__}, which is not supported"
    if tensor.device.type == "meta":
        return "is on device meta and has no values"
    if tensor.layout != torch.strided:
        return f"is laid out as {tensor.layout}, which is not supported"
    return None


def _flattened(model: torch.nn.Module) -> str | None:
    """The name of a module that the first FSDP wraps."""
    wrapper = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if wrapper is None:
        return None
    return next((name or "the model" for name, each in model.named_modules() if isinstance(each, wrapper)), None)


def _config(model: Any) -> dict[str, Any]:
    """The config of a model, or of what DistributedDataParallel or torch.compile wrap; {} where there is none."""
    for each in (model, getattr(model, "module", None), getattr(model, "_orig_mod", None)):
        config = getattr(each, "config", None)
        if isinstance(config, Mapping):
            return dict(config)
        if config is not None and hasattr(config, "to_dict"):
            stated: dict[str, Any] = config.to_dict()
            return stated | {"_commit_hash": getattr(config, "_commit_hash", None)}
    return {}


def _unwrapped(name: str) -> str:
    """A parameter's name without what wrappers add."""
    if any(wrapper in name for wrapper in _WRAPPERS):
        return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    return name


def _identity(name: str, tensor: torch.Tensor) -> tuple[object, ...]:
    """The same for tied parameters and for nothing else."""
    if why_unreadable(tensor) or is_sharded(tensor) or tensor.numel() == 0:
        return (name,)
    return str(tensor.device), tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())


__all__ = ["LiveCheckpoint", "Place", "is_sharded", "open_live", "why_unreadable"]
