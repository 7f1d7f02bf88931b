"""The lineage laboratory, in miniature: what its specimens are said to be, they are.

Every rewrite is proven by equal logits in float64, every format by what llmfp reads back, every derivation by its shape
and by what it computes; and a whole laboratory of two layers runs from nothing to its manifest.
"""

from __future__ import annotations

import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import llmfp
from bench.lineage import derive, edits, models, plot, quantise, report, rewrites, specimens, statistics, text, train
from bench.lineage.__main__ import run
from bench.lineage.laboratory import Laboratory
from bench.lineage.models import Model, initialise, llama_config, opt_config
from bench.lineage.pairs import pairs, relation
from bench.lineage.train import Recipe, evaluate

SIZES = {"layers": 2, "hidden": 64, "heads": 4}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three texts of words that follow one another by rules, in place of the machine's own files."""

    def corpus(name: str) -> text.Corpus:
        rng = np.random.default_rng(list(name.encode()))
        words = [bytes(rng.integers(97, 123, rng.integers(2, 6), np.uint8)) for _ in range(20)]
        follows = rng.integers(0, len(words), (len(words), 2))
        word, said = 0, list[bytes]()
        for step in rng.integers(0, 2, 8000):
            said.append(words[word])
            word = follows[word, step]
        whole = torch.frombuffer(bytearray(b" ".join(said)), dtype=torch.uint8)
        return text.Corpus(whole[:-6000], whole[-6000:])

    for module in (text, train):
        monkeypatch.setattr(module, "corpus", corpus)
    monkeypatch.setattr("bench.lineage.laboratory.corpus", corpus)
    monkeypatch.setattr(train, "VALIDATION_WINDOWS", 16)
    monkeypatch.setattr(train, "CALIBRATION_WINDOWS", 16)


def model(kind: str = "llama", dtype: torch.dtype = torch.float64) -> Model:
    """Random, with gains and biases that matter."""
    made = initialise(llama_config(**SIZES, kv_heads=2, mlp=96) if kind == "llama" else opt_config(**SIZES, mlp=96), 1)
    generator = torch.Generator().manual_seed(2)
    for name, weight in made.weights.items():
        drawn = torch.randn(weight.shape, generator=generator)
        made.weights[name] = weight + 0.3 * drawn if weight.dim() == 1 else 2 * weight
    return made.to(dtype)


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(256, (rows, 24), generator=torch.Generator().manual_seed(3))


def changed(before: Model, after: Model) -> set[str]:
    return {
        name
        for name in before.weights
        if name not in after.weights
        or before.weights[name].shape != after.weights[name].shape
        or not torch.equal(before.weights[name], after.weights[name])
    }


@pytest.mark.parametrize(
    ("kind", "label"), [*(("llama", each) for each in rewrites.LLAMA), *(("opt", each) for each in rewrites.OPT)]
)
def test_rewrites_change_weights_and_no_logit(kind: str, label: str) -> None:
    before = model(kind)
    kept = before.to(torch.float64)
    after = (rewrites.LLAMA if kind == "llama" else rewrites.OPT)[label](before, 7)
    assert rewrites.same_logits(before, after, tokens()) < 1e-12
    assert not changed(kept, before)  # the parent is left as it was
    touched = changed(before, after)
    assert any("self_attn" in name for name in touched) or label == "permute neurons"
    again = (rewrites.LLAMA if kind == "llama" else rewrites.OPT)[label](before, 7)
    assert not changed(after, again)
    if label == "all rewrites":
        assert {name for name in before.weights if "norm" not in name} <= touched


def test_all_rewrites_of_experts_change_no_logit() -> None:
    before = derive.upcycle(model(), experts=4, seed=1).to(torch.float64)
    assert rewrites.same_logits(before, rewrites.all_rewrites(before, 5), tokens()) < 1e-12


@pytest.mark.parametrize("label", [*quantise.FORMATS, *quantise.GGUF])
def test_formats_hold_what_llmfp_reads_back(label: str, tmp_path: Path) -> None:
    before = model(dtype=torch.float32)
    after = quantise.write(before, label, tmp_path / "model", train.second_moments(before, "python"))
    found = llmfp.scan(tmp_path / "model").main
    for layer, block in enumerate(after.blocks):
        for role in "qkvo":
            name = f"{block}self_attn.{role}_proj.weight"
            stands_for = after.weights[name].double().numpy()
            np.testing.assert_allclose(found.std[role][layer], stands_for.std(), rtol=1e-6, err_msg=name)
            error = (after.weights[name] - before.weights[name]).norm() / before.weights[name].norm()
            assert 1e-5 < error < 0.7, name
    assert changed(before, after) == {name for name in before.weights if quantise.quantised(name)}


