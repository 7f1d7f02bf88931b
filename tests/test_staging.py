"""Invariants of the way to a device: steps arrive in order and whole, never more than the ring's buffers are in use, a
copy never overtakes what still reads its room, and a failure or a stop anywhere wakes everybody. The device here is one
whose copies happen only when the test says so.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmfp
from llmfp import api, device, engine
from llmfp.architecture import match
from llmfp.checkpoint import open_checkpoint
from llmfp.device_sums import SumsRoom
from llmfp.errors import BackendError, CheckpointError, LlmfpError
from llmfp.kernels import on, triton_gpu
from llmfp.plan import Step, make_plan
from llmfp.reader.pread_reader import PreadReader
from llmfp.reader.staging import PRODUCERS, SLOTS, StagedReader, StagingRing
from tests.checkpoints import build

torch = pytest.importorskip("torch")
LITTLE = 164 << 20
"""A device's budget that leaves a ring's buffers one MiB each."""
WAIT = 30.0
"""Seconds after which a test gives up on a thread; none waits for them when all is well."""


class FakeLink:
    """A device in host memory. A copy is data on its way until it is waited for: whoever reads too early reads 0xEE."""

    def __init__(self, name: str = "fake") -> None:
        self.name = name
        self.rooms = self.hosts = 0
        self.copies: list[int] = []
        self.fail_at: int | None = None
        self.lock = threading.Lock()

    def host(self, nbytes: int) -> Any:
        self.hosts += 1
        return torch.empty(nbytes, dtype=torch.uint8)

    def room(self, nbytes: int) -> Any:
        self.rooms += 1
        return torch.full((nbytes,), 0xEE, dtype=torch.uint8)

    def copy(self, host: Any, room: Any, after: Any) -> Any:
        assert after is None or after.is_set(), "the room is still being read"
        with self.lock:
            if self.fail_at == len(self.copies):
                raise RuntimeError("CUDA error: unspecified launch failure\nmore")
            self.copies.append(int(host[0]))
        room.fill_(0xEE)
        return host, room

    def wait(self, token: Any) -> None:
        host, room = token
        room.copy_(host)

    def mark(self) -> Any:
        done = threading.Event()
        done.set()
        return done

    def settle(self, token: Any) -> None: ...


def step(number: int, nbytes: int = 16) -> Step:
    return Step(0, 0, number, 1, 0, number * nbytes, nbytes, False)


def numbered(each: Step, view: memoryview) -> None:
    view[:] = bytes([each.row]) * each.nbytes


@pytest.fixture
def rings() -> Any:
    """Makes rings that are closed when the test is over."""
    made: list[StagingRing] = []

    def make(fill: Callable[[Step, memoryview], None], link: FakeLink, nbytes: int = 16) -> StagingRing:
        made.append(StagingRing(fill, link, nbytes))
        return made[-1]

    yield make
    for ring in made:
        ring.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stage-")]


def test_steps_arrive_whole_and_in_order_in_a_bounded_number_of_buffers(rings: Any) -> None:
    link = FakeLink()
    ring = rings(numbered, link)
    for n in range(50):
        ring.announce(step(n))
    for n in range(50):
        assert ring.take(step(n)).tolist() == [n] * 16
        ring.give(step(n))
    assert (link.hosts, link.rooms) == (SLOTS, SLOTS)
    assert sorted(link.copies) == list(range(50))


def test_a_device_that_takes_nothing_stops_the_reading(rings: Any) -> None:
    filled, full = [], threading.Event()

    def fill(each: Step, view: memoryview) -> None:
        numbered(each, view)
        filled.append(each.row)
        if len(filled) == SLOTS:
            full.set()

    ring = rings(fill, FakeLink())
    for n in range(20):
        ring.announce(step(n))
    assert full.wait(WAIT)
    ring.take(step(0))
    assert sorted(filled) == list(range(SLOTS)), "no slot was given back, so nothing more is read"
    ring.give(step(0))
    ring.take(step(SLOTS))
    assert sorted(filled) == list(range(SLOTS + 1))


def test_a_step_larger_than_a_buffer_gets_a_larger_one(rings: Any) -> None:
    ring = rings(numbered, FakeLink(), 4)
    ring.announce(step(7, 32))
    assert ring.take(step(7, 32)).tolist() == [7] * 32


@pytest.mark.parametrize("where", ["reading", "copying"])
def test_a_failure_in_the_middle_reaches_every_worker(where: str, rings: Any) -> None:
    link = FakeLink()

    def fill(each: Step, view: memoryview) -> None:
        if where == "reading" and each.row == 5:
            raise OSError(5, "the disk is gone")
        numbered(each, view)

    link.fail_at = 5 if where == "copying" else None
    ring = rings(fill, link)
    for n in range(20):
        ring.announce(step(n))
    failures: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for n in range(first, 20, 2):
                ring.take(step(n))
                ring.give(step(n))
        except (OSError, RuntimeError) as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(first,), daemon=True) for first in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(WAIT)
        assert not worker.is_alive()
    assert len(failures) == 2


def test_a_stop_wakes_who_waits(rings: Any) -> None:
    ring = rings(numbered, FakeLink())
    stopped: list[OSError] = []

    def work() -> None:
        with pytest.raises(OSError, match="stopped") as found:
            ring.take(step(0))  # was never announced
        stopped.append(found.value)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    ring.cancel()
    worker.join(WAIT)
    assert stopped


@pytest.mark.parametrize("links", [1, 3])
@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert", "deepseek"])
def test_a_scan_through_the_ring_is_the_scan_without_it(layout: str, links: int, tmp_path: Path) -> None:
    """Every layout, deep, on one device and over three: gains along rows, second reads, keys kept for queries."""
    path = build(layout, layers=4).write(tmp_path / layout)
    direct = llmfp.scan(path, backend="torch_fallback", deep=True)
    checkpoint = open_checkpoint(path)
    attention = match(checkpoint)
    backend, _ = on("cpu")
    devices = [FakeLink(str(n)) for n in range(links)]
    reader = StagedReader(PreadReader(checkpoint.shards), devices, 1 << 12, SumsRoom(1 << 20))
    plan = make_plan(checkpoint, attention, backend, threads=2, step_bytes=1 << 10, deep=True)
    try:
        result = engine.run(plan, backend, reader)
    finally:
        reader.close()
    assert result.digest == direct.digest
    assert all(len(each.copies) > 0 for each in devices)
    assert sum(len(each.copies) for each in devices) == len(plan.steps)


def test_layers_are_on_their_way_to_several_devices_at_once(tmp_path: Path) -> None:
    """No copy to the first device ends before one to each of the others has begun."""
    begun = [threading.Event() for _ in range(3)]

    class Waiting(FakeLink):
        def copy(self, host: Any, room: Any, after: Any) -> Any:
            begun[int(self.name)].set()
            if self.name == "0":
                assert all(event.wait(WAIT) for event in begun), "the others have nothing to do"
            return super().copy(host, room, after)

    path = build("llama", layers=6).write(tmp_path / "llama")
    checkpoint = open_checkpoint(path)
    backend, _ = on("cpu")
    devices = [Waiting(str(n)) for n in range(3)]
    reader = StagedReader(PreadReader(checkpoint.shards), devices, 1 << 12, SumsRoom(1 << 20))
    plan = make_plan(checkpoint, match(checkpoint), backend, threads=2, step_bytes=1 << 12)
    try:
        result = engine.run(plan, backend, reader)
    finally:
        reader.close()
    assert result.digest == llmfp.scan(path, backend="torch_fallback").digest
    layers = Counter(plan.tasks[step.task].layer % 3 for step in plan.steps)
    assert [len(each.copies) for each in devices] == [layers[n] for n in range(3)]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets `--device cuda` mean links of the test's own to the CPU."""

    def install(make: Callable[[str], Any]) -> None:
        monkeypatch.setattr(device, "named", lambda _: ["cpu"])
        monkeypatch.setattr(device, "TorchLink", make)

    return install


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return build("llama", layers=3).write(tmp_path / "llama")


