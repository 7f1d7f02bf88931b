"""How many heads a tower has and how large they are. Shapes win over config.json, and a caveat says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from llmfp.architecture.config import HEAD_DIM, HEADS, KV_HEADS, integer
from llmfp.architecture.layouts import latent_heads, latent_sizes
from llmfp.architecture.specs import HeadRows, LayerHeads, Projection, Role, Rotary, Tower, WeightView

Layers = Mapping[int, Mapping[Role, WeightView]]


class Heads(NamedTuple):
    """Those of most layers, None when unknown; `head_dim` is a query head's."""

    heads: int | None
    kv_heads: int | None
    head_dim: int | None


def count_heads(layers: Layers, config: Mapping[str, Any], caveats: list[str]) -> Heads:
    """The config says how many heads there are, the shapes how large they are."""
    q_outputs = _most([_queries(views) for views in layers.values()])
    if q_outputs is None:
        return Heads(None, None, None)
    heads, stated_dim = integer(config, HEADS), integer(config, HEAD_DIM)
    if by_shapes := _most([latent_heads(views) for views in layers.values()]):
        if heads is not None and heads != by_shapes:
            caveats.append(f"config.json says {heads} heads, the shapes say {by_shapes}; the shapes are used")
        return Heads(by_shapes, None, q_outputs // by_shapes)
    if heads is None or q_outputs % heads:
        if heads is not None:
            caveats.append(f"config.json says {heads} heads, which do not divide the {q_outputs} query outputs")
        if stated_dim is None or q_outputs % stated_dim:
            return Heads(None, None, None)
        heads = q_outputs // stated_dim
    head_dim = q_outputs // heads
    if stated_dim is not None and stated_dim != head_dim:
        caveats.append(f"config.json says head_dim {stated_dim}, the shapes say {head_dim}; the shapes are used")
    kv_outputs = _most([views[Role.K].outputs if Role.K in views else None for views in layers.values()])
    if kv_outputs is None:
        return Heads(heads, None, head_dim)
    stated_kv = integer(config, KV_HEADS)
    if kv_outputs % head_dim:
        caveats.append(f"{kv_outputs} key outputs are no whole number of heads of {head_dim}")
        return Heads(heads, None, head_dim)
    kv_heads = kv_outputs // head_dim
    if stated_kv is not None and stated_kv != kv_heads:
        caveats.append(f"config.json says {stated_kv} kv heads, the shapes say {kv_heads}; the shapes are used")
    return Heads(heads, kv_heads, head_dim)


def head_sizes(views: Mapping[Role, WeightView], tower: Heads) -> dict[Role, int | None]:
    """Rows (or, for O, columns) per head of each of a layer's projections; None where that is not known.

    A layer whose queries are not those of most layers has more heads or larger ones, and nothing says which.
    """
    sizes: dict[Role, int | None] = dict.fromkeys(views)
    if tower.heads is None or tower.head_dim is None:
        return sizes
    if (q_outputs := _queries(views)) is not None and q_outputs != tower.heads * tower.head_dim:
        return sizes
    kv_heads = views[Role.K].outputs // tower.head_dim if Role.K in views else tower.kv_heads
    for role, view in views.items():
        if role in (Role.Q, Role.Q_B, Role.K):
            sizes[role] = tower.head_dim
        elif role is Role.V:
            sizes[role] = _share(view.outputs, kv_heads)
        elif role is Role.O:
            sizes[role] = _share(view.inputs, tower.heads)
        elif role is Role.KV_B:
            sizes[role] = _share(view.outputs, tower.heads)
    return sizes


def layer_heads(tower: Tower) -> list[LayerHeads]:
    """The layers whose query and key heads can be told apart, with what belongs to each head."""
    by_layer: dict[int, dict[Role, Projection]] = {}
    for p in tower.projections:
        by_layer.setdefault(p.layer, {})[p.role] = p
    found = []
    for layer, projections in by_layer.items():
        rotary = None if layer in tower.unrotated else tower.rotary
        heads = (_latent_heads if Role.KV_B in projections else _plain_heads)(layer, projections, rotary)
        if heads is not None and (heads.crossed is None or _stored_alike(heads)):
            found.append(heads)
    return found


def _plain_heads(layer: int, projections: Mapping[Role, Projection], rotary: Rotary | None) -> LayerHeads | None:
    q, k, v, o = (projections.get(role) for role in (Role.Q, Role.K, Role.V, Role.O))
    if q is None or k is None or q.head_dim is None or q.head_dim != k.head_dim:
        return None
    heads, kv_heads = q.view.outputs // q.head_dim, k.view.outputs // q.head_dim
    if not kv_heads or heads % kv_heads or q.view.inputs != k.view.inputs:
        return None
    queries, keys = (HeadRows(p.role, n, q.head_dim, q.head_dim) for p, n in ((q, heads), (k, kv_heads)))
    kept, values, outputs = {Role.Q: q, Role.K: k}, None, None
    if v is not None and o is not None and v.head_dim == o.head_dim and v.head_dim is not None:
        sizes = v.view.outputs, o.view.inputs
        if sizes == (kv_heads * v.head_dim, heads * v.head_dim):
            kept |= {Role.V: v, Role.O: o}
            values, outputs = (HeadRows(p.role, n, v.head_dim, v.head_dim) for p, n in ((v, kv_heads), (o, heads)))
    turned = None if rotary is None else (queries, keys)
    return LayerHeads(layer, queries, keys, values, outputs, turned, turned, kept, rotary)


def _latent_heads(layer: int, projections: Mapping[Role, Projection], rotary: Rotary | None) -> LayerHeads | None:
    sizes = latent_sizes({role: p.view for role, p in projections.items()})
    if sizes is None or (rotary is not None and rotary.pairs != sizes.rope // 2):
        return None
    heads, nope, rope, value = sizes
    asking = Role.Q_B if Role.Q_B in projections else Role.Q
    latent, outputs = projections[Role.KV_B].view.inputs, projections[Role.KV_A].view.outputs
    turned = None
    if rotary is not None:
        turned = (HeadRows(asking, heads, rope, nope + rope, nope), HeadRows(Role.KV_A, 1, rope, outputs, latent))
    read = {asking, Role.KV_B, Role.O} | ({Role.KV_A} if turned else set())
    return LayerHeads(
        layer,
        q=HeadRows(asking, heads, nope, nope + rope),
        k=HeadRows(Role.KV_B, heads, nope, nope + value),
        v=HeadRows(Role.KV_B, heads, value, nope + value, nope),
        o=HeadRows(Role.O, heads, value, value),
        turned=turned,
        crossed=turned if asking is Role.Q else None,
        projections={role: p for role, p in projections.items() if role in read},
        rotary=rotary,
    )


def _stored_alike(heads: LayerHeads) -> bool:
    """Whether the queries and keys to be multiplied read as many coordinates, along the same axis of what is stored."""
    q, k = (heads.projections[rows.role] for rows in heads.crossed or ())
    return q.view.inputs == k.view.inputs and q.residual_is_stored_rows == k.residual_is_stored_rows


def _share(size: int, heads: int | None) -> int | None:
    return size // heads if heads and size % heads == 0 else None


def _queries(views: Mapping[Role, WeightView]) -> int | None:
    view = views.get(Role.Q_B) or views.get(Role.Q)
    return None if view is None else view.outputs


def _most(values: list[int | None]) -> int | None:
    counted = Counter(value for value in values if value is not None)
    return counted.most_common(1)[0][0] if counted else None
