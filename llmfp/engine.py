"""The streaming pass: steps in, statistics out, under the plan's memory budget.

Threads take the plan's steps in order. Each reads one, reduces it to row and column statistics and hands those to the
step's task, which merges them in row order whatever order they arrive in. When the last task of a layer is done, the
layer's statistics go into the digest and the memory back. Nothing here depends on which thread was faster.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmfp import column_runs, statistics
from llmfp.architecture import NormGain, Projection, Role, Vector
from llmfp.checkpoint import TensorSpec
from llmfp.device_sums import DeviceSums, Kept
from llmfp.encoding import decode_gain
from llmfp.errors import CheckpointError
from llmfp.kernels import Backend, Deferring, select
from llmfp.marginals import Buffer, Chunk, Coding, LowRank, Marginals, unit_rows
from llmfp.plan import Plan, Step, Task
from llmfp.reader import Reader
from llmfp.sample import SAMPLED
from llmfp.statistics import Statistics, doubles

if TYPE_CHECKING:
    import torch

    from llmfp.circuits import Circuits, LayerGrams

Progress = Callable[[int, int], None]
"""Called about ten times a second with (bytes reduced, bytes in all)."""

_LOOK_AHEAD_BYTES = 32 << 20
_PROGRESS_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Result:
    """All statistics by (tower, layer, role), circuits by (tower, layer) of a deep scan, the digest over all marginals,
    and what should be said with them."""

    statistics: Mapping[tuple[str, int, str], Statistics]
    circuits: Mapping[tuple[str, int], Circuits]
    digest: str
    caveats: tuple[str, ...]


def run(plan: Plan, backend: Backend, reader: Reader, progress: Progress | None = None) -> Result:
    """Reads and reduces everything in the plan.

    Raises CheckpointError when a file cannot be read to the end or changes under way, and whatever interrupts the
    calling thread, after all workers have stopped.
    """
    with _one_blas_thread() if plan.circuits else nullcontext():
        return _run(_Scan(plan, backend, reader), progress)


def _one_blas_thread() -> AbstractContextManager[object]:
    """Our own threads multiply side by side; and a product's rounding must not depend on how BLAS divides it."""
    from threadpoolctl import threadpool_limits

    import llmfp.circuits  # noqa: F401  BLAS has to be loaded to be limited

    limits: AbstractContextManager[object] = threadpool_limits(1, user_api="blas")
    return limits


def _run(scan: _Scan, progress: Progress | None) -> Result:
    plan, reader = scan.plan, scan.reader
    reader.begin(plan)
    workers = [threading.Thread(target=scan.work, name=f"scan-{n}", daemon=True) for n in range(plan.threads)]
    try:
        for worker in workers:
            worker.start()
        while not scan.finished.wait(_PROGRESS_SECONDS):
            if progress is not None:
                progress(scan.bytes_done, plan.step_bytes)
    finally:
        scan.stop = True
        if scan.error is not None or not scan.finished.is_set():
            reader.cancel()
        for worker in workers:
            worker.join()
    if scan.error is not None:
        raise scan.error
    if progress is not None:
        progress(plan.step_bytes, plan.step_bytes)
    return scan.result()