def test_a_scan_on_a_device_says_where_it_ran(checkpoint: Path, pretend: Any) -> None:
    pretend(FakeLink)
    found = llmfp.scan(checkpoint, device="cuda", device_memory_bytes=LITTLE)
    stored = llmfp.scan(checkpoint)
    for role in "qkvo":
        np.testing.assert_allclose(found.std[role], stored.std[role], rtol=1e-6)
    assert (found.run["device"], found.run["backend"]) == ("cpu", "torch_fallback")
    assert any("pure torch computes on cpu" in caveat for caveat in found.caveats)
    assert stored.run["device"] == "cpu"


class OutOfMemoryError(RuntimeError):
    """What torch raises, by its name."""


def test_a_device_without_room_gets_smaller_buffers_and_that_is_said(checkpoint: Path, pretend: Any) -> None:
    class Small(FakeLink):
        def room(self, nbytes: int) -> Any:
            if nbytes > 3 << 20:
                raise OutOfMemoryError("out of memory")
            return super().room(nbytes)

    pretend(Small)
    found = llmfp.scan(checkpoint, device="cuda", device_memory_bytes=200 << 20)
    said = [caveat for caveat in found.caveats if "ran out of memory" in caveat]
    assert said == ["buffers of 2 MiB, not 10: device cuda ran out of memory"]
    assert found.std == llmfp.scan(checkpoint, backend="torch_fallback").std


