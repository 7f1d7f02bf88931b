"""GPTQ and AWQ store [in, out], so that heads which a family interleaves lie in runs of columns: σ of every role is
that of its own rows, and every other statistic that of the same values stored plainly, as the family lays them out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import llmfp
from llmfp.column_runs import marginals, runs_of
from llmfp.fingerprint import CIRCUIT_ARRAYS
from llmfp.kernels import load
from llmfp.marginals import Chunk, Coding
from llmfp.plan import parse_size
from tests.checkpoints import LAYOUTS, SPREAD, Layout, Model, bf16, build, fuse
from tests.packing import packed, packed_awq
from tests.quantised import DECODING, ROLES, plan_of
from tests.test_adapter import write_adapter

GROUP = 32
BLOCK = (4, 32)
"""Rows and columns that share a scale where outputs run along the stored rows: heads begin within no block."""
CASES = [case for case, (layout, *_) in LAYOUTS.items() if layout.fused != "concat" or layout.gated]
SHAPES: dict[str, dict[str, int]] = {
    "whole words": {"heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 64},
    "heads that AWQ's words of eight codes cut": {"heads": 4, "kv_heads": 2, "head_dim": 12, "hidden": 72},
}


def quantised(weights: NDArray[np.float32], method: str, seed: int) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """A projection [out, in] as GPTQ with act-order or AWQ stores it, or in blocks of 8-bit codes, and the [out, in]
    that it then stands for."""
    if method == "blocks":
        rows, cols = (-(-size // block) for size, block in zip(weights.shape, BLOCK, strict=True))
        padded = np.zeros((rows * BLOCK[0], cols * BLOCK[1]), np.float32)
        padded[: weights.shape[0], : weights.shape[1]] = weights
        scale = bf16(np.abs(padded.reshape(rows, BLOCK[0], cols, BLOCK[1])).max(axis=(1, 3)) / 127)
        each = np.kron(scale, np.ones(BLOCK, np.float32))[: weights.shape[0], : weights.shape[1]]
        eight = np.clip(np.rint(weights / each), -127, 127).astype(np.int8)
        return {"weight": eight, "weight_scale": scale}, (eight * each).astype(np.float32)
    index = np.arange(weights.shape[1]) // GROUP
    if method == "gptq":
        index = np.random.default_rng(seed).permutation(index)
    members = [weights.T[index == group] for group in range(index.max() + 1)]
    low = np.stack([np.minimum(each.min(axis=0), 0) for each in members])
    high = np.stack([np.maximum(each.max(axis=0), 0) for each in members])
    scales = bf16((high - low) / 15)  # few digits, so that a float32 holds code times scale
    zeros = np.clip(np.rint(-low / scales), 1, 15).astype(np.int64)
    codes = np.clip(np.rint(weights.T / scales[index]) + zeros[index], 0, 15).astype(np.int64)
    dense = ((codes - zeros[index]) * scales[index]).astype(np.float32).T
    if method == "awq":
        return {"qweight": packed_awq(codes), "qzeros": packed_awq(zeros), "scales": scales}, dense
    qzeros = np.ascontiguousarray(packed((zeros - 1).T, 4).T)
    return {"qweight": packed(codes, 4), "qzeros": qzeros, "scales": scales, "g_idx": index.astype(np.int32)}, dense


def twins(case: str, method: str, shape: str) -> tuple[Model, Model]:
    """A model as quantised, and one of the same values as floats."""
    plain, (layout, *_) = build(case, **SHAPES[shape]), LAYOUTS[case]
    named = {role: suffix for role in (*ROLES, "qkv") if (suffix := getattr(layout, role))}
    tensors: dict[str, Any] = {}
    for name, tensor in plain.tensors.items():
        if any(name.endswith(f".{suffix}") for suffix in named.values()) and "linear" not in name:
            fields, dense = quantised(np.asarray(tensor), method, len(tensors))
            tensors |= {f"{name.removesuffix('weight')}{field}": stored for field, stored in fields.items()}
            plain.tensors[name] = dense
        else:
            tensors[name] = tensor
    stated: dict[str, Any] = {"quantization_config": {"quant_method": method, "bits": 4, "group_size": GROUP}}
    if method == "blocks":
        stated = {"quantization_config": {"quant_method": "fp8", "weight_block_size": BLOCK}}
    return replace(plain, tensors=tensors, config={**(plain.config or {}), **stated}), plain


def own_rows(plain: Model, layout: Layout, layer: int) -> dict[str, NDArray[np.float64]]:
    """Every role's W, taken out of a layer's tensors by the layout that `fuse` writes."""
    block, tensors = layout.block.format(layer), plain.tensors
    found = {role: tensors[f"{block}.{name}"] for role in ROLES if (name := getattr(layout, role))}
    size, kv_heads = plain.head_dim, plain.kv_heads or 0
    if layout.qkv:
        counts = {"q": plain.heads * size, "k": kv_heads * size, "v": kv_heads * size}
        marks = {role: np.full((count, 1), "qkv".index(role), np.float32) for role, count in counts.items()}
        of = fuse(marks, layout, plain.heads, kv_heads)[:, 0]
        found |= {role: np.asarray(tensors[f"{block}.{layout.qkv}"])[of == "qkv".index(role)] for role in "qkv"}
    if layout.gated:
        by_head = np.asarray(found["q"]).reshape(plain.heads, 2, size, -1)
        found["q"] = by_head[:, 0].reshape(plain.heads * size, -1)
    return {role: np.asarray(weights, np.float64) for role, weights in found.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["gptq", "awq", "blocks"])
@pytest.mark.parametrize("case", CASES)
def test_interleaved_heads_are_read_from_quantised_columns_and_rows(
    case: str, method: str, shape: str, tmp_path: Path
) -> None:
    stored, plain = twins(case, method, shape)
    folder = stored.write(tmp_path / "stored")
    expected = llmfp.scan(plain.write(tmp_path / "plain"), deep=True).main
    found = llmfp.scan(folder, deep=True).main
    for layer in found.layers:
        for role, weights in own_rows(plain, LAYOUTS[case][0], layer).items():
            np.testing.assert_allclose(found.std[role][layer], weights.std(), rtol=1e-6)
            np.testing.assert_allclose(found.mean[role][layer], weights.mean(), rtol=1e-6, atol=1e-6 * weights.std())
            assert abs(weights.std() / (SPREAD[role] * (1 + 0.1 * layer)) - 1) < 0.2, "drawn with a σ of its own"
    assert (found.heads, found.kv_heads, found.head_dim) == (expected.heads, expected.kv_heads, expected.head_dim)
    assert found.rotary == expected.rotary
    for role in ROLES:
        np.testing.assert_allclose(found.head_std(role), expected.head_std(role), rtol=1e-6)
        np.testing.assert_allclose(found.residual(role), expected.residual(role), rtol=0, atol=2.0**-8)
    assert found.roles == expected.roles, "biases are split as their weights are"
    assert found.circuits is not None
    assert None not in found.circuits
    for name in CIRCUIT_ARRAYS:
        one, other = found.circuit(name), expected.circuit(name)
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=2.0**-8 if one.dtype == np.float16 else 1e-5)
    reads = plan_of(folder)["reads"]
    label = "I8 with a scale per 4×32 block" if method == "blocks" else method.upper()
    assert {read["encoding"].split(",")[0] for read in reads} == {label}


@pytest.mark.parametrize("backend", [*DECODING, "torch_fallback"])
@pytest.mark.parametrize("case", ["gpt_neox", "internlm2", "qwen3_next"])
def test_every_back_end_reads_columns_alike(case: str, backend: str, tmp_path: Path) -> None:
    if reason := load(backend).why_unavailable():
        pytest.skip(reason)
    stored, plain = twins(case, "gptq", "whole words")
    found = llmfp.scan(stored.write(tmp_path), backend=backend, memory_bytes=1 << 30).main
    for role, weights in own_rows(plain, LAYOUTS[case][0], 1).items():
        np.testing.assert_allclose(found.std[role][1], weights.std(), rtol=1e-6)


def test_no_way_of_reading_changes_a_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a sample that takes in all rows, as it does of tensors as small as these."""
    stored, _ = twins("gpt_neox", "gptq", "whole words")
    folder = stored.write(tmp_path)
    found = llmfp.scan(folder, deep=True)
    for more in ({"threads": 3}, {"reader": "pread"}, {"memory_bytes": parse_size("96MiB")}):
        again = llmfp.scan(folder, deep=True, **more)
        assert (again.digest, again.main.circuits) == (found.digest, found.main.circuits)
    monkeypatch.setattr("llmfp.reader.pread_reader.PreadReader.step_bytes", 1)  # a unit a step
    assert llmfp.scan(folder, deep=True, reader="pread").digest == found.digest
    assert llmfp.scan(folder, sample=0.5).std["q"] == pytest.approx(found.std["q"], rel=1e-9)