class _Scan:
    """The state that workers share. `lock` guards everything but the arithmetic."""

    def __init__(self, plan: Plan, backend: Backend, reader: Reader) -> None:
        self.plan, self.backend, self.reader = plan, backend, reader
        self.lock = threading.Lock()
        self.finished = threading.Event()
        self.stop = False
        self.error: BaseException | None = None
        self.bytes_done = 0
        self._next = 0
        self._workers_taking = self._workers_left = plan.threads
        self._ahead = 0
        self._ahead_bytes = 0
        steps = Counter((step.task, step.second) for step in plan.steps)
        self._passes = {key: _Pass(backend, count) for key, count in steps.items()}
        room = reader.sums_room
        self._sums = DeviceSums(backend, room) if room is not None and isinstance(backend, Deferring) else None
        self._host = backend if self._sums is None else select()  # small vectors are there, and nobody waits for them
        self._before_second = Counter(s.task for s in plan.steps if plan.tasks[s.task].second_read and not s.second)
        self._order = self._positions(plan.steps)
        self._steps_of = Counter(step.task for step in plan.steps if not step.second)
        self._gains: dict[NormGain, Buffer | None] = {}
        self._gain_lock = threading.Lock()
        self._decoders: dict[TensorSpec, _Decoder] = {}
        self._decoder_lock = threading.Lock()
        self._tasks_left = Counter(task.tensor for task in plan.tasks)
        self._caveats: dict[str, None] = dict.fromkeys(_indistinct(plan))
        self._statistics: dict[tuple[str, int, str], Statistics] = {}
        self._vectors: dict[TensorSpec, list[tuple[str, Vector]]] = {}
        for tower in plan.attention.towers:
            for vector in tower.vectors:
                self._vectors.setdefault(vector.view.tensor, []).append((tower.name, vector))
        self._ledger = _Ledger(plan.tasks)
        self._circuits: dict[tuple[str, int], Circuits] = {}
        self._grams: dict[tuple[str, int], LayerGrams] = {}
        self._keys_are_here = {key: threading.Event() for key in plan.circuits}

    @staticmethod
    def _positions(steps: Sequence[Step]) -> list[int]:
        """Each step's number within its task's pass."""
        seen: Counter[tuple[int, bool]] = Counter()
        positions = []
        for step in steps:
            positions.append(seen[step.task, step.second])
            seen[step.task, step.second] += 1
        return positions

    def work(self) -> None:
        """Takes steps until there are none. The first error of any worker stops them all."""
        try:
            while (number := self._take()) is not None:
                self._do(number)
            with self.lock:
                self._workers_taking -= 1
                last = self._workers_taking == 0
            if last and not self.stop:  # a worker, since the caller's thread may be on a stream of its own
                self.bring_back()
        except BaseException as error:  # handed to the calling thread, whatever it is
            with self.lock:
                self.error = self.error or error
            self.stop = True
            for event in (*(each.done for each in self._passes.values()), *self._keys_are_here.values()):
                event.set()
        finally:
            with self.lock:
                self._workers_left -= 1
                last = self._workers_left == 0
            if last or self.error is not None:
                self.finished.set()

    def result(self) -> Result:
        digest = self._ledger.digest() if self.plan.sample is None else f"{SAMPLED}{self._ledger.digest()}"
        return Result(self._whole(), self._circuits, digest, tuple(self._caveats))

    def _whole(self) -> dict[tuple[str, int, str], Statistics]:
        """All statistics, those of projections that are stored in parts as one."""
        kept, parts = dict(self._statistics), defaultdict(list)
        for task in self.plan.tasks:
            for p in task.projections:
                if p.role.whole is not p.role:
                    part = kept.pop((task.tower, p.layer, str(p.role)))
                    parts[task.tower, p.layer, str(p.role.whole)].append((p.view.outputs * p.view.inputs, part))
        return kept | {key: statistics.joined(found) for key, found in parts.items()}

    def _take(self) -> int | None:
        with self.lock:
            number = self._next
            if self.stop or number == len(self.plan.steps):
                return None
            self._next += 1
            ahead = []
            self._ahead_bytes -= self.plan.steps[number].nbytes
            while self._ahead < len(self.plan.steps) and self._ahead_bytes < _LOOK_AHEAD_BYTES:
                ahead.append(self.plan.steps[self._ahead])
                self._ahead_bytes += ahead[-1].nbytes
                self._ahead += 1
        for step in ahead:
            self.reader.ahead(step)
        return number

    def _do(self, number: int) -> None:
        step = self.plan.steps[number]
        task = self.plan.tasks[step.task]
        first = self._passes[step.task, False]
        if step.second:
            first.done.wait()
            if self.stop:
                return
        for gain in task.gains:
            self._load_gain(gain)
        if self._order[number] == 0 and not step.second:
            for bias in task.biases:
                measured = self._measure(bias, self._read_whole(bias))
                with self.lock:
                    self._enter(measured)
        if self.stop:
            first.done.set()
            return
        decoder = self._decoder(task)
        try:
            data, position = self.reader.read(step)
            chunks = [self._chunk(task, p, step, data, position, first, decoder) for p in task.projections]
            parts: list[Marginals] = []
            full: list[Kept] = []
            if self._sums is None or any(chunk.col_runs > 1 for chunk in chunks):  # what is pooled is wanted at once
                parts = [column_runs.marginals(self.backend, chunk) for chunk in chunks]
            else:
                full = self._sums.add(number, chunks)
            done: LayerGrams | None = None
            if (task.tower, task.layer) in self.plan.circuits and not step.second:
                done = self._multiply(number, chunks, position + step.nbytes)
            del data, chunks
            self.reader.release(step)
        except OSError as error:
            raise self._unreadable(task.tensor, error) from None
        if done is not None:
            self._close_circuits((task.tower, task.layer), done)
        with self.lock:
            self.bytes_done += step.nbytes
            self._before_second[step.task] -= 1
            wanted = self._before_second[step.task] == 0
        if parts:
            self._merge(number, parts)
            return
        self._bring_back(full)
        if wanted:  # a second read needs the column means
            self.bring_back()

    def bring_back(self) -> None:
        """Merges all that is still on a device."""
        if self._sums is not None:
            for lot in self._sums.rest():
                self._bring_back(lot)

    def _bring_back(self, lot: Sequence[Kept]) -> None:
        if self._sums is not None and lot:
            for number, parts in self._sums.fetch(lot):
                self._merge(number, parts)

    def _merge(self, number: int, parts: list[Marginals]) -> None:
        """Hands a step's statistics to its pass, and finishes the task with the last of them."""
        step = self.plan.steps[number]
        task = self.plan.tasks[step.task]
        first, this = self._passes[step.task, False], self._passes[step.task, step.second]
        if this.add(self._order[number], parts) and (step.second or not task.second_read):
            self._finish(step.task, first.merged, this.merged if step.second else None)
            first.forget()
            this.forget()
            self._forget_decoder(task.tensor)

    def _chunk(
        self,
        task: Task,
        projection: Projection,
        step: Step,
        data: Buffer | torch.Tensor,
        position: int,
        first: _Pass,
        decoder: _Decoder,
    ) -> Chunk:
        """The step's rows of one projection, as the kernel sees them."""
        view, encoding, coding = projection.view, task.tensor.encoding, decoder.coding
        run_bytes = 0
        first_row = task.first_row + step.group * task.group_rows + step.row
        if coding is None or encoding is None:
            itemsize = task.tensor.itemsize
            dtype, offset, stride = task.tensor.dtype, (view.start - task.first) * itemsize, task.row_stride * itemsize
            run_bytes = view.group_stride * itemsize
        else:
            dtype, offset, stride = "", 0, encoding.row_bytes
            coding = replace(coding, place=encoding.place(task.tensor.shape[0], first_row))
        col_weight: Buffer | None = None
        row_weight: Buffer | None = None
        if step.second:
            col_weight = first.column_means(task.projections.index(projection))
        elif projection.residual_size is not None:
            col_weight, row_weight = self._weights(task, projection, step)
        return Chunk(
            data=data,
            dtype=dtype,
            rows=step.rows,
            cols=view.all_cols,
            offset_bytes=position + offset,
            row_stride_bytes=stride,
            unit_rows=task.unit_rows,
            col_weight=col_weight,
            row_weight=row_weight,
            cross=projection.centred and not projection.residual_is_stored_rows,
            coding=coding,
            low_rank=decoder.low_rank,
            first_row=first_row,
            first_col=view.start % task.row_stride,
            col_runs=view.col_runs,
            run_cols=view.group_stride,
            run_bytes=run_bytes,
        )

    def _weights(self, task: Task, projection: Projection, step: Step) -> tuple[Buffer | None, Buffer | None]:
        """The norm's gain for the columns of a step's rows, or for the rows themselves."""
        gain = None if projection.gain is None else self._gains[projection.gain]
        if gain is None or not projection.residual_is_stored_rows:
            return gain, None
        row = step.group * task.rows + step.row
        return None, memoryview(gain).cast("B")[4 * row : 4 * (row + step.rows)]

    def _multiply(self, number: int, chunks: Sequence[Chunk], stop: int) -> LayerGrams | None:
        """Hands a step's rows to the Gram matrices of its layer; returns these when they are complete.

        stop: where the rows end in their buffer."""
        step = self.plan.steps[number]
        task = self.plan.tasks[step.task]
        key = task.tower, task.layer
        grams, row = self._layer_grams(key), step.group * task.rows + step.row
        by_role: dict[Role, Chunk] = {}
        for p, chunk in zip(task.projections, chunks, strict=True):
            if p.role in grams.heads.projections:
                columns, rows = self._weights(task, p, step)  # a latent's gain, too, which marginals are without
                by_role[p.role] = replace(chunk, col_weight=columns, row_weight=rows)
        if (keys := grams.heads.answers(by_role)) is not None:
            grams.keep(row, self._copied(by_role[keys], stop))
        if grams.heads.asks(by_role):
            self._keys_are_here[key].wait()
            if self.stop:
                return None
        complete = [grams.add(role, row, self._order[number], by_role) for role in by_role]
        return grams if any(complete) else None

    def _layer_grams(self, key: tuple[str, int]) -> LayerGrams:
        from llmfp.circuits import layer_grams

        with self.lock:
            if key not in self._grams:
                heads = self.plan.circuits[key]
                steps = {
                    p.role: self._steps_of[n]
                    for n, task in enumerate(self.plan.tasks)
                    if (task.tower, task.layer) == key
                    for p in task.projections
                    if p.role in heads.projections
                }
                self._grams[key] = layer_grams(heads, self.backend, steps, self._keys_are_here[key])
            return self._grams[key]

    def _copied(self, chunk: Chunk, stop: int) -> Chunk:
        """The chunk in a buffer of its own. A mapped file may shrink meanwhile: OSError."""
        start = chunk.offset_bytes
        if not isinstance(chunk.data, Buffer):
            return replace(chunk, data=chunk.data[start:stop].clone(), offset_bytes=0)
        kept = bytearray(stop - start)
        if self.backend.guards_mapped_pages:
            from llmfp import _native

            _native.copy(chunk.data, start, kept)
        else:
            kept[:] = memoryview(chunk.data).cast("B")[start:stop]
        return replace(chunk, data=kept, offset_bytes=0)

    def _close_circuits(self, key: tuple[str, int], grams: LayerGrams) -> None:
        from llmfp.circuits import circuits

        found = circuits(grams.finish())
        with self.lock:
            del self._grams[key]
            if found is None:
                tower, layer = key
                self._caveats[f"the heads of {tower} layer {layer} have no circuits: zero or non-finite weights"] = None
            else:
                self._circuits[key] = found

    def _decoder(self, task: Task) -> _Decoder:
        """What a tensor's bytes need to become numbers: read once, before its first task, and kept until its last."""
        encoding, lora = task.tensor.encoding, task.tensor.lora
        with self._decoder_lock:
            if task.tensor not in self._decoders:
                coding = low_rank = None
                if encoding is not None:
                    coding = encoding.prepare({field: self._read_whole(part) for field, part in encoding.parts})
                if lora is not None:
                    from llmfp.encoding.low_rank import low_rank as of_factors  # imports NumPy

                    factors = self._read_whole(lora.a), self._read_whole(lora.b)
                    low_rank = of_factors(lora, *factors, in_out=task.projections[0].view.transposed)
                self._decoders[task.tensor] = _Decoder(coding, low_rank)
            return self._decoders[task.tensor]

    def _forget_decoder(self, tensor: TensorSpec) -> None:
        with self._decoder_lock:
            self._tasks_left[tensor] -= 1
            if self._tasks_left[tensor] == 0:
                del self._decoders[tensor]

    def _load_gain(self, gain: NormGain) -> None:
        """The effective gain as float32, read once, before the weights it belongs to (whose buffer it would take);
        None, with a caveat, when it is not finite."""
        with self._gain_lock:
            if gain in self._gains:
                return
            spec = gain.tensor
            stored = self._read_whole(spec)
            measured = self._measure(spec, stored)
            finite = not any(each.nonfinite for each in measured.values())
            values = decode_gain(stored, spec.dtype, gain.offset) if finite else None
            with self.lock:
                self._enter(measured)
                if values is None:
                    self._caveats[f"norm gain {spec.name!r} holds non-finite values; taken as 1"] = None
            self._gains[gain] = None if values is None else memoryview(values).cast("B")

    def _measure(self, spec: TensorSpec, stored: bytes) -> dict[tuple[str, int, str], Statistics]:
        """σ and mean of each vector in a small tensor, by the kernel that reduces the weights, or, where these are on a
        device, on the host."""
        measured = {}
        for tower, vector in self._vectors[spec]:
            view = vector.view
            chunk = Chunk(
                data=stored,
                dtype=spec.dtype,
                rows=view.rows,
                cols=view.cols,
                offset_bytes=view.start * spec.itemsize,
                row_stride_bytes=view.row_stride * spec.itemsize,
                unit_rows=unit_rows(view.row_stride),
            )
            marginals = self._host.merge([self._host.marginals(chunk)])
            found = statistics.of_all(self._host, marginals, view.cols)
            measured[tower, vector.layer, vector.role] = replace(found, mean=found.mean + vector.offset)
        return measured

    def _enter(self, measured: Mapping[tuple[str, int, str], Statistics]) -> None:
        """Keeps vectors' statistics; the caller holds the lock."""
        self._statistics.update(measured)
        for (_, layer, role), found in measured.items():
            if found.unusable:
                self._caveats[f"{role} of layer {layer} holds {found.unusable}; its std is null"] = None

    def _finish(self, number: int, merged: Sequence[Marginals], second: Sequence[Marginals] | None) -> None:
        """The task's statistics; its marginals go to the ledger of its layer."""
        task = self.plan.tasks[number]
        for i, (projection, marginals) in enumerate(zip(task.projections, merged, strict=True)):
            key = (task.tower, projection.layer, str(projection.role))
            if self.plan.sample is not None:
                found = statistics.of_sample(self.backend, projection, marginals, task.blocks)
            else:
                gain = self._gains.get(projection.gain) if projection.gain is not None else None
                again = second[i] if second is not None else None
                found = statistics.of_projection(self.backend, projection, marginals, again, gain)
            with self.lock:
                self._statistics[key] = found
                if found.unusable:
                    self._caveats[
                        f"tensor {task.tensor.name!r} holds {found.unusable}; "
                        f"the std of {projection.role} in layer {projection.layer} is null"
                    ] = None
            self._ledger.enter(key, marginals)

    def _read_whole(self, spec: TensorSpec) -> bytes:
        step = Step(0, 0, 0, 0, spec.shard, spec.offset_bytes, spec.nbytes, False)
        try:
            data, position = self.reader.read(step)
            piece = data[position : position + spec.nbytes]
            content = bytes(piece if isinstance(piece, Buffer) else piece.cpu().numpy())
            self.reader.release(step)
        except OSError as error:
            raise self._unreadable(spec, error) from None
        return content

    def _unreadable(self, spec: TensorSpec, error: OSError) -> CheckpointError:
        path = self.plan.checkpoint.shards[spec.shard].path
        return CheckpointError(
            f"{path}: tensor {spec.name!r} could not be read: {error.strerror or error}",
            hint="was the file replaced or truncated while it was read?",
        )


