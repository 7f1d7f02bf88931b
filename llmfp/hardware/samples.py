"""What is measured on: random weights in every dtype, and a checkpoint made of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 8 << 20
"""The bytes that buffers and files repeat: as many as the engine hands out at a time."""
COLS = 4096
_HIDDEN, _KEYS = 4096, 1024
_LAYER_BYTES = 2 * _HIDDEN * (2 * _HIDDEN + 2 * _KEYS)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16, ties to even. Finite values only."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def stored_type(dtype: str) -> np.dtype[Any]:
    """The NumPy type that holds the stored bits."""
    return np.dtype({"BF16": "u2", "F16": "f2", "F32": "f4", "F64": "f8"}.get(dtype, "u1"))


def encode(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Values as they are stored; 8-bit floats are truncated, which is as random."""
    if dtype == "BF16":
        return to_bfloat16(values)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (values.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8)
    if dtype == "F8_E4M3":  # half the exponent bits of a float16: scaled by 2^-8, its bits are those of e4m3 and a tail
        bits = (values * np.float32(2.0**-8)).astype(np.float16).view(np.uint16)
        return ((bits >> 8 & 0x80) | (bits >> 7 & 0x7F)).astype(np.uint8)
    return values.astype(stored_type(dtype))


def block(dtype: str) -> NDArray[Any]:
    """BLOCK_BYTES of normal weights."""
    itemsize = stored_type(dtype).itemsize
    scale = 0.02 if itemsize > 1 else 1.0  # 8-bit weights are stored scaled up, to stay clear of the subnormals
    values = np.random.default_rng(0).standard_normal(BLOCK_BYTES // itemsize) * scale
    return encode(values.astype(np.float32), dtype)


def write_checkpoint(folder: Path, nbytes: int) -> Path:
    """A checkpoint of Llama's names and shapes, with about so many bytes of bfloat16 that repeat one block.

    At least one layer. Raises OSError."""
    layers = max(1, nbytes // _LAYER_BYTES)
    header: dict[str, Any] = {}
    end = 0
    for layer in range(layers):
        for role, rows in (("q", _HIDDEN), ("k", _KEYS), ("v", _KEYS), ("o", _HIDDEN)):
            size = 2 * rows * _HIDDEN
            name = f"model.layers.{layer}.self_attn.{role}_proj.weight"
            header[name] = {"dtype": "BF16", "shape": [rows, _HIDDEN], "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 4096)  # so that weights begin on a page
    content = block("BF16").tobytes()
    config = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _ in range(end // len(content)):
            out.write(content)
    return file
