"""Whatever lies at the path, the answer is a list of tensors at their true places or one error line that names the file
(and the tensor): never a traceback, a hang, a crash or a number read from the wrong bytes, and nothing half-written.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

import llmfp
from llmfp import api
from llmfp.__main__ import main
from llmfp.checkpoint import TensorSpec, open_checkpoint
from llmfp.checkpoint.safetensors_file import read_header
from llmfp.checkpoint.specs import ITEM_BITS
from llmfp.checkpoint.strict_json import MAX_BYTES
from llmfp.errors import CheckpointError, LlmfpError
from llmfp.reader.mmap_reader import MmapReader
from llmfp.report import printable
from tests.checkpoints import (
    BACKEND,
    Stored,
    build,
    entry,
    framed,
    safetensors_bytes,
    write_index,
    write_model,
)

INDEX = "model.safetensors.index.json"
ONE = {"a": entry("F32", [1], 0, 4)}
Q = "model.layers.0.self_attn.q_proj.weight"
LLAMA = build("llama")


# --- bad input: exit 2, one line that names the file, a hint, nothing written ---------------------------------------


def broken(name: str, *words: str) -> Callable[[Callable[[Path], Path | None]], Callable[[Path], Path | None]]:
    """Registers a builder of a bad checkpoint in a folder; it returns what to scan, the folder when None."""

    def register(builder: Callable[[Path], Path | None]) -> Callable[[Path], Path | None]:
        assert name not in BROKEN
        BROKEN[name] = builder, words
        return builder

    return register


BROKEN: dict[str, tuple[Callable[[Path], Path | None], tuple[str, ...]]] = {}


def one_file(name: str, content: bytes | Callable[[], bytes], *words: str) -> None:
    """Registers a bad model.safetensors."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content if isinstance(content, bytes) else content())

    broken(name, "model.safetensors", *words)(write)


def llama_with(name: str, tensor: str, replacement: Any, *words: str) -> None:
    """Registers a good checkpoint but for one tensor, replaced, or left out where the replacement is None."""

    def write(folder: Path) -> None:
        tensors = {key: value for key, value in {**LLAMA.tensors, tensor: replacement}.items() if value is not None}
        write_model(folder, tensors, LLAMA.config)

    broken(name, "model.safetensors", tensor, *words)(write)


def bad_index(name: str, text: Any, *words: str) -> None:
    """Registers two good shards with an index that lies about them; `text` is a weight map or the file's bytes."""

    def write(folder: Path) -> None:
        LLAMA.write(folder, shards=2)
        good = json.loads((folder / INDEX).read_text())["weight_map"]
        if isinstance(text, bytes):
            (folder / INDEX).write_bytes(text)
        else:
            write_index(folder, {**good, **text})

    broken(name, INDEX, *words)(write)


SHARD = "model-00001-of-00002.safetensors"


@broken("no such path", "/nowhere", "no such file or directory")
def _(folder: Path) -> Path:
    return folder / "nowhere"


@broken("a path whose name is too long for the file system", "too long")
def _(folder: Path) -> Path:
    return folder / ("x" * 300)


@broken("a file used as a directory", "model.safetensors/x", "no such file or directory")
def _(folder: Path) -> Path:
    LLAMA.write(folder)
    return folder / "model.safetensors" / "x"


@broken("an empty directory", "directory is empty")
def _(folder: Path) -> None:
    pass


@broken("a directory without weights", "no .safetensors, .gguf or pytorch_model.bin file")
def _(folder: Path) -> None:
    (folder / "README.md").write_text("nothing here")


@broken("only weights of an unsupported kind", "Keras", "ONNX", "not supported", "safetensors")
def _(folder: Path) -> None:
    (folder / "tf_model.h5").write_bytes(b"")
    (folder / "model.onnx").write_bytes(b"")


@broken("a file of an unsupported kind", "model.onnx", "ONNX", "not supported", "convert the model")
def _(folder: Path) -> Path:
    (folder / "model.onnx").write_bytes(b"")
    return folder / "model.onnx"


@broken("a file that holds no weights", "notes.txt", "not a weight file")
def _(folder: Path) -> Path:
    (folder / "notes.txt").write_text("hello")
    return folder / "notes.txt"


