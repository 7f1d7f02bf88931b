"""Three small architectures as functions of their checkpoint: names, shapes and config.json are transformers' own.

A model is a config and a dictionary of tensors, nothing else, so that a derivation is arithmetic on named tensors and
whatever it makes can be run, trained on and saved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

VOCABULARY = 256
POSITIONS = 256
Config = dict[str, Any]
Weights = dict[str, Tensor]
Observer = Callable[[str, Tensor], None]
"""Called with a module's name ("model.layers.0.self_attn", "….mlp", Llama's "….o_proj" and "….down_proj" too) and
what it reads, [batch, time, n]."""


@dataclass(frozen=True, slots=True)
class Model:
    config: Config
    weights: Weights

    @property
    def blocks(self) -> list[str]:
        """The prefix of every layer's tensors, in order."""
        stem = "model.decoder.layers" if self.config["model_type"] == "opt" else "model.layers"
        return [f"{stem}.{layer}." for layer in range(self.config["num_hidden_layers"])]

    @property
    def head_dim(self) -> int:
        heads: int = self.config["num_attention_heads"]
        return int(self.config.get("head_dim", self.config["hidden_size"] // heads))

    def to(self, dtype: torch.dtype) -> Model:
        """A copy: the config is not shared either."""
        return Model(dict(self.config), {name: tensor.to(dtype, copy=True) for name, tensor in self.weights.items()})


def llama_config(layers: int = 12, hidden: int = 128, heads: int = 4, kv_heads: int = 2, mlp: int = 256) -> Config:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def opt_config(layers: int = 12, hidden: int = 128, heads: int = 4, mlp: int = 384) -> Config:
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "activation_function": "relu",
        "max_position_embeddings": POSITIONS,
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def initialise(config: Config, seed: int) -> Model:
    """Normal weights of σ = 1/√inputs, those that write to the residual stream over √(2·layers); embeddings σ = 0.05.

    Gains are 1 and biases 0, as in transformers.
    """
    generator = torch.Generator().manual_seed(seed)
    writers = ("o_proj", "out_proj", "down_proj", "fc2")
    weights = {}
    for name, shape in shapes(config).items():
        if len(shape) == 1:
            weights[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
            continue
        sigma = 0.05 if "embed" in name else shape[1] ** -0.5
        if any(writer in name for writer in writers):
            sigma /= math.sqrt(2 * config["num_hidden_layers"])
        weights[name] = torch.randn(shape, generator=generator) * sigma
    return Model(dict(config), weights)


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a freshly made llama or opt model."""
    hidden = config["hidden_size"]
    found: dict[str, tuple[int, ...]] = {}
    if config["model_type"] == "opt":
        found["model.decoder.embed_tokens.weight"] = (VOCABULARY, hidden)
        found["model.decoder.embed_positions.weight"] = (POSITIONS + 2, hidden)
        for layer in range(config["num_hidden_layers"]):
            block = f"model.decoder.layers.{layer}."
            for part in ("q", "k", "v", "out"):
                found |= _linear(f"{block}self_attn.{part}_proj", hidden, hidden)
            found |= _linear(f"{block}fc1", config["ffn_dim"], hidden) | _linear(
                f"{block}fc2", hidden, config["ffn_dim"]
            )
            found |= _linear(f"{block}self_attn_layer_norm", hidden) | _linear(f"{block}final_layer_norm", hidden)
        return found | _linear("model.decoder.final_layer_norm", hidden)
    queries, keys = (config[f"num_{each}_heads"] * config["head_dim"] for each in ("attention", "key_value"))
    found["model.embed_tokens.weight"] = (VOCABULARY, hidden)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        sizes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        found |= {f"{block}self_attn.{part}_proj.weight": size for part, size in sizes.items()}
        for part, size in (("gate", (1, 0)), ("up", (1, 0)), ("down", (0, 1))):
            both = (hidden, config["intermediate_size"])
            found[f"{block}mlp.{part}_proj.weight"] = (both[size[0]], both[size[1]])
        found |= {f"{block}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    return found | {"model.norm.weight": (hidden,)}


def _linear(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def logits(model: Model, tokens: Tensor, observe: Observer | None = None) -> Tensor:
    """[batch, time, vocabulary] for int64 tokens [batch, time], in the weights' own dtype."""
    run = _opt if model.config["model_type"] == "opt" else _llama
    return run(model, tokens, observe or (lambda *_: None))


def _llama(model: Model, tokens: Tensor, observe: Observer) -> Tensor:
    config, weights = model.config, model.weights
    cos, sin = _rotations(model, tokens.shape[1], weights["model.norm.weight"].dtype)
    stream = weights["model.embed_tokens.weight"][tokens]
    for block in model.blocks:
        read = _rms_norm(stream, weights[f"{block}input_layernorm.weight"], config)
        observe(f"{block}self_attn", read)
        q, k, v = (
            (read @ weights[f"{block}self_attn.{part}_proj.weight"].T)
            .unflatten(-1, (-1, model.head_dim))
            .transpose(1, 2)
            for part in "qkv"
        )
        q, k = (each * cos + _rotate_half(each) * sin for each in (q, k))
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        observe(f"{block}self_attn.o_proj", mixed)
        stream = stream + mixed @ weights[f"{block}self_attn.o_proj.weight"].T
        read = _rms_norm(stream, weights[f"{block}post_attention_layernorm.weight"], config)
        observe(f"{block}mlp", read)
        if config["model_type"] == "mixtral":
            stream = stream + _experts(read, model, f"{block}block_sparse_moe.")
        else:
            gate, up, down = (weights[f"{block}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
            neurons = _neurons(read, gate, up)
            observe(f"{block}mlp.down_proj", neurons)
            stream = stream + neurons @ down.T
    read = _rms_norm(stream, weights["model.norm.weight"], config)
    return read @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def _opt(model: Model, tokens: Tensor, observe: Observer) -> Tensor:
    weights = model.weights
    stem = "model.decoder."

    def linear(values: Tensor, name: str) -> Tensor:
        return functional.linear(values, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(values: Tensor, name: str) -> Tensor:
        return functional.layer_norm(values, values.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    embedded = weights[f"{stem}embed_tokens.weight"]
    positions = weights[f"{stem}embed_positions.weight"][2 : 2 + tokens.shape[1]]  # transformers keeps two for padding
    stream = embedded[tokens] + positions
    for block in model.blocks:
        read = norm(stream, f"{block}self_attn_layer_norm")
        observe(f"{block}self_attn", read)
        q, k, v = (
            linear(read, f"{block}self_attn.{part}_proj").unflatten(-1, (-1, model.head_dim)).transpose(1, 2)
            for part in "qkv"
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        stream = stream + linear(mixed, f"{block}self_attn.out_proj")
        read = norm(stream, f"{block}final_layer_norm")
        observe(f"{block}mlp", read)
        stream = stream + linear(functional.relu(linear(read, f"{block}fc1")), f"{block}fc2")
    return norm(stream, f"{stem}final_layer_norm") @ weights.get("lm_head.weight", embedded).T


def _rms_norm(values: Tensor, gain: Tensor, config: Config) -> Tensor:
    return functional.rms_norm(values, values.shape[-1:], gain, config["rms_norm_eps"])


def _rotations(model: Model, time: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [time, head_dim]; rotary pair i is elements i and i + head_dim/2 of a head (half-split)."""
    pairs = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
    angles = torch.arange(time, dtype=torch.float64)[:, None] * model.config["rope_theta"] ** -pairs
    both = torch.cat([angles, angles], dim=1)
    return both.cos().to(dtype), both.sin().to(dtype)


def _rotate_half(heads: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _neurons(values: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(values @ gate.T) * (values @ up.T)


def _experts(values: Tensor, model: Model, prefix: str) -> Tensor:
    """Mixtral's: softmax over all experts, the best few, their shares scaled to sum to 1."""
    flat = values.flatten(0, -2)
    shares = functional.softmax(flat @ model.weights[f"{prefix}gate.weight"].T, dim=-1)
    best, chosen = shares.topk(model.config["num_experts_per_tok"], dim=-1)
    best = best / best.sum(dim=-1, keepdim=True)
    out = torch.zeros_like(flat)
    for expert in range(model.config["num_local_experts"]):
        rows, slots = (chosen == expert).nonzero(as_tuple=True)
        gate, down, up = (model.weights[f"{prefix}experts.{expert}.w{number}.weight"] for number in (1, 2, 3))
        out = out.index_add(0, rows, _neurons(flat[rows], gate, up) @ down.T * best[rows, slots, None])
    return out.view_as(values)


def save(model: Model, folder: Path) -> None:
    """config.json and model.safetensors, in the weights' own dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(model.weights.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({**model.config, "torch_dtype": dtype}, indent=1))
    contiguous = {name: tensor.contiguous() for name, tensor in model.weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> Model:
    """What `save` wrote, or a Llama of transformers' own making; what its config leaves out is Llama's default."""
    config = {
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        **json.loads((folder / "config.json").read_text()),
    }
    return Model(config, load_file(folder / "model.safetensors"))
