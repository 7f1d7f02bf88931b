"""A progress bar for whatever takes longer than a second, on a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import click

_QUIET_SECONDS = 1.0


class ProgressBar:
    """A `Progress` callback: nothing for the first second, then a bar on stderr; never where stderr is no terminal."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._bar: Any = None
        self._done = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, traceback)

    def __call__(self, done: int, total: int) -> None:
        seconds = time.monotonic() - self._start
        if seconds < _QUIET_SECONDS or not sys.stderr.isatty():
            return
        if self._bar is None:
            self._bar = click.progressbar(length=total, label="reading", file=sys.stderr, width=30).__enter__()
        self._bar.label = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {done / seconds / 1e9:.2f} GB/s"
        self._bar.update(done - self._done)
        self._done = done
