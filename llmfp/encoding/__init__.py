"""How stored bytes become numbers: plain floats, and every quantised format that is read without being unpacked first.

A quantised projection lies in several tensors: its codes, and *siblings* below the same module with scales, zeros and
the like. `encoded` finds them, checks them against each other and against the config, and gives the codes back as a
`TensorSpec` of the matrix they stand for, in stored orientation, with an `Encoding`. Nothing here reads a weight byte.
One module per format; a new one is a module and its line in one of the two tables.
"""

from __future__ import annotations

import importlib

from llmfp.checkpoint import Checkpoint, TensorSpec
from llmfp.checkpoint.specs import ITEM_BITS
from llmfp.checkpoint.strict_json import shown
from llmfp.encoding import refused
from llmfp.encoding.floats import decode_gain
from llmfp.encoding.specs import Encoding, Siblings, refusal, settings, stated_method

FLOATS = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")
"""Dtypes whose stored values are the weights."""

_CODES = {
    "qweight": "gptq", "weight_packed": "compressed", "W_q": "hqq", "weight_blocks": "mxfp4",
    **dict.fromkeys(refused.CODES, "refused"),
}  # fmt: skip
"""Last component of a name that holds codes under another name than the weight's → the module that knows it."""

_SIBLINGS = {
    "weight.absmax": "bitsandbytes", "weight.quant_map": "bitsandbytes", "SCB": "bitsandbytes",
    **dict.fromkeys(refused.BESIDE, "refused"), "biases": "mlx", "scales": "mlx",
    "weight_scale_2": "nvfp4", "weight_scale_inv": "scaled", "weight_scale": "scaled", "qscale_weight": "scaled",
    "scale_weight": "scaled", "scale": "scaled",
}  # fmt: skip
"""What lies beside a `weight` that holds codes → the module that knows it; the first that is there decides."""


_SCALES = (
    "weight_scale_inv", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_zero_point", "weight_shape",
    "qscale_weight", "scale_weight", "scales", "qzeros", "g_idx", "SCB", "absmax", "quant_map", "nested_absmax",
    "packing",
)  # fmt: skip
"""Last components of names that nothing but scales, zeros and the like of a quantised weight have."""


_METHODS = (
    "auto-round", "awq", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "compressed-tensors", "fbgemm_fp8",
    "fp8", "gptq", "hqq", "intel/auto-round", "modelopt", "modelopt_fp4", "mxfp4", "mxfp8", "quark",
)  # fmt: skip
"""What config.json may call the quantisation of what is read here; MLX has no name for it."""


def weight_name(name: str) -> str:
    """The name that the weight had before it was quantised: q_proj.weight for q_proj.qweight or q_proj.weight.qdata."""
    module, _, last = name.rpartition(".")
    return f"{module.removesuffix('._data').removesuffix('.weight')}.weight" if last in _CODES else name


def encoded(checkpoint: Checkpoint, spec: TensorSpec) -> TensorSpec:
    """The matrix that a tensor stands for: the tensor itself, or one of logical shape with an `Encoding`.

    Raises EncodingError, naming file, tensor and field, for formats that are not supported and for siblings that are
    missing or do not fit.
    """
    module, _, last = spec.name.rpartition(".")
    if (factor := checkpoint.tensors.get(f"{module}.pre_quant_scale")) is not None:
        raise refusal(
            checkpoint,
            factor,
            f"multiplies the inputs of {spec.name!r}, which is not supported",
            "scan the unquantised checkpoint",
        )
    method = _CODES.get(last)
    if method is None:
        method = next((m for field, m in _SIBLINGS.items() if f"{module}.{field}" in checkpoint.tensors), None)
    if method is None:
        return _unquantised(checkpoint, spec)
    encode = importlib.import_module(f"llmfp.encoding.{method}").encode
    result: TensorSpec = encode(checkpoint, spec, Siblings(checkpoint, spec))
    return result


def doubts(checkpoint: Checkpoint) -> list[str]:
    """What config.json says of quantised projections that the tensors do not show, as caveats."""
    stated, found = settings(checkpoint), []
    method = stated.get("quant_method")
    if method is not None and method not in _METHODS:
        found.append(
            f"config.json says quant_method {shown(method)}, which is not known; "
            "codes and scales are read as their names and shapes say"
        )
    transforms = stated.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        found.append("config.json says that weights were turned (transform_config); they are read as they are stored")
    return found


def alone(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """Scales and zeros whose codes are missing: of each weight that is not there under any name, one of them."""
    found = {}
    for spec in checkpoint.tensors.values():
        module, _, field = spec.name.rpartition(".")
        module = module.removesuffix(".weight")
        if field in _SCALES and not any(f"{module}.{codes}" in checkpoint.tensors for codes in ("weight", *_CODES)):
            found[f"{module}.weight"] = spec
    return found


def _unquantised(checkpoint: Checkpoint, spec: TensorSpec) -> TensorSpec:
    if spec.dtype in FLOATS:
        if spec.dtype.startswith("F8") and (stated := stated_method(checkpoint)):
            raise refusal(
                checkpoint,
                spec,
                f"is {spec.dtype}{stated}, but its scales are missing",
                "fetch the files again; scales are stored beside the weights",
            )
        return spec
    if " " in spec.dtype:  # torch_archive: "F32 with strides [1, 8]"
        raise refusal(
            checkpoint,
            spec,
            f"is stored as {spec.dtype}, which is not supported",
            "make the tensors .contiguous() and save the model again, as safetensors",
        )
    if spec.dtype in ITEM_BITS:
        raise refusal(
            checkpoint,
            spec,
            f"is stored as {spec.dtype}{stated_method(checkpoint)}, "
            "and no tensor beside it says how its values are made of that",
            f"plain weights are {', '.join(FLOATS)}; README.md lists the quantised formats",
        )
    from llmfp.encoding import blocks  # only GGUF files have other types

    return blocks.encode(checkpoint, spec)


__all__ = ["FLOATS", "Encoding", "alone", "decode_gain", "doubts", "encoded", "weight_name"]
