"""GGUF: files that the gguf package writes, of every type it can write; and files that nobody should have written."""

from __future__ import annotations

import contextlib
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import llmfp
from llmfp import api
from llmfp.architecture import Rotary
from llmfp.architecture.families import families
from llmfp.checkpoint import open_checkpoint
from llmfp.encoding.ggml import TYPES
from llmfp.errors import LlmfpError
from llmfp.kernels import Backend
from llmfp.report import terminal
from tests.checkpoints import SPREAD

HIDDEN, HEADS, KV_HEADS = 256, 4, 2
CAN_WRITE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]


def weights(role: str, layer: int = 0, hidden: int = HIDDEN) -> NDArray[np.float32]:
    rng = np.random.default_rng([ord(role), layer])
    rows = hidden // 2 if role in "kv" else hidden
    return rng.normal(0.1, SPREAD[role] * (1 + layer / 10), (rows, hidden)).astype(np.float32)


def write(path: Path, tensors: dict[str, Any], architecture: str = "llama", *, split: int = 0, **metadata: Any) -> Path:
    """Tensors by name: arrays, or (raw bytes [rows, row bytes], type)."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_embedding_length(HIDDEN)
    writer.add_token_list(["<s>", "a", "b" * 1000])
    for key, value in metadata.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model(layers: int = 1) -> dict[str, Any]:
    tensors: dict[str, Any] = {"token_embd.weight": np.full((8, HIDDEN), 1e6, np.float32)}
    for layer in range(layers):
        for role, name in zip("qkvo", ("attn_q", "attn_k", "attn_v", "attn_output"), strict=True):
            tensors[f"blk.{layer}.{name}.weight"] = weights(role, layer)
        tensors[f"blk.{layer}.attn_norm.weight"] = np.linspace(0.5, 2, HIDDEN, dtype=np.float32)
        tensors[f"blk.{layer}.ffn_up.weight"] = np.full((4, HIDDEN), 1e6, np.float32)
    return tensors


def test_the_types_tested_are_all_that_the_package_writes() -> None:
    written = []
    for kind in gguf.GGMLQuantizationType:
        with contextlib.suppress(NotImplementedError, KeyError, ValueError):
            gguf.quantize(np.ones((1, 256), np.float32), kind)
            written.append(kind.name)
    assert sorted(written) == sorted(CAN_WRITE)


@pytest.mark.parametrize("kind", CAN_WRITE)
def test_every_type_the_package_writes_is_read_to_its_sigma(kind: str, tmp_path: Path, backend: Backend) -> None:
    as_type = gguf.GGMLQuantizationType[kind]
    tensors, truth = model(), {}
    for role, name in zip("qkvo", ("attn_q", "attn_k", "attn_v", "attn_output"), strict=True):
        stored = gguf.quantize(weights(role), as_type)
        truth[role] = np.asarray(gguf.dequantize(stored, as_type), np.float64)
        assert truth[role].std() == pytest.approx(weights(role).std(), rel=0.4)
        tensors[f"blk.0.{name}.weight"] = (stored, as_type)
    path = write(tmp_path / "model.gguf", tensors)
    found = llmfp.scan(path, backend=backend.name)
    for role in "qkvo":
        assert found.std[role] == [pytest.approx(truth[role].std(), rel=1e-6)], role
        assert found.mean[role] == [pytest.approx(truth[role].mean(), rel=1e-5)], role
        by_head = truth[role].T if role == "o" else truth[role]
        by_head = by_head.reshape(-1, HIDDEN // HEADS * by_head.shape[1])
        np.testing.assert_allclose(found.main.head_std(role)[0], by_head.std(axis=1), rtol=1e-6)
    assert (found.main.heads, found.main.kv_heads, found.main.hidden_size) == (HEADS, KV_HEADS, HIDDEN)
    planned = api.plan(path)
    words = kind if kind in ("F32", "F16", "BF16") else f"{kind}, blocks of"
    assert terminal.plan_table(planned).count(f".weight ({words}") == 4
    plan = planned.to_json()
    assert all((each["encoding"] is None) == (kind in ("F32", "F16", "BF16")) for each in plan["reads"])
    assert plan["bytes_read"] == found.run["bytes_read"]


def test_real_slices_are_read_to_the_package_s_values(tmp_path: Path, shared_data: Path) -> None:
    """Blocks of real quantised models; their expected values are the package's, in bf16."""
    paths = sorted((shared_data / "quantized_slices" / "gguf").glob("*.bin"))
    assert paths
    for path in paths:
        content = path.read_bytes()
        number, elements, raw_bytes, expected_bytes = struct.unpack_from("<4I", content)
        kind = gguf.GGMLQuantizationType(number)
        raw = np.frombuffer(content, np.uint8, raw_bytes, 16).reshape(1, -1)
        expected = np.frombuffer(content, "<u2", expected_bytes // 2, 16 + raw_bytes).astype(np.uint32) << 16
        truth = np.asarray(gguf.dequantize(raw, kind), np.float64)[0]
        assert truth.size == elements == expected.size
        np.testing.assert_allclose(truth, expected.view(np.float32), rtol=2**-8, atol=1e-30)
        block = TYPES[number][1]
        tensors = {
            f"blk.0.{name}.weight": (raw.reshape(elements // block, -1), kind)
            for name in ("attn_q", "attn_k", "attn_v")
        }
        tensors["blk.0.attn_output.weight"] = np.ones((block, elements // block), np.float32)
        found = llmfp.scan(write(tmp_path / f"{path.stem}.gguf", tensors, "qwen2"))
        assert found.std["q"] == [pytest.approx(truth.std(), rel=1e-6)], path.stem


def test_types_that_no_converter_writes_are_refused(tmp_path: Path) -> None:
    tensors = model() | {"blk.0.attn_q.weight": (np.zeros((HIDDEN, 40 * 8), np.uint8), gguf.GGMLQuantizationType.Q8_1)}
    with pytest.raises(LlmfpError, match=r"tensor 'blk\.0\.attn_q\.weight' is Q8_1, which no converter writes"):
        llmfp.scan(write(tmp_path / "model.gguf", tensors))


def test_a_split_file_is_one_model_by_any_of_its_parts(tmp_path: Path) -> None:
    whole = llmfp.scan(write(tmp_path / "whole.gguf", model(3)))
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "m.gguf", model(3), split=6)
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 2
    for source in (*parts, tmp_path / "parts"):
        found = llmfp.scan(source)
        assert found.digest == whole.digest
        assert len(found.source["files"]) == len(parts)
    parts[1].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(LlmfpError, match=r"m-00002-of-0000\d\.gguf: missing part \(1 of"):
        llmfp.scan(parts[0])
    (tmp_path / "elsewhere.gguf").rename(parts[1])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(LlmfpError, match=r"split\.no 1 of"):
        llmfp.scan(parts[0])
    lone = tmp_path / "lone.gguf"
    lone.write_bytes(parts[1].read_bytes())
    with pytest.raises(LlmfpError, match=r"lone\.gguf: split\.no 1 of"):
        llmfp.scan(lone)


def test_a_directory_of_several_models_asks_for_one(tmp_path: Path) -> None:
    for name in ("m-Q4_0.gguf", "m-Q8_0.gguf", "mmproj-f16.gguf"):
        write(tmp_path / name, model())
    with pytest.raises(LlmfpError, match=r"2 GGUF models in this directory: m-Q4_0\.gguf, m-Q8_0\.gguf$") as caught:
        llmfp.scan(tmp_path)
    assert "one of the files" in caught.value.hint
    (tmp_path / "m-Q8_0.gguf").unlink()
    assert llmfp.scan(tmp_path).digest == llmfp.scan(tmp_path / "m-Q4_0.gguf").digest


def test_a_large_vocabulary_costs_little_time_and_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token{n}" for n in range(300_000)])
    writer.add_token_scores([0.0] * 300_000)
    writer.add_tensor("blk.0.attn_q.weight", weights("q"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tracemalloc.start()
    open_checkpoint(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * path.stat().st_size + (16 << 20)


@pytest.mark.parametrize("family", [name for name in families() if name.startswith("gguf")])
def test_every_family_finds_its_projections(family: str, tmp_path: Path) -> None:
    """q, k, v, o at a σ of their own, apart or fused; what is beside them is not read."""
    found_family = families()[family]
    for architecture in sorted(found_family.model_types):
        assert architecture.removeprefix("gguf ") in gguf.MODEL_ARCH_NAMES.values()
    architecture = min(found_family.model_types).removeprefix("gguf ")
    tensors = {"token_embd.weight": np.full((8, HIDDEN), 1e6, np.float32)}
    blocks = {"gguf_t5": ["enc.blk.0.", "dec.blk.0.", "dec.blk.0.cross_"]}.get(family, ["blk.0."])
    for block in blocks:
        names = {"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_o" if "t5" in family else "attn_output": "o"}
        tensors |= {f"{block}{name}.weight": weights(role) for name, role in names.items()}
        norm = block + ("attn_output_norm" if family == "gguf_bert" else "attn_norm")
        tensors[f"{norm}.weight"] = np.ones(HIDDEN, np.float32)
    if family == "gguf_deepseek2":
        del tensors["blk.0.attn_k.weight"], tensors["blk.0.attn_v.weight"]
        tensors["blk.0.attn_kv_a_mqa.weight"] = weights("k")[:80]
        tensors["blk.0.attn_kv_b.weight"] = weights("v")[:, :64]
        tensors["blk.0.attn_q.weight"] = weights("q")[:128]  # 4 heads: 16 rows turned, 16 not, 16 values
        tensors["blk.0.attn_output.weight"] = weights("o")[:, :64]
    path = write(tmp_path / "model.gguf", tensors, architecture)
    found = llmfp.scan(path)
    assert found.architecture == family
    for tower in found.towers.values():
        kept = {role: weights(role) for role in "qkvo"}
        if family == "gguf_deepseek2":
            kept = {"q": kept["q"][:128], "o": kept["o"][:, :64]}
        for role, expected in kept.items():
            assert tower.std[role] == [pytest.approx(expected.std(dtype=np.float64), rel=1e-6)]
    assert len(found.towers) == len(blocks)
    if family in ("gguf", "gguf_layer_norm", "gguf_gemma2", "gguf_olmo2", "gguf_bert"):
        fused = np.concatenate([weights(role) for role in "qkv"])
        for role in "qkv":
            del tensors[f"blk.0.attn_{role}.weight"]
        tensors["blk.0.attn_qkv.weight"] = fused
        assert llmfp.scan(write(tmp_path / "fused.gguf", tensors, architecture)).std == found.std


@pytest.mark.parametrize("architecture", ["falcon", "gemma4", "plamo3", "modern-bert", "neo-bert", "nemotron_h"])
def test_norms_beside_attention_are_those_of_the_architecture(architecture: str, tmp_path: Path) -> None:
    """Falcon-40B's attention reads what attn_norm_2 puts out; the norm behind O is Gemma's and PLaMo's."""
    gains = {"attn_norm_2": 2.0} if architecture == "falcon" else {}
    behind = architecture in ("gemma4", "plamo3")
    gains |= {"post_attention_norm": 4.0} if behind else {}
    tensors = model()
    for name, gain in {"attn_norm": 0.5, **gains}.items():
        tensors[f"blk.0.{name}.weight"] = np.full(HIDDEN, gain, np.float32)
    found = llmfp.scan(write(tmp_path / "model.gguf", tensors, architecture)).main
    layer_norm = architecture in ("falcon", "modern-bert")
    for role, gain in (("q", 2.0 if architecture == "falcon" else 0.5), ("o", 4.0 if behind else 1.0)):
        read = gain * weights(role).astype(np.float64)
        axis = 1 if role == "o" else 0
        if layer_norm:
            read -= read.mean(axis=1 - axis, keepdims=True)
        expected = 0.5 * np.log(np.square(read).mean(axis=axis))
        np.testing.assert_allclose(found.residual(role)[0], expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(("architecture", "interleaved"), [("deepseek2", True), ("plm", True), ("minicpm3", False)])
def test_latent_attention_s_row_order_is_that_of_its_converter(
    architecture: str, interleaved: bool, tmp_path: Path
) -> None:
    """llama.cpp turns neighbours in deepseek2 and plm, halves in minicpm3."""
    names = {"attn_q": (128, 256), "attn_kv_a_mqa": (80, 256), "attn_kv_b": (128, 64), "attn_output": (256, 64)}
    tensors = {f"blk.0.{name}.weight": np.ones(shape, np.float32) for name, shape in names.items()}
    tensors["blk.0.attn_kv_a_norm.weight"] = np.full(64, 2, np.float32)
    found = llmfp.scan(write(tmp_path / "model.gguf", tensors, architecture)).main
    assert (found.heads, found.head_dim, found.rotary) == (4, 32, Rotary(8, interleaved))
    assert found.roles["kv_latent_norm"]["mean"] == [2]


def halved() -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float32]]:
    """A layer of latent attention as llama.cpp has it now, 4 heads of 32 + 16 rows and 24 values, and its kv_b."""
    rng, (heads, nope, value, latent) = np.random.default_rng(4), (4, 32, 24, 64)
    shapes = {"attn_q": (heads * (nope + 16), 256), "attn_kv_a_mqa": (latent + 16, 256), "attn_output": (256, 96)}
    tensors = {
        f"blk.0.{name}.weight": rng.normal(0.1, n + 1, shape).astype(np.float32)
        for n, (name, shape) in enumerate(shapes.items())
    }
    kv_b = rng.normal(0.5, 6, (heads, nope + value, latent)).astype(np.float32)
    kv_b[:, :nope] -= 3
    tensors["blk.0.attn_k_b.weight"] = np.ascontiguousarray(kv_b[:, :nope].transpose(0, 2, 1))
    tensors["blk.0.attn_v_b.weight"] = np.ascontiguousarray(kv_b[:, nope:])
    tensors["blk.0.attn_kv_a_norm.weight"] = np.full(latent, 2, np.float32)
    return tensors, kv_b.reshape(-1, latent)


def test_latent_attention_s_second_factor_in_two_tensors_is_one(tmp_path: Path) -> None:
    """llama.cpp's converter splits kv_b per head, and turns its keys' part over."""
    tensors, kv_b = halved()
    stored = write(tmp_path / "two.gguf", tensors, "deepseek2")
    whole = {name: tensor for name, tensor in tensors.items() if not name.endswith(("k_b.weight", "v_b.weight"))}
    plain = llmfp.scan(write(tmp_path / "one.gguf", {**whole, "blk.0.attn_kv_b.weight": kv_b}, "deepseek2")).main
    for deep in (False, True):
        found = llmfp.scan(stored, deep=deep)
        for key in ("std", "mean"):
            for role in ("kv_a", "kv_b", "kv_latent_norm"):
                assert found.main.roles[role][key] == pytest.approx(plain.roles[role][key], rel=1e-6), role
        assert found.main.roles["kv_b"]["std"] == pytest.approx([kv_b.std(dtype=np.float64)], rel=1e-6)
        assert set(found.main.roles) == set(plain.roles)
        assert (found.main.heads, found.main.head_dim, found.main.rotary) == (4, 48, plain.rotary)
        assert [caveat for caveat in found.caveats if "attn_k_b" in caveat] == [
            "kv_b is stored as attn_k_b and attn_v_b: its σ is that of both, nothing is kept of its heads"
        ]
    sampled = llmfp.scan(stored, sample=0.5).main
    ((low, high),) = sampled.interval["kv_b"]
    assert low < kv_b.std(dtype=np.float64) < high < 1.1 * low
    assert sampled.roles["kv_b"]["std"] == pytest.approx([kv_b.std(dtype=np.float64)], rel=0.1)
    found.save(tmp_path / "two.fp.safetensors")
    assert llmfp.load(tmp_path / "two.fp.safetensors") == found
    both = llmfp.scan(write(tmp_path / "both.gguf", {**tensors, "blk.0.attn_kv_b.weight": kv_b}, "deepseek2"))
    assert both.main.roles == plain.roles
    assert not any("attn_k_b" in caveat for caveat in both.caveats)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"attn_v_b": None}, "attn_k_b.weight' is half of kv_b, and v_b is missing"),
        ({"attn_k_b": None}, "attn_v_b.weight' is half of kv_b, and k_b is missing"),
        ({"attn_v_b": (4, 24, 32)}, "attn_v_b.weight' does not fit the other factors"),
        ({"attn_k_b": (3, 64, 32)}, "attn_v_b.weight' does not fit the other factors"),
        ({"attn_k_b": (2, 2, 64, 32)}, "attn_k_b.weight' has shape [2, 2, 64, 32]"),
    ],
)
def test_halves_that_do_not_belong_together_are_refused(
    changed: dict[str, tuple[int, ...] | None], words: str, tmp_path: Path
) -> None:
    tensors, _ = halved()
    for name, shape in changed.items():
        del tensors[f"blk.0.{name}.weight"]
        if shape is not None:
            tensors[f"blk.0.{name}.weight"] = np.ones(shape, np.float32)
    with pytest.raises(LlmfpError) as caught:
        llmfp.scan(write(tmp_path / "x.gguf", tensors, "deepseek2"))
    assert words in str(caught.value)


def test_llama_s_row_order_is_recorded(tmp_path: Path) -> None:
    for architecture, interleaved in (("llama", True), ("qwen2", False)):
        found = llmfp.scan(write(tmp_path / f"{architecture}.gguf", model(), architecture))
        assert found.main.rotary is not None
        assert found.main.rotary.interleaved is interleaved
        assert not found.caveats


# --- files nobody should have written --------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


class Forged:
    """A GGUF file in pieces, each of which a test may replace."""

    def __init__(self) -> None:
        self.pieces: list[tuple[str, bytes]] = [
            ("magic", b"GGUF"),
            ("version", struct.pack("<I", 3)),
            ("tensor count", struct.pack("<Q", 4)),
            ("pair count", struct.pack("<Q", 4)),
            ("key length", struct.pack("<Q", 20)),
            ("key", b"general.architecture"),
            ("value type", struct.pack("<I", 8)),
            ("string length", struct.pack("<Q", 5)),
            ("string", b"llama"),
            ("alignment", text("general.alignment") + struct.pack("<I", 4)),
            ("alignment value", struct.pack("<I", 32)),
            ("array", text("tokens") + struct.pack("<I", 9)),
            ("array item type", struct.pack("<I", 8)),
            ("array length", struct.pack("<Q", 2)),
            ("first string length", struct.pack("<Q", 1)),
            ("strings", b"a" + text("bc")),
            ("numbers", text("scores") + struct.pack("<I", 9) + struct.pack("<I", 6)),
            ("numbers length", struct.pack("<Q", 2)),
            ("number values", bytes(8)),
        ]
        for number, role in enumerate("qkvo"):
            name = f"blk.0.attn_{role if role != 'o' else 'output'}.weight"
            self.pieces += [
                (f"{role} name length", struct.pack("<Q", len(name))),
                (f"{role} name", name.encode()),
                (f"{role} rank", struct.pack("<I", 2)),
                (f"{role} cols", struct.pack("<Q", 32)),
                (f"{role} rows", struct.pack("<Q", 32)),
                (f"{role} type", struct.pack("<I", 8)),
                (f"{role} offset", struct.pack("<Q", 1088 * number)),
            ]
        header = sum(len(piece) for _, piece in self.pieces)
        self.pieces.append(("data", bytes(-header % 32) + np.tile([0, 60, *range(32)], 32 * 4).astype("u1").tobytes()))

    def bytes(self, **changes: bytes) -> bytes:
        named = {key.replace("_", " "): value for key, value in changes.items()}
        return b"".join(named.get(name, piece) for name, piece in self.pieces)


def refused(path: Path, content: bytes) -> str | None:
    """The error's words, or None for a file that is read; within 2 s and without much memory either way."""
    path.write_bytes(content)
    start = time.monotonic()
    try:
        llmfp.scan(path)
    except LlmfpError as error:
        message = str(error)
    else:
        message = ""
    assert time.monotonic() - start < 2
    assert "\n" not in message
    assert len(message) < 600
    return message or None


def test_the_forged_file_is_a_good_one_before_it_is_broken(tmp_path: Path) -> None:
    assert refused(tmp_path / "x.gguf", Forged().bytes()) is None


ENDS = ("count", "length", "rows", "cols", "offset", "rank")
NUMBERS = [name for name, _ in Forged().pieces if name.endswith(ENDS)]
STILL_GOOD = {("tensor count", 1), ("tensor count", 3), ("o rows", 1), ("o rows", 3)}


@pytest.mark.parametrize("value", [0, 1, 3, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1])
@pytest.mark.parametrize("field", NUMBERS)
def test_no_length_is_believed(field: str, value: int, tmp_path: Path) -> None:
    size = len(dict(Forged().pieces)[field])
    packed = (value % 2 ** (8 * size)).to_bytes(size, "little")
    if packed == dict(Forged().pieces)[field]:
        return
    message = refused(tmp_path / "x.gguf", Forged().bytes(**{field.replace(" ", "_"): packed}))
    if (field, value) in STILL_GOOD:
        assert message is None
    else:
        assert message is not None
        assert "x.gguf" in message


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    whole, at = Forged().bytes(), 0
    for _, piece in Forged().pieces:
        for cut in {at, at + len(piece) // 2, at + len(piece) - 1}:
            message = refused(tmp_path / "x.gguf", whole[:cut])
            assert message is not None
            assert "x.gguf" in message
        at += len(piece)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"magic": b"GGML"}, "not a GGUF file"),
        ({"magic": b"\x1b[2J"}, "not a GGUF file"),
        ({"version": struct.pack("<I", 1)}, "version 1"),
        ({"version": struct.pack(">I", 3)}, "big-endian"),
        ({"version": struct.pack("<I", 4)}, "version 4"),
        ({"value type": struct.pack("<I", 13)}, "unknown type 13"),
        ({"array item type": struct.pack("<I", 9)}, "array of the unknown type 9"),
        ({"alignment value": struct.pack("<I", 0)}, "general.alignment is 0"),
        ({"alignment value": struct.pack("<I", 48)}, "general.alignment is 48"),
        ({"alignment value": struct.pack("<I", 2**31)}, "general.alignment"),
        ({"alignment": text("general.architectur") + struct.pack("<I", 4)}, None),
        ({"key": b"general.architectur\xff"}, "not UTF-8"),
        ({"key": b"general.architectur\0"}, "NUL"),
        ({"array": text("general.architecture") + struct.pack("<I", 9)}, "appears twice"),
        ({"q name": b"blk.0.attn_k.weight"}, "appears twice"),
        ({"q name": b"blk.0.attn_\xc3\x28.weight"[:19]}, "not UTF-8"),
        ({"q type": struct.pack("<I", 31)}, "removed type Q4_0_4_4"),
        ({"q type": struct.pack("<I", 99)}, "unknown type number 99"),
        ({"q type": struct.pack("<I", 12)}, "no whole blocks of 256"),
        ({"q rank": struct.pack("<I", 5)}, "5 dimensions"),
        ({"q cols": struct.pack("<Q", 33)}, "no whole blocks of 32"),
        ({"q offset": struct.pack("<Q", 16)}, "not a multiple of the alignment"),
        ({"q offset": struct.pack("<Q", 1088)}, "overlap"),
        ({"q offset": struct.pack("<Q", 2**64 - 32)}, "ends at byte"),
        ({"q rows": struct.pack("<Q", 0)}, "no elements"),
        ({"q rows": struct.pack("<Q", 2**62)}, "more than any file holds"),
    ],
)
def test_each_malformation_is_named(changes: dict[str, bytes], words: str | None, tmp_path: Path) -> None:
    message = refused(tmp_path / "x.gguf", Forged().bytes(**{k.replace(" ", "_"): v for k, v in changes.items()}))
    if words is None:
        assert message is None
        return
    assert message is not None
    assert words in message
    assert "\x1b" not in message


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    """10,000 files would take a minute: `make fuzz` goes on from here."""
    rng, whole = np.random.default_rng(0), np.frombuffer(Forged().bytes(), np.uint8)
    header = len(whole) - 32 * 4 * 34
    for _ in range(400):
        damaged = whole.copy()
        where = rng.integers(0, header, rng.integers(1, 6))
        damaged[where] = rng.integers(0, 256, where.size)
        refused(tmp_path / "x.gguf", damaged.tobytes())
