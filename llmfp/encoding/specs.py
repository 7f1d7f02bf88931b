"""The noun of this package: how a quantised tensor is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmfp.checkpoint import TensorSpec
from llmfp.marginals import Coding

Parts = tuple[tuple[str, TensorSpec], ...]


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the codes of a tensor of logical [rows, cols] are stored, and which other tensors they need.

    label       in words, for plan and errors: "GPTQ, 4 bits, groups of 128"
    packing, bits   see llmfp.marginals.Coding
    row_bytes   from one stored row of codes to the next
    in_out      whether it is stored [in, out], whatever the family does with plain weights
    parts       (field, tensor) of scales, zeros and the like, which are read whole, before the codes
    prepare     their bytes, by field → the Coding. Raises EncodingError for values that make no sense
    kept_bytes  memory that takes: the Coding's arrays, and what it takes to make them
    """

    label: str
    packing: str
    bits: int
    row_bytes: int
    in_out: bool
    parts: Parts
    prepare: Callable[[Mapping[str, bytes]], Coding]
    kept_bytes: int

    def runs(self, rows: int, first: int, count: int) -> list[tuple[int, int]]:
        """`count` rows from `first`, of `rows` in all, cut where their codes stop following each other."""
        if self.packing != "plane":
            return [(first, count)]
        plane, stop, runs = self._plane_rows(rows), first + count, []
        while first < stop:
            end = min(stop, (first // plane + 1) * plane)
            runs.append((first, end - first))
            first = end
        return runs

    def extent(self, rows: int, first: int, count: int) -> tuple[int, int]:
        """Where in the tensor the codes of such a run lie: offset and number of bytes."""
        if self.packing == "down":
            start, stop = first * self.bits // 32, -(-(first + count) * self.bits // 32)
        else:
            start = first % self._plane_rows(rows) if self.packing == "plane" else first
            stop = start + count
        return start * self.row_bytes, (stop - start) * self.row_bytes

    def place(self, rows: int, row: int) -> int:
        """The lowest bit of a row's codes in their bytes: the first plane is the highest."""
        return 8 - self.bits * (row // self._plane_rows(rows) + 1) if self.packing == "plane" else 0

    def _plane_rows(self, rows: int) -> int:
        return rows * self.bits // 8
