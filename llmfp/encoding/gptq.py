"""GPTQ and AWQ: 2- to 8-bit codes in 32-bit words, stored [in, out], with a scale and a zero per group of inputs.

GPTQ packs codes down the inputs and zeros along the outputs, each as one run of bits; its first version stores zeros
less one. g_idx tells each input's group, which act-order shuffles. AWQ packs both along the outputs, eight to a word in
an order of its own. value = (code - zero) * scale. Source: gptqmodel and AutoAWQ; checked against gptqmodel 7.7 and
slices of real checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.encoding.specs import Encoding, Siblings, kept_bytes, refusal, settings
from llmfp.marginals import Chunk, Coding

_BITS = {"GPTQ": (2, 3, 4, 8), "GPTQ v2": (2, 3, 4, 8), "AWQ": (4,)}
_METHODS = {"gptq": "gptq", "awq": "gemm", "auto-round": None, "intel/auto-round": None}
"""quant_method → the format it means where none is stated."""
_FORMATS = {
    "gptq": "GPTQ", "auto_round:auto_gptq": "GPTQ", "gptq_v2": "GPTQ v2", "gemm": "AWQ", "auto_round:auto_awq": "AWQ",
}  # fmt: skip
_STATED_IN = ("checkpoint_format", "packing_format", "version", "format")
_OVERRIDES = ("dynamic", "extra_config")
"""Where gptqmodel and AutoRound give single modules other bits and groups: then shapes alone tell."""
_BELONG = "do config.json and the weights belong together?"


def encode(checkpoint: Checkpoint, spec: TensorSpec, siblings: Siblings) -> TensorSpec:
    """See llmfp.encoding.encoded."""
    stated = settings(checkpoint)
    layout = _layout(checkpoint, spec, stated)
    if spec.dtype != "I32" or len(spec.shape) != 2:
        raise refusal(
            checkpoint, spec, f"is {spec.dtype} {list(spec.shape)}, not I32 of two dimensions", "fetch the file again"
        )
    scales = siblings.need("scales", ("F16", "BF16", "F32"))
    zeros = siblings.need("qzeros", ("I32",))
    if len(scales.shape) != 2 or 0 in scales.shape:
        raise refusal(checkpoint, scales, f"has shape {list(scales.shape)}, not [groups, outputs]", _BELONG)
    groups, outputs = scales.shape
    if layout is None:  # from before config.json said, and so from before there was a second version
        layout = "AWQ" if 8 * spec.shape[1] == outputs else "GPTQ"
    if any(stated.get(key) for key in _OVERRIDES):
        stated = {}
    bits = _bits(checkpoint, spec, stated, zeros, outputs, _BITS[layout])
    index = siblings.find("g_idx", ("I32", "I64")) if layout != "AWQ" else None
    words = -(-outputs * bits // 32)
    if layout == "AWQ":
        inputs, needed = spec.shape[0], (spec.shape[0], words)
    else:
        inputs = spec.shape[0] * 32 // bits if index is None else index.nbytes // index.itemsize
        needed = -(-inputs * bits // 32), outputs
    if spec.shape != needed or not inputs:
        beside = f"scales of {list(scales.shape)}" + (f" and g_idx of {list(index.shape)}" if index else "")
        raise refusal(
            checkpoint,
            spec,
            f"has shape {list(spec.shape)}; {layout} of {bits} bits with {beside} needs {list(needed)}",
            _BELONG,
        )
    siblings.need("qzeros", ("I32",), (groups, words))
    group_size = _group_size(checkpoint, scales, stated, inputs, in_order=index is None)
    parts = [("scales", scales), ("qzeros", zeros), *([("g_idx", index)] if index is not None else [])]
    coding = Coding(
        "awq" if layout == "AWQ" else "down", bits, scale_rows=groups, scale_cols=outputs, row_block=group_size
    )
    encoding = Encoding(
        label=f"{layout}, {bits} bits, groups of {group_size}",
        packing=coding.packing,
        bits=bits,
        row_bytes=4 * spec.shape[1],
        in_out=True,
        parts=tuple(parts),
        prepare=partial(_prepare, checkpoint, dict(parts), coding, less_one=layout == "GPTQ"),
        kept_bytes=kept_bytes(parts, 2 * groups * outputs + inputs),
    )
    return replace(spec, shape=(inputs, outputs), encoding=encoding)


def _layout(checkpoint: Checkpoint, spec: TensorSpec, stated: Mapping[str, Any]) -> str | None:
    """Which of the three, as config.json says; None where it says nothing."""
    if (method := str(stated.get("quant_method", ""))) == "":
        return None
    told = (stated.get(key) for key in _STATED_IN)
    form = next((each.lower() for each in told if isinstance(each, str)), _METHODS.get(method))
    if method in _METHODS and form in _FORMATS:
        return _FORMATS[form]
    raise refusal(
        checkpoint,
        spec,
        f"is quantised as {method[:40]!r}, format {str(form)[:40]!r}, says config.json, which is not supported",
        f"formats of packed words that are: {', '.join(_FORMATS)}",
    )


def _bits(
    checkpoint: Checkpoint,
    spec: TensorSpec,
    stated: Mapping[str, Any],
    zeros: TensorSpec,
    outputs: int,
    known: tuple[int, ...],
) -> int:
    """As stated, or as many as the outputs' zeros take."""
    bits = stated.get("bits") or next((n for n in known if zeros.shape[1:] == (-(-outputs * n // 32),)), None)
    if isinstance(bits, int) and bits in known:
        return bits
    if bits is None:
        raise refusal(
            checkpoint,
            zeros,
            f"has shape {list(zeros.shape)}, which is not {' or '.join(map(str, known))} bits for each of "
            f"{outputs} outputs, and config.json says no bits",
            "put the model's config.json beside its weights",
        )
    raise refusal(
        checkpoint,
        spec,
        f"has {str(bits)[:40]} bits, says config.json; {' or '.join(map(str, known))} are supported",
        "scan the unquantised checkpoint",
    )


def _group_size(
    checkpoint: Checkpoint, scales: TensorSpec, stated: Mapping[str, Any], inputs: int, *, in_order: bool
) -> int:
    """Inputs per row of the scales."""
    groups, size = scales.shape[0], stated.get("group_size")
    if size is None:
        size, rest = divmod(inputs, groups)
        if in_order and groups > 1 and (rest or size & (size - 1)):  # a size in use is a power of two
            raise refusal(
                checkpoint,
                scales,
                f"has {groups} groups of {inputs} inputs, and config.json says no group_size",
                "put the model's config.json beside its weights",
            )
        return max(size, 1)
    if isinstance(size, int) and (size > 0 or size == -1):
        size = inputs if size == -1 else size
        if -(-inputs // size) == groups:
            return size
    raise refusal(
        checkpoint,
        scales,
        f"has {groups} groups; {inputs} inputs in groups of {str(size)[:40]}, says config.json, have another number",
        _BELONG,
    )


def _prepare(
    checkpoint: Checkpoint,
    parts: Mapping[str, TensorSpec],
    coding: Coding,
    stored: Mapping[str, bytes],
    *,
    less_one: bool,
) -> Coding:
    import numpy as np

    from llmfp.encoding import arrays
    from llmfp.kernels import codes

    words = np.frombuffer(stored["qzeros"], "<u4")
    if less_one and coding.bits != 3:
        # One to every place of the words at once, carry and all: the writer's subtraction, undone.
        words = words + np.uint32(0xFFFFFFFF // ((1 << coding.bits) - 1))
    packing = "awq" if coding.packing == "awq" else "row"
    rows, cols = coding.scale_rows, coding.scale_cols
    plain = Coding(packing, coding.bits, scale=np.ones(1, np.float32).data, row_block=rows, col_block=cols)
    zeros = codes.decode(Chunk(words.data, "", rows, cols, 0, words.nbytes // rows, rows), plain)
    if less_one and coding.bits == 3:  # a place may lie in two words: one to each by itself
        zeros = (zeros + 1) % 8
    coding = replace(coding, scale=arrays.floats(stored["scales"], parts["scales"].dtype), zero=arrays.packed(zeros))
    if "g_idx" not in stored:
        return coding
    index = np.frombuffer(stored["g_idx"], "<i4" if parts["g_idx"].dtype == "I32" else "<i8")
    if index.min() < 0 or index.max() >= rows:
        raise refusal(
            checkpoint,
            parts["g_idx"],
            f"holds {index.min() if index.min() < 0 else index.max()}, and there are {rows} groups",
            "fetch the file again",
        )
    return replace(coding, row_group=index.astype(np.int32).tobytes())
