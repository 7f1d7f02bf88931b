"""Recognises a family by its tensor names and lays views over its attention weights.

Names are matched whole, from the first component on: a vision tower's `self_attn.q_proj` is never taken for the
decoder's. Where config.json contradicts the shapes, the shapes win and a caveat says so.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from llmfp.architecture.families import DRAFT, NORM_PARTS, PARTS, WITNESS, Family, Slot, TowerNames, families, slots
from llmfp.architecture.specs import ROLES, AttentionMap, NormGain, Projection, Role, Tower, WeightView
from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.errors import ArchitectureError, EncodingError, LlmfpError

_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads")
_HEAD_DIM = ("head_dim", "d_kv", "kv_channels")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_SCALES = (
    "weight_scale", "weight_scale_inv", "weight_scale_2", "scale", "scales", "scale_weight", "qscale_weight", "SCB",
    "weight.absmax",
)  # fmt: skip
_PACKED = {"qweight": "GPTQ or AWQ", "weight_packed": "compressed-tensors", "W_q": "HQQ", "trellis": "EXL3"}
_FLOATS = ("BF16", "F16", "F32", "F64")
_FLOATS_8BIT = ("F8_E4M3", "F8_E5M2")
_CLOSEST = 6
_DRAFT_REASON = "multi-token prediction, not a decoder layer"
_MOST_NAMES, _LONGEST_NAME = 1000, 80


class _Found(NamedTuple):
    """A stored tensor that fills a slot of the chosen family in one layer."""

    slot: Slot
    block: str
    layer: int
    spec: TensorSpec


def match(checkpoint: Checkpoint) -> AttentionMap:
    """The attention projections of a checkpoint. Raises ArchitectureError when none is recognised."""
    candidates = _recognise(checkpoint.tensors.values())
    config = _text_config(checkpoint.config)
    family = _choose(candidates, _model_types(checkpoint.config))
    if family is None:
        raise _unrecognised(checkpoint)
    found = [found for found in candidates if found.slot.family == family.name]
    drafts = {(each.block, each.layer) for each in found if each.slot.part == DRAFT}
    found = _one_stack_per_tower(each for each in found if (each.block, each.layer) not in drafts)
    caveats = _config_caveats(checkpoint, family, config, found)
    towers = []
    for name in sorted({each.slot.tower for each in found if each.slot.part in PARTS}):
        in_tower = [each for each in found if each.slot.tower == name]
        towers.append(_tower(checkpoint, name, family.towers[name], in_tower, config, caveats))
    used = {projection.view.tensor.name for tower in towers for projection in tower.projections}
    used |= {p.gain.tensor.name for tower in towers for p in tower.projections if p.gain}
    skipped = {name: _why_skipped(name) for name in checkpoint.tensors if name not in used}
    skipped |= {c.spec.name: _DRAFT_REASON for c in candidates if (c.block, c.layer) in drafts}
    return AttentionMap(family.name, tuple(towers), skipped, tuple(caveats))


def _recognise(specs: Iterable[TensorSpec]) -> list[_Found]:
    """Every slot of every family that a stored name fills."""
    table, result = slots(), []
    for spec in specs:
        name = spec.name.removeprefix("module.")
        if "_orig_mod" in name:
            name = name.replace("_orig_mod.", "")
        parts = name.split(".")
        for position, part in enumerate(parts):
            if part.isascii() and part.isdigit() and len(part) < 6:
                template = ".".join((*parts[:position], "{layer}", *parts[position + 1 :]))
                block = template.split("{layer}")[0]
                result += [_Found(slot, block, int(part), spec) for slot in table.get(template, ())]
    return result


def _choose(candidates: Iterable[_Found], model_types: set[str]) -> Family | None:
    """The family the config names, if its tensors are there; else the one that explains most attention tensors, then
    most tensors."""
    explained: Counter[str] = Counter()
    with_attention: Counter[str] = Counter()
    with_witness = set()
    for found in candidates:
        explained[found.slot.family] += 1
        if found.slot.part in PARTS:
            with_attention[found.slot.family] += 1
        if found.slot.part == WITNESS:
            with_witness.add(found.slot.family)
    known = families()

    def possible(name: str) -> bool:
        return bool(known[name].model_types & model_types) or not known[name].has_witness or name in with_witness

    ranked = sorted(
        filter(possible, with_attention),
        key=lambda name: (
            not known[name].model_types & model_types,
            -with_attention[name],
            -explained[name],
            not known[name].generic,
            name,
        ),
    )
    return known[ranked[0]] if ranked else None


def _one_stack_per_tower(found: Iterable[_Found]) -> list[_Found]:
    """Of several places where a tower's layers were found, the one with most tensors; the rest is left unread."""
    by_place: defaultdict[tuple[str, str], list[_Found]] = defaultdict(list)
    for each in found:
        by_place[each.slot.tower, each.block].append(each)
    best: dict[str, list[_Found]] = {}
    for (tower, _), group in sorted(by_place.items()):
        if len(group) > len(best.get(tower, ())):
            best[tower] = group
    return [each for group in best.values() for each in group]


