"""`python -m fuzz PARSER [--seconds N] [--corpus DIR]`: coverage-guided damage to files, with atheris.

A run ends at the first input on which a parser raises anything but the project's own error, takes over two seconds of
the processor (whose other users must not look like a hang), or does not come back within thirty;
atheris then leaves that input in the current directory. Seeds are good files, made here; inputs that reach new code
are added to the corpus, from which the next run on it starts. Memory is bounded by libFuzzer's limit of 2 GiB for the
process. README.md says for how long the parsers have been run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["llmfp"]):
    from llmfp import api
    from llmfp.checkpoint import adapter, gguf_file, safetensors_file, strict_json, torch_archive
    from llmfp.checkpoint.specs import ITEM_BITS

    for _name in (
        "bitsandbytes",
        "compressed",
        "gptq",
        "hqq",
        "mlx",
        "mxfp4",
        "nvfp4",
        "scaled",
    ):  # imported when called for
        importlib.import_module(f"llmfp.encoding.{_name}")
    from llmfp.errors import LlmfpError

LONGEST_SECONDS = 2.0
Parser = Callable[[Path], object]


def _gguf() -> bytes:
    import gguf
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_token_list(["a", "bc"])
        writer.add_tensor("blk.0.attn_q.weight", np.ones((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _safetensors() -> bytes:
    header = b'{"__metadata__":{"a":"b"},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    return struct.pack("<Q", len(header)) + header + bytes(8)


def _archive() -> bytes:
    import torch

    file = io.BytesIO()
    torch.save({"x.weight": torch.ones(2, 3), "n": {"y": torch.zeros(1)}}, file)
    return file.getvalue()


def _write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    header: dict[str, object] = {}
    content = b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(content), len(content) + len(data)]}
        content += data
    stated = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(stated)) + stated + content)


def _projections(fields: dict[str, tuple[str, list[int], bytes]]) -> dict[str, tuple[str, list[int], bytes]]:
    """One layer of llama, hidden size 32, each projection in these tensors."""
    module = "model.layers.0.self_attn.{}_proj.{}"
    return {module.format(role, field): stored for role in "qkvo" for field, stored in fields.items()}


CONFIG = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
QUANTISED: dict[str, dict[str, tuple[str, list[int], bytes]]] = {
    "gptq": {
        "qweight": ("I32", [4, 32], bytes(512)),
        "qzeros": ("I32", [2, 4], bytes(32)),
        "scales": ("F32", [2, 32], bytes(256)),
    },
    "compressed-tensors": {
        "weight_packed": ("I32", [32, 4], bytes(512)),
        "weight_scale": ("F32", [32, 2], bytes(256)),
        "weight_shape": ("I64", [2], struct.pack("<qq", 32, 32)),
    },
    "fp8": {"weight": ("F8_E4M3", [32, 32], bytes(1024)), "weight_scale_inv": ("F32", [2, 2], bytes(16))},
    "mlx": {
        "weight": ("U32", [32, 4], bytes(512)),
        "scales": ("F32", [32, 1], bytes(128)),
        "biases": ("F32", [32, 1], bytes(128)),
    },
    "hqq": {
        "W_q": ("U8", [16, 32], bytes(512)),
        "scale": ("F32", [1, 16], bytes(64)),
        "zero": ("F32", [1, 16], bytes(64)),
    },
}


def _quantised_config() -> bytes:
    stated = {"quant_method": "gptq", "bits": 4, "group_size": 16, "weight_block_size": [16, 16]}
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    groups = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    return json.dumps({**CONFIG, "quantization_config": {**stated, "config_groups": groups, "format": "x"}}).encode()


def _plan_each(config: Path) -> None:
    """Plans one small model of each format under this config.json; all that they may raise is the project's own."""
    for fields in QUANTISED.values():
        _write_safetensors(config.parent / "model.safetensors", _projections(fields))
        with contextlib.suppress(LlmfpError):
            api.plan(config.parent)


