"""Invariant: a live PEFT model's fingerprint is that of the model PEFT itself would merge, and the one of its saved
adapter on the saved base; what is not plain LoRA is refused by name. With PEFT's own models: skipped where it is not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmfp
from llmfp.errors import LlmfpError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")

# What PEFT asks of transformers, which has a new name for it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TARGETS = {"llama": ["q_proj", "k_proj", "o_proj"], "gpt2": ["c_attn", "attn.c_proj"]}


def base(layout: str, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(3)
    if layout == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)
        return transformers.GPT2LMHeadModel(config).to(dtype)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, **sizes)
    return transformers.LlamaForCausalLM(config).to(dtype)


def adapted(layout: str, dtype: Any = torch.float32, **options: Any) -> Any:
    """A model with an adapter whose factors are of the order of the weights."""
    stated = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS[layout], "fan_in_fan_out": layout == "gpt2"}
    model = peft.get_peft_model(base(layout, dtype), peft.LoraConfig(**{**stated, **options}))
    return randomised(model)


def randomised(model: Any) -> Any:
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("layout", TARGETS)
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj|c_attn": 5}, "alpha_pattern": {"o_proj|c_proj": 1}}]
)
def test_a_live_adapter_is_the_model_that_peft_merges(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(layout, **options)
    live = llmfp.scan(model, deep=True)
    merged = llmfp.scan(copy.deepcopy(model).merge_and_unload(), deep=True)
    plain = llmfp.scan(base(layout))
    for role in "qkvo":
        np.testing.assert_allclose(live.std[role], merged.std[role], rtol=1e-5)
        np.testing.assert_allclose(live.main.head_std(role), merged.main.head_std(role), rtol=1e-5)
        np.testing.assert_allclose(live.main.residual(role), merged.main.residual(role), atol=2e-3)
    assert (np.abs(np.divide(live.std["q"], plain.std["q"]) - 1) > 0.01).all()
    assert len(live.caveats) == len(plain.caveats) + 1
    assert "tensors adapted" in live.caveats[0]
    assert live.run["bytes_read"] > plain.run["bytes_read"]

    model.save_pretrained(tmp_path / "adapter")
    base(layout).save_pretrained(tmp_path / "base")
    assert llmfp.scan(tmp_path / "adapter", base=tmp_path / "base").digest == live.digest


def test_weights_of_half_precision_are_added_to_exactly() -> None:
    """PEFT rounds the merged weights to bf16, so that they differ by that, one part in 2^9 of every element."""
    model = adapted("llama", torch.bfloat16)
    live, merged = llmfp.scan(model), llmfp.scan(copy.deepcopy(model).merge_and_unload())
    exact = llmfp.scan(copy.deepcopy(model).float().merge_and_unload())
    for role in "qko":
        np.testing.assert_allclose(live.std[role], merged.std[role], rtol=1e-3)
        np.testing.assert_allclose(live.std[role], exact.std[role], rtol=1e-5)


def test_what_the_model_computes_now_counts() -> None:
    """Merged, switched off, another adapter, and a module that was trained whole beside the one it replaces."""
    model = adapted("llama", modules_to_save=["v_proj"])
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "modules_to_save") and "default" in module.modules_to_save:
                module.modules_to_save["default"].weight.mul_(2)
    plain, live = llmfp.scan(base("llama")), llmfp.scan(model)
    np.testing.assert_allclose(live.std["v"], np.multiply(plain.std["v"], 2), rtol=1e-6)
    with model.disable_adapter():
        assert llmfp.scan(model).digest == plain.digest
    model.merge_adapter()
    np.testing.assert_allclose(llmfp.scan(model).std["q"], live.std["q"], rtol=1e-5)
    model.unmerge_adapter()
    np.testing.assert_allclose(llmfp.scan(model).std["q"], live.std["q"], rtol=1e-5)

    model = adapted("llama")
    first = llmfp.scan(model)
    config = peft.LoraConfig(r=2, lora_alpha=40, target_modules=["q_proj"])
    model.add_adapter("other", config)
    randomised(model)
    model.set_adapter("other")
    second = llmfp.scan(model)
    assert second.std["k"] == llmfp.scan(base("llama")).std["k"] != first.std["k"]
    assert second.std["q"] != first.std["q"]


def several(model: Any) -> Any:
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (lambda: adapted("llama", use_dora=True), "DoraLinearVariant, which is not plain LoRA"),
    "a bias": (lambda: adapted("gpt2", lora_bias=True), "has lora_bias, which changes the biases"),
    "two at once": (lambda: several(adapted("llama")), "adds the adapters default, other at once"),
    "no LoRA": (
        lambda: peft.get_peft_model(base("llama"), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
        "which is not LoRA",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(case: str) -> None:
    make, expected = REFUSED[case]
    with pytest.raises(LlmfpError) as refused:
        llmfp.scan(make())
    assert str(refused.value).startswith("PeftModel: module 'base_model.model.")
    assert expected in str(refused.value)
    assert "merge" in refused.value.hint
