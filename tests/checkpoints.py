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

_STORED_AS = {"float64": "F64", "float32": "F32", "float16": "F16"}
_STORED_AS |= {"int8": "I8", "int32": "I32", "int64": "I64", "uint8": "U8", "uint32": "U32"}


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

    fused     how `qkv` lies: "concat"; "groups", per kv head its query heads, its key and its value; "codegen", four
              shards of query, value and key
    gated     each head's query rows are followed by as many of a gate
    factors   names of latent attention's factors by role
    biases    names of biases by "q", "k", "v" or "qkv"; a fused one is laid out as its weights are
    norm      "rms" or "layer": what centres the residual stream
    before    gain in front of Q, K, V; after: gain between O and the residual addition
    latent    gains in front of "q_b" and "kv_b"
    post      no norm in front of Q, K, V: they read the stream as it is
    square    heads · head_dim equals the hidden size and K, V have as many heads as Q
    one_kv    K and V have one head
    doubled   Q, K and V read the residual stream and, beside it, the embeddings
    config    the family's own keys, `{heads}` and so on by name
    extra     tensors beside attention, per layer, that must not be read
    between   tensors of a layer of another kind behind the last one
    """

    family: str
    config: Mapping[str, Any] | None
    block: str
    q: str = ""
    k: str = ""
    v: str = ""
    o: str = ""
    qkv: str = ""
    fused: str = "concat"
    gated: bool = False
    factors: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    conv1d: bool = False
    norm: str = "rms"
    before: str = ""
    after: str = ""
    latent: Mapping[str, str] = field(default_factory=dict)
    offset: float = 0.0
    post: bool = False
    square: bool = False
    one_kv: bool = False
    doubled: bool = False
    tower: str = "decoder"
    extra: tuple[str, ...] = ()
    between: tuple[str, ...] = ()

    @property
    def interleaved(self) -> bool:
        """Whether no shape tells where a head ends."""
        return self.fused == "groups" or self.gated


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
_LATENT_KV = {"kv_a": "self_attn.kv_a_proj_with_mqa.weight", "kv_b": "self_attn.kv_b_proj.weight"}
_LATENT_NORMS = {"q_b": "self_attn.q_a_layernorm.weight", "kv_b": "self_attn.kv_a_layernorm.weight"}
_QKV = (("q", "query"), ("k", "key"), ("v", "value"))
_T5_NAMES = {role: f"SelfAttention.{role}.weight" for role in "qkvo"}


def _llama_like(family: str, model_type: str, *extra: str, **norm: Any) -> Layout:
    return Layout(
        family, {"model_type": model_type, **LLAMA_CONFIG}, "model.layers.{}", **_LLAMA_NAMES, **norm,
        extra=(*_LLAMA_MLP, *extra),
    )  # fmt: skip


def _bart_like(family: str, model_type: str, **norm: Any) -> list[Layout]:
    config = {"model_type": model_type, "encoder_attention_heads": "heads", "num_hidden_layers": "layers"}
    decoder = "model.decoder.layers.{}"
    own = {role: f"self_attn.{'out' if role == 'o' else role}_proj.weight" for role in "qkvo"}
    cross = {role: f"encoder_attn.{'out' if role == 'o' else role}_proj.weight" for role in "qkvo"}
    biases = {"q": "self_attn.q_proj.bias", "v": "self_attn.v_proj.bias"}
    extra = ("encoder_attn_layer_norm.weight", "fc1.weight", "encoder_attn.k_proj.scale_bias")
    return [
        Layout(family, config, "model.encoder.layers.{}", **own, norm="layer", square=True, tower="encoder", **norm),
        Layout(family, config, decoder, **own, norm="layer", square=True, biases=biases, extra=extra, **norm),
        Layout(family, config, decoder, **cross, norm="layer", post=True, square=True, tower="cross"),
    ]


LAYOUTS: dict[str, list[Layout]] = {
    "llama": [
        _llama_like(
            "llama", "qwen3", "self_attn.q_norm.weight", "self_attn.o_proj.bias", "post_attention_layernorm.weight",
            before="input_layernorm.weight", biases={role: f"self_attn.{role}_proj.bias" for role in "qkv"},
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
    "glm": [_llama_like("glm", "glm", before="input_layernorm.weight")],
    "llama4": [_llama_like("llama4", "llama4_text", "feed_forward.router.weight", before="input_layernorm.weight")],
    "nemotron": [
        _llama_like(
            "nemotron", "nemotron", "input_layernorm.bias", norm="layer", before="input_layernorm.weight", offset=1.0
        )
    ],
    "apertus": [
        _llama_like("apertus", "apertus", "feedforward_layernorm.weight", before="attention_layernorm.weight")
    ],
    "afmoe": [
        _llama_like(
            "afmoe", "afmoe", "self_attn.gate_proj.weight", "pre_mlp_layernorm.weight", "post_mlp_layernorm.weight",
            before="input_layernorm.weight", after="post_attention_layernorm.weight",
        )
    ],
    "lfm2": [
        Layout(
            "lfm2", {"model_type": "lfm2", **LLAMA_CONFIG}, "model.layers.{}",
            **{**_LLAMA_NAMES, "o": "self_attn.out_proj.weight"}, before="operator_norm.weight",
            extra=("self_attn.q_layernorm.weight", "ffn_norm.weight", "feed_forward.w1.weight"),
            between=("conv.in_proj.weight", "conv.out_proj.weight", "operator_norm.weight"),
        )
    ],
    "ernie4_5": [_llama_like("ernie4_5", "helium", before="input_layernorm.weight")],
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
            biases={"qkv": "attn.c_attn.bias"},
            extra=("attn.c_proj.bias", "ln_1.bias", "ln_2.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
        )
    ],
    "openai_gpt": [
        Layout(
            "openai_gpt", {"model_type": "openai-gpt", **_GPT_CONFIG}, "h.{}", qkv="attn.c_attn.weight",
            o="attn.c_proj.weight", conv1d=True, norm="layer", post=True, square=True,
            biases={"qkv": "attn.c_attn.bias"}, extra=("attn.c_proj.bias", "ln_1.weight", "ln_1.bias"),
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
    "opt, 350m": [
        Layout(
            "opt", {"model_type": "opt", **_BERT_CONFIG, "do_layer_norm_before": False}, "model.decoder.layers.{}",
            **{**_LLAMA_NAMES, "o": "self_attn.out_proj.weight"}, norm="layer", post=True, square=True,
            extra=("self_attn_layer_norm.weight", "self_attn_layer_norm.bias"),
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
    "gpt_neox": [
        Layout(
            "gpt_neox", {"model_type": "gpt_neox", **_BERT_CONFIG}, "gpt_neox.layers.{}",
            qkv="attention.query_key_value.weight", o="attention.dense.weight", fused="groups", norm="layer",
            before="input_layernorm.weight", square=True, biases={"qkv": "attention.query_key_value.bias"},
            extra=("attention.dense.bias", "post_attention_layernorm.weight", "mlp.dense_h_to_4h.weight"),
        )
    ],
    "bloom": [
        Layout(
            "bloom", {"model_type": "bloom", **_GPT_CONFIG}, "h.{}", qkv="self_attention.query_key_value.weight",
            o="self_attention.dense.weight", fused="groups", norm="layer", before="input_layernorm.weight",
            square=True, biases={"qkv": "self_attention.query_key_value.bias"},
            extra=("self_attention.dense.bias", "post_attention_layernorm.weight", "mlp.dense_h_to_4h.weight"),
        )
    ],
    "falcon": [
        Layout(
            "falcon",
            {
                "model_type": "falcon", "n_head": "heads", "n_head_kv": "kv_heads", "n_layer": "layers",
                "new_decoder_architecture": True,
            },
            "transformer.h.{}", qkv="self_attention.query_key_value.weight", o="self_attention.dense.weight",
            fused="groups", norm="layer", before="ln_attn.weight",
            extra=("ln_attn.bias", "ln_mlp.weight", "mlp.dense_h_to_4h.weight"),
        )
    ],
    "falcon, 7B": [
        Layout(
            "falcon", {"model_type": "RefinedWebModel", "multi_query": True, "n_head": "heads", "n_layer": "layers"},
            "transformer.h.{}", qkv="self_attention.query_key_value.weight", o="self_attention.dense.weight",
            fused="groups", one_kv=True, norm="layer", before="input_layernorm.weight", extra=("input_layernorm.bias",),
        )
    ],
    "persimmon": [
        Layout(
            "persimmon", {"model_type": "persimmon", **_BERT_CONFIG}, "model.layers.{}",
            qkv="self_attn.query_key_value.weight", o="self_attn.dense.weight", fused="groups", norm="layer",
            before="input_layernorm.weight", square=True, biases={"qkv": "self_attn.query_key_value.bias"},
            extra=("self_attn.q_layernorm.weight", "input_layernorm.bias", "mlp.dense_h_to_4h.weight"),
        )
    ],
    "persimmon, Phi-3-small": [
        Layout(
            "persimmon", {"model_type": "phi3small", **LLAMA_CONFIG}, "model.layers.{}",
            qkv="self_attn.query_key_value.weight", o="self_attn.dense.weight", fused="groups", norm="layer",
            before="input_layernorm.weight", biases={"qkv": "self_attn.query_key_value.bias"},
        )
    ],
    "internlm2": [
        Layout(
            "internlm2", {"model_type": "internlm2", **LLAMA_CONFIG}, "model.layers.{}",
            qkv="attention.wqkv.weight", o="attention.wo.weight", fused="groups", before="attention_norm.weight",
            extra=("ffn_norm.weight", "feed_forward.w1.weight"),
        )
    ],
    "baichuan": [
        Layout(
            "baichuan", {"model_type": "baichuan", **_BERT_CONFIG}, "model.layers.{}", qkv="self_attn.W_pack.weight",
            o="self_attn.o_proj.weight", before="input_layernorm.weight", square=True, extra=_LLAMA_MLP,
        )
    ],
    "mpt": [
        Layout(
            "mpt", {"model_type": "mpt", "n_heads": "heads", "n_layers": "layers", "d_model": "hidden"},
            "transformer.blocks.{}", qkv="attn.Wqkv.weight", o="attn.out_proj.weight", norm="layer",
            before="norm_1.weight", square=True, extra=("norm_2.weight", "ffn.up_proj.weight"),
        )
    ],
    "dbrx": [
        Layout(
            "dbrx", {"model_type": "dbrx", "n_heads": "heads", "n_layers": "layers", "d_model": "hidden"},
            "transformer.blocks.{}.norm_attn_norm", qkv="attn.Wqkv.weight", o="attn.out_proj.weight", norm="layer",
            before="norm_1.weight", extra=("norm_2.weight",),
        )
    ],
    "qwen": [
        Layout(
            "qwen", {"model_type": "qwen", **_BERT_CONFIG}, "transformer.h.{}", qkv="attn.c_attn.weight",
            o="attn.c_proj.weight", before="ln_1.weight", square=True, biases={"qkv": "attn.c_attn.bias"},
            extra=("mlp.w1.weight", "mlp.w2.weight", "mlp.c_proj.weight", "ln_2.weight"),
        )
    ],
    "gpt_bigcode": [
        Layout(
            "gpt_bigcode", {"model_type": "gpt_bigcode", "multi_query": True, **_GPT_CONFIG}, "transformer.h.{}",
            qkv="attn.c_attn.weight", o="attn.c_proj.weight", fused="groups", one_kv=True, norm="layer",
            before="ln_1.weight", biases={"qkv": "attn.c_attn.bias"}, extra=("attn.c_proj.bias", "ln_1.bias"),
        )
    ],
    "gpt_bigcode, many keys": [
        Layout(
            "gpt_bigcode", {"model_type": "gpt_bigcode", "multi_query": False, **_GPT_CONFIG}, "transformer.h.{}",
            qkv="attn.c_attn.weight", o="attn.c_proj.weight", fused="groups", norm="layer", before="ln_1.weight",
            square=True, biases={"qkv": "attn.c_attn.bias"},
        )
    ],
    "chatglm": [
        Layout(
            "chatglm",
            {
                "model_type": "chatglm", "num_attention_heads": "heads", "num_layers": "layers",
                "multi_query_attention": True, "multi_query_group_num": "kv_heads", "kv_channels": "head_dim",
            },
            "transformer.encoder.layers.{}", qkv="self_attention.query_key_value.weight",
            o="self_attention.dense.weight", before="input_layernorm.weight",
            biases={"qkv": "self_attention.query_key_value.bias"}, extra=("post_attention_layernorm.weight",),
        )
    ],
    "chatglm, one key per head": [
        Layout(
            "chatglm", {"model_type": "chatglm", "num_attention_heads": "heads", "multi_query_attention": False},
            "transformer.encoder.layers.{}", qkv="self_attention.query_key_value.weight",
            o="self_attention.dense.weight", fused="groups", before="input_layernorm.weight", square=True,
            biases={"qkv": "self_attention.query_key_value.bias"},
        )
    ],
    "codegen": [
        Layout(
            "codegen", {"model_type": "codegen", **_GPT_CONFIG}, "transformer.h.{}", qkv="attn.qkv_proj.weight",
            o="attn.out_proj.weight", fused="codegen", norm="layer", before="ln_1.weight", square=True,
            extra=("ln_1.bias", "mlp.fc_in.weight"),
        )
    ],
    "mixformer": [
        Layout(
            "mixformer", {"model_type": "mixformer-sequential", **_GPT_CONFIG}, "layers.{}",
            qkv="mixer.Wqkv.weight", o="mixer.out_proj.weight", norm="layer", before="ln.weight", square=True,
            biases={"qkv": "mixer.Wqkv.bias"}, extra=("mixer.out_proj.bias", "ln.bias", "mlp.fc1.weight"),
        )
    ],
    "molmo": [
        Layout(
            "molmo", {"model_type": "molmo", **LLAMA_CONFIG}, "model.transformer.blocks.{}", qkv="att_proj.weight",
            o="attn_out.weight", before="attn_norm.weight", biases={"qkv": "att_proj.bias"},
            extra=("ff_norm.weight", "ff_proj.weight", "ff_out.weight", "q_norm.weight"),
        )
    ],
    "molmo, norm behind attention": [
        Layout(
            "molmo", {"model_type": "molmo", **LLAMA_CONFIG, "norm_after": True}, "model.transformer.blocks.{}",
            qkv="att_proj.weight", o="attn_out.weight", after="attn_norm.weight", post=True,
        )
    ],
    "hf_olmo": [
        Layout(
            "hf_olmo", {"model_type": "hf_olmo", "n_heads": "heads", "n_layers": "layers", "d_model": "hidden"},
            "model.transformer.blocks.{}", qkv="att_proj.weight", o="attn_out.weight", norm="layer",
            extra=("ff_proj.weight", "ff_out.weight"),
        )
    ],
    "modernbert": [
        Layout(
            "modernbert", {"model_type": "modernbert", **_BERT_CONFIG}, "model.layers.{}", qkv="attn.Wqkv.weight",
            o="attn.Wo.weight", norm="layer", before="attn_norm.weight", square=True, tower="encoder",
            extra=("mlp_norm.weight", "mlp.Wi.weight", "mlp.Wo.weight"),
        )
    ],
    "qwen3_next": [
        Layout(
            "qwen3_next", {"model_type": "qwen3_next", **LLAMA_CONFIG, "head_dim": "head_dim"}, "model.layers.{}",
            **_LLAMA_NAMES, gated=True, before="input_layernorm.weight", offset=1.0,
            extra=("self_attn.q_norm.weight", "mlp.experts.0.up_proj.weight"),
            between=(
                "linear_attn.A_log", "linear_attn.in_proj_qkvz.weight", "linear_attn.out_proj.weight",
                "input_layernorm.weight",
            ),
        )
    ],
    "gemma4": [
        Layout(
            "gemma4", {"model_type": "gemma4", **LLAMA_CONFIG}, "model.language_model.layers.{}", **_LLAMA_NAMES,
            before="input_layernorm.weight", after="post_attention_layernorm.weight",
            extra=("layer_scalar", "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"),
        )
    ],
    "deepseek": [
        Layout(
            "deepseek", {"model_type": "deepseek_v3", **LLAMA_CONFIG}, "model.layers.{}",
            factors={
                "q_a": "self_attn.q_a_proj.weight", "q_b": "self_attn.q_b_proj.weight", **_LATENT_KV,
                "o": "self_attn.o_proj.weight",
            },
            before="input_layernorm.weight",
            latent=_LATENT_NORMS, extra=("self_attn.indexer.wk.weight",),
        )
    ],
    "deepseek, V2-Lite": [
        Layout(
            "deepseek", {"model_type": "deepseek_v2", **LLAMA_CONFIG}, "model.layers.{}",
            factors={"q": "self_attn.q_proj.weight", **_LATENT_KV, "o": "self_attn.o_proj.weight"},
            before="input_layernorm.weight", latent={"kv_b": _LATENT_NORMS["kv_b"]},
        )
    ],
    "deepseek_v4": [
        Layout(
            "deepseek_v4", {"model_type": "deepseek_v4", "num_attention_heads": "heads"}, "layers.{}",
            factors={role: f"attn.w{role}.weight" for role in ("q_a", "q_b", "kv", "o_a", "o_b")},
            before="attn_norm.weight", extra=("attn.q_norm.weight", "ffn_norm.weight"),
        )
    ],
    "zamba": [
        Layout(
            "zamba", {"model_type": "zamba2", **LLAMA_CONFIG}, "model.layers.{}.shared_transformer", **_LLAMA_NAMES,
            doubled=True, before="input_layernorm.weight",
            extra=("pre_ff_layernorm.weight", "feed_forward.gate_up_proj.weight"),
        )
    ],
    "mbart": _bart_like("mbart", "whisper", before="self_attn_layer_norm.weight"),
    "bart": _bart_like("bart", "marian", post=True),
    "albert": [
        Layout(
            "albert", {"model_type": "albert", **_BERT_CONFIG},
            "albert.encoder.albert_layer_groups.{}.albert_layers.0", q="attention.query.weight",
            k="attention.key.weight", v="attention.value.weight", o="attention.dense.weight", norm="layer", post=True,
            square=True, tower="encoder", extra=("attention.LayerNorm.weight", "ffn.weight"),
        )
    ],
    "deberta_v2": [
        Layout(
            "deberta_v2", {"model_type": "deberta-v2", **_BERT_CONFIG}, "deberta.encoder.layer.{}",
            q="attention.self.query_proj.weight", k="attention.self.key_proj.weight",
            v="attention.self.value_proj.weight", o="attention.output.dense.weight", norm="layer", post=True,
            square=True, tower="encoder", biases={role: f"attention.self.{long}_proj.bias" for role, long in _QKV},
            extra=("attention.output.LayerNorm.weight",),
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


def _vision(family: str, model_type: str | None, block: str, names: Mapping[str, str], **rest: Any) -> list[Layout]:
    stated = {} if model_type is None else {"model_type": model_type}
    config = {**stated, "num_heads" if "qkv" in names else "num_attention_heads": "heads", "depth": "layers"}
    return [Layout(family, config, block, **names, square=True, tower="vision", **rest)]


_VIT_NAMES = {"qkv": "attn.qkv.weight", "o": "attn.proj.weight"}
_CLIP_NAMES = {role: f"self_attn.{'out' if role == 'o' else role}_proj.weight" for role in "qkvo"}
_NORM1 = {"norm": "layer", "before": "norm1.weight"}
_INTERN = "vision_model.encoder.layers.{}"

VISION_LAYOUTS: dict[str, list[Layout]] = {
    "siglip": _vision(
        "vision_siglip", "siglip_vision_model", "vision_tower.vision_model.encoder.layers.{}", _CLIP_NAMES,
        norm="layer", before="layer_norm1.weight", biases={role: f"self_attn.{role}_proj.bias" for role in "qkv"},
        extra=("layer_norm2.weight", "mlp.fc1.weight"),
    ),
    "pixtral": _vision(
        "vision_pixtral", "pixtral", "vision_tower.transformer.layers.{}",
        {role: f"attention.{role}_proj.weight" for role in "qkvo"}, before="attention_norm.weight",
        extra=("ffn_norm.weight", "feed_forward.up_proj.weight"),
    ),
    "mllama": _vision(
        "vision_mllama", "mllama_vision_model", "vision_model.transformer.layers.{}",
        {role: f"self_attn.{role}_proj.weight" for role in "qkvo"}, norm="layer", before="input_layernorm.weight",
    ),
    "qwen2_vl": _vision(
        "vision_qwen2_vl", "qwen2_vl", "visual.blocks.{}", _VIT_NAMES, biases={"qkv": "attn.qkv.bias"}, **_NORM1
    ),
    "qwen2_5_vl": _vision(
        "vision_qwen2_5_vl", "qwen2_5_vl", "model.visual.blocks.{}", _VIT_NAMES, before="norm1.weight"
    ),
    "internvit": _vision("vision_internvit", "intern_vit_6b", _INTERN, _VIT_NAMES, **_NORM1, extra=("norm2.weight",)),
    "internvit, 6B": _vision(
        "vision_internvit_6b", None, _INTERN, _VIT_NAMES, before="norm1.weight", extra=("attn.q_norm.weight",)
    ),
    "sam": _vision("vision_sam", "sam", "model.sam_model.blocks.{}", _VIT_NAMES, **_NORM1, extra=("attn.rel_pos_h",)),
}  # fmt: skip
"""Vision towers, whose part of config.json is its vision_config."""


@dataclass
class Model:
    """A checkpoint's content and, beside it, what each projection is: the W [out, in] that was drawn for it.

    By (tower, layer, role): `effective` weights as rows along the residual stream, or along a latent, and `profiles`,
    log RMS of each of its coordinates, where it is read or written; `head_sizes` where heads are known, and as many
    `vectors` as there are biases and gains.
    """

    tensors: dict[str, NDArray[Any] | Stored] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    weights: dict[tuple[str, int, str], NDArray[np.float64]] = field(default_factory=dict)
    effective: dict[tuple[str, int, str], NDArray[np.float64]] = field(default_factory=dict)
    profiles: dict[tuple[str, int, str], NDArray[np.float64]] = field(default_factory=dict)
    head_sizes: dict[tuple[str, int, str], int] = field(default_factory=dict)
    vectors: dict[tuple[str, int, str], NDArray[np.float64]] = field(default_factory=dict)
    heads: int = 0
    kv_heads: int | None = 0
    head_dim: int = 0
    hidden: int = 0

    def write(self, folder: Path, *, config: bool = True, shards: int = 1) -> Path:
        return write_model(folder, self.tensors, self.config if config else None, shards=shards)


SPREAD = {"q": 0.5, "k": 1.0, "v": 2.0, "o": 4.0}
"""The σ each role is drawn with: a wrong split or a swapped role shows."""
SPREAD |= {"q_a": 0.25, "q_b": 8.0, "kv_a": 3.0, "kv_b": 6.0, "kv": 1.5, "o_a": 2.5, "o_b": 5.0}


def build(
    case: str,
    layouts: list[Layout] | None = None,
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    hidden: int = 24,
    seed: int = 0,
) -> Model:
    """A model of that family, or of these layouts, with every role at its own σ and mean, in its true layout."""
    rng = np.random.default_rng(seed)
    model = Model(tensors={"lm_head.weight": _noise(rng, 16, hidden)})
    for layout in layouts or LAYOUTS[case]:
        if layout.square:
            kv_heads, hidden = heads, heads * head_dim
        if layout.one_kv:
            kv_heads = 1
        model.heads, model.kv_heads, model.head_dim, model.hidden = heads, kv_heads, head_dim, hidden
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "layers": layers, "hidden": hidden}
        if layout.config is not None:
            model.config = {
                key: sizes.get(value, value) if isinstance(value, str) else value
                for key, value in layout.config.items()
            }
        for layer in range(layers):
            _add_layer(model, layout, layer, kv_heads, rng)
        for suffix in layout.between:
            model.tensors[f"{layout.block.format(layers)}.{suffix}"] = _noise(rng, hidden)
        if layout.factors:
            model.kv_heads, model.head_dim = None, _latent_shapes(layout, heads, head_dim, hidden)[1]["q_b"]
    return model


def _add_layer(model: Model, layout: Layout, layer: int, kv_heads: int, rng: np.random.Generator) -> None:
    q_size, kv_size = model.heads * model.head_dim, kv_heads * model.head_dim
    inputs = model.hidden * (2 if layout.doubled else 1)
    shapes = {"q": (q_size, inputs), "k": (kv_size, inputs), "v": (kv_size, inputs)}
    shapes["o"] = (model.hidden, q_size)
    head_sizes = dict.fromkeys("qkvo", model.head_dim)
    if layout.factors:
        shapes, head_sizes = _latent_shapes(layout, model.heads, model.head_dim, model.hidden)
    drawn: dict[str, NDArray[np.float32]] = {}
    for role, shape in shapes.items():
        sigma = SPREAD[role] * (1 + 0.1 * layer)
        drawn[role] = rng.normal(0.3 * sigma, sigma, shape).astype(np.float32)
    block = layout.block.format(layer)
    gains = {}
    for part, vector in (("before", "norm"), ("after", "post_norm")):
        if suffix := getattr(layout, part):
            gains[part] = rng.uniform(0.5, 2.0, inputs if part == "before" else model.hidden).astype(np.float32)
            model.tensors[f"{block}.{suffix}"] = gains[part] - np.float32(layout.offset)
            model.vectors[layout.tower, layer, vector] = gains[part].astype(np.float64)
    for role, suffix in layout.latent.items():
        gains[role] = rng.uniform(0.5, 2.0, drawn[role].shape[1]).astype(np.float32)
        model.tensors[f"{block}.{suffix}"] = gains[role]
        model.vectors[layout.tower, layer, f"{role.removesuffix('_b')}_latent_norm"] = gains[role].astype(np.float64)
    for role, weights in drawn.items():
        key = layout.tower, layer, role
        model.weights[key] = weights.astype(np.float64)
        if role in layout.latent:
            model.effective[key] = model.weights[key] * gains[role].astype(np.float64)
        if role not in ("q_b", "kv_b", "o_a"):
            model.effective[key] = along_residual(model.weights[key], role, layout, gains)
            model.profiles[key] = 0.5 * np.log(np.square(model.effective[key]).mean(axis=0))
        if role in head_sizes:
            model.head_sizes[key] = head_sizes[role]
    if layout.qkv:
        fused = fuse(drawn, layout, model.heads, kv_heads)
        model.tensors[f"{block}.{layout.qkv}"] = fused.T if layout.conv1d else fused
    for role, suffix in {**{role: getattr(layout, role) for role in "qkvo"}, **layout.factors}.items():
        if suffix:
            model.tensors[f"{block}.{suffix}"] = drawn[role].T if layout.conv1d else drawn[role]
    if layout.gated:
        by_head = drawn["q"].reshape(model.heads, model.head_dim, model.hidden)
        gated = np.concatenate([by_head, _noise(rng, *by_head.shape)], axis=1)
        model.tensors[f"{block}.{layout.q}"] = gated.reshape(-1, model.hidden)
    _add_biases(model, layout, layer, kv_heads, rng)
    for suffix in layout.extra:
        one_dimensional = "norm" in suffix.lower() or "ln_" in suffix or suffix.endswith("bias")
        shape = (model.hidden,) if one_dimensional else (8, model.hidden)
        model.tensors[f"{block}.{suffix}"] = _noise(rng, *shape)


def _add_biases(model: Model, layout: Layout, layer: int, kv_heads: int, rng: np.random.Generator) -> None:
    roles = "qkv" if "qkv" in layout.biases else "".join(layout.biases)
    drawn = {}
    for role in roles:
        size = (model.heads if role == "q" else kv_heads) * model.head_dim
        drawn[role] = rng.normal(SPREAD[role], 10 * SPREAD[role], (size, 1)).astype(np.float32)
        model.vectors[layout.tower, layer, f"{role}_bias"] = drawn[role].astype(np.float64)
    for role, suffix in layout.biases.items():
        stored_bias = fuse(drawn, layout, model.heads, kv_heads) if role == "qkv" else drawn[role]
        model.tensors[f"{layout.block.format(layer)}.{suffix}"] = stored_bias.reshape(-1)


def fuse(drawn: Mapping[str, NDArray[np.float32]], layout: Layout, heads: int, kv_heads: int) -> NDArray[np.float32]:
    """Q, K and V [out, in] as one tensor, as the models' own code takes it apart."""
    q, k, v = drawn["q"], drawn["k"], drawn["v"]
    if layout.fused == "concat":
        return np.concatenate([q, k, v])
    if layout.fused == "codegen":
        return np.concatenate([each.reshape(4, -1, q.shape[1]) for each in (q, v, k)], axis=1).reshape(-1, q.shape[1])
    by_group = [each.reshape(kv_heads, -1, len(q) // heads, q.shape[1]) for each in (q, k, v)]
    return np.concatenate(by_group, axis=1).reshape(-1, q.shape[1])


def _latent_shapes(
    layout: Layout, heads: int, head_dim: int, hidden: int
) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """Shapes of latent attention's factors, and the sizes of a head where there are heads; every size is another."""
    nope, rope, value, q_rank, kv_rank, o_rank = head_dim, head_dim // 2, head_dim // 2 + 1, 10, 14, 6
    if "kv" in layout.factors:
        shapes = {
            "q_a": (q_rank, hidden), "q_b": (heads * head_dim, q_rank), "kv": (head_dim, hidden),
            "o_a": (heads * o_rank, head_dim), "o_b": (hidden, heads * o_rank),
        }  # fmt: skip
        return shapes, {"q_b": head_dim}
    query = (heads * (nope + rope), q_rank if "q_a" in layout.factors else hidden)
    shapes = {
        "q": query, "q_a": (q_rank, hidden), "q_b": query, "kv_a": (kv_rank + rope, hidden),
        "kv_b": (heads * (nope + value), kv_rank), "o": (hidden, heads * value),
    }  # fmt: skip
    sizes = {"q": nope + rope, "q_b": nope + rope, "kv_b": nope + value, "o": value}
    return {role: shapes[role] for role in layout.factors}, sizes


def along_residual(
    weights: NDArray[np.float64], role: str, layout: Layout, gains: Mapping[str, NDArray[np.float32]]
) -> NDArray[np.float64]:
    """Rows along the residual stream of Ŵ = W·diag(g)·J, Ô = J·diag(g_post)·O (EVIDENCE.md, reads and writes): Ŵ or Ôᵀ.

    J removes the mean over the residual coordinates, where the norm that reads them is a LayerNorm.
    """
    writes = role in ("o", "o_b")
    rows = weights.T if writes else weights
    gain = gains.get("after" if writes else "before")
    if gain is not None:
        rows = rows * gain.astype(np.float64)
    if layout.norm == "layer" and not (layout.post and not writes):
        rows = rows - rows.mean(axis=1, keepdims=True)
    return rows


def _noise(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """What no statistic may touch: so large that a single element would show."""
    return rng.normal(1e6, 1e6, shape).astype(np.float32)
