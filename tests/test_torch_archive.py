"""What torch.save wrote is located byte for byte as torch.load reads it, and its pickle is never run: a file is either
a list of tensors at their true places or one CheckpointError that names it, in bounded time and memory.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import io
import json
import os
import pickle
import pickletools
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import llmfp
from llmfp.__main__ import main
from llmfp.checkpoint import TensorSpec, open_checkpoint, stored_file, stored_zip, tensor_pickle, torch_archive
from llmfp.checkpoint.torch_archive import read_header
from llmfp.errors import CheckpointError, EncodingError
from tests.checkpoints import BACKEND, build, stored

LLAMA = build("llama")
Q = "model.layers.0.self_attn.q_proj.weight"
INDEX = "pytorch_model.bin.index.json"
DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64", torch.complex128: "C128", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):
    DTYPES[torch.float8_e8m0fnu] = "F8_E8M0"


def saved(what: object, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(what, buffer, **options)
    return buffer.getvalue()


def tensors_of(path: Path, content: bytes) -> dict[str, TensorSpec]:
    path.write_bytes(content)
    return {spec.name: spec for spec in read_header(path, 0)[1]}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def check_located(path: Path, content: bytes, expected: Mapping[str, torch.Tensor]) -> None:
    """Every tensor is where its name, dtype and shape say, bit for bit."""
    found = tensors_of(path, content)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        spec = found[name]
        assert (spec.dtype, spec.shape) == (DTYPES[tensor.dtype], tuple(tensor.shape)), name
        assert content[spec.offset_bytes : spec.offset_bytes + spec.nbytes] == raw(tensor), name


def refusal(path: Path, content: bytes) -> str:
    """The error of a file that must be refused: one line that names the file, soon."""
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read_header(path, 0)
    assert time.process_time() - started < 5, "hostile input must not buy time"
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message + caught.value.hint
    return message


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


# --- what torch.save writes -------------------------------------------------------------------------------------------


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    numbers = torch.arange(int(np.prod(shape))).reshape(shape)
    return numbers.to(torch.float32).to(dtype)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_is_found_where_torch_put_it(protocol: int, path: Path) -> None:
    tensors = {f"{name} {shape}": some(dtype, *shape) for dtype, name in DTYPES.items() for shape in [(5, 3), (7,)]}
    content = saved(tensors, pickle_protocol=protocol)
    check_located(path, content, tensors)


def test_scalars_empty_tensors_many_dimensions_and_long_numbers(path: Path) -> None:
    tensors = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "none of many": torch.zeros(70000, 0)}
    tensors |= {"six": some(torch.float32, 1, 2, 1, 3, 1, 2), "long": some(torch.int8, 70000)}
    check_located(path, saved(tensors), tensors)


def test_parameters_tied_tensors_and_views_of_one_storage(path: Path) -> None:
    table = some(torch.float32, 12, 5)
    parameter = torch.nn.Parameter(table)
    with_state = torch.nn.Parameter(some(torch.float16, 3, 3))
    with_state.tag = "kept by _rebuild_parameter_with_state"  # type: ignore[attr-defined]
    tensors = {"a": table, "tied": parameter, "rows": table[4:8], "flat": table.view(-1)[7:9], "s": with_state}
    tensors["one row of odd stride"] = some(torch.float32, 5, 1).T
    content = saved(OrderedDict(tensors))
    check_located(path, content, tensors)
    found = tensors_of(path, content)
    assert found["tied"].offset_bytes == found["a"].offset_bytes
    assert found["rows"].offset_bytes == found["a"].offset_bytes + 4 * 5 * 4


def test_a_modules_state_dict_with_its_metadata(path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    check_located(path, saved(module.state_dict()), module.state_dict())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_a_wrapped_state_dict_is_found_and_what_lies_beside_it_left_out(key: str, path: Path) -> None:
    tensors = {"a": some(torch.float32, 2, 3), "b": some(torch.bfloat16, 4)}
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(9)}}, "param_groups": [{"lr": 1e-3}]}
    beside = {"epoch": 3, "loss": torch.tensor(0.5), "optimizer": optimizer, "name": "x", "best": None, "on": True}
    check_located(path, saved({**beside, key: tensors | {"step": 7}}), tensors)


def test_an_archive_that_another_zip_writer_wrote_unaligned_and_without_byteorder(path: Path) -> None:
    tensors = {"a": some(torch.float32, 5, 3), "b": some(torch.float64, 2)}
    source = zipfile.ZipFile(io.BytesIO(saved(tensors)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            if name != "archive/byteorder":
                target.writestr(name.replace("archive/", "odd/"), source.read(name))
    check_located(path, buffer.getvalue(), tensors)


def test_an_archive_whose_checksums_torch_was_told_not_to_compute(path: Path) -> None:
    set_crc32 = getattr(torch.serialization, "set_crc32_options", None)
    if set_crc32 is None:
        pytest.skip("this torch always computes checksums")
    set_crc32(False)
    try:
        content = saved({"a": some(torch.float32, 2)})
    finally:
        set_crc32(True)
    check_located(path, content, {"a": some(torch.float32, 2)})


def test_header_bytes_are_those_that_were_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(saved({"a": torch.zeros(100_000), "b": torch.zeros(3)}))
    read: list[int] = []
    read_at = stored_file._OpenFile.read_at

    def counting(file: stored_file._OpenFile, offset: int, nbytes: int) -> bytes:
        read.append(nbytes)
        return read_at(file, offset, nbytes)

    monkeypatch.setattr(stored_file._OpenFile, "read_at", counting)
    shard, _ = read_header(path, 0)
    assert shard.header_bytes == sum(read) < 3000
    assert (shard.nbytes, shard.path) == (path.stat().st_size, path)


# --- the same weights, the same digest --------------------------------------------------------------------------------


def torch_tensors(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    types = {name: dtype for dtype, name in DTYPES.items()}
    result = {}
    for name, tensor in tensors.items():
        each = stored(tensor)
        result[name] = torch.frombuffer(bytearray(each.content), dtype=types[each.dtype]).reshape(each.shape)
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """LLAMA's config, for a checkpoint to be written beside."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA.config))
    return folder


