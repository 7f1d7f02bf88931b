"""Invariants: a live model's fingerprint is that of the checkpoint it would be saved as, digest and all; its memory is
read in place, on its own device; and what cannot be read is refused by name in one line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmfp
from llmfp.errors import LlmfpError
from llmfp.kernels import load
from llmfp.training import FingerprintDrift, trainer_callback
from tests.checkpoints import build

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")


class Model(torch.nn.Module):
    """A module that is nothing but its parameters, under dotted names."""

    def __init__(self, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            module: Any = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))


def saved(folder: Path, layout: str) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A checkpoint, its tensors and its config."""
    path = build(layout, layers=3).write(folder / layout)
    config = json.loads((path / "config.json").read_text())
    return path, safetensors_torch.load_file(path / "model.safetensors"), config


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    return saved(tmp_path, "llama")


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert"])
def test_a_live_model_is_the_checkpoint_it_is_saved_as(layout: str, tmp_path: Path) -> None:
    path, tensors, config = saved(tmp_path, layout)
    stored = llmfp.scan(path, deep=True)
    for source, stated in ((Model(tensors, config), None), (tensors, config)):
        live = llmfp.scan(source, config=stated, deep=True)
        assert live.digest == stored.digest
        assert live.towers == stored.towers
        assert live.caveats == stored.caveats
        assert live.run["reader"] == "live"
    assert llmfp.scan(Model(tensors, config)).source["name"] == "Model"


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert", "deepseek", "bloom"])
@pytest.mark.parametrize("memory", ["whole", "as rows of something wider", "transposed"])
def test_tensors_are_reduced_where_they_lie(layout: str, memory: str, tmp_path: Path) -> None:
    """The path of a GPU's weights, on the CPU: chunks are tensors, and so is what heads are made of."""
    path, tensors, config = saved(tmp_path, layout)
    for name, tensor in tensors.items():
        if memory == "transposed" and tensor.ndim == 2:
            tensors[name] = tensor.t().contiguous().t()
        elif memory != "whole" and tensor.ndim == 2:
            tensors[name] = torch.cat([tensor, tensor], 1)[:, tensor.shape[1] :]
    stored = llmfp.scan(path, deep=True)
    live = llmfp.scan(tensors, config=config, backend="torch_fallback", deep=True)
    for role in "qkvo" if layout != "deepseek" else "o":
        np.testing.assert_allclose(live.std[role], stored.std[role], rtol=1e-6)
        np.testing.assert_allclose(live.main.head_std(role), stored.main.head_std(role), rtol=1e-6)
        np.testing.assert_allclose(live.main.residual(role), stored.main.residual(role), atol=4e-3)
    for kept in ("qk_norm", "ov_norm", "coherence", "head_coherence", "qk_spectrum", "ov_spectrum"):
        ours, theirs = live.main.circuit(kept), stored.main.circuit(kept)
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            np.testing.assert_allclose(ours, theirs, rtol=5e-3, atol=5e-3)
    assert llmfp.scan(tensors, config=config).digest == stored.digest


