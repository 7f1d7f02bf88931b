"""A progress bar for whatever takes longer than a second, on a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import click

from llmfp.plan import Plan

_QUIET_SECONDS = 1.0


class ProgressBar:
    """A `Progress` callback: nothing for the first second, then a bar on stderr; never where stderr is no terminal.

    Says the bytes, their rate since the first of them came, and the time left at that rate.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._begun: float | None = None
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
        now = time.monotonic()
        self._begun = now if self._begun is None else self._begun
        if now - self._start < _QUIET_SECONDS or not sys.stderr.isatty():
            return
        if self._bar is None:
            self._bar = click.progressbar(
                length=total, label="reading", file=sys.stderr, width=24, show_eta=False
            ).__enter__()
        self._bar.label = progress_line(done, total, now - self._begun)
        self._bar.update(done - self._done)
        self._done = done


def say_plan(plan: Plan) -> None:
    """What is going to be read, on stderr."""
    from llmfp.report.terminal import plan_line

    click.echo(plan_line(plan), err=True)


def progress_line(done: int, total: int, seconds: float) -> str:
    """So many of so many bytes, the rate, and the time that the rest will take at it."""
    from llmfp.report.terminal import size

    rate = done / seconds if seconds > 0 else 0.0
    left = f", {_duration((total - done) / rate)} left" if rate else ""
    return f"{size(done)} of {size(total)}, {size(round(rate))}/s{left}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
