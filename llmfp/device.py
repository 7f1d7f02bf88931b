"""Devices by name: whether they are there, the way to them, and whether the way is worth it.

`auto` compares rates, not hardware: what a scan waits for is the slowest of storage, the copy to the device and the
arithmetic, and torch has to be imported first. It looks for a card's device file before anything else, then at how
long the CPU would take, and measures the copy only where a card could win.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmfp.device_sums import SumsRoom
from llmfp.errors import BackendError
from llmfp.kernels import Backend

if TYPE_CHECKING:
    import torch

    from llmfp.plan import Plan

RESERVE_BYTES = 160 << 20
"""Of the device's budget, for what kernels need beside the ring: partial sums, sums that are not back yet."""
LEAST_DEVICE_MEMORY = 32 << 20
"""What a scan of a model on a device may be brought down to, where memory is short there."""
LEAST_ROOM = 1 << 20
LARGEST_SLOT, SMALLEST_SLOT = 64 << 20, 1 << 20
START_SECONDS = 3.0
"""What importing torch and waking a card cost, about; a CPU that is done by then has won."""
SAMPLE_BYTES = 64 << 20
_CARDS = ("/dev/nvidia0", "/dev/kfd")
_HINT = "llmfp-fast bench says which devices there are; --device cpu needs none"


@dataclass(frozen=True, slots=True)
class Choice:
    """The device that computes, and why."""

    device: str
    why: str


class TorchLink:
    """The way to a device through torch: a stream of its own for copies on CUDA, plain copies elsewhere."""

    def __init__(self, device: str) -> None:
        import torch

        self.name = device
        self._device = torch.device(device)
        self._cuda: Any = torch.cuda if self._device.type == "cuda" else None
        self._stream: Any = self._cuda.Stream(self._device) if self._cuda else None

    def host(self, nbytes: int) -> torch.Tensor:
        import torch

        if self._cuda:
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # locked memory is limited: the copy is then slower, and right
                pass
        return torch.empty(nbytes, dtype=torch.uint8)

    def room(self, nbytes: int) -> torch.Tensor:
        import torch

        # On the stream of the copies: memory that was freed on another may still be in use there when a copy begins.
        with self._cuda.stream(self._stream) if self._cuda else nullcontext():
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy(self, host: torch.Tensor, room: torch.Tensor, after: Any) -> Any:
        if self._cuda is None:
            room.copy_(host)
            return None
        with self._cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            room.copy_(host, non_blocking=True)
            return self._stream.record_event()

    def wait(self, token: Any) -> None:
        if token is not None:
            self._cuda.current_stream(self._device).wait_event(token)

    def mark(self) -> Any:
        return self._cuda.current_stream(self._device).record_event() if self._cuda else None

    def settle(self, token: Any) -> None:
        if token is not None:
            token.synchronize()


def named(device: str) -> list[str]:
    """The devices a name stands for: all of its kind, or the one. Raises BackendError for what is not there."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdecimal()) or (index and kind != "cuda"):
        raise BackendError(f"no device named {device!r}", hint="give cpu, cuda, cuda:N, mps or auto")
    if kind == "cpu":
        return [device]
    try:
        import torch

        count = torch.cuda.device_count() if kind == "cuda" else int(torch.backends.mps.is_available())
    except Exception as error:
        # a broken install or driver shows as half a dozen exception types
        raise BackendError(f"device {device} cannot be used: {_first_line(error)}", hint=_HINT) from None
    if count == 0:
        raise BackendError(f"device {device} is not here: torch finds no {kind} device", hint=_HINT)
    if index and int(index) >= count:
        raise BackendError(f"device {device} is not here: there are {count}, from {kind}:0 on", hint=_HINT)
    return [device] if index or kind == "mps" else [f"cuda:{n}" for n in range(count)]


def slot_bytes(backend: Backend, links: int, memory_bytes: int, device_bytes: int) -> int:
    """Bytes of a ring's buffer, by both budgets: half of what the host's leaves, all of what the device's does."""
    from llmfp.reader.staging import SLOTS

    host = (memory_bytes - backend.library_bytes) // (2 * SLOTS * links)
    on_device = (device_bytes - RESERVE_BYTES) // SLOTS
    return max(SMALLEST_SLOT, min(LARGEST_SLOT, host, on_device) >> 20 << 20)


