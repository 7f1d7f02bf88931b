"""Hands out the memory of tensors that are there already: no copy, on whatever device they are."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmfp.architecture import AttentionMap
from llmfp.checkpoint.live import LiveCheckpoint, is_sharded, why_unreadable
from llmfp.device_sums import SumsRoom
from llmfp.errors import CheckpointError
from llmfp.kernels import Backend
from llmfp.marginals import Buffer
from llmfp.plan import Plan, Step

if TYPE_CHECKING:
    import torch


class TensorReader:
    """The bytes of a live model, as a flat uint8 tensor where the back end takes one, else as host memory.

    Where a tensor's elements do not lie in C order, a step's rows are copied together on its device. A tensor that is
    sharded over several processes is gathered, whole, when its first step is read: all processes scan the same model,
    on one thread each, so that they gather in the same order; its memory is accounted for in `extra_bytes`.
    """

    name = "live"
    block_bytes = 1
    min_threads = 1

    def __init__(
        self, checkpoint: LiveCheckpoint, attention: AttentionMap, backend: Backend, sums_room: SumsRoom | None
    ) -> None:
        """sums_room: what a back end may take whose sums stay on its device; steps wait for each other only where all
        of the model lies there, in order."""
        tensors = attention_tensors(checkpoint, attention)
        sharded = [tensor.numel() * tensor.element_size() for tensor in tensors if is_sharded(tensor)]
        resident = all(tensor.device.type == "cpu" for tensor in tensors)
        self._checkpoint, self._as_tensors = checkpoint, backend.takes_tensors
        self._gathered: tuple[int, torch.Tensor] | None = None
        kind = str(getattr(backend, "device", "cpu")).partition(":")[0]
        stay = not sharded and all(tensor.is_contiguous() and tensor.device.type == kind for tensor in tensors)
        if sums_room is not None and not stay:
            sums_room = replace(sums_room, launch_bytes=None)
        self.sums_room = sums_room
        self.extra_bytes = max(sharded, default=0) + (sums_room.kept_bytes if sums_room else 0)
        self.max_threads = 1 if sharded else None if resident else 2  # two keep a device busy: its tables, its kernels
        self.step_bytes = (8 if resident else 64) << 20

    def read(self, step: Step) -> tuple[Buffer | torch.Tensor, int]:
        import torch

        place = self._checkpoint.place(step.offset_bytes)
        if reason := why_unreadable(place.tensor):
            raise OSError(errno.EIO, reason)
        tensor, start = self._whole(place.offset_bytes, place.tensor.detach()), step.offset_bytes - place.offset_bytes
        if not tensor.is_contiguous():
            row_bytes = tensor.numel() // len(tensor) * tensor.element_size()
            first = start // row_bytes
            tensor = tensor[first : -(-(start + step.nbytes) // row_bytes)].contiguous()
            start -= first * row_bytes
        content = tensor.reshape(-1).view(torch.uint8)
        if self._as_tensors:
            return content, start
        return content[start : start + step.nbytes].cpu().numpy().data, 0

    def begin(self, plan: Plan) -> None:
        """Nothing: it is there."""

    def ahead(self, step: Step) -> None:
        """Nothing: it is there."""

    def release(self, step: Step) -> None:
        """Nothing: it is not ours."""

    def cancel(self) -> None:
        """Nothing: only a gathering waits, for the other processes."""

    def close(self) -> None:
        self._gathered = None

    def _whole(self, offset_bytes: int, tensor: torch.Tensor) -> torch.Tensor:
        """All of a tensor; of a sharded one gathered and kept until another is asked for. Of one thread only."""
        if not is_sharded(tensor):
            return tensor
        if self._gathered is None or self._gathered[0] != offset_bytes:
            self._gathered = None  # first, so that there are never two
            sharded: Any = tensor
            self._gathered = offset_bytes, sharded.full_tensor()
        return self._gathered[1]


def attention_tensors(checkpoint: LiveCheckpoint, attention: AttentionMap) -> list[torch.Tensor]:
    """The tensors of all projections. Raises CheckpointError, by name, for one whose values cannot be read."""
    found = []
    for spec in dict.fromkeys(p.view.tensor for tower in attention.towers for p in tower.projections):
        found.append(checkpoint.place(spec.offset_bytes).tensor)
        if reason := why_unreadable(found[-1]):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {spec.name!r} {reason}", hint="give a model that holds its weights"
            )
    return found


__all__ = ["TensorReader", "attention_tensors"]
