"""Checkpoints to measure on: the layout and names of Llama-3.1-8B, random attention weights, holes for the rest.

Attention projections and norm gains are random normal bfloat16 from a fixed seed. MLP, embedding and head are holes
of sparse files: they take their place between the attention tensors, as in a real model, but no room on disk. What
every reader must find (std and mean in float64, the sum of all 64-bit words) is computed while writing.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmfp.hardware.samples import to_bfloat16

VERSION = 1
"""Goes into the directory's name: raise it when what is written changes."""
ALIGNMENT = 8
MANIFEST = "bench.json"


@dataclass(frozen=True, slots=True)
class LlamaShape:
    layers: int
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 14336
    vocabulary: int = 128256
    layers_per_shard: int = 8

    @property
    def name(self) -> str:
        return f"llama-{self.hidden}x{self.layers}-v{VERSION}"

    def tensors(self) -> list[dict[str, tuple[int, ...]]]:
        """Names and shapes of each shard, in the order in which the Hub's files hold them."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            "input_layernorm": (self.hidden,),
            "mlp.down_proj": (self.hidden, self.mlp),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
        }
        shards: list[dict[str, tuple[int, ...]]] = []
        for first in range(0, self.layers, self.layers_per_shard):
            numbers = range(first, min(first + self.layers_per_shard, self.layers))
            shards.append({f"model.layers.{n}.{part}.weight": shape for n in numbers for part, shape in layer.items()})
        shards[0] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden), **shards[0]}
        shards[-1] |= {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}
        return shards


SMALL = LlamaShape(2, hidden=64, heads=4, kv_heads=2, head_dim=16, mlp=128, vocabulary=256)
"""A model small enough that scanning it is all start-up."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One attention projection, where it lies, and the float64 answer."""

    name: str
    file: str
    offset_bytes: int
    nbytes: int
    mean: float
    std: float


@dataclass(frozen=True)
class BenchCheckpoint:
    path: Path
    layers: int
    tensors: tuple[Tensor, ...]
    words_sum: int
    """Sum of all little-endian 64-bit words of the attention tensors, modulo 2^64: proof that each byte was read."""

    @cached_property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def ranges(self) -> Iterator[tuple[Path, int, int]]:
        """(file, offset, bytes) of the attention tensors, as they lie on disk."""
        for tensor in sorted(self.tensors, key=lambda tensor: (tensor.file, tensor.offset_bytes)):
            yield self.path / tensor.file, tensor.offset_bytes, tensor.nbytes

    def check_std(self, answer: dict[str, float], tolerance: float) -> None:
        """Raises AssertionError unless every attention tensor's std is within the relative tolerance."""
        assert answer.keys() == {tensor.name for tensor in self.tensors}, sorted(answer)[:4]
        worst = max(abs(answer[tensor.name] / tensor.std - 1) for tensor in self.tensors)
        assert worst <= tolerance, f"std is off by {worst:.1e}, allowed {tolerance:.1e}"


def cache_directory() -> Path:
    return Path(os.environ.get("LLMFP_BENCH_DIR") or Path.home() / ".cache" / "llmfp-bench")


def checkpoint(shape: LlamaShape) -> BenchCheckpoint:
    """The checkpoint of that shape, written on first use (32 layers: 2.7 GB on disk, half a minute)."""
    directory = cache_directory() / shape.name
    if not (directory / MANIFEST).exists():
        partial = directory.with_name(f"{directory.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(partial, shape)
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    manifest = json.loads((directory / MANIFEST).read_text())
    tensors = tuple(Tensor(**entry) for entry in manifest["tensors"])
    return BenchCheckpoint(directory, shape.layers, tensors, manifest["words_sum"])


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _write(directory: Path, shape: LlamaShape) -> None:
    shards = shape.tensors()
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    with ThreadPoolExecutor() as pool:
        written = list(pool.map(_write_shard, [directory / name for name in names], shards, range(len(shards))))
    words = sum(words for _, words in written) % 2**64
    tensors = [asdict(tensor) for tensors, _ in written for tensor in tensors]
    index = {
        "metadata": {"total_size": sum(2 * math.prod(shape) for shard in shards for shape in shard.values())},
        "weight_map": {name: names[n] for n, shard in enumerate(shards) for name in shard},
    }
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "intermediate_size": shape.mlp,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / MANIFEST).write_text(json.dumps({"tensors": tensors, "words_sum": words}))


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], number: int) -> tuple[list[Tensor], int]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    offset = 8 + len(text)
    generator = np.random.Generator(np.random.SFC64([VERSION, number]))
    tensors: list[Tensor] = []
    words = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(offset + end)
        for name, shape in shapes.items():
            count = math.prod(shape)
            if "self_attn" in name or "norm" in name:
                file.seek(offset)
                bits, mean, std = _random(generator, count, gain="norm" in name)
                file.write(bits.data)
                if "self_attn" in name:
                    words += int(bits.view(np.uint64).sum(dtype=np.uint64))
                    tensors.append(Tensor(name, path.name, offset, 2 * count, mean, std))
            offset += 2 * count
        file.flush()
        os.fsync(file.fileno())
    return tensors, words


def _random(generator: np.random.Generator, count: int, *, gain: bool) -> tuple[NDArray[np.uint16], float, float]:
    """Bits, mean and std of one tensor; each gets a scale of its own, so that answers cannot be confused."""
    values = generator.standard_normal(count, np.float32)
    scale, centre = (0.25, 1.0) if gain else (generator.uniform(0.01, 0.04), 0.0)
    bits = to_bfloat16(values * np.float32(scale) + np.float32(centre))
    mean = sum(float(from_bfloat16(part).sum(dtype=np.float64)) for part in _parts(bits)) / count
    m2 = sum(float(np.square(from_bfloat16(part).astype(np.float64) - mean).sum()) for part in _parts(bits))
    return bits, mean, float(np.sqrt(m2 / count))


def _parts(bits: NDArray[np.uint16]) -> Iterator[NDArray[np.uint16]]:
    for start in range(0, bits.size, 1 << 20):
        yield bits[start : start + (1 << 20)]