def staged_room(backend: Backend, memory_bytes: int, device_bytes: int) -> SumsRoom:
    """Of sums beside a ring: a sixteenth of what the host's budget leaves, and of the device's at most."""
    return SumsRoom(max(LEAST_ROOM, min(memory_bytes - backend.library_bytes, device_bytes) // 16))


def resident_room(backend: Backend, memory_bytes: int, device_bytes: int) -> SumsRoom:
    """Of sums beside a model that is on the device: an eighth likewise, and half of the device's for a launch."""
    kept = max(LEAST_ROOM, min(memory_bytes - backend.library_bytes, device_bytes) // 8)
    return SumsRoom(kept, max(LEAST_ROOM, device_bytes // 2))


def choose(plan: Plan) -> Choice:
    """The device for a planned scan, `cpu` or `cuda`, by what was measured on this machine just now."""
    if not any(map(os.path.exists, _CARDS)):
        return Choice("cpu", "no GPU is here")
    nbytes = plan.step_bytes
    read = _read_rate(plan)
    cpu = min(read, _kernel_rate() * plan.threads)
    if nbytes / cpu < START_SECONDS:
        return Choice("cpu", f"done in {nbytes / cpu:.1f} s, at {cpu / 1e9:.1f} GB/s, before a GPU has started")
    try:
        device = named("cuda")[0]
        copy = _copy_rate(device)
    except (BackendError, RuntimeError) as error:
        return Choice("cpu", f"the GPU cannot be used: {_first_line(error)}")
    seconds = nbytes / min(read, copy) + START_SECONDS
    why = f"read {read / 1e9:.1f}, copy to the GPU {copy / 1e9:.1f}, CPU {cpu / 1e9:.1f} GB/s"
    return Choice("cuda" if seconds < nbytes / cpu else "cpu", why)


def as_error(device: str, error: RuntimeError) -> BackendError:
    """What a device said when it failed, in one line."""
    if is_out_of_memory(error):
        return BackendError(f"device {device} has no memory left", hint="lower --device-memory, or free the device")
    return BackendError(f"device {device} failed: {_first_line(error)}", hint="scan on the CPU: --device cpu")


def is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError"


def _read_rate(plan: Plan) -> float:
    """Bytes per second of one thread's pread of a sample of what the plan reads."""
    buffer = bytearray(4 << 20)
    done, start = 0, time.perf_counter()
    shards = plan.checkpoint.shards
    for step in plan.steps:
        descriptor = os.open(shards[step.shard].path, os.O_RDONLY)
        try:
            done += os.preadv(descriptor, [memoryview(buffer)[: step.nbytes]], step.offset_bytes)
        finally:
            os.close(descriptor)
        if done >= SAMPLE_BYTES:
            break
    return max(done, 1) / (time.perf_counter() - start)


def _kernel_rate() -> float:
    """Bytes per second of the CPU's kernel on one thread, bf16."""
    from llmfp.kernels import select
    from llmfp.marginals import Chunk

    backend, rows, cols = select("auto"), 1024, 4096
    chunk = Chunk(bytes(2 * rows * cols), "BF16", rows, cols, 0, 2 * cols, 256)
    backend.marginals(chunk)
    start = time.perf_counter()
    backend.marginals(chunk)
    return 2 * rows * cols / (time.perf_counter() - start)


def _copy_rate(device: str) -> float:
    """Bytes per second of a copy from pinned memory."""
    link = TorchLink(device)
    host, room = link.host(SAMPLE_BYTES), link.room(SAMPLE_BYTES)
    link.settle(link.copy(host, room, None))
    start = time.perf_counter()
    link.settle(link.copy(host, room, None))
    return SAMPLE_BYTES / (time.perf_counter() - start)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]


__all__ = [
    "LEAST_DEVICE_MEMORY",
    "SMALLEST_SLOT",
    "Choice",
    "TorchLink",
    "as_error",
    "choose",
    "is_out_of_memory",
    "named",
    "resident_room",
    "slot_bytes",
    "staged_room",
]
