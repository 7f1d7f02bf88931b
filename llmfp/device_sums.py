"""What steps came to, kept on their devices until it is wanted, or there is too much of it.

Nothing here waits for a device but the copy back, of all that one device has kept; meanwhile others may launch. Steps
whose bytes stay where they are, those of a model on a GPU, are launched many at a time, since building the host's
tables costs more than small launches. Which steps are launched together, and which come back together, changes no bit.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from llmfp.kernels import Deferring
from llmfp.marginals import Buffer, Chunk, Marginals

Kept = tuple[Any, list[tuple[int, int]]]
"""A launch, and by number the steps in it, with how many chunks each has."""


@dataclass(frozen=True, slots=True)
class SumsRoom:
    """Memory that sums may take of each device, beside weights: a step of its own takes what it needs.

    kept_bytes    of what was launched and is not back; as much again while it is packed, and on the host
    launch_bytes  of what is launched together while it is computed; None where every step is launched by itself,
                  because its bytes will not stay
    """

    kept_bytes: int
    launch_bytes: int | None = None


@dataclass(slots=True)
class _OnDevice:
    """Of one device: steps that wait to be launched together, and launches that have not come back."""

    waiting: list[tuple[int, Sequence[Chunk]]] = field(default_factory=list)
    waiting_bytes: int = 0
    waiting_kept_bytes: int = 0
    kept: list[Kept] = field(default_factory=list)
    kept_bytes: int = 0


class DeviceSums:
    """Takes steps from any thread, and says what it is time to fetch."""

    def __init__(self, backend: Deferring, room: SumsRoom) -> None:
        self._backend, self._room = backend, room
        self._lock = threading.Lock()
        self._copying = threading.Lock()
        self._devices: dict[str, _OnDevice] = {}

    def add(self, number: int, chunks: Sequence[Chunk]) -> list[Kept]:
        """Takes a step; returns the lot that has to be fetched for it, if any.

        Unless the room lets steps wait for each other, what is put on the device after this may overwrite the bytes."""
        working, kept = (sum(each) for each in zip(*map(self._backend.device_bytes, chunks), strict=True))
        data = chunks[0].data
        name = "" if isinstance(data, Buffer) else str(data.device)
        with self._lock:
            on = self._devices.setdefault(name, _OnDevice())
        most = self._room.launch_bytes
        if most is None or any(chunk.coding is not None or chunk.low_rank is not None for chunk in chunks):
            launched = self._backend.launch(chunks)
            with self._lock:
                return self._keep(on, launched, [(number, len(chunks))], kept)
        full: list[Kept] = []
        with self._lock:
            if on.waiting_bytes + working > most or on.waiting_kept_bytes + kept > self._room.kept_bytes:
                full = self._launch(on)
            on.waiting.append((number, chunks))
            on.waiting_bytes += working
            on.waiting_kept_bytes += kept
        return full

    def rest(self) -> list[list[Kept]]:
        """Launches what waits; all that has not been fetched yet, in lots."""
        with self._lock:
            return [lot for on in self._devices.values() for lot in (self._launch(on), self._taken(on))]

    def fetch(self, kept: Sequence[Kept]) -> list[tuple[int, list[Marginals]]]:
        """Statistics of the chunks of every step in a lot, by its number: one copy. One thread at a time."""
        with self._copying:
            found = self._backend.fetch([launched for launched, _ in kept])
        steps = []
        for (_, counts), marginals in zip(kept, found, strict=True):
            rest = iter(marginals)
            steps += [(number, list(islice(rest, count))) for number, count in counts]
        return steps

    def _launch(self, on: _OnDevice) -> list[Kept]:
        """Launches what waits, under the lock: its steps are others' too, who may ask for them at once."""
        if not on.waiting:
            return []
        steps = [(number, len(chunks)) for number, chunks in on.waiting]
        launched = self._backend.launch([chunk for _, chunks in on.waiting for chunk in chunks])
        full = self._keep(on, launched, steps, on.waiting_kept_bytes)
        on.waiting, on.waiting_bytes, on.waiting_kept_bytes = [], 0, 0
        return full

    def _keep(self, on: _OnDevice, launched: Any, steps: list[tuple[int, int]], nbytes: int) -> list[Kept]:
        """Keeps a launch; returns what has to come back for it, if anything. The caller holds the lock."""
        full: list[Kept] = []
        if on.kept and on.kept_bytes + nbytes > self._room.kept_bytes:
            full = self._taken(on)
        on.kept.append((launched, steps))
        on.kept_bytes += nbytes
        return full

    @staticmethod
    def _taken(on: _OnDevice) -> list[Kept]:
        kept, on.kept, on.kept_bytes = on.kept, [], 0
        return kept


__all__ = ["DeviceSums", "SumsRoom"]
