"""From marginals to what is kept of a projection: mean, σ, σ of its heads, its profile along the residual stream."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmfp.architecture import Projection
from llmfp.kernels import Backend
from llmfp.marginals import Buffer, Marginals, Moments
from llmfp.sample import Blocks, interval


@dataclass(frozen=True, slots=True)
class Statistics:
    """What is kept of one projection. mean and std are NaN when a value is not finite.

    head_std  float64[heads], population std of each head's weights; None when the head size is unknown
    residual  float16[hidden], log RMS of the effective weights along each residual coordinate; None for what neither
              reads nor writes the residual stream: inner factors of latent attention, biases, gains
    interval  in which σ of all elements lies with 95 % confidence, where `count` is a sample of them; None where it is
              all of them. A sample has neither head_std nor residual
    """

    count: int
    mean: float
    std: float
    abs_max: float
    nonfinite: int
    head_std: Buffer | None = None
    residual: Buffer | None = None
    interval: tuple[float, float] | None = None

    @property
    def unusable(self) -> str | None:
        """What the weights hold that leaves them without a finite std; None where it is finite."""
        if math.isfinite(self.std):
            return None
        return f"{self.nonfinite} non-finite values" if self.nonfinite else "too large values"


def of_all(backend: Backend, marginals: Marginals, cols: int) -> Statistics:
    """Of all elements together, whose stored rows have `cols` columns."""
    count = sum(marginals.counts) * cols
    total = backend.pool(marginals.row, cols, sum(marginals.counts))
    return Statistics(
        count=count,
        mean=doubles(total.mean)[0],
        std=math.sqrt(doubles(total.m2)[0] / count),
        abs_max=marginals.abs_max,
        nonfinite=marginals.nonfinite,
    )


def of_sample(backend: Backend, projection: Projection, marginals: Marginals, blocks: Blocks | None) -> Statistics:
    """What the rows of a sample say of all rows. blocks: None where the sample is all of them."""
    cols = projection.view.all_cols
    found = of_all(backend, marginals, cols)
    if blocks is None:
        return found
    each = backend.pool(marginals.row, cols, blocks.rows)
    around = interval(doubles(each.mean), doubles(each.m2), blocks.rows * cols, blocks.share)
    return replace(found, interval=around)


def of_projection(
    backend: Backend, projection: Projection, marginals: Marginals, second: Marginals | None, gain: Buffer | None
) -> Statistics:
    """All there is. second: marginals of the second read, where there was one; gain: float32, of the norm in front."""
    rows, cols = sum(marginals.counts), projection.view.all_cols
    by_rows = projection.residual_is_stored_rows
    along, count = (marginals.row, cols) if by_rows else (marginals.col, rows)
    across, heads_count, heads_size = (marginals.col, rows, cols) if by_rows else (marginals.row, cols, rows)
    head_std = None
    if projection.head_dim is not None and heads_size % projection.head_dim == 0:
        pooled = backend.pool(across, heads_count, projection.head_dim)
        per_head = heads_count * projection.head_dim
        head_std = memoryview(array("d", (math.sqrt(m2 / per_head) for m2 in doubles(pooled.m2)))).cast("B")
    cross, centre_square, residual = marginals.cross, 0.0, None
    if projection.centred:
        weighted = marginals.weighted_col if by_rows else marginals.weighted_row
        centre_square = _mean_square(backend, (weighted or across).mean, heads_size)
        if second is not None and second.weighted_row is not None:
            cross = second.weighted_row.mean
    if projection.residual_size is not None:
        residual = backend.log_rms(along, count, gain, cross, centre_square)
    return replace(of_all(backend, marginals, cols), head_std=head_std, residual=residual)


def _mean_square(backend: Backend, values: Buffer, size: int) -> float:
    pooled = backend.pool(Moments(values, bytes(8 * size)), 1, size)
    return doubles(pooled.m2)[0] / size + doubles(pooled.mean)[0] ** 2


def joined(parts: Sequence[tuple[int, Statistics]]) -> Statistics:
    """Statistics of several parts, of so many elements each, as one (Chan 1979); without those of heads.

    Of samples, the interval is the one in which σ lies if every part's lies at the same end of its own, the widest."""
    total = sum(size for size, _ in parts)
    mean = sum(size / total * part.mean for size, part in parts)

    def whole(stds: Sequence[float]) -> float:
        each = zip(parts, stds, strict=True)
        return math.sqrt(sum(size / total * (std**2 + (part.mean - mean) ** 2) for (size, part), std in each))

    ends = [part.interval or (part.std, part.std) for _, part in parts]
    low, high = (whole(end) for end in zip(*ends, strict=True))
    return Statistics(
        count=sum(part.count for _, part in parts),
        mean=mean,
        std=whole([part.std for _, part in parts]),
        abs_max=max(part.abs_max for _, part in parts),
        nonfinite=sum(part.nonfinite for _, part in parts),
        interval=(low, high) if any(part.interval for _, part in parts) else None,
    )


def doubles(data: Buffer) -> memoryview[float]:
    """Bytes as float64."""
    return memoryview(data).cast("B").cast("d")


__all__ = ["Statistics", "doubles", "joined", "of_all", "of_projection", "of_sample"]
