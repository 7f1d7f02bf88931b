"""Maps each shard and hands out its pages, mapped in one call per step and given back behind the cursor."""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
from collections.abc import Sequence

from llmfp.checkpoint import Shard
from llmfp.device_sums import SumsRoom
from llmfp.marginals import Buffer
from llmfp.plan import Plan, Step
from llmfp.reader import close_shards, open_shard


class MmapReader:
    """mmap(2), without a copy where the back end survives a file that shrinks (SIGBUS), else through a guarded copy.

    Resident pages stay bounded because every step's are populated in one call and released by MADV_DONTNEED, which
    leaves them in the page cache; in pieces of 2 MiB, since the kernel maps large folios whole.
    """

    name = "mmap"
    step_bytes = 8 << 20
    extra_bytes = 4 << 20  # 2 MiB mapped along with either end
    block_bytes = 1
    min_threads = 1
    max_threads: int | None = None
    sums_room: SumsRoom | None = None

    @staticmethod
    def why_unavailable() -> str | None:
        if sys.platform != "linux":
            return "only Linux gives mapped pages back on request"
        try:
            import llmfp._native  # noqa: F401
        except ImportError:
            return "the C++ extension, which survives files that shrink, was not built"
        return None

    def __init__(self, shards: Sequence[Shard], *, copying: bool) -> None:
        self._shards = shards
        self._copying = copying
        self._open: dict[int, tuple[int, mmap.mmap]] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def begin(self, plan: Plan) -> None:
        """Nothing: shards are opened when first read."""

    def read(self, step: Step) -> tuple[Buffer, int]:
        from llmfp import _native

        mapped = self._mapping(step.shard)
        _native.populate(mapped, step.offset_bytes, step.nbytes)
        if not self._copying:
            return memoryview(mapped), step.offset_bytes
        buffer: bytearray = getattr(self._local, "buffer", bytearray())
        if len(buffer) < step.nbytes:
            self._local.buffer = buffer = bytearray(step.nbytes)
        _native.copy(mapped, step.offset_bytes, memoryview(buffer)[: step.nbytes])
        return memoryview(buffer)[: step.nbytes], 0

    def read_into(self, step: Step, view: memoryview) -> None:
        """Copies the step into memory of the caller's, which is just as large. Raises as `read` does."""
        from llmfp import _native

        mapped = self._mapping(step.shard)
        _native.populate(mapped, step.offset_bytes, step.nbytes)
        _native.copy(mapped, step.offset_bytes, view)

    def ahead(self, step: Step) -> None:
        """Nothing: mapped files are in the page cache, and a miss is read ahead by the kernel."""

    def release(self, step: Step) -> None:
        from llmfp import _native

        _native.release(self._mapping(step.shard), step.offset_bytes, step.nbytes)

    def cancel(self) -> None:
        """Nothing: no read waits for anything but the device."""

    def close(self) -> None:
        opened, self._open = self._open, {}
        for _, mapped in opened.values():
            # After an error its traceback may still hold a view; the mapping then goes with the last one.
            with contextlib.suppress(BufferError):
                mapped.close()
        close_shards((self._shards[number], descriptor) for number, (descriptor, _) in opened.items())

    def _mapping(self, number: int) -> mmap.mmap:
        with self._lock:
            if number not in self._open:
                descriptor = open_shard(self._shards[number])
                self._open[number] = descriptor, mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
            return self._open[number][1]