def test_what_an_adapter_adds_is_added_to_its_own_columns(tmp_path: Path) -> None:
    stored, plain = twins("gpt_neox", "gptq", "whole words")
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    outputs, inputs = np.asarray(plain.tensors[name]).shape
    rng = np.random.default_rng(6)
    factors = {
        f"base_model.model.{name.replace('weight', part)}": rng.normal(0, 1, shape).astype(np.float32)
        for part, shape in (("lora_A.weight", (3, inputs)), ("lora_B.weight", (outputs, 3)))
    }
    adapter = write_adapter(tmp_path / "adapter", factors)
    found, expected = (
        llmfp.scan(adapter, base=model.write(tmp_path / which), deep=True).main
        for which, model in (("stored", stored), ("plain", plain))
    )
    bare = llmfp.scan(tmp_path / "plain").main
    for role in "qkv":
        np.testing.assert_allclose(found.std[role], expected.std[role], rtol=1e-6)
        assert found.std[role][0] != pytest.approx(bare.std[role][0], rel=1e-2), "the adapter shows"
    np.testing.assert_allclose(found.circuit("qk_norm"), expected.circuit("qk_norm"), rtol=1e-5)


@pytest.mark.parametrize("weight", ["", "col_weight", "row_weight"])
@pytest.mark.parametrize("backend", DECODING)
def test_runs_of_plain_columns_have_the_marginals_of_the_columns_side_by_side(backend: str, weight: str) -> None:
    rng, kernel = np.random.default_rng(3), load(backend)
    stored = rng.normal(1, 2, (50, 60)).astype(np.float32)
    stored[7, 22], stored[8, 3] = np.nan, np.inf  # inside a run, and between runs
    side_by_side = np.concatenate([stored[:, start : start + 8] for start in (20, 35, 50)], axis=1)
    drawn = rng.uniform(0.5, 2, 50 if weight == "row_weight" else 24).astype(np.float32)
    weights: dict[str, Any] = {weight: drawn.tobytes()} if weight else {}
    runs = Chunk(
        stored.tobytes(), "F32", 50, 24, 80, 240, 32, first_col=20, col_runs=3, run_cols=15, run_bytes=60, **weights
    )
    whole = Chunk(side_by_side.tobytes(), "F32", 50, 24, 0, 96, 32, **weights)
    found, expected = marginals(kernel, runs), kernel.marginals(whole)
    assert (found.counts, found.nonfinite, found.abs_max) == (expected.counts, 1, expected.abs_max)
    for name in ("row", "col", "weighted_row", "weighted_col"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None:
            for mine, theirs in ((one.mean, other.mean), (one.m2, other.m2)):
                np.testing.assert_allclose(np.frombuffer(mine), np.frombuffer(theirs), rtol=1e-5)


def test_codes_on_a_device_are_fetched_once_for_all_runs() -> None:
    codes = np.random.default_rng(4).integers(0, 1 << 32, (4, 60), np.uint32)
    coding = Coding("down", 4, scale=np.full(60, 0.5, np.float32).data, scale_cols=60, row_block=32)
    runs = Chunk(codes.tobytes(), "", 32, 24, 0, 240, 32, coding=coding, first_col=20, col_runs=3, run_cols=15)
    expected = marginals(load("reference"), runs)
    stored = torch.frombuffer(bytearray(codes.tobytes()), dtype=torch.uint8)
    found = marginals(load("torch_fallback"), replace(runs, data=stored))
    for name in ("row", "col"):
        one, other = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(np.frombuffer(one.mean), np.frombuffer(other.mean), rtol=1e-9)
        np.testing.assert_allclose(np.frombuffer(one.m2), np.frombuffer(other.m2), rtol=1e-9)
    first, *rest = (run.data for run in runs_of(replace(runs, data=stored)))
    assert all(each is first for each in rest)
    assert isinstance(first, memoryview)