@pytest.fixture
def same(tmp_path: Path) -> llmfp.Fingerprint:
    """The fingerprint of the same weights from safetensors."""
    return llmfp.scan(LLAMA.write(tmp_path / "safetensors"), backend=BACKEND)


def header_bytes(folder: Path) -> int:
    return sum(shard.header_bytes for shard in open_checkpoint(folder).shards)


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], *, index: bool) -> None:
    weight_map = {}
    for number in range(2):
        part = {key: tensors[key] for key in list(tensors)[number::2]}
        name = f"pytorch_model-{number + 1:05d}-of-00002.bin"
        (folder / name).write_bytes(saved(part))
        weight_map |= dict.fromkeys(part, name)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LAYOUTS: dict[str, Callable[[Path, dict[str, torch.Tensor]], object]] = {
    "one file": lambda folder, tensors: (folder / "pytorch_model.bin").write_bytes(saved(tensors)),
    "an index": lambda folder, tensors: write_shards(folder, tensors, index=True),
    "numbered shards": lambda folder, tensors: write_shards(folder, tensors, index=False),
    "consolidated": lambda folder, tensors: (folder / "consolidated.00.pth").write_bytes(saved(tensors)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reader", ["pread", "auto"])
def test_a_directory_gives_the_digest_of_the_same_weights_as_safetensors(
    layout: str, reader: str, folder: Path, tmp_path: Path, same: llmfp.Fingerprint
) -> None:
    LAYOUTS[layout](folder, torch_tensors(LLAMA.tensors))
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth"):
        (folder / name).write_bytes(b"no weights")
    fingerprint = llmfp.scan(folder, backend=BACKEND, reader=reader)
    assert fingerprint.digest == same.digest
    assert fingerprint.run["bytes_read"] - header_bytes(folder) == same.run["bytes_read"] - header_bytes(
        tmp_path / "safetensors"
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_a_single_file_gives_that_digest_too(name: str, folder: Path, same: llmfp.Fingerprint) -> None:
    (folder / name).write_bytes(saved({"state_dict": torch_tensors(LLAMA.tensors)}))
    assert llmfp.scan(folder / name, backend=BACKEND).digest == same.digest


def test_safetensors_are_preferred_where_both_are_there(folder: Path) -> None:
    LLAMA.write(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert [shard.path.name for shard in open_checkpoint(folder).shards] == ["model.safetensors"]


def test_an_index_must_agree_with_its_shards(folder: Path) -> None:
    tensors = torch_tensors(LLAMA.tensors)
    write_shards(folder, tensors, index=True)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    for change, words in (
        ({"ghost": "pytorch_model-00001-of-00002.bin"}, "tensor 'ghost' is not in this shard"),
        ({Q: "../x.bin"}, "outside the directory"),
        ({Q: "x.safetensors"}, "not a .bin file"),
        ({Q: "pytorch_model-00003-of-00002.bin"}, f"missing shard, {INDEX} names it"),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | change}))
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(folder)
    (folder / INDEX).unlink()
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin: missing shard"):
        open_checkpoint(folder)


def test_parts_split_for_model_parallelism_are_refused(folder: Path) -> None:
    for number in range(2):
        (folder / f"consolidated.{number:02d}.pth").write_bytes(saved(torch_tensors(LLAMA.tensors)))
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: 2 parts .* model parallelism"):
        open_checkpoint(folder)


def test_a_tensor_out_of_c_order_is_refused_by_name_only_where_it_is_needed(
    folder: Path, same: llmfp.Fingerprint
) -> None:
    tensors = torch_tensors(LLAMA.tensors)
    transposed = tensors["lm_head.weight"].T.contiguous().T
    (folder / "pytorch_model.bin").write_bytes(saved(tensors | {"lm_head.weight": transposed}))
    assert llmfp.scan(folder, backend=BACKEND).digest == same.digest
    for odd in (tensors[Q].T.contiguous().T, tensors[Q][:, ::2], tensors[Q][:1].expand(32, 24)):
        (folder / "pytorch_model.bin").write_bytes(saved(tensors | {Q: odd}))
        with pytest.raises(EncodingError, match=rf"'{Q}' is stored as F32 with strides \[") as caught:
            llmfp.scan(folder, backend=BACKEND)
        assert ".contiguous()" in caught.value.hint


def test_a_tensor_whose_negation_torch_put_off_is_refused_by_name(folder: Path) -> None:
    tensors = torch_tensors(LLAMA.tensors)
    lazy = torch._neg_view(tensors[Q])
    assert lazy.is_neg()
    (folder / "pytorch_model.bin").write_bytes(saved(tensors | {Q: lazy}))
    with pytest.raises(EncodingError, match=rf"'{Q}' is stored as F32 still to be negated"):
        llmfp.scan(folder, backend=BACKEND)


# --- archives by hand -------------------------------------------------------------------------------------------------

Member = dict[str, Any]


def member(name: str | bytes, content: bytes, **fields: Any) -> Member:
    """A member as the directory and its local header have it; `central_` or `local_` before a field: only there."""
    name = name.encode() if isinstance(name, str) else name
    plain = {"name": name, "flags": 0, "method": 0, "crc": zlib.crc32(content), "packed": len(content)}
    return {**plain, "size": len(content), "extra": b"", "disk": 0, "after": b"", "content": content, **fields}


def field_of(each: Member, where: str, name: str) -> Any:
    return each.get(f"{where}_{name}", each[name])


def archive(members: Sequence[Member], tail: bytes = b"", **end: Any) -> bytes:
    """A zip without ZIP64 records, written as the APPNOTE has it; `end` replaces fields of the end record."""
    body, directory = b"", b""
    for each in members:
        local, central = functools.partial(field_of, each, "local"), functools.partial(field_of, each, "central")
        offset = each.get("offset", len(body))
        body += struct.pack(
            "<4s5H3L2H", b"PK\3\4", 0, local("flags"), local("method"), 0, 0, local("crc"), local("packed"),
            local("size"), len(local("name")), len(local("extra")),
        ) + local("name") + local("extra") + each["content"] + each["after"]  # fmt: skip
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 0, 0, central("flags"), central("method"), 0, 0, central("crc"),
            central("packed"), central("size"), len(central("name")), len(central("extra")), 0, each["disk"], 0, 0,
            offset,
        ) + central("name") + central("extra")  # fmt: skip
    fields = {"disk": 0, "first": 0, "here": len(members), "count": len(members)}
    fields |= {"nbytes": len(directory), "offset": len(body), "comment": 0, **end}
    return body + directory + tail + struct.pack("<4s4H2LH", b"PK\5\6", *fields.values())


class Call:
    """Pickled as a call of `function`, which pickling does not make."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.reduced = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.reduced


class PersistentId:
    def __init__(self, pid: object) -> None:
        self.pid = pid


class _Pickler(pickle.Pickler):
    def persistent_id(self, each: object) -> object:
        return each.pid if isinstance(each, PersistentId) else None


def pickled(what: object, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol).dump(what)
    return buffer.getvalue()


SIX = np.arange(6, dtype="<f4").tobytes()


def storage(kind: object = torch.FloatStorage, key: object = "0", numel: object = 6) -> PersistentId:
    return PersistentId(("storage", kind, key, "cpu", numel))


def tensor(
    base: object = None, offset: object = 0, size: object = (2, 3), stride: object = (3, 1), *more: object
) -> Call:
    args = base or storage(), offset, size, stride, False, OrderedDict(), *more
    return Call(torch._utils._rebuild_tensor_v2, *args)


def archive_of(data_pkl: bytes, **members: bytes) -> bytes:
    """An archive with that pickle and six floats as storage 0."""
    parts = {"data.pkl": data_pkl, "data/0": SIX, "byteorder": b"little", "version": b"3\n", **members}
    return archive([member(f"model/{name}", content) for name, content in parts.items()])


def test_the_archives_written_here_are_good(path: Path) -> None:
    """Else the refusals below would prove nothing."""
    content = archive_of(pickled({"a": tensor()}))
    check_located(path, content, {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3)})
    assert zipfile.ZipFile(path).testzip() is None
    assert torch.load(path, weights_only=True)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


CLAIMS: dict[str, tuple[Callable[[], object], str]] = {
    "a storage that is not there": (lambda: tensor(storage(key="1")), "tensor 'a': its storage is not in the archive"),
    "a storage outside the archive": (lambda: tensor(storage(key="../../x")), "not in the archive"),
    "a storage that is another member": (lambda: tensor(storage(key="../version")), "not in the archive"),
    "a storage key that is no text": (lambda: tensor(storage(key=0)), "not in the archive"),
    "a storage that is smaller than said": (lambda: tensor(storage(numel=7)), "should hold 28 bytes"),
    "a storage that is larger than said": (lambda: tensor(storage(numel=5)), "should hold 20 bytes"),
    "a storage of negative size": (lambda: tensor(storage(numel=-6)), "no valid size"),
    "a storage of 2^64 elements": (lambda: tensor(storage(numel=2**64)), "no valid size"),
    "a storage whose size is no number": (lambda: tensor(storage(numel="6")), "no valid size"),
    "a storage whose size is True": (lambda: tensor(storage(numel=True)), "no valid size"),
    "a tensor of more elements": (lambda: tensor(None, 0, (3, 3)), "reaches element 9 of a storage of 6"),
    "an offset beyond": (lambda: tensor(None, 1), "reaches element 7"),
    "a huge offset": (lambda: tensor(None, 2**70), "reaches element"),
    "a negative offset": (lambda: tensor(None, -1), "no natural numbers"),
    "an offset that is no number": (lambda: tensor(None, None), "no natural numbers"),
    "a negative size": (lambda: tensor(None, 0, (-2, -3)), "no natural numbers"),
    "a size of 2^63": (lambda: tensor(None, 0, (2**63, 0)), "no natural numbers"),
    "a size that is no tuple": (lambda: tensor(None, 0, [2, 3]), "no natural numbers"),
    "sizes without strides": (lambda: tensor(None, 0, (2, 3), (1,)), "no natural numbers"),
    "a negative stride": (lambda: tensor(None, 5, (2, 3), (-3, -1)), "no natural numbers"),
    "a stride beyond": (lambda: tensor(None, 0, (2, 3), (2**62, 1)), "reaches element"),
    "a thousand dimensions": (lambda: tensor(None, 0, (1,) * 1000, (1,) * 1000), "no natural numbers"),
    "an untyped storage": (lambda: tensor(storage(torch.UntypedStorage, numel=24)), "has a dtype"),
    "part of an element": (
        lambda: Call(
            torch._utils._rebuild_tensor_v3, storage(torch.UntypedStorage, numel=25), 0, (6,), (1,), False,
            OrderedDict(), torch.float32,
        ),
        "no whole number",
    ),
    "a dtype that is not its storage's": (
        lambda: Call(torch._utils._rebuild_tensor_v3, storage(), 0, (6,), (1,), False, OrderedDict(), torch.int32),
        "is I32 in a storage of F32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_pickle_that_claims_what_the_archive_does_not_hold_is_refused_by_tensor(claim: str, path: Path) -> None:
    build_tensor, words = CLAIMS[claim]
    message = refusal(path, archive_of(pickled({"a": build_tensor()})))
    assert "tensor 'a'" in message
    assert words in message


def test_one_storage_cannot_hold_two_dtypes(path: Path) -> None:
    """Else one of two tensors at the same bytes would be read as the other's dtype."""
    untyped = storage(torch.UntypedStorage, numel=24)
    rebuild = functools.partial(Call, torch._utils._rebuild_tensor_v3, untyped, 0)
    more = False, OrderedDict()
    both = {"a": rebuild((6,), (1,), *more, torch.float32), "b": rebuild((12,), (1,), *more, torch.bfloat16)}
    assert "tensor 'b': is BF16 in a storage of F32" in refusal(path, archive_of(pickled(both)))
    mixed = {"a": tensor(), "b": tensor(storage(torch.IntStorage))}
    assert "tensor 'b': is I32 in a storage of F32" in refusal(path, archive_of(pickled(mixed)))


NO_STATE_DICTS: dict[str, tuple[Callable[[], object], str]] = {
    "a tensor": (tensor, "holds a tensor"),
    "a list": (lambda: [tensor()], "holds a list"),
    "nothing": (lambda: None, "holds a nonetype"),
    "no tensors": (lambda: {"epoch": 1, "lr": 0.1}, "no tensors at the top of what was saved (keys: 'epoch', 'lr')"),
    "tensors too deep": (lambda: {"model": {"encoder": {"a": tensor()}}}, "no tensors at the top"),
    "two models": (lambda: {"model": {"a": tensor()}, "state_dict": {"a": tensor()}}, "'model', 'state_dict' all hold"),
    "a tensor without a name": (lambda: {0: tensor()}, "a tensor is named by a int"),
}


@pytest.mark.parametrize("what", NO_STATE_DICTS)
def test_what_is_no_state_dict_is_refused(what: str, path: Path) -> None:
    build_saved, words = NO_STATE_DICTS[what]
    assert words in refusal(path, archive_of(pickled(build_saved())))


def test_a_tensor_that_is_there_twice_is_refused(path: Path) -> None:
    one = pickled({"a": tensor()})
    entry = one[one.index(b"X\1\0\0\0a") : one.rindex(b"s.")] + b"s"
    assert "tensor 'a' is there twice" in refusal(path, archive_of(one[:-1] + entry.replace(b"q\1", b"") + b"."))


# --- pickles that would run something ---------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<L", len(value.encode())) + value.encode()


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


EVIL: dict[str, tuple[Callable[[str], bytes], str]] = {
    "os.system by REDUCE": (lambda command: pickled({"a": Call(os.system, command)}), "posix.system"),
    "os.system by REDUCE, protocol 4": (lambda command: pickled({"a": Call(os.system, command)}, 4), "posix.system"),
    "builtins.eval": (lambda command: pickled(Call(eval, f"__import__('os').system({command!r})")), "eval"),
    "builtins.exec": (lambda command: pickled(Call(exec, f"import os; os.system({command!r})")), "exec"),
    "getattr of a module": (
        lambda command: b"\x80\x02cbuiltins\ngetattr\nctorch\nserialization\nX\2\0\0\0os\x86R\x85cbuiltins\ngetattr\n"
        b"ctorch.serialization\nos\nX\6\0\0\0system\x86R" + text(command) + b"\x85R.",
        "builtins.getattr",
    ),
    "a dotted name by GLOBAL": (
        lambda command: b"\x80\x04ctorch.serialization\nos.system\n" + text(command) + b"\x85R.",
        "torch.serialization.os.system",
    ),
    "a dotted name by STACK_GLOBAL": (
        lambda command: b"\x80\x04" + short("torch._utils") + short("sys.modules.__class__") + b"\x930"
        + short("torch.serialization") + short("os.system") + b"\x93" + text(command) + b"\x85R.",
        "torch._utils.sys.modules.__class__",
    ),
    "an admitted name with the dot elsewhere": (
        lambda command: b"\x80\x04ctorch\n_utils._rebuild_tensor_v2\n0ctorch\nserialization.os.system\n"
        + text(command) + b"\x85R.",
        "torch._utils._rebuild_tensor_v2",
    ),
    "INST": (lambda command: b"\x80\x02(" + text(command) + b"ios\nsystem\n.", "os.system"),
    "OBJ": (lambda command: b"\x80\x02(cos\nsystem\n" + text(command) + b"o.", "os.system"),
    "NEWOBJ": (
        lambda command: b"\x80\x02cfunctools\npartial\ncos\nsystem\n" + text(command) + b"\x86\x81)R.",
        "functools.partial",
    ),
    "NEWOBJ_EX": (
        lambda command: b"\x80\x04cfunctools\npartial\ncos\nsystem\n" + text(command) + b"\x86}\x92)R.",
        "functools.partial",
    ),
    "BUILD of a partial": (
        lambda command: b"\x80\2cfunctools\npartial\ncos\ngetpid\n\x85R(cos\nsystem\n" + text(command) + b"\x85}Ntb)R.",
        "functools.partial",
    ),
    "the extension registry": (lambda command: b"\x80\x02\x82\x77" + text(command) + b"\x85R.", "EXT1"),
    "torch.load": (lambda command: pickled({"a": Call(os.system, command), "b": torch.load}), "posix.system"),
}  # fmt: skip


@pytest.fixture
def extension() -> Iterator[None]:
    copyreg.add_extension("os", "system", 0x77)
    yield
    copyreg.remove_extension("os", "system", 0x77)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("evil", EVIL)
def test_a_pickle_that_runs_something_is_refused_by_name_and_not_run(evil: str, path: Path) -> None:
    canary = path.with_name("canary")
    make, name = EVIL[evil]
    data_pkl = make(f"touch {canary}")
    with contextlib.suppress(Exception):
        pickle.loads(data_pkl)
    assert canary.exists(), "this pickle does no harm"
    canary.unlink()
    message = refusal(path, archive_of(data_pkl))
    assert name in message
    assert "refused" in message
    assert main(["scan", str(path), "--backend", BACKEND]) == 2
    assert not canary.exists()


CALLED = {
    "a storage class": b"ctorch\nFloatStorage\n)R",
    "a dtype": b"ctorch\nfloat32\n)R",
    "what a call returned": b"ccollections\nOrderedDict\n)R)R",
    "a text": text("os.system") + b")R",
    "a storage": b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\6tQ)R",
    "OrderedDict with arguments": b"ccollections\nOrderedDict\n]\x85R",
    "a rebuild without a tensor": b"ctorch._utils\n_rebuild_parameter\nK\7\x88N\x87R",
    "a rebuild without a storage": b"ctorch._utils\n_rebuild_tensor\n(NNNNtR",
    "a rebuild with arguments that are no tuple": b"ctorch._utils\n_rebuild_tensor\n]R",
}


