"""The staging ring: steps on their way from a file to a device, a bounded number at a time.

Producers take announced steps in order. Each waits for a free slot (that is the back-pressure: a device that is slow
stops the reading), fills the slot's host buffer, pinned where that is possible, starts the copy to its room on the
device, and goes on to the next. A worker that takes a step waits until its copy was started, lets the device wait for
the copy itself, and gives the slot back when the kernels that read it are launched: the next copy into it waits, on the
device, for the mark behind them, and no thread does. Memory is `slots` buffers on either side, whatever the size of the
checkpoint. A step that fails, or a ring that is closed, wakes everybody who waits.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llmfp.device_sums import SumsRoom
from llmfp.marginals import Buffer
from llmfp.plan import Plan, Step
from llmfp.reader import Reader
from llmfp.reader.mmap_reader import MmapReader
from llmfp.reader.pread_reader import PreadReader

if TYPE_CHECKING:
    import torch

SLOTS = 4
"""Buffers of a ring: one being filled, one on its way, one for each of the two workers."""
PRODUCERS = 2
WORKERS = 2


class Link(Protocol):
    """The way to one device. Tokens are events of the device, or None."""

    name: str

    def host(self, nbytes: int) -> torch.Tensor:
        """A flat uint8 buffer in host memory, pinned where that is possible."""

    def room(self, nbytes: int) -> torch.Tensor:
        """The same on the device."""

    def copy(self, host: torch.Tensor, room: torch.Tensor, after: Any) -> Any:
        """Starts a copy that begins after the work `after` was marked behind; returns the token of its end."""

    def wait(self, token: Any) -> None:
        """What is computed from here on sees the copy."""

    def mark(self) -> Any:
        """The token of all that was computed so far."""

    def settle(self, token: Any) -> None:
        """Returns when it has happened: the host buffer of that copy may be written again."""


@dataclass(slots=True)
class _Slot:
    host: torch.Tensor
    room: torch.Tensor
    copied: Any = None
    used: Any = None


class StagingRing:
    """The ring of one device."""

    def __init__(self, fill: Callable[[Step, memoryview], None], link: Link, slot_bytes: int) -> None:
        """fill: reads a step into a buffer of its size. Raises what the device raises when it has no room."""
        self._fill, self._link = fill, link
        self._free = [_Slot(link.host(slot_bytes), link.room(slot_bytes)) for _ in range(SLOTS)]
        self._announced: deque[Step] = deque()
        self._staged: dict[Step, _Slot] = {}
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._producers = [
            threading.Thread(target=self._produce, name=f"stage-{link.name}-{n}", daemon=True) for n in range(PRODUCERS)
        ]
        for producer in self._producers:
            producer.start()

    def announce(self, step: Step) -> None:
        """Says that this step is wanted next after those announced before."""
        with self._changed:
            self._announced.append(step)
            self._changed.notify_all()

    def take(self, step: Step) -> torch.Tensor:
        """The announced step's bytes on the device, until `give`. Raises what reading or copying it raised."""
        with self._changed:
            self._changed.wait_for(lambda: step in self._staged or self._error is not None or self._closed)
            if self._error is not None:
                raise self._error
            if self._closed:
                raise OSError(errno.ECANCELED, "the scan was stopped")
            slot = self._staged[step]
        self._link.wait(slot.copied)
        return slot.room[: step.nbytes]

    def give(self, step: Step) -> None:
        """Gives the slot back: the next copy into it waits for what was launched before this."""
        used = self._link.mark()
        with self._changed:
            slot = self._staged.pop(step)
            slot.used = used
            self._free.append(slot)
            self._changed.notify_all()

    def cancel(self) -> None:
        """Lets everybody who waits go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stops the producers and frees the buffers."""
        self.cancel()
        for producer in self._producers:
            producer.join()
        self._free.clear()
        self._staged.clear()

    def _produce(self) -> None:
        try:
            while (taken := self._next()) is not None:
                step, slot = taken
                self._link.settle(slot.copied)
                if len(slot.host) < step.nbytes:  # a unit of reduction is larger than a slot
                    self._link.settle(slot.used)
                    slot.host, slot.room = self._link.host(step.nbytes), self._link.room(step.nbytes)
                self._fill(step, slot.host.numpy().data[: step.nbytes])
                slot.copied = self._link.copy(slot.host[: step.nbytes], slot.room[: step.nbytes], slot.used)
                with self._changed:
                    self._staged[step] = slot
                    self._changed.notify_all()
        except BaseException as error:  # handed to whoever takes a step, whatever it is
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _next(self) -> tuple[Step, _Slot] | None:
        """The next step and a slot for it; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._error or (self._announced and self._free))
            if self._closed or self._error is not None:
                return None
            return self._announced.popleft(), self._free.pop()


class StagedReader:
    """A reader whose steps arrive on devices: layers are dealt out to them in turn. Small tensors stay on the host."""

    block_bytes = 1
    min_threads = 1
    max_threads: int | None = WORKERS

    def __init__(self, files: Reader, links: Sequence[Link], slot_bytes: int, sums_room: SumsRoom) -> None:
        self.name = files.name
        self.step_bytes = slot_bytes
        self.extra_bytes = SLOTS * slot_bytes * len(links) // WORKERS + sums_room.kept_bytes
        self.sums_room: SumsRoom | None = sums_room
        self._files = files
        self._device_of: Sequence[int] = ()
        self._rings: list[StagingRing] = []
        try:
            for link in links:
                self._rings.append(StagingRing(self._fill, link, slot_bytes))
        except BaseException:
            self.close()
            raise

    def begin(self, plan: Plan) -> None:
        """Deals the layers out: all of one layer go to one device, where its heads are multiplied.

        Every ring is told all of its steps now, in the plan's order: a step out of turn could take the slot that the
        one waited for needs; and every device has something to copy while another's layer is under way."""
        self._files.begin(plan)
        self._device_of = [task.layer % len(self._rings) for task in plan.tasks]
        for step in plan.steps:
            self._ring(step).announce(step)

    def read(self, step: Step) -> tuple[Buffer | torch.Tensor, int]:
        if step.rows == 0:  # a whole small tensor, which the host decodes
            return self._files.read(step)
        return self._ring(step).take(step), 0

    def ahead(self, step: Step) -> None:
        self._files.ahead(step)

    def release(self, step: Step) -> None:
        if step.rows == 0:
            self._files.release(step)
        else:
            self._ring(step).give(step)

    def cancel(self) -> None:
        self._files.cancel()
        for ring in self._rings:
            ring.cancel()

    def close(self) -> None:
        for ring in self._rings:
            ring.close()
        self._files.close()

    def _ring(self, step: Step) -> StagingRing:
        return self._rings[self._device_of[step.task]]

    def _fill(self, step: Step, view: memoryview) -> None:
        if isinstance(self._files, MmapReader | PreadReader):
            self._files.read_into(step, view)
        else:
            data, position = self._files.read(step)
            if not isinstance(data, Buffer):
                raise TypeError(f"reader {self.name} does not read into host memory")
            view[:] = memoryview(data)[position : position + step.nbytes]
        self._files.release(step)


__all__ = ["PRODUCERS", "SLOTS", "WORKERS", "Link", "StagedReader", "StagingRing"]