def test_gptq_makes_up_for_what_it_rounds() -> None:
    """Its output is closer than that of rounding to nearest, though its weights are further off."""
    rng = np.random.default_rng(0)
    read = rng.normal(size=(400, 16)) @ rng.normal(size=(16, 64)) + 0.1 * rng.normal(size=(400, 64))
    weight = rng.normal(size=(48, 64))
    rounded, compensated = (
        quantise.gptq(weight, moments, bits=2)[1] for moments in (np.eye(64), read.T @ read / len(read))
    )
    off = [np.square(each - weight).sum() for each in (rounded, compensated)]
    wrong = [np.square(read @ (each - weight).T).sum() for each in (rounded, compensated)]
    assert off[0] < off[1]
    assert wrong[1] < 0.7 * wrong[0]


def test_layers_are_copied_as_chosen() -> None:
    before = model()
    stacked = derive.with_layers(before, [0, 1, 0, 1])
    assert stacked.config["num_hidden_layers"] == len(stacked.blocks) == 4
    assert models.shapes(stacked.config).keys() == stacked.weights.keys()
    for place, layer in enumerate([0, 1, 0, 1]):
        name = "self_attn.o_proj.weight"
        copy, original = (
            stacked.weights[f"model.layers.{place}.{name}"],
            before.weights[f"model.layers.{layer}.{name}"],
        )
        assert torch.equal(copy, original)
    back = derive.with_layers(stacked, [2, 3])
    assert not changed(before, back)


def test_experts_compute_what_the_mlp_did_until_they_are_told_apart() -> None:
    before = model()
    after = derive.upcycle(before, experts=4, seed=1, noise=0.0).to(torch.float64)
    assert rewrites.same_logits(before, after, tokens()) < 1e-12
    assert changed(before, derive.upcycle(before, experts=4, seed=1)) == {
        name for name in before.weights if "mlp" in name
    }


def test_narrowing_keeps_what_is_large() -> None:
    before = model()
    for name, weight in before.weights.items():  # coordinates and neurons from 48 and 72 on are dead
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[48:] = 0
        if name.endswith("embed_tokens.weight"):
            weight[:, 48:] = 0
        if name.endswith("down_proj.weight"):
            weight[:, 72:] = 0
    after = derive.narrow(before, 48, 72)
    assert {name: tuple(weight.shape) for name, weight in after.weights.items()} == models.shapes(after.config)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(after.weights[name], before.weights[name][:, :48])
    scale = (64 / 48) ** 0.5  # the RMS over fewer coordinates is larger; epsilon is negligible
    for name, weight in after.weights.items():
        if "norm" in name:
            after.weights[name] = weight * scale
    assert rewrites.same_logits(before, after, tokens()) < 1e-4


def test_an_average_lies_between_its_parents() -> None:
    first, second = model(), rewrites.permute_residual(model(), 3)
    middle = derive.average(first, second)
    for name, weight in middle.weights.items():
        torch.testing.assert_close(2 * weight, first.weights[name] + second.weights[name])


def test_lora_changes_attention_by_so_many_ranks() -> None:
    before = model(dtype=torch.float32)
    after = derive.tune_lora(before, Recipe("c", 2000, seed=1), rank=3)
    assert changed(before, after) == {name for name in before.weights if "_proj" in name and "attn" in name}
    for name in changed(before, after):
        assert torch.linalg.matrix_rank((after.weights[name] - before.weights[name]).double(), rtol=1e-4) == 3


def test_training_learns_and_is_repeatable() -> None:
    before, recipe = model(dtype=torch.float32), Recipe("python", 14_000, seed=1, cosine=True)
    after = train.train(before, recipe)
    assert evaluate(after, "python") < text.corpus("python").unigram_loss < evaluate(before, "python")
    assert not changed(after, train.train(before, recipe))
    student = train.distil(initialise(before.config, 9), after, Recipe("python", 14_000, seed=2))
    assert evaluate(student, "python") < text.corpus("python").unigram_loss


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_noise_is_of_the_size_stated_and_only_in_attention(kind: str) -> None:
    before = model(kind, torch.float32)
    after = edits.add_noise(before, 0.5, 1)
    assert changed(before, after) == {
        name for name in before.weights if "self_attn." in name and name.endswith("weight")
    }
    name = next(name for name in before.weights if "q_proj.weight" in name)
    added = after.weights[name] - before.weights[name]
    assert added.std() / before.weights[name].std() == pytest.approx(0.5, rel=0.05)


