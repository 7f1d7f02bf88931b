"""Circuits of latent attention: those of its effective weights, in the latents and in the residual stream; no rewrite
that leaves what a layer computes moves them; and two models are compared by them as any others.

What a layer computes is written down here, from the models' own code.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
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
from tests.checkpoints import BACKEND, LAYOUTS, Model, build, stored, write_model
from tests.test_circuits import loops
from tests.test_encoding_gptq import gptq

RNG = np.random.default_rng(8)
Float64 = NDArray[np.float64]
V3, LITE = "deepseek", "deepseek, V2-Lite"
"""Queries made of a latent, and of the residual stream."""


@dataclass(frozen=True)
class Weights:
    """One layer's stored weights W [out, in], with the gains of its three norms; `ranks` and sizes follow from shapes.

    q_a is None where q reads the residual stream.
    """

    q_a: Float64 | None
    q: Float64
    kv_a: Float64
    kv_b: Float64
    o: Float64
    before: Float64
    q_gain: Float64
    kv_gain: Float64
    heads: int
    nope: int

    @property
    def rope(self) -> int:
        return len(self.kv_a) - self.kv_b.shape[1]

    @property
    def queries(self) -> tuple[Float64, Float64]:
        """Effective rows that are not turned, and those that are: [heads, nope, …], [heads, rope, …]."""
        gain = self.before if self.q_a is None else self.q_gain
        by_head = (self.q * gain).reshape(self.heads, -1, self.q.shape[1])
        return by_head[:, : self.nope], by_head[:, self.nope :]

    @property
    def keys(self) -> tuple[Float64, Float64]:
        """[heads, nope, latent], and the one that all heads share, [rope, hidden]."""
        by_head = (self.kv_b * self.kv_gain).reshape(self.heads, -1, self.kv_b.shape[1])
        return by_head[:, : self.nope], (self.kv_a * self.before)[self.kv_b.shape[1] :]

    @property
    def values(self) -> Float64:
        """[heads, value, latent]."""
        return (self.kv_b * self.kv_gain).reshape(self.heads, -1, self.kv_b.shape[1])[:, self.nope :]

    @property
    def outputs(self) -> Float64:
        """[heads, value, hidden]."""
        return self.o.T.reshape(self.heads, -1, len(self.o))


def drawn(rng: np.random.Generator, *, latent: bool, heads: int = 4, hidden: int = 24) -> Weights:
    """Sizes that all differ: nope 6, rope 4, value 5, latents of 10 and 14."""
    nope, rope, value, q_rank, kv_rank = 6, 4, 5, 10, 14
    gains = [rng.uniform(0.5, 2, size) for size in (hidden, q_rank, kv_rank)]
    return Weights(
        rng.normal(size=(q_rank, hidden)) if latent else None,
        rng.normal(size=(heads * (nope + rope), q_rank if latent else hidden)),
        rng.normal(size=(kv_rank + rope, hidden)),
        rng.normal(size=(heads * (nope + value), kv_rank)),
        rng.normal(size=(hidden, heads * value)),
        *gains, heads, nope,
    )  # fmt: skip


def of_model(model: Model, layer: int) -> Weights:
    """The weights that were drawn for a golden checkpoint."""
    weights = {role: w for (_, at, role), w in model.weights.items() if at == layer}
    norm, q_gain, kv_gain = (
        model.vectors.get(("decoder", layer, name), np.ones(0)) for name in ("norm", "q_latent_norm", "kv_latent_norm")
    )
    q = weights["q_b"] if "q_b" in weights else weights["q"]
    rope = len(weights["kv_a"]) - weights["kv_b"].shape[1]
    return Weights(
        weights.get("q_a"), q, weights["kv_a"], weights["kv_b"], weights["o"], norm, q_gain, kv_gain,
        model.heads, len(q) // model.heads - rope,
    )  # fmt: skip


def normed(x: Float64) -> Float64:
    return x / np.sqrt(np.square(x).mean(axis=1, keepdims=True))


def pairs_of(rows: int, interleaved: bool) -> list[tuple[int, int]]:
    half = rows // 2
    return [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]


def times(x: Float64, factors: NDArray[np.complex128], interleaved: bool) -> Float64:
    """Pair i of the rows [..., rope, n], as one complex row, times factor i."""
    y = x.copy()
    for (a, b), factor in zip(pairs_of(x.shape[-2], interleaved), factors, strict=True):
        row = (x[..., a, :] + 1j * x[..., b, :]) * factor
        y[..., a, :], y[..., b, :] = row.real, row.imag
    return y


def computed(w: Weights, x: Float64, interleaved: bool) -> Float64:
    """What a layer adds to the residual stream x [tokens, hidden]; one head and one token at a time where it counts."""
    x = normed(x) * w.before
    reads = x if w.q_a is None else normed(x @ w.q_a.T) * w.q_gain
    rank, tokens = w.kv_b.shape[1], len(x)
    compressed = x @ w.kv_a.T
    latent, shared = normed(compressed[:, :rank]) * w.kv_gain, compressed[:, rank:]
    q, kv = (reads @ w.q.T).reshape(tokens, w.heads, -1), (latent @ w.kv_b.T).reshape(tokens, w.heads, -1)
    speed = 10000.0 ** (-np.arange(w.rope // 2) / (w.rope // 2))
    out = np.zeros((tokens, w.heads, kv.shape[2] - w.nope))

    def at(position: int, rows: Float64) -> Float64:
        return times(rows[:, None], np.exp(1j * position * speed), interleaved)[:, 0]

    for head in range(w.heads):
        for t in range(tokens):
            scores = np.array([
                q[t, head, : w.nope] @ kv[s, head, : w.nope] + at(t, q[t, head, w.nope :]) @ at(s, shared[s])
                for s in range(t + 1)
            ])  # fmt: skip
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ kv[: t + 1, head, w.nope :]
    return out.reshape(tokens, -1) @ w.o.T


def orthogonal(rng: np.random.Generator, size: int) -> Float64:
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def rewritten(
    w: Weights, rng: np.random.Generator, stream: Float64, interleaved: bool, order: NDArray[np.intp] | None = None
) -> Weights:
    """The same layer on a residual stream turned by `stream`, written another way: both latents turned and their norms
    folded, invertible maps inside the rows that are not turned and the values, every pair of those that are multiplied,
    norm folded, and heads in another order."""
    order = np.arange(w.heads) if order is None else order
    (q, q_turned), (k, k_turned), v, o = w.queries, w.keys, w.values, w.outputs
    inside = rng.normal(size=(w.heads, w.nope, w.nope)) + 2 * np.eye(w.nope)
    of_values = rng.normal(size=(w.heads, v.shape[1], v.shape[1])) + 2 * np.eye(v.shape[1])
    factors = np.exp(0.5 * rng.normal(size=w.rope // 2) + 1j * rng.uniform(0, 2 * np.pi, w.rope // 2))
    q, k = inside @ q, np.linalg.inv(inside).swapaxes(1, 2) @ k
    v, o = of_values @ v, np.linalg.inv(of_values).swapaxes(1, 2) @ o
    q_turned, k_turned = times(q_turned, factors, interleaved), times(k_turned, 1 / factors.conj(), interleaved)
    turn_kv = orthogonal(rng, k.shape[2])
    q_a, turn_q = None, stream
    if w.q_a is not None:
        turn_q = orthogonal(rng, q.shape[2])
        q_a = 3 * turn_q.T @ (w.q_a * w.before) @ stream  # the norm behind it takes any scale away
    rank = w.kv_b.shape[1]
    kv_a = np.concatenate([turn_kv.T @ (w.kv_a * w.before)[:rank], k_turned]) @ stream
    queries = np.concatenate([q, q_turned], axis=1)[order] @ turn_q
    kv_b = np.concatenate([k, v], axis=1)[order] @ turn_kv
    gains = [rng.uniform(0.5, 2, size) for size in (queries.shape[2], rank)]
    if w.q_a is None:
        gains[0] = np.ones(queries.shape[2])
    return replace(
        w, q_a=q_a, q=(queries / gains[0]).reshape(w.q.shape), kv_a=kv_a, kv_b=(kv_b / gains[1]).reshape(w.kv_b.shape),
        o=(o[order] @ stream).reshape(-1, len(w.o)).T, before=np.ones(len(w.before)),
        q_gain=gains[0] if w.q_a is not None else w.q_gain, kv_gain=gains[1],
    )  # fmt: skip


def entries(w: Weights, rotary: Rotary) -> Float64:
    """Every head's coherence, by the code under test, from float64 Gram matrices."""
    turned = turned_of(w, rotary)
    key = np.repeat(turned.k, w.heads, axis=0)
    return coherence(turned.q, key, turned.qk, turned.inputs, rotary)


