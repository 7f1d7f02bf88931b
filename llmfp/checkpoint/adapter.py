"""A PEFT adapter on its base, as one checkpoint: every adapted tensor of the base knows what is added to it.

The model that `merge_and_unload` would make, without making it. Tensors that the adapter brings whole (trained biases,
norms, modules_to_save) take the place of the base's. What LoRA's relatives do to the base is refused by name. Source:
PEFT's LoraConfig and its documentation; checked against a real adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmfp.checkpoint import strict_json
from llmfp.checkpoint.directory import open_checkpoint
from llmfp.checkpoint.specs import Checkpoint, LoraSpec, TensorSpec
from llmfp.errors import CheckpointError

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MODELS = ("model*.safetensors", "pytorch_model*.bin", "*.gguf")
_CONFIG_BYTES = 1 << 20
_WRAPPER = "base_model.model."
_WEIGHT = ("weight", "qweight", "weight_packed", "W_q")
"""What a module's weights are called, as floats or as codes."""
_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?$")
_INITS_THAT_KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
_UNSUPPORTED = {
    "use_dora": "DoRA, which rescales every row of the sum by its norm",
    "use_qalora": "QA-LoRA, which pools the inputs in groups",
    "lora_bias": "lora_bias, which changes the biases",
    "layer_replication": "layer_replication, which repeats layers of the base",
    "target_parameters": "target_parameters, which adapts parameters that are no modules",
    "megatron_config": "megatron_config, whose tensors are split for model parallelism",
    "alora_invocation_tokens": "aLoRA, which is switched on by a prompt",
    "arrow_config": "Arrow, which routes between adapters",
}
"""Keys of the adapter's config that must be unset, and what they would mean."""
# Patterns are hostile: without a group that repeats, matching one is at worst a small power of the name's length.
_SAFE_PATTERN = re.compile(r"^(?:[\w|^$-]|\\?\.[*+]?|\[[\w-]{1,40}\]\+?|\\d\+?){1,200}$")


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    try:
        if not any((path / name).is_file() for name in _WEIGHTS):
            return False
        return not any(next(path.glob(model), None) for model in _MODELS)
    except OSError:
        return False  # a path that cannot be: opening it says why


def open_adapted(path: Path, base: Path | None) -> Checkpoint:
    """The base with the adapter's tensors beside and, by `lora`, on top of its own.

    Raises CheckpointError, naming file, tensor or field, for adapters that are not plain LoRA, or not of this base.
    """
    config = _read_config(path / CONFIG)
    if base is None:
        named = config.get("base_model_name_or_path")
        of = f" of {strict_json.shown(named)}" if isinstance(named, str) and named else ""
        raise CheckpointError(
            f"{path}: an adapter{of}, which says nothing without its base model",
            hint="give the base's directory or file with --base",
        )
    _check_supported(path / CONFIG, config)
    below = open_checkpoint(base)
    weights = next((path / name for name in _WEIGHTS if (path / name).is_file()), None)
    if weights is None:
        raise CheckpointError(f"{path}: neither {' nor '.join(_WEIGHTS)} is in this directory")
    above = open_checkpoint(weights)
    own = {name: replace(spec, shard=spec.shard + len(below.shards)) for name, spec in above.tensors.items()}
    factors, whole = _sorted_out(weights, own)
    tensors, names = dict(below.tensors), _Names(below.tensors)
    for module, pair in factors.items():
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{weights}: {module!r} has only factor {''.join(pair)} of A and B")
        target = next((found for last in _WEIGHT if (found := names.find(f"{module}.{last}")) is not None), None)
        if target is None:
            raise CheckpointError(
                f"{weights}: tensor {pair['A'].name!r} adapts {module!r}, which the base does not have",
                hint=f"is {base} the model that {CONFIG} names?",
            )
        tensors[target] = replace(tensors[target], lora=_lora(path / CONFIG, config, module, pair["A"], pair["B"]))
    replaced = {target: spec for name, spec in whole.items() if (target := names.find(name)) is not None}
    if not factors and not replaced:
        raise CheckpointError(f"{weights}: holds no LoRA factors, and nothing that {base} has")
    tensors |= {target: replace(spec, name=target) for target, spec in replaced.items()}
    taken = {spec.name for spec in replaced.values()}
    beside = {name: spec for name, spec in own.items() if name not in taken and name not in tensors}
    caveat = f"the model merged of {base.name} and an adapter: {len(factors)} tensors adapted, {len(replaced)} replaced"
    return replace(
        below,
        path=path,
        shards=(*below.shards, *above.shards),
        tensors={**tensors, **beside},
        caveats=(*below.caveats, caveat),
        base=base,
    )