def _tower(
    checkpoint: Checkpoint,
    name: str,
    names: TowerNames,
    found: list[_Found],
    config: Mapping[str, Any],
    caveats: list[str],
) -> Tower:
    by_layer: defaultdict[int, dict[str, TensorSpec]] = defaultdict(dict)
    for each in found:
        if other := by_layer[each.layer].get(each.slot.part):
            raise ArchitectureError(
                f"{_file(checkpoint, each.spec)}: tensors {other.name!r} and {each.spec.name!r} "
                f"are both the {each.slot.part} of {name} layer {each.layer}"
            )
        by_layer[each.layer][each.slot.part] = each.spec
    views: dict[tuple[int, Role], WeightView] = {}
    for layer, parts in sorted(by_layer.items()):
        for part in parts:
            if part in PARTS:
                _check_readable(checkpoint, parts[part])
        in_layer = _views(checkpoint, parts, names.transposed)
        _check_shapes(checkpoint, in_layer)
        views |= {(layer, role): view for role, view in in_layer.items()}
    layers = {layer for layer, _ in views}
    missing = Counter(role for role in ROLES for layer in layers if (layer, role) not in views)
    caveats += [f"{count} of {len(layers)} {name} layers have no {role} projection" for role, count in missing.items()]
    heads, kv_heads, head_dim = _head_counts(views, config, caveats)
    projections = []
    for (layer, role), view in views.items():
        gain = _gain(by_layer[layer], role, names, view, caveats)
        # Behind a post-norm's gain and bias the input has a mean of its own: only a pre-norm hides it from the reads.
        centred = names.norm_kind == "layer" and not (role.reads and names.post_norm)
        projections.append(Projection(layer, role, view, gain, centred, head_dim))
    hidden_size = Counter(p.residual_size for p in projections).most_common(1)[0][0]
    return Tower(name, tuple(projections), heads, kv_heads, head_dim, hidden_size)


def _views(checkpoint: Checkpoint, parts: Mapping[str, TensorSpec], transposed: bool) -> dict[Role, WeightView]:
    views = {}
    for role in ROLES:
        if role in parts:
            rows, cols = parts[role].shape
            views[role] = WeightView(parts[role], 1, rows, cols, 0, rows * cols, cols, transposed)
    if "qkv" in parts:
        views |= _split_concatenated(checkpoint, parts["qkv"], views.get(Role.O), transposed)
    return views


def _split_concatenated(
    checkpoint: Checkpoint, spec: TensorSpec, o: WeightView | None, transposed: bool
) -> dict[Role, WeightView]:
    """Q, then K, then V along the outputs of one tensor. O reads what Q's heads put out, so O's shape gives Q's."""
    rows, cols = spec.shape
    outputs = cols if transposed else rows
    if o is None:
        raise ArchitectureError(
            f"{_file(checkpoint, spec)}: tensor {spec.name!r} cannot be split without its layer's output projection"
        )
    kv_outputs, odd = divmod(outputs - o.inputs, 2)
    if odd or kv_outputs <= 0:
        raise ArchitectureError(
            f"{_file(checkpoint, spec)}: tensor {spec.name!r} of shape {list(spec.shape)} "
            f"does not split into {o.inputs} query outputs and equal keys and values"
        )
    views, first = {}, 0
    for role, size in ((Role.Q, o.inputs), (Role.K, kv_outputs), (Role.V, kv_outputs)):
        shape = (rows, size) if transposed else (size, cols)
        start = first if transposed else first * cols
        views[role] = WeightView(spec, 1, *shape, start, rows * cols, cols, transposed)
        first += size
    return views


