"""Recognises a family by its tensor names and gathers what its towers are made of.

Names are matched whole, from the first component on: a vision tower's `self_attn.q_proj` is never taken for the
decoder's. Where config.json contradicts the shapes, the shapes win and a caveat says so. How tensors become views is in
layouts.py, how many heads there are in heads.py.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from typing import Any, NamedTuple

from llmfp.architecture.config import (
    DRAFT_LAYERS,
    LAYERS,
    integer,
    model_types,
    of_language_model,
    of_vision_tower,
)
from llmfp.architecture.families import (
    ADAPTER,
    DRAFT,
    LINEAR,
    NORM_PARTS,
    PARTS,
    VISION,
    WITNESS,
    Family,
    Slot,
    TowerNames,
    families,
    slots,
)  # fmt: skip
from llmfp.architecture.heads import count_heads, head_sizes
from llmfp.architecture.layouts import FUSED, latent_sizes, lay_bias, lay_views, named
from llmfp.architecture.specs import ROLES, AttentionMap, NormGain, Projection, Role, Tower, Vector, WeightView
from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.checkpoint.specs import PLAIN_FLOATS
from llmfp.encoding import alone, doubts, encoded, weight_name
from llmfp.errors import ArchitectureError, EncodingError

_CLOSEST = 6
_LEFT_OUT = {DRAFT: "multi-token prediction, not a decoder layer", LINEAR: "linear attention"}
_DRAFT_NAME = re.compile(r"(^|\.)mtp")
_OTHER_TOWER = re.compile(r"(^|\.)(vision|visual|vit|sam|clip|siglip|image|audio|speech)[^.]*\.")
_MOST_NAMES, _LONGEST_NAME = 1000, 80
_NORM_ROLES = {"before": "norm", "after": "post_norm", "q_latent": "q_latent_norm", "kv_latent": "kv_latent_norm"}


class _Found(NamedTuple):
    """A stored tensor that fills a slot of the chosen family in one layer."""

    slot: Slot
    block: str
    layer: int
    spec: TensorSpec


def match(checkpoint: Checkpoint, tower: str | None = None) -> AttentionMap:
    """The attention projections of a checkpoint's language model, or of one tower alone (TOWERS).

    Raises ArchitectureError when none is recognised.
    """
    vision = tower == VISION
    config = of_vision_tower(checkpoint.config) if vision else of_language_model(checkpoint.config)
    recognised = [each for each in _recognise(checkpoint.tensors.values()) if (each.slot.tower == VISION) == vision]
    left_out = _layers_left_out(recognised, config)
    candidates = [each for each in recognised if (each.block, each.layer) not in left_out]
    family = _choose(candidates, model_types(checkpoint.config))
    if family is None:
        raise _no_tower(checkpoint, VISION, ()) if vision else _unrecognised(checkpoint)
    found = _one_stack_per_tower(each for each in candidates if each.slot.family == family.name)
    if tower is not None:
        present = sorted({each.slot.tower for each in found if each.slot.part in PARTS})
        found = [each for each in found if each.slot.tower == tower]
        if tower not in present:
            raise _no_tower(checkpoint, tower, present)
    _check_scales(checkpoint, family, found)
    caveats = _config_caveats(checkpoint, family, config, found)
    towers = []
    for name in sorted({each.slot.tower for each in found if each.slot.part in PARTS}):
        in_tower = [each for each in found if each.slot.tower == name]
        towers.append(_tower(checkpoint, name, family.towers[name].as_configured(config), in_tower, config, caveats))
    if any(p.view.tensor.encoding is not None for each in towers for p in each.projections):
        caveats += doubts(checkpoint)
    used = {projection.view.tensor.name for each in towers for projection in each.projections}
    used |= {vector.view.tensor.name for each in towers for vector in each.vectors}
    for each in towers:
        for projection in each.projections:
            used |= {part.name for part in _beside(projection.view.tensor)}
    skipped = {name: _why_skipped(name) for name in checkpoint.tensors if name not in used}
    skipped |= {
        each.spec.name: left_out[each.block, each.layer]
        for each in recognised
        if (each.block, each.layer) in left_out and each.slot.part in PARTS
    }
    return AttentionMap(family.name, tuple(towers), skipped, tuple(dict.fromkeys(caveats)))


def _recognise(specs: Iterable[TensorSpec]) -> list[_Found]:
    """Every slot of every family that a stored name fills."""
    table, result = slots(), []
    for spec in specs:
        name = weight_name(spec.name).removeprefix("module.")
        if "_orig_mod" in name:
            name = name.replace("_orig_mod.", "")
        parts = name.split(".")
        for position, part in enumerate(parts):
            if part.isascii() and part.isdigit() and len(part) < 6:
                template = ".".join((*parts[:position], "{layer}", *parts[position + 1 :]))
                block = template.split("{layer}")[0]
                result += [_Found(slot, block, int(part), spec) for slot in table.get(template, ())]
    return result


def _check_scales(checkpoint: Checkpoint, family: Family, found: Iterable[_Found]) -> None:
    """Raises EncodingError for scales of a projection that is not there itself, in the layers that were found."""
    scales = alone(checkpoint)
    places = {(each.block, each.layer) for each in found}
    for each in _recognise(replace(spec, name=name) for name, spec in scales.items()):
        if each.slot.family == family.name and each.slot.part in PARTS and (each.block, each.layer) in places:
            scale = scales[each.spec.name]
            raise EncodingError(
                f"{checkpoint.shards[scale.shard].path}: tensor {scale.name!r} is there, and the codes that it belongs "
                f"to, {each.spec.name}, are missing",
                hint="fetch the files again",
            )


def _layers_left_out(recognised: Iterable[_Found], config: Mapping[str, Any]) -> dict[tuple[str, int], str]:
    """Layers that use attention's names for something else, by block and number, with what they are.

    A tensor only they have tells; or config.json says that prediction layers follow the last decoder layer.
    """
    layers, drafts = integer(config, LAYERS), integer(config, DRAFT_LAYERS)
    left_out = {}
    for each in recognised:
        if each.slot.part in _LEFT_OUT:
            left_out[each.block, each.layer] = _LEFT_OUT[each.slot.part]
        elif layers is not None and drafts is not None and layers <= each.layer < layers + drafts:
            left_out[each.block, each.layer] = _LEFT_OUT[DRAFT]
    return left_out


def _choose(candidates: Iterable[_Found], stated_types: set[str]) -> Family | None:
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
        return bool(known[name].model_types & stated_types) or not known[name].has_witness or name in with_witness

    ranked = sorted(
        filter(possible, with_attention),
        key=lambda name: (
            not known[name].model_types & stated_types,
            -with_attention[name],
            -explained[name],
            not known[name].generic,
            -known[name].depth,
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
        part = names.first_norm if each.slot.part == NORM_PARTS[0] else each.slot.part
        if part is None:
            continue
        if other := by_layer[each.layer].get(part):
            if each.slot.part in NORM_PARTS:
                listed = names.parts[each.slot.part]
                by_layer[each.layer][part] = min((other, each.spec), key=partial(_place, listed))
                continue
            raise ArchitectureError(
                f"{checkpoint.shards[each.spec.shard].path}: tensors {other.name!r} and {each.spec.name!r} "
                f"are both the {part} of {name} layer {each.layer}"
            )
        by_layer[each.layer][part] = each.spec
    layers: dict[int, dict[Role, WeightView]] = {}
    for layer, parts in sorted(by_layer.items()):
        for part in parts:
            if part in PARTS:
                parts[part] = _matrix(checkpoint, parts[part], stacked=part in (Role.K_B, Role.V_B))
        if views := lay_views(checkpoint, parts, names, config):
            layers[layer] = views
    caveats += _role_caveats(checkpoint, name, names, layers)
    if adapted := sum(ADAPTER in by_layer[layer] for layer in layers):
        caveats.append(f"adapters add to q, k and v of {adapted} {name} layers; they are not read")
    heads = count_heads(layers, config, caveats)
    projections: list[Projection] = []
    vectors: list[Vector] = []
    for layer, views in layers.items():
        sizes = head_sizes(views, heads)
        in_layer = []
        for role, view in views.items():
            gain = _gain(checkpoint, by_layer[layer], role, names, view, caveats)
            # Behind a post-norm's gain and bias the input has a mean of its own: only a pre-norm hides it from reads.
            centred = names.norm_kind == "layer" and (role.writes or (role.reads and not names.post_norm))
            in_layer.append(Projection(layer, role, view, gain, centred, sizes[role]))
        projections += in_layer
        vectors += [*_norm_vectors(in_layer), *_bias_vectors(by_layer[layer], layer, views, caveats)]
    hidden_size = _most_common(p.residual_size for p in projections if p.role.writes)
    hidden_size = hidden_size or _most_common(p.residual_size for p in projections) or 0
    ropes = _most_common(sizes and sizes.rope for sizes in map(latent_sizes, layers.values()))
    rotary = names.rotary_of(config, heads.head_dim, ropes)
    return Tower(
        name,
        tuple(projections),
        tuple(vectors),
        *heads,
        hidden_size,
        rotary=rotary,
        unrotated=names.unrotated(config) if rotary is not None else frozenset(),
        indexed_heads=names.has_indexed_heads(config),
    )


def _place(listed: Sequence[str], spec: TensorSpec) -> int:
    """Where in a family's list of names below a block a tensor's is."""
    return next((n for n, name in enumerate(listed) if spec.name.endswith(f".{name}")), len(listed))


def _role_caveats(
    checkpoint: Checkpoint, name: str, names: TowerNames, layers: Mapping[int, Mapping[Role, WeightView]]
) -> list[str]:
    """What is missing or not read. Raises ArchitectureError for a tower without a single query projection."""
    present = Counter(role for views in layers.values() for role in views)
    if not {Role.Q, Role.Q_A, Role.Q_B} & present.keys():
        view = next(view for views in layers.values() for view in views.values())
        raise ArchitectureError(f"{named(checkpoint, view.tensor)} was recognised, but no layer's query projection")
    expected: Iterable[Role] = ROLES
    caveats = []
    if {Role.KV_A, Role.KV} & present.keys():
        expected = present
        caveats.append(f"latent attention in the {name}: no plain k or v exists, the factors are under roles")
    caveats += [
        f"{len(layers) - present[role]} of {len(layers)} {name} layers have no {role} projection"
        for role in expected
        if present[role] < len(layers)
    ]
    if names.gated and any(Role.Q in views and views[Role.Q].groups > 1 for views in layers.values()):
        caveats.append(f"half of every {name} query tensor is a gate, which is not read")
    return caveats


def _norm_vectors(projections: Iterable[Projection]) -> list[Vector]:
    vectors = {}
    for p in projections:
        if p.gain is not None:
            size = p.gain.tensor.shape[0]
            view = WeightView(p.gain.tensor, 1, 1, size, 0, size, size, False)
            role = _NORM_ROLES[_norm_part(p.role) or ""]
            vectors[role] = Vector(p.layer, role, view, p.gain.offset)
    return list(vectors.values())


def _norm_part(role: Role) -> str | None:
    """The norm whose gain scales a projection's inputs, or O's outputs."""
    if role.reads or role.writes:
        return "before" if role.reads else "after"
    return {Role.Q_B: "q_latent", Role.KV_B: "kv_latent", Role.V_B: "kv_latent"}.get(role)


def _bias_vectors(
    parts: Mapping[str, TensorSpec], layer: int, views: Mapping[Role, WeightView], caveats: list[str]
) -> list[Vector]:
    vectors = []
    for role in (Role.Q, Role.K, Role.V):
        bias = parts.get(f"{role}_bias") or parts.get(f"{FUSED}_bias")
        if role not in views or bias is None:
            continue
        view = lay_bias(views[role], bias)
        if view is None or bias.dtype not in PLAIN_FLOATS:
            caveats.append(f"bias {bias.name!r} is {bias.dtype} {list(bias.shape)}, which does not fit its weights")
        else:
            vectors.append(Vector(layer, f"{role}_bias", view, 0.0))
    return vectors


def _beside(spec: TensorSpec) -> list[TensorSpec]:
    """What has to be read along with a tensor: its scales and the like, an adapter's factors."""
    parts = [part for _, part in spec.encoding.parts] if spec.encoding is not None else []
    return [*parts, spec.lora.a, spec.lora.b] if spec.lora is not None else parts


