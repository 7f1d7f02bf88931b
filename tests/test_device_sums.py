"""Invariants: sums stay on their device until there is too much of them or they are wanted, and then come back in one
copy; no worker waits for a device in between; a model that lies on a device is reduced in a handful of launches; and
none of this changes a bit. The device here does nothing before somebody waits for it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import llmfp
from llmfp import api, device, engine
from llmfp.architecture import match
from llmfp.checkpoint import open_checkpoint
from llmfp.device_sums import DeviceSums, SumsRoom
from llmfp.errors import BackendError
from llmfp.kernels import Deferring, triton_gpu
from llmfp.kernels.torch_fallback import TorchFallback
from llmfp.marginals import Chunk, Marginals
from llmfp.plan import make_plan
from llmfp.reader.pread_reader import PreadReader
from llmfp.reader.staging import StagedReader
from tests.checkpoints import build
from tests.test_column_runs import twins
from tests.test_triton_gpu import _load_kernels, chunk_of, launches

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
KEPT = 100
"""Bytes that the sums of a chunk take on the lazy device."""


@dataclass
class Event:
    """The end of what a stream had been given by then."""

    stream: list[Callable[[], None]]
    stop: int


class LazyDevice:
    """Two streams whose work is done when somebody waits for its end, and not before.

    It is a Link and a back end in one. `waited` holds the names of the threads that waited, `fetched` how many launches
    came back each time. A copy that was not waited for leaves 0xEE in its room, so a kernel that overtakes it is seen.
    """

    def __init__(self) -> None:
        self.name = "lazy"
        self.waited: list[str] = []
        self.fetched: list[int] = []
        self.launched: list[int] = []
        self.inner = TorchFallback()
        self.copies: list[Callable[[], None]] = []
        self.kernels: list[Callable[[], None]] = []
        self.done = {id(self.copies): 0, id(self.kernels): 0}
        self.lock = threading.RLock()

    def put(self, stream: list[Callable[[], None]], work: Callable[[], None]) -> Event:
        with self.lock:
            stream.append(work)
            return Event(stream, len(stream))

    def happen(self, event: Event) -> None:
        with self.lock:
            while self.done[id(event.stream)] < event.stop:
                work = event.stream[self.done[id(event.stream)]]
                work()
                self.done[id(event.stream)] += 1

    # What a ring asks of the way to it.

    def host(self, nbytes: int) -> Any:
        return torch.empty(nbytes, dtype=torch.uint8)

    def room(self, nbytes: int) -> Any:
        return torch.full((nbytes,), 0xEE, dtype=torch.uint8)

    def copy(self, host: Any, room: Any, after: Event | None) -> Event:
        def work() -> None:
            if after is not None:
                self.happen(after)
            room.copy_(host)

        return self.put(self.copies, work)

    def wait(self, token: Event) -> None:
        self.put(self.kernels, lambda: self.happen(token))

    def mark(self) -> Event:
        with self.lock:
            return Event(self.kernels, len(self.kernels))

    def settle(self, token: Event | None) -> None:
        if token is not None:
            self.waited.append(threading.current_thread().name)
            self.happen(token)


class Lazy(TorchFallback):
    """The back end of a lazy device, or of several, that launches on the one whose room a chunk lies in."""

    def __init__(self, lazy: LazyDevice) -> None:
        super().__init__()
        self.lazy = lazy

    def marginals(self, chunk: Chunk) -> Marginals:  # noqa: ARG002
        raise AssertionError("a step was waited for")

    def device_bytes(self, chunk: Chunk) -> tuple[int, int]:  # noqa: ARG002
        return 2 * KEPT, KEPT

    def launch(self, chunks: Sequence[Chunk]) -> Any:
        found: list[Marginals] = []
        chunks = list(chunks)
        self.lazy.launched.append(len(chunks))
        self.lazy.put(self.lazy.kernels, lambda: found.extend(map(super(Lazy, self).marginals, chunks)))
        return SimpleNamespace(device="lazy", found=found)

    def fetch(self, launched: Sequence[Any]) -> list[list[Marginals]]:
        self.lazy.fetched.append(len(launched))
        self.lazy.happen(self.lazy.mark())
        return [each.found for each in launched]


class Patient(Lazy):
    """One that is asked for some chunks at once, and waits for its device first."""

    def marginals(self, chunk: Chunk) -> Marginals:
        self.lazy.happen(self.lazy.mark())
        return super(Lazy, self).marginals(chunk)


def staged(
    path: Path, lazy: LazyDevice, room: SumsRoom, deep: bool = False, kind: type[Lazy] = Lazy
) -> tuple[engine.Result, int]:
    """A scan through the ring, and its steps."""
    checkpoint = open_checkpoint(path)
    backend = kind(lazy)
    assert isinstance(backend, Deferring)
    reader = StagedReader(PreadReader(checkpoint.shards), [lazy], 1 << 12, room)
    plan = make_plan(checkpoint, match(checkpoint), backend, threads=2, step_bytes=1 << 10, deep=deep)
    try:
        return engine.run(plan, backend, reader), len(plan.steps)
    finally:
        reader.close()


@pytest.mark.parametrize("layout", ["llama", "deepseek"])
def test_a_scan_waits_for_its_device_once(layout: str, tmp_path: Path) -> None:
    """Workers launch every step and wait for none; the only others who wait fill a buffer that a copy is reading."""
    path = build(layout, layers=4).write(tmp_path / layout)
    lazy = LazyDevice()
    found, steps = staged(path, lazy, SumsRoom(1 << 30))
    assert found.digest == llmfp.scan(path, backend="torch_fallback").digest
    assert len(lazy.launched) == steps
    assert lazy.fetched == [steps]
    assert steps > 8
    assert {name.partition("-")[0] for name in lazy.waited} == {"stage"}


@pytest.mark.parametrize("layout", ["gpt2", "bert", "bloom"])
def test_a_second_read_waits_once_a_layer(layout: str, tmp_path: Path) -> None:
    """Where a LayerNorm runs along stored rows: it is weighted by means of the first read, which the host makes."""
    path = build(layout, layers=4).write(tmp_path / layout)
    lazy = LazyDevice()
    found, steps = staged(path, lazy, SumsRoom(1 << 30))
    assert found.digest == llmfp.scan(path, backend="torch_fallback").digest
    assert len(lazy.launched) == steps
    assert len([lot for lot in lazy.fetched if lot]) <= 4 + 1
    assert sum(lazy.fetched) == steps


def test_runs_of_columns_are_pooled_at_once(tmp_path: Path) -> None:
    """GPTQ of heads interleaved in one tensor: Q, K and V have runs of columns, the output projection has not."""
    path = twins("gpt_neox", "gptq", "whole words")[0].write(tmp_path)
    lazy = LazyDevice()
    found, steps = staged(path, lazy, SumsRoom(1 << 30), kind=Patient)
    assert found.digest == llmfp.scan(path, backend="torch_fallback").digest
    assert 0 < len(lazy.launched) < steps


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
@pytest.mark.parametrize("kept_bytes", [1, 3 * KEPT, 7 * KEPT])
def test_what_is_kept_is_bounded(layout: str, kept_bytes: int, tmp_path: Path) -> None:
    path = build(layout, layers=4).write(tmp_path / layout)
    lazy = LazyDevice()
    found, steps = staged(path, lazy, SumsRoom(kept_bytes), deep=True)
    assert found.digest == llmfp.scan(path, backend="torch_fallback").digest
    assert sum(lazy.fetched) == steps
    assert max(lazy.fetched) <= max(1, kept_bytes // KEPT)


def chunk_on(name: str) -> Chunk:
    return Chunk(SimpleNamespace(device=name), "F32", 2, 2, 0, 8, 32)  # type: ignore[arg-type]


class Noting:
    """A back end that only notes what it is asked; its launches are numbered from one."""

    def __init__(self) -> None:
        self.launched: list[list[str]] = []

    def device_bytes(self, chunk: Chunk) -> tuple[int, int]:  # noqa: ARG002
        return 10, 4

    def launch(self, chunks: Sequence[Chunk]) -> int:
        self.launched.append([str(chunk.data.device) for chunk in chunks])  # type: ignore[union-attr]
        return len(chunks)

    def fetch(self, launched: Sequence[int]) -> list[list[str]]:
        return [[f"{n}" for n in range(count)] for count in launched]


@pytest.mark.parametrize(("room", "most"), [(SumsRoom(100, 35), 3), (SumsRoom(8, 1000), 2), (SumsRoom(100), 1)])
def test_no_launch_mixes_devices_or_exceeds_its_room(room: SumsRoom, most: int) -> None:
    noting: Any = Noting()
    sums = DeviceSums(noting, room)
    back: list[int] = []
    for number in range(22):
        back += [step for step, _ in sums.fetch(sums.add(number, [chunk_on(f"cuda:{number % 2}")]))]
    for lot in sums.rest():
        back += [step for step, _ in sums.fetch(lot)]
    assert sorted(back) == list(range(22))
    assert all(len(set(devices)) == 1 for devices in noting.launched)
    assert max(map(len, noting.launched)) == most
    assert not any(sums.rest())


@pytest.fixture(scope="module")
def fused() -> Iterator[triton_gpu.TritonGpu]:
    """`triton_gpu` as a scan finds it, interpreted."""
    kernels = _load_kernels(interpreted=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(triton_gpu, "_kernels", lambda: kernels)
        yield triton_gpu.BACKEND


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert"])
def test_a_model_where_it_lies_takes_a_handful_of_launches(
    layout: str, fused: triton_gpu.TritonGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(layout, layers=4).write(tmp_path / layout)
    tensors = safetensors_torch.load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    for name, tensor in tensors.items():  # one weight that float32 will not do for
        if "q_proj.weight" in name or "c_attn.weight" in name or "query.weight" in name:
            tensor[0, 0] = 1e4
    seen = launches(fused, monkeypatch)

    def scan() -> llmfp.Fingerprint:
        seen.clear()
        return llmfp.scan(tensors, config=config, backend="triton_gpu")

    together = scan()
    count = seen.count("marginal_tiles")
    assert count <= (2 if layout == "llama" else 3 * 4), "kinds of matrix; in every layer where some are read twice"
    assert seen.count("exact_tiles") == count
    small = SumsRoom(1 << 12, 1 << 20)
    monkeypatch.setattr(device, "resident_room", lambda *_: small)
    few = scan()
    between = seen.count("marginal_tiles")
    monkeypatch.setattr(device, "resident_room", lambda *_: SumsRoom(1 << 26))
    alone = scan()
    counts = [count, between, seen.count("marginal_tiles")]
    assert layout != "llama" or counts[0] < counts[1] < counts[2]
    assert together.digest == few.digest == alone.digest
    assert together.towers == few.towers == alone.towers
    stored = llmfp.scan(tensors, config=config)
    for role in "qkvo":
        np.testing.assert_allclose(together.std[role], stored.std[role], rtol=1e-6)


def test_a_launch_needs_no_value_from_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On torch's device without values whoever asks for one gets an error; not so the fetch, which asks."""
    for library in ("triton",):
        pytest.importorskip(library)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backend = triton_gpu.TritonGpu("meta")
    seen: list[str] = []
    monkeypatch.setattr(backend, "_launch", lambda kernel, *_, **__: seen.append(kernel))
    names = ("marginal_tiles", "exact_tiles", "merge_partials", "cross_products")
    monkeypatch.setattr(triton_gpu, "_kernels", lambda: SimpleNamespace(**{name: name for name in names}))
    rng = np.random.default_rng(1)
    chunks = [
        replace(each, data=torch.empty(len(each.host_data), dtype=torch.uint8, device="meta"))
        for dtype in ("BF16", "F64")
        for each in (
            chunk_of(rng.normal(0, 1, (70, 48)), dtype, cross=True, col_weight=rng.normal(1, 0.1, 48)),
            chunk_of(rng.normal(0, 1, (40, 48)), dtype, row_weight=rng.normal(1, 0.1, 40)),
        )
    ]
    launched = backend.launch(chunks)
    assert [seen.count(name) for name in names] == [2, 4, 6, 3]
    working, kept = (sum(each) for each in zip(*map(backend.device_bytes, chunks), strict=True))
    nbytes = sum(8 * len(group.results) for group in launched.groups)
    assert nbytes <= kept <= 1.5 * nbytes
    assert working > kept
    with pytest.raises(NotImplementedError):
        backend.fetch([launched])


