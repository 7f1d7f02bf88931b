"""PEFT adapters on a base: the fingerprint is that of the merged model, which these tests merge themselves."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import llmfp
from llmfp import api
from llmfp.errors import LlmfpError
from llmfp.kernels import Backend
from tests.checkpoints import Model, as_bf16, bf16, build, safetensors_bytes, write_model

CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": "some/base"}
ADAPTED = {
    "llama": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
    "gpt2": ("c_attn.weight", "attn.c_proj.weight"),  # Conv1D: stored [in, out], fused, LayerNorm read twice
    "gpt_neox": ("query_key_value.weight", "attention.dense.weight"),  # interleaved heads
    "distilbert": ("q_lin.weight", "v_lin.weight"),
}

Factors = dict[str, NDArray[np.float32]]


def adapter_of(model: Model, ends: tuple[str, ...], *, conv1d: bool, rank: int = 3) -> Factors:
    """Random factors for every tensor of the model whose name ends so, as PEFT names them."""
    rng = np.random.default_rng(5)
    factors = {}
    for name, tensor in model.tensors.items():
        if name.endswith(ends):
            outputs, inputs = reversed(tensor.shape) if conv1d else tensor.shape
            module = "base_model.model." + name.removesuffix(".weight")
            factors[f"{module}.lora_A.weight"] = rng.normal(0, 1, (rank, inputs)).astype(np.float32)
            factors[f"{module}.lora_B.weight"] = rng.normal(0, 1, (outputs, rank)).astype(np.float32)
    return factors


def merged(model: Model, factors: Factors, scale: Callable[[str], float], *, conv1d: bool) -> dict[str, Any]:
    """The base's tensors with scale · B @ A added, in float64."""
    tensors: dict[str, Any] = dict(model.tensors)
    for name in tensors:
        module = "base_model.model." + name.removesuffix(".weight")
        if (a := factors.get(f"{module}.lora_A.weight")) is not None:
            b = factors[f"{module}.lora_B.weight"].astype(np.float64)
            delta = scale(name) * (b @ a.astype(np.float64))
            tensors[name] = np.asarray(model.tensors[name], np.float64) + (delta.T if conv1d else delta)
    return tensors