def _check_shapes(checkpoint: Checkpoint, views: Mapping[Role, WeightView]) -> None:
    """Q puts out what O reads and K what V puts out, or, where keys and values differ in size per head, in proportion.

    Raises ArchitectureError where they do not: a query fused with its gate (Qwen3-Next) is no query.
    """
    if len(views) < len(ROLES):
        return
    q, k, v, o = (views[role] for role in ROLES)
    if q.outputs * v.outputs != o.inputs * k.outputs:
        raise ArchitectureError(
            f"{_file(checkpoint, q.tensor)}: tensor {q.tensor.name!r} has {q.outputs} outputs where {o.tensor.name!r} "
            f"reads {o.inputs}, with {k.outputs} key and {v.outputs} value outputs; this layout is not known"
        )


def _check_readable(checkpoint: Checkpoint, spec: TensorSpec) -> None:
    where = f"{_file(checkpoint, spec)}: tensor {spec.name!r}"
    if len(spec.shape) != 2:
        raise ArchitectureError(f"{where} has shape {list(spec.shape)}; an attention projection has two dimensions")
    if 0 in spec.shape:
        raise ArchitectureError(f"{where} has shape {list(spec.shape)} and so no elements")
    module = spec.name.removesuffix("weight")
    scale = next((module + suffix for suffix in _SCALES if module + suffix in checkpoint.tensors), None)
    if scale is not None:
        raise EncodingError(
            f"{where} is quantised (its scales are in {scale!r}), which is not supported yet",
            hint="scan the unquantised checkpoint",
        )
    if spec.dtype in _FLOATS_8BIT and "quantization_config" in checkpoint.config:
        raise EncodingError(
            f"{where} is {spec.dtype} and quantised, says config.json, but its scales were not found",
            hint="scan the unquantised checkpoint",
        )
    if " " in spec.dtype:  # torch_archive: "F32 with strides [1, 8]"
        raise EncodingError(
            f"{where} is stored as {spec.dtype}, which is not supported",
            hint="make the tensors .contiguous() and save the model again, as safetensors",
        )
    if spec.dtype not in (*_FLOATS, *_FLOATS_8BIT):
        raise EncodingError(
            f"{where} is stored as {spec.dtype}, which is not supported yet",
            hint=f"supported are {', '.join((*_FLOATS, *_FLOATS_8BIT))}; scan the unquantised checkpoint",
        )


def _gain(
    parts: Mapping[str, TensorSpec], role: Role, names: TowerNames, view: WeightView, caveats: list[str]
) -> NormGain | None:
    spec = parts.get(NORM_PARTS[0] if role.reads else NORM_PARTS[1])
    if spec is None:
        return None
    size = view.inputs if role.reads else view.outputs
    if spec.shape != (size,) or spec.dtype not in _FLOATS:
        stored = f"{spec.dtype} {list(spec.shape)}"
        caveats.append(f"norm gain {spec.name!r} is {stored}, not a float of [{size}]; taken as 1")
        return None
    return NormGain(spec, names.norm_offset)


def _head_counts(
    views: Mapping[tuple[int, Role], WeightView], config: Mapping[str, Any], caveats: list[str]
) -> tuple[int | None, int | None, int | None]:
    """(heads, kv_heads, head_dim) of most layers. The config says how many heads, the shapes how large they are."""
    outputs = {role: Counter(v.outputs for (_, r), v in views.items() if r is role) for role in (Role.Q, Role.K)}
    if not outputs[Role.Q]:
        return None, None, None
    q_outputs = outputs[Role.Q].most_common(1)[0][0]
    heads, stated_dim = _integer(config, _HEADS), _integer(config, _HEAD_DIM)
    if heads is None or q_outputs % heads:
        if heads is not None:
            caveats.append(f"config.json says {heads} heads, which do not divide the {q_outputs} query outputs")
        if stated_dim is None or q_outputs % stated_dim:
            return None, None, None
        heads = q_outputs // stated_dim
    head_dim = q_outputs // heads
    if stated_dim is not None and stated_dim != head_dim:
        caveats.append(f"config.json says head_dim {stated_dim}, the shapes say {head_dim}; the shapes are used")
    if not outputs[Role.K]:
        return heads, None, head_dim
    kv_outputs = outputs[Role.K].most_common(1)[0][0]
    stated_kv = _integer(config, _KV_HEADS)
    if kv_outputs % head_dim:
        caveats.append(f"{kv_outputs} key outputs are no whole number of heads of {head_dim}")
        return heads, None, head_dim
    kv_heads = kv_outputs // head_dim
    if stated_kv is not None and stated_kv != kv_heads:
        caveats.append(f"config.json says {stated_kv} kv heads, the shapes say {kv_heads}; the shapes are used")
    return heads, kv_heads, head_dim


