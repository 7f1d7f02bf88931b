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
from llmfp.architecture.specs import HeadRows
from llmfp.circuits import BLOCK, Float32, Float64, LayerGrams
from llmfp.kernels.torch_fallback import expanded
from llmfp.marginals import Buffer, Chunk

if TYPE_CHECKING:
    import torch


class DeviceGrams(LayerGrams):
    """The Gram matrices of one layer, multiplied on the device that its chunks lie on; arrays are torch's."""

    def _add_rows(self, role: Role, row: int, chunk: Chunk) -> None:
        stop_row = row + chunk.rows
        for rows in self._parts:
            if rows.role is not role:
                continue
            first, stop = -(-row // rows.stride), stop_row // rows.stride
            if first < stop:
                values: Any = self._expand(chunk, first * rows.stride - row, (stop - first) * rows.stride)
                heads = values.reshape(stop - first, rows.stride, -1)[:, rows.first : rows.first + rows.size]
                self._multiply(rows, first, heads)
            for head in sorted({row // rows.stride, (stop_row - 1) // rows.stride} - set(range(first, stop))):
                whole: Any = self._whole_head(rows, head, row, chunk)
                if whole is not None:
                    self._multiply(rows, head, whole[None])

    def _multiply(self, rows: HeadRows, first: int, heads: Any) -> None:
        """Heads from `first` on, [heads, size, inputs], with themselves, and queries with their keys."""
        stop = first + len(heads)
        if self.heads.projections[rows.role].centred:
            heads = self._centre(heads)
        self._parts[rows].products[first:stop] = _products(heads, heads)
        cross = self._cross
        if cross is not None and rows == cross.queries:
            at, first_key, stop_key = cross.keys, first // cross.group, -(-stop // cross.group)
            keys: Any = self._key_rows(at.role, first_key * at.stride, (stop_key - first_key) * at.stride)
            keys = keys.reshape(stop_key - first_key, at.stride, -1)[:, at.first : at.first + at.size]
            theirs = [head // cross.group - first_key for head in range(first, stop)]
            cross.products[first:stop] = _products(heads, keys[theirs])

    def _empty(self, rows: int, cols: int, _like: Chunk) -> Any:
        import torch

        device = self._device if isinstance(_like.data, Buffer) else _like.data.device
        return torch.empty((rows, cols), dtype=torch.float32, device=device)

    def _expand_into(self, part: Chunk, out: Any) -> None:
        out.copy_(expanded(part, self._device))

    def _centre(self, values: Any) -> Any:
        return values - values.mean(-1, keepdim=True, dtype=_real(values)).to(values.dtype)

    def _sum_rows(self, values: Any) -> Float64:
        total: Float64 = values.sum(0, keepdim=True, dtype=_real(values)).cpu().numpy().astype(np.float64)
        return total

    def _by_head(self, values: Any, rows: HeadRows) -> Any:
        stored = values.reshape(len(values), rows.heads, rows.stride)
        return stored[:, :, rows.first : rows.first + rows.size].permute(1, 2, 0)

    def _head_products(self, x: Any, y: Any) -> Float32:
        theirs = [head // (len(x) // len(y)) for head in range(len(x))]
        products: Float32 = (x @ y[theirs].mT).cpu().numpy()
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