def _matrix(checkpoint: Checkpoint, stored: TensorSpec, *, stacked: bool) -> TensorSpec:
    """The projection a tensor stands for, be it quantised or not; where one per head is `stacked`, all on top of each
    other."""
    spec = encoded(checkpoint, stored)
    if stacked and len(spec.shape) == 3:
        heads, rows, cols = spec.shape
        spec = replace(spec, shape=(heads * rows, cols))
    where = named(checkpoint, spec)
    if len(spec.shape) != 2:
        raise ArchitectureError(f"{where} has shape {list(spec.shape)}; an attention projection has two dimensions")
    if 0 in spec.shape:
        raise ArchitectureError(f"{where} has shape {list(spec.shape)} and so no elements")
    return spec


def _gain(
    checkpoint: Checkpoint,
    parts: Mapping[str, TensorSpec],
    role: Role,
    names: TowerNames,
    view: WeightView,
    caveats: list[str],
) -> NormGain | None:
    """The gain next to a projection. Where it does not fit what a projection's codes are said to stand for, what was
    said is wrong (EncodingError): words hold as many codes of 4 bits in groups of 64 as of 8 bits in groups of 32."""
    part = _norm_part(role)
    spec = None if part is None else parts.get(part)
    if spec is None:
        return None
    size = view.outputs if role.writes else view.inputs
    if view.tensor.encoding is not None and len(spec.shape) == 1 and spec.shape != (size,):
        raise EncodingError(
            f"{named(checkpoint, view.tensor)} is {list(view.tensor.shape)} as {view.tensor.encoding.label}, "
            f"and norm gain {spec.name!r} beside it has {spec.shape[0]} entries",
            hint="do config.json and the weights belong together?",
        )
    if spec.shape != (size,) or spec.dtype not in PLAIN_FLOATS:
        stored = f"{spec.dtype} {list(spec.shape)}"
        caveats.append(f"norm gain {spec.name!r} is {stored}, not a float of [{size}]; taken as 1")
        return None
    return NormGain(spec, names.norm_offset)


