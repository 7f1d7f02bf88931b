"""Gram matrices where the weights are: `LayerGrams` whose matrices are torch tensors, on any device.

All whole heads of a step are expanded at once and multiplied as one batch, in float32 over at most BLOCK terms
(torch's matmul in full float32, no TF32), and float64 over those. Sums stay on the device until the layer is done, and
come back in one copy, h × h per head; those of mps, which has no float64, are the host's. Each stored byte is read from
device memory once more than by the marginals; one fused kernel for both would save that, and was not built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfp.architecture import Role
from llmfp.architecture.specs import HeadRows
from llmfp.circuits import BLOCK, Float64, Grams, LayerGrams
from llmfp.kernels.torch_fallback import expanded
from llmfp.marginals import Buffer, Chunk

if TYPE_CHECKING:
    import torch


class DeviceGrams(LayerGrams):
    """The Gram matrices of one layer, multiplied on the device that its chunks lie on; arrays are torch's."""

    _home: str | None = None
    """Where sums are kept, once the first chunk has come."""

    def add(self, role: Role, row: int, position: int, chunks: Mapping[Role, Chunk]) -> bool:
        with self._lock:
            if self._home is None:
                data = chunks[role].data
                device = self._device if isinstance(data, Buffer) else str(data.device)
                self._home = "cpu" if device.startswith("mps") else device
                self._replace_sums(self._zeros)
        return super().add(role, row, position, chunks)

    def finish(self) -> Grams:
        import torch

        kept = [sums for part in self._parts.values() for sums in (part.products, part.sums)]
        kept += [] if self._cross is None else [self._cross.products]
        flat: list[Any] = [sums.reshape(-1) for sums in kept]
        parts = iter(np.split(torch.cat(flat).cpu().numpy(), np.cumsum([len(each) for each in flat])))
        self._replace_sums(lambda sums: next(parts).reshape(sums.shape))
        return super().finish()

    def _replace_sums(self, by: Callable[[Any], Any]) -> None:
        """Puts something else in place of every array of sums."""
        for part in self._parts.values():
            part.products, part.sums = by(part.products), by(part.sums)
        if self._cross is not None:
            self._cross.products = by(self._cross.products)

    def _zeros(self, sums: Float64) -> Any:
        import torch

        return torch.zeros(sums.shape, dtype=torch.float64, device=self._home)

    def _products(self, x: Any, y: Any) -> Any:
        """x·yᵀ over the last dimension, batch by batch, float64 across blocks."""
        import torch

        total = torch.zeros((len(x), x.shape[1], y.shape[1]), dtype=torch.float64, device=self._home)
        for start in range(0, x.shape[2], BLOCK):
            block = slice(start, start + BLOCK)
            total += (x[:, :, block] @ y[:, :, block].mT).to(total.device)
        return total

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
        self._parts[rows].products[first:stop] = self._products(heads, heads)
        cross = self._cross
        if cross is not None and rows == cross.queries:
            at, first_key, stop_key = cross.keys, first // cross.group, -(-stop // cross.group)
            keys: Any = self._key_rows(at.role, first_key * at.stride, (stop_key - first_key) * at.stride)
            keys = keys.reshape(stop_key - first_key, at.stride, -1)[:, at.first : at.first + at.size]
            theirs = _each_repeated(keys, cross.group)[first - first_key * cross.group :][: stop - first]
            cross.products[first:stop] = self._products(heads, theirs)

    def _empty(self, rows: int, cols: int, _like: Chunk) -> Any:
        import torch

        device = self._device if isinstance(_like.data, Buffer) else _like.data.device
        return torch.empty((rows, cols), dtype=torch.float32, device=device)

    def _expand_into(self, part: Chunk, out: Any) -> None:
        out.copy_(expanded(part, self._device))

    def _centre(self, values: Any) -> Any:
        return values - values.mean(-1, keepdim=True, dtype=_real(values)).to(values.dtype)

    def _sum_rows(self, values: Any) -> Any:
        return values.sum(0, keepdim=True, dtype=_real(values)).to(self._home)

    def _by_head(self, values: Any, rows: HeadRows) -> Any:
        stored = values.reshape(len(values), rows.heads, rows.stride)
        return stored[:, :, rows.first : rows.first + rows.size].permute(1, 2, 0)

    def _head_products(self, x: Any, y: Any) -> Any:
        return (x @ _each_repeated(y, len(x) // len(y)).mT).to(self._home)

    @property
    def _device(self) -> str:
        return str(getattr(self._backend, "device", "cpu"))


def _each_repeated(heads: torch.Tensor, times: int) -> torch.Tensor:
    """Every head as often as heads share it; a list of indexes would have to be sent, and waited for."""
    return heads[:, None].expand(-1, times, -1, -1).flatten(0, 1)


def _real(values: torch.Tensor) -> torch.dtype:
    """What sums over many rows or columns are taken in: float64 where the device has it."""
    import torch

    return torch.float32 if values.device.type == "mps" else torch.float64


__all__ = ["DeviceGrams"]
