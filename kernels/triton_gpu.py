"""Many units of many tensors in one launch, on any GPU Triton supports; interpreted on the CPU for tests.

The host writes two tables, units (where, how large, which weight) and tiles (which unit, which part of it), uploads
them, and launches the kernels of `triton_marginals` once per kind of matrix present (stored dtype, alignment, which
axis is weighted, whether scaled): two kinds for a usual model. Bytes with scales (FP8, int8, see `scaled`) are decoded
in the kernels; other codes and adapters become float32 on the host. Chunks in host memory are packed into one aligned
buffer on the way to the device; those whose data is a tensor there are reduced where they lie, as are matrices given to
`reduce`.

Tiles sum in float32 around a shift; merging is float64. Where a row's or column's float32 sums could not give 1e-6
(see merge_partials), its unit is reduced again in float64 by exact_tiles, which is also how F64 is reduced.
Results do not depend on what else is in the launch and are bit-identical from run to run; they agree with
kernels.reference within 1e-6, not to the bit.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmfp.errors import BackendError, EncodingError
from llmfp.kernels.reference import Reference
from llmfp.kernels.scaled import Scales, scaled
from llmfp.kernels.torch_fallback import decoded_on_host
from llmfp.marginals import Buffer, Chunk, Marginals, Moments

if TYPE_CHECKING:
    import torch

Float64 = NDArray[np.float64]

ITEMSIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1}
"""Bytes of an element; I8 only with scales."""
_TRITON_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TRITON_NAMES |= {"F8_E4M3": "float8e4nv", "F8_E5M2": "float8e5", "I8": "int8"}
LARGEST_FINITE = {"F64": 1.7976931348623157e308, "F32": 3.4028234663852886e38, "BF16": 3.3895313892515355e38}
LARGEST_FINITE |= {"F16": 65504.0, "F8_E4M3": 448.0, "F8_E5M2": 57344.0, "I8": 128.0}
"""Largest finite value of each stored dtype."""

PART_ROWS = 256
"""Rows of a tile: a bf16 column's partials are then 8 bytes for 512 read."""
FOLD_ROWS = 32
MERGE_BLOCK = 128
LOAD_BYTES = 16
ROW_SHIFT = 42
"""As in triton_marginals, which only a process with Triton loads."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A table of scales in device memory, as llmfp.kernels.scaled.Scales describes one in host memory.

    address of float32[rows, cols]"""

    address: int
    cols: int
    row_block: int
    col_block: int
    first_row: int = 0
    first_col: int = 0

    def fields(self, start: int, rows: int) -> tuple[int, ...]:
        """What a unit of so many rows, from row `start` of the matrix, says of it: see triton_marginals.UNIT_FIELDS."""
        top, before = divmod(self.first_row + start, self.row_block)
        reciprocal = (1 << ROW_SHIFT) // self.row_block + 1 if before + rows > self.row_block else 0
        return self.address + 4 * top * self.cols, self.cols, reciprocal, before, self.col_block, self.first_col


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix in device memory, as Chunk describes one in host memory; weights are addresses of float32, or 0."""

    address: int
    dtype: str
    rows: int
    cols: int
    row_stride_bytes: int
    unit_rows: int
    col_weight: int = 0
    row_weight: int = 0
    cross: bool = False
    scale: Scale | None = None

    @property
    def wide(self) -> bool:
        """Whether every row starts and ends on 16 bytes, and so do its scales, so that loads may be that wide."""
        sizes = [self.address, self.row_stride_bytes, self.cols * ITEMSIZES[self.dtype]]
        if self.scale is not None and self.scale.first_col + self.cols > self.scale.col_block:
            sizes += [self.scale.col_block, self.scale.first_col]
        return all(n % LOAD_BYTES == 0 for n in sizes)

    @property
    def kind(self) -> tuple[str, bool, bool, bool, bool]:
        """What a launch has in common: dtype, wide loads, weighted along columns, along rows, scaled."""
        return self.dtype, self.wide, self.col_weight != 0, self.row_weight != 0, self.scale is not None

    def unit(self, index: int) -> Matrix:
        """One unit of the matrix as a matrix."""
        start = index * self.unit_rows
        return replace(
            self,
            address=self.address + start * self.row_stride_bytes,
            rows=min(self.unit_rows, self.rows - start),
            row_weight=self.row_weight + 4 * start if self.row_weight else 0,
            scale=self.scale and replace(self.scale, first_row=self.scale.first_row + start),
        )


@dataclass(frozen=True, slots=True)
class _Sums:
    """What one matrix came to. rows [2 or 4, R], cols [2 or 4, U, C]: mean, M2, weighted mean, weighted M2."""

    rows: Float64
    cols: Float64
    cross: Float64 | None
    abs_max: Float64
    nonfinite: Float64
    doubted: NDArray[np.bool_]


@cache
def _kernels() -> Any:
    """The module of kernels; loading it loads Triton."""
    return importlib.import_module("llmfp.kernels.triton_marginals")


def kernel_options(
    dtype: str,
    wide: bool,
    col_weight: bool,
    row_weight: bool,
    scaled: bool = False,
    *,
    exact: bool,
    by_bits: bool = False,
) -> dict[str, Any]:
    """Compile-time arguments of marginal_tiles, or exact_tiles, for a kind of matrix: what the tests compile runs.

    by_bits: e4m3 is decoded by integer arithmetic, where the GPU has no conversion.

    512 columns are 16 to a lane: the five shuffles per row and sum are then a tenth of the instructions, of which
    there are 10 an element (16 weighted; of 8-bit floats 9 and 14, with scales 11 and 16, by bits three more). More
    rows or columns at a time spill (ptxas for sm_80 and sm_90).
    """
    import triton.language as tl

    itemsize = ITEMSIZES[dtype]
    element = tl.uint8 if by_bits and dtype == "F8_E4M3" else getattr(tl, _TRITON_NAMES[dtype])
    block_rows = 2 if exact or col_weight or row_weight or itemsize == 4 else 4
    if itemsize == 1 and (exact or (scaled and row_weight)):
        block_rows = 1
    return ({} if exact else {"fold_rows": FOLD_ROWS, "largest_level": LARGEST_FINITE[dtype]}) | {
        "element": element,
        "pointee": tl.uint8 if itemsize == 1 else element,
        "part_rows": PART_ROWS,
        "block_rows": block_rows,
        "block_cols": 256 if exact else 512,
        "lane_elements": LOAD_BYTES // itemsize if wide else 1,
        "scaled": scaled,
        "col_weight": col_weight,
        "row_weight": row_weight,
    }


LAUNCH_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


class _Table:
    """The host-built tables of one launch: units, tiles, merge jobs and blocks, and where each result will lie."""

    def __init__(self, matrices: Sequence[Matrix], block_cols: int, merged: bool) -> None:
        self.units: list[tuple[int, ...]] = []
        self.jobs: list[tuple[int, ...]] = []
        self.job_units: list[tuple[int, int]] = []
        self.tile_counts: list[int] = []
        self.strip_counts: list[int] = []
        self.plane = 0
        self.first_row: list[int] = []
        self.first_col: list[int] = []
        self.first_cross: list[int] = []
        self.first_unit: list[int] = []
        self.col_units: list[int] = []
        rows_in_all = sum(m.rows for m in matrices)
        row_out, col_out, cross_out, tile = 0, rows_in_all, 0, 0
        for m in matrices:
            strips = -(-m.cols // block_cols)
            counts = [min(m.unit_rows, m.rows - start) for start in range(0, m.rows, m.unit_rows)]
            parts = [-(-n // PART_ROWS) for n in counts]
            first_unit = len(self.units)
            row_partial = self.plane
            col_partial = row_partial + strips * m.rows
            self.plane = col_partial + sum(parts) * m.cols
            self.first_unit.append(first_unit)
            self.first_row.append(row_out)
            self.first_col.append(col_out)
            self.first_cross.append(cross_out)
            self.col_units.append(1 if merged else len(counts))
            column_job = (m.cols, parts[0], counts[0], PART_ROWS, tile, block_cols, 1, strips, int(m.row_weight != 0))
            if merged:
                self._add_job((col_partial, col_out, m.cols, sum(parts), parts[0], counts[0], m.rows), column_job[3:])
                self.job_units.append((first_unit, first_unit + len(counts)))
                col_out += m.cols
            for index, (n, part_count) in enumerate(zip(counts, parts, strict=True)):
                start = index * m.unit_rows
                weight = m.row_weight + 4 * start if m.row_weight else m.col_weight
                address = m.address + start * m.row_stride_bytes
                stride = m.row_stride_bytes // ITEMSIZES[m.dtype]
                scale = (0,) * 6 if m.scale is None else m.scale.fields(start, n)
                plain = address, n, m.cols, stride, weight, row_partial, col_partial, row_out, cross_out
                self.units.append(plain + scale)
                self.tile_counts.append(part_count * strips)
                self.strip_counts.append(strips)
                unit = len(self.units) - 1
                row_job = (block_cols, tile, PART_ROWS, strips, 1, int(m.col_weight != 0))
                self._add_job((row_partial, row_out, n, strips, strips, m.cols, m.cols), row_job)
                self.job_units.append((unit, unit + 1))
                if not merged:
                    tail = (PART_ROWS, tile, *column_job[5:])
                    self._add_job((col_partial, col_out, m.cols, part_count, part_count, n, n), tail)
                    self.job_units.append((unit, unit + 1))
                    col_out += m.cols
                row_partial += strips * n
                col_partial += part_count * m.cols
                row_out += n
                cross_out += m.cols
                tile += part_count * strips
        # Triton compiles a kernel anew for an integer that 16 divides and one that it does not.
        self.plane = -(-self.plane // 16) * 16
        self.merged_plane = -(-col_out // 16) * 16
        self.cross_size = cross_out

    def _add_job(self, head: tuple[int, ...], tail: tuple[int, ...]) -> None:
        self.jobs.append(head + tail)


def _pairs(counts: Sequence[int]) -> NDArray[np.int32]:
    """int32[sum(counts), 2]: every (index, 0 <= i < counts[index]), in order."""
    sizes = np.asarray(counts, np.int64)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    return np.stack([owner, np.arange(len(owner)) - (np.cumsum(sizes) - sizes)[owner]], 1).astype(np.int32)


class TritonGpu(Reference):
    """Fused Triton kernels; merging of chunks and pooling are the reference's, on the host."""

    name = "triton_gpu"
    dtypes = frozenset(ITEMSIZES) - {"I8"}
    library_bytes = 300 << 20
    scratch_per_element = 10
    scratch_per_code = 104
    takes_tensors = True

    def __init__(self, device: str = "cuda") -> None:
        self._device = device

    def why_unavailable(self) -> str | None:
        for library in ("torch", "triton"):
            if importlib.util.find_spec(library) is None:
                return f"{library} is not installed"
        if self.interpreted:
            return None
        try:
            import torch

            found = torch.cuda.is_available()
        except Exception as error:
            # a broken driver or library shows as half a dozen exception types
            return f"torch cannot be used ({type(error).__name__})"
        return None if found else "no GPU that Triton supports (TRITON_INTERPRET=1 runs it on the CPU, slowly)"

    def why_broken(self) -> str | None:
        """Why a GPU that is there cannot compute, found out by trying: an old card or driver, no compiler."""
        try:
            self.marginals(Chunk(bytes(64), "BF16", 1, 32, 0, 64, 32))
        except Exception as error:
            # Triton, its compiler, the driver and torch report this by a dozen exception types
            reason = str(error).strip().partition("\n")[0]
            return f"Triton cannot run on it ({type(error).__name__}: {reason[:200]})"
        return None

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs the kernels. Triton reads the variable when a kernel is defined."""
        return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

    @property
    def device(self) -> str:
        return "cpu" if self.interpreted else self._device

    def describe(self) -> str:
        import torch

        return "triton interpreter" if self.interpreted else f"triton {torch.cuda.get_device_name(self.device)}"

    def versions(self) -> dict[str, str]:
        import torch
        import triton

        return {"torch": str(torch.__version__), "triton": str(triton.__version__)}

    def marginals(self, chunk: Chunk) -> Marginals:
        return self.marginals_many([chunk])[0]

    def marginals_many(self, chunks: Sequence[Chunk], merged: bool = False) -> list[Marginals]:
        """Statistics of all chunks from one launch per kind of matrix, whatever their number.

        merged folds each chunk's columns on the device, so that [1, C] instead of [U, C] come back: at a GPU's
        bandwidth the unmerged columns (3 % of the bytes of bf16) would take longer than the reduction.
        """
        stored = [scaled(chunk) or (decoded_on_host(chunk, "F32"), None) for chunk in chunks]
        here = {index: chunk.data for index, (chunk, _) in enumerate(stored) if not isinstance(chunk.data, Buffer)}
        devices = {str(data.device) for data in here.values()}
        if len(devices) > 1:
            raise BackendError(f"{self.name} cannot reduce chunks on {' and '.join(sorted(devices))} in one launch")
        device = next(iter(devices), self.device)
        if device.partition(":")[0] != self.device.partition(":")[0]:  # weights that were offloaded to the host
            device = self.device
            here = {index: data.to(device) for index, data in here.items()}
        buffer, matrices = self._upload(stored, here, device)
        try:
            return self.reduce(matrices, merged, device)
        finally:
            del buffer, here

    def _upload(
        self, chunks: Sequence[tuple[Chunk, Scales | None]], here: Mapping[int, torch.Tensor], device: str
    ) -> tuple[torch.Tensor, list[Matrix]]:
        """All chunks, scales and weights packed into one buffer on the device (rows tightly, tensors on 256 bytes).

        here: by its number, the data of every chunk that is there already, of which only the rest is packed.
        """
        import torch

        pieces: list[NDArray[np.uint8]] = []
        for index, (chunk, scales) in enumerate(chunks):
            if scales is None and chunk.dtype not in self.dtypes:
                raise EncodingError(f"dtype {chunk.dtype} is not supported by back end {self.name}")
            if index not in here:
                pieces.append(
                    np.ndarray(
                        (chunk.rows, chunk.cols * ITEMSIZES[chunk.dtype]),
                        np.uint8,
                        buffer=chunk.host_data,
                        offset=chunk.offset_bytes,
                        strides=(chunk.row_stride_bytes, 1),
                    )
                )
            if scales is not None:
                pieces.append(scales.table.reshape(-1).view(np.uint8))
            pieces += [np.frombuffer(w, np.uint8) for w in (chunk.col_weight, chunk.row_weight) if w is not None]
        starts = np.cumsum([0] + [-(-piece.size // 256) * 256 for piece in pieces])
        staging = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=device.startswith("cuda"))
        host = staging.numpy()
        for start, piece in zip(starts[:-1], pieces, strict=True):
            host[start : start + piece.size].reshape(piece.shape)[...] = piece
        buffer = staging.to(device)

        # In the order in which they were packed: each chunk's elements, then its scales, then its weight.
        addresses = iter(buffer.data_ptr() + int(start) for start in starts[:-1])
        matrices = []
        for index, (chunk, scales) in enumerate(chunks):
            address = here[index].data_ptr() + chunk.offset_bytes if index in here else next(addresses)
            scale = None
            if scales is not None:
                blocks = scales.row_block, scales.col_block, scales.first_row, scales.first_col
                scale = Scale(next(addresses), scales.table.shape[1], *blocks)
            matrix = Matrix(
                address=address,
                dtype=chunk.dtype,
                rows=chunk.rows,
                cols=chunk.cols,
                row_stride_bytes=chunk.row_stride_bytes if index in here else chunk.cols * ITEMSIZES[chunk.dtype],
                unit_rows=chunk.unit_rows,
                col_weight=0 if chunk.col_weight is None else next(addresses),
                row_weight=0 if chunk.row_weight is None else next(addresses),
                cross=chunk.cross,
                scale=scale,
            )
            matrices.append(matrix)
        return buffer, matrices

    def reduce(self, matrices: Sequence[Matrix], merged: bool = False, device: str | None = None) -> list[Marginals]:
        """Statistics of matrices in the memory of one device, this back end's own where none is named.

        Raises EncodingError for a dtype there is no kernel for."""
        import torch

        device = device or self.device
        with torch.cuda.device(device) if device.startswith("cuda") else nullcontext():
            return self._reduce(matrices, merged, device)

    def _reduce(self, matrices: Sequence[Matrix], merged: bool, device: str) -> list[Marginals]:
        results: dict[int, Marginals] = {}
        kinds: dict[tuple[str, bool, bool, bool, bool], list[int]] = {}
        for index, m in enumerate(matrices):
            self._check(m)
            kinds.setdefault(m.kind, []).append(index)
        for members in kinds.values():
            group = [matrices[i] for i in members]
            for index, m, sums in zip(members, group, self._certain(group, merged, device), strict=True):
                results[index] = _marginals(m, sums)
        return [results[i] for i in range(len(matrices))]

    def _check(self, m: Matrix) -> None:
        if m.dtype not in ITEMSIZES:
            raise EncodingError(f"dtype {m.dtype} is not supported by back end {self.name}")
        if m.rows < 1 or m.cols < 1 or m.row_stride_bytes % ITEMSIZES[m.dtype]:
            raise BackendError(
                f"{self.name} cannot reduce {m.rows}x{m.cols} with a stride of {m.row_stride_bytes} bytes"
            )

    @property
    def converts_e4m3(self) -> bool:
        """Whether Triton can: on NVIDIA's from compute capability 8.9 on, and interpreted."""
        import torch

        return self.interpreted or (torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9))

    def _certain(self, group: list[Matrix], merged: bool, device: str) -> list[_Sums]:
        """Sums of matrices of one kind; the units that float32 cannot do to 1e-6 reduced again in float64."""
        exact = group[0].dtype == "F64"
        sums = self._sums(group, merged, exact, device)
        if exact:
            return sums
        again: list[Matrix] = []
        places: list[tuple[int, int]] = []
        for index, (m, s) in enumerate(zip(group, sums, strict=True)):
            if merged and s.doubted.any():
                again.append(m)
                places.append((index, -1))
            else:
                units = np.flatnonzero(s.doubted).tolist()
                again += [m.unit(u) for u in units]
                places += [(index, u) for u in units]
        if not again:
            return sums
        for (index, unit), better in zip(places, self._sums(again, merged, True, device), strict=True):
            if unit < 0:
                sums[index] = better
                continue
            m, s = group[index], sums[index]
            s.rows[:, unit * m.unit_rows : (unit + 1) * m.unit_rows] = better.rows
            s.cols[:, unit] = better.cols[:, 0]
            s.abs_max[unit], s.nonfinite[unit] = better.abs_max[0], better.nonfinite[0]
            if s.cross is not None and better.cross is not None:
                s.cross[unit] = better.cross[0]
        return sums

    def _sums(self, group: list[Matrix], merged: bool, exact: bool, device: str) -> list[_Sums]:
        """One launch of each kernel over matrices of one kind, and what came of each matrix."""
        import torch

        kernels = _kernels()
        by_bits = group[0].dtype == "F8_E4M3" and not self.converts_e4m3
        options = kernel_options(*group[0].kind, exact=exact, by_bits=by_bits)
        table = _Table(group, options["block_cols"], merged)
        planes = 4 if group[0].col_weight or group[0].row_weight else 2
        tiles = _pairs(table.tile_counts)
        blocks = _pairs([-(-job[2] // MERGE_BLOCK) for job in table.jobs])

        def on_device(array: NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(array).to(device)

        acc = torch.float64 if exact else torch.float32
        units = on_device(np.array(table.units, np.int64))
        partials = torch.empty(planes * table.plane, dtype=acc, device=device)
        tile_stats = torch.empty((len(tiles), 4), dtype=acc, device=device)
        merged_sums = torch.empty((planes, table.merged_plane), dtype=torch.float64, device=device)
        doubts = torch.empty(len(blocks), dtype=torch.int32, device=device)
        kernel = kernels.exact_tiles if exact else kernels.marginal_tiles
        self._launch(kernel, len(tiles), units, on_device(tiles), partials, tile_stats, table.plane, **options)
        self._launch(
            kernels.merge_partials,
            len(blocks),
            on_device(np.array(table.jobs, np.int64)),
            on_device(blocks),
            partials,
            tile_stats,
            merged_sums,
            doubts,
            table.plane,
            table.merged_plane,
            largest_finite=LARGEST_FINITE["F32" if group[0].scale else group[0].dtype],
            exact=exact,
            block_entries=MERGE_BLOCK,
        )
        cross = None
        if any(m.cross for m in group):
            means = merged_sums[2 if group[0].col_weight else 0]
            crosses = torch.empty(table.cross_size, dtype=torch.float64, device=device)
            strips = _pairs(table.strip_counts)
            wanted = np.repeat([m.cross for m in group], np.diff([*table.first_unit, len(table.units)]))
            strips = np.ascontiguousarray(strips[wanted[strips[:, 0]]])
            names = ("element", "pointee", "block_rows", "block_cols", "lane_elements", "scaled")
            chosen = {name: options[name] for name in names}
            self._launch(kernels.cross_products, len(strips), units, on_device(strips), means, crosses, **chosen)
            cross = crosses.cpu().numpy()

        values = merged_sums.cpu().numpy()
        stats = tile_stats.cpu().numpy().astype(np.float64)
        doubted = np.zeros(len(table.units), np.bool_)
        for job in np.unique(blocks[doubts.cpu().numpy() != 0, 0]):
            doubted[slice(*table.job_units[job])] = True
        first_tiles = np.cumsum([0, *table.tile_counts[:-1]])
        abs_max = np.maximum.reduceat(stats[:, 1], first_tiles)
        nonfinite = np.add.reduceat(stats[:, 2], first_tiles)

        sums = []
        for i, m in enumerate(group):
            unit_count = -(-m.rows // m.unit_rows)
            here = slice(table.first_unit[i], table.first_unit[i] + unit_count)
            col_stop = table.first_col[i] + table.col_units[i] * m.cols
            crossed = None
            if m.cross and cross is not None:
                start = table.first_cross[i]
                crossed = cross[start : start + unit_count * m.cols].reshape(unit_count, m.cols)
                crossed = crossed.sum(0, keepdims=True) if merged else crossed
            sums.append(
                _Sums(
                    rows=values[:, table.first_row[i] : table.first_row[i] + m.rows],
                    cols=values[:, table.first_col[i] : col_stop].reshape(planes, -1, m.cols),
                    cross=crossed,
                    abs_max=abs_max[here],
                    nonfinite=nonfinite[here],
                    doubted=doubted[here],
                )
            )
        return sums

    def _launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        """One launch. NumPy, which computes for the interpreter, would warn where a GPU silently gives NaN."""
        if not self.interpreted:
            kernel[(programs,)](*arguments, **constants, **LAUNCH_OPTIONS)
            return
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            kernel[(programs,)](*arguments, **constants, **LAUNCH_OPTIONS)


def _marginals(m: Matrix, sums: _Sums) -> Marginals:
    """The contract's form of one matrix's sums."""
    starts = range(0, m.rows, m.unit_rows)
    counts = tuple(min(m.unit_rows, m.rows - start) for start in starts)
    return Marginals(
        counts=counts if sums.cols.shape[1] == len(counts) else (m.rows,),
        row=Moments(sums.rows[0].tobytes(), sums.rows[1].tobytes()),
        col=Moments(sums.cols[0].tobytes(), sums.cols[1].tobytes()),
        weighted_row=Moments(sums.rows[2].tobytes(), sums.rows[3].tobytes()) if m.col_weight else None,
        weighted_col=Moments(sums.cols[2].tobytes(), sums.cols[3].tobytes()) if m.row_weight else None,
        cross=None if sums.cross is None else sums.cross.tobytes(),
        abs_max=float(sums.abs_max.max()),
        nonfinite=int(sums.nonfinite.sum()),
    )


BACKEND = TritonGpu()
