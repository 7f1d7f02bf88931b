"""The same checkpoint gives bit-identical numbers whatever the threads, the budget, the reader and the shard split;
memory stays under the budget; every byte of attention is read once and no other weight byte is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmfp import api, engine
from llmfp.api import scan
from llmfp.errors import CheckpointError, PlanError
from llmfp.kernels import Backend, load
from llmfp.plan import parse_size
from tests.checkpoints import Stored, as_bf16, write_model

Tensors = dict[str, Stored]
MEBIBYTE = 1 << 20
CONFIG = {"num_attention_heads": 11, "model_type": "llama"}


def llama(layers: int, hidden: int, kv: int, seed: int = 0) -> Tensors:
    """A Llama-shaped bf16 checkpoint, with MLP weights that nobody should read."""
    rng = np.random.default_rng(seed)
    shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    tensors: Tensors = {}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for number, (role, shape) in enumerate(shapes.items(), 1):
            drawn = rng.standard_normal(shape, np.float32) * np.float32(0.01 * number)
            tensors[f"{block}.self_attn.{role}_proj.weight"] = as_bf16(drawn)
        tensors[f"{block}.input_layernorm.weight"] = as_bf16(rng.uniform(0.5, 2, hidden))
        tensors[f"{block}.mlp.up_proj.weight"] = as_bf16(rng.standard_normal((64, hidden), np.float32))
    return tensors


def decoded(stored: Stored) -> NDArray[np.float64]:
    bits = np.frombuffer(stored.content, np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).astype(np.float64).reshape(stored.shape)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return llama(layers=3, hidden=1056, kv=96)


@pytest.fixture(scope="module")
def checkpoint(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), tensors, CONFIG)


@pytest.mark.parametrize("reader", ["mmap", "pread"])
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("memory", ["96MiB", "4GiB"])
def test_digest_does_not_depend_on_how_it_was_read(
    checkpoint: Path, backend: Backend, reader: str, threads: int, memory: str
) -> None:
    if backend.name == "triton_gpu":
        pytest.skip("a scan under the interpreter takes minutes; its kernels are tested by themselves")
    budget = parse_size(memory) + backend.library_bytes
    once = scan(checkpoint, backend=backend.name, reader="pread", threads=1)
    again = scan(checkpoint, backend=backend.name, reader=reader, threads=threads, memory_bytes=budget)
    assert again.digest == once.digest
    assert again.towers == once.towers


def test_digest_does_not_depend_on_the_shard_split(checkpoint: Path, tensors: Tensors, tmp_path: Path) -> None:
    split = write_model(tmp_path, tensors, CONFIG, shards=3)
    indexed = scan(split)
    (split / "model.safetensors.index.json").unlink()
    assert scan(split).digest == indexed.digest == scan(checkpoint).digest


def test_every_attention_byte_is_read_once_and_no_other(
    checkpoint: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[int] = []
    preadv = os.preadv

    def counted(*arguments: Any) -> int:
        got.append(preadv(*arguments))
        return got[-1]

    monkeypatch.setattr(os, "preadv", counted)
    fingerprint = scan(checkpoint, reader="pread")
    wanted = sum(len(t.content) for name, t in tensors.items() if "self_attn" in name or "layernorm" in name)
    header = 8 + int.from_bytes((checkpoint / "model.safetensors").read_bytes()[:8], "little")
    assert sum(got) == wanted
    assert fingerprint.run["bytes_read"] == wanted + header


def test_statistics_equal_a_plain_computation(checkpoint: Path, tensors: Tensors, backend: Backend) -> None:
    if backend.name == "triton_gpu":
        pytest.skip("a scan under the interpreter takes minutes; its kernels are tested by themselves")
    fingerprint = scan(checkpoint, backend=backend.name)
    heads = fingerprint.main.head_std("k")
    for layer in range(3):
        block = f"model.layers.{layer}"
        for role in "qkvo":
            w = decoded(tensors[f"{block}.self_attn.{role}_proj.weight"])
            kept = fingerprint.main.statistics[role][layer]
            assert kept is not None
            assert kept.std == pytest.approx(w.std(), rel=1e-6)
            assert kept.mean == pytest.approx(w.mean(), abs=1e-6 * w.std())
            assert kept.abs_max == np.abs(w).max()
            assert kept.count == w.size
            if role == "k":
                assert heads[layer] == pytest.approx([w[:96].std()], rel=1e-6)


def test_memory_stays_under_the_budget_on_a_checkpoint_several_times_larger(tmp_path: Path) -> None:
    """The contract: peak resident set minus that of `plan` on the same source, with 6 MiB of measurement slack."""
    path = write_model(tmp_path, llama(layers=8, hidden=2560, kv=512), CONFIG | {"num_attention_heads": 20})
    stored = (path / "model.safetensors").stat().st_size
    budget = 32 * MEBIBYTE
    assert stored > 6 * budget
    planned = peak_of("plan", str(path), "--memory", "32MiB")
    for reader in ("mmap", "pread"):
        scanned = peak_of("scan", str(path), "--memory", "32MiB", "--reader", reader)
        assert scanned - planned <= budget + 6 * MEBIBYTE, reader


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """Neither statistics of layers that are done may stay, nor pages mapped along with a layer's weights."""
    # One thread: with several, how much is mapped along at once depends on when they meet.
    options = ("--memory", "24MiB", "--reader", "mmap", "--threads", "1")
    above = {}
    for layers in (8, 96):
        path = write_model(tmp_path / str(layers), between_others(layers), CONFIG | {"num_attention_heads": 8})
        read_into_the_page_cache(path / "model.safetensors")
        above[layers] = peak_of("scan", str(path), *options) - peak_of("plan", str(path), *options)
    assert above[96] - above[8] <= 4 * MEBIBYTE, above


