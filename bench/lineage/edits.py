"""Edits that cost a model little or nothing and attention's statistics much: what an adversary may pay for.

add_noise         to every attention weight, as a share of its matrix's σ
disturb_weak      noise in Q, K and V on those input directions that carry the least of what is really read
mix_slow_pairs    an orthogonal map among the rotary pairs that hardly turn within the context, of Q and K alike
zero_weak_heads   O of the heads that add least to the stream
"""

from __future__ import annotations

import torch

from bench.lineage.models import Model
from bench.lineage.train import second_moments


def add_noise(model: Model, share: float, seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    new = model.to(torch.float32)
    for name, weight in new.weights.items():
        if "self_attn." in name and weight.dim() == 2:
            new.weights[name] = weight + share * weight.std() * torch.randn(weight.shape, generator=generator)
    return new


def disturb_weak(model: Model, share: float, part: float, corpus_name: str, seed: int) -> Model:
    """Noise of `share` σ per element on the `part` of the eigenvectors of E[x·xᵀ] with the least eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    moments = second_moments(model, corpus_name)
    new = model.to(torch.float32)
    for block in new.blocks:
        directions = torch.linalg.eigh(moments[f"{block}self_attn"])[1]  # from the least
        weak = directions[:, : round(part * len(directions))]
        for role in "qkv":
            name = f"{block}self_attn.{role}_proj.weight"
            weight = new.weights[name]
            drawn = torch.randn(len(weight), weak.shape[1], generator=generator, dtype=torch.float64) @ weak.T
            new.weights[name] = weight + (share * weight.std() * part**-0.5 * drawn).float()
    return new


def mix_slow_pairs(model: Model, pairs: int, seed: int) -> Model:
    """The `pairs` rotary pairs of lowest frequency; free only where they do not turn at all."""
    new = model.to(torch.float32)
    size = model.head_dim // 2
    slow = torch.arange(size - pairs, size)
    rows = torch.cat([slow, slow + size])
    per_group = new.config["num_attention_heads"] // new.config["num_key_value_heads"]
    for layer, block in enumerate(new.blocks):
        for role in "qk":
            name = f"{block}self_attn.{role}_proj.weight"
            heads = new.weights[name].unflatten(0, (-1, model.head_dim)).clone()
            for head in range(len(heads)):
                group = head // per_group if role == "q" else head
                drawn = torch.Generator().manual_seed(seed + 1000 * layer + group)
                mixed = torch.linalg.qr(torch.randn(2 * pairs, 2 * pairs, generator=drawn, dtype=torch.float64))[0]
                heads[head, rows] = mixed.float() @ heads[head, rows]
            new.weights[name] = heads.flatten(0, 1)
    return new


def zero_weak_heads(model: Model, per_layer: int) -> Model:
    """Of each layer the heads with the least ‖O·V‖."""
    new = model.to(torch.float32)
    out = "out_proj" if model.config["model_type"] == "opt" else "o_proj"
    for block in new.blocks:
        outputs = new.weights[f"{block}self_attn.{out}.weight"].unflatten(1, (-1, model.head_dim)).transpose(0, 1)
        values = new.weights[f"{block}self_attn.v_proj.weight"].unflatten(0, (-1, model.head_dim))
        values = values.repeat_interleave(len(outputs) // len(values), dim=0)
        weakest = torch.linalg.matrix_norm(outputs @ values).argsort()[:per_layer]
        kept = outputs.clone()
        kept[weakest] = 0
        new.weights[f"{block}self_attn.{out}.weight"] = kept.transpose(0, 1).flatten(1).contiguous()
    return new
