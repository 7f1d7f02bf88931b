"""The kernels on a GPU: right first, then how fast; a few minutes, results in bench/results/gpu-<device>.json.

    python -m bench.gpu               # on the first GPU
    python -m bench.gpu --dry-run     # the same script, small, on the CPU: proves that it runs; writes nothing

Times are medians of the device's own events over input sets that together exceed its second-level cache several times
and take turns, so that none finds itself there. Every variant's σ is checked against float64 first; a wrong one ends
the run. Ceilings, measured in the same run: a copy within the device (read and write), torch.sum of int32 (read), and a
copy from pinned memory. Peers give one σ per tensor, or less; the kernel gives mean and M2 of every row and column.
"model" is many matrices in one launch, as of a model that lies on the device; "streamed" comes through a staging ring.
That launches wait for nothing is checked first: torch raises an error where one would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmfp.device import TorchLink
from llmfp.hardware import machine, samples
from llmfp.kernels import load, on
from llmfp.kernels.reference import decode
from llmfp.kernels.triton_gpu import Matrix, Scale, TritonGpu
from llmfp.marginals import Chunk, Coding, unit_rows
from llmfp.plan import Step
from llmfp.reader.staging import StagingRing

RESULTS = Path(__file__).parents[1] / "results"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
SCALED = ("F8_E4M3", "F8_E5M2")
"""Also with a scale per block of BLOCK rows and columns, decoded in the kernel."""
BLOCK = 128
SHAPES = [(1, 1), (5, 123), (123, 5), (257, 130), (312, 520), (64, 4096)]
SETS = 4
SET_BYTES = 512 << 20
ROUNDS = 20
TARGET = 0.9
"""Of the read ceiling, for weights that are on the device."""
Work = Callable[[int], Any]


@dataclass(frozen=True, slots=True)
class Setting:
    device: str
    set_bytes: int
    rounds: int
    dry: bool


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Checks and times the kernels on a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="small and on the CPU; nothing is written")
    dry = parser.parse_args(arguments).dry_run
    if not dry and not torch.cuda.is_available():
        print("error: torch finds no GPU\nhint: --dry-run runs this script on the CPU", file=sys.stderr)
        return 2
    setting = Setting("cpu", 1 << 17, 1, True) if dry else Setting("cuda:0", SET_BYTES, ROUNDS, False)
    backend, note = on(setting.device)
    if note and not dry:
        print(f"error: {note}", file=sys.stderr)
        return 2
    largest = check(backend)
    if not dry:
        check_launches(backend, setting.device)
    kinds = f"{len(DTYPES)} dtypes, and of {len(SCALED)} with scales"
    print(f"right: {len(SHAPES)} shapes of {kinds}, largest error of a σ {largest:.1e}\n")
    rows = [*ceilings(setting)]
    read = next(row["gbps"] for row in rows if row["name"] == "read: torch.sum of int32")
    for dtype in DTYPES:
        rows += kernels(setting, backend, dtype)
    for dtype in SCALED:
        rows += kernels(setting, backend, dtype, scaled=True)
    rows += [model(setting, backend), *streamed(setting, backend)]
    for row in rows:
        row["of_read"] = row["gbps"] / read
    print(table(rows))
    if not dry:
        print(store(rows, largest))
    return 0


def check(backend: Any) -> float:
    """The largest relative error of a row's or column's σ, against float64. Raises AssertionError above 1e-6."""
    rng, largest, reference = np.random.default_rng(0), 0.0, load("reference")
    for dtype, scaled in [(dtype, False) for dtype in DTYPES] + [(dtype, True) for dtype in SCALED]:
        for rows, cols in SHAPES:
            stored = samples.encode(rng.normal(0.0, 1.0, rows * cols).astype(np.float32), dtype)
            gain = rng.normal(1, 0.1, cols).astype(np.float32).data.cast("B")
            chunk = Chunk(stored.tobytes(), dtype, rows, cols, 0, cols * stored.itemsize, unit_rows(cols), gain)
            chunk = replace(chunk, coding=scales(dtype, rows, cols)) if scaled else chunk
            ours, truth = backend.marginals(chunk), reference.marginals(chunk)
            for name in ("row", "col", "weighted_row"):
                x, y = (np.sqrt(np.frombuffer(getattr(each, name).m2)) for each in (ours, truth))
                error = float((np.abs(x - y) / np.where(y > 0, y, 1)).max())
                assert error <= 1e-6, (dtype, rows, cols, name, error)
                largest = max(largest, error)
    return largest


def check_launches(backend: Any, device: str) -> None:
    """Launches under torch's watch, which raises RuntimeError where the host would wait for the device."""
    rows, weight = 1024, np.ones(samples.COLS, np.float32).data.cast("B")
    data = torch.zeros(rows * samples.COLS * 2, dtype=torch.uint8, device=device)
    chunk = replace(chunk_of("BF16", data, len(data)), col_weight=weight, cross=True)
    backend.marginals_many([chunk])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [backend.launch([chunk]) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    backend.fetch(launched)


def ceilings(setting: Setting) -> list[dict[str, Any]]:
    sets = [torch.ones(setting.set_bytes, dtype=torch.uint8, device=setting.device) for _ in range(SETS)]
    out = torch.empty_like(sets[0])
    integers = [each.view(torch.int32) for each in sets]
    return [
        row(setting, "copy: read and write", 2 * setting.set_bytes, lambda i: out.copy_(sets[i])),
        row(setting, "read: torch.sum of int32", setting.set_bytes, lambda i: integers[i].sum()),
    ]


def scales(levels: str, rows: int, cols: int, repeats: int = 1) -> Coding:
    """Bytes with a scale per block, the whole repeated: scales of a model's size that differ by a factor of three."""
    shape = -(-rows // BLOCK), -(-cols // BLOCK)
    scale = np.tile(np.random.default_rng(1).uniform(1e-4, 3e-4, shape).astype(np.float32), (repeats, 1))
    sizes = {"scale_rows": len(scale), "scale_cols": shape[1], "row_block": BLOCK, "col_block": BLOCK}
    return Coding("row", 8, levels=levels, scale=scale.tobytes(), **sizes)


def kernels(setting: Setting, backend: Any, dtype: str, scaled: bool = False) -> list[dict[str, Any]]:
    """The fused kernel and its peers on one dtype."""
    stored = samples.block(dtype)
    stored = stored[: setting.set_bytes // stored.itemsize]
    repeats = setting.set_bytes // stored.nbytes
    coding = table = scale = None
    once = chunk_of(dtype, stored.tobytes(), stored.nbytes)
    if scaled:
        once = replace(once, coding=scales(dtype, once.rows, samples.COLS))
        coding = scales(dtype, once.rows, samples.COLS, repeats)
        table = torch.frombuffer(bytearray(coding.scale or b""), dtype=torch.float32).to(setting.device)
        scale = Scale(table.data_ptr(), coding.scale_cols, BLOCK, BLOCK)
    std = float(decode(once).std())
    block = torch.from_numpy(stored.view(np.uint8))
    sets = [block.repeat(repeats).to(setting.device) for _ in range(SETS)]
    tensors = [each.view(getattr(torch, DTYPES[dtype])).view(-1, samples.COLS) for each in sets]
    chunks = [replace(chunk_of(dtype, each, len(each)), coding=coding) for each in sets]

    def reduced(i: int) -> Any:
        if not isinstance(backend, TritonGpu):
            return backend.marginals(chunks[i])
        chunk = chunks[i]
        matrix = Matrix(
            sets[i].data_ptr(),
            dtype,
            chunk.rows,
            chunk.cols,
            chunk.row_stride_bytes,
            chunk.unit_rows,
            scale=scale,
        )
        return backend.reduce([matrix], merged=True, device=setting.device)[0]

    def numbers(i: int) -> torch.Tensor:
        x = tensors[i].float()
        if table is None:
            return x
        rows = min(BLOCK, len(x))
        return x.view(-1, rows, samples.COLS // BLOCK, BLOCK) * table.view(-1, 1, samples.COLS // BLOCK, 1)

    def sigma(found: Any) -> float:
        if isinstance(found, torch.Tensor):
            return float(found)
        total = load("reference").pool(found.row, samples.COLS, sum(found.counts))
        return float(np.sqrt(np.frombuffer(total.m2)[0] / tensors[0].numel()))

    variants: dict[str, tuple[Work, float]] = {f"{backend.name}, end to end": (reduced, 1e-6)}
    named = "x.float().std()" if table is None else "(x.float() * scale).std()"
    variants[named] = (lambda i: numbers(i).std(correction=0), 1e-4)
    if stored.itemsize > 1:
        variants["x.std()"] = (lambda i: tensors[i].std(correction=0), 5e-3)
        variants["torch._foreach_norm"] = (
            lambda i: torch._foreach_norm([tensors[i]])[0].float() / tensors[i].numel() ** 0.5, 5e-3
        )  # fmt: skip
    rows = []
    for name, (work, tolerance) in variants.items():
        assert abs(sigma(work(0)) / std - 1) <= tolerance, (dtype, name, sigma(work(0)), std)
        kind = f"{dtype}, {BLOCK}×{BLOCK} scales" if scaled else dtype
        rows.append(row(setting, f"{kind} {name}", setting.set_bytes, work))
    return rows


def model(setting: Setting, backend: Any) -> dict[str, Any]:
    """A set's bytes as matrices of 16 MiB, launched together and brought back at once."""
    nbytes = min(16 << 20, setting.set_bytes // 4)
    sets = [torch.zeros(setting.set_bytes, dtype=torch.uint8, device=setting.device) for _ in range(SETS)]
    block = torch.from_numpy(samples.block("BF16")[: nbytes // 2].view(np.uint8)).to(setting.device)
    for each in sets:
        each.view(-1, len(block))[:] = block
    chunks = [[chunk_of("BF16", matrix, nbytes) for matrix in each.split(nbytes)] for each in sets]

    def reduced(i: int) -> list[Any]:
        if isinstance(backend, TritonGpu):
            return backend.marginals_many(chunks[i])
        return [backend.marginals(chunk) for chunk in chunks[i]]

    assert len({marginals.row.m2 for marginals in reduced(0)}) == 1
    return row(setting, f"BF16 model: {len(chunks[0])} matrices, {backend.name}", setting.set_bytes, reduced)


def streamed(setting: Setting, backend: Any) -> list[dict[str, Any]]:
    """A set's bytes from host memory through a staging ring; and bare copies of as many from pinned memory."""
    nbytes = min(32 << 20, setting.set_bytes // 4)
    link = TorchLink(setting.device)
    block = samples.block("BF16")[: nbytes // 2].view(np.uint8).data
    steps = [Step(0, 0, n, 1, 0, 0, len(block), False) for n in range(setting.set_bytes // len(block))]

    def fill(_: Step, view: memoryview) -> None:
        view[:] = block

    def through(_: int) -> list[Any]:
        ring, launched, found = StagingRing(fill, link, len(block)), [], []
        try:
            for step in steps:
                ring.announce(step)
            for step in steps:
                chunk = chunk_of("BF16", ring.take(step), len(block))
                if isinstance(backend, TritonGpu):
                    launched.append(backend.launch([chunk]))
                else:
                    found.append(backend.marginals(chunk))
                ring.give(step)
            return [each[0] for each in backend.fetch(launched)] if launched else found
        finally:
            ring.close()

    host, room = link.host(len(block)), link.room(len(block))

    def copied(_: int) -> None:
        link.settle([link.copy(host, room, None) for _ in steps][-1])

    assert len({marginals.row.m2 for marginals in through(0)}) == 1
    total = len(steps) * len(block)
    return [row(setting, "copy: from pinned memory", total, copied), row(setting, "BF16 streamed", total, through)]


def chunk_of(dtype: str, data: Any, nbytes: int) -> Chunk:
    row_bytes = samples.COLS * samples.stored_type(dtype).itemsize
    return Chunk(data, dtype, nbytes // row_bytes, samples.COLS, 0, row_bytes, unit_rows(samples.COLS))


def row(setting: Setting, name: str, nbytes: int, work: Work) -> dict[str, Any]:
    """Medians over rounds, each on the next input set; one round is not counted."""
    found = [timed(setting, work, number % SETS) for number in range(setting.rounds + 1)][1:]
    median = statistics.median(found)
    return {"name": name, "bytes": nbytes, "samples_ns": found, "median_ns": median, "gbps": nbytes / median}


def timed(setting: Setting, work: Work, number: int) -> int:
    if setting.dry:
        begun = time.perf_counter_ns()
        work(number)
        return time.perf_counter_ns() - begun
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work(number)
    end.record()
    torch.cuda.synchronize()
    return round(start.elapsed_time(end) * 1e6)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| what | MB | median ms | min – max ms | GB/s | of read |", "|---|--:|--:|--:|--:|--:|"]
    for each in rows:
        ms = [ns / 1e6 for ns in each["samples_ns"]]
        lines.append(
            f"| {each['name']} | {each['bytes'] / 1e6:.0f} | {statistics.median(ms):.3f} "
            f"| {min(ms):.3f} – {max(ms):.3f} | {each['gbps']:.1f} | {each['of_read']:.2f} |"
        )
    return "\n".join([*lines, "", f"target: the kernels at {TARGET} of read or more"])


def store(rows: list[dict[str, Any]], largest: float) -> Path:
    name = torch.cuda.get_device_name(0)
    slug = "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
    record = {
        "schema": "llmfp.gpu-bench/1",
        "device": name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "largest_error": largest,
        "rows": rows,
    }
    path = RESULTS / f"gpu-{slug}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
