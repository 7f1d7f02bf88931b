"""Identification: relatives are found and ranked first, the search's own size is paid for in p, and the card is held
against the weights in words that claim no more than the tests show.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmfp
from llmfp.__main__ import main
from llmfp.evidence import comparison
from llmfp.evidence.alignment import without_trend
from llmfp.identification import Finding, Identification, identify
from llmfp.registry import Origin, Registry, nearest
from tests.checkpoints import Model, build

SIZES: dict[str, Any] = {"layers": 8, "heads": 4, "kv_heads": 2, "head_dim": 16, "hidden": 128}
STRANGERS = 30


def child_of(parent: Model, seed: int, *, share: float = 0.3) -> Model:
    """The parent trained on: every weight moved by noise of so many of its tensor's standard deviations."""
    draw = np.random.default_rng(seed)
    moved = {
        name: (t + share * t.std() * draw.standard_normal(t.shape)).astype(t.dtype) if t.ndim == 2 else t
        for name, t in parent.tensors.items()
    }
    return replace(parent, tensors=moved)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, two generations of children, a base of another house with its child, and a base of another width."""
    top = tmp_path_factory.mktemp("models")
    base, rival = build("llama", seed=1000, **SIZES), build("llama", seed=2000, **SIZES)
    child = child_of(base, 1)
    made = {
        "base": base, "child": child, "grandchild": child_of(child, 2), "sibling": child_of(base, 3),
        "rival": rival, "rivals-child": child_of(rival, 4), "wide": build("llama", seed=3, **{**SIZES, "hidden": 160}),
    }  # fmt: skip
    return {name: model.write(top / name) for name, model in made.items()}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Registry:
    top = tmp_path_factory.mktemp("registry")
    kept = Registry.open(top / "registry", create=True)
    added = []
    for seed in range(STRANGERS):
        folder = build("llama", seed=seed, **SIZES).write(top / str(seed))
        added.append((llmfp.scan(folder), Origin(f"strange/{seed:02}", "a" * 40)))
    for name, bases in {"base": (), "child": ("org/base",), "rival": (), "wide": ()}.items():
        added.append((llmfp.scan(models[name]), Origin(f"org/{name}", "b" * 40, base_models=bases)))
    kept.add(added)
    return kept


def declare(folder: Path, *bases: str) -> Path:
    (folder / "README.md").write_text(f"---\nbase_model: {json.dumps(list(bases))}\n---\n")
    return folder


def found(identification: Identification) -> dict[str, str]:
    return {finding.repo: finding.status for finding in identification.findings}


def test_relatives_come_first_and_no_stranger_is_called_one(models: dict[str, Path], registry: Registry) -> None:
    result = identify(models["sibling"], registry)
    assert [each.repo for each in result.candidates[:2]] == ["org/base", "org/child"]
    assert [each.verdict for each in result.candidates] == ["related"] * 2 + ["none_detected"] * 8
    assert [each.rank for each in result.candidates] == list(range(1, 11))
    assert result.tests == 10
    assert result.rows == STRANGERS + 4
    scores = [each.evidence.profile.pearson["mean"] for each in result.candidates]
    assert scores == sorted(scores, reverse=True)


def test_p_is_corrected_for_every_test_that_was_made(models: dict[str, Path], registry: Registry) -> None:
    """Holm's steps over the p that `compare` gives for each pair alone."""
    result = identify(models["sibling"], registry, top=12)
    one = result.candidates[3]
    row = next(row for row in registry.table().to_pylist() if row["repo"] == one.repo)
    assert comparison.compare(llmfp.scan(models["sibling"]), registry.load(row)).residual == one.evidence.residual
    plain = sorted((each.evidence.residual.p_value, each.p_value) for each in result.candidates)
    assert len(plain) == result.tests == 12
    largest = 0.0
    for n, (p, corrected) in enumerate(plain):
        largest = max(largest, min(1.0, (12 - n) * p))
        assert corrected == pytest.approx(largest)