class OutOfMemoryError(RuntimeError):
    """What torch raises, by its name."""


def test_a_device_that_is_lost_behind_the_launches_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel's failure shows when its sums are fetched: after all was launched, before anything is written."""
    from llmfp.__main__ import main

    class Lost(Lazy):
        def fetch(self, launched: Sequence[Any]) -> list[list[Marginals]]:
            super().fetch(launched)
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    lazy = LazyDevice()
    monkeypatch.setattr(device, "named", lambda _: ["cpu"])
    monkeypatch.setattr(device, "TorchLink", lambda _: lazy)
    monkeypatch.setattr(api, "backend_on", lambda *_: (Lost(lazy), ""))
    path = build("llama", layers=3).write(tmp_path / "llama")
    out = tmp_path / "kept.fp.safetensors"
    assert main(["scan", str(path), "--device", "cuda", "--device-memory", "164MiB", "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "error: device cuda failed: CUDA error: an illegal memory access was encountered",
        "hint: scan on the CPU: --device cpu",
    ]
    assert not list(tmp_path.glob("*kept*"))
    assert lazy.fetched
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("stage-", "scan-"))]


def test_a_model_on_a_full_device_gets_smaller_launches_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build("llama", layers=4).write(tmp_path / "llama")
    tensors = safetensors_torch.load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())

    class Small(Lazy):
        def device_bytes(self, chunk: Chunk) -> tuple[int, int]:  # noqa: ARG002
            return 16 << 20, KEPT

        def launch(self, chunks: Sequence[Chunk]) -> Any:
            if len(chunks) > 4:
                raise OutOfMemoryError("out of memory")
            return super().launch(chunks)

    lazy, stored = LazyDevice(), llmfp.scan(path, backend="torch_fallback")
    monkeypatch.setattr(api, "select", lambda _: Small(lazy))
    found = llmfp.scan(tensors, config=config)
    assert found.caveats == ("128 MiB for sums, not 512: device cpu ran out of memory",)
    assert max(lazy.launched) == 4
    assert found.digest == stored.digest

    monkeypatch.setattr(Small, "launch", lambda *_: (_ for _ in ()).throw(OutOfMemoryError("none")))
    monkeypatch.setattr(api, "backend_on", lambda *_: (Small(lazy), ""))
    with pytest.raises((OutOfMemoryError, BackendError)):
        llmfp.scan(tensors, config=config)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert", "deepseek"])