def _quant_state() -> bytes:
    stated = {"quant_type": "nf4", "blocksize": 64, "shape": [32, 32], "dtype": "bfloat16", "nested_blocksize": 256}
    return json.dumps({**stated, "nested_offset": 0.01}).encode()


def _scan_nested(path: Path) -> None:
    """Scans a small model in NF4 with nested scales, whose quant_state this is."""
    state = path.read_bytes()
    fields = {
        "weight": ("U8", [512, 1], bytes(512)),
        "weight.absmax": ("U8", [16], bytes(16)),
        "weight.quant_map": ("F32", [16], bytes(64)),
        "weight.nested_absmax": ("F32", [1], bytes(4)),
        "weight.nested_quant_map": ("F32", [256], bytes(1024)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", [len(state)], state),
    }
    folder = path.parent / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    _write_safetensors(folder / "model.safetensors", _projections(fields))
    api.scan(folder)


FUSED = {
    "gpt_neox": ("gpt_neox.layers.0.attention.query_key_value", "gpt_neox.layers.0.attention.dense"),
    "bloom": ("transformer.h.0.self_attention.query_key_value", "transformer.h.0.self_attention.dense"),
    "falcon": ("transformer.h.0.self_attention.query_key_value", "transformer.h.0.self_attention.dense"),
    "internlm2": ("model.layers.0.attention.wqkv", "model.layers.0.attention.wo"),
    "phi3": ("model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj"),
}
"""Families with Q, K and V in one tensor: modules of it and of O."""
STATED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16},
    "compressed-tensors": {"config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 16}}}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16]},
    "mlx": {"bits": 4, "group_size": 32},
}
ODD: tuple[object, ...] = (
    None,
    True,
    0,
    1,
    -1,
    3,
    8,
    33,
    2**31,
    2**70,
    4.0,
    1e308,
    "",
    "4",
    "gptq_v2",
    [],
    [16],
    {},
    {"a": 1},
)
SIZES = (0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 48, 64, 96)
DTYPES = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E8M0", "I8", "U8", "I32", "U32", "I64", "BOOL", "F4")