def test_too_few_permutations_test_the_nearest_alone(models: dict[str, Path], registry: Registry) -> None:
    """With p ≥ 1/1001 one test can reach 1e-3 and no two can. Which one is settled by rank, before any p is seen."""
    result = identify(models["sibling"], registry, permutations=1000)
    assert [each.verdict for each in result.candidates] == ["related"] + ["inconclusive"] * 9
    assert result.tests == 1
    assert "smallest attainable p, 0.001, is above 0.0005" in (result.candidates[1].reason or "")


DECLARED: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "confirmed, its sibling explained by the same base": ("sibling", ("org/base",), {"org/base": "confirmed"}),
    "by another case of letters": ("sibling", ("Org/BASE",), {"Org/BASE": "confirmed"}),
    "by two steps": ("grandchild", ("org/child",), {"org/child": "confirmed"}),
    "nothing declared": ("sibling", (), {"org/base": "undeclared", "org/child": "undeclared"}),
    "contradicted": (
        "rivals-child", ("org/base",), {"org/base": "contradicted", "org/rival": "undeclared"},
    ),
    "undetected": ("stranger", ("org/base",), {"org/base": "undetected"}),
    "not kept": ("stranger", ("org/unknown",), {"org/unknown": "unknown"}),
    "another width": ("stranger", ("org/wide",), {"org/wide": "untested"}),
    "a merge of which one parent shows": (
        "sibling", ("org/base", "org/rival"), {"org/base": "confirmed", "org/rival": "undetected"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DECLARED)
def test_the_card_is_held_against_the_weights(
    case: str, models: dict[str, Path], registry: Registry, tmp_path: Path
) -> None:
    name, bases, expected = DECLARED[case]
    if name == "stranger":
        folder = build("llama", seed=77, **SIZES).write(tmp_path / name)
    else:
        folder = tmp_path / name
        folder.mkdir()
        for file in models[name].iterdir():
            (folder / file.name).hardlink_to(file)
    assert found(identify(declare(folder, *bases), registry, permutations=30_000)) == expected


def test_equal_weights_are_ranked_first_and_need_no_test(models: dict[str, Path], registry: Registry) -> None:
    result = identify(llmfp.scan(models["base"]), registry)
    first = result.candidates[0]
    assert (first.repo, first.rank, first.verdict, first.basis) == ("org/base", 1, "related", "exact")
    assert Finding("undeclared", "org/base", "the same weights, rank 1") in result.findings


def test_a_model_is_no_relative_of_itself(registry: Registry) -> None:
    kept = registry.load(next(row for row in registry.table().to_pylist() if row["repo"] == "org/child"))
    kept = replace(kept, source={**kept.source, "name": "org/child", "revision": "b" * 40})
    result = identify(kept, registry)
    assert "org/child" not in {each.repo for each in result.candidates}
    assert found(result) == {"org/base": "confirmed"}


def test_the_page_and_the_json_say_the_same(
    models: dict[str, Path], registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fingerprint = tmp_path / "sibling.fp.safetensors"
    llmfp.scan(models["sibling"]).save(fingerprint)

    def run(*more: str) -> str:
        assert main(["identify", str(fingerprint), "--registry", registry.where, *more]) == 0
        out, err = capsys.readouterr()
        assert not err
        return out

    parsed = json.loads(run("--json"), parse_constant=pytest.fail)
    assert parsed["schema"] == "llmfp.identification/1"
    assert parsed["candidates"][0]["evidence"]["schema"] == "llmfp.comparison/1"
    page = run()
    lines = page.splitlines()
    assert all(len(line) <= 80 for line in lines)
    for each in parsed["findings"]:
        assert any(each["repo"] in line for line in lines)
    related = [line for line in lines if "  related " in line]
    assert len(related) == sum(each["verdict"] == "related" for each in parsed["candidates"]) == 2
    for word in ("independent", "proof", "descend", "stolen", "copied"):
        assert word not in page.lower()


def test_nothing_to_compare_with_is_said(tmp_path: Path, models: dict[str, Path]) -> None:
    empty = Registry.open(tmp_path / "registry", create=True)
    result = identify(models["base"], empty)
    assert (result.candidates, result.rows, result.tests) == ((), 0, 0)
    with pytest.raises(llmfp.LlmfpError, match="none"):
        identify(models["base"], empty, top=0)


# --- rotary coherence


def disguised(parent: Model, seed: int) -> Model:
    """The parent with its residual stream rotated, its queries and keys scaled layer by layer, its values mixed."""
    draw = np.random.default_rng(seed)
    turn = np.linalg.qr(draw.standard_normal((SIZES["hidden"], SIZES["hidden"])))[0]
    tensors = {name: tensor.astype(np.float64) for name, tensor in parent.tensors.items()}
    for name in tensors:
        layer = name.rsplit(".self_attn.", 1)[0]
        gain = tensors.get(f"{layer}.input_layernorm.weight", np.ones(SIZES["hidden"]))
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensors[name] = tensors[name] * gain @ turn
        elif name.endswith("o_proj.weight"):
            tensors[name] = turn.T @ tensors[name]
    for layer in range(SIZES["layers"]):
        for first, second in (("q", "k"), ("v", "o")):
            factor = np.exp(draw.normal(0, 0.7))
            names = [next(n for n in tensors if f".{layer}." in n and f"{role}_proj" in n) for role in (first, second)]
            tensors[names[0]], tensors[names[1]] = tensors[names[0]] * factor, tensors[names[1]] / factor
    for name in tensors:
        if "layernorm" in name:
            tensors[name] = np.ones_like(tensors[name])
    return replace(parent, tensors={name: tensor.astype(np.float32) for name, tensor in tensors.items()})


def test_a_disguise_that_hides_from_profile_and_labels_is_found_by_coherence(tmp_path: Path) -> None:
    """Among 20 strangers: without deep scans its parent is nowhere near; with them it is first, and its p has paid for
    all 21 rows."""
    parent = build("llama", seed=500, **SIZES)
    child = disguised(child_of(parent, 1, share=0.1), 2).write(tmp_path / "child")
    kept, plain = (Registry.open(tmp_path / name, create=True) for name in ("deep", "plain"))
    made = {f"strange/{n:02}": build("llama", seed=n, **SIZES) for n in range(20)} | {"org/parent": parent}
    added = [
        (llmfp.scan(model.write(tmp_path / name), deep=True), Origin(name, "a" * 40)) for name, model in made.items()
    ]
    kept.add(added)
    plain.add([(llmfp.scan(tmp_path / name), origin) for name, (_, origin) in zip(made, added, strict=True)])
    assert {each.verdict for each in identify(child, plain).candidates} == {"none_detected"}
    result = identify(child, kept)
    first, *others = result.candidates
    assert (first.repo, first.verdict, first.basis) == ("org/parent", "related", "approximate")
    assert first.evidence.coherence is not None
    assert first.p_value == pytest.approx(2 * 21 * first.evidence.coherence.p_value)
    assert {each.verdict for each in others} == {"none_detected"}


def test_a_sketch_estimates_the_mean_correlation_of_layers(models: dict[str, Path]) -> None:
    """Within four of its standard errors for relatives and strangers, and its own to that of a whole: 1."""
    names = ("base", "child", "sibling", "rival", "rivals-child")
    towers = [llmfp.scan(models[name], deep=True).main for name in names]
    sketches = np.array([nearest.sketch(tower) for tower in towers])
    for i, j in itertools.combinations(range(len(names)), 2):
        units = [without_trend(tower.circuit("coherence").astype(np.float64)) for tower in (towers[i], towers[j])]
        expected = float((units[0] * units[1]).sum(axis=1).mean())
        assert sketches[i] @ sketches[j] == pytest.approx(expected, abs=4 / np.sqrt(nearest.SKETCH))
