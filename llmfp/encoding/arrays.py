"""Scales and zeros as the kernels take them: float32 arrays, made with NumPy once per tensor.

They are a hundredth to a quarter of the codes' bytes; NumPy is imported only where a checkpoint has them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


@np.errstate(invalid="ignore")  # signalling NaN
def values(stored: bytes, dtype: str) -> NDArray[np.float64]:
    """Floats, or integers, of any dtype that scales and zeros are stored as, flat, as float64."""
    if dtype in ("F8_E8M0", "U8"):
        exponent = np.frombuffer(stored, np.uint8)
        return np.where(exponent == 255, np.nan, np.exp2(exponent.astype(np.float64) - 127))
    if dtype == "F8_E4M3":
        from llmfp.kernels.codes import fp8_table

        return fp8_table(dtype)[np.frombuffer(stored, np.uint8)]
    if dtype == "BF16":
        return (np.frombuffer(stored, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I8": "i1", "I32": "<i4", "I64": "<i8"}
    return np.frombuffer(stored, kinds[dtype]).astype(np.float64)


def floats(stored: bytes, dtype: str) -> bytes:
    """The same as float32, as a Coding holds them."""
    with np.errstate(all="ignore"):
        return packed(values(stored, dtype))


def packed(array: NDArray[np.float64]) -> bytes:
    """Any array's values in order, as float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32).tobytes()