def write_adapter(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


def assert_same_statistics(found: llmfp.Fingerprint, truth: llmfp.Fingerprint) -> None:
    assert found.towers.keys() == truth.towers.keys()
    for name, tower in truth.towers.items():
        for role, column in tower.statistics.items():
            for mine, theirs in zip(found.towers[name].statistics[role], column, strict=True):
                assert mine is not None
                assert theirs is not None
                assert mine.std == pytest.approx(theirs.std, rel=1e-6)
                assert mine.mean == pytest.approx(theirs.mean, rel=1e-6, abs=1e-6 * theirs.std)
                assert mine.abs_max == pytest.approx(theirs.abs_max, rel=1e-6)
                if theirs.head_std is not None:
                    assert np.frombuffer(mine.head_std or b"") == pytest.approx(
                        np.frombuffer(theirs.head_std), rel=1e-6
                    )
                if theirs.residual is not None:
                    profile, wanted = (np.frombuffer(s.residual or b"", np.float16) for s in (mine, theirs))
                    assert np.allclose(profile, wanted, atol=4e-3)  # one step of float16 around 2


@pytest.mark.parametrize("case", ADAPTED)
def test_the_merged_model_is_what_is_fingerprinted(tmp_path: Path, case: str, backend: Backend) -> None:
    model = build(case)
    factors = adapter_of(model, ADAPTED[case], conv1d=case == "gpt2")
    assert factors
    adapter = write_adapter(tmp_path / "adapter", factors, {**CONFIG, "fan_in_fan_out": case == "gpt2"})
    found = llmfp.scan(adapter, base=model.write(tmp_path / "base"), backend=backend.name)
    whole = write_model(tmp_path / "merged", merged(model, factors, lambda _: 2.0, conv1d=case == "gpt2"), model.config)
    assert_same_statistics(found, llmfp.scan(whole, backend=backend.name))
    assert found.source["name"] == "adapter"
    assert found.source["base"] == "base"


@pytest.mark.parametrize(
    ("extra", "scale"),
    [
        ({"use_rslora": True}, 6 / math.sqrt(3)),
        ({"lora_alpha": 1.5}, 0.5),
        ({"alpha_pattern": {"q_proj": 6, r"^model\.layers.1.*v_proj": 6, "k_proj|o_proj": 6}, "lora_alpha": 6}, 2.0),
        ({"rank_pattern": {"self_attn.[kqvo]_proj": 3, "_proj": 3}, "r": 3}, 2.0),
        ({"r": 8, "rank_pattern": {r".*_proj": 3}, "init_lora_weights": "gaussian"}, 2.0),
    ],
)
def test_strength_is_what_the_config_says(tmp_path: Path, extra: dict[str, Any], scale: float) -> None:
    model = build("llama")
    factors = adapter_of(model, ADAPTED["llama"], conv1d=False)
    adapter = write_adapter(tmp_path / "adapter", factors, {**CONFIG, **extra})
    found = llmfp.scan(adapter, base=model.write(tmp_path / "base"))
    tensors = merged(model, factors, lambda _: scale, conv1d=False)
    assert_same_statistics(found, llmfp.scan(write_model(tmp_path / "merged", tensors, model.config)))


def test_alpha_may_differ_by_module(tmp_path: Path) -> None:
    model = build("llama")
    factors = adapter_of(model, ADAPTED["llama"], conv1d=False)
    config = {**CONFIG, "alpha_pattern": {r"layers\.1\..*q_proj": 30, "o_proj": 3}}
    found = llmfp.scan(write_adapter(tmp_path / "adapter", factors, config), base=model.write(tmp_path / "base"))

    def scale(name: str) -> float:
        return 1.0 if "o_proj" in name else 10.0 if "layers.1." in name and "q_proj" in name else 2.0

    tensors = merged(model, factors, scale, conv1d=False)
    assert_same_statistics(found, llmfp.scan(write_model(tmp_path / "merged", tensors, model.config)))


def test_factors_may_be_bfloat16_and_the_base_too(tmp_path: Path) -> None:
    model = build("llama")
    model.tensors = {name: bf16(np.asarray(tensor)) for name, tensor in model.tensors.items()}
    factors = {name: bf16(each) for name, each in adapter_of(model, ADAPTED["llama"], conv1d=False).items()}
    base = write_model(tmp_path / "base", {k: as_bf16(np.asarray(v)) for k, v in model.tensors.items()}, model.config)
    adapter = write_adapter(tmp_path / "adapter", {name: as_bf16(each) for name, each in factors.items()})
    tensors = merged(model, factors, lambda _: 2.0, conv1d=False)
    truth = llmfp.scan(write_model(tmp_path / "merged", tensors, model.config))
    assert_same_statistics(llmfp.scan(adapter, base=base), truth)


def test_tensors_brought_whole_take_the_bases_place(tmp_path: Path) -> None:
    model = build("llama")
    name = "model.layers.0.self_attn.k_proj.weight"
    trained = np.asarray(model.tensors[name]) * np.float32(3)
    norm = np.full_like(np.asarray(model.tensors["model.layers.1.input_layernorm.weight"]), 7)
    adapter = write_adapter(
        tmp_path / "adapter",
        {
            f"base_model.model.{name.replace('.weight', '.modules_to_save.weight')}": trained,
            "base_model.model.model.layers.1.input_layernorm.weight": norm,
            "base_model.model.score.weight": norm[None],
        },
    )
    found = llmfp.scan(adapter, base=model.write(tmp_path / "base"))
    assert found.std["k"][0] == pytest.approx(trained.std(dtype=np.float64), rel=1e-6)
    assert found.main.roles["norm"]["mean"][1] == 7
    assert "2 replaced" in " ".join(found.caveats)
    assert {"score.weight"} <= {each["pattern"].rpartition("model.")[2] for each in found.skipped}


def test_wrappers_in_front_of_a_name_may_differ(tmp_path: Path) -> None:
    model = build("distilbert")
    factors = adapter_of(model, ADAPTED["distilbert"], conv1d=False)
    stripped = {name.removeprefix("distilbert."): tensor for name, tensor in model.tensors.items()}
    base = write_model(tmp_path / "base", stripped, model.config)
    found = llmfp.scan(write_adapter(tmp_path / "adapter", factors), base=base)
    tensors = merged(model, factors, lambda _: 2.0, conv1d=False)
    assert_same_statistics(found, llmfp.scan(write_model(tmp_path / "merged", tensors, model.config)))


def test_a_real_adapter(tmp_path: Path, shared_data: Path) -> None:
    """A LoRA of distilbert-base-uncased, rank 8 on q_lin and v_lin with a classifier, on random weights of its size."""
    from safetensors.numpy import load_file

    factors = load_file(shared_data / "lora_distilbert.safetensors")
    model = build("distilbert", layers=6, heads=12, head_dim=64)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(shared_data / "lora_distilbert.safetensors", adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({**CONFIG, "r": 8, "lora_alpha": 16}))
    base = model.write(tmp_path / "base")
    found = llmfp.scan(adapter, base=base)
    plan = api.plan(adapter, base=base).to_json()
    assert {each["adapter_rank"] for each in plan["reads"] if each["roles"] in (["q"], ["v"])} == {8}
    assert {each["adapter_rank"] for each in plan["reads"] if each["roles"] in (["k"], ["o"])} == {None}
    assert plan["adapter_bytes"] == 6 * 2 * 2 * 8 * 768 * 4
    for layer in range(6):
        for role in "qkvo":
            weights = model.weights["encoder", layer, role]
            module = f"base_model.model.distilbert.transformer.layer.{layer}.attention.{role}_lin"
            if role in "qv":
                a, b = (factors[f"{module}.lora_{each}.weight"].astype(np.float64) for each in "AB")
                assert np.abs(b @ a).max() > 0
                weights = weights + 2 * (b @ a)
            assert found.std[role][layer] == pytest.approx(weights.std(), rel=1e-6)


Change = Callable[[Path, Path], None]


def _config(**changes: Any) -> Change:
    def change(adapter: Path, _base: Path) -> None:
        config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
        (adapter / "adapter_config.json").write_text(json.dumps(config))

    return change


def _tensors(edit: Callable[[dict[str, Any]], None]) -> Change:
    def change(adapter: Path, _base: Path) -> None:
        from safetensors.numpy import load_file

        tensors: dict[str, Any] = dict(load_file(adapter / "adapter_model.safetensors"))
        edit(tensors)
        (adapter / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))

    return change


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def _rename(old: str, new: str) -> Change:
    return _tensors(lambda tensors: tensors.update({new: tensors.pop(old)}))


