"""Plain floats → numbers, for the few small tensors that are read outside a kernel."""

from __future__ import annotations

import struct
from array import array

_STRUCT = {"F16": "e", "F32": "f", "F64": "d"}


def decode_gain(stored: bytes, dtype: str, offset: float) -> array[float]:
    """A norm's effective gain, offset + stored value, as float32[n].

    dtype: BF16, F16, F32 or F64. Without NumPy: a gain has a few thousand elements, importing NumPy costs 70 ms.
    """
    if dtype == "BF16":
        widened = bytearray(2 * len(stored))
        widened[2::4], widened[3::4] = stored[0::2], stored[1::2]
        values = array("f", bytes(widened))
    else:
        item = struct.calcsize(_STRUCT[dtype])
        values = array("f", struct.unpack(f"<{len(stored) // item}{_STRUCT[dtype]}", stored))
    return array("f", (offset + value for value in values)) if offset else values