@pytest.mark.parametrize("what", CALLED)
def test_only_rebuilding_may_be_called(what: str, path: Path) -> None:
    message = refusal(path, archive_of(b"\x80\x02" + CALLED[what] + b"."))
    assert "a call of" in message or "unknown arguments" in message


@pytest.mark.parametrize(
    "pid",
    [
        7, "0", ("module", torch.FloatStorage, "0", "cpu", 6), ("storage", "FloatStorage", "0", "cpu", 6),
        ("storage", torch.FloatStorage, "0", "cpu"), ("storage", torch.float32, "0", "cpu", 6), (), (((),),),
        ("storage", OrderedDict, "0", "cpu", 6),
    ],
    ids=repr,
)  # fmt: skip
def test_a_persistent_id_that_is_no_storage_is_refused(pid: object, path: Path) -> None:
    assert "persistent id" in refusal(path, archive_of(pickled({"a": tensor(PersistentId(pid))})))


MISUSED = {
    "a memo entry out of turn": (b"Nr\2\0\0\0.", "memo entry 2 comes after 0 entries"),
    "a memo entry that is not there": (b"Nq\0h\1.", "memo entry 1 does not exist"),
    "a memo entry of nothing": (b"q\0.", "nothing is left"),
    "a pop past a mark": (b"NN(\x86.", "nothing is left"),
    "an end without a result": (b".", "nothing is left"),
    "a tuple without a mark": (b"Nt.", "no mark"),
    "attributes of a list": (b"]}b.", "BUILD"),
    "an item of a list": (b"]NNs.", "no dict"),
    "a key without a value": (b"}(Nu.", "no dict"),
    "an item appended to a dict": (b"}Na.", "no list"),
    "a global named by a number": (b"K\1K\2\x93.", "no text"),
    "a text that is not UTF-8": (b"\x8c\1\xff.", "not UTF-8"),
    "half a surrogate pair": (b"\x8c\3\xed\xa0\x80.", "not UTF-8"),
}