def test_a_device_without_any_room_is_one_line(checkpoint: Path, pretend: Any) -> None:
    class Full(FakeLink):
        def room(self, nbytes: int) -> Any:
            raise OutOfMemoryError(f"no {nbytes}")

    pretend(Full)
    with pytest.raises(BackendError, match=r"^device cuda has no memory left$") as refused:
        llmfp.scan(checkpoint, device="cuda")
    assert "--device-memory" in refused.value.hint


def test_a_card_lost_in_the_middle_is_one_line_and_leaves_nothing(
    checkpoint: Path, pretend: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmfp.__main__ import main

    def lost(name: str) -> FakeLink:
        link = FakeLink(name)
        link.fail_at = 3
        return link

    pretend(lost)
    out = tmp_path / "kept.fp.safetensors"
    assert main(["scan", str(checkpoint), "--device", "cuda", "--device-memory", "164MiB", "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "error: device cuda failed: CUDA error: unspecified launch failure",
        "hint: scan on the CPU: --device cpu",
    ]
    assert not list(tmp_path.glob("*kept*"))


def test_a_file_that_shrinks_under_the_ring_is_named(checkpoint: Path, pretend: Any) -> None:
    pretend(FakeLink)
    weights = checkpoint / "model.safetensors"

    def shrink(_: Any) -> None:
        weights.write_bytes(weights.read_bytes()[:-3000])

    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        llmfp.scan(checkpoint, device="cuda", device_memory_bytes=LITTLE, reader="pread", planned=shrink)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpu", "no device named 'gpu'"),
        ("cuda:x", "no device named 'cuda:x'"),
        ("cuda:7", "device cuda:7 is not here"),
        ("mps", "device mps is not here"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, said: str, checkpoint: Path) -> None:
    if torch.cuda.device_count() > 7 or torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(BackendError, match=said):
        llmfp.scan(checkpoint, device=name)
    with pytest.raises(BackendError, match="computes on the CPU"):
        on("cuda", "native_cpu")


def test_a_driver_without_triton_falls_back_to_torch_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> Any:
        raise RuntimeError("PTX was compiled with an unsupported toolchain.\nline two")

    monkeypatch.setattr(triton_gpu.TritonGpu, "why_unavailable", lambda _: None)
    monkeypatch.setattr(triton_gpu.TritonGpu, "marginals", refuses)
    monkeypatch.setattr("llmfp.kernels.torch_fallback.TorchFallback.why_unavailable", lambda _: None)
    backend, note = on("cuda:0")
    assert backend.name == "torch_fallback"
    assert note.startswith("pure torch computes on cuda:0: Triton cannot run on it (RuntimeError: PTX was compiled")
    assert "\n" not in note


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({"read": 1e9, "kernel": 10e9, "copy": 25e9}, "cpu"),  # storage is what limits: a card gains nothing
        ({"read": 50e9, "kernel": 5e9, "copy": 25e9}, "cuda"),
        ({"read": 50e9, "kernel": 5e9, "copy": 6e9}, "cpu"),  # a slow bus
    ],
)
def test_auto_goes_by_rates(
    rates: dict[str, float], chosen: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = api.plan(checkpoint, threads=2)
    monkeypatch.setattr(device, "_CARDS", ("/",))
    monkeypatch.setattr(device, "_read_rate", lambda _: rates["read"])
    monkeypatch.setattr(device, "_kernel_rate", lambda: rates["kernel"])
    monkeypatch.setattr(device, "_copy_rate", lambda _: rates["copy"])
    monkeypatch.setattr(device, "named", lambda _: ["cuda:0"])
    assert device.choose(plan).device == "cpu", "a tiny model is done before a card has started"
    monkeypatch.setattr(type(plan), "step_bytes", property(lambda _: 10**12))
    choice = device.choose(plan)
    assert choice.device == chosen
    assert f"copy to the GPU {rates['copy'] / 1e9:.1f}" in choice.why


def test_auto_without_a_card_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_CARDS", ())
    found = llmfp.scan(checkpoint, device="auto")
    assert (found.run["device"], found.run["device_why"]) == ("cpu", "no GPU is here")
    assert found.digest == llmfp.scan(checkpoint).digest


def test_the_link_that_torch_makes_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    link = device.TorchLink("cpu")
    host, room = link.host(64), link.room(64)
    host.copy_(torch.arange(64, dtype=torch.uint8))
    link.wait(link.copy(host, room, link.mark()))
    link.settle(None)
    assert room.tolist() == list(range(64))
    backend, _ = on("cpu")
    assert device.slot_bytes(backend, 1, 512 << 20, 512 << 20) <= 64 << 20
    assert device.slot_bytes(backend, 1, 1 << 20, 1 << 20) == 1 << 20
    assert PRODUCERS < SLOTS
    assert issubclass(BackendError, LlmfpError)
    monkeypatch.undo()
