"""Whole comparisons of scanned models whose relation is known: copies, children, strangers, rewrites, and bad input."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import llmfp
from llmfp.errors import LlmfpError
from llmfp.evidence.coherence import LEAST_LAYERS
from llmfp.evidence.comparison import Comparison
from llmfp.fingerprint import Fingerprint
from tests import lineage
from tests.checkpoints import build
from tests.lineage import CHILDREN, ROOTS, Weights, config_of, initialised, logits, rewritten, trained, write

PERMUTATIONS = 9999
CONFIG = config_of()
KEPT = {"dropped": [0, 1, 2, 4, 5, 6, 8, 9, 10, 11], "upscaled": [*range(8), *range(4, 12)]}
KEPT["duplicated"] = [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11]
Scan = Callable[..., Fingerprint]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices are so small that BLAS's threads only wait for each other."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    """Writes weights and scans them."""

    def scanned(weights: Weights, config: dict[str, Any] = CONFIG, dtype: str = "F32", **more: Any) -> Fingerprint:
        folder = tmp_path_factory.mktemp("model")
        return llmfp.scan(write(weights, config, folder, dtype, **more), deep=True)

    return scanned


@pytest.fixture(scope="module")
def parent(scan: Scan) -> Fingerprint:
    return scan(initialised(CONFIG, 0))


@pytest.fixture(scope="module")
def zoo(shared_data: Path) -> dict[str, Fingerprint]:
    """Small models really trained on text."""
    return {name: llmfp.scan(shared_data / "zoo" / name, deep=True) for name in (*ROOTS, *CHILDREN)}


def compared(a: Fingerprint, b: Fingerprint, **more: Any) -> Comparison:
    found = llmfp.compare(a, b, **{"permutations": PERMUTATIONS, **more})
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["verdict"] == found.verdict
    assert set(found.lost) <= {"residual", "heads", "coherence", "profile"}
    for name in ("residual", "heads", "coherence"):
        assert getattr(found, name) is not None or found.lost[name], "null with a reason"
    return found


# --- the same model --------------------------------------------------------------------------------------------------


def test_a_model_is_related_to_itself(parent: Fingerprint) -> None:
    found = compared(parent, parent)
    assert (found.verdict, found.basis) == ("related", "exact")
    assert found.decision.rests_on[0] == "digest"
    assert set(found.decision.rests_on) == {"digest", "residual", "heads", "coherence"}
    assert found.missed == ()


def test_copies_with_the_same_weights_are_the_same(parent: Fingerprint, scan: Scan, tmp_path: Path) -> None:
    """In shards, under other names, under a prefix, through a file."""
    weights = initialised(CONFIG, 0)
    prefixed = {f"module.{name}": weight for name, weight in weights.items()}
    parent.save(tmp_path / "kept.fp.safetensors")
    copies = scan(weights, shards=3), scan(prefixed), llmfp.load(tmp_path / "kept.fp.safetensors")
    for copy in copies:
        found = compared(parent, copy)
        assert found.verdict == "related"
        assert found.decision.rests_on[0] == "digest"


@pytest.mark.parametrize("dtype", ["F16", "BF16", "FP8", "int8", "Q8_0", "Q4_0"])
def test_rounded_copies_are_related(dtype: str, parent: Fingerprint, scan: Scan, tmp_path: Path) -> None:
    """By every test, though no number is the same; GGUF has the rows of Q and K in another order."""
    weights = initialised(CONFIG, 0)
    if dtype.startswith("Q"):
        copy = llmfp.scan(lineage.write_gguf(weights, CONFIG, tmp_path / "model.gguf", dtype), deep=True)
    else:
        copy = scan(weights, dtype=dtype)
    found = compared(parent, copy)
    assert (found.verdict, found.basis) == ("related", "exact")
    assert set(found.decision.rests_on) == {"residual", "heads", "coherence"}
    assert found.coherence is not None
    assert found.coherence.score > 0.97
    assert found.coherence.layer_map == tuple((n, n) for n in range(12))
    cautioned = [caveat for caveat in found.caveats if "quantised weights" in caveat]
    assert len(cautioned) == (dtype not in ("F16", "BF16"))
    assert all(caveat.startswith(f"{copy.source['name']}: ") for caveat in cautioned)


def test_a_copy_with_a_broken_weight_is_the_same_all_the_same(scan: Scan) -> None:
    """NaN equals nothing, but the same NaN in the same place is the same weights."""
    broken = initialised(CONFIG, 0)
    name = next(name for name in broken if name.endswith("k_proj.weight"))
    broken[name] = broken[name].copy()
    broken[name][0, 0] = np.nan
    found = compared(scan(broken), scan(broken, shards=2))
    assert found.verdict == "related"
    assert found.decision.rests_on[0] == "digest"


def test_a_twin_without_any_variance_is_no_evidence(scan: Scan) -> None:
    """Constant weights give equal digests, and come from nowhere."""
    flat = {name: np.full_like(weight, 0.5) for name, weight in initialised(CONFIG, 0).items()}
    first, second = scan(flat), scan(flat, shards=2)
    assert first.digest == second.digest
    found = compared(first, second)
    assert (found.verdict, found.p_value, found.basis) == ("inconclusive", None, None)
    assert set(found.lost) == {"residual", "heads", "coherence", "profile"}


# --- children --------------------------------------------------------------------------------------------------------


def test_children_in_the_zoo_are_related_to_their_parents_alone(zoo: dict[str, Fingerprint]) -> None:
    root = {name: CHILDREN.get(name, name) for name in zoo}
    for x, y in itertools.combinations(zoo, 2):
        found = compared(zoo[x], zoo[y])
        related = root[x] == root[y]
        assert (found.verdict == "related") == related, (x, y)
        assert found.verdict in ("related", "none_detected", "inconclusive")
        if related:
            assert set(found.decision.rests_on) == {"residual", "heads", "coherence"}
            assert found.p_value == 2e-4, "the first of two exact tests left, after coherence"
        elif x[0] == y[0]:
            assert found.verdict == "none_detected", (x, y)
            assert any("residual basis" in missed for missed in found.missed)
        else:
            assert found.lost["residual"].startswith("hidden sizes differ")
            assert found.lost["heads"].startswith("head counts differ")


def test_a_child_of_random_weights_is_related(parent: Fingerprint, scan: Scan) -> None:
    for amount in (0.3, 1.0):
        found = compared(parent, scan(trained(initialised(CONFIG, 0), 1, amount)))
        assert found.verdict == "related"
        assert {"residual", "coherence"} <= set(found.decision.rests_on)


@pytest.mark.parametrize("change", KEPT)
def test_layers_dropped_or_doubled_are_mapped(change: str, parent: Fingerprint, scan: Scan) -> None:
    kept = KEPT[change]
    child = lineage.layer_subset(trained(initialised(CONFIG, 0), 1), kept)
    found = compared(parent, scan(child, {**CONFIG, "num_hidden_layers": len(kept)}))
    assert found.verdict == "related"
    assert set(found.decision.rests_on) == {"residual", "heads", "coherence"}
    assert found.coherence is not None
    pairs = found.coherence.layer_map
    assert all(kept[j] == i for i, j in pairs)
    assert len(pairs) == min(12, len(kept))
    assert f"12 and {len(kept)} layers are matched by rotary coherence" in found.caveats
    back = compared(scan(child, {**CONFIG, "num_hidden_layers": len(kept)}), parent)
    assert back.coherence is not None
    assert {kept[i] for i, _ in back.coherence.layer_map} == {j for _, j in back.coherence.layer_map}


def test_layers_of_real_models_dropped_or_doubled(zoo: dict[str, Fingerprint], shared_data: Path, scan: Scan) -> None:
    config, child = zoo_model(shared_data, "A0-py-ct-c")
    for kept in ([*range(5), *range(7, 16)], [*range(11), *range(5, 16)]):
        changed = scan(lineage.layer_subset(child, kept), {**config, "num_hidden_layers": len(kept)})
        found = compared(zoo["A0-py"], changed)
        assert found.verdict == "related"
        assert found.coherence is not None
        assert sum(kept[j] == i for i, j in found.coherence.layer_map) >= 0.9 * min(16, len(kept))


# --- strangers -------------------------------------------------------------------------------------------------------


def test_random_initialisations_of_one_config_are_never_related(scan: Scan) -> None:
    models = [scan(initialised(CONFIG, seed)) for seed in range(10, 16)]
    for n, (a, b) in enumerate(itertools.combinations(models, 2)):
        found = compared(a, b, seed=n)
        assert found.verdict == "none_detected"
        assert set(found.decision.rests_on) == {"residual", "heads"}
        assert len(found.missed) == 3


def test_a_high_profile_score_relates_nobody(scan: Scan) -> None:
    """σ of every layer equal: the published score is 1, and no weight is shared."""
    one, other = initialised(CONFIG, 20), initialised(CONFIG, 21)
    alike = {name: weight * (one[name].std() / weight.std()) for name, weight in other.items()}
    found = compared(scan(one), scan(alike))
    assert (found.profile.pearson["mean"] or 0) > 0.99
    assert found.verdict == "none_detected"
    assert "profile" in found.lost


# --- rewrites that leave the function alone --------------------------------------------------------------------------


def zoo_model(shared_data: Path, name: str) -> tuple[dict[str, Any], Weights]:
    config = json.loads((shared_data / "zoo" / name / "config.json").read_text())
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return config, lineage.read(shared_data / "zoo" / name)


def check_disguise(child: Weights, disguised: Weights, config: dict[str, Any]) -> None:
    """It computes the same."""
    tokens = np.random.default_rng(0).integers(config["vocab_size"], size=24)
    plain = logits(child, config, tokens)
    np.testing.assert_allclose(logits(disguised, config, tokens), plain, rtol=1e-9, atol=1e-9 * np.abs(plain).max())


def check_found(before: Comparison, after: Comparison) -> None:
    """By coherence alone, which did not move."""
    assert set(before.decision.rests_on) == {"residual", "heads", "coherence"}
    assert (after.verdict, after.decision.rests_on, after.basis) == ("related", ("coherence",), "approximate")
    assert before.coherence is not None
    assert after.coherence is not None
    assert after.residual is not None
    assert after.heads is not None
    assert after.coherence.score == pytest.approx(before.coherence.score, abs=1e-3), "kept as float16"
    assert after.coherence.layer_map == before.coherence.layer_map
    assert after.residual.p_value > 1e-3
    assert after.heads.p_value > 1e-3
    assert (after.profile.pearson["mean"] or 0) < (before.profile.pearson["mean"] or 0)


@pytest.mark.parametrize("name", CHILDREN)
def test_with_all_rewrites_at_once_coherence_alone_finds_the_parent(
    name: str, zoo: dict[str, Fingerprint], shared_data: Path, scan: Scan
) -> None:
    config, child = zoo_model(shared_data, name)
    disguised = rewritten(child, config, seed=4)
    check_disguise(child, disguised, config)
    root = zoo[CHILDREN[name]]
    check_found(compared(root, zoo[name]), compared(root, scan(disguised, config)))


def test_rewrites_of_random_weights(parent: Fingerprint, scan: Scan) -> None:
    child = trained(initialised(CONFIG, 0), 1)
    disguised = rewritten(child, CONFIG, seed=3)
    check_disguise(child, disguised, CONFIG)
    check_found(compared(parent, scan(child)), compared(parent, scan(disguised)))


# --- unlike shapes ---------------------------------------------------------------------------------------------------


def test_what_shapes_forbid_is_null_with_its_reason(parent: Fingerprint, scan: Scan) -> None:
    wider = scan(initialised(config := config_of(hidden=96, heads=6, kv_heads=2), 1), config)
    found = compared(parent, wider)
    assert (found.residual, found.heads) == (None, None)
    assert found.coherence is not None, "heads of the same size"
    assert found.lost["residual"] == "hidden sizes differ: 64 and 96"
    assert found.lost["heads"] == "head counts differ: 4 of 2 groups and 6 of 2"
    assert found.verdict == "inconclusive"
    other_heads = scan(initialised(config := config_of(heads=8, kv_heads=4), 1), config)
    found = compared(parent, other_heads)
    assert found.residual is not None
    assert found.lost["heads"] == "head counts differ: 4 of 2 groups and 8 of 4"
    assert found.lost["coherence"] == "rotary pairs differ: 8 in heads of 16 and 4 in heads of 8"
    assert found.decision.rests_on == ("residual",)
    deeper = compared(parent, scan(initialised(config := config_of(layers=16), 1), config))
    assert deeper.verdict == "none_detected"
    assert "12 and 16 layers are matched by rotary coherence" in deeper.caveats


def test_a_plain_scan_loses_two_tests(parent: Fingerprint, tmp_path: Path) -> None:
    plain = llmfp.scan(write(trained(initialised(CONFIG, 0), 1), CONFIG, tmp_path / "m"))
    found = compared(parent, plain)
    assert found.decision.rests_on == ("residual",)
    assert "plain scan" in found.lost["heads"]
    assert "plain scan" in found.lost["coherence"]


def test_without_rotary_embedding_depths_are_matched_by_spectra(tmp_path: Path) -> None:
    config = {"layers": 10, "heads": 4, "head_dim": 16}
    child = build("gpt2", **config)
    kept = [0, 1, 2, 3, 5, 6, 8, 9]
    pruned = build("gpt2", **config)
    pruned.tensors = {
        name.replace(f".h.{old}.", f".h.{new}."): tensor
        for new, old in enumerate(kept)
        for name, tensor in child.tensors.items()
        if f".h.{old}." in name
    }
    pruned.config = {**(child.config or {}), "n_layer": len(kept)}
    pair = [llmfp.scan(model.write(tmp_path / f"m{n}"), deep=True) for n, model in enumerate((child, pruned))]
    found = compared(*pair)
    assert "no rotary embedding" in found.lost["coherence"]
    assert "10 and 8 layers are matched by the spectra of circuits" in found.caveats
    assert found.verdict == "related"
    assert set(found.decision.rests_on) == {"residual", "heads"}
    assert found.heads is not None
    assert found.heads.blocks == ("norms", "spectra")


def test_towers(tmp_path: Path) -> None:
    t5 = llmfp.scan(build("t5", layers=6, hidden=64).write(tmp_path / "t5"), deep=True)
    found = compared(t5, t5)
    assert found.verdict == "related"
    assert any("of the towers" in caveat and "only decoder is compared" in caveat for caveat in found.caveats)
    assert "differ by design" in found.lost["heads"]
    across = compared(t5, t5, tower="encoder")
    assert across.a.tower == across.b.tower == "encoder"
    with pytest.raises(LlmfpError, match="t5: no vision tower, only"):
        compared(t5, t5, tower="vision")
    bert = llmfp.scan(build("bert", layers=6, heads=8).write(tmp_path / "bert"), deep=True)
    assert "unlike towers are compared: decoder and encoder" in compared(t5, bert).caveats
    assert compared(t5, bert).lost["profile"] == "the towers are of different kinds: seq2seq decoder and encoder"


# --- bad input -------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_cost_their_layer_alone(parent: Fingerprint, scan: Scan) -> None:
    child = trained(initialised(CONFIG, 0), 1)
    child["model.layers.3.self_attn.q_proj.weight"][5, 7] = np.nan
    child["model.layers.5.self_attn.v_proj.weight"][0, 0] = np.inf
    broken = scan(child)
    found = compared(parent, broken)
    assert found.verdict == "related"
    assert found.residual is not None
    assert found.coherence is not None
    assert found.residual.rows < 48
    assert 3 not in dict(found.coherence.layer_map)
    assert found.coherence.matrix[0][3] is None
    assert any("layers.3.self_attn.q_proj.weight" in caveat for caveat in found.caveats)
    assert compared(broken, broken).verdict == "related"
    ruined = {name: np.full_like(weight, np.nan) for name, weight in child.items()}
    nothing = compared(parent, scan(ruined))
    assert (nothing.verdict, nothing.p_value) == ("inconclusive", None)
    assert set(nothing.lost) == {"residual", "heads", "coherence", "profile"}
    assert compared(scan(ruined), scan(ruined)).verdict == "inconclusive", "NaN twice is not the same weights"


def test_constant_layers_say_nothing(parent: Fingerprint, scan: Scan) -> None:
    child = trained(initialised(CONFIG, 0), 1)
    for layer in (2, 7):
        for role in "qkvo":
            child[f"model.layers.{layer}.self_attn.{role}_proj.weight"][:] = 0.02
    found = compared(parent, scan(child))
    assert found.verdict == "related"
    zero = {name: np.zeros_like(weight) if "attn" in name else weight for name, weight in child.items()}
    found = compared(parent, scan(zero))
    assert (found.verdict, found.p_value) == ("inconclusive", None)
    assert found.lost["residual"].startswith("only 0 residual coordinates")
    assert found.lost["profile"] == "no role has a score"
    assert compared(scan(zero), scan(zero)).verdict == "inconclusive"


def test_one_layer_is_compared_by_what_is_left(scan: Scan) -> None:
    config = config_of(layers=1)
    models = [scan(initialised(config, seed), config) for seed in range(2)]
    found = compared(*models)
    assert found.verdict == "none_detected"
    assert found.decision.rests_on == ("residual",)
    assert "its smallest attainable p" in found.lost["heads"]
    assert "fewer than 6 layers" in found.lost["coherence"]
    assert found.profile.reasons["q"] == "fewer than 3 layers have a σ"
    child = scan(trained(initialised(config, 0), 5, 0.1), config)
    assert compared(models[0], child).verdict == "related"


def test_few_layers_without_strangers_do_not_count(scan: Scan) -> None:
    config = config_of(layers=LEAST_LAYERS - 1, hidden=96, heads=6, kv_heads=2)
    narrow = config_of(layers=LEAST_LAYERS - 1)
    found = compared(scan(initialised(config, 0), config), scan(initialised(narrow, 0), narrow))
    assert found.verdict == "inconclusive"
    assert found.coherence is not None
    assert f"without strangers of its kind it takes {LEAST_LAYERS}" in found.lost["coherence"]


def test_levels_and_numbers_that_mean_nothing(parent: Fingerprint) -> None:
    for alpha in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(LlmfpError, match="alpha is"):
            llmfp.compare(parent, parent, alpha=alpha)
    for permutations in (0, -3):
        with pytest.raises(LlmfpError, match="permutations are none"):
            llmfp.compare(parent, parent, permutations=permutations)


def test_few_permutations_decide_nothing(parent: Fingerprint, scan: Scan) -> None:
    """Of a hundred, none can show 1e-3: said, and not rounded away."""
    found = compared(parent, scan(initialised(CONFIG, 30)), permutations=100)
    assert found.verdict == "inconclusive"
    assert "its smallest attainable p, 0.0099," in found.lost["residual"]


def test_a_forged_digest_proves_nothing(parent: Fingerprint, scan: Scan) -> None:
    forged = replace(scan(initialised(CONFIG, 31)), digest=parent.digest)
    assert compared(parent, forged).verdict == "none_detected"


def test_the_same_seed_gives_the_same_answer(parent: Fingerprint, scan: Scan) -> None:
    other = scan(initialised(CONFIG, 32))
    first = compared(parent, other, seed=5)
    assert compared(parent, other, seed=5) == first
    assert compared(parent, other, seed=6) != first


# --- strangers from outside ------------------------------------------------------------------------------------------


def test_a_directory_of_strangers_makes_coherence_conformal(parent: Fingerprint, scan: Scan, tmp_path: Path) -> None:
    child = scan(trained(initialised(CONFIG, 0), 1))
    for seed in range(20):
        scan(initialised(CONFIG, 100 + seed)).save(tmp_path / f"{seed}.fp.safetensors")
        if seed == 8:
            nine = compared(parent, child, null=tmp_path)
    assert nine.coherence is not None
    assert (nine.coherence.nulls, nine.coherence.basis, nine.coherence.p_value) == (9, "conformal", 0.1)
    assert nine.lost["coherence"].startswith("its smallest attainable p, 0.1")
    assert nine.null is not None
    assert nine.null.n == 9 + 2
    found = compared(parent, child, null=tmp_path)
    assert found.coherence is not None
    assert (found.coherence.nulls, found.coherence.basis) == (20, "approximate")
    assert "coherence" in found.decision.rests_on
    assert not any("without strangers of its kind" in caveat for caveat in found.caveats)
    stranger = compared(parent, scan(initialised(CONFIG, 33)), null=tmp_path)
    assert stranger.verdict == "none_detected"
    assert set(stranger.decision.rests_on) == {"residual", "heads", "coherence"}
    assert any("hardly uses" in missed for missed in stranger.missed)
    parent.save(tmp_path / "itself.fp.safetensors")
    again = compared(parent, child, null=tmp_path)
    assert again.coherence is not None
    assert again.coherence.nulls == 20, "a model is no stranger to itself"