def _quantised_as(kind: str, rows: int, cols: int) -> dict[str, tuple[str, list[int]]]:
    """What a projection [rows, cols] is stored as, by the end of the tensors' names."""
    groups = max(cols // 16, 1)
    return {
        "plain": {"weight": ("BF16", [rows, cols])},
        "gptq": {
            "qweight": ("I32", [cols // 8, rows]), "qzeros": ("I32", [groups, rows // 8]),
            "scales": ("F16", [groups, rows]), "g_idx": ("I32", [cols]),
        },
        "awq": {
            "qweight": ("I32", [cols, rows // 8]), "qzeros": ("I32", [groups, rows // 8]),
            "scales": ("F16", [groups, rows]),
        },
        "compressed-tensors": {
            "weight_packed": ("I32", [rows, cols // 8]), "weight_scale": ("BF16", [rows, groups]),
            "weight_shape": ("I64", [2]),
        },
        "nvfp4": {
            "weight_packed": ("U8", [rows, cols // 2]), "weight_scale": ("F8_E4M3", [rows, groups]),
            "weight_global_scale": ("F32", [1]),
        },
        "mxfp4": {"weight_packed": ("U8", [rows, cols // 2]), "weight_scale": ("U8", [rows, -(-cols // 32)])},
        "fp8": {"weight": ("F8_E4M3", [rows, cols]), "weight_scale_inv": ("F32", [-(-rows // 16), groups])},
        "int8": {"weight": ("I8", [rows, cols]), "SCB": ("F32", [rows])},
        "mlx": {
            "weight": ("U32", [rows, cols // 8]), "scales": ("F16", [rows, -(-cols // 32)]),
            "biases": ("F16", [rows, -(-cols // 32)]),
        },
    }[kind]  # fmt: skip


def _model() -> bytes:
    return bytes(range(256))


def _scan_drawn(path: Path) -> None:
    """Scans a model of one layer that these bytes draw: family, format, and what of it is dropped or another."""
    drawn = atheris.FuzzedDataProvider(path.read_bytes())
    kinds = [*STATED, "plain", "nvfp4", "mxfp4", "int8"]
    family, kind = drawn.PickValueInList([*FUSED, "llama", "qwen3_next"]), drawn.PickValueInList(kinds)
    size = drawn.PickValueInList([8, 12, 16])
    outputs = {"qkv": 8 * size, "o": 32} if family in FUSED else dict.fromkeys("qkvo", 4 * size)
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    for role, rows in outputs.items():
        module = FUSED[family][role == "o"] if family in FUSED else f"model.layers.0.self_attn.{role}_proj"
        cols = 4 * size if role == "o" else 32
        for field, (dtype, shape) in _quantised_as(kind, rows, cols).items():
            if (change := drawn.ConsumeIntInRange(0, 40)) == 1:
                continue
            if change == 2:
                dtype = drawn.PickValueInList(list(DTYPES))
            if change == 3 and shape:
                shape[drawn.ConsumeIntInRange(0, len(shape) - 1)] = drawn.PickValueInList(list(SIZES))
            if change == 4:
                shape = [*shape, drawn.PickValueInList(list(SIZES))]
            bits = math.prod(shape) * ITEM_BITS[dtype]
            content = struct.pack("<qq", rows, cols) if field == "weight_shape" else b""
            if field not in ("weight_shape", "g_idx") or change == 5:
                content = drawn.ConsumeBytes(min(bits // 8, 64))
            tensors[f"{module}.{field}"] = dtype, shape, content.ljust(-(-bits // 8), b"\0")[: -(-bits // 8)]
    stated: dict[str, object] = dict(STATED.get(kind, {}))
    for key in list(stated):
        if drawn.ConsumeIntInRange(0, 20) == 1:
            stated[key] = drawn.PickValueInList(list(ODD))
    config = {**CONFIG, "model_type": family, "head_dim": size, "quantization_config": stated}
    config["num_key_value_heads"] = drawn.PickValueInList([1, 2, 4])
    (path.parent / "config.json").write_text(json.dumps(config))
    _write_safetensors(path.parent / "model.safetensors", tensors)
    api.scan(path.parent, deep=drawn.ConsumeBool())


TARGETS: dict[str, tuple[str, Callable[[], bytes], Parser]] = {
    "safetensors": ("x.safetensors", _safetensors, lambda path: safetensors_file.read_header(path, 0)),
    "gguf": ("x.gguf", _gguf, gguf_file.open_gguf),
    "torch": ("x.bin", _archive, lambda path: torch_archive.read_header(path, 0)),
    "json": (
        "x.json",
        lambda: b'{"weight_map": {"a": "b.safetensors"}}',
        lambda p: strict_json.read_object(p, 1 << 20),
    ),
    "adapter": (
        "adapter_config.json",
        lambda: b'{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "alpha_pattern": {".*q_proj": 4}}',
        lambda path: adapter.open_adapted(path.parent, path.parent),
    ),
    "config": ("config.json", _quantised_config, _plan_each),
    "quant_state": ("state.json", _quant_state, _scan_nested),
    "model": ("drawn.bytes", _model, _scan_drawn),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("parser", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="where inputs that reach new code are kept, PARSER/ below it")
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    name, seed, parse = TARGETS[arguments.parser]
    with tempfile.TemporaryDirectory() as folder:
        corpus = (arguments.corpus or Path(folder) / "corpus") / arguments.parser
        corpus.mkdir(parents=True, exist_ok=True)
        (corpus / "seed").write_bytes(seed())
        path = Path(folder) / name

        def once(data: bytes) -> None:
            path.write_bytes(data)
            start = time.process_time()
            message = ""
            try:
                parse(path)
            except LlmfpError as error:
                message = str(error)
            assert "\n" not in message
            assert time.process_time() - start < LONGEST_SECONDS

        limits = ["-max_len=65536", "-rss_limit_mb=2048", "-timeout=30"]
        options = [f"-max_total_time={arguments.seconds}", *limits, str(corpus)]
        atheris.Setup([sys.argv[0], *options], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
