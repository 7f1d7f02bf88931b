"""Models as quantisers store them: rounded to nearest (GPTQ by its own algorithm), laid out as their files are.

A format turns a matrix W [out, in] into the tensors of its module and the W they stand for. All projections of
attention and MLP are quantised, everything else stays float32. llmfp must read the attention back to exactly that W
(tests/test_lineage.py), and its loss is measured on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.lineage.models import Model
from llmfp.kernels.codes import E2M1, fp8_table
from tests.checkpoints import Stored, write_model
from tests.packing import FP4, NF4, nibbles, packed, packed_awq, planes, text, words

Matrix = NDArray[np.float64]
Fields = dict[str, NDArray[Any] | Stored]
Encoded = tuple[Fields, Matrix]
GROUP = 32


@dataclass(frozen=True, slots=True)
class Format:
    """encode takes W and E[x·xᵀ] of what it reads, which only GPTQ looks at."""

    encode: Callable[[Matrix, Matrix], Encoded]
    config: Mapping[str, Any] = field(default_factory=dict)


def write(model: Model, name: str, folder: Path, moments: Mapping[str, Tensor]) -> Model:
    """The checkpoint in that format, and the model that it stands for. moments: as train.second_moments gives them."""
    dense = {key: tensor.to(torch.float64).numpy() for key, tensor in model.weights.items()}
    if name in GGUF:
        return _gguf(model, dense, name, folder)
    chosen, tensors = FORMATS[name], dict[str, NDArray[Any] | Stored]()
    decoded = dict(model.weights)
    for key, weight in dense.items():
        module = key.removesuffix(".weight")
        if not quantised(key):
            tensors[key] = weight.astype(np.float32)
            continue
        fields, stands_for = chosen.encode(weight, moments[read_by(module)].numpy())
        tensors |= {f"{module}.{each}": tensor for each, tensor in fields.items()}
        decoded[key] = torch.from_numpy(np.ascontiguousarray(stands_for)).float()
    write_model(folder, tensors, {**model.config, **chosen.config})
    return Model(dict(model.config), decoded)


def read_by(module: str) -> str:
    """Where a module's input is observed: Q, K and V read the same, and so do gate and up."""
    return module if module.endswith(("o_proj", "down_proj")) else module.rpartition(".")[0]


def quantised(name: str) -> bool:
    return name.endswith("_proj.weight")


def half(weight: Matrix, _moments: Matrix) -> Encoded:
    rounded = weight.astype(np.float16)
    return {"weight": rounded}, rounded.astype(np.float64)


