"""A registry of 100,000 fingerprints: listing it, finding the nearest, adding to it, compacting it.

Rows are drawn, with shapes as the Hub has them and a coherence sketch in three of four; they have no fingerprint files,
which neither listing nor ranking opens. What adding costs is measured with whole fingerprints, files included.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.harness import Benchmark, Comparison, rounds, timed
from bench.processes import launched, llmfp_fast
from llmfp.fingerprint import Fingerprint, TowerFingerprint
from llmfp.registry import Origin, Registry, nearest
from llmfp.registry.index import Index
from llmfp.registry.nearest import SKETCH
from llmfp.registry.store import open_store
from llmfp.statistics import Statistics

ROWS, TARGET = 100_000, 77_777
GIB = 1 << 30
FRAGMENTS = 200
WARM = "warm: the index was written, and read, just before"
LOOK_UP = """
import json, sys
import numpy as np
from llmfp.registry import Registry, nearest
std = json.loads(sys.argv[2])
table = Registry.open(sys.argv[1]).table(["repo", "std_q", "std_k", "std_v", "std_o", *sys.argv[3:]])
scores = nearest.pearson(std, table)
print(table["repo"][int(np.nanargmax(scores))])
"""
BY_PROFILE, WITH_SKETCHES = "nearest by profile", "nearest by profile, sketches of coherence read too"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The place, and the row to look for."""
    where = tmp_path_factory.mktemp("registry") / "registry"
    Registry.open(where, create=True)
    rows = list(itertools.islice(drawn(np.random.default_rng(0)), ROWS))
    for start in range(0, ROWS, 10_000):
        Index(open_store(where)).append(rows[start : start + 10_000])
    Registry.open(where).compact()
    yield where, rows[TARGET]
    shutil.rmtree(where)


def test_whole_programs(registry: tuple[Path, dict[str, Any]], benchmark: Benchmark) -> None:
    """From start to exit. The budget is on what is resident at the peak, interpreter and libraries included."""
    where, row = registry
    comparison = Comparison("registry", f"{ROWS:,} fingerprints, whole programs", WARM)
    imports = [sys.executable, "-c", "import pyarrow.parquet, numpy"]
    comparison.add("python: import pyarrow.parquet, numpy", launched(imports), nbytes=None, threads=None)
    listing = launched(llmfp_fast("registry", "ls", str(where)), partial(_has, f"{ROWS:,} fingerprints"))
    comparison.add("llmfp-fast registry ls", listing, nbytes=None, threads=None)
    some = launched(llmfp_fast("registry", "ls", str(where), row["repo"]), partial(_has, row["repo"]))
    comparison.add("llmfp-fast registry ls REPO", some, nbytes=None, threads=None)
    std = json.dumps({role: row[f"std_{role}"] for role in "qkvo"})
    for name, more in ((BY_PROFILE, ()), (WITH_SKETCHES, ("coherence",))):
        look_up = launched([sys.executable, "-c", LOOK_UP, str(where), std, *more], partial(_has, row["repo"]))
        comparison.add(name, look_up, nbytes=None, threads=None)
    here = timed(partial(_look_up, where, row), lambda repo: _has(row["repo"], repo))
    comparison.add("the same look-up, in a process that runs already", here, nbytes=None, threads=None)
    for name in ("llmfp-fast registry ls", BY_PROFILE, WITH_SKETCHES):
        comparison.within(f"{name}: within 1 GB beyond the imports", name, "python: import pyarrow.parquet, numpy", GIB)
    comparison.run(benchmark, rounds(7))


def _look_up(where: Path, row: dict[str, Any]) -> str:
    table = Registry.open(where).table(["repo", *(f"std_{role}" for role in "qkvo")])
    scores = nearest.pearson({role: row[f"std_{role}"] for role in "qkvo"}, table)
    return str(table["repo"][int(np.nanargmax(scores))])


