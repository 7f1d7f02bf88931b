"""The Triton kernels of `triton_gpu`, and nothing else: importing this file imports Triton.

Four kernels, each launched once for many units of many tensors:

    marginal_tiles   stored elements -> per tile: shifted float32 sums of every row and column  (all the traffic)
    exact_tiles      the same for the few units where float32 will not do: float64, centred
    merge_partials   the sums of the tiles of a row, or of a column, -> mean and M2              (a few % of it)
    cross_products   stored elements and row means -> sum_i m_i x_ij per column                  (LayerNorm models only)

A tile is part_rows x block_cols elements of one unit and belongs to one warp, so that no reduction needs shared memory
or a barrier: columns add up inside a thread, rows across the lanes of the warp. Tiles write their sums side by side and
are merged in a fixed order; there are no atomics, hence the same bits on every run.

Only builtins of triton.language are used, none of its library functions written in Triton (tl.sum, tl.cdiv), so that
the file can be loaded interpreted and compiled in one process, whichever way Triton itself was imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

jit: Callable[[Callable[..., Any]], Any] = triton.jit

UNIT_FIELDS = tl.constexpr(15)
"""int64 fields of a unit: address, rows, cols, row stride (elements), weight address, offset of its row partials,
offset of its column partials, its first output row, its first output column; and, of scaled ones, the address of the
first row's scales, entries from one row of scales to the next, 2^ROW_SHIFT over the rows that share an entry (rounded
up; 0 where all do), rows of the first entry that come before the unit, and the same two of columns: columns that share
an entry, columns of the first entry that come before the unit."""
ROW_SHIFT = tl.constexpr(42)
"""A row's entry is (row * reciprocal) >> ROW_SHIFT: three instructions for a division's twenty, and exact up to 2^21
rows. Source: Granlund & Montgomery 1994, theorem 4.2."""
JOB_FIELDS = tl.constexpr(13)
"""int64 fields of a merge: see merge_partials."""
TILE_FIELDS = tl.constexpr(4)
"""Statistics of a tile: shift, largest |x|, non-finite elements, mean weight."""

SHIFT_RATIO = tl.constexpr(2.0)
"""Sum of shifted squares over M2, 1 + (mean of the shifted elements / std)^2, above which float32 sums are not trusted.
The largest error of a std among some hundreds was 1e-7 at 1, 5e-7 at 2, 1e-6 at 3, 3e-6 at 10."""
SMALLEST_SQUARE = tl.constexpr(2.0**-100)
LARGEST_FLOAT32 = tl.constexpr(3.4028234663852886e38)
E4M3_LIFT = tl.constexpr(2.0**120)
"""Between an e4m3 and the float32 with its sign, exponent and mantissa: their biases are 7 and 127."""

_sum = tl.standard._sum_combine
_max = tl.standard._elementwise_max


@jit
def _levels(stored: tl.tensor, element: tl.constexpr, acc: tl.constexpr, exact: tl.constexpr) -> tl.tensor:
    """Stored elements, without their scale, as acc. Those of 8 bits arrive as uint8.

    element uint8 is e4m3 where the GPU cannot convert it: its exponent and mantissa, moved to float32's, are the number
    over 2^120. exact decodes NaN by its bits; without, e4m3's may be 480 (by its bits, and by the interpreter) and
    e5m2's infinity 65536 (by the interpreter), which is enough for the fast kernel to notice.
    """
    if stored.dtype == tl.uint8:
        if element == tl.int8:
            decoded = stored.to(tl.int8, bitcast=True).to(tl.float32)
        elif element == tl.uint8:
            placed = (stored.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
            decoded = placed.to(tl.float32, bitcast=True) * E4M3_LIFT
        else:
            decoded = stored.to(element, bitcast=True).to(tl.float32)
        if exact:
            if element == tl.float8e5:
                decoded = tl.where((stored & 0x7C) == 0x7C, float("nan"), decoded)
            elif element != tl.int8:
                decoded = tl.where((stored & 0x7F) == 0x7F, float("nan"), decoded)
    else:
        decoded = stored
    return decoded.to(acc)


@jit
def _scale_table(
    unit: tl.tensor, strip: tl.tensor, cols: tl.tensor, block_cols: tl.constexpr, lane_elements: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A strip's scales in the unit's first row of scales, one to lane_elements columns: their addresses, which exist;
    and how to come from there to a row's: entries from one row of scales to the next, reciprocal, rows before."""
    first = strip * block_cols + tl.arange(0, block_cols // lane_elements) * lane_elements
    entry = (first + tl.load(unit + 14)) // tl.load(unit + 13)
    columns = tl.load(unit + 9).to(tl.pointer_type(tl.float32)) + entry
    return columns, first < cols, tl.load(unit + 10).to(tl.int32), tl.load(unit + 11), tl.load(unit + 12)


@jit
def _scales(
    columns: tl.tensor,
    col_ok: tl.tensor,
    pitch: tl.tensor,
    reciprocal: tl.tensor,
    before: tl.tensor,
    start: tl.tensor,
    row_ok: tl.tensor,
    block_rows: tl.constexpr,
) -> tl.tensor:
    """float32[rows, columns / lane_elements]: the scales of a block of rows, 0 outside."""
    steps = tl.arange(0, block_rows) * reciprocal
    entry = ((start + before) * reciprocal + steps) >> ROW_SHIFT
    offset = entry.to(tl.int32) * pitch
    return tl.load(columns[None, :] + offset[:, None], mask=row_ok[:, None] & col_ok[None, :], other=0.0)


@jit
def _times(x: tl.tensor, scale: tl.tensor, lane_elements: tl.constexpr) -> tl.tensor:
    """Elements [rows, columns] times scales [rows, columns / lane_elements]."""
    grouped = tl.reshape(x, [scale.shape[0], scale.shape[1], lane_elements])
    return tl.reshape(grouped * scale[:, :, None], x.shape)


@jit
def _fold_columns(
    x: tl.tensor, ok: tl.tensor, rows_here: tl.tensor, count: tl.tensor, mean: tl.tensor, m2: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Running column means and M2 (float64) with one more block of rows: two passes in it, then Chan's merging."""
    here = tl.reduce(tl.where(ok, x, 0.0), 0, _sum) / rows_here
    deviation = tl.where(ok, x - here[None, :], 0.0)
    delta = here - mean
    share = rows_here / (count + rows_here)
    m2 += tl.reduce(deviation * deviation, 0, _sum) + delta * delta * (count * share)
    return mean + delta * share, m2


@jit
def _store_rows(
    sums: tl.tensor, plane: tl.tensor, row_ok: tl.tensor, x: tl.tensor, ok: tl.tensor, cols_here: tl.tensor
) -> None:
    """Row means and M2 (float64) of a block, in two passes over its registers."""
    mean = tl.reduce(tl.where(ok, x, 0.0), 1, _sum) / cols_here
    deviation = tl.where(ok, x - mean[:, None], 0.0)
    tl.store(sums, mean, mask=row_ok)
    tl.store(sums + plane, tl.reduce(deviation * deviation, 1, _sum), mask=row_ok)


@jit
def marginal_tiles(
    units: tl.tensor,
    tiles: tl.tensor,
    partials: tl.tensor,
    tile_stats: tl.tensor,
    plane: tl.tensor,
    element: tl.constexpr,
    pointee: tl.constexpr,
    part_rows: tl.constexpr,
    fold_rows: tl.constexpr,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
    lane_elements: tl.constexpr,
    largest_level: tl.constexpr,
    scaled: tl.constexpr,
    col_weight: tl.constexpr,
    row_weight: tl.constexpr,
) -> None:
    """Shifted float32 sums along both axes of a tile, in one pass over it.

    With x the stored elements, s the tile's shift (the mean of its first row, rounded to a stored value), d = x - s:
        rows     A_i = sum_j d_ij    B_i = sum_j d_ij^2
        columns  A_j = sum_i d_ij    B_j = sum_i d_ij^2
    and for the matrix weighted by w (per column, or per row), with mean weight v:
        e = w d + (w - v) s          which is w x - v s, and keeps its digits where |mean| >> std
        rows (col_weight) or columns (row_weight)  sum e, sum e^2

    units     int64[units, UNIT_FIELDS]; addresses are absolute, so one launch serves any number of allocations
    tiles     int32[tiles, 2]: unit, index inside the unit (row part major, strip of columns minor)
    partials  float32[2 or 4, plane]: A, B, sum e, sum e^2; rows as [strip, row], columns as [part, column]
    fold_rows      rows that columns add up before they join the tile's sum: with 128 float32 additions in a row a
                   column's std was off by 1.4e-6, with levels of 16 and 8 it is a quarter of that
    lane_elements  elements in 16 bytes, where address, row stride and width allow such loads, and as many columns share
                   a scale; 1 where not
    largest_level  of the stored type: a larger one is what a conversion makes of a NaN or an infinity
    scaled         x is a level, an element of 8 bits, times the scale of its block, rounded to float32
    Elements that are not finite are neither counted nor skipped: they turn sums non-finite (or, where an 8-bit NaN is
    not decoded as one, the largest |x| impossible), and exact_tiles does the unit again.

    Traffic: each stored byte once, 16 bytes a load and lane; writes 8 bytes (weighted 16) per row and block_cols
    elements and per column and part_rows elements: 2 to 3 % of the bytes read for bf16.
    Source: shifted data algorithm, Chan, Golub & LeVeque 1983, section 3. Checked against kernels.reference, rtol 1e-6.
    """
    plane = plane.to(tl.int64)
    tile = tl.program_id(0).to(tl.int64)
    unit = units + tl.load(tiles + 2 * tile).to(tl.int64) * UNIT_FIELDS
    local = tl.load(tiles + 2 * tile + 1).to(tl.int64)
    rows = tl.load(unit + 1)
    cols = tl.multiple_of(tl.load(unit + 2), lane_elements)
    stride = tl.multiple_of(tl.load(unit + 3), lane_elements)
    base = tl.load(unit).to(tl.pointer_type(pointee))
    if lane_elements > 1:
        base = tl.multiple_of(base, 16)
    weights = tl.load(unit + 4).to(tl.pointer_type(tl.float32))
    strips = (cols + block_cols - 1) // block_cols
    part = local // strips
    strip = local % strips
    first_row = part * part_rows
    stop_row = tl.minimum(first_row + part_rows, rows)
    row_sums = partials + tl.load(unit + 5) + strip * rows
    col_sums = partials + tl.load(unit + 6) + part * cols

    col = strip * block_cols + tl.arange(0, block_cols)
    col_ok = col < cols

    if scaled:
        columns, scale_ok, pitch, reciprocal, before = _scale_table(unit, strip, cols, block_cols, lane_elements)
    if pointee == tl.uint8:
        # An 8-bit float cannot have a mean that exceeds its std by much and still vary: no shift needed. Levels of one
        # sign under scales that vary can; they are left to exact_tiles.
        shift_stored = tl.full([], 0, tl.uint8)
        shift = tl.full([], 0.0, tl.float32)
    else:
        first = tl.load(base + first_row * stride + col, mask=col_ok, other=0.0).to(tl.float32)
        usable = col_ok & (first - first == 0.0)
        usable_count = tl.reduce(usable.to(tl.int32), 0, _sum)
        mean = tl.reduce(tl.where(usable, first, 0.0), 0, _sum) / tl.maximum(usable_count, 1).to(tl.float32)
        # Between the extremes, so that filling up with it never adds to the largest |x|, and a constant stays exact.
        highest = tl.reduce(tl.where(usable, first, float("-inf")), 0, _max)
        lowest = -tl.reduce(tl.where(usable, -first, float("-inf")), 0, _max)
        mean = tl.where(usable_count > 0, tl.minimum(tl.maximum(mean, lowest), highest), 0.0)
        shift_stored = mean.to(element)
        shift = shift_stored.to(tl.float32)

    weight_mean = tl.full([], 0.0, tl.float32)
    if col_weight:
        weight = tl.load(weights + col, mask=col_ok, other=0.0)
        weight_mean = tl.reduce(weight, 0, _sum) / tl.minimum(cols - strip * block_cols, block_cols).to(tl.float32)
        offset = tl.where(col_ok, (weight - weight_mean) * shift, 0.0)
    if row_weight:
        part_row = first_row + tl.arange(0, part_rows)
        part_weight = tl.load(weights + part_row, mask=part_row < stop_row, other=0.0)
        weight_mean = tl.reduce(part_weight, 0, _sum) / (stop_row - first_row).to(tl.float32)
        weighted_sum = tl.full([block_cols], 0.0, tl.float32)
        weighted_square = tl.full([block_cols], 0.0, tl.float32)

    col_sum = tl.full([block_cols], 0.0, tl.float32)
    col_square = tl.full([block_cols], 0.0, tl.float32)
    largest = tl.full([block_cols // lane_elements if scaled else block_cols], 0.0, tl.float32)
    if scaled:
        level = largest
    for fold in range(first_row, stop_row, fold_rows):
        fold_sum = tl.full([block_cols], 0.0, tl.float32)
        fold_square = tl.full([block_cols], 0.0, tl.float32)
        if row_weight:
            fold_weighted_sum = tl.full([block_cols], 0.0, tl.float32)
            fold_weighted_square = tl.full([block_cols], 0.0, tl.float32)
        for start in range(fold, tl.minimum(fold + fold_rows, stop_row), block_rows):
            row = start + tl.arange(0, block_rows)
            row_ok = row < stop_row
            # What lies outside is filled up with the shift, so that d, and e, are zero there.
            stored = tl.load(
                base + (row * stride)[:, None] + col[None, :],
                mask=row_ok[:, None] & col_ok[None, :],
                other=shift_stored,
            )
            x = _levels(stored, element, tl.float32, False)
            if scaled:
                scale = _scales(columns, scale_ok, pitch, reciprocal, before, start, row_ok, block_rows)
                top = tl.reduce(
                    tl.abs(tl.reshape(x, [block_rows, block_cols // lane_elements, lane_elements])), 2, _max
                )
                level = tl.maximum(level, tl.reduce(top, 0, _max))
                largest = tl.maximum(largest, tl.reduce(top * tl.abs(scale), 0, _max))
                x = _times(x, scale, lane_elements)
            else:
                largest = tl.maximum(largest, tl.reduce(tl.abs(x), 0, _max))
            d = x - shift
            square = d * d
            fold_sum += tl.reduce(d, 0, _sum)
            fold_square += tl.reduce(square, 0, _sum)
            tl.store(row_sums + row, tl.reduce(d, 1, _sum), mask=row_ok)
            tl.store(row_sums + plane + row, tl.reduce(square, 1, _sum), mask=row_ok)
            if col_weight:
                e = tl.fma(d, tl.broadcast_to(weight[None, :], d.shape), tl.broadcast_to(offset[None, :], d.shape))
                tl.store(row_sums + 2 * plane + row, tl.reduce(e, 1, _sum), mask=row_ok)
                tl.store(row_sums + 3 * plane + row, tl.reduce(e * e, 1, _sum), mask=row_ok)
            if row_weight:
                gain = tl.load(weights + row, mask=row_ok, other=0.0)
                rise = tl.where(row_ok, (gain - weight_mean) * shift, 0.0)
                e = tl.fma(d, tl.broadcast_to(gain[:, None], d.shape), tl.broadcast_to(rise[:, None], d.shape))
                fold_weighted_sum += tl.reduce(e, 0, _sum)
                fold_weighted_square += tl.reduce(e * e, 0, _sum)
        col_sum += fold_sum
        col_square += fold_square
        if row_weight:
            weighted_sum += fold_weighted_sum
            weighted_square += fold_weighted_square

    tl.store(col_sums + col, col_sum, mask=col_ok)
    tl.store(col_sums + plane + col, col_square, mask=col_ok)
    if row_weight:
        tl.store(col_sums + 2 * plane + col, weighted_sum, mask=col_ok)
        tl.store(col_sums + 3 * plane + col, weighted_square, mask=col_ok)
    if scaled:
        largest = tl.where(level <= largest_level, largest, float("inf"))
    stats = tile_stats + tile * TILE_FIELDS
    tl.store(stats, shift)
    tl.store(stats + 1, tl.reduce(largest, 0, _max))
    tl.store(stats + 2, 0.0)
    tl.store(stats + 3, weight_mean)


@jit
def exact_tiles(
    units: tl.tensor,
    tiles: tl.tensor,
    partials: tl.tensor,
    tile_stats: tl.tensor,
    wanted: tl.tensor,
    plane: tl.tensor,
    element: tl.constexpr,
    pointee: tl.constexpr,
    part_rows: tl.constexpr,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
    lane_elements: tl.constexpr,
    scaled: tl.constexpr,
    col_weight: tl.constexpr,
    row_weight: tl.constexpr,
) -> None:
    """Means and M2 along both axes of a tile in float64, centred before they are squared; for F64 and for doubts.

    Tables as in marginal_tiles; partials float64[2 or 4, plane]: mean, M2, weighted mean, weighted M2. Elements that
    are not finite are counted and left out of the largest |x|. wanted: int32, one per program; 0 ends it at once.
    Traffic as there, arithmetic several times as much.
    Source: two passes over the registers of a block; blocks of rows fold by Chan, Golub & LeVeque 1979. Checked
    against kernels.reference, rtol 1e-6 (1e-12 is usual).
    """
    if tl.load(wanted + tl.program_id(0)) == 0:
        return
    plane = plane.to(tl.int64)
    tile = tl.program_id(0).to(tl.int64)
    unit = units + tl.load(tiles + 2 * tile).to(tl.int64) * UNIT_FIELDS
    local = tl.load(tiles + 2 * tile + 1).to(tl.int64)
    rows = tl.load(unit + 1)
    cols = tl.multiple_of(tl.load(unit + 2), lane_elements)
    stride = tl.multiple_of(tl.load(unit + 3), lane_elements)
    base = tl.load(unit).to(tl.pointer_type(pointee))
    if lane_elements > 1:
        base = tl.multiple_of(base, 16)
    weights = tl.load(unit + 4).to(tl.pointer_type(tl.float32))
    strips = (cols + block_cols - 1) // block_cols
    part = local // strips
    strip = local % strips
    first_row = part * part_rows
    stop_row = tl.minimum(first_row + part_rows, rows)
    row_sums = partials + tl.load(unit + 5) + strip * rows
    col_sums = partials + tl.load(unit + 6) + part * cols

    col = strip * block_cols + tl.arange(0, block_cols)
    col_ok = col < cols
    cols_here = tl.minimum(cols - strip * block_cols, block_cols).to(tl.float64)
    if scaled:
        columns, scale_ok, pitch, reciprocal, before = _scale_table(unit, strip, cols, block_cols, lane_elements)
    if col_weight:
        weight = tl.load(weights + col, mask=col_ok, other=0.0).to(tl.float64)

    mean = tl.full([block_cols], 0.0, tl.float64)
    m2 = tl.full([block_cols], 0.0, tl.float64)
    weighted_mean = tl.full([block_cols], 0.0, tl.float64)
    weighted_m2 = tl.full([block_cols], 0.0, tl.float64)
    largest = tl.full([block_cols], 0.0, tl.float64)
    nonfinite = tl.full([block_cols], 0, tl.int32)
    for start in range(first_row, stop_row, block_rows):
        row = start + tl.arange(0, block_rows)
        row_ok = row < stop_row
        ok = row_ok[:, None] & col_ok[None, :]
        stored = tl.load(base + (row * stride)[:, None] + col[None, :], mask=ok, other=0)
        x = _levels(stored, element, tl.float64, True)
        if scaled:
            x = _times(
                x,
                _scales(columns, scale_ok, pitch, reciprocal, before, start, row_ok, block_rows).to(tl.float64),
                lane_elements,
            )
        finite = x - x == 0.0
        nonfinite += tl.reduce(tl.where(finite, 0, 1), 0, _sum)
        largest = tl.maximum(largest, tl.reduce(tl.where(finite, tl.abs(x), 0.0), 0, _max))
        count = (start - first_row).to(tl.float64)
        rows_here = tl.minimum(stop_row - start, block_rows).to(tl.float64)
        _store_rows(row_sums + row, plane, row_ok, x, ok, cols_here)
        mean, m2 = _fold_columns(x, ok, rows_here, count, mean, m2)
        if col_weight:
            _store_rows(row_sums + 2 * plane + row, plane, row_ok, x * weight[None, :], ok, cols_here)
        if row_weight:
            gain = tl.load(weights + row, mask=row_ok, other=0.0).to(tl.float64)
            weighted_mean, weighted_m2 = _fold_columns(
                x * gain[:, None], ok, rows_here, count, weighted_mean, weighted_m2
            )

    tl.store(col_sums + col, mean, mask=col_ok)
    tl.store(col_sums + plane + col, m2, mask=col_ok)
    if row_weight:
        tl.store(col_sums + 2 * plane + col, weighted_mean, mask=col_ok)
        tl.store(col_sums + 3 * plane + col, weighted_m2, mask=col_ok)
    stats = tile_stats + tile * TILE_FIELDS
    tl.store(stats, 0.0)
    tl.store(stats + 1, tl.reduce(largest, 0, _max))
    tl.store(stats + 2, tl.reduce(nonfinite, 0, _sum).to(tl.float64))
    tl.store(stats + 3, 0.0)


@jit
def _merge(
    partials: tl.tensor,
    tile_stats: tl.tensor,
    merged: tl.tensor,
    plane: tl.tensor,
    merged_plane: tl.tensor,
    job: tl.tensor,
    block: tl.tensor,
    largest_finite: tl.constexpr,
    exact: tl.constexpr,
    weighted: tl.constexpr,
    block_entries: tl.constexpr,
) -> tl.tensor:
    """One pair of planes of one block of a merge: mean and M2, and whether any is not to be trusted (int32 0 or 1)."""
    entries = tl.load(job + 2)
    parts = tl.load(job + 3)
    parts_per_unit = tl.load(job + 4)
    unit_length = tl.load(job + 5)
    total = tl.load(job + 6)
    part_length = tl.load(job + 7)
    entry = block * block_entries + tl.arange(0, block_entries)
    ok = entry < entries
    sums = partials + tl.load(job) + entry
    tile = tl.load(job + 8) + entry // tl.load(job + 9) * tl.load(job + 10)
    tile_step = tl.load(job + 11)

    mean = tl.full([block_entries], 0.0, tl.float64)
    m2 = tl.full([block_entries], 0.0, tl.float64)
    shifted = tl.full([block_entries], 0.0, tl.float64)
    largest = tl.full([block_entries], 0.0, tl.float64)
    count = tl.full([block_entries], 0.0, tl.float64)
    for p in range(parts):
        before = p % parts_per_unit * part_length
        here = tl.minimum(part_length, unit_length - before)
        n = tl.minimum(here, total - p // parts_per_unit * unit_length - before).to(tl.float64)
        n = tl.broadcast_to(n, [block_entries])
        stats = tile_stats + (tile + p * tile_step) * TILE_FIELDS
        centre = tl.load(stats, mask=ok, other=0.0).to(tl.float64)
        if weighted:
            centre = centre * tl.load(stats + 3, mask=ok, other=0.0).to(tl.float64)
        a = tl.load(sums + p * entries, mask=ok, other=0.0).to(tl.float64)
        b = tl.load(sums + plane + p * entries, mask=ok, other=0.0).to(tl.float64)
        if exact:
            part_mean = a
            part_m2 = b
        else:
            part_mean = centre + a / n
            part_m2 = b - a * (a / n)
            part_m2 = tl.where((part_m2 < 0.0) | ((n == 1.0) & (b <= LARGEST_FLOAT32)), 0.0, part_m2)
        delta = part_mean - mean
        share = n / (count + n)
        mean = mean + delta * share
        m2 = m2 + part_m2 + delta * delta * (count * share)
        count = count + n
        shifted = shifted + b
        largest = tl.maximum(largest, tl.load(stats + 1, mask=ok, other=0.0).to(tl.float64))

    trusted = (shifted <= m2 * SHIFT_RATIO) & (shifted >= count * SMALLEST_SQUARE) & (shifted <= LARGEST_FLOAT32)
    trusted = trusted | ((largest == 0.0) & (shifted == 0.0)) | ((count == 1.0) & (shifted <= LARGEST_FLOAT32))
    trusted = trusted & (largest <= largest_finite)
    finite = (mean - mean == 0.0) & (m2 - m2 == 0.0)
    out = merged + tl.load(job + 1) + entry
    tl.store(out, tl.where(finite, mean, float("nan")), mask=ok)
    tl.store(out + merged_plane, tl.where(finite, m2, float("nan")), mask=ok)
    return tl.where(ok & (trusted == 0), 1, 0)


@jit
def merge_partials(
    jobs: tl.tensor,
    blocks: tl.tensor,
    partials: tl.tensor,
    tile_stats: tl.tensor,
    merged: tl.tensor,
    doubts: tl.tensor,
    wanted: tl.tensor,
    plane: tl.tensor,
    merged_plane: tl.tensor,
    largest_finite: tl.constexpr,
    exact: tl.constexpr,
    block_entries: tl.constexpr,
) -> None:
    """Means and M2 of all rows and all columns from the sums of their tiles, in float64 and in tile order.

    Of n elements with shift c: mean = c + A/n, M2 = B - A^2/n; parts fold left to right (Chan, Golub & LeVeque 1979):
        delta = mean_p - mean;  mean += delta n_p/(n + n_p);  M2 += M2_p + delta^2 n n_p/(n + n_p)

    jobs    int64[jobs, JOB_FIELDS]: offset in `partials`, offset in `merged`, entries (rows or columns), parts,
            parts per unit, elements per unit, elements in all, elements per part, first tile, entries per tile,
            tiles from one run of entries to the next, tiles from one part to the next, weighted (0 or 1)
    blocks  int32[blocks, 2]: job, block of block_entries entries
    merged  float64[2 or 4, merged_plane]: mean, M2, weighted mean, weighted M2; NaN where not finite
    doubts  int32[blocks]: 1 where the float32 sums of an entry cannot give 1e-6 (large shift left over, magnitudes
            near either end of float32, non-finite); the unit is then reduced again by exact_tiles
    wanted  as in exact_tiles: sums of units that were not doubted stay what they are
    largest_finite the stored type's largest finite value
    exact   partials are those of exact_tiles: means and M2 already
    Traffic: reads each partial once. Checked against kernels.reference, rtol 1e-6.
    """
    if tl.load(wanted + tl.program_id(0)) == 0:
        return
    plane = plane.to(tl.int64)
    merged_plane = merged_plane.to(tl.int64)
    program = tl.program_id(0).to(tl.int64)
    job = jobs + tl.load(blocks + 2 * program).to(tl.int64) * JOB_FIELDS
    block = tl.load(blocks + 2 * program + 1).to(tl.int64)
    doubt = _merge(
        partials, tile_stats, merged, plane, merged_plane, job, block, largest_finite, exact, False, block_entries
    )
    if tl.load(job + 12) != 0:
        partials += 2 * plane
        merged += 2 * merged_plane
        doubt += _merge(
            partials, tile_stats, merged, plane, merged_plane, job, block, largest_finite, exact, True, block_entries
        )
    tl.store(doubts + program, tl.reduce(doubt, 0, _max))


@jit
def cross_products(
    units: tl.tensor,
    tiles: tl.tensor,
    row_means: tl.tensor,
    cross: tl.tensor,
    wanted: tl.tensor,
    element: tl.constexpr,
    pointee: tl.constexpr,
    block_rows: tl.constexpr,
    block_cols: tl.constexpr,
    lane_elements: tl.constexpr,
    scaled: tl.constexpr,
) -> None:
    """cross_j = sum over the unit's rows i of m_i x_ij, in float64; m are the (weighted) row means just merged.

    units, tiles as in marginal_tiles, a tile being a strip of block_cols columns of a whole unit; wanted as in
    exact_tiles. Traffic: reads each stored byte a second time, from device memory. Checked against kernels.reference.
    """
    if tl.load(wanted + tl.program_id(0)) == 0:
        return
    tile = tl.program_id(0).to(tl.int64)
    unit = units + tl.load(tiles + 2 * tile).to(tl.int64) * UNIT_FIELDS
    strip = tl.load(tiles + 2 * tile + 1).to(tl.int64)
    rows = tl.load(unit + 1)
    cols = tl.multiple_of(tl.load(unit + 2), lane_elements)
    stride = tl.multiple_of(tl.load(unit + 3), lane_elements)
    base = tl.load(unit).to(tl.pointer_type(pointee))
    if lane_elements > 1:
        base = tl.multiple_of(base, 16)
    means = row_means + tl.load(unit + 7)
    col = strip * block_cols + tl.arange(0, block_cols)
    col_ok = col < cols
    if scaled:
        columns, scale_ok, pitch, reciprocal, before = _scale_table(unit, strip, cols, block_cols, lane_elements)
    total = tl.full([block_cols], 0.0, tl.float64)
    for start in range(0, rows, block_rows):
        row = start + tl.arange(0, block_rows)
        row_ok = row < rows
        ok = row_ok[:, None] & col_ok[None, :]
        stored = tl.load(base + (row * stride)[:, None] + col[None, :], mask=ok, other=0)
        mean = tl.load(means + row, mask=row_ok, other=0.0)
        x = _levels(stored, element, tl.float64, True)
        if scaled:
            x = _times(
                x,
                _scales(columns, scale_ok, pitch, reciprocal, before, start, row_ok, block_rows).to(tl.float64),
                lane_elements,
            )
        total += tl.reduce(x * mean[:, None], 0, _sum)
    finite = total - total == 0.0
    tl.store(cross + tl.load(unit + 8) + col, tl.where(finite, total, float("nan")), mask=col_ok)
