"""What will be read, in what order, in which pieces, and whether it fits: all decided before the first weight byte.

A `Task` is the part of one stored tensor that holds one projection, or several side by side (GPT-2's c_attn). Its rows
are cut into units, whose size depends on the shape alone, and consecutive units into `Step`s, one read each, whose
size depends on the memory budget. Only units reach the arithmetic, so the budget changes no bit of the answer.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from llmfp.architecture import AttentionMap, LayerHeads, NormGain, Projection, Role, layer_heads
from llmfp.architecture.matching import pattern
from llmfp.checkpoint import Checkpoint, LoraSpec, TensorSpec
from llmfp.encoding import Encoding
from llmfp.errors import EncodingError, PlanError
from llmfp.kernels import Backend
from llmfp.marginals import unit_rows
from llmfp.sample import Blocks, draw

DEFAULT_MEMORY = 512 << 20
DEFAULT_DEVICE_MEMORY = 512 << 20
FIXED_BYTES = 6 << 20
"""Resident growth of a scan that depends on neither shapes nor threads: extension, thread stacks, Python objects."""
NUMPY_BYTES = 24 << 20
"""What importing NumPy costs, which makes the scales of quantised tensors ready."""
BLAS_BYTES = 16 << 20
"""What its BLAS costs on top, which multiplies heads in a deep scan; per thread."""
MAX_THREADS = 32
_CODED_ROWS = 32
"""Rows that codes may be packed together in (see llmfp.marginals.Coding): blocks of a sample hold whole ones."""


@dataclass(frozen=True, slots=True)
class Task:
    """Projections that share the rows of one stored tensor, and how those rows lie in it (units: elements).

    second_read: a LayerNorm along the stored rows needs every column's mean before a row can be centred.
    biases: the layer's bias vectors, which are read, whole, along with its first task.
    blocks: the rows that a sample reads; None where all are read.
    """

    tower: str
    projections: tuple[Projection, ...]
    tensor: TensorSpec
    groups: int
    rows: int
    group_stride: int
    row_stride: int
    first: int
    span: int
    unit_rows: int
    second_read: bool
    biases: tuple[TensorSpec, ...] = ()
    blocks: Blocks | None = None

    @property
    def first_row(self) -> int:
        """The tensor's row that the first group begins with."""
        return self.first // self.row_stride

    @property
    def group_rows(self) -> int:
        """Rows of the tensor from one group to the next."""
        return self.group_stride // self.row_stride

    @property
    def layer(self) -> int:
        return self.projections[0].layer

    @property
    def nbytes(self) -> int:
        """Of the projections, all rows of them."""
        return sum(p.view.nbytes for p in self.projections)

    @property
    def roles(self) -> set[Role]:
        return {p.role for p in self.projections}

    @property
    def gains(self) -> tuple[NormGain, ...]:
        return tuple(dict.fromkeys(p.gain for p in self.projections if p.gain is not None))


@dataclass(frozen=True, slots=True)
class Step:
    """One read: `rows` rows from `row` of group `group` of task number `task`, and the bytes that hold them."""

    task: int
    group: int
    row: int
    rows: int
    shard: int
    offset_bytes: int
    nbytes: int
    second: bool


