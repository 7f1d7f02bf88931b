"""Measures a machine, row by row: storage, page cache, memory, the way to a GPU, kernels, and a whole scan.

Every row is repeated until it has SAMPLES samples or its share of the time is over, after one repetition that is not
counted; its answer is checked, untimed: reads by the sum of their 64-bit words, kernels and scans by float64. A row
that cannot run here, or whose turn comes when the time is over, is skipped with the reason. Files are written only
where a quarter of the disk's free space is enough, device memory taken only where half of what is free is.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfp import api
from llmfp.errors import LlmfpError
from llmfp.hardware import machine, samples
from llmfp.hardware.records import Record, measured, skipped
from llmfp.kernels import Backend, load
from llmfp.kernels.reference import decode
from llmfp.marginals import Chunk, Marginals, unit_rows

if TYPE_CHECKING:
    import torch

SAMPLES = 7
SECONDS = 100.0
"""For everything: with start and the last row's overrun, two minutes."""
ROW_SECONDS = 6.0
LARGEST_BYTES = 1 << 30
_DIRECT_THREADS = 4
_ALL = (1 << 64) - 1
DTYPES = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
Say = Callable[[str], None]


class _Skip(Exception):  # noqa: N818
    """Why a row cannot be measured here."""


class _Run:
    """The rows so far, and the time that is left."""

    def __init__(self, say: Say, nbytes: int | None, seconds: float) -> None:
        self.records: list[Record] = []
        self.nbytes = nbytes or _beyond_caches()
        self.threads = machine.cores()
        self._say, self._end = say, time.monotonic() + seconds

    def row(
        self,
        group: str,
        test: str,
        nbytes: int,
        work: Callable[[], Any],
        check: Callable[[Any], float],
        *,
        ceiling: Record | None = None,
        prepare: Callable[[], None] = lambda: None,
        timer: Callable[[Callable[[], Any]], tuple[int, Any]] | None = None,
        **where: Any,
    ) -> Record:
        """Measures and keeps a row; check gives the error of an answer."""
        left = self.seconds_left
        device = where.get("device", "cpu")
        if left <= 0:
            return self.skip(group, test, "out of time", device)
        self._say(f"{group}: {test}")
        stop = time.monotonic() + min(ROW_SECONDS, left)
        found: list[int] = []
        error = 0.0
        try:
            while len(found) <= SAMPLES and (len(found) < 2 or time.monotonic() < stop):
                prepare()
                taken, answer = (timer or _timed)(work)
                found.append(taken)
                error = max(error, check(answer))
        except (_Skip, LlmfpError, MemoryError, OSError, RuntimeError) as reason:
            return self.skip(group, test, _one_line(reason), device)
        self.records.append(measured(group, test, nbytes, found[1:], ceiling, error, **where))
        return self.records[-1]

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def skip(self, group: str, test: str, reason: str, device: str = "cpu") -> Record:
        self.records.append(skipped(group, test, reason, device))
        return self.records[-1]


def run(path: Path | None, say: Say, *, nbytes: int | None = None, seconds: float = SECONDS) -> list[Record]:
    """All rows. `path`: a checkpoint, which is read, or a directory to write one to for the time being; the system's
    directory for temporary files when None.

    say     told what is being measured
    nbytes  of every row; several times the last-level cache when None

    Raises LlmfpError for a path that is not there."""
    bench = _Run(say, nbytes, seconds)
    memory = _memory(bench)
    _kernels(bench, memory)
    with _checkpoint(bench, path) as (source, reason):
        if source is None:
            for group, test in (
                ("storage", "O_DIRECT"),
                ("page cache", "pread"),
                ("page cache", "mmap"),
                ("scan", "warm"),
            ):
                bench.skip(group, test, reason)
        else:
            _files(bench, source, memory)
    _devices(bench)
    return bench.records


