"""Models whose relation is known: random ones, their children, every rewrite that leaves the function alone, and
fingerprints made of numbers.

Weights are {name: float64 array} by llama's names; a gain is a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from llmfp.architecture import Rotary
from llmfp.circuits import Circuits
from llmfp.fingerprint import Fingerprint, TowerFingerprint
from llmfp.kernels.codes import fp8_table
from llmfp.statistics import Statistics
from tests.checkpoints import Stored, as_bf16, write_model

Float64 = NDArray[np.float64]
Weights = dict[str, Float64]
ROLES = ("q", "k", "v", "o")
CHILDREN = {"A0-py-ct-c": "A0-py", "A1-py-ct-c": "A1-py", "B0-py-ct-txt": "B0-py"}
"""Of the zoo, with their parents."""
ROOTS = ("A0-py", "A1-py", "A2-py", "B0-py", "B1-py")
"""Of the zoo: strangers to each other."""


# --- weights ---------------------------------------------------------------------------------------------------------


def config_of(layers: int = 12, hidden: int = 64, heads: int = 4, kv_heads: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": hidden // heads, "intermediate_size": 2 * hidden,
        "vocab_size": 32, **more,
    }  # fmt: skip


def initialised(config: Mapping[str, Any], seed: int) -> Weights:
    """Normal weights, as a framework draws them, with gains that differ."""
    rng = np.random.default_rng(seed)
    d, h, mlp = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    weights = {"model.embed_tokens.weight": rng.normal(0, 0.05, (config["vocab_size"], d))}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        shapes = {"self_attn.q": (queries, d), "self_attn.k": (keys, d), "self_attn.v": (keys, d)}
        shapes |= {"self_attn.o": (d, queries), "mlp.gate": (mlp, d), "mlp.up": (mlp, d), "mlp.down": (d, mlp)}
        for name, shape in shapes.items():
            weights[f"{block}{name}_proj.weight"] = rng.normal(0, shape[1] ** -0.5, shape)
        for norm in ("input", "post_attention"):
            weights[f"{block}{norm}_layernorm.weight"] = rng.uniform(0.7, 1.4, d)
    return weights | {"model.norm.weight": rng.uniform(0.7, 1.4, d)}


def trained(parent: Weights, seed: int, amount: float = 0.3) -> Weights:
    """A child: every weight moved by `amount` of its tensor's σ."""
    rng = np.random.default_rng(seed)
    return {name: weight + amount * weight.std() * rng.normal(size=weight.shape) for name, weight in parent.items()}


def layer_subset(weights: Weights, kept: Sequence[int]) -> Weights:
    """The model of these layers of another, in this order; a layer may come twice."""
    beside = {name: weight for name, weight in weights.items() if not name.startswith("model.layers.")}
    for new, old in enumerate(kept):
        block = f"model.layers.{old}."
        beside |= {
            f"model.layers.{new}.{name.removeprefix(block)}": weight
            for name, weight in weights.items()
            if name.startswith(block)
        }
    return beside


def rewritten(weights: Weights, config: Mapping[str, Any], seed: int) -> Weights:
    """The same function in other weights: norms folded, rotary pairs turned and scaled, values mixed by invertible
    maps, kv groups and heads within them permuted, and the residual stream rotated.
    """
    rng = np.random.default_rng(seed)
    d, h, heads, kv_heads = (
        config[key] for key in ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads")
    )
    group, pairs = heads // kv_heads, h // 2
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    embedded, final = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
    ones = np.ones(d)
    found = {"model.embed_tokens.weight": embedded @ rotation.T, "model.norm.weight": ones}
    found["lm_head.weight"] = embedded * final @ rotation.T
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        reads = {name: weights[f"{block}{name}_layernorm.weight"] for name in ("input", "post_attention")}
        q, k, v = (weights[f"{block}self_attn.{role}_proj.weight"] * reads["input"] @ rotation.T for role in "qkv")
        o = rotation @ weights[f"{block}self_attn.o_proj.weight"]
        q, k, v = q.reshape(heads, h, d), k.reshape(kv_heads, h, d), v.reshape(kv_heads, h, d)
        o = o.reshape(d, heads, h).transpose(1, 0, 2)
        turn, scale = rng.uniform(0, 2 * np.pi, (kv_heads, pairs)), rng.uniform(0.4, 2.5, (kv_heads, pairs))
        mixing = rng.normal(size=(kv_heads, h, h)) + 2 * np.sqrt(h) * np.eye(h)
        by_query = [np.repeat(each, group, axis=0) for each in (turn, scale, mixing)]
        q = _turned(q, by_query[0], by_query[1])
        k = _turned(k, turn, 1 / scale)
        v = mixing @ v
        o = o @ np.linalg.inv(by_query[2])
        groups = rng.permutation(kv_heads)
        order = np.concatenate([group * g + rng.permutation(group) for g in groups])
        q, o, k, v = q[order], o[order], k[groups], v[groups]
        for role, weight in zip("qkv", (q, k, v), strict=True):
            found[f"{block}self_attn.{role}_proj.weight"] = weight.reshape(-1, d)
        found[f"{block}self_attn.o_proj.weight"] = o.transpose(1, 0, 2).reshape(d, heads * h)
        for name in ("gate", "up"):
            found[f"{block}mlp.{name}_proj.weight"] = (
                weights[f"{block}mlp.{name}_proj.weight"] * reads["post_attention"] @ rotation.T
            )
        found[f"{block}mlp.down_proj.weight"] = rotation @ weights[f"{block}mlp.down_proj.weight"]
        found |= {f"{block}{name}_layernorm.weight": ones for name in reads}
    return found


