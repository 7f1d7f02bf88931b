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
from llmfp.fingerprint import Fingerprint, TowerFingerprint
from llmfp.kernels import Backend, select
from llmfp.kernels import on as backend_on
from llmfp.plan import DEFAULT_MEMORY, Plan, make_plan
from llmfp.reader import Reader, open_reader

if TYPE_CHECKING:
    import torch

    from llmfp.evidence.comparison import Comparison

Source: TypeAlias = "str | os.PathLike[str] | torch.nn.Module | Mapping[str, torch.Tensor]"
"""What can be scanned: a path, or a model that is loaded already."""


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
    planned: Callable[[Plan], None] | None = None,
    progress: engine.Progress | None = None,
) -> Fingerprint:
    """The fingerprint of a checkpoint: a directory, a weight file, or a saved fingerprint, which is loaded.

    A live torch.nn.Module, or its state dict, is read where it is, on whatever device, without a copy.

    config        what config.json would say of a state dict; a model has its own
    base          the model below `source`, which is an adapter: the result is that of the two merged
    tower         decoder, encoder, cross or vision alone; the language model's towers when None
    backend       auto, native_cpu, torch_fallback, triton_gpu or reference
    reader        auto, mmap or pread; changes no bit of the result
    threads       as many as there are cores when None; changes no bit of the result
    memory_bytes  bound on resident memory beyond what planning takes; changes no bit of the result
    deep          also look at what heads compute (llmfp.circuits), which comparisons ask for and plain σ does not
    planned       called with the plan before the first weight is read
    progress      called about ten times a second with (bytes done, bytes in all)

    Raises LlmfpError (CheckpointError, ArchitectureError, EncodingError, PlanError, BackendError), one line each.
    """
    if not isinstance(source, str | os.PathLike):
        return _scan_live(source, config, tower, backend, threads, memory_bytes, deep, planned, progress)
    path = Path(source)
    if fingerprints.is_fingerprint(path):
        return fingerprints.load(path)
    start = time.perf_counter()
    return _run(*_open(path, base, tower, backend, reader), start, threads, memory_bytes, deep, planned, progress)


def _run(
    checkpoint: Checkpoint,
    attention: AttentionMap,
    chosen: Backend,
    opened: Reader,
    start: float,
    threads: int | None,
    memory_bytes: int,
    deep: bool,
    planned: Callable[[Plan], None] | None,
    progress: engine.Progress | None,
) -> Fingerprint:
    """Plans, reads and reduces what was opened, and closes it."""
    try:
        plan_ = _plan(checkpoint, attention, chosen, opened, threads, memory_bytes, deep)
        if planned is not None:
            planned(plan_)
        result = engine.run(plan_, chosen, opened, progress)
    finally:
        opened.close()
    return _fingerprint(plan_, result, chosen, opened, time.perf_counter() - start)


def _scan_live(
    source: torch.nn.Module | Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    tower: str | None,
    backend: str,
    threads: int | None,
    memory_bytes: int,
    deep: bool,
    planned: Callable[[Plan], None] | None,
    progress: engine.Progress | None,
) -> Fingerprint:
    from llmfp.reader.tensor_reader import TensorReader, attention_tensors

    start = time.perf_counter()
    checkpoint = open_live(source, config)
    attention = match(checkpoint, tower)
    elsewhere = [str(t.device) for t in attention_tensors(checkpoint, attention) if t.device.type != "cpu"]
    if backend == "auto" and elsewhere:
        chosen, note = backend_on(elsewhere[0])
        checkpoint = replace(checkpoint, caveats=(note,) if note else ())
    else:
        chosen = select(backend)
    reader = TensorReader(checkpoint, attention, chosen)
    return _run(checkpoint, attention, chosen, reader, start, threads, memory_bytes, deep, planned, progress)


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
) -> Plan:
    """What `scan` with the same arguments would read, in which order, and what it would skip and why."""
    checkpoint, attention, chosen, opened = _open(Path(source), base, tower, backend, reader, probe=False)
    opened.close()
    return _plan(checkpoint, attention, chosen, opened, threads, memory_bytes, deep)


def compare(
    a: str | os.PathLike[str] | Fingerprint,
    b: str | os.PathLike[str] | Fingerprint,
    *,
    tower: str | None = None,
    alpha: float = 1e-3,
    permutations: int = 100_000,
    null: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Comparison:
    """The evidence that two models share weights' ancestry: sources, which are scanned, or fingerprints.

    tower         compared in both; each model's main tower when None
    alpha         the level of the verdict, over all tests together
    permutations  drawn for each permutation test; no p is below 1 / (1 + permutations)
    null          further unrelated models beside those shipped: a file or a directory (see llmfp.evidence.null)
    seed          of the draws: the same seed, the same p

    Raises LlmfpError, one line.
    """
    from llmfp.evidence import comparison  # imports NumPy
    from llmfp.evidence import null as nulls

    models = nulls.load(null)
    only = tower if tower == "vision" else None  # the others are read together, and say more so
    first, second = (each if isinstance(each, Fingerprint) else scan(each, tower=only, deep=True) for each in (a, b))
    return comparison.compare(
        first, second, tower=tower, alpha=alpha, permutations=permutations, null=models, seed=seed
    )


def load(path: str | os.PathLike[str]) -> Fingerprint:
    """A fingerprint saved by `Fingerprint.save` or `llmfp-fast scan --out`."""
    return fingerprints.load(path)


def _open(
    path: Path,
    base: str | os.PathLike[str] | None,
    tower: str | None,
    backend: str,
    reader: str,
    *,
    probe: bool = True,
) -> tuple[Checkpoint, AttentionMap, Backend, Reader]:
    if base is not None or is_adapter(path):
        checkpoint = open_adapted(path, None if base is None else Path(base))
    else:
        checkpoint = open_checkpoint(path)
    attention = match(checkpoint, tower)
    chosen = select(backend)
    return checkpoint, attention, chosen, open_reader(reader, checkpoint, attention, chosen, probe=probe)


def _plan(
    checkpoint: Checkpoint,
    attention: AttentionMap,
    backend: Backend,
    reader: Reader,
    threads: int | None,
    memory_bytes: int,
    deep: bool,
) -> Plan:
    return make_plan(
        checkpoint,
        attention,
        backend,
        threads=threads if reader.max_threads is None else min(threads or reader.max_threads, reader.max_threads),
        min_threads=reader.min_threads,
        step_bytes=reader.step_bytes,
        extra_bytes=reader.extra_bytes,
        memory_bytes=memory_bytes,
        deep=deep,
    )


def _fingerprint(plan: Plan, result: engine.Result, backend: Backend, reader: Reader, seconds: float) -> Fingerprint:
    towers = {}
    for tower in plan.attention.towers:
        layers = tower.layers
        columns: dict[str, list[engine.Statistics | None]] = {}
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
        source=_source(checkpoint),
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
        caveats=(*checkpoint.caveats, *plan.attention.caveats, *result.caveats),
        digest=result.digest,
    )


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    """Provenance. Names only: a path would tell strangers about the machine."""
    return {
        "name": checkpoint.path.absolute().name,
        "base": None if checkpoint.base is None else checkpoint.base.absolute().name,
        "revision": checkpoint.revision,
        "model_type": checkpoint.config.get("model_type"),
        "files": [
            {"name": shard.path.name, "bytes": shard.nbytes, "sha256": shard.sha256} for shard in checkpoint.shards
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
