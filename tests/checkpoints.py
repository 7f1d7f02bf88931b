"""Small checkpoints for tests, written byte by byte from the format's description, so that a test can write them wrong.

`LAYOUTS` says by hand, from the published model code and ../shared/reference/FORMATS.md, how each family stores its
attention. Nothing here is read from llmfp/architecture: that is what the tests check against this file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BACKEND = "auto"
"""What scans in these tests run on."""

_STORED_AS = {"float64": "F64", "float32": "F32", "float16": "F16", "uint8": "U8", "int8": "I8", "int32": "I32"}


@dataclass(frozen=True)
class Stored:
    """A tensor as the file holds it, for dtypes NumPy lacks."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


def bf16(values: NDArray[Any]) -> NDArray[np.float32]:
    """Rounded toward zero to what bfloat16 holds, as float32."""
    bits = np.asarray(values, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def as_bf16(values: NDArray[Any]) -> Stored:
    """To be stored as BF16; exact for what `bf16` returns."""
    bits = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype("<u2")
    return Stored("BF16", values.shape, bits.tobytes())


def stored(tensor: NDArray[Any] | Stored) -> Stored:
    if isinstance(tensor, Stored):
        return tensor
    little = tensor.astype(tensor.dtype.newbyteorder("<"))
    return Stored(_STORED_AS[tensor.dtype.name], tensor.shape, little.tobytes())


def entry(dtype: str, shape: tuple[int, ...] | list[int], start: int, stop: int) -> dict[str, Any]:
    """One tensor's line of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def framed(header: bytes | str | Mapping[str, Any], data: bytes = b"") -> bytes:
    """A file's bytes: header length, header as it is, data."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header)) + header + data


def safetensors_bytes(tensors: Mapping[str, NDArray[Any] | Stored]) -> bytes:
    """A valid file, tensors in the order given."""
    header, data = {}, bytearray()
    for name, tensor in tensors.items():
        as_stored = stored(tensor)
        header[name] = entry(as_stored.dtype, as_stored.shape, len(data), len(data) + len(as_stored.content))
        data += as_stored.content
    return framed(header, bytes(data))


def write_model(
    folder: Path,
    tensors: Mapping[str, NDArray[Any] | Stored],
    config: Mapping[str, Any] | None = None,
    *,
    shards: int = 1,
) -> Path:
    """A checkpoint directory: model.safetensors, or numbered shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[number::shards]}
        (folder / name).write_bytes(safetensors_bytes(part))
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Mapping[str, Any]) -> None:
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


@dataclass(frozen=True)
class Layout:
    """How one tower of a family stores its attention; `{}` is the layer number.

    norm      "rms" or "layer": what centres the residual stream
    before    gain in front of Q, K, V; after: gain between O and the residual addition
    post      no norm in front of Q, K, V: they read the stream as it is
    square    heads · head_dim equals the hidden size and K, V have as many heads as Q
    config    the family's own keys, `{heads}` and so on by name
    extra     tensors beside attention, per layer, that must not be read
    """

    family: str
    config: Mapping[str, Any] | None
    block: str
    q: str = ""
    k: str = ""
    v: str = ""
    o: str = ""
    qkv: str = ""
    conv1d: bool = False
    norm: str = "rms"
    before: str = ""
    after: str = ""
    offset: float = 0.0
    post: bool = False
    square: bool = False
    tower: str = "decoder"
    extra: tuple[str, ...] = ()


LLAMA_CONFIG = {
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
}
_GPT_CONFIG = {"n_head": "heads", "n_layer": "layers", "n_embd": "hidden"}
_BERT_CONFIG = {"num_attention_heads": "heads", "num_hidden_layers": "layers", "hidden_size": "hidden"}
_T5_CONFIG = {"model_type": "t5", "num_heads": "heads", "d_kv": "head_dim", "num_layers": "layers", "d_model": "hidden"}
_LLAMA_NAMES = {
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
}
_LLAMA_MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
_T5_NAMES = {role: f"SelfAttention.{role}.weight" for role in "qkvo"}


def _llama_like(family: str, model_type: str, *extra: str, **norm: Any) -> Layout:
    return Layout(
        family, {"model_type": model_type, **LLAMA_CONFIG}, "model.layers.{}", **_LLAMA_NAMES, **norm,
        extra=(*_LLAMA_MLP, *extra),
    )  # fmt: skip


LAYOUTS: dict[str, list[Layout]] = {
    "llama": [
        _llama_like(
            "llama", "qwen3", "self_attn.q_norm.weight", "self_attn.q_proj.bias", "post_attention_layernorm.weight",
            before="input_layernorm.weight",
        )
    ],
    "gemma": [_llama_like("gemma", "gemma", before="input_layernorm.weight", offset=1.0)],
    "gemma2": [
        _llama_like(
            "gemma2", "gemma2", "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight",
            before="input_layernorm.weight", after="post_attention_layernorm.weight", offset=1.0,
        )
    ],
    "olmo": [_llama_like("olmo", "olmo", norm="layer")],
    "olmo2": [
        _llama_like(
            "olmo2", "olmo2", "post_feedforward_layernorm.weight", after="post_attention_layernorm.weight", post=True
        )
    ],
    "glm4": [
        _llama_like(
            "glm4", "glm4", "post_attention_layernorm.weight", "post_mlp_layernorm.weight",
            before="input_layernorm.weight", after="post_self_attn_layernorm.weight",
        )
    ],
    "cohere": [_llama_like("cohere", "cohere", norm="layer", before="input_layernorm.weight")],
    "starcoder2": [
        _llama_like("starcoder2", "phimoe", "input_layernorm.bias", norm="layer", before="input_layernorm.weight")
    ],
    "phi": [
        Layout(
            "phi", {"model_type": "phi", **LLAMA_CONFIG}, "model.layers.{}",
            **{**_LLAMA_NAMES, "o": "self_attn.dense.weight"}, norm="layer", before="input_layernorm.weight",
            extra=("mlp.fc1.weight", "input_layernorm.bias"),
        )
    ],
    "phi3": [
        Layout(
            "phi3", {"model_type": "phi3", **LLAMA_CONFIG}, "model.layers.{}", qkv="self_attn.qkv_proj.weight",
            o="self_attn.o_proj.weight", before="input_layernorm.weight", extra=("mlp.gate_up_proj.weight",),
        )
    ],
    "mistral": [
        Layout(
            "mistral", None, "layers.{}", q="attention.wq.weight", k="attention.wk.weight", v="attention.wv.weight",
            o="attention.wo.weight", before="attention_norm.weight", extra=("ffn_norm.weight",),
        )
    ],
    "gpt2": [
        Layout(
            "gpt2", {"model_type": "gpt2", **_GPT_CONFIG}, "transformer.h.{}", qkv="attn.c_attn.weight",
            o="attn.c_proj.weight", conv1d=True, norm="layer", before="ln_1.weight", square=True,
            extra=("attn.c_attn.bias", "ln_1.bias", "ln_2.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
        )
    ],
    "gptj": [
        Layout(
            "gptj", {"model_type": "gptj", **_GPT_CONFIG}, "transformer.h.{}", q="attn.q_proj.weight",
            k="attn.k_proj.weight", v="attn.v_proj.weight", o="attn.out_proj.weight", norm="layer",
            before="ln_1.weight", square=True, extra=("mlp.fc_in.weight", "ln_1.bias"),
        )
    ],
    "gpt_neo": [
        Layout(
            "gpt_neo",
            {"model_type": "gpt_neo", "num_heads": "heads", "num_layers": "layers", "hidden_size": "hidden"},
            "transformer.h.{}", q="attn.attention.q_proj.weight", k="attn.attention.k_proj.weight",
            v="attn.attention.v_proj.weight", o="attn.attention.out_proj.weight", norm="layer", before="ln_1.weight",
            square=True, extra=("mlp.c_fc.weight", "ln_1.bias"),
        )
    ],
    "exaone": [
        Layout(
            "exaone",
            {
                "model_type": "exaone", "num_attention_heads": "heads", "num_key_value_heads": "kv_heads",
                "num_layers": "layers",
            },
            "transformer.h.{}", q="attn.attention.q_proj.weight", k="attn.attention.k_proj.weight",
            v="attn.attention.v_proj.weight", o="attn.attention.out_proj.weight", before="ln_1.weight",
            extra=("mlp.c_fc_0.weight", "mlp.c_fc_1.weight", "ln_2.weight"),
        )
    ],
    "opt": [
        Layout(
            "opt", {"model_type": "opt", **_BERT_CONFIG}, "model.decoder.layers.{}",
            **{**_LLAMA_NAMES, "o": "self_attn.out_proj.weight"}, norm="layer", before="self_attn_layer_norm.weight",
            square=True, extra=("fc1.weight", "self_attn_layer_norm.bias"),
        )
    ],
    "nemotron_h": [
        Layout(
            "nemotron_h", {"model_type": "nemotron_h", **LLAMA_CONFIG}, "backbone.layers.{}", q="mixer.q_proj.weight",
            k="mixer.k_proj.weight", v="mixer.v_proj.weight", o="mixer.o_proj.weight", before="norm.weight",
        )
    ],
    "bert": [
        Layout(
            "bert", {"model_type": "bert", **_BERT_CONFIG}, "bert.encoder.layer.{}",
            q="attention.self.query.weight", k="attention.self.key.weight", v="attention.self.value.weight",
            o="attention.output.dense.weight", norm="layer", post=True, square=True, tower="encoder",
            extra=("attention.output.LayerNorm.weight", "intermediate.dense.weight", "output.dense.weight"),
        )
    ],
    "distilbert": [
        Layout(
            "distilbert",
            {"model_type": "distilbert", "n_heads": "heads", "n_layers": "layers", "dim": "hidden"},
            "distilbert.transformer.layer.{}", q="attention.q_lin.weight", k="attention.k_lin.weight",
            v="attention.v_lin.weight", o="attention.out_lin.weight", norm="layer", post=True, square=True,
            tower="encoder", extra=("sa_layer_norm.weight", "ffn.lin1.weight"),
        )
    ],
    "t5": [
        Layout("t5", _T5_CONFIG, "encoder.block.{}.layer.0", **_T5_NAMES, before="layer_norm.weight", tower="encoder"),
        Layout("t5", _T5_CONFIG, "decoder.block.{}.layer.0", **_T5_NAMES, before="layer_norm.weight"),
        Layout(
            "t5", _T5_CONFIG, "decoder.block.{}.layer.1",
            **{role: f"EncDecAttention.{role}.weight" for role in "qkvo"}, tower="cross",
        ),
    ],
}  # fmt: skip


@dataclass
class Model:
    """A checkpoint's content and, beside it, what each projection is: the W [out, in] that was drawn for it."""

    tensors: dict[str, NDArray[Any] | Stored] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    weights: dict[tuple[str, int, str], NDArray[np.float64]] = field(default_factory=dict)
    profiles: dict[tuple[str, int, str], NDArray[np.float64]] = field(default_factory=dict)
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    hidden: int = 0

    def write(self, folder: Path, *, config: bool = True, shards: int = 1) -> Path:
        return write_model(folder, self.tensors, self.config if config else None, shards=shards)


SPREAD = {"q": 0.5, "k": 1.0, "v": 2.0, "o": 4.0}
"""The σ each role is drawn with: a wrong split or a swapped role shows."""


def build(
    family: str,
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    hidden: int = 24,
    seed: int = 0,
) -> Model:
    """A model of that family with every role at its own σ and a mean of its own, in the family's true layout."""
    rng = np.random.default_rng(seed)
    model = Model(tensors={"lm_head.weight": _noise(rng, 16, hidden)})
    for layout in LAYOUTS[family]:
        if layout.square:
            kv_heads, hidden = heads, heads * head_dim
        model.heads, model.kv_heads, model.head_dim, model.hidden = heads, kv_heads, head_dim, hidden
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "layers": layers, "hidden": hidden}
        if layout.config is not None:
            model.config = {key: sizes.get(value, value) for key, value in layout.config.items()}
        for layer in range(layers):
            _add_layer(model, layout, layer, rng)
    return model