@broken("only a fingerprint", "no .safetensors, .gguf or pytorch_model.bin file")
def _(folder: Path) -> None:
    (folder / "old.fp.safetensors").write_bytes(safetensors_bytes({}))


@broken("an adapter without its base", "an adapter", "without its base model", "--base")
def _(folder: Path) -> None:
    lora = np.ones((2, 8), np.float32)
    tensors = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": lora for part in "AB"}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    (folder / "adapter_config.json").write_text("{}")


@broken("a named pipe for a shard", "model.safetensors", "not a regular file")
def _(folder: Path) -> None:
    os.mkfifo(folder / "model.safetensors")


@broken("a directory for a shard", "model.safetensors", "not a regular file")
def _(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()


@broken("a link that leads nowhere", "model.safetensors", "no such file")
def _(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to(folder / "blobs" / "gone")


@broken("a link to itself", "model.safetensors")
def _(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to("model.safetensors")


@broken("a named pipe for the index", INDEX, "not a regular file")
def _(folder: Path) -> None:
    os.mkfifo(folder / INDEX)


@broken("a named pipe for the config", "config.json", "not a regular file")
def _(folder: Path) -> None:
    LLAMA.write(folder, config=False)
    os.mkfifo(folder / "config.json")


@broken("a config that is not JSON", "config.json", "not valid JSON")
def _(folder: Path) -> None:
    LLAMA.write(folder)
    (folder / "config.json").write_text("{'model_type': 'llama'}")


@broken("a config that is a list", "config.json", "not an object")
def _(folder: Path) -> None:
    LLAMA.write(folder)
    (folder / "config.json").write_text("[]")


@broken("a config nested too deep", "config.json", "not valid JSON")
def _(folder: Path) -> None:
    LLAMA.write(folder)
    (folder / "config.json").write_text('{"a":' * 100_000)


@broken("a missing shard of those the index names", SHARD, "missing shard")
def _(folder: Path) -> None:
    LLAMA.write(folder, shards=2)
    (folder / SHARD).unlink()


@broken("a missing shard of those numbered without an index", SHARD, "missing shard", "1 of 2")
def _(folder: Path) -> None:
    LLAMA.write(folder, shards=2)
    (folder / SHARD).unlink()
    (folder / INDEX).unlink()


@broken("one tensor in two shards", "model-00002-of-00002.safetensors", SHARD, repr(Q))
def _(folder: Path) -> None:
    LLAMA.write(folder, shards=2)
    for number in (1, 2):
        part = {Q: LLAMA.tensors[Q], f"x{number}": LLAMA.tensors[Q]}
        (folder / f"model-{number:05d}-of-00002.safetensors").write_bytes(safetensors_bytes(part))
    (folder / INDEX).unlink()


@broken("a tensor that the index places in the other shard", "model-00002-of-00002.safetensors", "'lm_head.weight'")
def _(folder: Path) -> None:
    LLAMA.write(folder, shards=2)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    assert weight_map["lm_head.weight"] == SHARD
    write_index(folder, weight_map | {"lm_head.weight": "model-00002-of-00002.safetensors"})


@broken("a tensor that the index names and no shard has", SHARD, "'ghost'", "not in this shard")
def _(folder: Path) -> None:
    LLAMA.write(folder, shards=2)
    write_index(folder, json.loads((folder / INDEX).read_text())["weight_map"] | {"ghost": SHARD})


bad_index("an index with trailing data", b'{"weight_map": {"a": "a.safetensors"}}}', "trailing data")
bad_index("an index naming a tensor twice", b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice")
bad_index("an index that is not JSON", b"weights", "not valid JSON")
bad_index("an index that is empty", b"", "not valid JSON")
bad_index("an index that is not UTF-8", b'{"weight_map": {"\xff": "a.safetensors"}}', "not valid JSON")
bad_index("an index that is a list", b"[]", "not an object")
bad_index("an index without a map", b"{}", "no weight_map")
bad_index("an index with an empty map", b'{"weight_map": {}}', "no weight_map")
bad_index("an index whose map is a list", b'{"weight_map": ["a"]}', "no weight_map")
bad_index("an index that leaves its directory", {Q: "../other/model.safetensors"}, repr(Q), "outside the directory")
bad_index("an index that leaves its directory midway", {Q: "a/../../b.safetensors"}, repr(Q), "outside the directory")
bad_index("an index with an absolute name", {Q: "/etc/model.safetensors"}, repr(Q), "outside the directory")
bad_index("an index with a drive letter", {Q: "C:\\model.safetensors"}, repr(Q), "outside the directory")
bad_index("an index with a backslash", {Q: "..\\model.safetensors"}, repr(Q), "outside the directory")
bad_index("an index with an empty name", {Q: ""}, repr(Q))
bad_index("an index with a NUL in a name", {Q: "a\0.safetensors"}, repr(Q))
bad_index("an index with a number for a name", {Q: 7}, repr(Q))
bad_index("an index that names another kind of file", {Q: "model.onnx"}, repr(Q), "not a .safetensors file")


@broken("an index with a name too long for the file system", "too long")
def _(folder: Path) -> None:
    write_index(folder, {Q: "x" * 300 + ".safetensors"})


@broken("an index over the limit", INDEX, "over the limit")
def _(folder: Path) -> None:
    LLAMA.write(folder, shards=2)
    os.truncate(folder / INDEX, MAX_BYTES + 1)


one_file("an empty file", b"", "truncated")
one_file("a file cut in the header's length", b"\2\0\0\0\0\0\0", "truncated")
one_file("a file cut in its header", framed(ONE, b"1234")[:20], "truncated")
one_file("a file cut in its data", framed(ONE, b"1234")[:-1], "'a'", "truncated")
one_file("a header longer than the file", struct.pack("<Q", 1000) + b"{}", "header of 1000 bytes", "file of 10")
one_file("a header over the limit", struct.pack("<Q", MAX_BYTES + 1) + b"{}", "over the limit")
one_file("a header of 2^64 - 1 bytes", b"\xff" * 8 + b"{}", "over the limit")
one_file("no header", framed(""), "not valid JSON")
one_file("a header that is not JSON", framed("{'a': 1}"), "not valid JSON")
one_file("a header that is not UTF-8", framed(b'{"\xff": 1}'), "not valid JSON")
one_file("a header that is a list", framed("[]"), "not an object")
one_file("a header with something behind it", framed(json.dumps(ONE) + "x", b"1234"), "trailing data")
one_file("a header nested too deep", framed('{"a":' * 100_000), "not valid JSON")
one_file("a header of brackets", lambda: framed('{"a":' + "[]," * 2_000_000 + "1}"), "mostly brackets")
one_file("a number of 5000 digits", framed('{"a": ' + "9" * 5000 + "}"), "not valid JSON")
one_file("a tensor named twice", framed(f"{json.dumps(ONE)[:-1]}, {json.dumps(ONE)[1:]}", b"1234"), "'a'", "twice")
one_file("metadata that is no text", framed({"__metadata__": {"a": 1}}), "__metadata__")
one_file("an unknown dtype", framed({"a": entry("F12", [1], 0, 4)}, b"1234"), "'a'", "'F12'")
one_file("a dtype that is no text", framed({"a": {**ONE["a"], "dtype": ["F32"]}}, b"1234"), "'a'", "unknown dtype")
one_file("a tensor without offsets", framed({"a": {"dtype": "F32", "shape": [1]}}), "'a'", "data_offsets")
one_file("overlapping tensors", framed({**ONE, "b": entry("F32", [1], 2, 6)}, b"123456"), "'b'", "overlaps")
one_file("one place for two tensors", framed({**ONE, "b": ONE["a"]}, b"1234"), "'b'", "overlaps")
one_file("a hole at the start", framed({"a": entry("F32", [1], 4, 8)}, b"12345678"), "'a'", "hole")
one_file("a hole", framed({**ONE, "b": entry("F32", [1], 8, 12)}, b"123456789012"), "'b'", "hole")
one_file("trailing bytes", framed(ONE, b"12345678"), "4 trailing bytes")
one_file("offsets beyond the file", framed({"a": entry("F32", [2], 0, 8)}, b"1234"), "'a'", "file of")
one_file("reversed offsets", framed({"a": entry("F32", [1], 4, 0)}, b"1234"), "'a'")
one_file("negative offsets", framed({"a": entry("F32", [1], -4, 0)}, b"1234"), "'a'", "non-negative")
one_file("offsets that wrap", framed({"a": entry("U8", [2**63], 0, 2**63)}, b"1"), "'a'")
one_file("a shape that wraps to nothing", framed({"a": entry("U8", [2**62, 4, 0], 0, 0)}), "'a'")
one_file("fewer bytes than the shape says", framed({"a": entry("F32", [2], 0, 4)}, b"1234"), "'a'", "needs 8 bytes")
one_file("a shape of many dimensions", framed({"a": entry("U8", [2**62] * 100_000, 0, 0)}), "'a'", "dimensions")
one_file("part of a byte", framed({"a": entry("F4", [3], 0, 2)}, b"12"), "'a'", "whole number of bytes")
one_file("a fractional shape", framed('{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', b"1234"), "'a'")
broken("a file without a tensor", "no attention", "no tensor")(lambda folder: write_model(folder, {}))

llama_with("a projection of no size", Q, np.empty((0, 24), np.float32), "no elements")
llama_with("a projection that is a vector", Q, np.ones(24, np.float32), "two dimensions")
llama_with("a projection that is a cube", Q, np.ones((2, 16, 24), np.float32), "two dimensions")
llama_with("a projection of integers", Q, np.ones((32, 24), np.int8), "I8", "no tensor beside it says")
llama_with("a projection of booleans", Q, Stored("BOOL", (32, 24), bytes(768)), "BOOL", "no tensor beside it says")
llama_with("a projection of 4-bit floats", Q, Stored("F4", (32, 24), bytes(384)), "F4", "no tensor beside it says")
for suffix in ("weight_scale", "weight_scale_inv", "scale", "scales", "scale_weight", "SCB", "weight.absmax"):
    llama_with(f"floats with {suffix}", Q.removesuffix("weight") + suffix, np.ones(1, np.float32), repr(Q), "F32")


@broken("FP8 that the config calls quantised, with no scale to be found", repr(Q), "F8_E4M3", "quantised")
def _(folder: Path) -> None:
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    write_model(folder, {**LLAMA.tensors, Q: Stored("F8_E4M3", (32, 24), bytes(768))}, LLAMA.config | quantised)


for packed in ("qweight", "weight_packed", "W_q"):

    @broken(f"{packed} alone", "model.safetensors", f"_proj.{packed}'")
    def _(folder: Path, packed: str = packed) -> None:
        names = (f"model.layers.0.self_attn.{part}_proj.{packed}" for part in "qkvo")
        write_model(folder, dict.fromkeys(names, np.ones((2, 2), np.int32)), LLAMA.config)


@broken("no attention at all", "no attention weights", "closest names", "blk.{n}.attn_queue.weight")
def _(folder: Path) -> None:
    write_model(folder, {"blk.7.attn_queue.weight": np.ones((2, 2), np.float32), "other": np.ones(2, np.float32)})


@broken("names without number or end", "no attention weights", "closest names")
def _(folder: Path) -> None:
    alphabet = [chr(code) for code in range(0x4E00, 0x9E00)]
    names = {"".join(alphabet[i : i + 40]) * 5 + f".x{alphabet[i]}.w": entry("U8", [0], 0, 0) for i in range(20_000)}
    (folder / "model.safetensors").write_bytes(framed(names))


@broken("names that would drive a terminal", "no attention weights", r"\x1b[{n}mred\x07\u202e\nattn")
def _(folder: Path) -> None:
    write_model(folder, {"\x1b[31mred\x07\u202e\nattn": np.ones((2, 2), np.float32)})


@broken("a folder whose name would drive a terminal", r"\x1b[2J\n.safetensors", "truncated")
def _(folder: Path) -> Path:
    path = folder / "\x1b[2J\n.safetensors"
    path.write_bytes(b"")
    return path


@broken("a folder whose name is not UTF-8", "truncated")
def _(folder: Path) -> Path:
    path = folder / os.fsdecode(b"\xff.safetensors")
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_one_line_and_a_hint_with_exit_code_2_and_nothing_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    builder, words = BROKEN[name]
    source = builder(folder) or folder
    started = time.process_time()
    code = main(["scan", str(source), "--out", str(out / "x.fp.safetensors"), "--backend", BACKEND])
    seconds = time.process_time() - started
    stdout, stderr = capsys.readouterr()
    assert code == 2, stderr
    assert stdout == ""
    lines = stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert [line[:6] for line in lines[1:]] in ([], ["hint: "])
    assert "bug in llmfp" not in stderr
    assert stderr.replace("\n", "").isprintable()
    for word in words:
        assert word in stderr
    assert list(out.iterdir()) == []
    assert seconds < 20, "hostile input must not buy time"
    with pytest.raises(LlmfpError) as caught:
        llmfp.scan(source, backend=BACKEND)
    assert lines == [
        f"error: {printable(str(caught.value))}",
        *[f"hint: {caught.value.hint}"] * bool(caught.value.hint),
    ]


# --- the header, against the library --------------------------------------------------------------------------------


def tensors_by_the_library(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    """What safetensors itself finds in a file; None where it refuses."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
    except SafetensorError:
        return None


def tensors_by_us(path: Path) -> list[TensorSpec] | None:
    try:
        return read_header(path, 0)[1]
    except CheckpointError:
        return None


def check_against_the_library(path: Path, content: bytes) -> bool:
    """Whatever the library refuses we refuse; what we accept, we locate where the header says. Returns: accepted."""
    path.write_bytes(content)
    ours, theirs = tensors_by_us(path), tensors_by_the_library(path)
    if ours is None:
        return False
    assert theirs is not None, "accepted what the library refuses"
    assert {spec.name: (spec.dtype, list(spec.shape)) for spec in ours} == theirs
    for spec in ours:
        assert 8 <= spec.offset_bytes <= spec.offset_bytes + spec.nbytes <= len(content)
        assert 8 * spec.nbytes == int(np.prod(spec.shape, dtype=object)) * ITEM_BITS[spec.dtype]
    return True


def header_of_one(extra: str = "", shape: str = "[1]", offsets: str = "[0,4]", name: str = "a") -> str:
    return f'{{"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}{extra}}}}}'


EXTRAS = (
    "1", "-1", "1.5", "1e5", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "-0", "00", "1.", ".5", "+1", "0x1",
    "9" * 25, "9" * 400, "9" * 5000, '"x"', '"\\ud800"', '"\\udc00x"', '"\\ud83d\\ude00"', '"\\x"', "null", "true",
    "[]", "{}", "[1]", "[" * 126 + "]" * 126, '{"a":' * 900 + "1" + "}" * 900, "[" * 90_000, "'x'", "", "undefined",
)  # fmt: skip
HEADERS = {
    "plain": (header_of_one(), True),
    "spaces behind": (header_of_one() + "   ", True),
    "newlines around": ("\n\t" + header_of_one() + "\n", None),
    "zeros behind": (header_of_one() + "\0", False),
    "form feed behind": (header_of_one() + "\f", False),
    "no-break space behind": (header_of_one() + "\xa0", False),
    "byte order mark": ("\ufeff" + header_of_one(), False),
    "comment": ("/**/" + header_of_one(), False),
    "trailing comma": (header_of_one()[:-1] + ",}", False),
    "empty name": (header_of_one(name=""), True),
    "name with NUL": (header_of_one(name="\\u0000"), True),
    "name with a raw control character": (header_of_one(name="\x01"), False),
    "name of half a surrogate pair": (header_of_one(name="\\ud800"), False),
    "name of the other half": (header_of_one(name="\\udc00"), False),
    "name of a whole pair": (header_of_one(name="\\ud83d\\ude00"), True),
    "negative zero in the shape": (header_of_one(shape="[1,-0]", offsets="[0,0]"), False),
    "negative zero in the offsets": (header_of_one(offsets="[-0,4]"), False),
    "true in the shape": (header_of_one(shape="[true]"), False),
    "exponent in the shape": (header_of_one(shape="[1e0]"), False),
    "leading zero in the shape": (header_of_one(shape="[01]"), False),
    "no shape": (header_of_one(shape="null"), False),
    "a scalar": (header_of_one(shape="[]"), True),
    "three offsets": (header_of_one(offsets="[0,4,4]"), False),
    "one offset": (header_of_one(offsets="[4]"), False),
    "an entry that is a list": ('{"a":["F32",[1],[0,4]]}', False),
    "an entry that is null": ('{"a":null}', False),
    "metadata": ('{"__metadata__":{"format":"pt"},' + header_of_one()[1:], True),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{},' + header_of_one()[1:], False),
    "metadata with half a pair": ('{"__metadata__":{"a":"\\ud800"},' + header_of_one()[1:], False),
    "metadata that is a list": ('{"__metadata__":[],' + header_of_one()[1:], False),
    "a field twice": (header_of_one(extra=',"dtype":"F32"'), False),
    **{f"extra field {i}": (header_of_one(extra=f',"x":{extra}'), None) for i, extra in enumerate(EXTRAS)},
}


@pytest.mark.parametrize("name", HEADERS)
def test_every_header_that_the_library_refuses_is_refused(name: str, tmp_path: Path) -> None:
    header, expected = HEADERS[name]
    data = b"" if '"data_offsets":[0,0]' in header else b"1234"
    accepted = check_against_the_library(tmp_path / "x.safetensors", framed(header, data))
    assert expected in (accepted, None)


@pytest.mark.parametrize("dtype", ITEM_BITS)
def test_every_dtype_of_the_library_is_known_with_its_size(dtype: str, tmp_path: Path) -> None:
    nbytes = 24 * ITEM_BITS[dtype] // 8
    content = framed({"a": entry(dtype, [4, 6], 0, nbytes)}, bytes(nbytes))
    assert check_against_the_library(tmp_path / "x.safetensors", content)
    wrong = framed({"a": entry(dtype, [4, 6], 0, nbytes + 1)}, bytes(nbytes + 1))
    assert not check_against_the_library(tmp_path / "x.safetensors", wrong)


THREE = {"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [0, 5], 24, 24), "c": entry("U8", [3], 24, 27)}
EDGES = (0, 1, 2, 3, 23, 24, 25, 27, 28, 2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**64 + 24)


def mutations() -> list[bytes]:
    """A valid file with every length, offset and dimension set to each edge, and cut or grown at every boundary."""
    data = bytes(range(27))
    valid = framed(THREE, data)
    header_end = len(valid) - 27
    files = [valid]
    lengths = [*(edge for edge in EDGES if edge < 2**64), *range(header_end - 10, header_end + 30)]
    files += [struct.pack("<Q", length) + valid[8:] for length in lengths]
    for name, each in THREE.items():
        for key in ("shape", "data_offsets"):
            for position in range(len(each[key])):
                for edge in EDGES:
                    changed = [*each[key][:position], edge, *each[key][position + 1 :]]
                    files.append(framed({**THREE, name: {**each, key: changed}}, data))
                    if key == "shape":  # the zero elsewhere hides what wraps
                        files.append(framed({**THREE, name: {**each, key: [*changed, 4, 0]}}, data))
    boundaries = {0, 8, header_end, header_end + 24, len(valid)}
    files += [valid[: max(0, cut + delta)] for cut in boundaries for delta in (-1, 0, 1)]
    files += [valid + b"\0", valid + bytes(4096), valid[:8] + valid]
    return files


def test_every_mutated_length_and_every_cut_is_judged_as_the_library_does(tmp_path: Path) -> None:
    files = mutations()
    accepted = [check_against_the_library(tmp_path / "x.safetensors", content) for content in files]
    assert accepted[0]
    assert 1 < sum(accepted) < len(files) // 4, "most of these files are broken, and not all"


THREE_JSON = json.dumps(THREE).encode()
JUNK = st.one_of(
    st.binary(max_size=200),
    st.builds(framed, st.binary(max_size=200), st.binary(max_size=20)),
    st.builds(
        lambda cut, new, data: framed(THREE_JSON[: cut[0]] + new + THREE_JSON[cut[1] :], data),
        st.tuples(st.integers(0, 170), st.integers(0, 170)).map(sorted),
        st.one_of(st.binary(max_size=8), st.sampled_from([b'"', b"[", b"{", b",", b"\\u", b"-", b"9" * 20, b"e9"])),
        st.binary(min_size=27, max_size=27),
    ),
)  # fmt: skip
ENTRY_VALUES = st.one_of(
    st.sampled_from(EDGES), st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.lists(st.integers(-2, 9))
)
ENTRIES = st.dictionaries(
    st.text(max_size=3) | st.just("__metadata__"),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*ITEM_BITS, "f32", "F12"]),
            "shape": st.lists(st.sampled_from(EDGES[:8]), max_size=3) | ENTRY_VALUES,
            "data_offsets": st.lists(st.sampled_from(EDGES[:8]), max_size=3) | ENTRY_VALUES,
        }
    )
    | ENTRY_VALUES,
    max_size=3,
)


@given(content=JUNK | st.builds(framed, ENTRIES, st.binary(max_size=28)))
def test_any_bytes_are_either_tensors_or_a_checkpoint_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_against_the_library(tmp_path_factory.getbasetemp() / "junk.safetensors", content)


# --- directories -----------------------------------------------------------------------------------------------------


def scan(source: Path) -> llmfp.Fingerprint:
    return llmfp.scan(source, backend=BACKEND)


def test_a_directory_a_file_and_shards_are_the_same_model(tmp_path: Path) -> None:
    whole = LLAMA.write(tmp_path / "whole")
    split = LLAMA.write(tmp_path / "split", shards=3)
    numbered = LLAMA.write(tmp_path / "numbered", shards=3)
    (numbered / INDEX).unlink()
    digests = {scan(path).digest for path in (whole, whole / "model.safetensors", split, numbered)}
    assert len(digests) == 1


def test_one_shard_by_itself_is_scanned_for_what_it_holds(tmp_path: Path) -> None:
    folder = LLAMA.write(tmp_path, shards=2)
    fingerprint = scan(folder / SHARD)
    assert [each["name"] for each in fingerprint.source["files"]] == [SHARD]


def test_mistral_files_shipped_twice_are_read_once(tmp_path: Path) -> None:
    """Both naming schemes side by side: the transformers one is read; alone, the consolidated one."""
    LLAMA.write(tmp_path, shards=2)
    (tmp_path / "consolidated.safetensors").write_bytes(safetensors_bytes(build("mistral").tensors))
    assert scan(tmp_path).architecture == "llama"
    (tmp_path / INDEX).unlink()
    assert [each["name"][:6] for each in scan(tmp_path).source["files"]] == ["model-", "model-"]
    for shard in tmp_path.glob("model-*"):
        shard.unlink()
    assert scan(tmp_path).architecture == "mistral"


def test_fingerprints_and_other_files_beside_the_shards_are_not_read(tmp_path: Path) -> None:
    folder = LLAMA.write(tmp_path, shards=2)
    (folder / INDEX).unlink()
    (folder / "mine.fp.safetensors").write_bytes(b"not a shard")
    (folder / "tokenizer.json").write_bytes(b"not JSON")
    assert len(scan(folder).source["files"]) == 2


def test_tensors_that_the_index_does_not_name_are_a_caveat(tmp_path: Path) -> None:
    folder = LLAMA.write(tmp_path, shards=2)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    del weight_map["lm_head.weight"]
    write_index(folder, weight_map)
    assert any("1 stored tensor" in caveat and INDEX in caveat for caveat in scan(folder).caveats)


def test_the_hub_cache_gives_revision_and_content_hash(tmp_path: Path) -> None:
    """models--org--name/snapshots/<commit>/model.safetensors → ../../blobs/<sha256>."""
    sha256, commit = "ab" * 32, "0123456789" * 4
    snapshot, blobs = tmp_path / "snapshots" / commit, tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / sha256).write_bytes(safetensors_bytes(LLAMA.tensors))
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / sha256)
    source = scan(snapshot).source
    assert source["revision"] == commit
    assert source["files"] == [
        {"name": "model.safetensors", "bytes": (blobs / sha256).stat().st_size, "sha256": sha256, "etag": None}
    ]


def test_no_hash_is_claimed_for_a_file_that_is_not_named_by_one(tmp_path: Path) -> None:
    folder = LLAMA.write(tmp_path / "there")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model.safetensors").symlink_to(folder / "model.safetensors")
    source = scan(tmp_path / "here").source
    assert source["files"][0]["sha256"] is None
    assert source["revision"] is None


def test_a_config_as_python_writes_it_is_read(tmp_path: Path) -> None:
    """json.dump writes Infinity and NaN (Mamba hybrids' time_step_limit), which JSON forbids; a header may not."""
    folder = write_model(tmp_path, LLAMA.tensors, LLAMA.config | {"time_step_limit": [0.0, float("inf")]})
    assert scan(folder).main.heads == LLAMA.heads


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """A tebibyte of weights opens at once: nothing in it is read, mapped or allocated."""
    side = 2**18
    shape, nbytes = [side, side], 4 * side * side
    names = [f"model.layers.0.self_attn.{role}_proj.weight" for role in "qkvo"]
    header = {name: entry("F32", shape, i * nbytes, (i + 1) * nbytes) for i, name in enumerate(names)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(framed(header))
    try:
        os.truncate(path, path.stat().st_size + 4 * nbytes)
    except OSError as error:
        pytest.skip(f"no sparse file of a tebibyte here: {error}")
    assert len(open_checkpoint(tmp_path).tensors) == 4


# --- files that change, and files that may not be read ---------------------------------------------------------------


def replace_by_a_copy(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "truncated": lambda path: os.truncate(path, 4096),
    "emptied": lambda path: os.truncate(path, 0),
    "replaced by an equal file": replace_by_a_copy,
    "touched": lambda path: os.utime(path, ns=(1, 1)),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("reader", ["pread", "mmap"])
def test_a_file_that_changes_after_its_header_was_read_is_refused_by_name(
    change: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if reader == "mmap" and (reason := MmapReader.why_unavailable()):
        pytest.skip(reason)
    source = LLAMA.write(tmp_path / "model") / "model.safetensors"
    match = api.match
    monkeypatch.setattr(api, "match", lambda checkpoint, _: [CHANGES[change](source), match(checkpoint)][1])
    arguments = ["scan", str(source), "--reader", reader, "--backend", BACKEND, "--threads", "1"]
    assert main([*arguments, "--out", str(tmp_path / "x.fp.safetensors")]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: {source}: ")
    assert "bug in llmfp" not in stderr
    assert not list(tmp_path.glob("*x.fp.*"))


SHRINK = """
import os, sys
from llmfp import kernels
from llmfp.__main__ import main
path = sys.argv[1]
real = kernels.select("auto")
class Shrinking:
    def __getattr__(self, name):
        return getattr(real, name)
    def marginals(self, chunk):
        os.truncate(path, 0)
        return real.marginals(chunk)
import llmfp.api
llmfp.api.select = lambda name: Shrinking()
sys.exit(main(["scan", path, "--reader", "mmap", "--threads", "1"]))
"""


def test_a_mapped_file_that_shrinks_under_the_kernel_does_not_kill_the_process(tmp_path: Path) -> None:
    """Without a guard the kernel's load from a page past the end is SIGBUS."""
    if reason := MmapReader.why_unavailable():
        pytest.skip(reason)
    source = build("llama", hidden=512, head_dim=128).write(tmp_path) / "model.safetensors"
    done = subprocess.run([sys.executable, "-c", SHRINK, source], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done
    assert done.stderr.startswith(f"error: {source}: ")


UNPRIVILEGED = """
import os, sys
from llmfp.__main__ import main
good, folder, backend = sys.argv[1:]
main(["scan", good, "--backend", backend])  # imports what nobody might not
sys.stdout.flush()
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.exit(main(["scan", folder, "--backend", backend]))
"""


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users can reach, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("forbidden", ["model.safetensors", "config.json", INDEX, SHARD, "."])
def test_a_file_that_may_not_be_read_is_refused_by_name(forbidden: str, public_folder: Path) -> None:
    """Root may read everything, so root becomes nobody first, in a process of its own."""
    good, folder = LLAMA.write(public_folder / "good"), public_folder / "model"
    LLAMA.write(folder, shards=2 if forbidden in (INDEX, SHARD) else 1)
    (folder / forbidden).chmod(0)
    command = [sys.executable, "-c", UNPRIVILEGED, good, folder, BACKEND]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        (folder / forbidden).chmod(0o755)
    assert done.returncode == 2, done
    line = done.stderr.splitlines()[0]
    assert line.startswith(f"error: {folder / forbidden}")
    assert line.endswith("Permission denied")