def test_weak_directions_are_those_that_carry_little() -> None:
    """Noise of the same size costs less there than everywhere, and nothing where nothing is read."""
    trained = train.train(model(dtype=torch.float32), Recipe("python", 8_000, seed=1))
    weak, anywhere = (
        edits.disturb_weak(trained, 1.0, 0.5, "python", 1),
        edits.disturb_weak(trained, 1.0, 1.0, "python", 1),
    )
    lost = [evaluate(each, "python") - evaluate(trained, "python") for each in (weak, anywhere)]
    assert lost[0] < 0.5 * lost[1]
    name = "model.layers.1.self_attn.q_proj.weight"
    added = (weak.weights[name] - trained.weights[name]).double()
    assert added.std() / trained.weights[name].std() == pytest.approx(1.0, rel=0.05)
    assert torch.linalg.matrix_rank(added, rtol=1e-4) <= 32


def test_slow_pairs_may_be_mixed_where_positions_hardly_differ() -> None:
    before = model()
    after = edits.mix_slow_pairs(before, 2, 1).to(torch.float64)
    assert {name.split(".")[-2] for name in changed(before, after)} == {"q_proj", "k_proj"}
    still = {**before.config, "rope_theta": 1e12}  # pairs after the first hardly turn at all
    assert rewrites.same_logits(Model(still, before.weights), Model(still, after.weights), tokens()) < 1e-4


def test_zeroed_heads_are_the_weakest() -> None:
    before = model()
    name = "model.layers.0.self_attn.o_proj.weight"
    before.weights[name][:, 16:32] *= 1e-3
    after = edits.zero_weak_heads(before, 1)
    assert changed(before.to(torch.float32), after) == {name, name.replace(".0.", ".1.")}
    assert not after.weights[name][:, 16:32].any()
    assert after.weights[name][:, :16].any()


def test_the_laboratory_makes_every_relation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one parent: parents before children, each proven and recorded, and the second run makes nothing."""
    monkeypatch.setattr(specimens, "llama_config", lambda layers: llama_config(layers, 64, 4, 2, 64))
    table = specimens.specimens(layers=4, tokens=4096)
    names = [
        "p0", "s00", "p0-continued-1of4", "p0-tuned", "p0-lora", "p0-average-continued", "p0-shallow", "p0-narrow",
        "p0-stacked", "p0-doubled", "p0-experts", "p0-distilled", "p0-all-rewrites", "p0-gptq-4-bits", "p0-noise-50",
    ]  # fmt: skip
    laboratory = Laboratory(tmp_path, table)
    said = [laboratory.make(name) for name in laboratory.with_ancestors(names)]
    assert not any("there" in line for line in said)
    for name in names:
        laboratory.fingerprint(name)
    laboratory.write_manifest(laboratory.with_ancestors(names))
    records = {each["name"]: each for each in json.loads((tmp_path / "manifest.json").read_text())["specimens"]}
    for name in names:
        record = records[name]
        assert record["roots"] == ([name] if name in ("p0", "s00", "p0-distilled") else ["p0"]), name
        assert (record.get("logits_difference", 1) < 1e-9) == ("rewrites" in name), name
        found = llmfp.load(tmp_path / "fingerprints" / f"{name}.fp.safetensors").main
        layers = {"p0-shallow": 3, "p0-stacked": 6, "p0-doubled": 6}.get(name, 4)
        assert (len(found.layers), found.hidden_size) == (layers, 48 if name == "p0-narrow" else 64), name
    assert laboratory.make("p0-lora") == "p0-lora: there"


def test_jobs_run_after_those_they_wait_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the table's order, as far as parents allow."""
    made: list[str] = []

    class Recorded(Laboratory):
        def make(self, name: str) -> str:
            made.append(name)
            return name

        def fingerprint(self, name: str) -> str:
            return name

        def write_manifest(self, names: object) -> None: ...

    monkeypatch.setattr("bench.lineage.__main__.ProcessPoolExecutor", lambda jobs, *_, **__: ThreadPoolExecutor(jobs))
    table = specimens.specimens(layers=4, tokens=4096)
    run(Recorded(tmp_path, table), 1)
    assert made == list(table)


# --- what is said of many pairs ---------------------------------------------------------------------------------------


