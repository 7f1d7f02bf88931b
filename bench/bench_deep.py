"""What looking at heads costs: a deep scan against a plain one and against matrix products; comparing two fingerprints.

The operations of a deep scan are those of its products, each multiplication and addition counted, symmetric halves
too: for heads of h outputs and d inputs, 2·h²·d for each of Q, K, V, O and Q with K.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bench import ceilings, page_cache
from bench.checkpoints import BenchCheckpoint, LlamaShape
from bench.harness import Benchmark, Comparison, rounds, timed
from bench.processes import checks_scan, launched, llmfp_fast
from llmfp.architecture import Rotary
from llmfp.circuits import SKETCH, Circuits
from llmfp.fingerprint import Fingerprint, TowerFingerprint
from llmfp.statistics import Statistics

PLAIN, DEEP, GEMM = "llmfp-fast scan", "llmfp-fast scan --deep", "float32 matrix products of as many operations"
MIB = 1 << 20
SIDE = 2048


def test_deep_scan(big: BenchCheckpoint, benchmark: Benchmark) -> None:
    comparison = Comparison("deep", "deep scan", page_cache.WARM)
    warm = partial(page_cache.warm, big)
    for name, options in ((PLAIN, ()), (DEEP, ("--deep",))):
        command = llmfp_fast("scan", str(big.path), "--json", *options)
        comparison.add(name, launched(command, checks_scan(big), before=warm), nbytes=big.nbytes, threads=None)
    count = -(-operations(LlamaShape(big.layers)) // (2 * SIDE**3))
    a, b = (np.random.default_rng(n).standard_normal((SIDE, SIDE), np.float32) for n in (0, 1))
    row = a[0].astype(np.float64) @ b.astype(np.float64)

    def multiply() -> np.ndarray:
        for _ in range(count):
            product = a @ b
        return product

    check = timed(multiply, lambda c: np.testing.assert_allclose(c[0], row, atol=1e-3))
    comparison.add(GEMM, check, nbytes=big.nbytes, threads=ceilings.cores())
    comparison.at_least("deep scan: at least 0.5 of the float32 matrix product rate", DEEP, [GEMM], 0.5)
    comparison.run(benchmark, rounds(5))


def test_memory(big: BenchCheckpoint, benchmark: Benchmark) -> None:
    comparison = Comparison("deep", "memory of a deep scan above the interpreter's", page_cache.WARM)
    plan = launched(llmfp_fast("plan", str(big.path), "--json"))
    comparison.add("llmfp-fast plan", plan, nbytes=None, threads=None)
    for budget in (128, 512):
        name = f"{DEEP} --memory {budget}MiB"
        command = llmfp_fast("scan", str(big.path), "--json", "--deep", "--memory", f"{budget}MiB")
        comparison.add(name, launched(command, checks_scan(big)), nbytes=big.nbytes, threads=None)
        comparison.within(f"memory: deep within {budget} MiB", name, "llmfp-fast plan", budget * MIB)
    comparison.run(benchmark, rounds(3))


def test_compare(benchmark: Benchmark, tmp_path: Path) -> None:
    """Two fingerprints of 48 layers of 5120, 40 heads of 128 in 8 groups: from process start to the verdict."""
    files = [fingerprint(48, 5120, 40, 8, 128, seed) for seed in (0, 1)]
    names = [str(tmp_path / f"{n}.fp.safetensors") for n in (0, 1)]
    for file, name in zip(files, names, strict=True):
        file.save(name)
    comparison = Comparison("deep", "compare of two saved fingerprints", "warm: repeated runs")
    for permutations in (100_000, 1):
        command = llmfp_fast("compare", *names, "--json", "--permutations", str(permutations))
        check = partial(_check_verdict, permutations)
        comparison.add(
            f"llmfp-fast compare, {permutations:,} permutations", launched(command, check), nbytes=None, threads=None
        )
    shown = launched(llmfp_fast("show", names[0], "--json"))
    comparison.add("llmfp-fast show, one of them", shown, nbytes=None, threads=None)
    numpy = launched([sys.executable, "-c", "import numpy"])
    comparison.add("python -c 'import numpy'", numpy, nbytes=None, threads=None)
    comparison.run(benchmark, rounds(7))


def operations(shape: LlamaShape) -> int:
    heads = 3 * shape.heads + 2 * shape.kv_heads  # Q, O and Q with K; K and V
    return 2 * heads * shape.head_dim**2 * shape.hidden * shape.layers


def fingerprint(layers: int, hidden: int, heads: int, kv_heads: int, size: int, seed: int) -> Fingerprint:
    """A model's that never was: every array of a deep fingerprint in its true size, random."""
    rng = np.random.default_rng(seed)
    entries = 3 * (size // 2) ** 2

    def halves(*shape: int) -> bytes:
        return rng.normal(-5, 1, shape).astype(np.float16).tobytes()

    def statistics(role: str) -> Statistics:
        std = float(rng.uniform(0.01, 0.03))
        head_std = rng.uniform(0.01, 0.03, heads if role in "qo" else kv_heads).tobytes()
        return Statistics(hidden * hidden, 0.0, std, 5 * std, 0, head_std, halves(hidden))

    def circuits() -> Circuits:
        norms = [rng.normal(size=heads).tobytes() for _ in range(2)]
        return Circuits(norms[0], norms[1], halves(entries), halves(heads, SKETCH), None, None)

    tower = TowerFingerprint(
        tuple(range(layers)), heads, kv_heads, size, hidden,
        {role: tuple(statistics(role) for _ in range(layers)) for role in "qkvo"},
        Rotary(size // 2, False), False, tuple(circuits() for _ in range(layers)),
    )  # fmt: skip
    run = {
        "backend": "none", "simd": "none", "reader": "none", "seconds": 1.0, "bytes_read": 1, "bytes_total": 1,
        "peak_rss_bytes": 1, "threads": 1,
    }  # fmt: skip
    return Fingerprint("llama", {"decoder": tower}, {"name": f"random {seed}"}, run, (), (), f"{seed:064}")


def _check_verdict(permutations: int, printed: str) -> None:
    found = json.loads(printed)
    assert found["verdict"] == ("none_detected" if permutations > 1000 else "inconclusive")
    assert found["residual"]["dims"] == 5120
    assert found["heads"]["layers"] == 48
    assert found["coherence"]["excess"] == pytest.approx(0, abs=5)
