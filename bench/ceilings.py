"""Measured ceilings: native/ceiling.c, compiled on first use and called in process or as a program."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bench.checkpoints import cache_directory

SOURCE = Path(__file__).parent / "native" / "ceiling.c"
LOOP = Path(__file__).parents[1] / "kernels" / "native" / "words.h"
FLAGS = ("-std=c11", "-O3", "-march=native", "-ffp-contract=fast", "-pthread")
METHODS = ("map", "release", "pread", "cat", "direct")
"""Ways to read a file, described in ceiling.c."""


def cores() -> int:
    return len(os.sched_getaffinity(0))


def sum_words(buffer: NDArray[Any], threads: int) -> int:
    """The memory read ceiling: the sum of all 64-bit words of a contiguous buffer, modulo 2^64."""
    result: int = _library().ceiling_memory(buffer.ctypes.data, buffer.nbytes, threads)
    return result


def sum_floats(rows: NDArray[Any], gain: NDArray[Any] | None, repetitions: int) -> float:
    """The arithmetic ceiling: sums of float32 [4, 512] and of its squares by row and by column, again and again.

    With float32 [512] `gain` also those of gain * x by row. Both begin on a cache line. Returns the sum of all squares.
    """
    column = rows if gain is None else gain
    result: float = _library().ceiling_sums(rows.ctypes.data, column.ctypes.data, gain is not None, repetitions)
    return result


def program() -> str:
    """The compiled program: `read METHOD THREADS < ranges` and `launch REPORT COMMAND...`."""
    return str(_compiled("ceiling"))


def range_lines(ranges: Iterable[tuple[Path, int, int]]) -> bytes:
    """What `ceiling read` takes on its standard input."""
    return "".join(f"{offset} {nbytes} {file}\n" for file, offset, nbytes in ranges).encode()


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_compiled("ceiling.so", "-shared", "-fPIC")))
    library.ceiling_memory.restype = ctypes.c_uint64
    library.ceiling_memory.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]
    library.ceiling_sums.restype = ctypes.c_double
    library.ceiling_sums.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64]
    return library


@cache
def _compiled(name: str, *flags: str) -> Path:
    """Built once per content of the source; raises CalledProcessError with the compiler's own words on stderr."""
    key = hashlib.sha256(SOURCE.read_bytes() + LOOP.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:12]
    target = cache_directory() / f"native-{key}" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{name}.{os.getpid()}")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, *FLAGS, *flags, str(SOURCE), "-o", str(partial)], check=True)
        partial.rename(target)
    return target