def test_auc_and_threshold_are_what_they_are_called() -> None:
    rng = np.random.default_rng(0)
    kin, strangers = (list(map(float, rng.integers(0, 9, size))) for size in (30, 41))
    counted = [(a > b) + (a == b) / 2 for a in kin for b in strangers]
    assert statistics.auc(kin, strangers) == pytest.approx(sum(counted) / len(counted))
    many = list(map(float, rng.permutation(3000)))
    assert statistics.threshold(many) == 2996  # three of 3000 are above
    assert statistics.threshold(many[:999]) == max(many[:999])


def test_kolmogorov_s_distance_and_its_p() -> None:
    values = [0.1, 0.4, 0.7]
    grid = np.linspace(0, 1, 10_001)
    distance = np.abs(np.searchsorted(np.sort(values), grid, side="right") / 3 - grid).max()
    assert statistics.kolmogorov_smirnov(values) == pytest.approx(distance, abs=2e-4)
    assert statistics.kolmogorov_p(1.358 / 100, 10_000) == pytest.approx(0.05, abs=1e-3)  # the table's 5 % point
    rng = np.random.default_rng(1)
    below = np.mean(
        [statistics.kolmogorov_p(statistics.kolmogorov_smirnov(rng.random(25)), 25) <= 0.1 for _ in range(2000)]
    )
    assert below == pytest.approx(0.1, abs=0.02)


def test_pairs_that_share_a_model_do_not_pass_for_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """p-values uniform one by one that depend through their models: a plain test sees structure in most draws of them,
    those with resampled models in few; of p-values that are not uniform they see it too."""
    monkeypatch.setattr(statistics, "_ROUNDS", 200)
    rng, names = np.random.default_rng(3), [f"m{i}" for i in range(26)]
    plain, resampled, skewed, matched = [], [], [], []
    for _ in range(20):
        effects = dict(zip(names, rng.normal(size=26), strict=True))
        both = itertools.combinations(names, 2)
        p_values = {frozenset((a, b)): NormalDist(0, 2**0.5).cdf(effects[a] + effects[b]) for a, b in both}
        found = statistics.uniformity(names, p_values)
        plain.append(statistics.kolmogorov_p(found["distance"], len(p_values)))
        resampled.append(found["p, models drawn with replacement"])
        matched.append(found["matchings"]["rejected at 0.05"])
        skewed.append(statistics.uniformity(names, {pair: p**4 for pair, p in p_values.items()}))
    assert np.mean(np.array(plain) <= 0.05) > 0.5
    assert np.mean(np.array(resampled) <= 0.05) < 0.2
    assert np.mean(matched) < 0.1
    assert np.median([each["p, models drawn with replacement"] for each in skewed]) < 0.05
    assert np.median([each["matchings"]["rejected at 0.05"] for each in skewed]) > 0.5


def record(relation: str, *parents: str, roots: str, tokens: int = 0, seed: int | None = None) -> dict[str, Any]:
    made = {"relation": relation, "parents": list(parents), "roots": [roots], "tokens": tokens, "seed": seed}
    return {**made, "loss": 2.0, "stored": relation.removeprefix("quantised: ") if "quantised" in relation else "bf16"}


RECORDS = {
    "a": record("base", roots="a", seed=1),
    "b": record("base", roots="b", seed=2),
    "s": record("other seed", roots="s", seed=3),
    "twin": record("same seed, other data", roots="twin", seed=1),
    "pupil": record("distilled", "a", roots="pupil", tokens=9),
    "a1": record("continued training, 1/2 of pre-training", "a", roots="a", tokens=9),
    "a2": record("continued training, 1 of pre-training", "a1", roots="a", tokens=9),
    "a2-noise": record("edited: noise 50%", "a2", roots="a"),
    "a3": record("fine-tuned", "a", roots="a", tokens=9),
    "mean": record("average of two children", "a2", "a3", roots="a"),
    "a-q": record("quantised: MXFP4", "a", roots="a"),
    "a2-q": record("quantised: MXFP4", "a2", roots="a"),
    "b1": record("continued training, 1/2 of pre-training", "b", roots="b", tokens=9),
}


