"""The C++ kernel: what a scan on the CPU runs. Imports neither NumPy nor torch.

One pass over the stored bytes with SIMD chosen at run time and the GIL released; kernels/native/kernel.hpp has the
arithmetic. LLMFP_SIMD=avx512|avx2|neon|scalar forces a level; all give the same bits. Checked against the reference.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from llmfp.errors import BackendError
from llmfp.marginals import Buffer, Chunk, Coding, LowRank, Marginals, Moments

try:
    from llmfp import _native
except ImportError as error:  # an install without a compiler: `why_unavailable` says so
    _MISSING: str | None = str(error)
else:
    _MISSING = None


class NativeCpu:
    name = "native_cpu"
    dtypes = frozenset({"BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"})
    library_bytes = 1 << 20
    scratch_per_element = 2
    scratch_per_code = 0
    takes_tensors = False
    guards_mapped_pages = True

    def __init__(self) -> None:
        self._forced: str | None = None
        self._level = ""

    def why_unavailable(self) -> str | None:
        if _MISSING is not None:
            return f"the C++ extension was not built ({_MISSING}); install a C++17 compiler, then llmfp again"
        return None

    def describe(self) -> str:
        return self._simd()

    def versions(self) -> dict[str, str]:
        return {}

    def marginals(self, chunk: Chunk) -> Marginals:
        row_mean, row_m2, col_mean, col_m2, weighted_mean, weighted_m2, cross, abs_max, nonfinite = _native.marginals(
            *self._arguments(chunk)
        )
        units, rest = divmod(chunk.rows, chunk.unit_rows)
        weighted = None
        if weighted_mean is not None and weighted_m2 is not None:
            weighted = Moments(weighted_mean, weighted_m2)
        return Marginals(
            counts=(chunk.unit_rows,) * units + ((rest,) if rest else ()),
            row=Moments(row_mean, row_m2),
            col=Moments(col_mean, col_m2),
            weighted_row=weighted if chunk.col_weight is not None else None,
            weighted_col=weighted if chunk.row_weight is not None else None,
            cross=cross,
            abs_max=abs_max,
            nonfinite=nonfinite,
        )

    def expand(self, chunk: Chunk, out: Buffer) -> None:
        _native.expand(self._arguments(chunk), out)

    def merge(self, parts: Sequence[Marginals]) -> Marginals:
        counts = [part.counts for part in parts]
        col = self._folded(counts, [part.col for part in parts])
        weighted_rows = [part.weighted_row for part in parts if part.weighted_row is not None]
        weighted_cols = [part.weighted_col for part in parts if part.weighted_col is not None]
        crosses = [part.cross for part in parts if part.cross is not None]
        return Marginals(
            counts=(sum(map(sum, counts)),),
            row=_joined([part.row for part in parts]),
            col=col,
            weighted_row=_joined(weighted_rows) if weighted_rows else None,
            weighted_col=self._folded(counts, weighted_cols) if weighted_cols else None,
            cross=_native.add(crosses, len(col.mean) // 8) if crosses else None,
            abs_max=max(part.abs_max for part in parts),
            nonfinite=sum(part.nonfinite for part in parts),
        )

    def pool(self, moments: Moments, count: int, block: int) -> Moments:
        return Moments(*_native.pool(moments.mean, moments.m2, count, block))

    def log_rms(
        self,
        moments: Moments,
        count: int,
        weight: Buffer | None = None,
        cross: Buffer | None = None,
        centre_square: float = 0.0,
    ) -> Buffer:
        return _native.log_rms(moments.mean, moments.m2, count, weight, cross, centre_square)

    def _arguments(self, chunk: Chunk) -> tuple[Any, ...]:
        """A chunk as the extension takes it."""
        return (
            self._simd(),
            chunk.data,
            chunk.dtype,
            chunk.rows,
            chunk.cols,
            chunk.offset_bytes,
            chunk.row_stride_bytes,
            chunk.unit_rows,
            chunk.col_weight,
            chunk.row_weight,
            chunk.cross,
            None if chunk.coding is None else _fields(chunk.coding),
            None if chunk.low_rank is None else _fields(chunk.low_rank),
            chunk.first_row,
            chunk.first_col,
        )

    def _folded(self, counts: Sequence[tuple[int, ...]], parts: Sequence[Moments]) -> Moments:
        listed = [(n, part.mean, part.m2) for n, part in zip(counts, parts, strict=True)]
        return Moments(*_native.merge(self._simd(), listed))

    def _simd(self) -> str:
        """The level to run: the best one here, or the one LLMFP_SIMD asks for now."""
        forced = os.environ.get("LLMFP_SIMD", "")
        if forced != self._forced:
            here = _native.levels()
            if forced and forced not in here:
                raise BackendError(
                    f"LLMFP_SIMD={forced} cannot run on this machine", hint=f"it can run {', '.join(here)}"
                )
            self._forced, self._level = forced, forced or here[0]
        return self._level


def _fields(value: Coding | LowRank) -> tuple[object, ...]:
    """A dataclass's fields in order, as the extension takes them."""
    return tuple(getattr(value, name) for name in value.__slots__)


def _joined(parts: Sequence[Moments]) -> Moments:
    """Consecutive parts laid end to end."""
    if len(parts) == 1:
        return parts[0]
    return Moments(b"".join(part.mean for part in parts), b"".join(part.m2 for part in parts))


BACKEND = NativeCpu()