@dataclass(frozen=True)
class Plan:
    """Everything a scan will do. `memory_bytes` is the budget, `needed_bytes` what the plan will use of it at most.

    deep: whether heads are looked at as well; circuits: by tower and layer, those that can be told apart.
    """

    checkpoint: Checkpoint
    attention: AttentionMap
    tasks: tuple[Task, ...]
    steps: tuple[Step, ...]
    threads: int
    memory_bytes: int
    needed_bytes: int
    deep: bool
    circuits: Mapping[tuple[str, int], LayerHeads]
    fetched: tuple[int, int] | None = None
    """Of a remote checkpoint: ranges that the scan will ask for, and their bytes."""
    sample: float | None = None
    """The share of every tensor's rows that is aimed at; None where all are read."""

    @property
    def attention_bytes(self) -> int:
        return sum(p.view.nbytes for tower in self.attention.towers for p in tower.projections)

    @property
    def gain_bytes(self) -> int:
        return sum(gain.tensor.nbytes for gain in {gain for task in self.tasks for gain in task.gains})

    @property
    def bias_bytes(self) -> int:
        return sum(bias.nbytes for task in self.tasks for bias in task.biases)

    @property
    def scale_bytes(self) -> int:
        """Scales, zeros and the like of quantised tensors."""
        return sum(part.nbytes for _, encoding in _encoded(self.tasks) for _, part in encoding.parts)

    @property
    def adapter_bytes(self) -> int:
        return sum(lora.a.nbytes + lora.b.nbytes for lora in _loras(self.tasks))

    @property
    def header_bytes(self) -> int:
        return sum(shard.header_bytes for shard in self.checkpoint.shards)

    @property
    def step_bytes(self) -> int:
        return sum(step.nbytes for step in self.steps)

    @property
    def second_read_bytes(self) -> int:
        return sum(step.nbytes for step in self.steps if step.second)

    @property
    def total_bytes(self) -> int:
        """All bytes the scan reads: headers, gains, biases, scales, adapters, weights, and the declared second read."""
        small = self.gain_bytes + self.bias_bytes + self.scale_bytes + self.adapter_bytes
        return self.header_bytes + small + self.step_bytes + self.gap_bytes

    @property
    def gap_bytes(self) -> int:
        """What is fetched along from between two neighbours, of a remote checkpoint."""
        small = self.gain_bytes + self.bias_bytes + self.scale_bytes + self.adapter_bytes
        return 0 if self.fetched is None else max(0, self.fetched[1] - small - self.step_bytes)

    @property
    def requests(self) -> int:
        """Reads, or ranges asked for of a server."""
        return len(self.steps) if self.fetched is None else self.fetched[0]

    @cached_property
    def skipped(self) -> list[dict[str, object]]:
        """What is not read, grouped by name pattern, most bytes first."""
        count: Counter[tuple[str, str]] = Counter()
        nbytes: Counter[tuple[str, str]] = Counter()
        for name, reason in self.attention.skipped.items():
            key = pattern(name), reason
            count[key] += 1
            nbytes[key] += self.checkpoint.tensors[name].nbytes
        return [
            {"pattern": key[0], "count": count[key], "bytes": nbytes[key], "reason": key[1]}
            for key in sorted(count, key=lambda key: (-nbytes[key], key))
        ]

    def to_json(self) -> dict[str, Any]:
        """The object that `plan --json` prints: reads in order, what is skipped, totals in bytes."""
        shards = self.checkpoint.shards
        sampled: Counter[int] = Counter()
        for step in self.steps:
            sampled[step.task] += step.nbytes
        return {
            "schema": "llmfp.plan/1",
            "architecture": self.attention.family,
            "reads": [
                {
                    "tower": task.tower,
                    "layer": task.layer,
                    "roles": [str(p.role) for p in task.projections],
                    "tensor": task.tensor.name,
                    "dtype": task.tensor.dtype,
                    "encoding": None if (encoding := task.tensor.encoding) is None else encoding.label,
                    "adapter_rank": None if (lora := task.tensor.lora) is None else lora.a.shape[0],
                    "file": shards[task.tensor.shard].path.name,
                    "bytes": task.nbytes if task.blocks is None else sampled[number],
                    "read_twice": task.second_read,
                }
                for number, task in enumerate(self.tasks)
            ],
            "skipped": self.skipped,
            "attention_bytes": self.attention_bytes,
            "gain_bytes": self.gain_bytes,
            "bias_bytes": self.bias_bytes,
            "scale_bytes": self.scale_bytes,
            "adapter_bytes": self.adapter_bytes,
            "header_bytes": self.header_bytes,
            "second_read_bytes": self.second_read_bytes,
            "bytes_read": self.total_bytes,
            "bytes_total": sum(shard.nbytes for shard in shards),
            "gap_bytes": self.gap_bytes,
            "requests": self.requests,
            "deep": self.deep,
            "sample": self.sample,
            "threads": self.threads,
            "memory_budget_bytes": self.memory_bytes,
            "memory_needed_bytes": self.needed_bytes,
            "caveats": [*self.checkpoint.caveats, *self.attention.caveats],
        }