def test_changes(registry: tuple[Path, dict[str, Any]], tmp_path: Path, benchmark: Benchmark) -> None:
    """In this process; every file is durable (fsync) before the next."""
    where, _ = registry
    fingerprints = [(made(n), Origin(f"added/{n}", "a" * 40)) for n in range(100)]
    fresh = itertools.count()
    comparison = Comparison("registry", "adding to and compacting a registry, in this process", WARM)

    def add_one_by_one() -> int:
        kept = Registry.open(tmp_path / str(next(fresh)), create=True)
        for each in fingerprints:
            kept.add([each])
        return kept.table(["repo"]).num_rows

    def add_at_once() -> int:
        kept = Registry.open(tmp_path / str(next(fresh)), create=True)
        kept.add(fingerprints)
        return kept.table(["repo"]).num_rows

    def compact() -> int:
        return Registry.open(where).compact().rows

    def with_fragments() -> None:
        index = Index(open_store(where))
        index.remove(row["entry"] for row in index.read_all(["entry"]).to_pylist() if row["repo"].startswith("new/"))
        index.compact()
        rows = itertools.islice(drawn(np.random.default_rng(next(fresh))), FRAGMENTS)
        for n, row in enumerate(rows):
            index.append([row | {"repo": f"new/{n}"}])

    for name, work, rows in (("100 fingerprints, one by one", add_one_by_one, 100),
                             ("100 fingerprints at once", add_at_once, 100)):  # fmt: skip
        comparison.add(name, timed(work, partial(_equals, rows)), nbytes=None, threads=1)
    measure = timed(compact, partial(_equals, ROWS + FRAGMENTS))

    def compacted() -> Any:
        with_fragments()
        return measure()

    comparison.add(f"compact {ROWS:,} rows and {FRAGMENTS} of single rows", compacted, nbytes=None, threads=None)
    comparison.run(benchmark, rounds(5))


def _has(wanted: str, printed: str) -> None:
    assert wanted in printed


def _equals(wanted: int, answer: int) -> None:
    assert answer == wanted


def made(seed: int) -> Fingerprint:
    """A plain fingerprint of 32 layers of width 4096."""
    draw = np.random.default_rng(seed)

    def statistics() -> Statistics:
        residual = draw.standard_normal(4096).astype(np.float16).tobytes()
        return Statistics(1, 0.0, float(draw.uniform(0.01, 0.03)), 1.0, 0, draw.random(32).tobytes(), residual)

    tower = TowerFingerprint(
        tuple(range(32)), 32, 8, 128, 4096, {role: tuple(statistics() for _ in range(32)) for role in "qkvo"}
    )
    run = {"backend": "none", "simd": "none", "reader": "none", "seconds": 0.0, "bytes_read": 1, "bytes_total": 1,
           "peak_rss_bytes": 1, "threads": 1}  # fmt: skip
    digest = hashlib.sha256(str(seed).encode()).hexdigest()
    return Fingerprint("llama", {"decoder": tower}, {"name": str(seed)}, run, (), (), digest)


def drawn(draw: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Rows; one in ten is a hybrid, with attention in every fourth layer."""
    depths = [12, 16, 22, 24, 28, 32, 32, 32, 36, 40, 48, 64, 80]
    for n in itertools.count():
        layers = int(draw.choice(depths))
        std = draw.uniform(0.01, 0.03, (4, layers))
        curves = [[x if n % 10 or i % 4 == 3 else None for i, x in enumerate(row)] for row in std.tolist()]
        commit = hashlib.sha1(str(n).encode()).hexdigest()
        name = hashlib.sha256(commit.encode()).hexdigest()
        entry = uuid.UUID(int=int(draw.integers(0, 2**63)) + n).hex
        yield {
            "repo": f"org-{n % 999}/model-{n}", "revision": commit, "entry": entry, "sha256": name, "digest": name,
            "file": f"fingerprints/{name[:2]}/{name}-{entry}.fp.safetensors", "architecture": "llama",
            "tower": "decoder", "kind": "decoder", "model_type": "llama", "heads": 32, "kv_heads": 8, "head_dim": 128,
            "layers": layers, "hidden_size": 4096, "rotary_pairs": 64,
            "coherence": draw.standard_normal(SKETCH).astype(np.float32).tolist() if n % 4 else None,
            "base_models": [f"org-{n % 7}/base"], "base_model_relation": "finetune", "weights": name, "config": name,
            "stamp": None, "bytes_read": 1, "bytes_total": 1, "added": datetime.now(UTC),
            **{f"std_{role}": curve for role, curve in zip("qkvo", curves, strict=True)},
        }  # fmt: skip
