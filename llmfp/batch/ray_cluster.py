"""One Ray task per checkpoint, on a cluster or on a Ray of this machine alone.

The driver holds names and rows, never weights: a task scans and writes into the registry, which must be reachable under
the same name from every node, as must be what paths in a list name. No more tasks are handed over than the cluster can
run, and one half more, so that no node waits and nothing queues up. A task whose worker or node dies is run again.
Credentials of the Hub are each node's own; none are sent.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack, redirect_stdout
from types import TracebackType
from typing import Any

from llmfp.batch.work import Outcome, fingerprint_into
from llmfp.errors import LlmfpError
from llmfp.sources import Source

_TRIES_AGAIN = 2


class RayExecutor:
    """An `Executor` (see run.py). address: of a running cluster; None starts, or finds by RAY_ADDRESS, one."""

    def __init__(self, registry: str, reading: Mapping[str, Any], address: str | None) -> None:
        try:
            import ray
        except ImportError:
            raise LlmfpError("--executor ray needs Ray", hint="pip install 'llmfp[ray]'") from None
        self._ray: Any = ray
        self._cores = int(reading.get("threads") or 1)
        self._registry, self._reading, self._address = registry, {**reading, "threads": self._cores}, address
        self._in_work: dict[Any, Source] = {}
        self._stack = ExitStack()

    def __enter__(self) -> RayExecutor:
        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(sys.stderr))  # Ray prints there that a worker died, between our data
            stack.callback(self._ray.shutdown)
            try:
                self._ray.init(
                    address=self._address,
                    include_dashboard=None if self._address else False,
                    log_to_driver=False,
                    configure_logging=False,
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                line = str(error).strip().split("\n", 1)[0][:200]
                raise LlmfpError(f"no Ray cluster at {self._address or 'this machine'}: {line}") from None
            slots = int(self._ray.cluster_resources().get("CPU", 0)) // self._cores
            if not slots:
                raise LlmfpError(f"the Ray cluster has no {self._cores} cores", hint="give fewer --threads")
            self._task = self._ray.remote(num_cpus=self._cores, max_retries=_TRIES_AGAIN)(fingerprint_into)
            self._most = slots + (slots + 1) // 2
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            for reference in self._in_work:
                self._ray.cancel(reference, force=True)
            self._in_work.clear()

    @property
    def in_work(self) -> int:
        return len(self._in_work)

    @property
    def has_room(self) -> bool:
        return len(self._in_work) < self._most

    def submit(self, item: Source) -> None:
        self._in_work[self._task.remote(self._registry, item, self._reading)] = item

    def collect(self) -> list[tuple[Source, Outcome]]:
        if not self._in_work:
            return []
        ready, _ = self._ray.wait(list(self._in_work), num_returns=1)
        return [(self._in_work.pop(reference), self._outcome(reference)) for reference in ready]

    def _outcome(self, reference: Any) -> Outcome:
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, LlmfpError):  # the registry cannot be written: nothing can go on
                raise error.cause from None
            outcome = Outcome(None, f"{type(error.cause).__name__}: {error.cause}", 0.0)
        except errors.RayError as error:
            line = str(error).strip().split("\n", 1)[0][:200]
            outcome = Outcome(None, f"its worker died {_TRIES_AGAIN + 1} times ({line})", 0.0)
        return outcome
