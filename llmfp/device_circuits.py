"""Gram matrices where the weights are: `LayerGrams` whose matrices are torch tensors, on any device.

All whole heads of a step are expanded at once and multiplied as one batch, in float32 over at most BLOCK terms
(torch's matmul in full float32, no TF32), and float64 over those, on the host: what comes back is h × h per head. Each
stored byte is read from device memory once more than by the marginals; one fused kernel for both would save that, and
was not built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from llmfp.architecture import Role
from llmfp.circuits import BLOCK, Float32, Float64, LayerGrams, rows_of
from llmfp.kernels.torch_fallback import expanded
from llmfp.marginals import Buffer, Chunk

if TYPE_CHECKING:
    import torch


class DeviceGrams(LayerGrams):
    """The Gram matrices of one layer, multiplied on the device that its chunks lie on; arrays are torch's."""

    def _add_rows(self, role: Role, row: int, chunk: Chunk) -> None:
        size, stop_row = self._parts[role].size, row + chunk.rows
        first, stop = -(-row // size), stop_row // size
        if first < stop:
            values = self._expand(chunk, first * size - row, (stop - first) * size)
            self._multiply(role, first, values)
        for head in sorted({row // size, (stop_row - 1) // size} - set(range(first, stop))):
            whole = self._whole_head(role, head, row, chunk)
            if whole is not None:
                self._multiply(role, head, whole)

    def _multiply(self, role: Role, first: int, values: Any) -> None:
        """Heads from `first` on, [heads · size, inputs], with themselves, and queries with their keys."""
        size, group = self._parts[role].size, self.heads.heads // self.heads.kv_heads
        if self.heads.projections[role].centred:
            values = self._centre(values)
        heads = values.reshape(-1, size, values.shape[1])
        stop = first + len(heads)
        self._parts[role].products[first:stop] = _products(heads, heads)
        if role is Role.Q:
            first_key, stop_key = first // group, -(-stop // group)
            keys: Any = self._key_rows(first_key * size, (stop_key - first_key) * size)
            keys = keys.reshape(-1, size, keys.shape[1])
            theirs = [head // group - first_key for head in range(first, stop)]
            self._qk[first:stop] = _products(heads, keys[theirs])

    def _empty(self, rows: int, cols: int, _like: Chunk) -> Any:
        import torch

        device = self._device if isinstance(_like.data, Buffer) else _like.data.device
        return torch.empty((rows, cols), dtype=torch.float32, device=device)

    def _expand(self, chunk: Chunk, first: int, rows: int, out: Any = None) -> Any:
        values = expanded(rows_of(chunk, first, rows), self._device)
        return values if out is None else out.copy_(values)

    def _centre(self, values: Any) -> Any:
        return values - values.mean(1, keepdim=True, dtype=_real(values)).to(values.dtype)

    def _sum_rows(self, values: Any) -> Float64:
        total: Float64 = values.sum(0, dtype=_real(values)).cpu().numpy().astype(np.float64)
        return total

    def _head_products(self, x: Any, y: Any, heads_x: int, heads_y: int) -> Float32:
        by_head_x = x.reshape(len(x), heads_x, -1).permute(1, 2, 0)
        by_head_y = y.reshape(len(y), heads_y, -1).permute(1, 0, 2)
        theirs = [head // (heads_x // heads_y) for head in range(heads_x)]
        products: Float32 = (by_head_x @ by_head_y[theirs]).cpu().numpy()
        return products

    @property
    def _device(self) -> str:
        return str(getattr(self._backend, "device", "cpu"))


def _products(x: torch.Tensor, y: torch.Tensor) -> Float64:
    """x·yᵀ over the last dimension, batch by batch, float64 across blocks."""
    total = np.zeros((len(x), x.shape[1], y.shape[1]))
    for start in range(0, x.shape[2], BLOCK):
        block = slice(start, start + BLOCK)
        total += (x[:, :, block] @ y[:, :, block].mT).cpu().numpy()
    return total


def _real(values: torch.Tensor) -> torch.dtype:
    """What sums over many rows or columns are taken in: float64 where the device has it."""
    import torch

    return torch.float32 if values.device.type == "mps" else torch.float64


__all__ = ["DeviceGrams"]