def test_no_byte_of_a_model_in_memory_is_copied(
    llama: tuple[Path, dict[str, Any], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel is given is the tensors' own memory."""
    _, tensors, config = llama
    backend = load("native_cpu")
    if reason := backend.why_unavailable():
        pytest.skip(reason)
    seen = set()
    marginals = backend.marginals

    def noting(chunk: Any) -> Any:
        if chunk.rows > 1:
            seen.add(np.frombuffer(chunk.data, np.uint8).ctypes.data)
        return marginals(chunk)

    monkeypatch.setattr(backend, "marginals", noting)
    llmfp.scan(tensors, config=config)
    assert seen == {t.data_ptr() for name, t in tensors.items() if "_proj" in name and "attn" in name and t.ndim == 2}


def test_tied_parameters_share_their_bytes(llama: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    _, tensors, config = llama
    once = llmfp.scan(tensors, config=config)
    tied = llmfp.scan({**tensors, "model.embed_tokens.weight": tensors["lm_head.weight"]}, config=config)
    assert tied.digest == once.digest
    assert tied.run["bytes_total"] == once.run["bytes_total"]
    name = "model.layers.{}.self_attn.q_proj.weight"
    alike = {**tensors, name.format(1): tensors[name.format(0)]}
    std = llmfp.scan(alike, config=config).std["q"]
    assert std[0] == std[1] != std[2]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrappers_names_are_seen_through(prefix: str, llama: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    path, tensors, config = llama
    wrapped = {prefix + name.replace(".mlp", "._checkpoint_wrapped_module.mlp"): t for name, t in tensors.items()}
    wrapped = {name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"): t for name, t in wrapped.items()}
    assert llmfp.scan(wrapped, config=config).digest == llmfp.scan(path).digest


class Odd(torch.Tensor):
    """A subclass whose values are not simply in memory."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


Q = "model.layers.1.self_attn.q_proj.weight"
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "without values": (lambda t: t.to("meta"), f"state dict: tensor {Q!r} is on device meta and has no values"),
    "a subclass": (lambda t: t.as_subclass(Odd), f"state dict: tensor {Q!r} is a Odd, which is not supported"),
    "sparse": (lambda t: t.to_sparse(), f"state dict: tensor {Q!r} is laid out as torch.sparse_coo"),
    "complex": (lambda t: t.to(torch.complex128), f"state dict: tensor {Q!r} is complex128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case: str, llama: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    change, expected = REFUSED[case]
    _, tensors, config = llama
    with pytest.raises(LlmfpError) as refused:
        llmfp.scan({**tensors, Q: change(tensors[Q])}, config=config)
    assert str(refused.value).startswith(expected)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (3, "int: neither a path nor a model"),
        ({}, "state dict: holds no tensor"),
        ({"a.lora_A.default.weight": torch.ones(1)}, "state dict: tensor 'a.lora_A.default.weight' belongs to a LoRA"),
        (torch.nn.Linear(2, 2), "Linear: no attention weights recognised"),
    ],
)
def test_what_is_no_model_is_said_in_one_line(source: Any, expected: str) -> None:
    with pytest.raises(LlmfpError) as refused:
        llmfp.scan(source)
    assert str(refused.value).startswith(expected)
    assert "\n" not in str(refused.value)


def test_the_first_fsdp_is_refused_by_name(llama: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    _, tensors, config = llama
    model = Model(tensors, config)
    model.add_module("wrapped", fsdp.FullyShardedDataParallel.__new__(fsdp.FullyShardedDataParallel))
    torch.nn.Module.__init__(model.wrapped)
    with pytest.raises(LlmfpError, match=r"^Model: wrapped is wrapped by FullyShardedDataParallel"):
        llmfp.scan(model)


SHARDED = """
import sys, json
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor, Replicate, Shard
from safetensors.torch import load_file
import llmfp
folder, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
tensors = load_file(folder + "/model.safetensors")
for i, (name, tensor) in enumerate(tensors.items()):
    tensors[name] = distribute_tensor(tensor, mesh, [Shard(i % tensor.ndim) if i % 5 else Replicate()])
found = llmfp.scan(tensors, config=json.load(open(folder + "/config.json")))
print(found.digest, found.run["threads"])
dist.destroy_process_group()
"""


def test_a_model_sharded_over_processes_is_the_whole_model(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path, "llama")
    command = [sys.executable, "-W", "ignore", "-c", SHARDED, str(path), str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": str(Path(llmfp.__file__).parents[1])}
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment) for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=120)[0].split() for rank in ranks]
    assert said == [[llmfp.scan(path).digest, "1"]] * 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # hqq's, where it is installed
def test_the_trainer_callback_logs_the_drift(tmp_path: Path) -> None:
    """In transformers' own Trainer, whose steps change nothing (a rate of zero); a callback scales Q of one layer."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, num_attention_heads=4))

    class Scaling(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            if state.global_step == 1:
                with torch.no_grad():
                    model.get_parameter(Q).mul_(1.25)

    callback = trainer_callback()
    assert isinstance(callback, (FingerprintDrift, transformers.TrainerCallback))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, logging_steps=1, learning_rate=0.0, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, per_device_train_batch_size=1, dataloader_pin_memory=False,
    )  # fmt: skip
    row = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
    trainer = transformers.Trainer(model, arguments, train_dataset=[row, row], callbacks=[callback, Scaling()])
    trainer.train()
    assert callback.history[0] == callback.history[1] == dict.fromkeys(callback.history[1], 0.0)
    assert set(callback.history[2]) == {f"fingerprint_drift_{role}" for role in "qkvo"}
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["fingerprint_drift_q"] == 0.0
    assert second["fingerprint_drift_q"] == pytest.approx(np.log(1.25) / 3, rel=1e-6)
    assert second["fingerprint_drift_k"] == 0.0