def turned_of(w: Weights, rotary: Rotary) -> Turned:
    q, k = w.queries[1], w.keys[1]
    qk = q @ k.T if w.q_a is None else None
    return Turned(q @ q.swapaxes(1, 2), (k @ k.T)[None], qk, (q.shape[2], k.shape[1]), rotary)


def kept(w: Weights, rotary: Rotary | None) -> circuits.Circuits:
    q, k, v, o = (x @ x.swapaxes(1, 2) for x in (w.queries[0], w.keys[0], w.values, w.outputs))
    found = circuits.circuits(Grams(q, k, v, o, turned_of(w, rotary) if rotary else None))
    assert found is not None
    return found


def log_norms(w: Weights) -> dict[str, list[float]]:
    """log ‖QᵀK‖ of the rows that are not turned, and log ‖O·V‖, multiplied out."""
    pairs = {"qk_norm": (w.queries[0], w.keys[0]), "ov_norm": (w.outputs, w.values)}
    return {
        name: [float(np.log(np.linalg.norm(one.T @ two))) for one, two in zip(*each, strict=True)]
        for name, each in pairs.items()
    }


# --- the statistics by themselves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("latent", [True, False])
def test_no_rewrite_that_leaves_what_a_layer_computes_moves_its_circuits(latent: bool, interleaved: bool) -> None:
    """All at once, to 1e-9; the outputs are equal, so these are rewrites. A map that mixes two pairs is not one."""
    w, rotary = drawn(RNG, latent=latent), Rotary(2, interleaved)
    stream = orthogonal(RNG, 24)
    other = rewritten(w, RNG, stream, interleaved)
    x = RNG.normal(size=(5, 24))
    np.testing.assert_allclose(
        computed(other, x @ stream, interleaved), computed(w, x, interleaved) @ stream, rtol=1e-9
    )
    np.testing.assert_allclose(entries(other, rotary), entries(w, rotary), rtol=0, atol=1e-9)
    for name, expected in log_norms(w).items():
        for each in (w, other):
            np.testing.assert_allclose(np.frombuffer(getattr(kept(each, rotary), name)), expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        np.frombuffer(kept(other, None).qk_spectrum or b"", np.float16).astype(float),
        np.frombuffer(kept(w, None).qk_spectrum or b"", np.float16).astype(float), atol=5e-3,
    )  # fmt: skip
    (a, _), (b, _) = pairs_of(4, interleaved)
    by_head = w.q.reshape(w.heads, -1, w.q.shape[1]).copy()
    rows = [w.nope + a, w.nope + b]
    by_head[:, rows] = np.array([[0.8, 0.6], [-0.6, 0.8]]) @ by_head[:, rows]
    mixed = replace(w, q=by_head.reshape(w.q.shape))
    assert np.abs(computed(mixed, x, interleaved) - computed(w, x, interleaved)).max() > 1e-3
    assert np.abs(entries(mixed, rotary) - entries(w, rotary)).max() > 0.05


