"""Circuits of heads: what a deep scan keeps is what float64 says of the weights, and no rewrite inside a head moves it.

Which families turn their queries and keys, and how, is said here by hand, from the models' own code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import llmfp
from llmfp import circuits
from llmfp.architecture import Rotary
from llmfp.circuits import Grams, Turned, coherence, sketch, spectra
from llmfp.errors import PlanError
from llmfp.fingerprint import TowerFingerprint
from tests.checkpoints import BACKEND, LAYOUTS, Model, build, write_model
from tests.quantised import write_quantised
from tests.test_encoding_gptq import gptq

HALF, NEIGHBOURS = "half", "neighbours"
ROTARY = {
    "llama": (HALF, 1.0), "gemma": (HALF, 1.0), "gemma2": (HALF, 1.0), "olmo": (HALF, 1.0), "olmo2": (HALF, 1.0),
    "glm4": (NEIGHBOURS, 0.5), "glm": (NEIGHBOURS, 0.5), "ernie4_5": (NEIGHBOURS, 1.0), "cohere": (NEIGHBOURS, 1.0),
    "starcoder2": (HALF, 1.0), "phi": (HALF, 0.5), "phi3": (HALF, 1.0), "mistral": (NEIGHBOURS, 1.0),
    "gptj": (NEIGHBOURS, 1.0), "codegen": (NEIGHBOURS, 1.0), "exaone": (HALF, 1.0), "gpt_neox": (HALF, 0.25),
    "falcon": (HALF, 1.0), "falcon, 7B": (HALF, 1.0), "persimmon": (HALF, 1.0), "persimmon, Phi-3-small": (HALF, 1.0),
    "internlm2": (HALF, 1.0), "baichuan": (HALF, 1.0), "dbrx": (HALF, 1.0), "qwen": (HALF, 1.0),
    "chatglm": (NEIGHBOURS, 0.5), "chatglm, one key per head": (NEIGHBOURS, 0.5), "mixformer": (HALF, 1.0),
    "molmo": (HALF, 1.0), "molmo, norm behind attention": (HALF, 1.0), "hf_olmo": (HALF, 1.0),
    "modernbert": (HALF, 1.0), "qwen3_next": (HALF, 0.25), "llama4": (NEIGHBOURS, 1.0), "nemotron": (HALF, 0.5),
    "apertus": (HALF, 1.0), "afmoe": (HALF, 1.0), "lfm2": (HALF, 1.0),
}  # fmt: skip
"""Families with a rotary embedding: members of a pair, and the share of a head that is turned where no config says."""
INDEXED = {"bloom", "mpt", "t5"}
"""Families whose heads differ by design."""
RNG = np.random.default_rng(5)
Float64 = NDArray[np.float64]


def rows_of(case: str, head_dim: int) -> Rotary | None:
    if case not in ROTARY:
        return None
    members, share = ROTARY[case]
    return Rotary(int(head_dim * share) // 2, members == NEIGHBOURS)


def loops(q: Float64, k: Float64, rotary: Rotary, *, crossed: bool = True) -> list[float]:
    """The coherence of one head from its rows [h, d], complex and one entry at a time."""
    pairs = range(rotary.pairs)
    first, second = (
        ([2 * i for i in pairs], [2 * i + 1 for i in pairs])
        if rotary.interleaved
        else (list(pairs), [i + rotary.pairs for i in pairs])
    )
    rows = [x[first] + 1j * x[second] for x in (q, k)]

    def terms(x: NDArray[Any], y: NDArray[Any]) -> tuple[float, float]:
        """|⟨x, y⟩|² and |⟨x, ȳ⟩|²."""
        return abs(np.vdot(x, y)) ** 2, abs(np.dot(x, y)) ** 2

    block = {(n, i): sum(terms(x[i], x[i])) / 2 for n, x in enumerate(rows) for i in pairs}
    found = []
    for n, x in enumerate(rows):
        scale = {(i, j): 2 * np.sqrt(block[n, i] * block[n, j]) for i in pairs for j in pairs}
        entries = [terms(x[i], x[j])[0] / scale[i, j] for i in pairs for j in pairs if i < j]
        entries += [terms(x[i], x[j])[1] / scale[i, j] for i in pairs for j in pairs if i <= j]
        found += [float(np.log(entry + 0.5 / x.shape[1])) for entry in entries]
    if crossed:
        between = {(i, j): sum(terms(rows[0][i], rows[1][j])) / 2 for i in pairs for j in pairs}
        entries = [between[i, j] / np.sqrt(block[0, i] * block[1, j]) for i in pairs for j in pairs]
        found += [float(np.log(entry + 0.5 / q.shape[1])) for entry in entries]
    return found


def grams_of(q: Float64, k: Float64) -> tuple[Float64, Float64, Float64]:
    """Of heads [n, h, d]."""
    return q @ q.swapaxes(1, 2), k @ k.swapaxes(1, 2), q @ k.swapaxes(1, 2)


def heads_of(model: Model, tower: str, layer: int, role: str, size: int) -> Float64:
    """[heads, size, d], rows along the residual stream."""
    return model.effective[tower, layer, role].reshape(-1, size, model.effective[tower, layer, role].shape[1])


# --- the statistics by themselves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotary", [Rotary(4, False), Rotary(4, True), Rotary(3, False), Rotary(1, True)])
def test_coherence_is_that_of_complex_rows(rotary: Rotary) -> None:
    q, k = RNG.normal(size=(3, 8, 20)), RNG.normal(size=(3, 8, 20))
    expected = [loops(one, other, rotary) for one, other in zip(q, k, strict=True)]
    np.testing.assert_allclose(coherence(*grams_of(q, k), (20, 20), rotary), expected, rtol=1e-12)


def turned_and_scaled(x: Float64, factors: NDArray[np.complex128], rotary: Rotary) -> Float64:
    """Every pair's complex row times a complex number."""
    y = x.copy()
    for i, factor in enumerate(factors):
        a, b = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + rotary.pairs)
        row = (x[:, a] + 1j * x[:, b]) * factor
        y[:, a], y[:, b] = row.real, row.imag
    return y