def _config_caveats(
    checkpoint: Checkpoint, family: Family, config: Mapping[str, Any], found: Iterable[_Found]
) -> list[str]:
    if not checkpoint.config:
        return [
            "config.json is missing: head counts are unknown, so there are no per-head statistics, "
            f"and the norms are assumed to be those of the {family.name} family"
        ]
    caveats = []
    model_types = _model_types(checkpoint.config)
    if model_types and not model_types & family.model_types:
        caveats.append(
            f"model type {', '.join(map(repr, sorted(model_types)))} is not known; "
            f"names match the {family.name} family, whose norms are assumed"
        )
    stored = len({each.layer for each in found if each.slot.part in PARTS and each.slot.tower != "encoder"})
    stated = _integer(config, _LAYERS)
    if stated is not None and stored > stated:
        caveats.append(f"config.json says {stated} layers, {stored} are stored; all are used")
    return caveats


def _model_types(config: Mapping[str, Any]) -> set[str]:
    nested = (value for value in config.values() if isinstance(value, Mapping))
    stated = (each.get("model_type") for each in (config, *nested))
    return {model_type for model_type in stated if isinstance(model_type, str)}


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the config that describes the language model."""
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):
        if isinstance(config.get(key), Mapping):
            return {**config, **config[key]}
    return config


def _integer(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    return next((config[key] for key in keys if type(config.get(key)) is int and config[key] > 0), None)


def pattern(name: str) -> str:
    """A tensor name with every number replaced, to group names that differ only in layer or expert."""
    return re.sub(r"\d+", "{n}", name)


def _why_skipped(name: str) -> str:
    if "expert" in name:
        return "expert weights, never read"
    if name.endswith("bias"):
        return "a bias"
    if "norm" in name or ".ln_" in name:
        return "a norm that is not next to attention"
    if "attn" in name or "attention" in name:
        return "not a projection of the towers found"
    return "not attention"


def _unrecognised(checkpoint: Checkpoint) -> LlmfpError:
    """Why no family matched, as far as the names tell."""
    for name, spec in checkpoint.tensors.items():
        if ".lora_A." in name:
            return ArchitectureError(
                f"{_file(checkpoint, spec)}: tensor {name!r} belongs to a LoRA adapter, which is not a model",
                hint="adapters are not supported yet; scan the base model, or the adapter merged into it",
            )
        if method := _PACKED.get(name.rpartition(".")[2]):
            return EncodingError(
                f"{_file(checkpoint, spec)}: tensor {name!r} is quantised ({method}), which is not supported yet",
                hint="scan the unquantised checkpoint",
            )
    return ArchitectureError(
        f"{checkpoint.path}: no attention weights recognised{_closest(checkpoint.tensors)}",
        hint="llmfp knows the families in llmfp/architecture/families; CONTRIBUTING.md says how to add one",
    )


def _closest(names: Iterable[str]) -> str:
    """The stored names most like the ones looked for, for the error message."""
    wanted = {template.split(".")[-2] for template, found in slots().items() if any(s.part in PARTS for s in found)}

    @cache
    def likeness(part: str) -> float:
        return max(difflib.SequenceMatcher(None, part, want).ratio() for want in wanted)

    patterns = dict.fromkeys(pattern(name)[-_LONGEST_NAME:] for name in names)
    scored = sorted((-max(map(likeness, each.split(".")[-3:])), each) for each in islice(patterns, _MOST_NAMES))
    best = [each for _, each in scored[:_CLOSEST]]
    return "; closest names: " + ", ".join(best) if best else "; the checkpoint holds no tensor"


def _file(checkpoint: Checkpoint, spec: TensorSpec) -> Path:
    return checkpoint.shards[spec.shard].path
