"""Many units of many tensors in one launch, on any GPU Triton supports; interpreted on the CPU for tests.

The host writes two tables, units (where, how large, which weight) and tiles (which unit, which part of it), uploads
them, and launches the kernels of `triton_marginals` once per kind of matrix present (stored dtype, alignment, which
axis is weighted, whether scaled): two kinds for a usual model. Bytes with scales (FP8, int8, see `scaled`) are decoded
in the kernels; other codes and adapters become float32 on the host. Chunks in host memory are packed into one aligned
buffer on the way to the device; those whose data is a tensor there are reduced where they lie, as are matrices given to
`reduce`.

Tiles sum in float32 around a shift; merging is float64. Where a row's or column's float32 sums could not give 1e-6
(see merge_partials), its unit is reduced again in float64 by exact_tiles, which is also how F64 is reduced. That is
decided on the device: exact_tiles is launched for all units and ends at once where a unit is not doubted. So `launch`
waits for nothing, its input may be overwritten by whatever is put behind it on the stream, and `fetch` brings back what
any number of launches came to, in one copy.

Results do not depend on what else is in the launch and are bit-identical from run to run; they agree with
kernels.reference within 1e-6, not to the bit.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
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


_INTERPRETER = threading.Lock()
"""Triton's puts its functions in place of the language's while it runs: it is for one thread."""


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
    """The host-built tables of one launch: units, tiles, merge jobs and blocks, and where each result will lie.

    Owners are what is reduced again as a whole where any sum of it is doubted: units, or, merged, matrices.
    """

    def __init__(self, matrices: Sequence[Matrix], block_cols: int, merged: bool) -> None:
        self.units: list[tuple[int, ...]] = []
        self.jobs: list[tuple[int, ...]] = []
        self.unit_owners: list[int] = []
        self.job_owners: list[int] = []
        self.tile_counts: list[int] = []
        self.strip_counts: list[int] = []
        self.plane = 0
        self.merged = merged
        self.first_row: list[int] = []
        self.first_col: list[int] = []
        self.first_cross: list[int] = []
        self.first_unit: list[int] = []
        self.col_units: list[int] = []
        self.rows = sum(m.rows for m in matrices)
        row_out, col_out, cross_out, tile = 0, self.rows, 0, 0
        for number, m in enumerate(matrices):
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
                head = (col_partial, col_out, m.cols, sum(parts), parts[0], counts[0], m.rows)
                self._add_job(head, column_job[3:], number)
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
                owner = number if merged else len(self.units) - 1
                self.unit_owners.append(owner)
                row_job = (block_cols, tile, PART_ROWS, strips, 1, int(m.col_weight != 0))
                self._add_job((row_partial, row_out, n, strips, strips, m.cols, m.cols), row_job, owner)
                if not merged:
                    tail = (PART_ROWS, tile, *column_job[5:])
                    self._add_job((col_partial, col_out, m.cols, part_count, part_count, n, n), tail, owner)
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

    def _add_job(self, head: tuple[int, ...], tail: tuple[int, ...], owner: int) -> None:
        self.jobs.append(head + tail)
        self.job_owners.append(owner)


@dataclass(frozen=True, slots=True)
class _Group:
    """Matrices of one kind that were launched together.

    members  their numbers in the launch
    tables   of the float32 launch, but for F64, and of the float64 one
    results  float64, flat, on the device: all that will come back (see `marginals`)
    """

    members: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    tables: tuple[_Table, ...]
    results: torch.Tensor

    def marginals(self, values: Float64) -> dict[int, Marginals]:
        """By number, the contract's form of each matrix's sums. values: what `results` holds, on the host."""
        table, (_, _, col_weight, row_weight, _) = self.tables[-1], self.matrices[0].kind
        rows, plane = table.rows, table.merged_plane
        sizes = [2 * plane, 2 * rows * col_weight, 2 * (plane - rows) * row_weight]
        sizes += [2 * sum(each.tile_counts) for each in self.tables]
        parts = iter(np.split(values, np.cumsum([*sizes, 1 + max(table.unit_owners)])))
        sums = next(parts).reshape(2, plane)
        weighted_rows, weighted_cols = next(parts).reshape(2, -1), next(parts).reshape(2, -1)
        stats = [_by_unit(each, next(parts).reshape(-1, 2)) for each in self.tables]
        exact = (next(parts) != 0)[table.unit_owners]
        abs_max, nonfinite = (np.where(exact, each[-1], each[0]) for each in zip(*stats, strict=True))
        cross = next(parts)
        found = {}
        for i, (number, m) in enumerate(zip(self.members, self.matrices, strict=True)):
            counts = tuple(min(m.unit_rows, m.rows - start) for start in range(0, m.rows, m.unit_rows))
            units = slice(table.first_unit[i], table.first_unit[i] + len(counts))
            row = slice(table.first_row[i], table.first_row[i] + m.rows)
            col = slice(table.first_col[i], table.first_col[i] + table.col_units[i] * m.cols)
            beside = slice(col.start - rows, col.stop - rows)
            crossed = None
            if m.cross:
                crossed = cross[table.first_cross[i] :][: len(counts) * m.cols].reshape(len(counts), m.cols)
                crossed = crossed.sum(0, keepdims=True) if table.merged else crossed
            found[number] = Marginals(
                counts=(m.rows,) if table.merged else counts,
                row=_moments(sums[:, row]),
                col=_moments(sums[:, col]),
                weighted_row=_moments(weighted_rows[:, row]) if col_weight else None,
                weighted_col=_moments(weighted_cols[:, beside]) if row_weight else None,
                cross=None if crossed is None else crossed.tobytes(),
                abs_max=float(abs_max[units].max()),
                nonfinite=int(nonfinite[units].sum()),
            )
        return found


@dataclass(frozen=True, slots=True)
class Launched:
    """Chunks whose sums are, or will be, on their device."""

    device: str
    groups: tuple[_Group, ...]


def _by_unit(table: _Table, stats: Float64) -> tuple[Float64, Float64]:
    """Largest |x| and number of non-finite elements of every unit, from those of its tiles."""
    first_tiles = np.cumsum([0, *table.tile_counts[:-1]])
    return np.maximum.reduceat(stats[:, 0], first_tiles), np.add.reduceat(stats[:, 1], first_tiles)


def _moments(planes: Float64) -> Moments:
    return Moments(planes[0].tobytes(), planes[1].tobytes())


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
        """Statistics of all chunks from one launch per kind of matrix, whatever their number."""
        return self.fetch([self.launch(chunks, merged)])[0]

    def launch(self, chunks: Sequence[Chunk], merged: bool = False) -> Launched:
        """Has all chunks reduced on their device, in one launch per kind of matrix, and waits for nothing.

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
        # What is freed here goes to what is put on the stream later.
        _keep, matrices = self._upload(stored, here, device)
        return self._launch_all(matrices, merged, device)

    def fetch(self, launched: Sequence[Launched]) -> list[list[Marginals]]:
        """What launches on one device came to, in one copy, once they are done."""
        import torch

        groups = [group for each in launched for group in each.groups]
        if not groups:
            return [[] for _ in launched]
        with _on(launched[0].device):
            values = torch.cat([group.results for group in groups]).cpu().numpy()
        stops = np.cumsum([len(group.results) for group in groups])
        parts = iter(np.split(values, stops[:-1]))
        found = [{n: m for group in each.groups for n, m in group.marginals(next(parts)).items()} for each in launched]
        return [[each[number] for number in range(len(each))] for each in found]

    def device_bytes(self, chunk: Chunk) -> tuple[int, int]:
        """Device memory beside the chunk's own that its sums take, about: while they are computed; until fetched."""
        planes, units = (4 if chunk.col_weight or chunk.row_weight else 2), -(-chunk.rows // chunk.unit_rows)
        parts, values = units * -(-chunk.unit_rows // PART_ROWS), 2 * (chunk.rows + units * chunk.cols)
        kept = values + 2 * chunk.rows * bool(chunk.col_weight) + 2 * units * chunk.cols * bool(chunk.row_weight)
        kept += units * chunk.cols * chunk.cross
        working = planes * values // 2
        for words, block_cols in ((1, 512), (2, 256)):  # float32 and float64 (see kernel_options)
            strips = -(-chunk.cols // block_cols)
            working += planes * words * (strips * chunk.rows + parts * chunk.cols) // 2 + 8 * parts * strips
            kept += 2 * parts * strips
        return 8 * (working + kept), 8 * kept

    def _upload(
        self, chunks: Sequence[tuple[Chunk, Scales | None]], here: Mapping[int, torch.Tensor], device: str
    ) -> tuple[list[torch.Tensor], list[Matrix]]:
        """All chunks, scales and weights, packed tightly and sent to the device.

        here: by its number, the data of every chunk that is there already, of which only the rest is packed.
        """
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
        sent = _send(pieces, device)

        # In the order in which they were packed: each chunk's elements, then its scales, then its weight.
        addresses = iter(each.data_ptr() for each in sent)
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
        return sent, matrices

    def reduce(self, matrices: Sequence[Matrix], merged: bool = False, device: str | None = None) -> list[Marginals]:
        """Statistics of matrices in the memory of one device, this back end's own where none is named.

        Raises EncodingError for a dtype there is no kernel for."""
        return self.fetch([self._launch_all(matrices, merged, device or self.device)])[0]

    def _launch_all(self, matrices: Sequence[Matrix], merged: bool, device: str) -> Launched:
        kinds: dict[tuple[str, bool, bool, bool, bool], list[int]] = {}
        with _on(device):
            for index, m in enumerate(matrices):
                self._check(m)
                kinds.setdefault(m.kind, []).append(index)
            groups = [self._launch_group(of_kind, matrices, merged, device) for of_kind in kinds.values()]
        return Launched(device, tuple(groups))

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

    def _launch_group(self, members: Sequence[int], matrices: Sequence[Matrix], merged: bool, device: str) -> _Group:
        """Launches of matrices of one kind: in float32, but for F64, and in float64 where that will not do."""
        import torch

        group = tuple(matrices[i] for i in members)
        dtype, _, col_weight, row_weight, _ = kind = group[0].kind
        stages = (True,) if dtype == "F64" else (False, True)
        tables = [_Table(group, kernel_options(*kind, exact=exact)["block_cols"], merged) for exact in stages]
        rows, owners = tables[0].rows, 1 + max(tables[0].unit_owners)
        planes = 4 if col_weight or row_weight else 2
        sums = torch.empty((planes, tables[0].merged_plane), dtype=torch.float64, device=device)
        crossed = tables[0].cross_size if any(m.cross for m in group) else 0
        cross = torch.empty(crossed, dtype=torch.float64, device=device)
        stats = []
        wanted = doubted = torch.ones(owners, dtype=torch.int32, device=device)
        for exact, table in zip(stages, tables, strict=True):
            wanted = doubted
            tile_stats, doubted = self._launch_stage(group, table, exact, wanted, sums, cross)
            stats.append(tile_stats[:, 1:3])
        results = [sums[:2]]
        results += [sums[2:, :rows]] if col_weight else [sums[2:, rows:]] if row_weight else []
        results += [*stats, wanted, cross]
        flat = torch.cat([each.reshape(-1).to(torch.float64) for each in results])
        return _Group(tuple(members), group, tuple(tables), flat)

    def _launch_stage(
        self,
        group: Sequence[Matrix],
        table: _Table,
        exact: bool,
        wanted: torch.Tensor,
        sums: torch.Tensor,
        cross: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One launch of each kernel over the wanted owners. Fills sums and cross in; returns statistics of tiles, and
        which owners are doubted (int32)."""
        import torch

        kernels, device = _kernels(), sums.device
        by_bits = group[0].dtype == "F8_E4M3" and not self.converts_e4m3
        options = kernel_options(*group[0].kind, exact=exact, by_bits=by_bits)
        tiles = _pairs(table.tile_counts)
        blocks = _pairs([-(-job[2] // MERGE_BLOCK) for job in table.jobs])
        strips = _pairs(table.strip_counts)
        strips = strips[
            np.repeat([m.cross for m in group], np.diff([*table.first_unit, len(table.units)]))[strips[:, 0]]
        ]
        of_units, of_jobs = np.array(table.unit_owners), np.array(table.job_owners)
        owners = of_units[tiles[:, 0]], of_jobs[blocks[:, 0]], of_units[strips[:, 0]]
        tables = np.array(table.units, np.int64), np.array(table.jobs, np.int64), tiles, blocks, strips
        sent = _send([*tables, *owners], str(device))
        units, jobs, tile_table, block_table, strip_table, *owner_tables = sent
        wanted_tiles, wanted_blocks, wanted_strips = (wanted[each] for each in owner_tables)

        acc = torch.float64 if exact else torch.float32
        partials = torch.empty(len(sums) * table.plane, dtype=acc, device=device)
        tile_stats = torch.zeros((len(tiles), 4), dtype=acc, device=device)
        doubts = torch.zeros(len(blocks), dtype=torch.int32, device=device)
        arguments = units, tile_table, partials, tile_stats
        if exact:
            self._launch(kernels.exact_tiles, len(tiles), *arguments, wanted_tiles, table.plane, **options)
        else:
            self._launch(kernels.marginal_tiles, len(tiles), *arguments, table.plane, **options)
        self._launch(
            kernels.merge_partials,
            len(blocks),
            jobs,
            block_table,
            partials,
            tile_stats,
            sums,
            doubts,
            wanted_blocks,
            table.plane,
            table.merged_plane,
            largest_finite=LARGEST_FINITE["F32" if group[0].scale else group[0].dtype],
            exact=exact,
            block_entries=MERGE_BLOCK,
        )
        if len(strips):
            means = sums[2 if group[0].col_weight else 0]
            names = ("element", "pointee", "block_rows", "block_cols", "lane_elements", "scaled")
            chosen = {name: options[name] for name in names}
            crossing = units, strip_table, means, cross, wanted_strips
            self._launch(kernels.cross_products, len(strips), *crossing, **chosen)
        doubted = torch.zeros_like(wanted).scatter_reduce_(0, owner_tables[1], doubts, "amax")
        return tile_stats, doubted

    def _launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        """One launch. NumPy, which computes for the interpreter, would warn where a GPU silently gives NaN."""
        if not self.interpreted:
            kernel[(programs,)](*arguments, **constants, **LAUNCH_OPTIONS)
            return
        with _INTERPRETER, np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            kernel[(programs,)](*arguments, **constants, **LAUNCH_OPTIONS)


def _on(device: str) -> AbstractContextManager[object]:
    """Where what follows is launched."""
    import torch

    return torch.cuda.device(device) if device.startswith("cuda") else nullcontext()


def _send(arrays: Sequence[NDArray[Any]], device: str) -> list[torch.Tensor]:
    """Arrays on the device, each on 256 bytes, in C order: packed together and copied at once, which nobody waits for.

    Pinned memory that a copy is still reading is not handed out again by torch, though we let go of it.
    """
    import torch

    starts = np.cumsum([0] + [-(-array.nbytes // 256) * 256 for array in arrays]).tolist()
    staging = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.startswith("cuda"))
    host = staging.numpy()
    for start, array in zip(starts, arrays, strict=False):
        host[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    buffer = staging.to(device, non_blocking=True)
    return [
        buffer[start : start + array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


BACKEND = TritonGpu()