@pytest.mark.parametrize("rotary", [Rotary(4, False), Rotary(4, True), Rotary(2, False)])
def test_no_map_that_commutes_with_the_rotary_embedding_moves_coherence_or_norms(rotary: Rotary) -> None:
    """Turning and scaling pairs and rotating the residual stream leave everything to 1e-9; mixing two pairs, which does
    not commute, does not."""
    q, k = RNG.normal(size=(2, 8, 20)), RNG.normal(size=(2, 8, 20))
    plain = coherence(*grams_of(q, k), (20, 20), rotary)
    factors = np.exp(RNG.normal(size=rotary.pairs) + 1j * RNG.uniform(0, 2 * np.pi, rotary.pairs))
    rewritten = turned_and_scaled(q, factors, rotary), turned_and_scaled(k, 1 / factors.conj(), rotary)
    orthogonal = np.linalg.qr(RNG.normal(size=(20, 20)))[0]
    rewritten = rewritten[0] @ orthogonal, rewritten[1] @ orthogonal
    np.testing.assert_allclose(coherence(*grams_of(*rewritten), (20, 20), rotary), plain, rtol=0, atol=1e-9)
    if 2 * rotary.pairs == 8:
        logits = [np.einsum("hid,hie->hde", x, y) for x, y in ((q, k), (rewritten[0], rewritten[1]))]
        np.testing.assert_allclose(logits[1], orthogonal.T @ logits[0] @ orthogonal, atol=1e-9)
    mixed = q.copy()
    mixed[:, [0, 1]] = (q[:, [0, 1]].swapaxes(1, 2) @ np.array([[0.8, 0.6], [-0.6, 0.8]])).swapaxes(1, 2)
    if not rotary.interleaved:  # rows 0 and 1 are then of two pairs
        assert np.abs(coherence(*grams_of(mixed, k), (20, 20), rotary) - plain).max() > 0.1


