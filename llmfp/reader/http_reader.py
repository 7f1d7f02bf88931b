"""Reads ranges from servers straight into the buffers that the kernels are given; nothing is written to disk.

Some threads fetch what the plan will need, in that order, a bounded number of bytes ahead; the engine's threads wait
for theirs. A range that somebody waits for is fetched before all others.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import defaultdict, deque
from collections.abc import Sequence

from llmfp.checkpoint import Shard
from llmfp.device_sums import SumsRoom
from llmfp.errors import CheckpointError
from llmfp.hub.client import Client
from llmfp.hub.throttle import MOST_AT_ONCE
from llmfp.marginals import Buffer
from llmfp.plan import Plan, Step
from llmfp.reader.fetches import FETCH_BYTES, Fetch, Want, fetches


class _Range:
    """A fetch under way: its buffer once it is there, and how many reads of it are still to come."""

    __slots__ = ("buffer", "fetch", "state", "uses")

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch
        self.uses = len(fetch.wants)
        self.state = "planned"
        self.buffer: mmap.mmap | None = None


class HttpReader:
    """Ranges of remote shards (see llmfp.hub.remote_file), fetched ahead by threads of its own."""

    name = "http"
    step_bytes = FETCH_BYTES
    extra_bytes = FETCH_BYTES  # fetched ahead, per thread
    block_bytes = 256 << 10
    min_threads = 4
    max_threads: int | None = None
    sums_room: SumsRoom | None = None

    def __init__(self, shards: Sequence[Shard], client: Client) -> None:
        self._files = [shard.remote for shard in shards]
        self._client = client
        self._changed = threading.Condition()
        self._stopped = False
        self._error: BaseException | None = None
        self._ranges: list[_Range] = []
        self._reads: defaultdict[Want, deque[_Range]] = defaultdict(deque)
        self._waited_for: deque[_Range] = deque()
        self._next = 0
        self._window = 0
        self._held = 0  # bytes in buffers, those kept for the next range included
        self._spare: list[mmap.mmap] = []
        self._threads: list[threading.Thread] = []
        self._local = threading.local()

    def begin(self, plan: Plan) -> None:
        largest = max((step.nbytes for step in plan.steps), default=0)
        self._window = max(FETCH_BYTES, plan.threads * (largest + self.extra_bytes) - FETCH_BYTES)
        for fetch in fetches(plan):
            self._ranges.append(_Range(fetch))
            for want in fetch.wants:
                self._reads[want].append(self._ranges[-1])
        for number in range(min(MOST_AT_ONCE, len(self._ranges))):
            self._threads.append(threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True))
            self._threads[-1].start()

    def read(self, step: Step) -> tuple[Buffer, int]:
        want = step.shard, step.offset_bytes, step.nbytes
        with self._changed:
            planned = self._reads.get(want)
            found = planned.popleft() if planned else None
            if found is not None:
                if found.state == "planned":
                    self._waited_for.append(found)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stopped or self._error or found.state == "there")
            if self._error is not None:  # of any range: the scan cannot be finished, whatever else arrives
                raise self._error
            if self._stopped:
                raise CheckpointError("reading was given up")
        if found is None:  # not foreseen: read for this thread alone
            buffer = bytearray(step.nbytes)
            self._receive(step.shard, step.offset_bytes, memoryview(buffer))
            return memoryview(buffer), 0
        assert found.buffer is not None
        self._local.range = found
        return memoryview(found.buffer), step.offset_bytes - found.fetch.offset_bytes

    def ahead(self, step: Step) -> None:
        """Nothing: what comes next is known since `begin`."""

    def release(self, step: Step) -> None:  # noqa: ARG002
        """The buffer is used again once every read of its range is done."""
        found: _Range | None = getattr(self._local, "range", None)
        if found is None:
            return
        self._local.range = None
        with self._changed:
            found.uses -= 1
            if not found.uses and found.buffer is not None:
                self._spare.append(found.buffer)
                found.buffer = None
                self._changed.notify_all()

    def cancel(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._client.close()

    def close(self) -> None:
        self.cancel()
        for thread in self._threads:
            thread.join()
        self._ranges.clear()
        self._reads.clear()
        while self._spare:
            self._let_go(self._spare.pop())

    def _work(self) -> None:
        while (found := self._take()) is not None:
            fetch = found.fetch
            assert found.buffer is not None
            failed: BaseException | None = None
            try:
                self._receive(fetch.shard, fetch.offset_bytes, memoryview(found.buffer)[: fetch.nbytes])
            except BaseException as error:  # handed to whoever reads
                failed = error
            with self._changed:
                if failed is None:
                    found.state = "there"
                elif not self._stopped:
                    self._error = self._error or failed
                self._changed.notify_all()
            if failed is not None:
                return

    def _take(self) -> _Range | None:
        """The next range and a buffer for it; None when there is nothing left to do."""
        with self._changed:
            while True:
                if self._stopped:
                    return None
                while self._waited_for:
                    found = self._waited_for.popleft()
                    if found.state == "planned":
                        return self._begun(found)
                while self._next < len(self._ranges) and self._ranges[self._next].state != "planned":
                    self._next += 1
                if self._next == len(self._ranges):
                    return None
                found = self._ranges[self._next]
                if self._held - sum(map(len, self._spare)) + found.fetch.nbytes <= self._window:
                    return self._begun(found)
                self._changed.wait()

    def _begun(self, found: _Range) -> _Range:
        found.state = "under way"
        found.buffer = self._buffer(found.fetch.nbytes)
        return found

    def _buffer(self, nbytes: int) -> mmap.mmap:
        """A buffer of that size or more; used before if possible, since new memory costs as much as receiving."""
        fitting = [spare for spare in self._spare if nbytes <= len(spare) <= 2 * nbytes]
        if fitting:
            buffer = min(fitting, key=len)
            self._spare.remove(buffer)
            return buffer
        while self._spare and self._held + nbytes > self._window:
            self._let_go(self._spare.pop())
        buffer = mmap.mmap(-1, max(nbytes, 1))  # unlike the allocator's, given back to the system at once
        self._held += len(buffer)
        return buffer

    def _let_go(self, buffer: mmap.mmap) -> None:
        self._held -= len(buffer)
        with contextlib.suppress(BufferError):  # after an error its traceback may still hold a view
            buffer.close()

    def _receive(self, shard: int, offset: int, view: memoryview) -> None:
        file = self._files[shard]
        assert file is not None
        if view:
            file.read_into(offset, view)
