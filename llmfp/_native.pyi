"""Types of the C++ extension; kernels/native/module.cpp says what each function does."""

from collections.abc import Sequence
from mmap import mmap

from llmfp.marginals import Buffer

def levels() -> tuple[str, ...]: ...
def marginals(
    level: str,
    data: Buffer,
    dtype: str,
    rows: int,
    cols: int,
    offset_bytes: int,
    row_stride_bytes: int,
    unit_rows: int,
    col_weight: Buffer | None,
    row_weight: Buffer | None,
    cross: bool,
    coding: tuple[object, ...] | None,
    low_rank: tuple[object, ...] | None,
    first_row: int,
    first_col: int,
    /,
) -> tuple[bytes, bytes, bytes, bytes, bytes | None, bytes | None, bytes | None, float, int]: ...
def expand(chunk: tuple[object, ...], out: Buffer, /) -> None: ...
def merge(level: str, parts: Sequence[tuple[tuple[int, ...], Buffer, Buffer]], /) -> tuple[bytes, bytes]: ...
def add(parts: Sequence[Buffer], cols: int, /) -> bytes: ...
def pool(mean: Buffer, m2: Buffer, count: int, block: int, /) -> tuple[bytes, bytes]: ...
def log_rms(
    mean: Buffer, m2: Buffer, count: int, weight: Buffer | None, cross: Buffer | None, centre_square: float, /
) -> bytes: ...
def copy(source: Buffer | mmap, offset: int, into: Buffer, /) -> None: ...
def sum_words(buffer: Buffer | mmap, offset: int, nbytes: int, /) -> int: ...
def populate(mapped: mmap, offset: int, nbytes: int, /) -> None: ...
def release(mapped: mmap, offset: int, nbytes: int, /) -> None: ...