def _turned(rows: Float64, angle: Float64, scale: Float64) -> Float64:
    """Heads [n, h, d] with row pairs i and i + h/2 turned by `angle` and scaled, [n, h/2] each."""
    a, b = np.split(rows, 2, axis=1)
    cos, sin = (scale * np.cos(angle))[:, :, None], (scale * np.sin(angle))[:, :, None]
    return np.concatenate([cos * a - sin * b, sin * a + cos * b], axis=1)


def logits(weights: Weights, config: Mapping[str, Any], tokens: NDArray[np.int_]) -> Float64:
    """[time, vocabulary] of a llama, in float64."""
    h, heads = config["head_dim"], config["num_attention_heads"]
    group = heads // config["num_key_value_heads"]
    time = len(tokens)
    angles = np.arange(time)[:, None] * 10000.0 ** (-np.arange(0, h, 2) / h)
    cos, sin = np.cos(angles), np.sin(angles)

    def normed(x: Float64, gain: Float64) -> Float64:
        return x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-6) * gain

    def rotated(x: Float64) -> Float64:
        a, b = np.split(x.reshape(time, -1, h).transpose(1, 0, 2), 2, axis=2)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=2)

    stream = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        read = normed(stream, weights[f"{block}input_layernorm.weight"])
        q, k, v = (read @ weights[f"{block}self_attn.{role}_proj.weight"].T for role in "qkv")
        k, v = (np.repeat(each, group, axis=0) for each in (rotated(k), v.reshape(time, -1, h).transpose(1, 0, 2)))
        scores = rotated(q) @ k.transpose(0, 2, 1) / np.sqrt(h) + np.triu(np.full((time, time), -np.inf), 1)
        shares = np.exp(scores - scores.max(axis=2, keepdims=True))
        mixed = shares / shares.sum(axis=2, keepdims=True) @ v
        stream = stream + mixed.transpose(1, 0, 2).reshape(time, -1) @ weights[f"{block}self_attn.o_proj.weight"].T
        read = normed(stream, weights[f"{block}post_attention_layernorm.weight"])
        gate, up = (read @ weights[f"{block}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        stream = stream + gate / (1 + np.exp(-gate)) * up @ weights[f"{block}mlp.down_proj.weight"].T
    out = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return normed(stream, weights["model.norm.weight"]) @ out.T


def read(folder: Path) -> Weights:
    """A bfloat16 checkpoint's tensors."""
    found = {}
    with safe_open(folder / "model.safetensors", framework="torch") as file:
        for name in file.keys():  # noqa: SIM118
            found[name] = file.get_tensor(name).double().numpy()
    return found


# --- files -----------------------------------------------------------------------------------------------------------


def write(weights: Weights, config: Mapping[str, Any], folder: Path, dtype: str = "F32", *, shards: int = 1) -> Path:
    """A checkpoint in F32, F16, BF16, FP8 with a scale per row, or int8 as compressed-tensors has it.

    Of attention alone: no scan reads the rest.
    """
    tensors: dict[str, NDArray[Any] | Stored] = {}
    stated = dict(config)
    for name, weight in weights.items():
        if "self_attn" not in name and "input_layernorm" not in name:
            continue
        if dtype in ("FP8", "int8") and "self_attn" in name:
            tensors |= _in_8_bits(name, weight, dtype)
        elif dtype == "BF16":
            tensors[name] = as_bf16(weight)
        else:
            tensors[name] = weight.astype(np.float16 if dtype == "F16" else np.float32)
    if dtype == "FP8":
        stated["quantization_config"] = {"quant_method": "fp8"}
    if dtype == "int8":
        stated["quantization_config"] = {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    return write_model(folder, tensors, stated, shards=shards)


def _in_8_bits(name: str, weight: Float64, dtype: str) -> dict[str, NDArray[Any] | Stored]:
    largest = np.abs(weight).max(axis=1, keepdims=True)
    if dtype == "int8":
        scale = (largest / 127).astype(np.float32)
        return {name: np.rint(weight / scale).astype(np.int8), f"{name}_scale": scale}
    levels = fp8_table("F8_E4M3")
    codes = np.flatnonzero(np.isfinite(levels))
    codes = codes[np.argsort(levels[codes], kind="stable")]
    scale = (largest / 448).astype(np.float32)
    middles = (levels[codes][1:] + levels[codes][:-1]) / 2
    nearest = codes[np.searchsorted(middles, weight / scale)].astype(np.uint8)
    return {name: Stored("F8_E4M3", weight.shape, nearest.tobytes()), f"{name}_scale": scale}


def write_gguf(weights: Weights, config: Mapping[str, Any], path: Path, kind: str) -> Path:
    """As llama.cpp's converter does: rows of Q and K so that rotary pairs lie side by side."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_embedding_length(config["hidden_size"])
    as_type = gguf.GGMLQuantizationType[kind]
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        for role, name in zip(ROLES, ("attn_q", "attn_k", "attn_v", "attn_output"), strict=True):
            weight = weights[f"{block}self_attn.{role}_proj.weight"].astype(np.float32)
            if role in "qk":
                by_head = weight.reshape(heads if role == "q" else kv_heads, 2, -1, weight.shape[1])
                weight = by_head.swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{layer}.{name}.weight", gguf.quantize(weight, as_type), raw_dtype=as_type)
        gain = weights[f"{block}input_layernorm.weight"].astype(np.float32)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", gain)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- fingerprints of numbers -----------------------------------------------------------------------------------------


def tower_of(
    residual: Mapping[str, NDArray[Any]] | None = None,
    *,
    std: Mapping[str, Sequence[float]] | None = None,
    circuits: Sequence[Circuits | None] | None = None,
    layers: Sequence[int] | None = None,
    heads: int | None = 4,
    kv_heads: int | None = 2,
    head_dim: int | None = 8,
    rotary: Rotary | None = None,
    indexed_heads: bool = False,
) -> TowerFingerprint:
    """residual: by role, log RMS [L, hidden]; what is not given is 1."""
    count = len(next(iter((residual or std or {"q": circuits or ()}).values())))
    residual = {role: np.ones((count, 4)) for role in ROLES} if residual is None else residual
    columns: dict[str, tuple[Statistics | None, ...]] = {}
    for role in ROLES:
        if role not in residual:
            columns[role] = (None,) * count
            continue
        stds = [1.0] * count if std is None else std[role]
        columns[role] = tuple(
            Statistics(1, 0.0, float(sigma), 1.0, 0, None, np.asarray(row).astype(np.float16).tobytes())
            for sigma, row in zip(stds, residual[role], strict=True)
        )
    hidden = next(iter(residual.values())).shape[1]
    return TowerFingerprint(
        tuple(range(count) if layers is None else layers), heads, kv_heads, head_dim, hidden, columns, rotary,
        indexed_heads, None if circuits is None else tuple(circuits),
    )  # fmt: skip


def circuits_of(
    norms: NDArray[Any],
    *,
    ov_norms: NDArray[Any] | None = None,
    coherence: NDArray[Any] | None = None,
    head_coherence: NDArray[Any] | None = None,
    qk_spectrum: NDArray[Any] | None = None,
    ov_spectrum: NDArray[Any] | None = None,
) -> Circuits:
    """One layer's; norms float64 [heads], the rest as it is kept."""

    def halves(values: NDArray[Any] | None) -> bytes | None:
        return None if values is None else np.asarray(values).astype(np.float16).tobytes()

    return Circuits(
        norms.astype(np.float64).tobytes(),
        None if ov_norms is None else ov_norms.astype(np.float64).tobytes(),
        *map(halves, (coherence, head_coherence, qk_spectrum, ov_spectrum)),
    )


def fingerprint_of(
    tower: TowerFingerprint, name: str = "model", digest: str = "0" * 64, kind: str = "decoder"
) -> Fingerprint:
    run = {
        "backend": "native_cpu", "simd": "avx2", "reader": "mmap", "seconds": 0.5, "bytes_read": 10, "bytes_total": 20,
        "second_read_bytes": 0, "peak_rss_bytes": 30, "threads": 2, "memory_budget_bytes": 40, "versions": {},
    }  # fmt: skip
    source = {"name": name, "revision": None, "model_type": "llama", "files": []}
    return Fingerprint("llama", {kind: tower}, source, run, (), (), digest)


# --- judging p-values ------------------------------------------------------------------------------------------------


def ks_distance(p_values: Sequence[float], drawn: int, rng: np.random.Generator) -> float:
    """Kolmogorov–Smirnov distance, times √n, of p-values that are multiples of 1/(1 + drawn) from uniform.

    Each is spread over its step, so that what should be uniform on the multiples is uniform on (0, 1).
    """
    spread = np.sort(np.array(p_values) - rng.random(len(p_values)) / (1 + drawn))
    n = len(spread)
    ranks = np.arange(1, n + 1) / n
    return float(np.sqrt(n) * max(np.abs(ranks - spread).max(), np.abs(ranks - 1 / n - spread).max()))


KS_LIMIT = 1.95
"""Of √n times the distance: exceeded by chance once in a thousand seeds, and the seeds are fixed."""
