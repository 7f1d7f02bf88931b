"""A remote scan against what curl gets: the same ranges of the same files from the same server on loopback.

The server is tests/hub_server.py in a process of its own, which sends by sendfile; both processes share the machine, so
the ratio says what receiving and reducing cost, not how fast a network is.
"""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import llmfp
from bench import checkpoints, page_cache
from bench.checkpoints import BenchCheckpoint, LlamaShape
from bench.harness import Benchmark, Comparison, rounds, timed
from bench.processes import ROOT, checks_scan, launched, llmfp_fast
from llmfp import api
from llmfp.reader.fetches import fetches

TARGET = 0.8
_REPO = "bench/model"
_CONNECTIONS = 8


@dataclass(frozen=True, slots=True)
class Served:
    """ranges: signed address, first and last byte of every request that a scan makes for weights."""

    checkpoint: BenchCheckpoint
    endpoint: str
    ranges: tuple[tuple[str, int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(last - first + 1 for _, first, last in self.ranges)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    checkpoint = checkpoints.checkpoint(LlamaShape(16))
    page_cache.evict(checkpoint)
    page_cache.warm(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        (top / "bench").mkdir()
        (top / _REPO).symlink_to(checkpoint.path)
        command = [sys.executable, "-m", "tests.hub_server", str(top)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
            assert server.stdout is not None
            endpoint = server.stdout.readline().strip()
            try:
                os.environ["HF_ENDPOINT"], os.environ["HF_HUB_CACHE"] = endpoint, str(top / "cache")
                yield Served(checkpoint, endpoint, _ranges(endpoint))
            finally:
                server.terminate()


def test_remote_scan(served: Served, benchmark: Benchmark, tmp_path: Path) -> None:
    comparison = Comparison("hub", "a remote scan, on loopback", page_cache.WARM)
    comparison.add(
        "llmfp.scan",
        timed(lambda: llmfp.scan(_REPO), partial(_check, served)),
        nbytes=served.nbytes,
        threads=None,
    )
    comparison.add(
        "llmfp-fast scan, from start to exit",
        launched(llmfp_fast("scan", _REPO, "--json"), checks_scan(served.checkpoint)),
        nbytes=served.nbytes,
        threads=None,
    )
    for connections in (1, _CONNECTIONS):
        name = f"curl, connections: {connections}"
        config = tmp_path / f"{connections}.curl"
        config.write_text(_curl_config(served))
        command = ["curl", "--silent", "--fail", "--parallel", "--parallel-max", str(connections), "-K", str(config)]
        comparison.add(name, launched(command), nbytes=served.nbytes, threads=connections)
    comparison.add(
        "httpx2 into a buffer, threads: 8", timed(partial(_by_httpx, served), lambda _: None),
        nbytes=served.nbytes, threads=_CONNECTIONS,
    )  # fmt: skip
    curls = [f"curl, connections: {n}" for n in (1, _CONNECTIONS)]
    comparison.at_least("remote scan: at least 0.8 of curl", "llmfp.scan", curls, TARGET)
    comparison.at_least(
        "remote scan, start-up included: at least 0.8 of curl", "llmfp-fast scan, from start to exit", curls, TARGET
    )
    comparison.run(benchmark, rounds(7))


def _check(served: Served, found: llmfp.Fingerprint) -> None:
    layers = range(served.checkpoint.layers)
    names = {f"model.layers.{n}.self_attn.{role}_proj.weight": found.std[role][n] for role in "qkvo" for n in layers}
    served.checkpoint.check_std({name: std for name, std in names.items() if std is not None}, 1e-6)


def _ranges(endpoint: str) -> tuple[tuple[str, int, int], ...]:
    plan = api.plan(_REPO)
    signed = [_signed(endpoint, plan.checkpoint.revision or "", shard.path.name) for shard in plan.checkpoint.shards]
    return tuple((signed[each.shard], each.offset_bytes, each.offset_bytes + each.nbytes - 1) for each in fetches(plan))


def _signed(endpoint: str, revision: str, name: str) -> str:
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc)
    connection.request("HEAD", f"/{_REPO}/resolve/{revision}/{name}")
    location = connection.getresponse().headers["Location"]
    connection.close()
    return location


def _curl_config(served: Served) -> str:
    parts = [f'url = "{url}"\nrange = {first}-{last}\noutput = /dev/null\n' for url, first, last in served.ranges]
    return "next\n".join(parts)


def _by_httpx(served: Served) -> int:
    """The ranges through the client that huggingface_hub has, into one buffer a thread."""
    import httpx2

    ranges = iter(served.ranges)

    def work() -> int:
        done = 0
        buffer = bytearray(max(last - first + 1 for _, first, last in served.ranges))
        for url, first, last in ranges:
            with client.stream("GET", url, headers={"Range": f"bytes={first}-{last}"}) as answer:
                position = 0
                for part in answer.iter_raw():
                    buffer[position : position + len(part)] = part
                    position += len(part)
            done += position
        return done

    with httpx2.Client() as client, ThreadPoolExecutor(_CONNECTIONS) as pool:
        total = sum(future.result() for future in [pool.submit(work) for _ in range(_CONNECTIONS)])
    assert total == served.nbytes
    return total
