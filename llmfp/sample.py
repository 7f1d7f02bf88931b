"""A part of every tensor instead of all of it: which rows, and how far σ may be from what all would give.

The rows of a tensor, through all its heads, are divided into as many stretches of equal length as blocks are read, and
one block of consecutive rows is drawn in each: spread evenly over the heads, yet at no fixed place within them, since
rows of one head differ by their place (rotary frequency). The draw depends on the tensor's name alone.

The interval takes the blocks for independent draws, which overstates the variance of one drawn in each stretch: blocks
of different heads differ more than blocks of one. With v_b the mean square about the sample's mean in block b of B,
σ² is the mean of the v_b, and its standard error s·√((1 − f) / B), s being the standard deviation of the v_b and f the
share that was read. σ̂ · exp(±t·s·√((1 − f) / B) / 2σ̂²) is then the 95 % interval, with t of (B − 1) / 2 degrees of
freedom: as many as a variance of B values has whose excess kurtosis is 2, and the v_b of real weights have long tails
(with B − 1, 94 % of all intervals held σ, with half of that 96 to 97 %; bench/bench_sample.py measures it again).
Source: Cochran, Sampling Techniques, 3rd edition, 2.15 and 9.3; degrees of freedom after Satterthwaite 1946.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

CONFIDENCE = 0.95
SAMPLED = "sample-"
"""What the digest of a sample begins with: it is never one of a whole model."""
LEAST_BLOCKS, MOST_BLOCKS = 12, 64
_WHOLE_FROM = 0.5
"""Where blocks would take that share of a tensor, all of it is read."""
_Z = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of `rows` consecutive rows each, by group and first row, in order; `share` of all rows."""

    rows: int
    places: tuple[tuple[int, int], ...]
    share: float


def draw(
    runs: Sequence[tuple[int, int, int]], row_bytes: int, share: float, block_bytes: int, multiple: int, seed: str
) -> Blocks | None:
    """The blocks to read of rows that lie in runs of (group, first row, count); None where all should be read.

    block_bytes  least worth a request
    multiple     that first rows and numbers of rows must be, counted from the start of a run
    """
    total = sum(count for _, _, count in runs)
    wanted = max(1, round(share * total))
    rows = max(-(-block_bytes // row_bytes), -(-wanted // MOST_BLOCKS), 1)
    rows = -(-min(rows, max(count for _, _, count in runs)) // multiple) * multiple
    from random import Random  # 5 ms of import that a whole scan does not need

    random = Random(seed)
    slots: list[tuple[int, int]] = []
    for group, first, count in runs:
        start = first + random.randrange(count % rows // multiple + 1) * multiple if count >= rows else first
        slots += [(group, start + rows * i) for i in range(count // rows)]
    blocks = max(LEAST_BLOCKS, round(wanted / rows))
    if blocks * rows > _WHOLE_FROM * total or blocks > len(slots):
        return None
    bounds = [len(slots) * i // blocks for i in range(blocks + 1)]
    places = [slots[random.randrange(low, high)] for low, high in pairwise(bounds)]
    return Blocks(rows, tuple(places), blocks * rows / total)


def interval(means: Iterable[float], m2s: Iterable[float], block_count: int, share: float) -> tuple[float, float]:
    """The 95 % interval of σ from every block's mean and centred sum of squares, over `block_count` elements each."""
    blocks = list(zip(means, m2s, strict=True))
    n = len(blocks)
    mean = math.fsum(m for m, _ in blocks) / n
    squares = [m2 / block_count + (m - mean) ** 2 for m, m2 in blocks]
    variance = math.fsum(squares) / n
    if not math.isfinite(variance):
        return math.nan, math.nan
    if variance == 0:
        return 0.0, 0.0
    spread = math.fsum((v - variance) ** 2 for v in squares) / (n - 1)
    half = quantile((n - 1) / 2) * math.sqrt((1 - share) * spread / n) / variance / 2
    return math.sqrt(variance) * math.exp(-half), math.sqrt(variance) * math.exp(half)


def quantile(df: float) -> float:
    """What Student's t of df ≥ 5 degrees of freedom exceeds in magnitude with probability 0.05; to 1e-3.

    Source: Abramowitz & Stegun 26.7.5. Checked against llmfp.evidence.student.
    """
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / df**power for power, term in enumerate(terms, 1))


def parse_share(text: str) -> float:
    """A share from '10%' or '0.1'. Raises ValueError with what is accepted."""
    number = text.strip().removesuffix("%")
    try:
        share = float(number) / (100 if text.strip().endswith("%") else 1)
        if not 0 < share < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is no part of a whole; write for example 10% or 0.1") from None
    return share