def between_others(layers: int) -> Tensors:
    """Two MiB of attention weights a layer, each between six MiB that nobody reads."""
    tensors = llama(layers, hidden=512, kv=512)
    for layer in range(layers):
        others = Stored("U8", (6 * MEBIBYTE,), bytes(6 * MEBIBYTE))
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = others
    return dict(sorted(tensors.items()))


def read_into_the_page_cache(path: Path) -> None:
    """Reading ahead fills the cache with large folios, which writing need not."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(8 * MEBIBYTE):
            pass


def peak_of(*arguments: str) -> int:
    """Peak resident bytes of one command in a process of its own, as the kernel counted them."""
    program = (
        "import sys; from llmfp.__main__ import main; code = main(sys.argv[1:]);"
        "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return int(done.stderr.split()[-2]) * 1024


def test_a_budget_too_small_is_refused_before_reading_and_names_the_tensor(checkpoint: Path) -> None:
    with pytest.raises(PlanError, match=r"tensor 'model\.layers\.\d\.self_attn\.[qo]_proj\.weight' needs .* MiB|MiB"):
        scan(checkpoint, memory_bytes=4 * MEBIBYTE)


def test_the_budget_that_the_refusal_asks_for_is_enough(checkpoint: Path) -> None:
    with pytest.raises(PlanError) as refused:
        scan(checkpoint, memory_bytes=1)
    needed = refused.value.hint.split()[3]
    assert scan(checkpoint, memory_bytes=parse_size(needed)).digest == scan(checkpoint).digest


@pytest.mark.parametrize("reader", ["mmap", "pread"])
def test_a_file_that_shrinks_while_it_is_read_is_an_error_that_names_it(
    tensors: Tensors, tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path, tensors, CONFIG)
    shrink_after_first_step(path / "model.safetensors", monkeypatch)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (tensor '.*' could not be read|the file changed)"):
        scan(path, reader=reader, threads=1)


@pytest.mark.parametrize("reader", ["mmap", "pread"])
def test_a_file_rewritten_while_it_is_read_is_an_error_that_names_it(
    tensors: Tensors, tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path, tensors, CONFIG)
    file = path / "model.safetensors"
    take = engine._Scan._take

    def take_and_touch(self: engine._Scan) -> int | None:
        os.utime(file, ns=(1, 1))
        return take(self)

    monkeypatch.setattr(engine._Scan, "_take", take_and_touch)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file changed"):
        scan(path, reader=reader)


def shrink_after_first_step(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, calls = engine._Scan._take, iter(range(1000))

    def take_and_truncate(self: engine._Scan) -> int | None:
        if next(calls) == 1:
            os.truncate(file, 4096)
        return take(self)

    monkeypatch.setattr(engine._Scan, "_take", take_and_truncate)


def test_non_finite_values_null_the_std_with_a_caveat_and_nothing_else(tensors: Tensors, tmp_path: Path) -> None:
    broken = dict(tensors)
    name = "model.layers.1.self_attn.v_proj.weight"
    bits = np.frombuffer(tensors[name].content, np.uint16).reshape(tensors[name].shape).copy()
    bits[5, 7], bits[90, 1000] = 0x7FC0, 0x7F80
    broken[name] = Stored("BF16", bits.shape, bits.tobytes())
    fingerprint = scan(write_model(tmp_path, broken, CONFIG))
    assert fingerprint.std["v"][1] is None
    assert fingerprint.mean["v"][1] is None
    kept = fingerprint.main.statistics["v"][1]
    assert kept is not None
    assert kept.nonfinite == 2
    assert any(name in caveat and "2 non-finite" in caveat for caveat in fingerprint.caveats)
    assert [s is None for s in fingerprint.std["v"]] == [False, True, False]
    assert None not in fingerprint.std["q"]


def test_values_whose_squares_overflow_null_the_std_with_a_caveat(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(32, 32))
    names = [f"model.layers.0.self_attn.{role}_proj.weight" for role in "qkvo"]
    fingerprint = scan(write_model(tmp_path, {names[0]: x * 1e200} | dict.fromkeys(names[1:], x)))
    assert fingerprint.std["q"] == [None]
    assert fingerprint.std["k"] == [pytest.approx(x.std())]
    assert any(names[0] in caveat and "too large" in caveat for caveat in fingerprint.caveats)


def test_an_interrupt_stops_the_workers_and_comes_through(checkpoint: Path) -> None:
    seen: list[Any] = []

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    class Slow(type(load("reference"))):  # type: ignore[misc]
        """Holds every chunk until the main thread has been interrupted."""

        def marginals(self, chunk: Any) -> Any:
            seen.extend([chunk] if chunk.rows > 1 else [])  # not the gains
            stopping.wait_until_stopped()
            return super().marginals(chunk)

    class Stopping:
        scan: engine._Scan | None = None

        def wait_until_stopped(self) -> None:
            while self.scan is not None and not self.scan.stop:
                pass

    stopping = Stopping()
    original = engine._Scan.__init__

    def remember(self: engine._Scan, *arguments: Any) -> None:
        original(self, *arguments)
        stopping.scan = self

    slow = Slow()
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(engine._Scan, "__init__", remember)
        context.setattr(api, "select", lambda _name: slow)
        with pytest.raises(KeyboardInterrupt):
            scan(checkpoint, reader="pread", threads=2, progress=interrupt)
    assert len(seen) <= 2


def test_progress_reaches_the_total(checkpoint: Path) -> None:
    calls: list[tuple[int, int]] = []
    scan(checkpoint, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] > 0
    assert calls == sorted(calls)