def _nothing_of_the_base(tensors: dict[str, Any]) -> None:
    tensors.clear()
    tensors["x"] = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_config(peft_type="IA3"), ["adapter_config.json", "'IA3'"]),
        (_config(peft_type=...), ["adapter_config.json", "not a PEFT adapter"]),
        (_config(use_dora=True), ["DoRA"]),
        (_config(lora_bias=True), ["lora_bias"]),
        (_config(layer_replication=[[0, 2], [1, 2]]), ["layer_replication"]),
        (_config(init_lora_weights="pissa_niter_4"), ["init_lora_weights", "pissa_niter_4"]),
        (_config(init_lora_weights=[1]), ["init_lora_weights"]),
        (_config(r=4), ["rank", "q_proj", "3 rows"]),
        (_config(r=...), ["rank", "None"]),
        (_config(lora_alpha="16"), ["lora_alpha", "'16'"]),
        (_config(lora_alpha=True), ["lora_alpha"]),
        (_config(lora_alpha=...), ["lora_alpha", "None"]),
        (_config(alpha_pattern=[1]), ["alpha_pattern", "no object"]),
        (_config(alpha_pattern={"(a+)+": 1}), ["alpha_pattern", "(a+)+"]),
        (_config(rank_pattern={"." + "*." * 4: 1}), ["rank_pattern"]),
        (lambda adapter, _: (adapter / "adapter_config.json").unlink(), ["adapter_config.json", "no such file"]),
        (lambda adapter, _: (adapter / "adapter_config.json").write_text("{"), ["adapter_config.json", "JSON"]),
        (lambda adapter, _: (adapter / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors"]),
        (_tensors(lambda t: t.pop(f"{Q}.lora_B.weight")), ["layers.0.self_attn.q_proj", "only factor A"]),
        (_rename(f"{Q}.lora_A.weight", f"{Q}.lora_magnitude_vector"), ["lora_magnitude_vector"]),
        (_tensors(lambda t: t.update({f"{Q}.lora_A.x.weight": t[f"{Q}.lora_A.weight"]})), ["several adapters"]),
        (_tensors(lambda t: t.update({f"{Q}.lora_A.weight": np.zeros((3, 5), np.float32)})), ["q_proj", "[3, 5]"]),
        (_tensors(lambda t: t.update({f"{Q}.lora_A.weight": np.zeros((3, 24), np.int8)})), ["q_proj", "I8"]),
        (_tensors(lambda t: t.update({f"{Q}.lora_B.weight": np.zeros((9, 3), np.float32)})), ["q_proj", "[9, 3]"]),
        (_tensors(lambda t: t.update({f"{Q}.lora_B.weight": np.zeros(3, np.float32)})), ["q_proj", "[3]"]),
        (
            _tensors(
                lambda t: t.update({key.replace("q_proj", "wq"): t.pop(key) for key in list(t) if "q_proj" in key})
            ),
            ["wq", "base does not have"],
        ),
        (_tensors(_nothing_of_the_base), ["no LoRA"]),
    ],
)
def test_what_is_not_a_plain_adapter_of_this_base_is_refused(tmp_path: Path, change: Change, words: list[str]) -> None:
    model = build("llama")
    base = model.write(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", adapter_of(model, ADAPTED["llama"], conv1d=False))
    change(adapter, base)
    with pytest.raises(LlmfpError) as caught:
        api.plan(adapter, base=base)
    message = str(caught.value)
    assert "\n" not in message
    assert str(adapter) in message
    for word in words:
        assert word in message


def test_an_adapter_alone_is_refused_with_a_hint(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", adapter_of(build("llama"), ADAPTED["llama"], conv1d=False))
    with pytest.raises(LlmfpError, match="adapter of 'some/base'") as caught:
        llmfp.scan(adapter)
    assert "--base" in caught.value.hint
    with pytest.raises(LlmfpError, match="LoRA") as caught:
        llmfp.scan(adapter / "adapter_model.safetensors")
    assert "--base" in caught.value.hint


def test_a_base_below_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    base = build("llama").write(tmp_path / "base")
    with pytest.raises(LlmfpError, match=r"adapter_config\.json: no such file"):
        llmfp.scan(base, base=base)
