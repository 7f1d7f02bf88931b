"""`python -m fuzz PARSER [--seconds N]`: coverage-guided damage to files, with atheris.

A run ends at the first input on which a parser raises anything but the project's own error or takes over two seconds;
atheris then leaves that input in the current directory. Seeds are good files, made here. Memory is bounded by
libFuzzer's limit of 2 GiB for the process. README.md says for how long the parsers have been run.
"""

from __future__ import annotations

import argparse
import io
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["llmfp"]):
    from llmfp.checkpoint import adapter, gguf_file, safetensors_file, strict_json, torch_archive
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
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("parser", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    name, seed, parse = TARGETS[arguments.parser]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        (corpus / "seed").write_bytes(seed())
        path = Path(folder) / name

        def once(data: bytes) -> None:
            path.write_bytes(data)
            start = time.monotonic()
            message = ""
            try:
                parse(path)
            except LlmfpError as error:
                message = str(error)
            assert "\n" not in message
            assert time.monotonic() - start < LONGEST_SECONDS

        options = [f"-max_total_time={arguments.seconds}", "-max_len=65536", "-rss_limit_mb=2048", str(corpus)]
        atheris.Setup([sys.argv[0], *options], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
