"""The statistics in plain torch, on any device torch offers.

Slow beside `native_cpu` and `triton_gpu`, but it needs no compiler and no particular GPU. A unit is taken in slices of
whole rows, each widened to float64, centred and squared; slices merge left to right (Chan, Golub & LeVeque 1979), so
no widened copy of more than SLICE_ELEMENTS elements (or one row) exists. `torch.var_mean` would be one call, but takes
torch's scalar path on the CPU and is slower than the four vectorised passes below. Devices without float64 (mps) get
float32 within a unit; units are merged in float64 on the host all the same.

Traffic: each stored byte is copied once into an aligned slice (the buffer may be read-only or misaligned, torch takes
neither), which then stays in cache. Chunks whose data is a tensor are reduced on that tensor's device, without a copy
to the host. Codes of a byte times a scale (see `scaled`) are decoded there, other codes and adapters on the host.
Checked against kernels.reference, rtol 1e-9; 1e-5 where float32 is all there is.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfp.errors import EncodingError
from llmfp.kernels.reference import Reference, decoded
from llmfp.kernels.scaled import Scales, scaled
from llmfp.marginals import Buffer, Chunk, Marginals, Moments

if TYPE_CHECKING:
    import torch

SLICE_ELEMENTS = 1 << 16
"""512 KiB as float64: a slice and its centred copy stay in a core's second-level cache."""
DEVICE_SLICE_ELEMENTS = 1 << 21
"""16 MiB as float64: on a device the launches are what costs."""

_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TORCH_NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


class _Decoder:
    """Bytes on a device times their scales, as numbers of `real`. Their levels are looked up: mps has no FP8."""

    def __init__(self, chunk: Chunk, scales: Scales, device: torch.device, real: torch.dtype) -> None:
        import torch

        self._levels = torch.from_numpy(scales.levels).to(real).to(device)
        self._table = torch.from_numpy(scales.table.copy()).to(device).to(real)
        self._row = (torch.arange(chunk.rows, device=device) + scales.first_row) // scales.row_block
        self._col = (torch.arange(chunk.cols, device=device) + scales.first_col) // scales.col_block

    def decoded(self, codes: torch.Tensor, start: int) -> torch.Tensor:
        """The elements of rows from `start` on; codes uint8[n, cols]."""
        scale = self._table[self._row[start : start + len(codes)]][:, self._col]
        return scale.mul_(self._levels[codes.int()])


class _Columns:
    """Running column moments of the slices of one unit: n elements each, mean and M2 of every column."""

    def __init__(self) -> None:
        self.n = 0
        self.mean: torch.Tensor | float = 0.0
        self.m2: torch.Tensor | float = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Merges the columns of x [rows, cols] into what came before (Chan 1979)."""
        mean, m2 = _moments(x, 0)
        n = len(x)
        delta, share = mean - self.mean, n / (self.n + n)
        self.mean = self.mean + delta * share
        self.m2 = self.m2 + m2 + delta * delta * (self.n * share)
        self.n += n


def _moments(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and centred sum of squares along one dimension, in two passes; non-finite where an element is."""
    mean = x.mean(dim, keepdim=True)
    return mean.squeeze(dim), (x - mean).square_().sum(dim)