def test_pairs_are_called_what_they_are() -> None:
    shapes = dict.fromkeys(RECORDS, ("llama", 12, 128, 4)) | {"s": ("llama", 18, 128, 4)}
    found = pairs(RECORDS, shapes)
    kin = {(each.a, each.b): each.label for each in found if each.kind == "kin"}
    assert kin == {
        ("a", "a1"): "continued training, 1/2 of pre-training",
        ("a", "a2"): "continued training, 1 of pre-training",
        ("a", "a2-noise"): "continued training, 1 of pre-training, then edited: noise 50%",
        ("a", "a3"): "fine-tuned",
        ("a", "mean"): "average of two children",
        ("a", "a-q"): "quantised: MXFP4",
        ("a", "a2-q"): "continued training, 1 of pre-training, then quantised: MXFP4",
        ("b", "b1"): "continued training, 1/2 of pre-training",
    }
    assert relation("a2-noise", RECORDS) == kin["a", "a2-noise"]
    controls = {(each.a, each.b): each.label for each in found if each.kind == "control"}
    assert controls == {("a", "twin"): "same seed, other data", ("a", "pupil"): "distilled"}
    cousins = {(each.a, each.b): each.label for each in found if each.kind == "cousins"}
    trained = dict.fromkeys([("a1", "a3"), ("a2", "a3")], "trained children of one model")
    assert cousins == {("a-q", "a2-q"): "both sides quantised: MXFP4", **trained}
    strangers = {(each.a, each.b): each.label for each in found if each.kind == "strangers"}
    assert strangers["a", "b"] == "llama, same shape"
    assert strangers["a", "s"] == "llama, other depth"
    assert strangers["a1", "b1"] == "worked on, both alike"
    assert {b for (a, b), label in strangers.items() if label == "worked on, one of them"} >= {"a1", "a2-q", "b1"}
    roots = {name: set(each["roots"]) for name, each in RECORDS.items()}
    assert not any(roots[a] & roots[b] or {a, b} == {"a", "twin"} for a, b in strangers)


def test_tables_count_and_compare_what_they_were_given() -> None:
    """Kin are set against strangers of their own shape; distances count as similar when they are small."""
    shapes = dict.fromkeys(RECORDS, ("llama", 12, 128, 4)) | {"a2": ("llama", 18, 128, 4)}
    kin = {"a1": 5.0, "a2": 1.5, "a2-noise": 3.0}
    rng = np.random.default_rng(0)
    found = []
    for pair in pairs(RECORDS, shapes):
        z = kin.get(pair.b, float(rng.uniform(-1, 1))) if pair.kind == "kin" else float(rng.uniform(-1, 1))
        numbers = dict.fromkeys((*report.SCORES, *report.TESTS), None) | {
            "residual z": z,
            "KL": 2 - z,
            "residual p": 0.5,
        }
        found.append(report.Found(pair, "related" if z > 1 else "none_detected", ("residual",), "exact", numbers))
    tables = report.tables(found, RECORDS, shapes)
    rows = {row["relation"]: row for row in tables["relations"]["one by one"]}
    half = rows["continued training, 1/2 of pre-training"]
    assert (half["pairs"], half["verdicts"]["related"], half["rests on"]) == (2, 1, {"residual": 1})
    z, kl = half["statistics"]["residual z"], half["statistics"]["KL"]
    assert (z["AUC"], z["true positives"]) == (kl["AUC"], kl["true positives"])
    assert z["median"] == pytest.approx(2 - kl["median"], abs=2e-3)
    assert half["statistics"]["heads z"] is None
    brief = {row["relation"]: row["pairs"] for row in tables["relations"]["in brief"] if row["kind"] == "kin"}
    assert brief["continued training, then quantised"] == brief["quantised"] == 1
    assert not any("edited" in label for label in brief)
    assert [row["training"].split(" ")[2] for row in tables["tokens"][:2]] == ["1/2", "1"]
    assert [(row["edit"], row["loss paid"]) for row in tables["edits"]] == [("noise 50%", 0.0)]
    assert len(tables["pairs"]) == len(found)
    text = report.markdown(tables)
    assert "| llama: fine-tuned | 1 |" in text
    json.loads(report._json(tables["pairs"]))


def test_a_qq_plot_lies_on_the_diagonal_where_p_values_are_uniform() -> None:
    uniform = [(rank + 0.5) / 500 for rank in range(500)]
    dots = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', plot.qq_plot({"strangers": uniform}))
    assert len(dots) > 50
    for x, y in dots:
        assert float(x) + float(y) == pytest.approx(plot.SIZE, abs=0.11)
    above = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', plot.qq_plot({"kin": [p**2 for p in uniform]}))
    assert all(float(x) + float(y) < plot.SIZE for x, y in above[:50])