def test_circuits_do_not_change_under_invertible_maps_inside_a_head() -> None:
    """‖O·V‖ and both spectra, whatever basis a head is written in."""
    q, k, v, o = (RNG.normal(size=(4, 6, 18)) for _ in range(4))
    inside = [RNG.normal(size=(6, 6)) for _ in range(2)]
    rewritten = [inside[0] @ q, np.linalg.inv(inside[0]).T @ k, inside[1] @ v, np.linalg.inv(inside[1]).T @ o]

    def kept(q: Float64, k: Float64, v: Float64, o: Float64) -> circuits.Circuits:
        (gram_q, gram_k, _), (gram_v, gram_o, _) = grams_of(q, k), grams_of(v, o)
        found = circuits.circuits(Grams(gram_q, gram_k, gram_v, gram_o, None))
        assert found is not None
        return found

    plain, other = kept(q, k, v, o), kept(*rewritten)
    for name, dtype, tolerance in (
        ("qk_norm", np.float64, 1e-9), ("ov_norm", np.float64, 1e-9),
        ("qk_spectrum", np.float16, 5e-3), ("ov_spectrum", np.float16, 5e-3),
    ):  # fmt: skip
        one, two = (np.frombuffer(getattr(each, name), dtype).astype(float) for each in (plain, other))
        np.testing.assert_allclose(two, one, atol=tolerance, err_msg=name)
    singular = [np.linalg.svd(one.T @ two, compute_uv=False)[:6] for one, two in zip(q, k, strict=True)]
    np.testing.assert_allclose(np.frombuffer(plain.qk_norm), np.log([np.linalg.norm(s) for s in singular]), rtol=1e-9)


def test_spectra_are_squared_singular_values_over_their_mean() -> None:
    x, y = RNG.normal(size=(3, 5, 30)), RNG.normal(size=(3, 5, 30))
    found = spectra(x @ x.swapaxes(1, 2), y @ y.swapaxes(1, 2))
    for one, two, row in zip(x, y, found, strict=True):
        squares = np.linalg.svd(one.T @ two, compute_uv=False)[:5] ** 2
        np.testing.assert_allclose(row, np.log(squares / squares.mean()), atol=1e-6)


def test_the_sketch_adds_and_subtracts_what_a_public_function_draws() -> None:
    entries = RNG.normal(size=(2, 700))
    drawn = hashlib.shake_256(b"llmfp head coherence 1").digest(1400)
    expected = np.zeros((2, 256))
    for head in range(2):
        for i in range(700):
            expected[head, drawn[i]] += (1 if drawn[700 + i] & 1 else -1) * (entries[head, i] - entries[head].mean())
    np.testing.assert_allclose(sketch(entries), expected, atol=1e-12)


def test_a_head_that_does_nothing_is_left_out_of_the_average() -> None:
    q, k = RNG.normal(size=(4, 8, 20)), RNG.normal(size=(4, 8, 20))
    rotary = Rotary(4, False)
    q[2] *= 1e-6
    gram_q, gram_k, gram_qk = grams_of(q, k)
    turned = Turned(gram_q, gram_k, gram_qk, (20, 20), rotary)
    found = circuits.circuits(Grams(gram_q, gram_k, None, None, turned))
    assert found is not None
    assert found.coherence is not None
    average = np.frombuffer(found.coherence, np.float16).astype(float)
    np.testing.assert_allclose(average, coherence(*grams_of(q, k), (20, 20), rotary)[[0, 1, 3]].mean(axis=0), rtol=2e-3)


# --- through a scan --------------------------------------------------------------------------------------------------


def towers(model: Model, folder: Path, **more: Any) -> Iterator[tuple[str, TowerFingerprint]]:
    found = llmfp.scan(model.write(folder), backend=BACKEND, deep=True, **more)
    for name, tower in found.towers.items():
        assert tower.circuits is not None
        yield name, tower