def test_the_shared_key_leaves_one_number_per_pair_and_entries_allow_one_per_head() -> None:
    """Turning and scaling a pair of one head's queries alone changes what a layer computes, but no entry."""
    w, rotary = drawn(RNG, latent=False), Rotary(2, True)
    by_head = w.q.reshape(w.heads, -1, w.q.shape[1]).copy()
    by_head[1, w.nope :] = times(by_head[1, w.nope :], np.array([2 * np.exp(0.7j), 1]), True)
    other = replace(w, q=by_head.reshape(w.q.shape))
    x = RNG.normal(size=(5, 24))
    assert np.abs(computed(other, x, True) - computed(w, x, True)).max() > 1e-3
    np.testing.assert_allclose(entries(other, rotary), entries(w, rotary), rtol=0, atol=1e-9)


@pytest.mark.parametrize("crossed", [True, False])
def test_entries_are_those_of_complex_rows_in_spaces_of_their_own(crossed: bool) -> None:
    q, k = RNG.normal(size=(3, 8, 20)), RNG.normal(size=(1, 8, 20 if crossed else 30))
    rotary, qk = Rotary(4, True), q @ k[0].T if crossed else None
    expected = [loops(one, k[0], rotary, crossed=crossed) for one in q]
    repeated = (k @ k.swapaxes(1, 2)).repeat(3, axis=0)
    found = coherence(q @ q.swapaxes(1, 2), repeated, qk, (20, k.shape[2]), rotary)
    assert found.shape == (3, 48 if crossed else 32)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


