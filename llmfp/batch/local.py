"""One checkpoint after the other on this machine, each with all its cores, in a process beside this one.

A checkpoint that brings its reader down, by a signal or for want of memory, costs that process alone: the next one
gets a new one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from llmfp.batch.work import Outcome, fingerprint_into
from llmfp.registry import RegistryError
from llmfp.sources import Source


class LocalExecutor:
    """An `Executor` (see run.py) that has one item in work at a time."""

    def __init__(self, registry: str, reading: Mapping[str, Any]) -> None:
        self._registry, self._reading = registry, dict(reading)
        self._worker: tuple[BaseProcess, Connection] | None = None
        self._item: Source | None = None

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    @property
    def in_work(self) -> int:
        return 0 if self._item is None else 1

    @property
    def has_room(self) -> bool:
        return self._item is None

    def submit(self, item: Source) -> None:
        if self._worker is None:
            context = multiprocessing.get_context("spawn")  # a fork would inherit threads' locks
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, self._registry, self._reading), daemon=True)
            process.start()
            theirs.close()
            self._worker = process, ours
        self._worker[1].send(item)
        self._item = item

    def collect(self) -> list[tuple[Source, Outcome]]:
        item, worker = self._item, self._worker
        if item is None or worker is None:
            return []
        try:
            answer = worker[1].recv()
        except (EOFError, OSError):
            answer = Outcome(None, f"the process that read it {self._end()}", 0.0)
        self._item = None
        if isinstance(answer, BaseException):
            raise answer
        return [(item, answer)]

    def _end(self) -> str:
        """Ends the worker; says how it ended."""
        if self._worker is None:
            return "was not there"
        process, connection = self._worker
        self._worker = None
        connection.close()
        process.join(1.0)
        if process.is_alive():
            process.terminate()
            process.join()
        code = process.exitcode
        process.close()
        if code is None or code >= 0:
            return f"ended with code {code}"
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"


def _work(connection: Connection, registry: str, reading: Mapping[str, Any]) -> None:
    """What the process does: an item in, an outcome or a RegistryError out, until nobody is at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the one that knows what to do ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        answer: Outcome | RegistryError
        try:
            answer = fingerprint_into(registry, item, reading)
        except RegistryError as error:
            answer = error
        connection.send(answer)


def _end_with_parent() -> None:
    """A batch that is killed takes its worker along, in the middle of whatever it reads."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