@dataclass(frozen=True, slots=True)
class _Decoder:
    """What makes numbers of a tensor's bytes: how its codes are meant, what an adapter adds; None where neither."""

    coding: Coding | None
    low_rank: LowRank | None


class _Pass:
    """One pass over one task: parts arrive in any order and are merged in row order."""

    def __init__(self, backend: Backend, steps: int) -> None:
        self.done = threading.Event()
        self.merged: list[Marginals] = []
        self._backend = backend
        self._lock = threading.Lock()
        self._left = steps
        self._next = 0
        self._waiting: dict[int, list[Marginals]] = {}
        self._means: dict[int, Buffer] = {}

    def add(self, position: int, parts: list[Marginals]) -> bool:
        """Takes the step at `position`; True for the one call that completes the pass."""
        with self._lock:
            self._waiting[position] = parts
            while (ready := self._waiting.pop(self._next, None)) is not None:
                if self._next == 0:
                    self.merged = [self._backend.merge([part]) for part in ready]
                else:
                    pairs = zip(self.merged, ready, strict=True)
                    self.merged = [self._backend.merge([done, part]) for done, part in pairs]
                self._next += 1
            self._left -= 1
            if self._left == 0:
                self.done.set()
            return self._left == 0

    def forget(self) -> None:
        """Gives the statistics back once the task is finished: kept, they would grow with the number of layers."""
        self.merged = []
        self._means.clear()

    def column_means(self, projection: int) -> Buffer:
        """C times the mean of every (weighted) stored column, float32: under this weight a row's mean is its product
        with the column means, which centring along the stored rows needs."""
        with self._lock:
            if projection not in self._means:
                marginals = self.merged[projection]
                means = doubles((marginals.weighted_col or marginals.col).mean)
                self._means[projection] = memoryview(array("f", (len(means) * mean for mean in means))).cast("B")
            return self._means[projection]


