"""Whole programs from start to answer, warm: a scan against its peers and against a bare read of the same pages.

Every program answers the same question, the std of each of 128 attention tensors (a scan answers more), on a checkpoint
with the layout of Llama-3.1-8B: 2.7 GB of attention weights between 13 GB of others.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial

from bench import ceilings, page_cache
from bench.checkpoints import BenchCheckpoint
from bench.harness import Benchmark, Comparison, after, rounds, timed
from bench.processes import PEERS, bare_read, checks_peer, checks_scan, launched, llmfp_fast
from llmfp import api
from llmfp.fingerprint import Fingerprint

SCAN = "llmfp-fast scan"
MIB = 1 << 20


def test_warm_scan(big: BenchCheckpoint, benchmark: Benchmark) -> None:
    """Against what runs at the speed of memory."""
    comparison = Comparison("scan", "warm scan, the fast ones", page_cache.WARM)
    every = ceilings.cores()
    warm = partial(page_cache.warm, big)
    _add_scan(comparison, big)
    _add_scan(comparison, big, "--threads", "1")
    _add_scan(comparison, big, "--reader", "pread")
    in_process = after(warm, timed(partial(api.scan, big.path), partial(_check_fingerprint, big)))
    comparison.add("llmfp.api.scan, no start-up", in_process, nbytes=big.nbytes, threads=None)
    _add_peer(comparison, big, "numkong", 1e-4, 1, module="numkong")
    _add_peer(comparison, big, "numkong_forked", 1e-4, every, module="numkong")
    reads = []
    for method in ("map", "release", "pread"):
        for threads in sorted({1, every}):
            name = f"bare {method}, threads: {threads}"
            comparison.add(name, bare_read(big, method, threads, warm), nbytes=big.nbytes, threads=threads)
            reads.append(name)
    comparison.at_least("warm scan: at least 0.75 of a bare read of the same pages", SCAN, reads, 0.75)
    numkong = ["numkong", "numkong_forked"]
    comparison.at_least("warm scan: at least 1.0 times NumKong's plain sums over a memory map", SCAN, numkong, 1.0)
    comparison.run(benchmark, rounds(9))


def test_loading_peers(big: BenchCheckpoint, benchmark: Benchmark) -> None:
    """Against what loads tensors and then reduces them."""
    comparison = Comparison("scan", "warm scan, those that load first", page_cache.WARM)
    _add_scan(comparison, big)
    _add_peer(comparison, big, "safetensors_get_tensor", 1e-5, None, module="torch")
    _add_peer(comparison, big, "safetensors_load_file", 5e-3, None, module="torch")
    _add_peer(comparison, big, "transformers_from_pretrained", 5e-3, None, module="transformers")
    _add_peer(comparison, big, "runai_model_streamer", 1e-5, None, module="runai_model_streamer")
    _add_peer(comparison, big, "fastsafetensors", 1e-5, None, module="fastsafetensors")
    comparison.at_least(
        "warm scan: at least 15 times safetensors get_tensor and float().std()", SCAN, ["safetensors_get_tensor"], 15
    )
    comparison.run(benchmark, rounds(3))


def test_start(small: BenchCheckpoint, benchmark: Benchmark) -> None:
    """A model so small that only start-up counts."""
    comparison = Comparison("scan", "start: scan of a tiny model", "warm: repeated runs")
    scan = launched(llmfp_fast("scan", str(small.path), "--json"), checks_scan(small, 1e-6))
    comparison.add(SCAN, scan, nbytes=None, threads=None)
    for program in ("import numpy", "pass"):
        comparison.add(f"python -c '{program}'", launched([sys.executable, "-c", program]), nbytes=None, threads=None)
    comparison.at_most("start: at most 3 times importing NumPy", SCAN, ["python -c 'import numpy'"], 3.0)
    comparison.run(benchmark, rounds(15))


def test_memory(big: BenchCheckpoint, benchmark: Benchmark) -> None:
    """The peak resident set of a scan, less that of a plan of the same checkpoint."""
    comparison = Comparison("scan", "memory above the interpreter's", page_cache.WARM)
    plan = launched(llmfp_fast("plan", str(big.path), "--json"))
    comparison.add("llmfp-fast plan", plan, nbytes=None, threads=None)
    for reader in ("mmap", "pread"):
        for budget in (64, 512):
            options = ("--reader", reader, "--memory", f"{budget}MiB")
            _add_scan(comparison, big, *options)
            name = " ".join([SCAN, *options])
            comparison.within(f"memory: {reader} within {budget} MiB", name, "llmfp-fast plan", budget * MIB)
    comparison.run(benchmark, rounds(3))


def _add_scan(comparison: Comparison, checkpoint: BenchCheckpoint, *options: str) -> None:
    command = llmfp_fast("scan", str(checkpoint.path), "--json", *options)
    threads = int(options[options.index("--threads") + 1]) if "--threads" in options else None
    comparison.add(
        " ".join([SCAN, *options]),
        launched(command, checks_scan(checkpoint), before=partial(page_cache.warm, checkpoint)),
        nbytes=checkpoint.nbytes,
        threads=threads,
    )


def _add_peer(
    comparison: Comparison,
    checkpoint: BenchCheckpoint,
    name: str,
    tolerance: float,
    threads: int | None,
    *,
    module: str,
) -> None:
    if importlib.util.find_spec(module) is None:
        comparison.leave_out(name, f"{module} is not installed")
        return
    command = [sys.executable, str(PEERS), name, str(checkpoint.path)]
    comparison.add(
        name,
        launched(command, checks_peer(checkpoint, tolerance), before=partial(page_cache.warm, checkpoint)),
        nbytes=checkpoint.nbytes,
        threads=threads,
    )


def _check_fingerprint(checkpoint: BenchCheckpoint, fingerprint: Fingerprint) -> None:
    checks_scan(checkpoint)(json.dumps(fingerprint.to_json()))
