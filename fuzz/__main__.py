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
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["llmfp"]):
    from llmfp import api
    from llmfp.checkpoint import adapter, gguf_file, safetensors_file, strict_json, torch_archive

    for _name in ("bitsandbytes", "compressed", "gptq", "hqq", "mlx", "scaled"):  # imported when called for
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
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("parser", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="where inputs that reach new code are kept, PARSER/ below it")
    arguments = parser.parse_args()
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
