"""From stored tensors to views: which of a tensor's rows are whose, in every way that Q, K and V are laid side by side.

How much of a fused tensor is Q follows from O, which reads what Q's heads put out; shapes are asked first. Only where
heads are interleaved, their number has to come from config.json, since every number fits: then a contradiction, or no
config.json, is an error and not a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from llmfp.architecture.config import HEAD_DIM, HEADS, integer
from llmfp.architecture.families import Fused, TowerNames
from llmfp.architecture.specs import ROLES, Role, WeightView
from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.checkpoint.specs import PLAIN_FLOATS
from llmfp.errors import ArchitectureError

FUSED = "qkv"


def lay_views(
    checkpoint: Checkpoint, parts: Mapping[str, TensorSpec], names: TowerNames, config: Mapping[str, Any]
) -> dict[Role, WeightView]:
    """One layer's projections. Raises ArchitectureError for tensors whose shapes do not belong together."""
    views = {}
    for part in (*Role, FUSED):
        if part in parts:
            _check_lora(checkpoint, parts[part], names)
    for role in Role:
        if role in parts and (role.whole is role or role.whole not in parts):
            rows, cols = parts[role].shape
            views[role] = WeightView(parts[role], 1, rows, cols, 0, rows * cols, cols, _in_out(parts[role], names))
    if FUSED in parts:
        views |= _split(checkpoint, parts[FUSED], views.get(Role.O), names, config)
    if names.gated and Role.Q in views:
        views[Role.Q] = _without_gate(checkpoint, views[Role.Q], views.get(Role.O), config)
    _check_plain(checkpoint, views)
    _check_latent(checkpoint, views)
    return views


def lay_bias(view: WeightView, bias: TensorSpec) -> WeightView | None:
    """The part of a bias that belongs to a projection: split as its weights are. None where it does not fit them."""
    stored_rows, stored_cols = view.tensor.shape
    if bias.shape != (stored_cols if view.transposed else stored_rows,):
        return None
    if view.transposed:
        return WeightView(bias, 1, view.groups, view.cols, view.start, stored_cols, view.group_stride, False)
    first, stride = view.start // view.row_stride, view.group_stride // view.row_stride
    return WeightView(bias, 1, view.groups, view.rows, first, view.groups * stride, stride, False)


class Latent(NamedTuple):
    """Heads of a layer with latent attention and the sizes of their parts: rows that are not turned, rows that are, of
    which all heads share the key's, and values."""

    heads: int
    nope: int
    rope: int
    value: int


def latent_sizes(views: Mapping[Role, WeightView]) -> Latent | None:
    """From shapes alone; None where there are no such factors, or they do not tell.

    Per head, Q puts out nope + rope, KV_B puts out nope + v, O reads v; KV_A puts out the latent and one rope for all.
    """
    q = views.get(Role.Q_B) or views.get(Role.Q)
    if {Role.K_B, Role.V_B} <= views.keys():
        return _split_sizes(views)
    if q is None or not {Role.KV_A, Role.KV_B, Role.O} <= views.keys():
        return None
    rope = views[Role.KV_A].outputs - views[Role.KV_B].inputs
    nopes = views[Role.KV_B].outputs - views[Role.O].inputs
    ropes = q.outputs - nopes
    if rope <= 0 or ropes <= 0 or ropes % rope:
        return None
    heads = ropes // rope
    (nope, rest), (value, odd) = divmod(nopes, heads), divmod(views[Role.O].inputs, heads)
    return None if rest or odd or nope <= 0 else Latent(heads, nope, rope, value)


