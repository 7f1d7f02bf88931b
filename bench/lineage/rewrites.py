"""Rewrites that change weights and nothing a model computes: what a disguiser has for free.

Every function takes a model and a seed and returns another with the same logits, up to rounding (tests/test_lineage.py
checks 1e-9 in float64, the laboratory every specimen). Weights act from the left, y = W·x + b, on columns x.

    fold_norms            W·diag(gain), b + W·bias for what reads a norm's output, whose gain is then 1 and bias 0
    scale_rotary_pairs    each rotary pair of a kv head's K, as a complex row, times c·exp(iθ), its query heads' times
                          exp(iθ)/c: both commute with the rotation by position
    mix_queries           where nothing rotates: K → A·K, Q → A⁻ᵀ·Q, any invertible A per kv head
    mix_values            V → A·V, O → O·A⁻¹, any invertible A per kv head
    permute_heads         kv groups within a layer, query heads within a group
    permute_neurons       of the MLP
    permute_residual      the coordinates of the residual stream
    rotate_residual       an orthogonal map of the residual stream, after fold_norms; for LayerNorm one that leaves the
                          mean direction where it is
    shift_mean            for LayerNorm, after fold_norms: what is added along the mean direction nobody reads, and
                          what is read along it is zero
    add_dead_heads        a kv group per layer whose O is zero
    duplicate_heads       every kv group twice, with half of O each
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.lineage.models import Model, logits

Rewrite = Callable[[Model, int], Model]


def fold_norms(model: Model, _seed: int) -> Model:
    new = model.to(_dtype(model))
    for norm, readers in _norms(new):
        gain = new.weights[f"{norm}.weight"]
        for name in readers:
            weight = new.weights[f"{name}.weight"]
            if f"{norm}.bias" in new.weights and f"{name}.bias" in new.weights:
                new.weights[f"{name}.bias"] = new.weights[f"{name}.bias"] + weight @ new.weights[f"{norm}.bias"]
            new.weights[f"{name}.weight"] = weight * gain
        if f"{norm}.bias" in new.weights:
            # The head has no bias to take the last norm's: that one stays, as the head's folded weights will read it.
            kept = new.weights[f"{norm}.bias"] / gain if readers == ["lm_head"] else torch.zeros_like(gain)
            new.weights[f"{norm}.bias"] = kept
        new.weights[f"{norm}.weight"] = torch.ones_like(gain)
    return new


def scale_rotary_pairs(model: Model, seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Tensor] = {}

    def rotated(rows: Tensor, block: str, group: int, query: bool) -> Tensor:
        pairs = len(rows) // 2
        key = f"{block}{group}"
        if key not in factors:
            sizes, angles = torch.rand(2, pairs, generator=generator, dtype=torch.float64)
            factors[key] = torch.polar((2 * sizes - 1).exp(), 2 * torch.pi * angles)
        factor = 1 / factors[key].conj() if query else factors[key]
        turned = torch.complex(rows[:pairs], rows[pairs:]) * factor.to(_complex(rows.dtype))[:, None]
        return torch.cat([turned.real, turned.imag])

    return _inside_heads(model, ("q", "k"), rotated)


def mix_queries(model: Model, seed: int) -> Model:
    return _inside_heads(model, ("q", "k"), _Maps(seed))


def mix_values(model: Model, seed: int) -> Model:
    return _inside_heads(model, ("o", "v"), _Maps(seed))


def permute_heads(model: Model, seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    new = model.to(_dtype(model))
    for block in new.blocks:
        projections = _attention(new, block)
        kv_heads = len(new.weights[f"{projections['k']}.weight"]) // new.head_dim
        groups = torch.randperm(kv_heads, generator=generator)
        per_group = new.config["num_attention_heads"] // kv_heads
        orders = torch.stack([torch.randperm(per_group, generator=generator) for _ in range(kv_heads)])
        heads = (groups[:, None] * per_group + orders).flatten()
        for role, order in (("q", heads), ("k", groups), ("v", groups), ("o", heads)):
            for name, rows in _rows(new, projections[role], role):
                by_head = rows.unflatten(0, (len(order), new.head_dim))
                _store(new, name, by_head[order].flatten(0, 1), role)
    return new


def permute_neurons(model: Model, seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    new = model.to(_dtype(model))
    for block in new.blocks:
        for into, outof in _mlps(new, block):
            order = torch.randperm(new.weights[f"{outof}.weight"].shape[1], generator=generator)
            for name in into:
                for field in ("weight", "bias"):
                    if f"{name}.{field}" in new.weights:
                        new.weights[f"{name}.{field}"] = new.weights[f"{name}.{field}"][order]
            new.weights[f"{outof}.weight"] = new.weights[f"{outof}.weight"][:, order]
    return new


def permute_residual(model: Model, seed: int) -> Model:
    hidden = model.config["hidden_size"]
    order = torch.randperm(hidden, generator=torch.Generator().manual_seed(seed))
    new = model.to(_dtype(model))
    for name, weight in new.weights.items():
        if weight.shape[-1] == hidden and _reads(name):
            new.weights[name] = weight[..., order]
        elif _writes(name):
            new.weights[name] = weight[order]
    return new


def rotate_residual(model: Model, seed: int) -> Model:
    new = fold_norms(model, seed)
    hidden = model.config["hidden_size"]
    rotation = _orthogonal(hidden, seed)
    if _layer_norm(model):
        frame = torch.linalg.qr(torch.cat([torch.ones(hidden, 1).double(), _normal(seed, hidden, hidden - 1)], dim=1))[
            0
        ]
        rotation = frame @ torch.block_diag(torch.ones(1, 1), _orthogonal(hidden - 1, seed)).double() @ frame.T
    rotation = rotation.to(_dtype(model))
    for name, weight in new.weights.items():
        if _reads(name) and not name.endswith("norm.weight"):
            new.weights[name] = weight @ rotation.T
        elif _writes(name):
            new.weights[name] = rotation @ weight
    return new


def shift_mean(model: Model, seed: int) -> Model:
    assert _layer_norm(model)
    new = fold_norms(model, seed)
    for place, (name, weight) in enumerate(sorted(new.weights.items())):
        if name == "lm_head.weight":
            continue  # what it reads has the last norm's bias, which is not free of the mean direction
        if _reads(name) and weight.dim() == 2:  # among these the embeddings: rows that are written to the stream
            sigma = weight.std()
            new.weights[name] = weight + sigma * _normal(seed + place, len(weight), 1).to(weight.dtype)
        elif _writes(name) and "norm" not in name:
            along = _normal(seed + place, *weight.shape[1:]).to(weight.dtype)
            new.weights[name] = weight + weight.std() * along
    return new


def add_dead_heads(model: Model, seed: int) -> Model:
    """Config changes with the number of heads; the new heads' Q, K and V are as large as the others'."""

    def grown(rows: Tensor, role: str, size: int) -> Tensor:
        new = rows.std() * _normal(seed + len(role), size, *rows.shape[1:]).to(rows.dtype)
        return torch.cat([rows, torch.zeros_like(new) if role == "o" else new])

    return _with_heads(model, grown, more=1)


def duplicate_heads(model: Model, _seed: int) -> Model:
    return _with_heads(
        model,
        lambda rows, role, _: torch.cat([rows, rows]) / (2 if role == "o" else 1),
        more=model.config.get("num_key_value_heads", model.config["num_attention_heads"]),
    )


def all_rewrites(model: Model, seed: int) -> Model:
    """Every rewrite that keeps shapes, one after the other."""
    steps: list[Rewrite] = [fold_norms, mix_values, permute_heads, permute_neurons]
    steps.append(mix_queries if _layer_norm(model) else scale_rotary_pairs)
    steps += [permute_residual, rotate_residual]
    if _layer_norm(model):
        steps.append(shift_mean)
    for place, step in enumerate(steps):
        model = step(model, seed + 100 * place)
    return model


LLAMA: dict[str, Rewrite] = {
    "fold norms": fold_norms,
    "scale rotary pairs": scale_rotary_pairs,
    "mix values": mix_values,
    "permute heads": permute_heads,
    "permute neurons": permute_neurons,
    "permute residual": permute_residual,
    "rotate residual": rotate_residual,
    "add dead heads": add_dead_heads,
    "duplicate heads": duplicate_heads,
    "all rewrites": all_rewrites,
}
OPT: dict[str, Rewrite] = {
    "fold norms": fold_norms,
    "mix queries": mix_queries,
    "mix values": mix_values,
    "permute heads": permute_heads,
    "permute residual": permute_residual,
    "rotate residual": rotate_residual,
    "shift mean": shift_mean,
    "all rewrites": all_rewrites,
}


def _layer_norm(model: Model) -> bool:
    return bool(model.config["model_type"] == "opt")


def _dtype(model: Model) -> torch.dtype:
    return next(iter(model.weights.values())).dtype


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _orthogonal(size: int, seed: int) -> Tensor:
    """Haar-distributed."""
    q, r = torch.linalg.qr(_normal(seed, size, size))
    return q * r.diagonal().sign()


class _Maps:
    """An invertible map A per layer and kv group, singular values between 1/e and e; A⁻ᵀ on the side of queries."""

    def __init__(self, seed: int) -> None:
        self.seed, self.drawn = seed, dict[tuple[str, int], Tensor]()

    def __call__(self, rows: Tensor, block: str, group: int, query: bool) -> Tensor:
        if (block, group) not in self.drawn:
            first = self.seed + 3 * len(self.drawn)
            sizes = (2 * torch.rand(len(rows), generator=torch.Generator().manual_seed(first)).double() - 1).exp()
            self.drawn[block, group] = _orthogonal(len(rows), first + 1) * sizes @ _orthogonal(len(rows), first + 2)
        chosen = self.drawn[block, group]
        return (torch.linalg.inv(chosen).T if query else chosen).to(rows.dtype) @ rows


def _attention(model: Model, block: str) -> dict[str, str]:
    out = "out_proj" if _layer_norm(model) else "o_proj"
    return {role: f"{block}self_attn.{out if role == 'o' else f'{role}_proj'}" for role in "qkvo"}


def _mlps(model: Model, block: str) -> list[tuple[list[str], str]]:
    """(what the neurons read with, what they write with), of every expert."""
    if _layer_norm(model):
        return [([f"{block}fc1"], f"{block}fc2")]
    if model.config["model_type"] == "mixtral":
        experts = [f"{block}block_sparse_moe.experts.{each}" for each in range(model.config["num_local_experts"])]
        return [([f"{expert}.w1", f"{expert}.w3"], f"{expert}.w2") for expert in experts]
    return [([f"{block}mlp.gate_proj", f"{block}mlp.up_proj"], f"{block}mlp.down_proj")]


def _norms(model: Model) -> Iterator[tuple[str, list[str]]]:
    """Each norm and the matrices that read it. The head is untied from the embeddings, since only it reads a norm."""
    opt = _layer_norm(model)
    embeddings = "model.decoder.embed_tokens" if opt else "model.embed_tokens"
    model.weights.setdefault("lm_head.weight", model.weights[f"{embeddings}.weight"].clone())
    model.config["tie_word_embeddings"] = False
    for block in model.blocks:
        attention = _attention(model, block)
        yield f"{block}{'self_attn_layer_norm' if opt else 'input_layernorm'}", [attention[role] for role in "qkv"]
        mlp = [name for into, _ in _mlps(model, block) for name in into]
        if model.config["model_type"] == "mixtral":
            mlp.append(f"{block}block_sparse_moe.gate")
        yield f"{block}{'final_layer_norm' if opt else 'post_attention_layernorm'}", mlp
    yield "model.decoder.final_layer_norm" if opt else "model.norm", ["lm_head"]


def _writes(name: str) -> bool:
    """Tensors whose first axis runs along the residual stream."""
    module, field = name.rsplit(".", 1)
    writers = ("o_proj", "out_proj", "down_proj", "fc2", "w2")
    return module.endswith(writers) or (field == "bias" and module.endswith("norm"))


def _reads(name: str) -> bool:
    """Tensors whose last axis runs along the residual stream; embeddings and gains among them."""
    return name.endswith(".weight") and not _writes(name)


def _rows(model: Model, module: str, role: str) -> Iterator[tuple[str, Tensor]]:
    """Weights and bias of a projection with its heads along the rows, which O has along its columns."""
    weight = model.weights[f"{module}.weight"]
    yield f"{module}.weight", weight.T if role == "o" else weight
    if role != "o" and f"{module}.bias" in model.weights:
        yield f"{module}.bias", model.weights[f"{module}.bias"][:, None]


def _store(model: Model, name: str, rows: Tensor, role: str) -> None:
    turned = rows.T if role == "o" else rows
    model.weights[name] = (turned[:, 0] if name.endswith("bias") else turned).contiguous()


def _inside_heads(model: Model, roles: tuple[str, str], change: Callable[[Tensor, str, int, bool], Tensor]) -> Model:
    """`change(rows [head_dim, n], block, kv group, whether a query head's)` for each head of one role with as many
    heads as there are queries, then one with as many as there are keys."""
    new = model.to(_dtype(model))
    for block in new.blocks:
        projections = _attention(new, block)
        kv_heads = len(new.weights[f"{projections['k']}.weight"]) // new.head_dim
        per_group = new.config["num_attention_heads"] // kv_heads
        for role, query in zip(roles, (True, False), strict=True):
            for name, rows in _rows(new, projections[role], role):
                heads = rows.split(new.head_dim)
                groups = (head // per_group if query else head for head in range(len(heads)))
                changed = [change(head, block, group, query) for head, group in zip(heads, groups, strict=True)]
                _store(new, name, torch.cat(changed), role)
    return new


def _with_heads(model: Model, grow: Callable[[Tensor, str, int], Tensor], more: int) -> Model:
    """`grow(rows, role, rows to add)` for every projection; `more` kv groups."""
    new = model.to(_dtype(model))
    kv_heads = new.config["num_key_value_heads"]
    per_group = new.config["num_attention_heads"] // kv_heads
    for block in new.blocks:
        for role, module in _attention(new, block).items():
            size = more * new.head_dim * (per_group if role in "qo" else 1)
            for name, rows in _rows(new, module, role):
                _store(new, name, grow(rows, role, size), role)
    new.config["num_key_value_heads"] = kv_heads + more
    new.config["num_attention_heads"] = (kv_heads + more) * per_group
    new.config["head_dim"] = model.head_dim
    return new


def same_logits(a: Model, b: Model, tokens: Tensor) -> float:
    """The largest difference of logits in float64, relative to the largest logit."""
    first, second = (logits(each.to(torch.float64), tokens) for each in (a, b))
    return float((first - second).abs().max() / first.abs().max())