def expanded(chunk: Chunk, device: str) -> torch.Tensor:
    """The chunk's elements times its weights as float32 [rows, cols], on its tensor's device, else on `device`.

    NaN where they are not finite. Codes other than `scaled` ones, and adapters, are made numbers of on the host.
    Checked against the reference's `expand`."""
    import torch

    chunk, scales = scaled(chunk) or (decoded_on_host(chunk, "F32"), None)
    dtype: torch.dtype = torch.uint8 if scales else getattr(torch, _TORCH_NAMES[chunk.dtype])
    shape, stride = (chunk.rows, chunk.cols * dtype.itemsize), (chunk.row_stride_bytes, 1)
    if isinstance(chunk.data, Buffer):
        stored = np.ndarray(shape, np.uint8, buffer=chunk.data, offset=chunk.offset_bytes, strides=stride)
        values = torch.from_numpy(stored.copy()).to(device)
    else:
        values = chunk.data.as_strided(shape, stride, chunk.offset_bytes).clone(memory_format=torch.contiguous_format)
    values = values.view(dtype)
    if scales is not None:
        values = _Decoder(chunk, scales, values.device, torch.float32).decoded(values, 0)
    values = values if dtype.itemsize == 8 else values.to(torch.float32)
    for weight, across in ((chunk.col_weight, (1, -1)), (chunk.row_weight, (-1, 1))):
        if weight is not None:
            gain = torch.from_numpy(np.frombuffer(weight, np.float32).reshape(across).copy())
            gain = gain.pin_memory() if values.is_cuda else gain  # a copy that nobody waits for
            values = values * gain.to(values.device, non_blocking=True)
    single = values.to(torch.float32)
    return torch.where(single.isfinite(), single, torch.nan)


def decoded_on_host(chunk: Chunk, dtype: str) -> Chunk:
    """The chunk, if plain; else its elements as `dtype` in host memory, for what only NumPy can do: codes, adapters."""
    if chunk.coding is None and chunk.low_rank is None:
        return chunk
    if not isinstance(chunk.data, Buffer):
        chunk = replace(chunk, data=chunk.data.cpu().numpy().data)
    return decoded(chunk, dtype)


def _bytes(parts: list[torch.Tensor], good: list[torch.Tensor]) -> bytes:
    """The parts end to end as little-endian float64, NaN (0x7ff8...) where `good` is false."""
    import torch

    values = torch.where(torch.cat(good), torch.cat(parts), torch.nan)
    packed: bytes = values.cpu().to(torch.float64).numpy().tobytes()
    return packed