class _Ledger:
    """Feeds the digest in (tower, layer, role) order while tasks finish in any order within a layer."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        roles = tuple(Role)
        keys = sorted(
            ((task.tower, p.layer, str(p.role)) for task in tasks for p in task.projections),
            key=lambda key: (key[0], key[1], roles.index(Role(key[2]))),
        )
        self._keys = keys
        self._entered: dict[tuple[str, int, str], Marginals] = {}
        self._next = 0
        self._hash = hashlib.sha256()
        self._lock = threading.Lock()

    def enter(self, key: tuple[str, int, str], marginals: Marginals) -> None:
        with self._lock:
            self._entered[key] = marginals
            while self._next < len(self._keys) and self._keys[self._next] in self._entered:
                ready = self._entered.pop(self._keys[self._next])
                self._next += 1
                for moments in (ready.row, ready.col, ready.weighted_row, ready.weighted_col):
                    if moments is not None:
                        self._hash.update(moments.mean)
                        self._hash.update(moments.m2)

    def digest(self) -> str:
        return self._hash.hexdigest()


def _indistinct(plan: Plan) -> list[str]:
    """What a deep scan cannot look into."""
    if not plan.deep:
        return []
    known = Counter(tower for tower, _ in plan.circuits)
    towers = [(tower.name, len(tower.layers) - known[tower.name]) for tower in plan.attention.towers]
    return [
        f"in {count} {name} layers heads cannot be told apart, so nothing is kept of their circuits"
        for name, count in towers
        if count
    ]


__all__ = ["Progress", "Result", "run"]
