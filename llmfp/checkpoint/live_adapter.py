"""The LoRA layers of a live PEFT model: the base's tensors under their own names, and what is added to each.

What the model computes now counts: layers that are merged, or whose adapters are switched off, are their base layer;
the active adapter's copy of a module that was trained whole takes the module's place. PEFT is looked at, not imported.
Source: PEFT's tuners.lora.layer and utils.other. Checked against PEFT's own merge_and_unload.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from llmfp.checkpoint.specs import LoraSpec, TensorSpec
from llmfp.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_WRAPPER = "base_model.model."
_HINT = "merge it (model.merge_and_unload()), or save it and scan the adapter's directory with its base"


class Factors(NamedTuple):
    """Names of the tensors a [rank, in] and b [out, rank], of which scale · b @ a is added to another."""

    a: str
    b: str
    scale: float


class Adapters(NamedTuple):
    """names: of modules inside PEFT's, and those they stand for, None where they are not in use; factors: by tensor."""

    names: Mapping[str, str | None]
    factors: Mapping[str, Factors]

    def plain(self, name: str) -> str | None:
        """A tensor's name as it would be in the model without PEFT; None for what is not in use."""
        module, _, last = name.rpartition(".")
        while module and module not in self.names:
            above, _, part = module.rpartition(".")
            module, last = above, f"{part}.{last}"
        if not module:
            return name.replace(_WRAPPER, "", 1)
        stands_for = self.names[module]
        return None if stands_for is None else f"{stands_for}.{last}".replace(_WRAPPER, "", 1)


def adapters_of(model: torch.nn.Module) -> Adapters:
    """What PEFT has put into a model. Raises CheckpointError, by name, for all but plain LoRA."""
    names: dict[str, str | None] = {}
    factors: dict[str, Factors] = {}
    tuners, lora = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.tuners.lora")
    others = sys.modules.get("peft.utils.other")
    if tuners is None or lora is None or others is None:
        return Adapters(names, factors)
    wrapper = getattr(others, "AuxiliaryTrainingWrapper", others.ModulesToSaveWrapper)  # the name before PEFT 0.16
    for name, layer in model.named_modules():
        if isinstance(layer, wrapper):
            active = [] if layer.disable_adapters else list(layer.active_adapters)
            copies = getattr(layer, "modules_to_save", {})
            if len(active) > 1 or any(each not in copies for each in active):
                raise _refused(model, name, f"is {_class(layer)} of adapters {active}")
            names[f"{name}.original_module"] = None if active else name
            names |= {f"{name}.modules_to_save.{each}": name for each in active}
        elif isinstance(layer, tuners.BaseTunerLayer):
            names[f"{name}.base_layer"] = name
            if layer.merged or layer.disable_adapters:
                continue
            if not isinstance(layer, lora.LoraLayer):
                raise _refused(model, name, f"is {_class(layer)}, which is not LoRA")
            active = [each for each in layer.active_adapters if each in layer.lora_A]
            if len(active) > 1:
                raise _refused(model, name, f"adds the adapters {', '.join(active)} at once")
            for each in active:
                _check_plain(model, name, layer, each)
                a, b = (f"{name}.{factor}.{each}.weight".replace(_WRAPPER, "", 1) for factor in ("lora_A", "lora_B"))
                factors[f"{name}.weight".replace(_WRAPPER, "", 1)] = Factors(a, b, float(layer.scaling[each]))
    return Adapters(names, factors)


def with_factors(specs: Mapping[str, TensorSpec], factors: Mapping[str, Factors]) -> dict[str, TensorSpec]:
    """The tensors, of which those that are adapted know by what."""
    adapted = {
        name: replace(specs[name], lora=LoraSpec(specs[each.a], specs[each.b], each.scale))
        for name, each in factors.items()
    }
    return {**specs, **adapted}


def _check_plain(model: torch.nn.Module, name: str, layer: Any, adapter: str) -> None:
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None or getattr(layer, "use_dora", {}).get(adapter):
        what = "DoRA" if variant is None else _class(variant)
        raise _refused(model, name, f"is {what}, which is not plain LoRA")
    if getattr(layer, "lora_bias", {}).get(adapter):
        raise _refused(model, name, "has lora_bias, which changes the biases")
    weights = [
        getattr(each, "weight", None) for each in (layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter])
    ]
    if hasattr(layer, "parameter_name") or any(weight is None or weight.ndim != 2 for weight in weights):
        raise _refused(model, name, f"is {_class(layer)}, which adapts no matrix")


def _refused(model: torch.nn.Module, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{type(model).__name__}: module {name!r} {what}; that is not supported", hint=_HINT)


def _class(of: object) -> str:
    return f"{type(of).__module__}.{type(of).__qualname__}"


__all__ = ["Adapters", "Factors", "adapters_of", "with_factors"]
