"""The noun of this package, how a quantised tensor is stored, and what every format needs to find that out."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.checkpoint.live import LiveCheckpoint
from llmfp.checkpoint.specs import ITEM_BITS
from llmfp.errors import CheckpointError, EncodingError
from llmfp.marginals import Coding

Parts = tuple[tuple[str, TensorSpec], ...]

SCALES = ("F32", "BF16", "F16", "F64", "F8_E8M0", "F8_E4M3", "U8")
"""What scales are stored as; U8 is E8M0, an exponent: 2^(byte - 127), 255 is NaN."""

_SMALL_BYTES = 4 << 10


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


def kept_bytes(parts: Iterable[tuple[str, TensorSpec]], entries: int) -> int:
    """Memory for the parts as stored, `entries` float32 in all the Coding's arrays, and what making them takes."""
    return sum(spec.nbytes for _, spec in parts) + 20 * entries


def small_floats(spec: TensorSpec, cols: int, block: int, parts: Parts, label: str, levels: str = "E2M1") -> TensorSpec:
    """A matrix of small floats, low bits first, with a "scale" per `block` columns of a row in `parts`.

    Beside it may be one scale of the whole tensor, a "factor" or a "divisor" of the others.
    """
    rows, bits = spec.shape[0], 4 if levels == "E2M1" else 8
    coding = Coding("row", bits, levels=levels, scale_rows=rows, scale_cols=-(-cols // block), col_block=block)
    encoding = Encoding(
        label=label,
        packing="row",
        bits=bits,
        row_bytes=spec.nbytes // max(rows, 1),
        in_out=False,
        parts=parts,
        prepare=partial(_with_scales, coding, dict(parts)),
        kept_bytes=kept_bytes(parts, coding.scale_rows * coding.scale_cols),
    )
    return replace(spec, shape=(rows, cols), encoding=encoding)


def symmetric(checkpoint: Checkpoint, siblings: Siblings) -> None:
    """Refuses zeros beside 4-bit floats, which no format that is known here says the use of."""
    if (zero := siblings.find("weight_zero_point", ITEM_BITS)) is not None:
        raise refusal(
            checkpoint, zero, "shifts 4-bit floats, which is not supported", "scan the unquantised checkpoint"
        )


def unswizzled(checkpoint: Checkpoint, spec: TensorSpec, scale: TensorSpec, needed: tuple[int, int]) -> None:
    """Refuses scales in the order of the tensor cores' block-scaled matrix products, known by their padding.

    There 128 rows of 4 scales make a tile, [32, 4, 4] of it, so rows are padded to 128 and scales of a row to 4. Where
    nothing has to be padded, and the shape is kept, a file does not show it; no writer of files is known that does so.
    Source: the layout of scaling factors in cuBLAS's and PTX's documentation; unverified against a file.
    """
    rows, cols = (-(-n // tile) * tile for n, tile in zip(needed, (128, 4), strict=True))
    tiled = {(rows, cols), (rows * cols,), (rows // 128, cols // 4, 32, 4, 4), (rows // 128, cols // 4, 32, 16)}
    if scale.shape != needed and scale.shape in tiled:
        raise refusal(
            checkpoint,
            scale,
            f"has shape {list(scale.shape)} where {spec.name!r} of {list(spec.shape)} has scales of {list(needed)}: "
            "these are swizzled, in tiles of 128 rows and 4 scales for a GPU's tensor cores, which is not supported",
            "save the model with its scales in row order, or scan the unquantised checkpoint",
        )


def _with_scales(coding: Coding, parts: Mapping[str, TensorSpec], stored: Mapping[str, bytes]) -> Coding:
    import numpy as np

    from llmfp.encoding import arrays

    scale = arrays.values(stored["scale"], parts["scale"].dtype)
    with np.errstate(all="ignore"):
        if "factor" in parts:
            scale = scale * arrays.values(stored["factor"], parts["factor"].dtype)
        if "divisor" in parts:
            scale = scale / arrays.values(stored["divisor"], parts["divisor"].dtype)
    return replace(coding, scale=arrays.packed(scale))


class Siblings:
    """The tensors below the same module as a quantised one, by the rest of their names."""

    def __init__(self, checkpoint: Checkpoint, spec: TensorSpec) -> None:
        self._checkpoint, self._spec = checkpoint, spec
        self._module = spec.name.rpartition(".")[0]

    def find(self, field: str, dtypes: Collection[str], shape: tuple[int, ...] | None = None) -> TensorSpec | None:
        """The sibling of that name, if there is one. Raises EncodingError where its dtype or shape is another."""
        found = self._checkpoint.tensors.get(f"{self._module}.{field}")
        if found is None:
            return None
        if found.dtype not in dtypes:
            raise refusal(
                self._checkpoint, found, f"is {found.dtype}, not {' or '.join(sorted(dtypes))}", "fetch the file again"
            )
        if shape is not None and found.shape != shape:
            raise refusal(
                self._checkpoint,
                found,
                f"has shape {list(found.shape)}; {self._spec.name!r} of {list(self._spec.shape)} needs {list(shape)}",
                "do config.json and the weights belong together?",
            )
        return found

    def need(self, field: str, dtypes: Collection[str], shape: tuple[int, ...] | None = None) -> TensorSpec:
        """The same, of one that has to be there."""
        found = self.find(field, dtypes, shape)
        if found is None:
            raise refusal(
                self._checkpoint,
                self._spec,
                f"is quantised, and {self._module}.{field} is missing",
                "fetch the files again",
            )
        return found


def read_small(checkpoint: Checkpoint, spec: TensorSpec) -> bytes:
    """What a format says of a tensor in another one, which is needed before anything can be planned.

    Raises EncodingError for more than 4 KiB, CheckpointError when the file cannot be read or is another by now.
    """
    shard = checkpoint.shards[spec.shard]
    if spec.nbytes > _SMALL_BYTES:
        raise refusal(checkpoint, spec, f"has {spec.nbytes} bytes, over {_SMALL_BYTES}", "fetch the file again")
    if isinstance(checkpoint, LiveCheckpoint):
        return checkpoint.read_small(spec)
    try:
        with shard.path.open("rb") as file:
            shard.check_unchanged(os.fstat(file.fileno()))
            file.seek(spec.offset_bytes)
            return file.read(spec.nbytes)
    except OSError as error:
        raise CheckpointError(
            f"{shard.path}: tensor {spec.name!r} could not be read: {error.strerror or error}"
        ) from None


def refusal(checkpoint: Checkpoint, spec: TensorSpec, why: str, hint: str) -> EncodingError:
    """The error that says of one tensor what is wrong with it."""
    return EncodingError(f"{checkpoint.shards[spec.shard].path}: tensor {spec.name!r} {why}", hint=hint)


def settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What config.json says about quantisation, of the whole model or of its language model; empty where nothing."""
    config = checkpoint.config
    for place in (config, config.get("text_config")):
        if isinstance(place, dict):
            for key in ("quantization_config", "compression_config", "quantization"):
                if isinstance(found := place.get(key), dict):
                    return found
    return {}


def stated_method(checkpoint: Checkpoint) -> str:
    """How config.json says that the model is quantised, as an error may add it; empty where it says nothing."""
    method = settings(checkpoint).get("quant_method")
    return f" (quantised as {str(method)[:40]!r}, says config.json)" if method else ""