# --- through a scan --------------------------------------------------------------------------------------------------


def check(folder: Path, layers: list[Weights], rotary: Rotary | None, **more: Any) -> llmfp.Fingerprint:
    """A deep scan against float64 on the effective weights."""
    found = llmfp.scan(folder, backend=BACKEND, deep=True, **more)
    main = found.main
    assert (main.rotary, main.kv_heads) == (rotary, None)
    crossed = layers[0].q_a is None
    for i, w in enumerate(layers):
        for name, expected in log_norms(w).items():
            norms = main.circuit(name)
            assert norms is not None
            np.testing.assert_allclose(norms[i], expected, rtol=1e-5, err_msg=f"{i} {name}")
        average, heads = main.circuit("coherence"), main.circuit("head_coherence")
        if rotary is None:
            assert average is heads is None
            spectrum = main.circuit("qk_spectrum")
            assert spectrum is not None
            q, k = w.queries[0], w.keys[0]
            want = spectra(q @ q.swapaxes(1, 2), k @ k.swapaxes(1, 2))
            np.testing.assert_allclose(spectrum[i].astype(float), want, atol=0.02)
        else:
            assert average is not None
            assert heads is not None
            want = np.array([loops(each, w.keys[1], rotary, crossed=crossed) for each in w.queries[1]])
            np.testing.assert_allclose(average[i].astype(float), want.mean(axis=0), atol=5e-3)
            np.testing.assert_allclose(heads[i].astype(float), sketch(want), atol=0.02)
    return found


@pytest.mark.parametrize(
    ("case", "said", "rotary"),
    [
        (V3, {}, Rotary(4, True)), (LITE, {}, Rotary(4, True)),
        (V3, {"model_type": "kimi_k2"}, Rotary(4, True)), (V3, {"model_type": "glm4_moe_lite"}, Rotary(4, True)),
        (V3, {"rope_interleave": False}, Rotary(4, False)), (V3, {"model_type": "minicpm3"}, Rotary(4, False)),
        (LITE, {"model_type": "kimi_linear"}, None), (V3, {"partial_rotary_factor": 0.5}, Rotary(4, True)),
        (V3, {"qk_rope_head_dim": 2, "head_dim": 64}, Rotary(4, True)),
    ],
)  # fmt: skip
def test_circuits_are_those_of_the_effective_weights(
    case: str, said: dict[str, Any], rotary: Rotary | None, tmp_path: Path
) -> None:
    """How many rows are turned is what the shapes say; which rows make a pair differs between models of one layout, and
    Kimi-Linear turns none."""
    model = build(case, head_dim=16, hidden=40)
    assert model.config is not None
    model.config |= said
    check(model.write(tmp_path), [of_model(model, layer) for layer in (0, 1)], rotary)