def _beyond_caches() -> int:
    _, available = machine.memory_bytes()
    wanted = min(LARGEST_BYTES, max(256 << 20, 4 * machine.last_level_cache_bytes()), available // 4)
    return max(1, wanted // samples.BLOCK_BYTES) * samples.BLOCK_BYTES


def _timed(work: Callable[[], Any]) -> tuple[int, Any]:
    start = time.perf_counter_ns()
    answer = work()
    return time.perf_counter_ns() - start, answer


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:200]


def _right(expected: int, answer: int) -> float:
    if answer != expected:
        raise _Skip("the bytes read are not those written")
    return 0.0


def _in_threads(threads: int, work: Callable[[int], int], pieces: range) -> int:
    """The sum of the work on all pieces, modulo 2^64."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, pieces)) & _ALL


def _words(data: Any, offset: int, nbytes: int) -> int:
    try:
        from llmfp import _native
    except ImportError:
        return int(np.frombuffer(data, np.uint64, nbytes // 8, offset).sum(dtype=np.uint64))
    return _native.sum_words(data, offset, nbytes)


def _memory(bench: _Run) -> Record:
    """The read ceiling of memory, which page cache and kernels are measured against."""
    block = samples.block("BF16").tobytes()
    with mmap.mmap(-1, bench.nbytes) as buffer:
        _fill(buffer, block)
        expected = _words(block, 0, len(block)) * (bench.nbytes // len(block)) & _ALL
        pieces = range(0, bench.nbytes, samples.BLOCK_BYTES)
        row = partial(bench.row, "memory", nbytes=bench.nbytes, check=partial(_right, expected))
        view = memoryview(buffer)

        def piece(offset: int) -> int:
            return _words(view, offset, min(samples.BLOCK_BYTES, bench.nbytes - offset))

        if bench.threads > 1:
            row(test="read, 1 thread", work=lambda: _in_threads(1, piece, pieces), threads=1)
        found = row(test="read", work=lambda: _in_threads(bench.threads, piece, pieces), threads=bench.threads)
        view.release()
    return found


def _fill(buffer: mmap.mmap, block: bytes) -> None:
    for offset in range(0, len(buffer), len(block)):
        buffer[offset : offset + len(block)] = block[: len(buffer) - offset]


def _kernels(bench: _Run, memory: Record) -> None:
    """The CPU's kernel on every dtype, plain and weighted."""
    backend = load("native_cpu")
    reason = backend.why_unavailable() or ("out of time" if bench.seconds_left <= 0 else None)
    if reason is not None:
        for dtype in DTYPES:
            bench.skip("kernel", dtype, reason)
        return
    gain = (1 + np.random.default_rng(1).standard_normal(samples.COLS) / 4).astype(np.float32)
    with mmap.mmap(-1, bench.nbytes) as buffer:
        view = memoryview(buffer)
        for dtype in DTYPES:
            _fill(buffer, samples.block(dtype).tobytes())
            for test, weights in ((dtype, {}), (f"{dtype} weighted", {"col_weight": gain.data.cast("B")})):
                make = partial(_chunk, dtype, weights)
                expected = load("reference").marginals(make(view, 0))

                chunks = [make(view, offset) for offset in range(0, bench.nbytes, samples.BLOCK_BYTES)]
                work = partial(_reduced, backend, chunks, bench.threads)
                check = partial(_deviation, expected, samples.COLS)
                bench.row("kernel", test, bench.nbytes, work, check, ceiling=memory, threads=bench.threads)
                chunks.clear()
        view.release()


def _reduced(backend: Backend, chunks: list[Chunk], threads: int) -> Marginals:
    """Of the last chunk, after all of them."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(backend.marginals, chunks))[-1]


def _chunk(dtype: str, weights: Mapping[str, Any], data: Any, offset: int) -> Chunk:
    row_bytes = samples.COLS * samples.stored_type(dtype).itemsize
    rows = samples.BLOCK_BYTES // row_bytes
    return Chunk(data, dtype, rows, samples.COLS, offset, row_bytes, unit_rows(samples.COLS), **weights)


def _deviation(expected: Marginals, cols: int, answer: Marginals) -> float:
    """The largest relative deviation of any row's or column's std. Raises _Skip for NaN or another count."""
    worst = 0.0
    for name in ("row", "col", "weighted_row"):
        ours, theirs = getattr(answer, name), getattr(expected, name)
        if theirs is not None:
            x, y = np.sqrt(np.frombuffer(ours.m2) / cols), np.sqrt(np.frombuffer(theirs.m2) / cols)
            worst = max(worst, float(np.abs(x / y - 1).max()))
    if not math.isfinite(worst):
        raise _Skip("the kernel's answer is not finite")
    return worst


@contextmanager
def _checkpoint(bench: _Run, path: Path | None) -> Iterator[tuple[Path | None, str]]:
    """The checkpoint that files are measured on, or None and why there is none."""
    if path is not None and not path.exists():
        raise LlmfpError(f"{path}: no such file or directory")
    if path is not None and (path.is_file() or any(path.glob("*.safetensors")) or any(path.glob("*.gguf"))):
        yield path, ""
        return
    place = Path(tempfile.gettempdir()) if path is None else path
    if bench.seconds_left <= 0:
        yield None, "out of time"
        return
    try:
        free = shutil.disk_usage(place).free
        if bench.nbytes > free // 4:
            yield None, f"{bench.nbytes >> 20} MiB are more than a quarter of what is free on the disk"
            return
        with tempfile.TemporaryDirectory(prefix="llmfp-bench-", dir=place) as name:
            samples.write_checkpoint(Path(name), bench.nbytes)
            yield Path(name), ""
    except OSError as error:
        yield None, f"no file can be written: {error.strerror or error}"


def _files(bench: _Run, source: Path, memory: Record) -> None:
    """Storage, page cache and whole scans, on the attention weights' largest shard."""
    try:
        plan = api.plan(source)
    except LlmfpError as error:
        bench.skip("scan", "warm", str(error))
        return
    shard = max(plan.checkpoint.shards, key=lambda each: each.nbytes)
    size = min(shard.nbytes, bench.nbytes) // samples.BLOCK_BYTES * samples.BLOCK_BYTES or shard.nbytes // 4096 * 4096
    pieces = range(0, size, samples.BLOCK_BYTES)
    file = os.open(shard.path, os.O_RDONLY)
    try:
        os.fsync(file)
        read = partial(_pread, file, size)
        expected = _in_threads(bench.threads, read, pieces)
        direct = _direct(bench, shard.path, size, pieces, expected)
        right = partial(_right, expected)
        rates = [
            bench.row(
                "page cache",
                "pread",
                size,
                lambda: _in_threads(bench.threads, read, pieces),
                right,
                ceiling=memory,
                threads=bench.threads,
            )
        ]
        with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as mapped:
            work = partial(_in_threads, bench.threads, partial(_mapped, mapped, size), pieces)
            rates.append(bench.row("page cache", "mmap", size, work, right, ceiling=memory, threads=bench.threads))
        fastest = max(rates, key=lambda record: record.gbps or 0.0)
        check = partial(_scan_deviation, _first_std(source))
        scan = partial(api.scan, source)
        nbytes = plan.total_bytes
        bench.row("scan", "warm", nbytes, scan, check, ceiling=fastest, threads=plan.threads)
        if direct.status == "ok" and plan.checkpoint.path == source:
            drop = partial(_drop, [each.path for each in plan.checkpoint.shards])
            bench.row("scan", "cold", nbytes, scan, check, ceiling=direct, prepare=drop, threads=plan.threads)
        else:
            bench.skip("scan", "cold", "storage could not be measured")
    finally:
        os.close(file)


def _pread(file: int, size: int, offset: int) -> int:
    """Half a MiB at a time: the copy stays in the core's own cache."""
    buffer = bytearray(512 << 10)
    total = 0
    stop = min(offset + samples.BLOCK_BYTES, size)
    while offset < stop:
        got = os.preadv(file, [memoryview(buffer)[: stop - offset]], offset)
        if got <= 0 or got % 8:
            raise OSError(errno.EIO, "the file ended early")
        total += _words(buffer, 0, got)
        offset += got
    return total


def _mapped(mapped: mmap.mmap, size: int, offset: int) -> int:
    nbytes = min(samples.BLOCK_BYTES, size - offset)
    try:
        from llmfp import _native
    except ImportError:
        return _words(mapped, offset, nbytes)
    _native.populate(mapped, offset, nbytes)
    total = _native.sum_words(mapped, offset, nbytes)
    _native.release(mapped, offset, nbytes)
    return total


def _direct(bench: _Run, path: Path, size: int, pieces: range, expected: int) -> Record:
    """Past the page cache: what the storage can do, and, where it was read before, what lies below it."""
    if not hasattr(os, "O_DIRECT"):
        return bench.skip("storage", "O_DIRECT", "this system has no O_DIRECT")
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        return bench.skip("storage", "O_DIRECT", f"the file system has no O_DIRECT: {error.strerror}")

    def piece(offset: int) -> int:
        nbytes = min(samples.BLOCK_BYTES, size - offset)
        with mmap.mmap(-1, nbytes) as buffer:  # aligned to a page
            if os.preadv(file, [buffer], offset) != nbytes:
                raise OSError(errno.EIO, "a short read")
            return _words(buffer, 0, nbytes)

    try:
        work = partial(_in_threads, _DIRECT_THREADS, piece, pieces)
        return bench.row("storage", "O_DIRECT", size, work, partial(_right, expected), threads=_DIRECT_THREADS)
    finally:
        os.close(file)


def _drop(paths: list[Path]) -> None:
    """Asks the kernel to forget the files' pages. Raises _Skip where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        raise _Skip("this system cannot be asked to forget cached pages")
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def _first_std(source: Path) -> tuple[str, int, float] | None:
    """Role, layer and float64 std of the first plain tensor the plan reads; None where none is plain and small."""
    plan = api.plan(source)
    for task in plan.tasks:
        spec, p = task.tensor, task.projections[0]
        if spec.encoding is None and spec.lora is None and spec.nbytes <= 256 << 20 and task.groups == 1:
            with plan.checkpoint.shards[spec.shard].path.open("rb") as file:
                file.seek(spec.offset_bytes)
                data = file.read(spec.nbytes)
            stride = task.row_stride * spec.itemsize
            chunk = Chunk(data, spec.dtype, p.view.rows, p.view.cols, p.view.start * spec.itemsize, stride, 1024)
            return str(p.role), p.layer, float(decode(chunk).std())
    return None


def _scan_deviation(expected: tuple[str, int, float] | None, answer: Any) -> float:
    if expected is None:
        return 0.0
    role, layer, std = expected
    for tower in answer.towers.values():
        if layer in tower.layers and role in tower.statistics:
            found = tower.statistics[role][tower.layers.index(layer)]
            if found is not None:
                return float(abs(found.std / std - 1))
    raise _Skip("the scan lacks a tensor that its plan has")


def _devices(bench: _Run) -> None:
    """The way to every GPU and what it does there."""
    tests = ("host to device, pageable", "host to device, pinned", "device read", "kernels")
    found, reason = machine.gpus()
    if not found:
        for test in tests:
            bench.skip("device", test, reason or "", "gpu")
    for device, model, driver in found:
        _device(bench, device, {"device": model, "driver": driver})


def _device(bench: _Run, device: str, where: Mapping[str, Any]) -> None:
    import torch

    from llmfp.kernels import on

    nbytes = bench.nbytes
    if device.startswith("cuda") and 2 * nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        bench.skip("device", "all", f"{2 * nbytes >> 20} MiB are more than half of what is free on it", where["device"])
        return
    timer = partial(_event_timed, device) if device.startswith("cuda") else partial(_synchronised, device)
    block = torch.from_numpy(samples.block("BF16").view(np.uint8))
    host = block.repeat(nbytes // samples.BLOCK_BYTES)
    room = torch.empty(nbytes, dtype=torch.uint8, device=device)
    row = partial(bench.row, "device", nbytes=nbytes, timer=timer, **where)

    def arrived(_: Any) -> float:
        return _right(1, int(torch.equal(room[-samples.BLOCK_BYTES :].cpu(), block)))

    pinned = None
    if device.startswith("cuda"):
        locked = host.pin_memory()
        pinned = row(test="host to device, pinned", work=lambda: room.copy_(locked, non_blocking=True), check=arrived)
    row(test="host to device, pageable", work=lambda: room.copy_(host), check=arrived, ceiling=pinned)
    integers = room.view(torch.int32)
    total = int(host.view(torch.int32).sum())
    read = row(test="device read", work=lambda: integers.sum(), check=lambda answer: _right(total, int(answer)))
    backend, note = on(device)
    if note:
        bench.skip("device", "fused kernels", note, where["device"])
    for dtype in DTYPES:
        if dtype not in backend.dtypes or (device == "mps" and dtype.startswith(("F64", "F8"))):
            bench.skip("device", dtype, f"back end {backend.name} does not reduce it here", where["device"])
            continue
        _device_kernel(bench, backend, room, dtype, read, timer, where)


def _device_kernel(
    bench: _Run, backend: Backend, room: torch.Tensor, dtype: str, ceiling: Record, timer: Any, where: Mapping[str, Any]
) -> None:
    """One launch over all of the buffer, as live models are reduced; host tables and the copy back are included."""
    import torch

    stored = samples.block(dtype)
    room.copy_(torch.from_numpy(stored.view(np.uint8)).repeat(len(room) // samples.BLOCK_BYTES))
    expected = load("reference").marginals(_chunk(dtype, {}, stored.tobytes(), 0))
    chunks = [_chunk(dtype, {}, room, offset) for offset in range(0, len(room), samples.BLOCK_BYTES)]
    many = getattr(backend, "marginals_many", None)

    def work() -> list[Marginals]:
        found: list[Marginals] = many(chunks) if many is not None else [backend.marginals(each) for each in chunks]
        return found

    def check(answer: list[Marginals]) -> float:
        return _deviation(expected, samples.COLS, answer[-1])

    bench.row("device", f"kernel {dtype}", len(room), work, check, ceiling=ceiling, timer=timer, **where)


def _event_timed(device: str, work: Callable[[], Any]) -> tuple[int, Any]:
    """By the device's own clock, the host's waiting included."""
    import torch

    event: Any = torch.cuda.Event
    with torch.cuda.device(device):
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        answer = work()
        end.record()
        torch.cuda.synchronize()
        return int(start.elapsed_time(end) * 1e6), answer


def _synchronised(device: str, work: Callable[[], Any]) -> tuple[int, Any]:
    import torch

    def finished() -> Any:
        answer = work()
        if device == "mps":
            torch.mps.synchronize()
        return answer

    return _timed(finished)
