"""Collects bench_*.py, and provides what the suites measure on."""

from __future__ import annotations

import sys

import pytest

from bench import checkpoints, page_cache
from bench.checkpoints import BenchCheckpoint, LlamaShape


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("filterwarnings", "default")  # the peers' warnings are theirs


def pytest_ignore_collect() -> bool | None:
    return True if sys.platform != "linux" else None  # madvise, mincore and O_DIRECT as Linux has them


@pytest.fixture(scope="session")
def big() -> BenchCheckpoint:
    """32 layers, 2.7 GB of attention weights, freshly read into the page cache."""
    checkpoint = checkpoints.checkpoint(LlamaShape(32))
    page_cache.evict(checkpoint)
    page_cache.warm(checkpoint)
    return checkpoint


@pytest.fixture(scope="session")
def small() -> BenchCheckpoint:
    """Two tiny layers."""
    return checkpoints.checkpoint(checkpoints.SMALL)