def make_plan(
    checkpoint: Checkpoint,
    attention: AttentionMap,
    backend: Backend,
    *,
    threads: int | None = None,
    min_threads: int = 1,
    step_bytes: int = 8 << 20,
    extra_bytes: int = 0,
    memory_bytes: int = DEFAULT_MEMORY,
    deep: bool = False,
    sample: float | None = None,
    block_bytes: int = 1,
    on_device: bool = False,
) -> Plan:
    """The plan of a scan, with reads of about `step_bytes`, on as many threads as cores (`min_threads` at least).

    extra_bytes: what a read may cost in resident memory beyond its own bytes.
    deep: also look at the circuits of heads, wherever heads can be told apart.
    sample: the share of every tensor's rows to read, in blocks of at least block_bytes; all of them when None.
    on_device: the bytes are reduced on a device, whose memory is not this budget's.
    Raises EncodingError for a dtype the back end lacks, PlanError when the budget is too small."""
    circuits = {(t.name, heads.layer): heads for t in attention.towers for heads in layer_heads(t)} if deep else {}
    tasks = _tasks(attention, circuits)
    if sample is not None:
        tasks = [_sampled(task, sample, block_bytes) for task in tasks]
    for task in tasks:
        if task.tensor.encoding is None and task.tensor.dtype not in backend.dtypes:
            raise EncodingError(
                f"{checkpoint.shards[task.tensor.shard].path}: tensor {task.tensor.name!r} is {task.tensor.dtype}, "
                f"which back end {backend.name} does not read",
                hint="llmfp-fast backends lists what each one reads",
            )
    wanted = threads or min(max(_available_cores(), min_threads), MAX_THREADS)
    fixed = FIXED_BYTES + backend.library_bytes + _kept_bytes(tasks, circuits)
    scratch = 0 if on_device else backend.scratch_per_element
    costs = [_unit_cost(task, backend, scratch, circuits.get((task.tower, task.layer))) for task in tasks]
    largest = max(range(len(tasks)), key=lambda i: costs[i])
    extra_bytes += BLAS_BYTES if circuits else 0
    threads = max(1, min(wanted, (memory_bytes - fixed) // (costs[largest] + extra_bytes)))
    least = fixed + costs[largest] + extra_bytes
    if least > memory_bytes:
        worst = tasks[largest].tensor
        raise PlanError(
            f"{checkpoint.shards[worst.shard].path}: tensor {worst.name!r} needs a memory budget of "
            f"{_mebibytes(least)}, the budget is {_mebibytes(memory_bytes)}",
            hint=f"raise --memory to {_mebibytes(least)} or more" + (", or give --no-deep" if circuits else ""),
        )
    share = (memory_bytes - fixed) // threads - extra_bytes
    steps: list[Step] = []
    for _, group in groupby(range(len(tasks)), key=lambda i: (tasks[i].tower, tasks[i].layer)):
        layer = list(group)
        for second in (False, True):
            for i in layer:
                if tasks[i].second_read or not second:
                    units = max(1, min(share // costs[i], step_bytes // _unit_bytes(tasks[i])))
                    steps += _steps(i, tasks[i], units, second)
    deepest = max(-(-step.rows // tasks[step.task].unit_rows) * costs[step.task] for step in steps)
    needed = fixed + threads * (deepest + extra_bytes)
    return Plan(
        checkpoint,
        attention,
        tuple(tasks),
        tuple(steps),
        threads,
        memory_bytes,
        needed,
        deep,
        circuits,
        sample=sample,
    )


def parse_size(text: str) -> int:
    """A number of bytes from '512MiB', '2GB', '65536'. Raises ValueError with what is accepted."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    digits = text.strip().rstrip("BKMGTibkmgt ").strip()
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        size = float(digits) * units[unit]
        if not 0 < size < 2**60:
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(f"{text!r} is not a size; write for example 512MiB, 2GB or 65536") from None
    return int(size)


def _tasks(attention: AttentionMap, circuits: Mapping[tuple[str, int], LayerHeads]) -> list[Task]:
    """Projections by shared rows, in the order of reading: tower, layer, then as they lie in the files; but a layer's
    queries behind its keys where both are multiplied."""
    shared: defaultdict[tuple[object, ...], list[Projection]] = defaultdict(list)
    for tower in attention.towers:
        for p in tower.projections:
            v = p.view
            rows = (v.tensor.shard, v.tensor.offset_bytes, v.start // v.row_stride, v.group_stride, v.groups, v.rows)
            shared[tower.name, p.layer, *rows].append(p)
    tasks, biases = [], _biases(attention)

    def asks(task: Task) -> bool:
        heads = circuits.get((task.tower, task.layer))
        return heads is not None and heads.asks(task.roles)

    for key in sorted(shared, key=lambda key: [str(key[0]), *key[1:]]):
        projections = sorted(shared[key], key=lambda p: p.view.start)
        view = projections[0].view
        tasks.append(
            Task(
                tower=str(key[0]),
                projections=tuple(projections),
                tensor=view.tensor,
                groups=view.row_runs,
                rows=view.rows,
                group_stride=view.group_stride,
                row_stride=view.row_stride,
                first=view.start,
                span=max(map(_stop, projections)) - view.start,
                unit_rows=unit_rows(view.row_stride),
                second_read=any(p.centred and p.residual_is_stored_rows for p in projections),
                biases=biases.pop((str(key[0]), projections[0].layer), ()),
            )
        )

    return sorted(tasks, key=lambda task: (task.tower, task.layer, asks(task)))


def _stop(p: Projection) -> int:
    """Where in the tensor the first stored row of a projection ends."""
    return p.view.start + (p.view.col_runs - 1) * p.view.group_stride + p.view.cols


def _biases(attention: AttentionMap) -> dict[tuple[str, int], tuple[TensorSpec, ...]]:
    """The bias tensors of every layer, in file order; a fused one once. Gains are read on their own account."""
    found: defaultdict[tuple[str, int], set[TensorSpec]] = defaultdict(set)
    for tower in attention.towers:
        gains = {p.gain.tensor for p in tower.projections if p.gain is not None}
        for vector in tower.vectors:
            if vector.view.tensor not in gains:
                found[tower.name, vector.layer].add(vector.view.tensor)
    return {key: tuple(sorted(specs, key=lambda spec: (spec.shard, spec.offset_bytes))) for key, specs in found.items()}


def _sampled(task: Task, share: float, block_bytes: int) -> Task:
    """The task with the rows that are read of it, one unit a block. What needs all rows is not made of a sample, so
    nothing is read twice."""
    runs = [(group, first, count) for group in range(task.groups) for first, count in _runs(task, group)]
    encoding = task.tensor.encoding
    row_bytes = _extent(task, 0, runs[0][1], 1 if encoding is None else _CODED_ROWS)[1]
    row_bytes = row_bytes if encoding is None else -(-row_bytes // _CODED_ROWS)
    multiple = 1 if encoding is None else _CODED_ROWS
    seed = f"{task.tensor.name} {task.first}"
    blocks = draw(runs, max(row_bytes, 1), share, block_bytes, multiple, seed)
    unit = task.unit_rows if blocks is None else blocks.rows
    return replace(task, unit_rows=unit, second_read=False, blocks=blocks)


def _steps(number: int, task: Task, units: int, second: bool) -> Iterable[Step]:
    rows_per_step, tensor = units * task.unit_rows, task.tensor
    if task.blocks is not None:
        for group, row in task.blocks.places:
            start, nbytes = _extent(task, group, row, task.blocks.rows)
            offset = tensor.offset_bytes + start
            yield Step(number, group, row, task.blocks.rows, tensor.shard, offset, nbytes, second)
        return
    for group in range(task.groups):
        for first, count in _runs(task, group):
            for row in range(first, first + count, rows_per_step):
                rows = min(rows_per_step, first + count - row)
                start, nbytes = _extent(task, group, row, rows)
                yield Step(number, group, row, rows, tensor.shard, tensor.offset_bytes + start, nbytes, second)


def _runs(task: Task, group: int) -> list[tuple[int, int]]:
    """Rows of a group that lie one after the other: first, count. All of them, but for codes in planes."""
    if (encoding := task.tensor.encoding) is None:
        return [(0, task.rows)]
    above = task.first_row + group * task.group_rows
    return [(first - above, count) for first, count in encoding.runs(task.tensor.shape[0], above, task.rows)]


def _extent(task: Task, group: int, row: int, rows: int) -> tuple[int, int]:
    """Where in the tensor rows of a group lie, and how many bytes they are; of codes, whole stored rows."""
    if (encoding := task.tensor.encoding) is not None:
        return encoding.extent(task.tensor.shape[0], task.first_row + group * task.group_rows + row, rows)
    start = task.first + group * task.group_stride + row * task.row_stride
    return start * task.tensor.itemsize, ((rows - 1) * task.row_stride + task.span) * task.tensor.itemsize


def _encoded(tasks: Iterable[Task]) -> list[tuple[TensorSpec, Encoding]]:
    """The quantised tensors, each once."""
    tensors = dict.fromkeys(task.tensor for task in tasks)
    return [(tensor, tensor.encoding) for tensor in tensors if tensor.encoding is not None]


def _loras(tasks: Iterable[Task]) -> list[LoraSpec]:
    """What an adapter adds to the tensors, each once."""
    return [tensor.lora for tensor in dict.fromkeys(task.tensor for task in tasks) if tensor.lora is not None]


def _unit_bytes(task: Task) -> int:
    rows = min(task.unit_rows, task.rows)
    if (encoding := task.tensor.encoding) is not None:
        return encoding.extent(task.tensor.shape[0], 0, rows)[1]
    return rows * task.row_stride * task.tensor.itemsize


def _unit_cost(task: Task, backend: Backend, scratch: int, heads: LayerHeads | None) -> int:
    """Memory one unit takes while it is worked on: its bytes, the kernel's scratch, its partial results twice, and what
    multiplying its heads takes. scratch: the kernel's, per element."""
    rows = min(task.unit_rows, task.rows)
    results = sum(32 * rows * p.view.col_runs + 40 * p.view.all_cols for p in task.projections)
    decoded = task.tensor.encoding is not None or task.tensor.lora is not None
    scratch += backend.scratch_per_code if decoded else 0
    multiplied = 0 if heads is None else sum(_multiplied(p, rows, heads) for p in task.projections)
    return _unit_bytes(task) + rows * task.row_stride * scratch + 2 * results + multiplied


def _multiplied(p: Projection, rows: int, heads: LayerHeads) -> int:
    """What multiplying a unit of `rows` rows takes beyond the unit itself."""
    parts = [part for part in heads.parts if part.role is p.role]
    if not parts:
        return 0
    if not p.residual_is_stored_rows:  # a head, its key head, and one that steps cut; codes that start before it
        size = max(part.size for part in parts)
        before = 0 if p.view.tensor.encoding is None else 4 * (size + 32) * p.view.cols
        return 12 * size * p.view.cols + before + 16 * size * size
    keys = heads.projections[heads.crossed[1].role].view.all_cols if heads.asks({p.role}) and heads.crossed else 0
    shares = sum(8 * part.heads * part.size**2 for part in parts)
    expanded = p.view.all_cols + (p.view.cols if p.view.col_runs > 1 else 0)
    return 4 * rows * (expanded + keys) + shares  # a unit in float32, its keys, and its share of all heads' products


def _gram_bytes(heads: LayerHeads) -> int:
    """What a layer keeps until its last step: products of all heads, and keys to be multiplied as they are stored."""
    products = sum(part.heads * part.size**2 for part in heads.parts)
    if heads.crossed is None:
        return 8 * products
    queries, keys = heads.crossed
    return 8 * (products + queries.heads * queries.size * keys.size) + heads.projections[keys.role].view.nbytes


def _circuit_bytes(heads: LayerHeads) -> int:
    """What the fingerprint keeps of a layer's heads."""
    spectra = heads.q.size + (heads.v.size if heads.v else 0)
    kept = 2 * heads.q.heads * 256 + 6 * heads.rotary.pairs**2 if heads.rotary else 2 * heads.q.heads * spectra
    return kept + 16 * heads.q.heads + 1024


def _kept_bytes(tasks: Sequence[Task], circuits: Mapping[tuple[str, int], LayerHeads]) -> int:
    """Memory that outlives a step: gains, the fingerprint itself, and the statistics, scales and products of layers not
    yet closed."""
    gains = sum(4 * gain.tensor.shape[0] for gain in {gain for task in tasks for gain in task.gains})
    fingerprint = layer_bytes = 0
    by_layer: Counter[tuple[str, int]] = Counter()
    for task in tasks:
        for p in task.projections:
            fingerprint += 1024 + 2 * (p.residual_size or 0) + 8 * (p.view.outputs // (p.head_dim or p.view.outputs))
            by_layer[task.tower, task.layer] += 3 * 32 * (task.groups * task.rows + p.view.all_cols)
        if (encoding := task.tensor.encoding) is not None:
            by_layer[task.tower, task.layer] += encoding.kept_bytes
        if (lora := task.tensor.lora) is not None:
            by_layer[task.tower, task.layer] += 12 * lora.a.shape[0] * (lora.a.shape[1] + lora.b.shape[0])
    for key, heads in circuits.items():
        fingerprint += _circuit_bytes(heads)
        by_layer[key] += _gram_bytes(heads)
    prepared = bool(circuits) or any(encoding.parts for _, encoding in _encoded(tasks)) or any(_loras(tasks))
    layer_bytes = 2 * max(by_layer.values())
    return gains + fingerprint + layer_bytes + (NUMPY_BYTES if prepared else 0)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _mebibytes(nbytes: int) -> str:
    return f"{-(-nbytes // (1 << 20))}MiB"


__all__ = ["DEFAULT_MEMORY", "Plan", "Step", "Task", "make_plan", "parse_size"]
