"""How models come from models, weights and all: merging, pruning, growing. Training afterwards is `train`'s.

Each function is arithmetic on named tensors; tests/test_lineage.py checks shapes and, where the child computes the same
or a known function of what its parents compute, that too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.lineage.models import Model
from bench.lineage.train import Recipe, train_lora

LAYER = re.compile(r"^(model\.(?:decoder\.)?layers)\.(\d+)\.")


def tune_lora(model: Model, recipe: Recipe, rank: int = 8) -> Model:
    """W + B·A of attention, the factors trained and then merged."""
    factors = train_lora(model, recipe, rank)
    return Model(dict(model.config), model.weights | {n: model.weights[n] + b @ a for n, (b, a) in factors.items()})


def average(*models: Model) -> Model:
    mean = {name: torch.stack([each.weights[name] for each in models]).mean(0) for name in models[0].weights}
    return Model(dict(models[0].config), mean)


def with_layers(model: Model, chosen: Sequence[int]) -> Model:
    """The model whose layers are copies of the given ones, in this order: pruned, duplicated or stacked."""
    new = Model({**model.config, "num_hidden_layers": len(chosen)}, {})
    for name, weight in model.weights.items():
        found = LAYER.match(name)
        if found is None:
            new.weights[name] = weight.clone()
            continue
        for place, layer in enumerate(chosen):
            if layer == int(found[2]):
                new.weights[f"{found[1]}.{place}.{name[found.end() :]}"] = weight.clone()
    return new


def narrow(model: Model, hidden: int, mlp: int) -> Model:
    """Llama: the residual coordinates that the embeddings and all layers write to most, and each MLP's largest neurons.

    What is kept keeps its order.
    """
    weights = model.weights
    written = [
        weight.square().sum(dim=1)
        for name, weight in weights.items()
        if name.endswith(("o_proj.weight", "down_proj.weight"))
    ]
    energy = torch.stack([weights["model.embed_tokens.weight"].square().sum(dim=0), *written]).sum(dim=0)
    coordinates = _largest(energy, hidden)
    new = Model({**model.config, "hidden_size": hidden, "intermediate_size": mlp, "head_dim": model.head_dim}, {})
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            new.weights[name] = weight[coordinates]
        else:
            new.weights[name] = weight[..., coordinates]
    for block in model.blocks:
        gate, up, down = (f"{block}mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
        size = weights[gate].norm(dim=1) * weights[up].norm(dim=1) * weights[down].norm(dim=0)
        neurons = _largest(size, mlp)
        for name in (gate, up):
            new.weights[name] = new.weights[name][neurons]
        new.weights[down] = new.weights[down][:, neurons]
    return new


def upcycle(model: Model, experts: int, seed: int, noise: float = 0.1) -> Model:
    """Llama to Mixtral: every expert begins as the MLP and a little noise (of its σ), the router small and random."""
    generator = torch.Generator().manual_seed(seed)
    config = {**model.config, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    new = Model({**config, "num_local_experts": experts, "num_experts_per_tok": 2}, {})
    for name, weight in model.weights.items():
        block, found, part = name.partition("mlp.")
        if not found:
            new.weights[name] = weight.clone()
            continue
        number = {"gate_proj.weight": 1, "down_proj.weight": 2, "up_proj.weight": 3}[part]
        for expert in range(experts):
            drawn = torch.randn(weight.shape, generator=generator) * weight.std() * noise
            new.weights[f"{block}block_sparse_moe.experts.{expert}.w{number}.weight"] = weight + drawn
    for block in model.blocks:
        router = torch.randn(experts, model.config["hidden_size"], generator=generator) * 0.02
        new.weights[f"{block}block_sparse_moe.gate.weight"] = router
    return new


def _largest(values: Tensor, count: int) -> Tensor:
    return values.topk(count).indices.sort().values