@pytest.mark.parametrize("what", MISUSED)
def test_a_malformed_pickle_is_refused(what: str, path: Path) -> None:
    data_pkl, words = MISUSED[what]
    assert words in refusal(path, archive_of(b"\x80\x02" + data_pkl))


ADMITTED = b"\x80\x95(N\x88\x89KMJ\x8aG\x8cXqr\x94hj)\x85\x86\x87t]ae}suc\x93QRb."


def test_every_other_opcode_is_refused_by_name(path: Path) -> None:
    names = {ord(op.code): op.name for op in pickletools.opcodes}
    for code in set(range(256)) - set(ADMITTED):
        message = refusal(path, archive_of(b"\x80\x02" + bytes([code]) + b"os\nsystem\n."))
        assert ("os.system" if code == ord("i") else f"opcode {names.get(code, f'0x{code:02x}')} ") in message


def nested(depth: int) -> bytes:
    return b")" + b"\x85" * depth


BOMBS: dict[str, Callable[[], bytes]] = {
    "a memo index of 2^32 - 1": lambda: b"Nr\xff\xff\xff\xff.",
    "a text of 2^32 - 1 bytes": lambda: b"X\xff\xff\xff\xffa.",
    "a long of 255 bytes": lambda: b"\x8a\xff" + b"\x7f" * 255 + b".",
    "tuples nested deep": lambda: nested(200_000) + b".",
    "such a tuple as a key": lambda: b"}" + nested(200_000) + b"Ns.",
    "such a tuple as a size": lambda: pickled({"a": tensor(None, 0, "here")}).replace(text("here"), nested(100_000)),
    "such a tuple as a storage's key": lambda: pickled({"a": tensor(storage(key="here"))}).replace(
        text("here"), nested(100_000)
    ),
    "lists in lists": lambda: b"](" * 100_000 + b"e" * 100_000 + b".",
    "many marks": lambda: b"(" * 100_000 + b".",
    "tuples that double": lambda: b")q\0" + b"h\0h\0\x86q\0" * 1000 + b".",
    "a dict that holds itself": lambda: b"}q\0" + text("model") + b"h\0s" + b"".join([text("model"), b"h\0s"]) + b".",
    "keys that all collide": lambda: b"}(" + b"".join(
        b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 30_000)
    ) + b"u.",
    "a name of a megabyte": lambda: b"c" + b"os" * 500_000 + b"\nsystem\n.",
    "a name without end": lambda: b"cos" * 100_000,
    "a refused name in bytes that are not UTF-8": lambda: b"c\xff\n\xfe\n.",
    "a pickle within": lambda: b"ctorch.storage\n_load_from_bytes\n" + text("x") + b"\x85R.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_cannot_buy_time_or_memory(bomb: str, path: Path) -> None:
    content = archive_of(b"\x80\x02" + BOMBS[bomb]().removeprefix(b"\x80\x02"))
    tracemalloc.start()
    try:
        message = refusal(path, content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(message) < 1000
    assert peak < 300 * len(content) + (1 << 20)


def test_a_pickle_of_too_many_opcodes_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_pickle, "MAX_OPCODES", 1000)
    assert "more than 1000 opcodes" in refusal(path, archive_of(b"\x80\x02" + b"N" * 1000 + b"."))