@pytest.mark.parametrize("case", [case for case in LAYOUTS if not case.startswith("deepseek")])
def test_every_layout_s_circuits_are_those_of_its_effective_weights(case: str, tmp_path: Path) -> None:
    """Separate, fused, interleaved, gated and Conv1D; with gains, LayerNorm's centring, and norms behind attention."""
    model = build(case, head_dim=8, hidden=40)
    model.config = model.config or {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}  # Mistral's own
    for name, tower in towers(model, tmp_path):
        rotary = rows_of(case, 8)
        assert tower.rotary == (rotary if name != "cross" else None), name
        assert tower.indexed_heads is (case in INDEXED and name != "cross")
        norms = {key: tower.circuit(key) for key in ("qk_norm", "ov_norm")}
        stored, heads = tower.circuit("coherence"), tower.circuit("head_coherence")
        for i, layer in enumerate(tower.layers):
            q, k, v, o = (heads_of(model, name, layer, role, 8) for role in "qkvo")
            k, v = (each.repeat(len(q) // len(each), axis=0) for each in (k, v))
            for key, (x, y) in {"qk_norm": (q, k), "ov_norm": (o, v)}.items():
                expected = [np.log(np.linalg.norm(one.T @ two)) for one, two in zip(x, y, strict=True)]
                found = norms[key]
                assert found is not None
                np.testing.assert_allclose(found[i], expected, rtol=1e-5, err_msg=f"{name} {layer} {key}")
            if tower.rotary is None:
                assert stored is heads is None
                spectrum = tower.circuit("qk_spectrum")
                assert spectrum is not None
                want = spectra(q @ q.swapaxes(1, 2), k @ k.swapaxes(1, 2))
                np.testing.assert_allclose(spectrum[i].astype(float), want, atol=0.02)
            else:
                each = np.array([loops(one, two, tower.rotary) for one, two in zip(q, k, strict=True)])
                assert stored is not None
                assert heads is not None
                np.testing.assert_allclose(stored[i].astype(float), each.mean(axis=0), atol=5e-3)
                np.testing.assert_allclose(heads[i].astype(float), sketch(each), atol=0.02)


@pytest.mark.parametrize("case", ["llama", "gpt_neox", "gpt2", "opt"])
def test_a_deep_scan_changes_no_digest_and_nothing_changes_its_circuits(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads, budget, reader, shards, steps that cut heads: the same bits. Units of 32 rows, heads of 24."""
    monkeypatch.setattr("llmfp.marginals.UNIT_ELEMENTS", 1)
    model = build(case, layers=3, heads=6, kv_heads=3, head_dim=24, hidden=96)
    folder = model.write(tmp_path / "whole")
    plain = llmfp.scan(folder, backend=BACKEND)
    found = llmfp.scan(folder, backend=BACKEND, deep=True, threads=1)
    assert found.digest == plain.digest
    assert plain.main.circuits is None
    variants: list[dict[str, Any]] = [{"threads": 4}, {"reader": "pread", "threads": 3}, {"memory_bytes": 80 << 20}]
    for more in variants:
        assert llmfp.scan(folder, backend=BACKEND, deep=True, **more).main.circuits == found.main.circuits
    split = write_model(tmp_path / "split", model.tensors, model.config, shards=3)
    assert llmfp.scan(split, backend=BACKEND, deep=True).main.circuits == found.main.circuits
    monkeypatch.setattr("llmfp.reader.pread_reader.PreadReader.step_bytes", 1)  # a unit a step: heads of 24 in 32 rows
    assert llmfp.scan(folder, backend=BACKEND, deep=True, reader="pread").main.circuits == found.main.circuits


@pytest.mark.parametrize("head_dim", [16, 48])
def test_heads_of_a_quantised_output_projection_need_not_begin_where_its_words_do(
    head_dim: int, tmp_path: Path
) -> None:
    """GPTQ packs 32 stored rows into words, and O's heads run along these."""
    rng, size = np.random.default_rng(2), 4 * head_dim
    cases = {role: gptq(size, size, rng) for role in "qkvo"}
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    folder = write_quantised(tmp_path / "all", {role: case.fields for role, case in cases.items()}, config, heads=4)
    q, k, v, o = ((cases[r].dense.T if r == "o" else cases[r].dense).reshape(4, head_dim, size) for r in "qkvo")
    found = llmfp.scan(folder, deep=True).main
    for name, x, y in (("qk_norm", q, k), ("ov_norm", v, o)):
        expected = [[np.log(np.linalg.norm(one.T @ two)) for one, two in zip(x, y, strict=True)]]
        np.testing.assert_allclose(found.circuit(name), expected, rtol=1e-6, err_msg=name)
    fields = {
        role: {"weight": case.dense.astype(np.float32)} if role == "k" else case.fields for role, case in cases.items()
    }
    mixed = llmfp.scan(write_quantised(tmp_path / "mixed", fields, config, heads=4), deep=True)
    assert mixed.main.circuits == (None,), "queries stored [in, out] and keys [out, in] are not multiplied"
    assert any("cannot be told apart" in caveat for caveat in mixed.caveats)


def test_a_kept_fingerprint_holds_its_circuits(tmp_path: Path) -> None:
    found = llmfp.scan(build("llama", layers=3).write(tmp_path / "model"), deep=True)
    found.save(tmp_path / "a.fp.safetensors")
    assert llmfp.load(tmp_path / "a.fp.safetensors") == found


def test_layers_without_rotary_embedding_have_spectra_and_no_coherence(tmp_path: Path) -> None:
    model = build("llama", layers=4)
    assert model.config is not None
    model.config |= {"model_type": "smollm3", "no_rope_layers": [1, 1, 0, 1]}
    _, tower = next(towers(model, tmp_path))
    coherent, spectrum = tower.circuit("coherence"), tower.circuit("qk_spectrum")
    assert coherent is not None
    assert spectrum is not None
    assert np.isnan(coherent).all(axis=1).tolist() == [False, False, True, False]
    assert np.isnan(spectrum).all(axis=(1, 2)).tolist() == [True, True, False, True]


@pytest.mark.parametrize(
    ("case", "said"),
    [("falcon", {"alibi": True}), ("baichuan", {"hidden_size": 5120}), ("gpt2", {"position_embedding_type": "alibi"})],
)
def test_config_json_says_whose_heads_differ_by_design(case: str, said: dict[str, Any], tmp_path: Path) -> None:
    model = build(case)
    assert model.config is not None
    model.config |= said
    _, tower = next(towers(model, tmp_path))
    assert tower.rotary is None
    assert tower.indexed_heads


@pytest.mark.parametrize(
    ("said", "pairs"),
    [
        ({"partial_rotary_factor": 0.25}, 2), ({"rotary_pct": 0.5}, 4), ({"rotary_dim": 12}, 6),
        ({"rotary_dim": 99}, 8),
        ({"rope_parameters": {"partial_rotary_factor": 0.75}}, 6), ({"partial_rotary_factor": "all"}, 8),
        ({"partial_rotary_factor": True}, 8), ({"rope_parameters": [0.5]}, 8),
        ({"partial_rotary_factor": 1e-9}, None),
    ],
)  # fmt: skip
def test_config_json_says_how_much_of_a_head_is_turned(said: dict[str, Any], pairs: int | None, tmp_path: Path) -> None:
    model = build("llama", head_dim=16)
    assert model.config is not None
    model.config |= said
    _, tower = next(towers(model, tmp_path))
    assert tower.rotary == (None if pairs is None else Rotary(pairs, False))


def test_where_heads_cannot_be_told_apart_a_caveat_says_so(tmp_path: Path) -> None:
    found = llmfp.scan(build("llama", layers=3).write(tmp_path, config=False), deep=True)
    assert found.main.circuits == (None, None, None)
    assert any("in 3 decoder layers heads cannot be told apart" in caveat for caveat in found.caveats)


def test_a_weight_that_is_not_finite_leaves_its_layer_without_circuits(tmp_path: Path) -> None:
    model = build("llama", layers=3)
    name = "model.layers.1.self_attn.k_proj.weight"
    broken = np.array(model.tensors[name])
    broken[3, 5] = np.nan
    found = llmfp.scan(write_model(tmp_path, {**model.tensors, name: broken}, model.config), deep=True)
    assert found.main.circuits is not None
    assert [each is None for each in found.main.circuits] == [False, True, False]
    assert any("decoder layer 1 have no circuits" in caveat for caveat in found.caveats)


def test_a_budget_too_small_for_multiplying_heads_is_refused_before_reading(tmp_path: Path) -> None:
    folder = build("llama", heads=8, kv_heads=8, head_dim=64, hidden=512).write(tmp_path)
    llmfp.scan(folder, memory_bytes=20 << 20)
    with pytest.raises(PlanError) as refused:
        llmfp.scan(folder, memory_bytes=20 << 20, deep=True)
    needed = re.search(r"needs a memory budget of (\d+)MiB", str(refused.value))
    assert needed is not None
    assert "--no-deep" in refused.value.hint
    llmfp.scan(folder, memory_bytes=int(needed[1]) << 20, deep=True)


def test_circuits_of_other_sizes_compare_unequal() -> None:
    one = circuits.Circuits(b"12345678", None, b"12", b"12", None, None)
    assert one == replace(one)
    assert one != replace(one, coherence=b"13")


def test_products_beyond_a_float_are_no_circuits_and_no_warning(tmp_path: Path) -> None:
    model = build("llama", layers=2)
    model.tensors["model.layers.1.self_attn.q_proj.weight"] = np.full((32, 24), 3e38, np.float32)
    found = llmfp.scan(model.write(tmp_path), deep=True, backend=BACKEND)
    assert found.main.circuits is not None
    assert [each is None for each in found.main.circuits] == [False, True]
    assert any("the heads of decoder layer 1 have no circuits" in caveat for caveat in found.caveats)