def _config_caveats(
    checkpoint: Checkpoint, family: Family, config: Mapping[str, Any], found: Iterable[_Found]
) -> list[str]:
    if not checkpoint.config:
        return [
            "config.json is missing: head counts are unknown, so there are no per-head statistics, "
            f"and the norms are assumed to be those of the {family.name} family"
        ]
    caveats = []
    stated_types = model_types(checkpoint.config)
    if stated_types and not stated_types & family.model_types:
        caveats.append(
            f"model type {', '.join(map(repr, sorted(stated_types)))} is not known; "
            f"names match the {family.name} family, whose norms and rotary embedding are assumed"
        )
    stored = len({each.layer for each in found if each.slot.part in PARTS and each.slot.tower != "encoder"})
    stated = integer(config, LAYERS)
    if stated is not None and stored > stated:
        caveats.append(f"config.json says {stated} layers, {stored} are stored; all are used")
    return caveats


def pattern(name: str) -> str:
    """A tensor name with every number replaced, to group names that differ only in layer or expert."""
    return re.sub(r"\d+", "{n}", name)


def _why_skipped(name: str) -> str:
    if "expert" in name:
        return "expert weights, never read"
    if _DRAFT_NAME.search(name):
        return _LEFT_OUT[DRAFT]
    if _OTHER_TOWER.search(name):
        return "another tower than the language model's"
    if "linear_attn." in name:
        return _LEFT_OUT[LINEAR]
    if ".lora_" in name:
        return "adapts what is not read"
    if name.endswith("bias"):
        return "a bias"
    if "norm" in name or ".ln_" in name:
        return "a norm that is not next to attention"
    if "attn" in name or "attention" in name:
        return "not a projection of the towers found"
    return "not attention"