def fp8(weight: Matrix, _moments: Matrix, *, kind: str) -> Encoded:
    block = {"tensor": weight.shape, "row": (1, weight.shape[1]), "block": (128, 128)}[kind]
    tall, wide = (-(-size // side) for size, side in zip(weight.shape, block, strict=True))
    padded = np.zeros((tall * block[0], wide * block[1]))
    padded[: weight.shape[0], : weight.shape[1]] = weight
    largest = np.abs(padded.reshape(tall, block[0], wide, block[1])).max(axis=(1, 3))
    scale = (largest / 448).astype(np.float32)
    full = np.kron(scale.astype(np.float64), np.ones(block))[: weight.shape[0], : weight.shape[1]]
    codes = _nearest(weight / full, fp8_table("F8_E4M3"))
    stored = scale.reshape(()) if kind == "tensor" else scale
    name = "weight_scale_inv" if kind == "block" else "weight_scale"
    return {"weight": Stored("F8_E4M3", codes.shape, codes.tobytes()), name: stored}, fp8_table("F8_E4M3")[codes] * full


def int8(weight: Matrix, _moments: Matrix) -> Encoded:
    scale = (np.abs(weight).max(axis=1, keepdims=True) / 127).astype(np.float32)
    codes = np.rint(weight / scale).clip(-127, 127)
    return {"weight": codes.astype(np.int8), "weight_scale": scale}, codes * scale.astype(np.float64)


def bitsandbytes_int8(weight: Matrix, _moments: Matrix) -> Encoded:
    scale = np.abs(weight).max(axis=1).astype(np.float32)
    codes = np.rint(weight * 127 / scale[:, None]).clip(-127, 127)
    fields: Fields = {"weight": codes.astype(np.int8), "SCB": scale, "weight_format": np.zeros((), np.uint8)}
    return fields, codes * scale.astype(np.float64)[:, None] / 127


def bitsandbytes_4bit(weight: Matrix, _moments: Matrix, *, kind: str, block: int = 64) -> Encoded:
    table = NF4 if kind == "nf4" else FP4
    blocks = weight.reshape(-1, block)
    absmax = np.abs(blocks).max(axis=1).astype(np.float32)
    codes = _nearest(blocks / absmax.astype(np.float64)[:, None], table.astype(np.float64))
    said = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    flat = codes.reshape(-1)
    fields: Fields = {
        "weight": (flat[0::2] << 4 | flat[1::2]).astype(np.uint8)[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": table,
        f"weight.quant_state.bitsandbytes__{kind}": text(json.dumps(said)),
    }
    return fields, (table.astype(np.float64)[codes] * absmax.astype(np.float64)[:, None]).reshape(weight.shape)


def gptq(weight: Matrix, moments: Matrix, *, bits: int) -> Encoded:
    """Column after column in index order, each one's error made up for by those still to come (Frantar et al. 2022)."""
    rows, cols = weight.shape
    damped = moments + 0.01 * np.trace(moments) / cols * np.eye(cols)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, codes = weight.copy(), np.zeros((cols, rows), np.int64)
    scales, zeros = np.zeros((cols // GROUP, rows), np.float16), np.zeros((cols // GROUP, rows), np.int64)
    decoded = np.zeros_like(weight)
    for column in range(cols):
        group = column // GROUP
        if column % GROUP == 0:
            scale, zero = _affine(left[:, column : column + GROUP], bits, least_zero=1)
            scales[group], zeros[group] = scale[:, 0], zero[:, 0]
        scale, zero = scales[group].astype(np.float64), zeros[group]
        codes[column] = np.rint(left[:, column] / scale + zero).clip(0, (1 << bits) - 1)
        decoded[:, column] = (codes[column] - zero) * scale
        error = (left[:, column] - decoded[:, column]) / upper[column, column]
        left[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])
    fields: Fields = {
        "qweight": packed(codes, bits),
        "qzeros": np.ascontiguousarray(packed((zeros - 1).T, bits).T),
        "scales": scales,
        "g_idx": np.arange(cols, dtype=np.int32) // GROUP,
    }
    return fields, decoded


def awq(weight: Matrix, _moments: Matrix) -> Encoded:
    """The layout; AWQ's own scaling of channels is a rewrite, not a rounding."""
    codes, scale, zero, decoded = _by_group(weight, 4)
    fields: Fields = {"qweight": packed_awq(codes.T), "qzeros": packed_awq(zero.T), "scales": scale.T.copy()}
    return fields, decoded


def compressed(weight: Matrix, _moments: Matrix, *, bits: int) -> Encoded:
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = (np.abs(groups).max(axis=2) / ((1 << bits - 1) - 0.5)).astype(np.float32)
    wide = scale.astype(np.float64)[..., None]
    codes = np.rint(groups / wide).clip(-(1 << bits - 1), (1 << bits - 1) - 1)
    shifted = (codes + (1 << bits - 1)).astype(np.int64).reshape(weight.shape)
    fields: Fields = {
        "weight_packed": words(shifted, bits).view(np.int32),
        "weight_scale": scale,
        "weight_shape": np.array(weight.shape, np.int64),
    }
    return fields, (codes * wide).reshape(weight.shape)


def mxfp4(weight: Matrix, _moments: Matrix) -> Encoded:
    groups = weight.reshape(len(weight), -1, 32)
    exponent = np.floor(np.log2(np.abs(groups).max(axis=2))) - 2
    factor = 2.0 ** exponent[..., None]
    codes = _nearest(groups / factor, np.array(E2M1))
    fields: Fields = {
        "weight_packed": nibbles(codes.reshape(weight.shape).astype(np.int64)),
        "weight_scale": (exponent + 127).astype(np.uint8),
    }
    return fields, (np.array(E2M1)[codes] * factor).reshape(weight.shape)


def nvfp4(weight: Matrix, _moments: Matrix) -> Encoded:
    table = fp8_table("F8_E4M3")
    groups = weight.reshape(len(weight), -1, 16)
    largest = np.abs(groups).max(axis=2)
    whole = np.array([448 * 6 / largest.max()], np.float32)
    scale = _nearest(largest / 6 * float(whole[0]), table)
    factor = (table[scale] / float(whole[0]))[..., None]
    codes = _nearest(groups / np.maximum(factor, 1e-30), np.array(E2M1))
    fields: Fields = {
        "weight_packed": nibbles(codes.reshape(weight.shape).astype(np.int64)),
        "weight_scale": Stored("F8_E4M3", scale.shape, scale.tobytes()),
        "weight_global_scale": whole,
    }
    return fields, (np.array(E2M1)[codes] * factor).reshape(weight.shape)


def mlx(weight: Matrix, _moments: Matrix, *, bits: int) -> Encoded:
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.min(axis=2), groups.max(axis=2)
    scale, bias = ((high - low) / ((1 << bits) - 1)).astype(np.float32), low.astype(np.float32)
    wide, shift = scale.astype(np.float64)[..., None], bias.astype(np.float64)[..., None]
    codes = np.rint((groups - shift) / wide).clip(0, (1 << bits) - 1)
    fields: Fields = {
        "weight": words(codes.astype(np.int64).reshape(weight.shape), bits), "scales": scale, "biases": bias
    }  # fmt: skip
    return fields, (codes * wide + shift).reshape(weight.shape)


def hqq(weight: Matrix, _moments: Matrix, *, bits: int) -> Encoded:
    codes, scale, zero, decoded = _by_group(weight, bits)
    number = {"nbits": bits, "axis": 1, "group_size": GROUP}
    flags = {"view_as_float": 0, "quant_zero": 0, "quant_scale": 0, "encoded_state_dict": 1}
    fields: Fields = {
        "W_q": planes(codes.reshape(-1, GROUP), bits),
        "scale": scale.reshape(-1, 1),
        "zero": zero.reshape(-1, 1).astype(np.float16),
        "shape": np.array(weight.shape, np.int64),
        "packing": text(f"{bits}bit_u8"),
        "compute_dtype": text("torch.float16"),
        **{key: np.array(value, np.int32) for key, value in number.items()},
        **{key: np.array(value, np.uint8) for key, value in flags.items()},
    }
    return fields, decoded


def _by_group(weight: Matrix, bits: int) -> tuple[NDArray[np.int64], NDArray[np.float16], NDArray[np.int64], Matrix]:
    """Codes [out, in], scales and zeros [out, in / GROUP], and (code - zero) · scale."""
    groups = weight.reshape(-1, GROUP)
    scale, zero = _affine(groups, bits)
    codes = np.rint(groups / scale.astype(np.float64) + zero).clip(0, (1 << bits) - 1).astype(np.int64)
    decoded = (codes - zero) * scale.astype(np.float64)
    per_row = (len(weight), -1)
    return codes.reshape(weight.shape), scale.reshape(per_row), zero.reshape(per_row), decoded.reshape(weight.shape)


def _affine(groups: Matrix, bits: int, least_zero: int = 0) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Scale and zero [n, 1] so that codes of so many bits reach from each row's least value to its largest."""
    low, high = np.minimum(groups.min(axis=1, keepdims=True), 0), np.maximum(groups.max(axis=1, keepdims=True), 0)
    levels = (1 << bits) - 1
    scale = ((high - low) / levels).astype(np.float16)
    zero = np.rint(-low / scale.astype(np.float64)).clip(least_zero, levels).astype(np.int64)
    return scale, zero


def _nearest(values: Matrix, table: Matrix) -> NDArray[np.uint8]:
    """Index of the closest entry; NaN in the table is never chosen."""
    usable = np.flatnonzero(~np.isnan(table))
    order = usable[np.argsort(table[usable], kind="stable")]
    middles = (table[order][1:] + table[order][:-1]) / 2
    return order[np.searchsorted(middles, values)].astype(np.uint8)


def _stated(method: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **more}}


def _compressed_stated(bits: int) -> dict[str, Any]:
    groups = {"group_0": {"weights": {"num_bits": bits, "group_size": GROUP}, "targets": ["Linear"]}}
    return _stated("compressed-tensors", config_groups=groups)


FORMATS: dict[str, Format] = {
    "fp16": Format(half),
    "fp8 per tensor": Format(partial(fp8, kind="tensor"), _stated("compressed-tensors")),
    "fp8 per row": Format(partial(fp8, kind="row"), _stated("compressed-tensors")),
    "fp8 by blocks": Format(partial(fp8, kind="block"), _stated("fp8", weight_block_size=[128, 128])),
    "int8": Format(int8, _stated("compressed-tensors", config_groups={"group_0": {"weights": {"num_bits": 8}}})),
    "bitsandbytes int8": Format(bitsandbytes_int8),
    "bitsandbytes nf4": Format(partial(bitsandbytes_4bit, kind="nf4")),
    "bitsandbytes fp4": Format(partial(bitsandbytes_4bit, kind="fp4")),
    **{
        f"GPTQ {bits} bits": Format(partial(gptq, bits=bits), _stated("gptq", bits=bits, group_size=GROUP))
        for bits in (2, 3, 4)
    },
    "AWQ 4 bits": Format(awq, _stated("awq", bits=4, group_size=GROUP)),
    "compressed-tensors 4 bits": Format(partial(compressed, bits=4), _compressed_stated(4)),
    "MXFP4": Format(mxfp4),
    "NVFP4": Format(nvfp4),
    "MLX 4 bits": Format(partial(mlx, bits=4), {"quantization": {"bits": 4, "group_size": GROUP}}),
    "HQQ 2 bits": Format(partial(hqq, bits=2)),
}  # fmt: skip
GGUF = {f"GGUF {kind}": kind for kind in ("Q8_0", "Q4_0", "Q5_1", "MXFP4")}
_GGUF_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def _gguf(model: Model, dense: dict[str, Matrix], name: str, folder: Path) -> Model:
    """llama.cpp's: rows of Q and K with the two of each rotary pair side by side."""
    kind = gguf.GGMLQuantizationType[GGUF[name]]
    config, decoded = model.config, dict(model.weights)
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(model.head_dim)
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for key, weight in dense.items():
        module = key.removesuffix(".weight")
        if module in outer:
            theirs = f"{outer[module]}.weight"
        else:
            layer, module = module.removeprefix("model.layers.").split(".", 1)
            theirs = f"blk.{layer}.{_GGUF_NAMES[module]}.weight"
        if not quantised(key):
            writer.add_tensor(theirs, weight.astype(np.float32))
            continue
        turned = key.endswith(("q_proj.weight", "k_proj.weight"))
        rows = _sides(weight, model.head_dim, to=-1) if turned else weight
        content = gguf.quants.quantize(rows.astype(np.float32), kind)
        writer.add_tensor(theirs, content, raw_dtype=kind)
        back = gguf.quants.dequantize(content, kind).astype(np.float64)
        back = _sides(back, model.head_dim, to=1) if turned else back
        decoded[key] = torch.from_numpy(np.ascontiguousarray(back)).float()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Model(dict(config), decoded)


def _sides(rows: Matrix, head_dim: int, *, to: int) -> Matrix:
    """Rows of each head from halves to pairs (to = -1), or back (to = 1)."""
    shape = (-1, 2, head_dim // 2) if to == -1 else (-1, head_dim // 2, 2)
    turned: Matrix = rows.reshape(*shape, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
    return turned