@pytest.mark.parametrize("case", [V3, LITE])
def test_nothing_changes_circuits_or_digest_and_no_byte_is_read_twice(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads, budget, reader, shards, steps that cut heads anywhere: the same bits. Units of 32 rows, heads of 36."""
    monkeypatch.setattr("llmfp.marginals.UNIT_ELEMENTS", 1)
    model = build(case, layers=3, heads=6, head_dim=24, hidden=96)
    folder = model.write(tmp_path / "whole")
    plain = llmfp.scan(folder, backend=BACKEND)
    found = check(folder, [of_model(model, layer) for layer in range(3)], Rotary(6, True), threads=1)
    assert found.digest == plain.digest
    assert found.run["bytes_read"] == plain.run["bytes_read"]
    for more in ({"threads": 4}, {"memory_bytes": 80 << 20}):
        assert llmfp.scan(folder, backend=BACKEND, deep=True, **more).main.circuits == found.main.circuits
    split = write_model(tmp_path / "split", model.tensors, model.config, shards=3)
    assert llmfp.scan(split, backend=BACKEND, deep=True).main.circuits == found.main.circuits
    monkeypatch.setattr("llmfp.reader.pread_reader.PreadReader.step_bytes", 1)
    got: list[int] = []
    preadv = os.preadv

    def counted(*arguments: Any) -> int:
        got.append(preadv(*arguments))
        return got[-1]

    monkeypatch.setattr(os, "preadv", counted)
    assert (
        llmfp.scan(folder, backend=BACKEND, deep=True, reader="pread", threads=3).main.circuits == found.main.circuits
    )
    wanted = [len(stored(tensor).content) for name, tensor in model.tensors.items() if "proj" in name or "norm" in name]
    assert sum(got) == sum(wanted)


def test_the_gain_of_a_latent_is_in_products_and_not_in_what_the_digest_covers(tmp_path: Path) -> None:
    model = build(V3)
    name = "model.layers.1.self_attn.kv_a_layernorm.weight"
    doubled = {**model.tensors, name: 2 * np.array(model.tensors[name])}
    one = llmfp.scan(model.write(tmp_path / "one"), deep=True)
    two = llmfp.scan(write_model(tmp_path / "two", doubled, model.config), deep=True)
    assert one.digest == two.digest
    for norm in ("qk_norm", "ov_norm"):
        difference = np.subtract(two.main.circuit(norm), one.main.circuit(norm))
        np.testing.assert_allclose(difference, [[0] * 4, [np.log(2)] * 4], atol=1e-6)
    assert two.main.roles["kv_latent_norm"]["mean"][1] == pytest.approx(2 * one.main.roles["kv_latent_norm"]["mean"][1])


@pytest.mark.parametrize("latent", [True, False])
def test_circuits_of_weights_stored_in_by_out(latent: bool, tmp_path: Path) -> None:
    """GPTQ turns every factor: heads run along the stored columns, O's along the stored rows, 16 to each 32."""
    heads, nope, rope, value, hidden, rank = 4, 16, 8, 16, 64, 32
    rng = np.random.default_rng(3)
    sizes = {
        "q_b_proj" if latent else "q_proj": (rank if latent else hidden, heads * (nope + rope)),
        "kv_a_proj_with_mqa": (hidden, rank + rope), "kv_b_proj": (rank, heads * (nope + value)),
        "o_proj": (heads * value, hidden),
    }  # fmt: skip
    sizes |= {"q_a_proj": (hidden, rank)} if latent else {}
    cases = {name: gptq(*size, rng) for name, size in sizes.items()}
    block = "model.layers.0.self_attn"
    tensors = {f"{block}.{name}.{field}": t for name, case in cases.items() for field, t in case.fields.items()}
    gains = {name: rng.uniform(0.5, 2, size).astype(np.float32) for name, size in (
        ("input_layernorm", hidden), ("self_attn.q_a_layernorm", rank), ("self_attn.kv_a_layernorm", rank),
    )}  # fmt: skip
    tensors |= {f"model.layers.0.{name}.weight": gain for name, gain in gains.items()}
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    config = {"model_type": "deepseek_v3", "num_attention_heads": heads, "quantization_config": quantised}
    dense = {name: case.dense for name, case in cases.items()}
    weights = Weights(
        dense.get("q_a_proj"), dense["q_b_proj" if latent else "q_proj"], dense["kv_a_proj_with_mqa"],
        dense["kv_b_proj"], dense["o_proj"], *(gain.astype(np.float64) for gain in gains.values()), heads, nope,
    )  # fmt: skip
    check(write_model(tmp_path, tensors, config), [weights], Rotary(4, True))


def test_a_kept_fingerprint_holds_its_circuits(tmp_path: Path) -> None:
    found = llmfp.scan(build(V3, layers=3).write(tmp_path / "model"), deep=True)
    found.save(tmp_path / "a.fp.safetensors")
    assert llmfp.load(tmp_path / "a.fp.safetensors") == found


def test_layers_that_cannot_be_told_apart_have_no_circuits_and_a_caveat(tmp_path: Path) -> None:
    """One with other rows turned than most, one without a factor, one with a weight that is not finite."""
    model, other = build(V3, layers=5, head_dim=8), build(V3, layers=5, head_dim=12)
    block = "model.layers.{}.self_attn"
    for name in LAYOUTS[V3][0].factors.values():
        model.tensors[f"{block.format(1)}.{name.removeprefix('self_attn.')}"] = other.tensors[
            f"{block.format(1)}.{name.removeprefix('self_attn.')}"
        ]
    del model.tensors[f"{block.format(2)}.kv_b_proj.weight"]
    name = f"{block.format(3)}.q_b_proj.weight"
    broken = np.array(model.tensors[name])
    broken[-1, 0] = np.nan  # of the last head's last row, which is turned
    model.tensors[name] = broken
    found = llmfp.scan(model.write(tmp_path), deep=True)
    assert found.main.circuits is not None
    assert [each is None for each in found.main.circuits] == [False, True, True, True, False]
    assert any("in 2 decoder layers heads cannot be told apart" in caveat for caveat in found.caveats)
    assert any("decoder layer 3 have no circuits" in caveat for caveat in found.caveats)


def test_a_gain_that_is_not_finite_is_taken_as_1(tmp_path: Path) -> None:
    model = build(LITE, head_dim=16)
    name = "model.layers.0.self_attn.kv_a_layernorm.weight"
    model.tensors[name] = np.full(14, np.inf, np.float32)
    weights = replace(of_model(model, 0), kv_gain=np.ones(14)), of_model(model, 1)
    found = check(model.write(tmp_path), list(weights), Rotary(4, True))
    assert any(name in caveat and "taken as 1" in caveat for caveat in found.caveats)


@pytest.mark.parametrize("case", [V3, LITE])
def test_the_budget_that_a_refusal_asks_for_is_enough(case: str, tmp_path: Path) -> None:
    """Products of all heads, and of V2-Lite the key that is kept for the queries."""
    model = build(case, layers=2, heads=16, head_dim=64, hidden=256)
    folder = model.write(tmp_path)
    llmfp.scan(folder, memory_bytes=24 << 20)
    with pytest.raises(PlanError) as refused:
        llmfp.scan(folder, memory_bytes=24 << 20, deep=True)
    needed = re.search(r"needs a memory budget of (\d+)MiB", str(refused.value))
    assert needed is not None
    assert "--no-deep" in refused.value.hint
    llmfp.scan(folder, memory_bytes=int(needed[1]) << 20, deep=True)
    with pytest.raises(PlanError):
        llmfp.scan(folder, memory_bytes=int(needed[1]) - 1 << 20, deep=True)


# --- two models ------------------------------------------------------------------------------------------------------


def written(folder: Path, layers: list[Weights]) -> llmfp.Fingerprint:
    """The fingerprint of a checkpoint of these layers."""
    tensors: dict[str, NDArray[Any]] = {}
    for i, w in enumerate(layers):
        named = {
            "self_attn.q_a_proj": w.q_a, "self_attn.q_proj" if w.q_a is None else "self_attn.q_b_proj": w.q,
            "self_attn.kv_a_proj_with_mqa": w.kv_a, "self_attn.kv_b_proj": w.kv_b, "self_attn.o_proj": w.o,
            "input_layernorm": w.before, "self_attn.kv_a_layernorm": w.kv_gain,
            "self_attn.q_a_layernorm": None if w.q_a is None else w.q_gain,
        }  # fmt: skip
        tensors |= {
            f"model.layers.{i}.{name}.weight": x.astype(np.float32) for name, x in named.items() if x is not None
        }
    config = {"model_type": "deepseek_v3", "num_attention_heads": layers[0].heads}
    return llmfp.scan(write_model(folder, tensors, config), backend=BACKEND, deep=True)


@pytest.mark.parametrize("latent", [True, False])
def test_a_model_written_another_way_is_related_to_itself_and_not_to_another(latent: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(21)
    layers, strangers = ([drawn(rng, latent=latent, heads=6) for _ in range(12)] for _ in range(2))
    stream = orthogonal(rng, 24)
    base, other = written(tmp_path / "base", layers), written(tmp_path / "other", strangers)
    same = written(tmp_path / "same", [rewritten(w, rng, stream, True) for w in layers])
    found = llmfp.compare(base, same)
    assert found.verdict == "related"
    assert found.coherence is not None
    assert found.coherence.counts
    assert found.coherence.layer_map == tuple((i, i) for i in range(12))
    assert found.heads is not None
    assert (found.heads.heads, found.heads.kv_heads) == (6, 6)
    assert found.heads.p_value < 1e-4
    assert found.heads.blocks == ("norms", "coherence")
    permuted = [rewritten(w, rng, stream, True, rng.permutation(6)) for w in layers]
    found = llmfp.compare(base, written(tmp_path / "permuted", permuted))
    assert (found.verdict, found.decision.rests_on) == ("related", ("coherence",))
    found = llmfp.compare(base, other)
    assert found.verdict != "related"
    assert found.coherence is not None
    assert not found.coherence.counts


def test_models_with_and_without_a_latent_for_queries_are_not_compared_by_entries(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    one, two = (
        written(tmp_path / str(latent), [drawn(rng, latent=latent) for _ in range(8)]) for latent in (True, False)
    )
    assert one.main.head_dim == two.main.head_dim
    found = llmfp.compare(one, two)
    assert found.coherence is None
    assert "queries read a latent" in found.lost["coherence"]