def test_too_many_tensors_or_members_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive_of(pickled({"a": tensor(), "b": tensor()}))
    monkeypatch.setattr(torch_archive, "_MAX_TENSORS", 1)
    assert "more than 1 tensors" in refusal(path, content)
    monkeypatch.setattr(stored_zip, "_MAX_MEMBERS", 3)
    assert "a directory of 4 members" in refusal(path, content)
    monkeypatch.setattr(stored_zip, "_MAX_DIRECTORY_BYTES", 100)
    assert "is over the limit" in refusal(path, archive([member("m/x", b"", extra=b"\2\0\x3c\0" + bytes(60))]))


def test_a_pickle_over_the_limit_is_refused_unread(path: Path) -> None:
    """A gigabyte of pickle costs nothing: its size is looked at first."""
    size = 1 << 30
    head = archive([member("m/data.pkl", b"", packed=size, size=size)])
    path.write_bytes(head[: 30 + 10])
    with path.open("r+b") as file:
        file.seek(40 + size)
        directory = head[40:-22]
        file.write(directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(directory), 40 + size, 0))
    with pytest.raises(CheckpointError, match=r"data\.pkl' has 1073741824 bytes, over the limit"):
        read_header(path, 0)


# --- archives that contradict themselves ------------------------------------------------------------------------------

