"""The statistics in plain torch, on any device torch offers that has float64.

Slow beside `native_cpu` and `triton_gpu`, but it needs no compiler and no particular GPU. A unit is taken in slices of
whole rows, each widened to float64, centred and squared; slices merge left to right (Chan, Golub & LeVeque 1979), so
no widened copy of more than SLICE_ELEMENTS elements (or one row) exists. `torch.var_mean` would be one call, but takes
torch's scalar path on the CPU and is slower than the four vectorised passes below.

Traffic: each stored byte is copied once into an aligned slice (the buffer may be read-only or misaligned, torch takes
neither), which then stays in cache. Checked against kernels.reference, rtol 1e-9.
"""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING

import numpy as np

from llmfp.errors import EncodingError
from llmfp.kernels.reference import Reference, decoded
from llmfp.marginals import Chunk, Marginals, Moments

if TYPE_CHECKING:
    import torch

SLICE_ELEMENTS = 1 << 16
"""512 KiB as float64: a slice and its centred copy stay in a core's second-level cache."""

_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TORCH_NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


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


def _bytes(parts: list[torch.Tensor], good: list[torch.Tensor]) -> bytes:
    """The parts end to end as little-endian float64, NaN (0x7ff8...) where `good` is false."""
    import torch

    values = torch.where(torch.cat(good), torch.cat(parts), torch.nan)
    packed: bytes = values.cpu().numpy().tobytes()
    return packed


class TorchFallback(Reference):
    """Pure torch on one device; merging and pooling are the reference's, on the host."""

    name = "torch_fallback"
    dtypes = frozenset(_TORCH_NAMES)
    library_bytes = 200 << 20
    scratch_per_element = 4
    scratch_per_code = 104

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def why_unavailable(self) -> str | None:
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed"
        kind = self.device.partition(":")[0]
        if kind == "mps":
            return "device mps has no float64"
        try:
            import torch

            torch.zeros(1, dtype=torch.float64, device=self.device)
        except Exception as error:
            # torch reports a missing device, driver or library by half a dozen exception types
            return f"torch cannot use device {self.device} ({type(error).__name__})"
        return None

    def describe(self) -> str:
        return f"torch {self.device}"

    def versions(self) -> dict[str, str]:
        import torch

        return {"torch": str(torch.__version__)}

    def marginals(self, chunk: Chunk) -> Marginals:
        import torch

        chunk = decoded(chunk)
        if chunk.dtype not in _TORCH_NAMES:
            raise EncodingError(f"dtype {chunk.dtype} is not supported by back end {self.name}")
        dtype: torch.dtype = getattr(torch, _TORCH_NAMES[chunk.dtype])
        stored = np.ndarray(
            (chunk.rows, chunk.cols * dtype.itemsize),
            np.uint8,
            buffer=chunk.data,
            offset=chunk.offset_bytes,
            strides=(chunk.row_stride_bytes, 1),
        )
        gain = None
        for buffer, shape in ((chunk.col_weight, (1, -1)), (chunk.row_weight, (-1, 1))):
            if buffer is not None:
                gain = torch.from_numpy(np.frombuffer(buffer, np.float32).reshape(shape).astype(np.float64))
                gain = gain.to(self.device)

        row: list[tuple[torch.Tensor, torch.Tensor]] = []
        weighted_row: list[tuple[torch.Tensor, torch.Tensor]] = []
        good_row: list[torch.Tensor] = []
        good_col: list[torch.Tensor] = []
        col: list[_Columns] = []
        weighted_col: list[_Columns] = []
        cross: list[torch.Tensor] = []
        abs_max, nonfinite = 0.0, 0
        slice_rows = max(1, SLICE_ELEMENTS // max(chunk.cols, 1))

        for unit in range(0, chunk.rows, chunk.unit_rows):
            unit_stop = min(unit + chunk.unit_rows, chunk.rows)
            col.append(_Columns())
            weighted_col.append(_Columns())
            cross.append(torch.zeros(chunk.cols, dtype=torch.float64, device=self.device))
            good_col.append(torch.ones(chunk.cols, dtype=torch.bool, device=self.device))
            for start in range(unit, unit_stop, slice_rows):
                stop = min(start + slice_rows, unit_stop)
                slice_bytes = torch.from_numpy(stored[start:stop].copy())
                x = slice_bytes.view(dtype).to(self.device).to(torch.float64)
                largest = float(x.abs().max()) if x.numel() else 0.0
                good_row.append(torch.ones(stop - start, dtype=torch.bool, device=self.device))
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
