"""A format that is known and not read is refused in one line that names it, and what the config calls it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llmfp.checkpoint.specs import ITEM_BITS
from tests.checkpoints import Stored
from tests.quantised import error_of, write_quantised

FORMATS: dict[str, tuple[dict[str, tuple[str, tuple[int, ...]]], str]] = {
    "exl2": ({"q_weight": ("I32", (12, 64)), "q_scale": ("I32", (3, 8))}, "q_proj.q_weight' is I32 [12, 64] of EXL2"),
    "exl3": ({"trellis": ("I16", (4, 4, 64)), "suh": ("F16", (64,))}, "q_proj.trellis' is I16 [4, 4, 64] of EXL3"),
    "quanto": ({"weight._data": ("I8", (64, 64)), "weight._scale": ("F32", (64, 1))}, "_data' is I8 [64, 64] of Quant"),
    "qint4": ({"weight._data._data": ("U8", (32, 64))}, "weight._data._data' is U8 [32, 64] of Quanto"),
    "torchao": ({"_weight_qdata": ("I8", (64, 64))}, "q_proj._weight_qdata' is I8 [64, 64] of torchao"),
    "torchao 0.14": ({"weight:qdata": ("I8", (64, 64))}, "q_proj.weight:qdata' is I8 [64, 64] of torchao"),
    "aqlm": ({"codes": ("I16", (64, 8, 1)), "codebooks": ("F16", (1, 256, 1, 8))}, "codes' is I16 [64, 8, 1] of AQLM"),
    "vptq": ({"indices": ("I32", (1, 8, 64))}, "q_proj.indices' is I32 [1, 8, 64] of VPTQ"),
    "quip": ({"Qidxs": ("I16", (64, 8)), "SU": ("F16", (64,))}, "q_proj.Qidxs' is I16 [64, 8] of QuIP#"),
    "spqr": ({"dense_weights": ("I64", (64,)), "col_vals": ("I32", (5,))}, "dense_weights' is I64 [64] of SpQR"),
    "marlin": ({"B": ("I32", (4, 128)), "s": ("F16", (1, 64))}, "q_proj.B' is I32 [4, 128] of Marlin"),
    "sparse": ({"B_24": ("I32", (2, 128)), "B_meta": ("I16", (2, 64))}, "B_24' is I32 [2, 128] of sparse Marlin"),
    "higgs": (
        {"weight": ("I16", (16, 64)), "scales": ("F16", (64,)), "tables": ("F16", (16, 2))},
        "q_proj.weight' is I16 [16, 64] of HIGGS",
    ),
    "eetq": ({"weight": ("I8", (64, 64)), "weight_scales": ("F16", (64,))}, "q_proj.weight' is I8 [64, 64] of EETQ"),
    "bitnet": ({"weight": ("U8", (16, 64)), "weight_scale": ("BF16", (1,))}, "weight' is U8 [16, 64], with"),
    "new": ({"weight": ("U8", (32, 64))}, "q_proj.weight' is stored as U8"),
    "float8": ({"weight": ("F8_E4M3", (64, 64))}, "q_proj.weight' is F8_E4M3 (quantised as"),
}  # fmt: skip


@pytest.mark.parametrize("method", FORMATS)
def test_formats_that_are_not_read_are_named(method: str, tmp_path: Path) -> None:
    kinds, message = FORMATS[method]
    fields = {
        field: Stored(dtype, shape, bytes(math.prod(shape) * ITEM_BITS[dtype] // 8))
        for field, (dtype, shape) in kinds.items()
    }
    stated = {"quantization_config": {"quant_method": method}}
    found = error_of(write_quantised(tmp_path, dict.fromkeys("qkvo", fields), stated, heads=8))
    assert message in found
    assert f"(quantised as {method!r}, says config.json)" in found


@pytest.mark.parametrize("shape", [(128, 8), (1024,), (1, 2, 32, 4, 4), (1, 2, 32, 16)])
@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_swizzled_scales_are_named(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    cols = 80 if kind == "nvfp4" else 160
    fields = {"weight_packed": Stored("U8", (64, cols // 2), bytes(64 * cols // 2))}
    fields["weight_scale"] = Stored("F8_E4M3" if kind == "nvfp4" else "U8", shape, bytes(math.prod(shape)))
    if kind == "nvfp4":
        fields["weight_global_scale"] = Stored("F32", (1,), bytes(4))
    stated = {"quantization_config": {"quant_method": "compressed-tensors", "format": f"{kind}-pack-quantized"}}
    found = error_of(write_quantised(tmp_path, dict.fromkeys("qkvo", fields), stated, heads=8))
    assert f"q_proj.weight_scale' has shape {list(shape)} where" in found
    assert "scales of [64, 5]: these are swizzled" in found