def test_heads_are_multiplied_without_a_value_from_the_device(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps of a deep scan on torch's device without values, up to where a layer's products come back."""
    from llmfp.device_circuits import DeviceGrams

    class Meta(Lazy):
        def launch(self, chunks: Sequence[Chunk]) -> Any:
            return super().launch([replace(chunk, data=bytes(chunk.data.numel())) for chunk in chunks])  # type: ignore[union-attr]

    class MetaReader(PreadReader):
        sums_room = SumsRoom(1 << 30)

        def read(self, step: Any) -> Any:
            if step.rows == 0:
                return super().read(step)
            return torch.empty(step.nbytes, dtype=torch.uint8, device="meta"), 0

    asked: list[int] = []

    def finish(grams: DeviceGrams) -> None:
        with pytest.raises(NotImplementedError):
            original(grams)
        asked.append(1)

    original = DeviceGrams.finish
    monkeypatch.setattr(DeviceGrams, "finish", finish)
    monkeypatch.setattr("llmfp.circuits.circuits", lambda _: None)
    checkpoint = open_checkpoint(build(layout, layers=4).write(tmp_path / layout))
    backend = Meta(LazyDevice())
    plan = make_plan(checkpoint, match(checkpoint), backend, threads=2, step_bytes=1 << 10, deep=True)
    reader = MetaReader(checkpoint.shards)
    try:
        engine.run(plan, backend, reader)
    finally:
        reader.close()
    assert len(asked) == len(plan.circuits) == 4