def _add_layer(model: Model, layout: Layout, layer: int, rng: np.random.Generator) -> None:
    q_size, kv_size = model.heads * model.head_dim, model.kv_heads * model.head_dim
    shapes = {"q": (q_size, model.hidden), "k": (kv_size, model.hidden), "v": (kv_size, model.hidden)}
    shapes["o"] = (model.hidden, q_size)
    drawn: dict[str, NDArray[np.float32]] = {}
    for role, shape in shapes.items():
        sigma = SPREAD[role] * (1 + 0.1 * layer)
        drawn[role] = rng.normal(0.3 * sigma, sigma, shape).astype(np.float32)
    block = layout.block.format(layer)
    gains = {}
    for part in ("before", "after"):
        if suffix := getattr(layout, part):
            gains[part] = rng.uniform(0.5, 2.0, model.hidden).astype(np.float32)
            model.tensors[f"{block}.{suffix}"] = gains[part] - np.float32(layout.offset)
    for role, weights in drawn.items():
        key = layout.tower, layer, role
        model.weights[key] = weights.astype(np.float64)
        model.profiles[key] = residual_profile(model.weights[key], role, layout, gains)
    if layout.qkv:
        fused = np.concatenate([drawn["q"], drawn["k"], drawn["v"]])
        model.tensors[f"{block}.{layout.qkv}"] = fused.T if layout.conv1d else fused
    for role in "qkvo":
        if suffix := getattr(layout, role):
            model.tensors[f"{block}.{suffix}"] = drawn[role].T if layout.conv1d else drawn[role]
    for suffix in layout.extra:
        one_dimensional = "norm" in suffix.lower() or "ln_" in suffix or suffix.endswith("bias")
        shape = (model.hidden,) if one_dimensional else (8, model.hidden)
        model.tensors[f"{block}.{suffix}"] = _noise(rng, *shape)


def residual_profile(
    weights: NDArray[np.float64], role: str, layout: Layout, gains: Mapping[str, NDArray[np.float32]]
) -> NDArray[np.float64]:
    """log RMS along each residual coordinate of Ŵ = W·diag(g)·J, Ô = J·diag(g_post)·O (EVIDENCE.md, reads and writes).

    J removes the mean over the residual coordinates, where the norm that reads them is a LayerNorm.
    """
    along_residual = weights if role != "o" else weights.T
    gain = gains.get("before" if role != "o" else "after")
    if gain is not None:
        along_residual = along_residual * gain.astype(np.float64)
    if layout.norm == "layer" and not (layout.post and role != "o"):
        along_residual = along_residual - along_residual.mean(axis=1, keepdims=True)
    return 0.5 * np.log(np.square(along_residual).mean(axis=0))


def _noise(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """What no statistic may touch: so large that a single element would show."""
    return rng.normal(1e6, 1e6, shape).astype(np.float32)
