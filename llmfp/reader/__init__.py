"""How bytes arrive: mapped from the page cache, read into a buffer of the thread's own, or received from a server.

Warm files are mapped, since that saves the copy (1.1 to 1.4 times as fast, bench/bench_readers.py); everything else is
read with pread, which keeps more requests in flight and behaves on network file systems. All hand out the same bytes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from llmfp.architecture import AttentionMap
from llmfp.checkpoint import Checkpoint, Shard
from llmfp.errors import CheckpointError
from llmfp.kernels import Backend
from llmfp.marginals import Buffer
from llmfp.plan import Plan, Step

if TYPE_CHECKING:
    import torch

    from llmfp.device_sums import SumsRoom
    from llmfp.hub.client import Client

READERS = ("auto", "mmap", "pread")
_SAMPLES = 64


class Reader(Protocol):
    """Hands out the bytes of plan steps, in any order, from any number of threads."""

    name: str
    step_bytes: int
    """Aimed size of one read."""
    extra_bytes: int
    """Resident bytes that one read can cost beyond its own."""
    block_bytes: int
    """Least size of a read that a sample is worth."""
    min_threads: int
    """Threads worth having even where there are fewer cores, to keep requests in flight."""
    max_threads: int | None
    """The most threads that may read; None for any number."""
    sums_room: SumsRoom | None
    """Memory of devices that sums may take; None where bytes are handed out in host memory."""

    def begin(self, plan: Plan) -> None:
        """Says what will be read, before anything is."""

    def read(self, step: Step) -> tuple[Buffer | torch.Tensor, int]:
        """A buffer and the position in it of the step's first byte; valid until this thread's next `read` or `release`.

        Raises CheckpointError when the file has changed, OSError when it cannot be read.
        """

    def ahead(self, step: Step) -> None:
        """Says that this step will be read soon."""

    def release(self, step: Step) -> None:
        """Gives the step's memory back."""

    def cancel(self) -> None:
        """Lets reads that wait for something fail soon."""

    def close(self) -> None:
        """Closes every file. Raises CheckpointError when one has changed since its header was read."""


def open_reader(
    name: str,
    checkpoint: Checkpoint,
    attention: AttentionMap,
    backend: Backend,
    *,
    client: Client | None = None,
    probe: bool = True,
) -> Reader:
    """The reader of that name; `auto` maps when most of the weights are in the page cache already.

    Finding that out reads one byte of some tensors; without `probe`, `auto` takes them for cached. A remote checkpoint
    is read through `client`, which the reader closes.
    """
    if any(shard.remote is not None for shard in checkpoint.shards):
        from llmfp.reader.http_reader import HttpReader

        if name != "auto" or client is None:
            raise CheckpointError(f"reader {name} reads files on disk", hint="leave --reader out for a remote source")
        return HttpReader(checkpoint.shards, client)
    from llmfp.reader.mmap_reader import MmapReader
    from llmfp.reader.pread_reader import PreadReader

    if name == "auto":
        mapped = backend.guards_mapped_pages and MmapReader.why_unavailable() is None
        name = "mmap" if mapped and (not probe or _mostly_cached(checkpoint, attention)) else "pread"
    if name == "mmap":
        if reason := MmapReader.why_unavailable():
            raise CheckpointError(f"reader mmap cannot run here: {reason}", hint="use --reader pread")
        return MmapReader(checkpoint.shards, copying=not backend.guards_mapped_pages)
    return PreadReader(checkpoint.shards)


def open_shard(shard: Shard) -> int:
    """A descriptor of the very file whose header was read."""
    try:
        descriptor = os.open(shard.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise CheckpointError(f"{shard.path}: {error.strerror}", hint="the file changed while it was read") from None
    try:
        shard.check_unchanged(os.fstat(descriptor))
    except CheckpointError:
        os.close(descriptor)
        raise
    return descriptor


def close_shards(shards: Iterable[tuple[Shard, int]]) -> None:
    """Closes all, then raises CheckpointError for the first that is no longer the file it was."""
    changed: CheckpointError | None = None
    for shard, descriptor in shards:
        try:
            shard.check_unchanged(os.fstat(descriptor))
        except CheckpointError as error:
            changed = changed or error
        finally:
            os.close(descriptor)
    if changed is not None:
        raise changed


def _mostly_cached(checkpoint: Checkpoint, attention: AttentionMap) -> bool:
    """Whether most of a sample of the weights would be read without waiting for a device.

    RWF_NOWAIT says so for any readable file (mincore(2) does not, for files of others), and network file systems do
    not support it: they read as not cached, so they are not mapped.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    tensors = sorted(
        {p.view.tensor for tower in attention.towers for p in tower.projections},
        key=lambda spec: (spec.shard, spec.offset_bytes),
    )
    sample = tensors[:: -(-len(tensors) // _SAMPLES)]
    cached, byte, descriptor, opened = 0, bytearray(1), -1, -1
    try:
        for spec in sample:
            if spec.shard != opened:
                if descriptor >= 0:
                    os.close(descriptor)
                descriptor, opened = open_shard(checkpoint.shards[spec.shard]), spec.shard
            try:
                cached += os.preadv(descriptor, [byte], spec.offset_bytes + spec.nbytes // 2, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL):
                    raise
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return 2 * cached > len(sample)