class TorchFallback(Reference):
    """Pure torch on one device; merging and pooling are the reference's, on the host."""

    name = "torch_fallback"
    dtypes = frozenset(_TORCH_NAMES)
    library_bytes = 200 << 20
    scratch_per_element = 4
    scratch_per_code = 104
    takes_tensors = True

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def why_unavailable(self) -> str | None:
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed"
        try:
            import torch

            torch.zeros(1, dtype=self._real(torch.device(self.device)), device=self.device)
        except Exception as error:
            # torch reports a missing device, driver or library by half a dozen exception types
            return f"torch cannot use device {self.device} ({type(error).__name__})"
        return None

    def describe(self) -> str:
        return f"torch {self.device}"

    def _real(self, device: torch.device) -> torch.dtype:
        """What a device accumulates in."""
        import torch

        return torch.float32 if device.type == "mps" else torch.float64

    def versions(self) -> dict[str, str]:
        import torch

        return {"torch": str(torch.__version__)}

    def marginals(self, chunk: Chunk) -> Marginals:
        import torch

        wide = "F32" if self._real(torch.device(self.device)).itemsize == 4 else "F64"
        chunk, scales = scaled(chunk) or (decoded_on_host(chunk, wide), None)
        if scales is None and chunk.dtype not in _TORCH_NAMES:
            raise EncodingError(f"dtype {chunk.dtype} is not supported by back end {self.name}")
        dtype: torch.dtype = torch.uint8 if scales else getattr(torch, _TORCH_NAMES[chunk.dtype])
        device = torch.device(self.device) if isinstance(chunk.data, Buffer) else chunk.data.device
        real = self._real(device)
        decoder = None if scales is None else _Decoder(chunk, scales, device, real)
        row_bytes = chunk.cols * dtype.itemsize
        stored: Any
        if isinstance(chunk.data, Buffer):
            stored = np.ndarray(
                (chunk.rows, row_bytes),
                np.uint8,
                buffer=chunk.data,
                offset=chunk.offset_bytes,
                strides=(chunk.row_stride_bytes, 1),
            )
        else:
            stored = chunk.data.as_strided((chunk.rows, row_bytes), (chunk.row_stride_bytes, 1), chunk.offset_bytes)
        gain = None
        for buffer, shape in ((chunk.col_weight, (1, -1)), (chunk.row_weight, (-1, 1))):
            if buffer is not None:
                gain = torch.from_numpy(np.frombuffer(buffer, np.float32).reshape(shape).copy()).to(device, real)

        row: list[tuple[torch.Tensor, torch.Tensor]] = []
        weighted_row: list[tuple[torch.Tensor, torch.Tensor]] = []
        good_row: list[torch.Tensor] = []
        good_col: list[torch.Tensor] = []
        col: list[_Columns] = []
        weighted_col: list[_Columns] = []
        cross: list[torch.Tensor] = []
        abs_max, nonfinite = 0.0, 0
        slice_elements = SLICE_ELEMENTS if device.type == "cpu" else DEVICE_SLICE_ELEMENTS
        slice_rows = max(1, slice_elements // max(chunk.cols, 1))

        for unit in range(0, chunk.rows, chunk.unit_rows):
            unit_stop = min(unit + chunk.unit_rows, chunk.rows)
            col.append(_Columns())
            weighted_col.append(_Columns())
            cross.append(torch.zeros(chunk.cols, dtype=real, device=device))
            good_col.append(torch.ones(chunk.cols, dtype=torch.bool, device=device))
            for start in range(unit, unit_stop, slice_rows):
                stop = min(start + slice_rows, unit_stop)
                here = stored[start:stop]
                here = torch.from_numpy(here.copy()) if isinstance(here, np.ndarray) else here.clone()
                x = here.contiguous().view(dtype).to(device)
                x = x.to(real) if decoder is None else decoder.decoded(x, start)
                largest = float(x.abs().max()) if x.numel() else 0.0
                good_row.append(torch.ones(stop - start, dtype=torch.bool, device=device))
                if not math.isfinite(largest):
                    # max() hands on NaN and infinity, so only a slice that holds one pays for looking at each element.
                    finite = x.isfinite()
                    good_row[-1] = finite.all(1)
                    good_col[-1] &= finite.all(0)
                    nonfinite += int(finite.logical_not().sum())
                    largest = float(x.abs().where(finite, 0.0).max())
                abs_max = max(abs_max, largest)
                row.append(_moments(x, 1))
                col[-1].add(x)
                centre = row[-1][0]
                if chunk.col_weight is not None and gain is not None:
                    weighted_row.append(_moments(x * gain, 1))
                    centre = weighted_row[-1][0]
                if chunk.row_weight is not None and gain is not None:
                    weighted_col[-1].add(x * gain[start:stop])
                if chunk.cross:
                    cross[-1] += (x * centre[:, None]).sum(0)

        # A gain may itself be non-finite; then what it took part in is NaN too.
        def joined(pairs: list[tuple[torch.Tensor, torch.Tensor]], weighted: bool) -> Moments:
            good = [g & m.isfinite() for g, (m, _) in zip(good_row, pairs, strict=True)] if weighted else good_row
            return Moments(_bytes([m for m, _ in pairs], good), _bytes([q for _, q in pairs], good))

        def columns(units: list[_Columns], weighted: bool) -> Moments:
            means = [torch.as_tensor(u.mean) for u in units]
            m2s = [torch.as_tensor(u.m2) for u in units]
            good = [g & m.isfinite() for g, m in zip(good_col, means, strict=True)] if weighted else good_col
            return Moments(_bytes(means, good), _bytes(m2s, good))

        return Marginals(
            counts=tuple(u.n for u in col),
            row=joined(row, weighted=False),
            col=columns(col, weighted=False),
            weighted_row=joined(weighted_row, weighted=True) if weighted_row else None,
            weighted_col=columns(weighted_col, weighted=True) if chunk.row_weight is not None else None,
            cross=_bytes(cross, [c.isfinite() for c in cross]) if chunk.cross else None,
            abs_max=abs_max,
            nonfinite=nonfinite,
        )


BACKEND = TorchFallback()