def _sorted_out(
    weights: Path, own: Mapping[str, TensorSpec]
) -> tuple[dict[str, dict[str, TensorSpec]], dict[str, TensorSpec]]:
    """The adapter's tensors: factors A and B by module, and those it brings whole, by the name they have in a model."""
    factors: dict[str, dict[str, TensorSpec]] = {}
    whole = {}
    for name, spec in own.items():
        bare = name.removeprefix(_WRAPPER)
        if found := _LORA.match(bare):
            pair = factors.setdefault(found["module"], {})
            if found["factor"] in pair:
                raise CheckpointError(f"{weights}: tensor {name!r}: there are several adapters in this file")
            pair[found["factor"]] = spec
        elif ".lora_embedding_" in bare:
            continue  # embeddings are not read
        elif ".lora_" in bare:
            raise CheckpointError(
                f"{weights}: tensor {name!r} belongs to a kind of LoRA that is not supported",
                hint="merge the adapter into its base and scan the result",
            )
        else:
            whole[bare.replace(".modules_to_save", "")] = spec
    return factors, whole


class _Names:
    """Finds the base's tensor that an adapter means: wrappers in front of the shared end of a name may differ."""

    def __init__(self, tensors: Mapping[str, TensorSpec]) -> None:
        self._tensors = tensors
        self._by_end: dict[str, list[str]] = {}
        for name in tensors:
            self._by_end.setdefault(".".join(name.split(".")[-3:]), []).append(name)

    def find(self, name: str) -> str | None:
        if name in self._tensors:
            return name
        alike = [
            stored
            for stored in self._by_end.get(".".join(name.split(".")[-3:]), ())
            if name.endswith(f".{stored}") or stored.endswith(f".{name}")
        ]
        return alike[0] if len(alike) == 1 else None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; it says how strongly the adapter acts", hint="give the adapter's whole directory"
        )
    return strict_json.read_object(path, _CONFIG_BYTES)


def _check_supported(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        what = f"peft_type is {strict_json.shown(kind)}, not 'LORA'" if kind else "no peft_type; not a PEFT adapter"
        raise CheckpointError(f"{path}: {what}", hint="merge the adapter into its base and scan the result")
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise CheckpointError(
                f"{path}: {what}, is not supported", hint="merge the adapter into its base and scan the result"
            )
    init = config.get("init_lora_weights")
    if not any(init is known or (isinstance(init, str) and init == known) for known in _INITS_THAT_KEEP_THE_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights {strict_json.shown(init)} trains against a changed base, not the one stored",
            hint="convert it to plain LoRA, or merge it and scan the result",
        )


def _lora(path: Path, config: Mapping[str, Any], module: str, a: TensorSpec, b: TensorSpec) -> LoraSpec:
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise CheckpointError(
            f"{path.parent}: tensors {a.name!r} {list(a.shape)} and {b.name!r} {list(b.shape)} are not factors of one"
        )
    rank = _for_module(path, config, "rank_pattern", module, config.get("r"))
    if rank != a.shape[0]:
        raise CheckpointError(
            f"{path}: the rank of {module!r} is {strict_json.shown(rank)}, and tensor {a.name!r} has {a.shape[0]} rows"
        )
    alpha = _for_module(path, config, "alpha_pattern", module, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{path}: lora_alpha of {module!r} is {strict_json.shown(alpha)}, not a number")
    return LoraSpec(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _for_module(path: Path, config: Mapping[str, Any], key: str, module: str, default: object) -> Any:
    """What a pattern of the config says for a module; the first whose end matches the module's name, as PEFT does."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{path}: {key} is no object")
    for pattern, value in patterns.items():
        if not _SAFE_PATTERN.match(pattern) or pattern.count("*") + pattern.count("+") > 3:
            raise CheckpointError(f"{path}: {key} {strict_json.shown(pattern)} is not a simple pattern of module names")
        if re.match(rf"(.*\.)?({pattern})$", module[-500:]):
            return value
    return default