GOOD = pickled({"a": tensor()})


def with_storage(**fields: Any) -> bytes:
    """A good archive but for its storage's member."""
    content = fields.pop("content", SIX)
    return archive([member("m/data.pkl", GOOD), member("m/data/0", content, **fields), member("m/version", b"3\n")])


def named(name: str | bytes) -> bytes:
    return archive([member("m/data.pkl", GOOD), member("m/data/0", SIX), member(name, b"x")])


def deflated(data: bytes) -> bytes:
    engine = zlib.compressobj(wbits=-15)
    return engine.compress(data) + engine.flush()


MALFORMED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "truncated"),
    "three bytes": (b"PK\3", "truncated"),
    "only a signature": (b"PK\3\4", "does not end in a zip directory"),
    "zeros": (bytes(1000), "not a PyTorch zip archive"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "not a PyTorch zip archive"),
    "a pickle from before 1.6": (saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False), "a plain pickle"),
    "a zip of something else": (archive([member("a.txt", b"x")]), "without one data.pkl"),
    "an empty zip": (b"PK\3\4" + archive([], offset=4), "without one data.pkl"),
    "two folders": (archive([member("a/data.pkl", GOOD), member("b/data/0", SIX)]), "without one data.pkl"),
    "no folder": (archive([member("data.pkl", GOOD), member("data/0", SIX)]), "without one data.pkl"),
    "TorchScript": (archive_of(GOOD, **{"constants.pkl": b"."}), "TorchScript"),
    "big-endian": (archive_of(GOOD, byteorder=b"big"), "byte order b'big'"),
    "an unknown byte order": (archive_of(GOOD, byteorder=b"x" * 17), "over the limit"),
    "an empty pickle": (archive_of(b""), "the pickle is truncated"),
    "a pickle without an end": (archive_of(GOOD[:-1]), "the pickle is truncated"),
    "a pickle with something behind it": (archive_of(GOOD + b"."), "left over"),
    "a pickle with something below": (archive_of(b"\x80\x02NN."), "left over"),
    "a pickle with a mark left": (archive_of(b"\x80\x02(N."), "left over"),
    "a pickle of protocol 1": (archive_of(b"\x80\x01N."), "protocol 1"),
    "a pickle of protocol 6": (archive_of(b"\x80\x06N."), "protocol 6"),
    "a damaged pickle": (
        archive([member("m/data.pkl", GOOD, crc=1), member("m/data/0", SIX)]), "data.pkl' does not match its checksum"
    ),
    "a compressed storage": (
        with_storage(content=deflated(SIX), method=8, size=24), "member 'm/data/0' is compressed"
    ),
    "a storage called stored that is smaller": (with_storage(content=SIX[:20], size=24), "stored in 20 bytes"),
    "a storage called stored that is larger": (with_storage(size=20), "stored in 24 bytes but holds 20"),
    "an encrypted storage": (with_storage(flags=1), "'m/data/0' is encrypted"),
    "a masked header": (with_storage(flags=0x2000), "'m/data/0' is encrypted"),
    "another local name": (with_storage(local_name=b"m/data/1"), "local header that contradicts"),
    "a longer local name": (with_storage(local_name=b"m/data/00"), "local header that contradicts"),
    "another local method": (with_storage(local_method=8), "local header that contradicts"),
    "other local flags": (with_storage(local_flags=1), "local header that contradicts"),
    "another local size": (with_storage(local_size=20), "has 20 bytes by its local header"),
    "another local packed size": (with_storage(local_packed=20), "has 20 bytes by its local header"),
    "no local size and no descriptor": (with_storage(local_size=0), "has 0 bytes by its local header"),
    "a hole behind a member": (with_storage(after=b"hole"), "does not end where the next one starts"),
    "no descriptor where one is announced": (with_storage(flags=8), "does not end where"),
    "a descriptor of odd size": (with_storage(flags=8, after=bytes(12)), "does not end where"),
    "a member that runs into the next": (with_storage(central_size=200, central_packed=200), "overlaps what follows"),
    "a member that runs out of the file": (with_storage(size=2**31, packed=2**31), "overlaps what follows"),
    "two members in one place": (with_storage(offset=0), "overlaps what follows"),
    "a member within another": (with_storage(offset=5), "overlaps what follows"),
    "a member in the directory": (with_storage(offset=430), "overlaps what follows"),
    "a member beyond the file": (with_storage(offset=2**32 - 2), "overlaps what follows"),
    "a member without its ZIP64 field": (with_storage(offset=2**32 - 1), "lacks its ZIP64 field"),
    "a member of 4 GiB without its ZIP64 field": (with_storage(size=2**32 - 1), "lacks its ZIP64 field"),
    "a short ZIP64 field": (with_storage(size=2**32 - 1, extra=b"\1\0\4\0" + bytes(4)), "lacks its ZIP64 field"),
    "a ZIP64 field beyond its entry": (with_storage(size=2**32 - 1, extra=b"\1\0\x08\0"), "lacks its ZIP64 field"),
    "a ZIP64 size of 2^64 - 1": (
        with_storage(size=2**32 - 1, packed=2**32 - 1, extra=b"\1\0\x10\0" + b"\xff" * 16), "overlaps what follows"
    ),
    "a member on another disk": (with_storage(disk=1), "several disks"),
    "something before the archive": (
        b"PK\3\4" + archive([member("m/data.pkl", GOOD, offset=4)], offset=44 + len(GOOD)), "4 bytes before the first"
    ),
    "a member that is there twice": (named("m/data/0"), "member 'm/data/0' is there twice"),
    "an absolute name": (named("/m/x"), "member '/m/x' has a name that leaves the archive"),
    "a name that leaves the archive": (named("m/../../x"), "leaves the archive"),
    "a name with a backslash": (named("m\\..\\x"), "leaves the archive"),
    "a name with a drive": (named("C:x"), "leaves the archive"),
    "an empty name": (named(""), "leaves the archive"),
    "a name with a NUL": (named("m/\0"), "leaves the archive"),
    "a name that is not UTF-8": (named(b"m/\xff"), "not UTF-8"),
    "a comment": (archive([member("m/data.pkl", GOOD)], comment=3) + b"abc", "does not end in a zip directory"),
    "a comment that is not there": (archive([member("m/data.pkl", GOOD)], comment=3), "end record is malformed"),
    "something behind the archive": (archive_of(GOOD) + b"x", "does not end in a zip directory"),
    "something behind the directory": (archive([member("m/data.pkl", GOOD)], b"x"), "does not end at"),
    "more members than there are": (archive([member("m/data.pkl", GOOD)], count=2, here=2), "ends before its last"),
    "fewer members than there are": (named("m/x").replace(b"\3\0\3\0", b"\2\0\2\0"), "belong to no member"),
    "members on another disk": (archive([member("m/data.pkl", GOOD)], here=0), "end record is malformed"),
    "a directory on another disk": (archive([member("m/data.pkl", GOOD)], disk=1, first=1), "end record is malformed"),
    "a directory elsewhere": (archive([member("m/data.pkl", GOOD)], offset=3), "does not end at"),
    "a directory of no bytes": (archive([member("m/data.pkl", GOOD)], nbytes=0), "does not end at"),
}  # fmt: skip


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_archive_is_refused(what: str, path: Path) -> None:
    content, words = MALFORMED[what]
    assert words in refusal(path, content)


