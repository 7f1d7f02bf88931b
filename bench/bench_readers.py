"""How bytes arrive: each reader warm in this process, and whole scans cold, against bare reads of the same ranges."""

from __future__ import annotations

from functools import partial

import numpy as np

from bench import ceilings, page_cache
from bench.checkpoints import BenchCheckpoint
from bench.harness import Benchmark, Comparison, after, in_threads, rounds, timed
from bench.processes import bare_read, checks_scan, launched, llmfp_fast
from llmfp import api
from llmfp.reader.mmap_reader import MmapReader
from llmfp.reader.pread_reader import PreadReader

COLD_TARGET = 0.95
DIRECT_THREADS = (4, 16)


def test_warm_readers(big: BenchCheckpoint, benchmark: Benchmark) -> None:
    """Every step of a scan's plan is read and its words summed, in place of being reduced."""
    comparison = Comparison("readers", "readers, warm, in this process", page_cache.WARM)
    warm = partial(page_cache.warm, big)
    for threads in sorted({1, ceilings.cores()}):
        for name in ("mmap", "pread"):
            if name == "mmap" and (reason := MmapReader.why_unavailable()):
                comparison.leave_out(name, reason)
                continue
            sums = timed(partial(_sum_steps, big, name, threads), partial(_check_words, big))
            comparison.add(f"{name}, threads: {threads}", after(warm, sums), nbytes=big.nbytes, threads=threads)
        for method in ("map", "release", "pread"):
            comparison.add(
                f"bare {method}, threads: {threads}",
                bare_read(big, method, threads, warm),
                nbytes=big.nbytes,
                threads=threads,
            )
    comparison.run(benchmark, rounds(7))


def test_cold_scan(big: BenchCheckpoint, benchmark: Benchmark) -> None:
    """Whole programs on evicted files: scans, raw reads past the page cache, and what cat(1) does."""
    comparison = Comparison("readers", "cold scan", page_cache.COLD)
    evict = partial(page_cache.evict, big)
    for options in ((), ("--reader", "mmap")):
        command = llmfp_fast("scan", str(big.path), "--json", *options)
        comparison.add(
            " ".join(["llmfp-fast scan", *options]),
            launched(command, checks_scan(big), before=evict),
            nbytes=big.nbytes,
            threads=None,
        )
    for threads in DIRECT_THREADS:
        measure = bare_read(big, "direct", threads, evict)
        comparison.add(f"O_DIRECT, threads: {threads}", measure, nbytes=big.nbytes, threads=threads)
    comparison.add("cat", bare_read(big, "cat", 1, evict), nbytes=big.nbytes, threads=1)
    direct = [f"O_DIRECT, threads: {threads}" for threads in DIRECT_THREADS]
    comparison.at_least("cold scan: at least 0.95 of the best raw read", "llmfp-fast scan", direct, COLD_TARGET)
    comparison.at_least("cold scan: never slower than cat", "llmfp-fast scan", ["cat"], 1.0)
    comparison.run(benchmark, rounds(5), warmup_rounds=0)


def _sum_steps(checkpoint: BenchCheckpoint, name: str, threads: int) -> int:
    plan = api.plan(checkpoint.path, reader=name, threads=threads)
    shards = plan.checkpoint.shards
    reader = MmapReader(shards, copying=False) if name == "mmap" else PreadReader(shards)
    steps = iter(plan.steps)

    def work() -> int:
        total = 0
        for step in steps:
            data, position = reader.read(step)
            total += ceilings.sum_words(np.frombuffer(data, np.uint8, step.nbytes, position), 1)
            del data
            reader.release(step)
        return total

    try:
        return sum(in_threads(threads, work)) % 2**64
    finally:
        reader.close()


def _check_words(checkpoint: BenchCheckpoint, answer: int) -> None:
    assert answer == checkpoint.words_sum
