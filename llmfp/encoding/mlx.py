"""MLX: codes of 2 to 8 bits as one run of bits per row of 32-bit words, a scale and a shift per group of a row.

value = code * scale + bias. Bits and group size are in config.json, under `quantization`, and may differ by module:
what is said of one stands alone, over the library's defaults. The newer modes mxfp4, mxfp8 and nvfp4 are the same
floats as elsewhere, in words. Source: MLX's documentation of quantize and mlx_lm's loader; checked against mlx 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.encoding.specs import Encoding, Siblings, kept_bytes, refusal, settings, small_floats
from llmfp.marginals import Coding

_BITS = (2, 3, 4, 5, 6, 8)
_FLOATS = ("F16", "BF16", "F32")
_MICROSCALING = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
"""Mode → bits and block."""
_AFFINE = {"mode": "affine", "bits": 4, "group_size": 64}
"""What holds for a module of which something else is said."""
_BELONG = "do config.json and the weights belong together?"
_ELSEWHERE = "scan the unquantised checkpoint"


def encode(checkpoint: Checkpoint, spec: TensorSpec, siblings: Siblings) -> TensorSpec:
    """See llmfp.encoding.encoded."""
    if spec.dtype != "U32" or len(spec.shape) != 2 or 0 in spec.shape:
        raise refusal(
            checkpoint,
            spec,
            f"is {spec.dtype} {list(spec.shape)} with {spec.name.removesuffix('weight')}scales beside it, "
            "which is no known format",
            _ELSEWHERE,
        )
    stated = _stated(checkpoint, spec.name.rpartition(".")[0])
    mode = stated.get("mode", "affine")
    if isinstance(mode, str) and mode in _MICROSCALING:
        return _microscaling(checkpoint, spec, siblings, mode)
    if mode != "affine":
        raise refusal(checkpoint, spec, f"is quantised in mode {str(mode)[:40]!r}", _ELSEWHERE)
    rows, words = spec.shape
    scale = siblings.need("scales", _FLOATS)
    bias = siblings.need("biases", _FLOATS, scale.shape)
    bits, size = stated.get("bits"), stated.get("group_size")
    if type(bits) is not int or bits not in _BITS or type(size) is not int or size < 1:
        raise refusal(
            checkpoint,
            spec,
            f"has {str(bits)[:40]} bits in groups of {str(size)[:40]}, says config.json",
            "put the model's config.json beside its weights",
        )
    cols, rest = divmod(32 * words, bits)
    if rest or cols % size or scale.shape != (rows, cols // size):
        raise refusal(
            checkpoint,
            scale,
            f"has shape {list(scale.shape)}; [{rows}, {words}] words of {bits} bits in groups of {size} need another",
            _BELONG,
        )
    parts = (("scales", scale), ("biases", bias))
    coding = Coding("row", bits, scale_rows=rows, scale_cols=cols // size, col_block=size)
    encoding = Encoding(
        label=f"MLX, {bits} bits, groups of {size}",
        packing="row",
        bits=bits,
        row_bytes=4 * words,
        in_out=False,
        parts=parts,
        prepare=partial(_prepare, coding, scale.dtype, bias.dtype),
        kept_bytes=kept_bytes(parts, 2 * rows * cols // size),
    )
    return replace(spec, shape=(rows, cols), encoding=encoding)


def _stated(checkpoint: Checkpoint, module: str) -> Mapping[str, Any]:
    """What holds for a module: what is said of it, else what is said of all.

    A model that was quantised before MLX took it may still say how under `quantization_config`.
    """
    own = checkpoint.config.get("quantization")
    stated = own if isinstance(own, dict) else settings(checkpoint)
    alone = stated.get(module)
    return {**_AFFINE, **alone} if isinstance(alone, dict) else stated


def _microscaling(checkpoint: Checkpoint, spec: TensorSpec, siblings: Siblings, mode: str) -> TensorSpec:
    bits, block = _MICROSCALING[mode]
    rows, cols = spec.shape[0], spec.shape[1] * 32 // bits
    scale = siblings.need("scales", ("U8",), (rows, -(-cols // block)))
    if (whole := siblings.find("global_scale", ("F32", "BF16", "F16"))) is not None:
        raise refusal(checkpoint, whole, f"scales {spec.name!r} as a whole, which is not supported", _ELSEWHERE)
    if mode == "nvfp4":
        scale = replace(scale, dtype="F8_E4M3")
    label = f"MLX {mode}, blocks of {block}"
    return small_floats(spec, cols, block, (("scale", scale),), label, levels="E2M1" if bits == 4 else "F8_E4M3")


def _prepare(coding: Coding, scale_dtype: str, bias_dtype: str, stored: Mapping[str, bytes]) -> Coding:
    from llmfp.encoding import arrays

    shift = arrays.floats(stored["biases"], bias_dtype)
    return replace(coding, scale=arrays.floats(stored["scales"], scale_dtype), shift=shift)