def test_what_the_malformed_archives_are_made_from_is_good(path: Path) -> None:
    for content in (with_storage(), with_storage(flags=8, local_size=0, local_packed=0, after=bytes(16)), named("m/x")):
        assert list(tensors_of(path, content)) == ["a"]


def test_a_pipe_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.bin")
    for name, words in (("pipe.bin", "not a regular file"), (".", "not a regular file"), ("none.bin", "no such file")):
        with pytest.raises(CheckpointError, match=words):
            read_header(tmp_path / name, 0)


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    content = saved({"a": some(torch.float32, 2, 3), "b": some(torch.int64, 5)})
    path.write_bytes(content)
    for length in reversed(range(len(content))):
        os.truncate(path, length)
        with pytest.raises(CheckpointError):
            read_header(path, 0)


def structural_fields(content: bytes) -> Iterator[tuple[int, int]]:
    """(offset, width) of every number in the headers, directory and end records of an archive of torch.save's."""
    end = len(content) - 22
    records = [(end, (4, 2, 2, 2, 2, 4, 4, 2)), (end - 20, (4, 4, 8, 4)), (end - 76, (4, 8, 2, 2, 4, 4, 8, 8, 8, 8))]
    position = struct.unpack_from("<L", content, end + 16)[0]
    while content[position : position + 4] == b"PK\1\2":
        name, extra, comment, *_, local = struct.unpack_from("<3H2HLL", content, position + 28)
        records.append((position, (4, 2, 2, 2, 2, 2, 2, 4, 4, 4, 2, 2, 2, 2, 2, 4, 4)))
        records.append((local, (4, 2, 2, 2, 2, 2, 4, 4, 4, 2, 2)))
        position += 46 + name + extra + comment
    for start, widths in records:
        for width in widths:
            yield start, width
            start += width


def test_no_number_in_the_archives_structure_can_change_the_answer_unnoticed(path: Path) -> None:
    content = saved({"a": some(torch.float32, 2, 3), "b": some(torch.int64, 5)})
    expected = tensors_of(path, content)
    fields = list(structural_fields(content))
    assert len(fields) > 200
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for offset, width in fields:
            stored_as = content[offset : offset + width]
            old, top = int.from_bytes(stored_as, "little"), 1 << (8 * width)
            for new in {0, 1, old - 1, old + 1, old ^ 0x40, top >> 1, top - 1, top - old, old + 16, old - 8} - {old}:
                os.pwrite(file.fileno(), (new % top).to_bytes(width, "little"), offset)
                try:
                    assert {spec.name: spec for spec in read_header(path, 0)[1]} == expected, (offset, width, new)
                except CheckpointError:
                    refused += 1
            os.pwrite(file.fileno(), stored_as, offset)
    assert {spec.name: spec for spec in read_header(path, 0)[1]} == expected
    assert refused > len(fields)


SAMPLE = saved({"a": some(torch.float32, 2, 3), "b": torch.nn.Parameter(some(torch.bfloat16, 5))})


@pytest.mark.parametrize(
    ("from_end", "new"),
    [
        (98, b"PK\5\6"), (94, b"\x2d"), (82, b"\1"), (78, b"\1"), (74, b"\0"), (66, b"\0"), (58, b"\0"), (50, b"\0"),
        (34, b"\0"), (26, b"\2"), (12, b"\0"), (6, b"\0"),
    ],
)  # fmt: skip
def test_end_records_that_contradict_each_other_are_refused(from_end: int, new: bytes, path: Path) -> None:
    at = len(SAMPLE) - from_end
    assert SAMPLE[at : at + len(new)] != new
    message = refusal(path, SAMPLE[:at] + new + SAMPLE[at + len(new) :])
    assert "end records contradict each other" in message or "several disks" in message