def _no_tower(checkpoint: Checkpoint, tower: str, present: Iterable[str]) -> ArchitectureError:
    return ArchitectureError(
        f"{checkpoint.path}: no {tower} tower recognised{''.join(f'; it has: {name}' for name in present)}",
        hint="leave --tower out to read the language model",
    )


def _unrecognised(checkpoint: Checkpoint) -> ArchitectureError:
    """Why no family matched, as far as the names tell."""
    for name, spec in checkpoint.tensors.items():
        if ".lora_A." in name:
            return ArchitectureError(
                f"{named(checkpoint, spec)} belongs to a LoRA adapter, which is not a model",
                hint="give the adapter's directory, and its base with --base",
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
        best, matcher = 0.0, difflib.SequenceMatcher(None, b=part)
        for want in wanted:
            matcher.set_seq1(want)
            if matcher.real_quick_ratio() > best and matcher.quick_ratio() > best:  # bounds that cost less
                best = max(best, matcher.ratio())
        return best

    patterns = dict.fromkeys(pattern(name)[-_LONGEST_NAME:] for name in names)
    scored = sorted((-max(map(likeness, each.split(".")[-3:])), each) for each in islice(patterns, _MOST_NAMES))
    best = [each for _, each in scored[:_CLOSEST]]
    return "; closest names: " + ", ".join(best) if best else "; the checkpoint holds no tensor"


def _most_common(sizes: Iterable[int | None]) -> int | None:
    counted = Counter(size for size in sizes if size is not None)
    return counted.most_common(1)[0][0] if counted else None
