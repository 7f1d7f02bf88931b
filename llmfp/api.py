"""The whole story on one screen: open, match, plan, read, reduce, keep."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from llmfp import __version__, engine
from llmfp import fingerprint as fingerprints
from llmfp.architecture import AttentionMap, match
from llmfp.checkpoint import Checkpoint, open_checkpoint
from llmfp.checkpoint.adapter import is_adapter, open_adapted
from llmfp.checkpoint.live import open_live
from llmfp.errors import CheckpointError, LlmfpError
from llmfp.fingerprint import Fingerprint, TowerFingerprint
from llmfp.hub.source import looks_remote
from llmfp.kernels import Backend, Deferring, select
from llmfp.kernels import on as backend_on
from llmfp.plan import DEFAULT_DEVICE_MEMORY, DEFAULT_MEMORY, Plan, make_plan
from llmfp.reader import Reader, open_reader
from llmfp.sample import CONFIDENCE
from llmfp.statistics import Statistics

if TYPE_CHECKING:
    import torch

    from llmfp.evidence.comparison import Comparison
    from llmfp.hub.client import Client

Source: TypeAlias = "str | os.PathLike[str] | torch.nn.Module | Mapping[str, torch.Tensor]"
"""What can be scanned: a path, or a model that is loaded already."""
_Opened: TypeAlias = tuple[Checkpoint, AttentionMap, Backend, Reader]


def scan(
    source: Source,
    *,
    config: Mapping[str, Any] | None = None,
    base: str | os.PathLike[str] | None = None,
    tower: str | None = None,
    backend: str = "auto",
    reader: str = "auto",
    threads: int | None = None,
    memory_bytes: int = DEFAULT_MEMORY,
    deep: bool = False,
    sample: float | None = None,
    client: Client | None = None,
    device: str = "cpu",
    device_memory_bytes: int = DEFAULT_DEVICE_MEMORY,
    planned: Callable[[Plan], None] | None = None,
    progress: engine.Progress | None = None,
) -> Fingerprint:
    """The fingerprint of a checkpoint: a directory, a weight file, or a saved fingerprint, which is loaded; or a model
    of the Hub (ORG/NAME, ORG/NAME@REVISION, hf://…) or the address of a weight file, read where it is.

    A live torch.nn.Module, or its state dict, is read where it is, on whatever device, without a copy.

    config        what config.json would say of a state dict; a model has its own
    base          the model below `source`, which is an adapter: the result is that of the two merged
    tower         decoder, encoder, cross or vision alone; the language model's towers when None
    backend       auto, native_cpu, torch_fallback, triton_gpu or reference
    reader        auto, mmap or pread; changes no bit of the result
    threads       as many as there are cores when None; changes no bit of the result
    memory_bytes  bound on resident memory beyond what planning takes; changes no bit of the result
    deep          also look at what heads compute (llmfp.circuits), which comparisons ask for and plain σ does not
    sample        the share of every tensor's rows to read, 0.1 for example; σ then has an interval (llmfp.sample)
    client        through which servers are asked (llmfp.hub.client.Client); one from the environment when None
    device        what reduces the weights of files: cpu; cuda (all GPUs), cuda:N, mps; or auto, by rates measured here
    device_memory_bytes   bound on memory of each device, beside a model that lies there
    planned       called with the plan before the first weight is read
    progress      called about ten times a second with (bytes done, bytes in all)

    Raises LlmfpError (CheckpointError, ArchitectureError, EncodingError, PlanError, BackendError), one line each.
    """
    start = time.perf_counter()
    planning: dict[str, Any] = {"threads": threads, "memory_bytes": memory_bytes, "deep": deep, "sample": sample}
    if not isinstance(source, str | os.PathLike):
        return _scan_live(source, config, tower, backend, device_memory_bytes, planning, planned, progress, start)
    path = Path(source)
    if fingerprints.is_fingerprint(path) and not looks_remote(source):
        return fingerprints.load(path)
    reading: dict[str, Any] = {"base": base, "tower": tower, "backend": backend, "reader": reader, "client": client}
    why = None
    if device == "auto":
        device, why = _choose_device(source, reading, planning)
    if device == "cpu":
        return _run(_open(source, **reading), planning, planned, progress, start, why=why)
    return _scan_on(device, why, device_memory_bytes, source, reading, planning, planned, progress, start)


def _run(
    opened: _Opened,
    planning: Mapping[str, Any],
    planned: Callable[[Plan], None] | None,
    progress: engine.Progress | None,
    start: float,
    device: str = "cpu",
    why: str | None = None,
) -> Fingerprint:
    """Plans, reads and reduces what was opened, and closes it."""
    checkpoint, attention, chosen, reader = opened
    try:
        plan_ = _plan(checkpoint, attention, chosen, reader, **planning)
        if planned is not None:
            planned(plan_)
        result = engine.run(plan_, chosen, reader, progress)
    finally:
        reader.close()
    fingerprint = _fingerprint(plan_, result, chosen, reader, time.perf_counter() - start)
    return replace(fingerprint, run={**fingerprint.run, "device": device, "device_why": why})


def _scan_live(
    source: torch.nn.Module | Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    tower: str | None,
    backend: str,
    device_memory_bytes: int,
    planning: Mapping[str, Any],
    planned: Callable[[Plan], None] | None,
    progress: engine.Progress | None,
    start: float,
) -> Fingerprint:
    """A scan of what is in memory; on a device, with smaller launches where its memory turns out not to do."""
    from llmfp import device as devices
    from llmfp.reader.tensor_reader import TensorReader, attention_tensors

    live = open_live(source, config)
    attention = match(live, tower)
    places = sorted({str(tensor.device) for tensor in attention_tensors(live, attention)})
    elsewhere, device = [place for place in places if place != "cpu"], ", ".join(places)
    chosen, note = backend_on(elsewhere[0], backend) if elsewhere else (select(backend), "")
    notes, size, room = [note] if note else [], device_memory_bytes, None
    while True:
        if isinstance(chosen, Deferring):
            room = devices.resident_room(chosen, planning["memory_bytes"], size)
        opened = (
            replace(live, caveats=(*live.caveats, *notes)),
            attention,
            chosen,
            TensorReader(live, attention, chosen, room),
        )
        try:
            return _run(opened, planning, planned, progress, start, device=device)
        except RuntimeError as error:
            if room is None or not devices.is_out_of_memory(error) or size <= devices.LEAST_DEVICE_MEMORY:
                if not elsewhere:
                    raise
                raise devices.as_error(", ".join(elsewhere), error) from error
            size = max(devices.LEAST_DEVICE_MEMORY, size // 2)
            smaller = f"{size >> 20} MiB for sums, not {device_memory_bytes >> 20}: device {device} ran out of memory"
            notes = [*notes[: bool(note)], smaller]


def _choose_device(source: str | os.PathLike[str], reading: Mapping[str, Any], planning: Any) -> tuple[str, str]:
    from llmfp import device as devices

    checkpoint, attention, chosen, opened = _open(source, **reading)
    opened.close()
    choice = devices.choose(_plan(checkpoint, attention, chosen, opened, **planning))
    return choice.device, choice.why


def _scan_on(
    device: str,
    why: str | None,
    device_memory_bytes: int,
    source: str | os.PathLike[str],
    reading: Mapping[str, Any],
    planning: Mapping[str, Any],
    planned: Callable[[Plan], None] | None,
    progress: engine.Progress | None,
    start: float,
) -> Fingerprint:
    """A scan whose weights are reduced on a device; with smaller buffers where its memory turns out not to do."""
    from llmfp import device as devices
    from llmfp.reader.staging import StagedReader

    names = devices.named(device)
    chosen, note = backend_on(names[0], reading["backend"])
    notes = [note] if note else []
    wanted = size = devices.slot_bytes(chosen, len(names), planning["memory_bytes"], device_memory_bytes)
    room = devices.staged_room(chosen, planning["memory_bytes"], device_memory_bytes)
    while True:
        checkpoint, attention, _, files = _open(source, **{**reading, "backend": chosen})
        try:
            reader = StagedReader(files, [devices.TorchLink(name) for name in names], size, room)
            opened = replace(checkpoint, caveats=(*checkpoint.caveats, *notes)), attention, chosen, reader
            return _run(opened, planning, planned, progress, start, device=", ".join(names), why=why)
        except RuntimeError as error:
            if not devices.is_out_of_memory(error) or size <= devices.SMALLEST_SLOT:
                raise devices.as_error(device, error) from error
            size = max(devices.SMALLEST_SLOT, size // 2 >> 20 << 20)
            smaller = f"buffers of {size >> 20} MiB, not {wanted >> 20}: device {device} ran out of memory"
            notes = [*notes[: bool(note)], smaller]


def plan(
    source: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    tower: str | None = None,
    backend: str = "auto",
    reader: str = "auto",
    threads: int | None = None,
    memory_bytes: int = DEFAULT_MEMORY,
    deep: bool = False,
    sample: float | None = None,
    client: Client | None = None,
) -> Plan:
    """What `scan` with the same arguments would read, in which order, and what it would skip and why."""
    checkpoint, attention, chosen, opened = _open(source, base, tower, backend, reader, client, probe=False)
    opened.close()
    return _plan(checkpoint, attention, chosen, opened, threads, memory_bytes, deep, sample)


def compare(
    a: str | os.PathLike[str] | Fingerprint,
    b: str | os.PathLike[str] | Fingerprint,
    *,
    tower: str | None = None,
    alpha: float = 1e-3,
    permutations: int = 100_000,
    null: str | os.PathLike[str] | None = None,
    seed: int = 0,
    sample: float | None = None,
    client: Client | None = None,
) -> Comparison:
    """The evidence that two models share weights' ancestry: sources, which are scanned, or fingerprints.

    tower         compared in both; each model's main tower when None
    alpha         the level of the verdict, over all tests together
    permutations  drawn for each permutation test; no p is below 1 / (1 + permutations)
    null          further unrelated models beside those shipped: a file or a directory (see llmfp.evidence.null)
    seed          of the draws: the same seed, the same p
    sample, client   as for `scan`

    Raises LlmfpError, one line.
    """
    from llmfp.evidence import comparison  # imports NumPy
    from llmfp.evidence import null as nulls

    models = nulls.load(null)
    only = tower if tower == "vision" else None  # the others are read together, and say more so
    reading: dict[str, Any] = {"tower": only, "deep": sample is None, "sample": sample, "client": client}
    first, second = (each if isinstance(each, Fingerprint) else scan(each, **reading) for each in (a, b))
    return comparison.compare(
        first, second, tower=tower, alpha=alpha, permutations=permutations, null=models, seed=seed
    )


def load(path: str | os.PathLike[str]) -> Fingerprint:
    """A fingerprint saved by `Fingerprint.save` or `llmfp-fast scan --out`."""
    return fingerprints.load(path)


def _open(
    source: str | os.PathLike[str],
    base: str | os.PathLike[str] | None,
    tower: str | None,
    backend: str | Backend,
    reader: str,
    client: Client | None,
    *,
    probe: bool = True,
) -> _Opened:
    path, own = Path(source), None
    if looks_remote(source):
        from llmfp.hub.client import Client
        from llmfp.hub.repository import open_remote

        if base is not None:
            raise CheckpointError(f"{source}: adapters are read from disk alone", hint="download it, and its base")
        own = Client() if client is None else client.branch()
        try:
            checkpoint = open_remote(own, source)
        except BaseException:
            own.close()
            raise
    elif base is not None or is_adapter(path):
        checkpoint = open_adapted(path, None if base is None else Path(base))
    else:
        checkpoint = open_checkpoint(path)
    try:
        attention = match(checkpoint, tower)
        chosen = select(backend) if isinstance(backend, str) else backend
        return (
            checkpoint,
            attention,
            chosen,
            open_reader(reader, checkpoint, attention, chosen, client=own, probe=probe),
        )
    except BaseException:
        if own is not None:
            own.close()
        raise


def _plan(
    checkpoint: Checkpoint,
    attention: AttentionMap,
    backend: Backend,
    reader: Reader,
    threads: int | None,
    memory_bytes: int,
    deep: bool,
    sample: float | None,
) -> Plan:
    if sample is not None and not 0 < sample < 1:
        raise LlmfpError(f"a sample of {sample} is no part of a whole", hint="give a share between 0 and 1")
    if sample is not None and deep:
        raise LlmfpError("what heads compute needs all of their rows", hint="leave out --deep or --sample")
    plan = make_plan(
        checkpoint,
        attention,
        backend,
        threads=threads if reader.max_threads is None else min(threads or reader.max_threads, reader.max_threads),
        min_threads=reader.min_threads,
        step_bytes=reader.step_bytes,
        extra_bytes=reader.extra_bytes,
        memory_bytes=memory_bytes,
        deep=deep,
        sample=sample,
        block_bytes=reader.block_bytes,
        on_device=reader.sums_room is not None,
    )
    if any(shard.remote is not None for shard in checkpoint.shards):
        from llmfp.reader.fetches import fetches

        ranges = fetches(plan)
        return replace(plan, fetched=(len(ranges), sum(each.nbytes for each in ranges)))
    return plan


def _fingerprint(plan: Plan, result: engine.Result, backend: Backend, reader: Reader, seconds: float) -> Fingerprint:
    towers = {}
    for tower in plan.attention.towers:
        layers = tower.layers
        columns: dict[str, list[Statistics | None]] = {}
        for role in tower.roles:
            columns[role] = [result.statistics.get((tower.name, layer, role)) for layer in layers]
        towers[tower.name] = TowerFingerprint(
            layers,
            tower.heads,
            tower.kv_heads,
            tower.head_dim,
            tower.hidden_size,
            {role: tuple(column) for role, column in columns.items()},
            tower.rotary,
            tower.indexed_heads,
            tuple(result.circuits.get((tower.name, layer)) for layer in layers) if plan.deep else None,
        )
    checkpoint = plan.checkpoint
    return Fingerprint(
        architecture=plan.attention.family,
        towers=towers,
        source=_source(plan),
        run={
            "backend": backend.name,
            "simd": backend.describe(),
            "reader": reader.name,
            "seconds": seconds,
            "bytes_read": plan.total_bytes,
            "bytes_total": sum(shard.nbytes for shard in checkpoint.shards),
            "second_read_bytes": plan.second_read_bytes,
            "peak_rss_bytes": _peak_rss_bytes(),
            "threads": plan.threads,
            "memory_budget_bytes": plan.memory_bytes,
            "versions": {"llmfp": __version__, "python": sys.version.split()[0], **backend.versions()},
        },
        skipped=tuple(plan.skipped),
        caveats=(*_sample_caveats(plan), *checkpoint.caveats, *plan.attention.caveats, *result.caveats),
        digest=result.digest,
        sample=None if plan.sample is None else _sample_facts(plan),
    )


def _sample_facts(plan: Plan) -> dict[str, Any]:
    """What a fingerprint says of the sample it rests on."""
    sampled = [task for task in plan.tasks if task.blocks is not None]
    return {
        "share": plan.sample,
        "confidence": CONFIDENCE,
        "read_bytes": plan.step_bytes,
        "of_bytes": plan.attention_bytes,
        "sampled_tensors": len(sampled),
        "whole_tensors": len(plan.tasks) - len(sampled),
        "absent": {
            "head_std": "a head's σ needs all of its rows",
            "residual": "a profile along the residual stream needs all rows",
            "circuits": "what heads compute needs all of their rows",
        },
    }


def _sample_caveats(plan: Plan) -> list[str]:
    if plan.sample is None:
        return []
    share = 100 * plan.step_bytes / max(plan.attention_bytes, 1)
    return [f"rests on a sample: {share:.1f} % of the attention weights were read; every σ is an estimate"]


def _source(plan: Plan) -> dict[str, Any]:
    """Provenance. Names only: a path would tell strangers about the machine."""
    checkpoint = plan.checkpoint
    return {
        "name": checkpoint.repo or checkpoint.path.absolute().name,
        "base": None if checkpoint.base is None else checkpoint.base.absolute().name,
        "repo": checkpoint.repo,
        "url": checkpoint.url,
        "revision": checkpoint.revision,
        "model_type": checkpoint.config.get("model_type"),
        "stored_as": sorted({task.tensor.stored_as for task in plan.tasks}),
        "files": [
            {
                "name": shard.path.name,
                "bytes": shard.nbytes,
                "sha256": shard.sha256,
                "etag": None if shard.remote is None else shard.remote.etag,
            }
            for shard in checkpoint.shards
        ],
    }


def _peak_rss_bytes() -> int:
    """Peak resident set of this process image; getrusage would also count the parent's, before exec."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