def zip64(size: int, *, field: bytes = b"") -> tuple[bytes, bytes]:
    """(start, end) of an archive as torch writes it when a storage has `size` > 4 GiB bytes, which lie between them."""
    wide = struct.pack("<QQ", size, size)
    names = [b"m/data.pkl", b"m/data/0", b"m/version"]
    pkl = pickled({"a": tensor(storage(torch.ByteStorage, "0", size), size - 16, (4, 4), (4, 1))})
    zeros = bytes(12)
    descriptor = struct.pack("<4s3L", b"PK\7\x08", zlib.crc32(pkl), len(pkl), len(pkl))
    first = b"PK\3\4" + struct.pack("<HHH", 0, 8, 0) + bytes(4) + zeros + struct.pack("<HH", 10, 0) + names[0] + pkl
    second = b"PK\3\4" + struct.pack("<HHH", 0, 8, 0) + bytes(4) + zeros + struct.pack("<HH", 8, 20) + names[1]
    start = first + descriptor + second + struct.pack("<HH", 1, 16) + wide
    version_at = len(start) + size + 24
    extra = struct.pack("<HHQ", 1, 8, version_at)
    third = b"PK\3\4" + struct.pack("<HHH", 0, 8, 0) + bytes(4) + zeros + struct.pack("<HH", 9, len(extra)) + names[2]
    end = b"PK\7\x08" + bytes(4) + wide + third + extra + b"3\n" + b"PK\7\x08" + bytes(4) + struct.pack("<QQ", 2, 2)
    directory = b""
    for name, crc, nbytes, offset, more in (
        (names[0], zlib.crc32(pkl), len(pkl), 0, b""),
        (names[1], 0, 2**32 - 1, len(first + descriptor), field or struct.pack("<HH", 1, 16) + wide),
        (names[2], 0, 2, 2**32 - 1, extra),
    ):
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 0, 0, 8, 0, 0, 0, crc, nbytes, nbytes, len(name), len(more),
                                 0, 0, 0, 0, offset) + name + more  # fmt: skip
    at = len(start) + size + len(end)
    end += directory + struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 45, 0, 0, 3, 3, len(directory), at)
    end += struct.pack("<4sLQL", b"PK\6\7", 0, at + len(directory), 1)
    return start, end + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(directory), 2**32 - 1, 0)


def test_a_storage_of_more_than_4_gib_is_found(path: Path) -> None:
    """The file is sparse; its records are those that torch 2.13 wrote for a tensor of 2^32 + 2^20 bytes."""
    size = 2**32 + 2**20
    start, end = zip64(size)
    with path.open("wb") as file:
        file.write(start)
        file.seek(len(start) + size - 16)
        file.write(bytes(range(16)) + end)
    spec = read_header(path, 0)[1][0]
    assert (spec.name, spec.dtype, spec.shape, spec.nbytes) == ("a", "U8", (4, 4), 16)
    with path.open("rb") as file:
        file.seek(spec.offset_bytes)
        assert file.read(16) == bytes(range(16))
    assert zipfile.ZipFile(path).getinfo("m/data/0").file_size == size


# --- whatever the bytes are -------------------------------------------------------------------------------------------

REBUILT = GOOD[GOOD.index(b"ctorch._utils") : GOOD.rindex(b"s.")]
PIECES = [bytes([code]) for code in ADMITTED]
PIECES += [text(each) for each in ("a", "storage", "0", "cpu", "model")]
PIECES += [b"K\6", b"K\0", b"K\2K\3\x86", b"K\3K\1\x86", b"q\0", b"h\0", b"h\1", b"i", b"o", b"\x81", b"\xff"]
PIECES += [
    f"c{module}\n{name}\n".encode() for module, name in tensor_pickle._GLOBALS if "Float" in name or "re" in name
]
PIECES += [GOOD[2:-1], REBUILT, pickled({"model": {"a": tensor()}})[2:-1]]


def check_any(path: Path, content: bytes) -> None:
    """A result inside the file, or CheckpointError and nothing else."""
    try:
        specs = tensors_of(path, content).values()
    except CheckpointError:
        return
    for spec in specs:
        assert 0 <= spec.offset_bytes <= spec.offset_bytes + spec.nbytes <= len(content)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.bin"


@given(changes=st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_give_tensors_or_an_error(scratch: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(SAMPLE)
    for position, value in changes:
        content[position] = value
    check_any(scratch, bytes(content))


@given(start=st.integers(0, len(SAMPLE)), length=st.integers(0, 200), filling=st.binary(max_size=50))
def test_replaced_stretches_give_tensors_or_an_error(scratch: Path, start: int, length: int, filling: bytes) -> None:
    check_any(scratch, SAMPLE[:start] + filling + SAMPLE[start + length :])


@given(changes=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_pickles_with_changed_bytes_give_tensors_or_an_error(scratch: Path, changes: list[tuple[int, int]]) -> None:
    """With a true checksum, so that the unpickler sees them."""
    content = bytearray(GOOD)
    for position, value in changes:
        content[position] = value
    check_any(scratch, archive_of(bytes(content)))


@given(pieces=st.lists(st.sampled_from(PIECES), max_size=40))
@example(pieces=[b"}", text("a"), REBUILT, b"s"])
def test_pickles_of_any_opcodes_give_tensors_or_an_error(scratch: Path, pieces: list[bytes]) -> None:
    check_any(scratch, archive_of(b"\x80\x02" + b"".join(pieces) + b"."))


@given(content=st.binary(max_size=300))
def test_any_bytes_give_an_error(scratch: Path, content: bytes) -> None:
    check_any(scratch, content)
    check_any(scratch, b"PK\3\4" + content)
