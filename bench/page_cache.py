"""Warm and cold, made and checked: what the page cache holds of a checkpoint's attention tensors."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import numpy as np

from bench import ceilings
from bench.checkpoints import BenchCheckpoint

WARM = "warm: read with pread after an eviction, topped up before every sample until mincore finds 99.9 % of the pages"
COLD = "cold: POSIX_FADV_DONTNEED before every sample, mincore finds none of the pages"
RESIDENT = 0.999
_THREADS = 4
_ATTEMPTS = 5


def warm(checkpoint: BenchCheckpoint) -> None:
    """Reads what is missing of the attention tensors into the page cache, and checks that it is there.

    Call it before every sample: some machines (DAMON, a balloon) take idle pages away all the time. Call `evict`
    before the first: the cache's contents then always came the same way. The size of its folios depends on that, and
    the speed of mapped reads on the size of the folios (10 to 15 GB/s on one core, files just written being fastest).
    """
    for _ in range(_ATTEMPTS):
        missing = [part for part in checkpoint.ranges if resident_share([part]) < 1]
        if sum(nbytes for _, _, nbytes in missing) == 0:
            return
        command = [ceilings.program(), "read", "pread", str(_THREADS)]
        subprocess.run(command, input=ceilings.range_lines(missing), check=True, stdout=subprocess.DEVNULL)
        if (share := resident_share(checkpoint.ranges)) >= RESIDENT:
            return
    raise AssertionError(f"only {share:.1%} of the pages stay in the page cache")


def evict(checkpoint: BenchCheckpoint) -> None:
    """Drops the files from the page cache and checks that they are gone. They are clean: fsync ended their writing."""
    for file in {file for file, _, _ in checkpoint.ranges}:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    assert (share := resident_share(checkpoint.ranges)) == 0.0, f"{share:.1%} of the pages are still in the page cache"


def resident_share(ranges: Iterable[tuple[Path, int, int]]) -> float:
    """Share of the ranges' pages in the page cache, by mincore(2); right for files the caller owns."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    resident = pages = 0
    for file, parts in groupby(ranges, key=lambda part: part[0]):
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            for _, offset, nbytes in parts:
                start = offset // mmap.PAGESIZE * mmap.PAGESIZE
                vector = np.zeros(-(-(offset + nbytes - start) // mmap.PAGESIZE), np.uint8)
                address = view.ctypes.data + start
                if libc.mincore(address, offset + nbytes - start, vector.ctypes.data) != 0:
                    raise OSError(ctypes.get_errno(), "mincore", str(file))
                resident += int((vector & 1).sum())
                pages += len(vector)
            del view
    return resident / pages