def _split_sizes(views: Mapping[Role, WeightView]) -> Latent | None:
    """The same where KV_B lies in two tensors: K_B stacks a [latent, nope] per head, V_B a [v, latent]."""
    q = views.get(Role.Q_B) or views.get(Role.Q)
    if q is None or not {Role.KV_A, Role.O} <= views.keys():
        return None
    k, v, latent = views[Role.K_B], views[Role.V_B], views[Role.V_B].inputs
    heads, rest = divmod(k.outputs, latent)
    rope, nope = views[Role.KV_A].outputs - latent, k.inputs
    fits = heads and not rest and v.outputs == views[Role.O].inputs and v.outputs % heads == 0
    if not fits or rope <= 0 or q.outputs != heads * (nope + rope):
        return None
    return Latent(heads, nope, rope, v.outputs // heads)


def latent_heads(views: Mapping[Role, WeightView]) -> int | None:
    """Heads of a layer with latent attention; DeepSeek-V4 has a single key and value head, of a query head's size."""
    if Role.KV in views and (q := views.get(Role.Q_B) or views.get(Role.Q)) is not None:
        heads, rest = divmod(q.outputs, views[Role.KV].outputs)
        return None if rest else heads
    sizes = latent_sizes(views)
    return None if sizes is None else sizes.heads


def named(checkpoint: Checkpoint, spec: TensorSpec) -> str:
    """How an error begins that is about a tensor."""
    return f"{checkpoint.shards[spec.shard].path}: tensor {spec.name!r}"


def _split(
    checkpoint: Checkpoint, spec: TensorSpec, o: WeightView | None, names: TowerNames, config: Mapping[str, Any]
) -> dict[Role, WeightView]:
    """Q, K and V of one tensor: `groups` parts of equal size, each with its share of each, in the family's order."""
    rows, cols = spec.shape
    in_out = _in_out(spec, names)
    outputs = cols if in_out else rows
    where = named(checkpoint, spec)
    if o is None:
        raise ArchitectureError(f"{where} cannot be split without its layer's output projection")
    kv_outputs, odd = divmod(outputs - o.inputs, 2)
    if odd or kv_outputs <= 0:
        raise ArchitectureError(
            f"{where} of shape {list(spec.shape)} does not split into {o.inputs} query outputs "
            "and equal keys and values"
        )
    groups = _groups(checkpoint, spec, names.fused, o.inputs, kv_outputs, config)
    views, first = {}, 0
    for letter in names.fused.order:
        size = (o.inputs if letter == Role.Q else kv_outputs) // groups
        views[Role(letter)] = _grouped(spec, groups, first, size, outputs // groups, in_out=in_out)
        first += size
    return views


def _grouped(spec: TensorSpec, groups: int, first: int, size: int, stride: int, *, in_out: bool) -> WeightView:
    """Of every `stride` outputs, `groups` times, the `size` from the `first` on."""
    rows, cols = spec.shape
    if in_out:
        return WeightView(spec, groups, rows, size, first, stride, cols, True)
    return WeightView(spec, groups, size, cols, first * cols, stride * cols, cols, False)


def _in_out(spec: TensorSpec, names: TowerNames) -> bool:
    """Whether a tensor is stored [in, out]: quantisers have their own mind about that."""
    return names.transposed if spec.encoding is None else spec.encoding.in_out


def _check_lora(checkpoint: Checkpoint, spec: TensorSpec, names: TowerNames) -> None:
    """An adapter's factors are floats and make a matrix of the tensor's shape."""
    if spec.lora is None:
        return
    a, b = spec.lora.a, spec.lora.b
    outputs, inputs = reversed(spec.shape) if _in_out(spec, names) else spec.shape
    for factor, size in ((a, a.shape[1] == inputs), (b, b.shape[0] == outputs)):
        if not size or factor.dtype not in PLAIN_FLOATS:
            raise ArchitectureError(
                f"{named(checkpoint, factor)} is {factor.dtype} {list(factor.shape)} and does not fit "
                f"{spec.name!r}, {outputs} outputs of {inputs} inputs",
                hint="is the base the model that the adapter was trained on?",
            )


def _groups(
    checkpoint: Checkpoint, spec: TensorSpec, fused: Fused, q_outputs: int, kv_outputs: int, config: Mapping[str, Any]
) -> int:
    """Into how many equal parts a fused tensor falls."""
    if fused.layout == "shards":
        if q_outputs % fused.shards or kv_outputs % fused.shards:
            raise ArchitectureError(
                f"{named(checkpoint, spec)} of shape {list(spec.shape)} does not split into {fused.shards} equal shards"
            )
        return fused.shards
    if fused.layout == "concat":
        if fused.groups_unless is None or kv_outputs != q_outputs or config.get(fused.groups_unless) is True:
            return 1
        return q_outputs // _head_size(checkpoint, spec, q_outputs, config)
    head_size = _head_size(checkpoint, spec, q_outputs, config)
    kv_heads, rest = divmod(kv_outputs, head_size)
    if rest or (q_outputs // head_size) % kv_heads:
        raise ArchitectureError(
            f"{named(checkpoint, spec)} of shape {list(spec.shape)} does not split into {q_outputs // head_size} query "
            f"heads of {head_size} and as many keys and values for each group of them"
        )
    return kv_heads


def _without_gate(checkpoint: Checkpoint, q: WeightView, o: WeightView | None, config: Mapping[str, Any]) -> WeightView:
    """The query rows of every head; the gate behind them scales what attention puts out."""
    if o is None:
        raise ArchitectureError(
            f"{named(checkpoint, q.tensor)} cannot be told from its gate without its layer's output projection"
        )
    if q.outputs != 2 * o.inputs:
        return q
    size = _head_size(checkpoint, q.tensor, o.inputs, config)
    return _grouped(q.tensor, o.inputs // size, 0, size, 2 * size, in_out=q.transposed)


def _head_size(checkpoint: Checkpoint, spec: TensorSpec, q_outputs: int, config: Mapping[str, Any]) -> int:
    """Outputs per query head. Here, and only here, config.json is believed, since a tensor's shape cannot tell."""
    heads, size = integer(config, HEADS), integer(config, HEAD_DIM)
    if heads is None and size is None:
        lacks = "does not say how many heads there are" if config else "is missing"
        raise ArchitectureError(
            f"{named(checkpoint, spec)} interleaves its heads, and config.json {lacks}",
            hint="put the model's config.json beside its weights",
        )
    if heads is None and size is not None:
        heads, rest = divmod(q_outputs, size)
    else:
        heads = heads or 1
        rest = q_outputs % heads or (size is not None and q_outputs // heads != size)
    if rest:
        stated = " of ".join(str(n) for n in (integer(config, HEADS), size) if n is not None)
        raise ArchitectureError(
            f"{named(checkpoint, spec)} interleaves its heads, and the {stated} that config.json states "
            f"do not make up its {q_outputs} query outputs"
        )
    return q_outputs // heads


def _check_plain(checkpoint: Checkpoint, views: Mapping[Role, WeightView]) -> None:
    """Q puts out what O reads and K what V puts out, or, where keys and values differ in size per head, in proportion.

    Raises ArchitectureError where they do not: a query fused with its gate under another family's name is no query.
    """
    if not views.keys() >= set(ROLES):
        return
    q, k, v, o = (views[role] for role in ROLES)
    if q.outputs * v.outputs != o.inputs * k.outputs:
        raise ArchitectureError(
            f"{named(checkpoint, q.tensor)} has {q.outputs} outputs where {o.tensor.name!r} "
            f"reads {o.inputs}, with {k.outputs} key and {v.outputs} value outputs; this layout is not known"
        )


def _check_latent(checkpoint: Checkpoint, views: Mapping[Role, WeightView]) -> None:
    """Each second factor reads what the first puts out, and the heads of all add up."""
    for first, second in ((Role.Q_A, Role.Q_B), (Role.O_A, Role.O_B)):
        if first in views and second in views and views[first].outputs != views[second].inputs:
            raise ArchitectureError(
                f"{named(checkpoint, views[second].tensor)} reads {views[second].inputs} inputs, "
                f"and {views[first].tensor.name!r} puts out {views[first].outputs}"
            )
    for role, other in ((Role.K_B, Role.V_B), (Role.V_B, Role.K_B)):
        if role in views and other not in views:
            raise ArchitectureError(f"{named(checkpoint, views[role].tensor)} is half of kv_b, and {other} is missing")
    for role, needed in ((Role.KV_B, {Role.KV_A, Role.O}), (Role.V_B, {Role.K_B}), (Role.KV, {Role.Q_B})):
        if role in views and views.keys() >= needed and latent_heads(views) is None:
            shapes = ", ".join(f"{r} {list(view.tensor.shape)}" for r, view in views.items())
            raise ArchitectureError(
                f"{named(checkpoint, views[role].tensor)} does not fit the other factors of its layer ({shapes})"
            )
