"""Unrelated models: the place among them against a plain loop, the files they come in, and the one that is shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.lineage import null as script
from llmfp.errors import LlmfpError
from llmfp.evidence import null
from llmfp.evidence.null import NullModel, Place, place
from llmfp.evidence.profile import pearson_mean
from llmfp.evidence.verdict import Missing
from tests.lineage import ROLES, fingerprint_of, tower_of

Curves = dict[str, list[float | None]]


def curves(rng: np.random.Generator, layers: int = 8) -> Curves:
    return {role: rng.uniform(0.01, 0.1, layers).tolist() for role in ROLES}


def model(rng: np.random.Generator, family: str, kind: str = "decoder", decimals: int | None = None) -> NullModel:
    return NullModel(f"a model of {family}", family, kind, decimals, curves(rng, int(rng.integers(4, 12))))


def made(found: Place | Missing) -> Place:
    assert isinstance(found, Place), found
    return found


def test_the_place_is_that_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    models = [model(rng, f"f{n}", ("decoder", "encoder")[n % 3 == 0], (None, 3)[n % 2]) for n in range(14)]
    for _ in range(10):
        a, b = curves(rng, 8), curves(rng, 10)
        found = made(place(a, b, "decoder", models))
        own = [each for each in models if each.kind == "decoder"]
        p_values = []
        for base, other in ((a, b), (b, a)):
            at_least = 0
            for each in own:
                theirs = other
                if each.decimals is not None:
                    theirs = {role: [round(std or 0, 3) for std in column] for role, column in other.items()}
                score, against = pearson_mean(base, theirs, ROLES), pearson_mean(base, each.std, ROLES)
                assert score is not None
                assert against is not None
                at_least += against >= score
            p_values.append((1 + at_least) / (1 + len(own)))
        assert found.p_value == pytest.approx(max(p_values))
        assert found.smallest_p == pytest.approx(1 / (1 + len(own)))
        assert found.percentile == pytest.approx(100 * (1 - (max(p_values) * (1 + len(own)) - 1) / len(own)))
        assert found.families == tuple(each.family for each in own)
        assert (found.kind, found.n) == ("decoder", len(own))
        assert {n for _, n in found.everywhere.values()} == {14}
        assert list(found.everywhere) == [*ROLES, "mean"]


def test_p_is_never_below_its_floor() -> None:
    rng = np.random.default_rng(1)
    a = curves(rng)
    found = made(place(a, a, "decoder", [model(rng, f"f{n}") for n in range(7)]))
    assert (found.p_value, found.smallest_p, found.percentile) == (1 / 8, 1 / 8, 100)


def test_p_of_exchangeable_models_is_uniform_at_most() -> None:
    rng = np.random.default_rng(2)
    p_values = []
    for _ in range(40):
        models = [NullModel("m", f"f{n}", "decoder", None, curves(rng)) for n in range(9)]
        p_values.append(made(place(curves(rng), curves(rng), "decoder", models)).p_value)
    for level in (0.1, 0.2, 0.5):
        assert np.mean(np.array(p_values) <= level + 1e-9) < level + 3 * np.sqrt(level / 40)


def test_equal_scores_count_against_the_pair() -> None:
    rng = np.random.default_rng(3)
    a, b = curves(rng), curves(rng)
    copies = [NullModel("copy", f"f{n}", "decoder", None, each) for n, each in enumerate((a, b))]
    assert made(place(a, b, "decoder", copies)).p_value == 1


def test_no_place_comes_from_nothing() -> None:
    rng = np.random.default_rng(4)
    a = curves(rng)
    models = [model(rng, "f0"), model(rng, "f1", "encoder")]
    flat: Curves = dict.fromkeys(ROLES, [0.1] * 5)
    assert place(a, flat, "decoder", models) == Missing("no role has a score")
    assert place(a, a, "vision", models) == Missing(
        "no unrelated vision is known whose σ these could be scored against"
    )
    useless = NullModel("flat", "f", "decoder", None, flat)
    assert isinstance(place(a, curves(rng), "decoder", [useless]), Missing)
    assert made(place(a, curves(rng), "decoder", [useless, models[0]])).families == ("f0",)


def test_a_role_without_score_is_left_out_on_both_sides() -> None:
    rng = np.random.default_rng(5)
    a, b = curves(rng), curves(rng)
    a["k"] = [None] * 8
    found = made(place(a, b, "decoder", [model(rng, "f0")]))
    assert list(found.everywhere) == ["q", "v", "o", "mean"]


# --- files -----------------------------------------------------------------------------------------------------------


def content(rng: np.random.Generator, **change: Any) -> dict[str, Any]:
    one = {"name": "m", "family": "f", "kind": "decoder", "decimals": 3, "std": curves(rng), **change}
    return {"schema": null.SCHEMA, "source": "made up", "models": [one]}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "null.json"
    path.write_text(text)
    return path


def test_a_file_adds_to_what_is_shipped(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    shipped = null.load()
    path = written(tmp_path, json.dumps(content(rng)))
    found = null.load(path)
    assert found[: len(shipped)] == shipped
    assert [(each.name, each.family, each.decimals) for each in found[len(shipped) :]] == [("m", "f", 3)]
    again = content(rng)
    again["models"] *= 3
    assert len(null.load(written(tmp_path, json.dumps(again)))) == len(shipped) + 1, "one model a family"
    known = content(rng, family=shipped[0].family, kind=shipped[0].kind)
    assert null.load(written(tmp_path, json.dumps(known))) == shipped


GOOD = {"name": "m", "family": "f", "kind": "decoder", "decimals": 3, "std": {role: [0.1, 0.2] for role in ROLES}}
NULL_FILE = {"schema": null.SCHEMA, "source": "", "models": [GOOD]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ("{", "not valid JSON"),
        ('{"schema": "llmfp.null/2", "models": []}', "schema 'llmfp.null/2' is not llmfp.null/1"),
        ('{"models": []}', "schema None is not"),
        (json.dumps({**NULL_FILE, "models": {}}), "'models' is not a list"),
        (json.dumps({**NULL_FILE, "models": [GOOD, 7]}), "model 1 is not an object"),
        *(
            (json.dumps({**NULL_FILE, "models": [{**GOOD, **change}]}), words)
            for change, words in [
                ({"name": 3}, "model 0: 'name' is not a text"),
                ({"family": None}, "'family' is not a text"),
                ({"kind": "diffuser"}, "kind 'diffuser' is none of decoder, encoder, vision"),
                ({"decimals": 2.5}, "'decimals' is not a number of decimals"),
                ({"decimals": True}, "'decimals' is not"),
                ({"decimals": 21}, "'decimals' is not"),
                ({"std": [0.1]}, "'std' does not hold q, k, v and o"),
                ({"std": {"q": [0.1]}}, "'std' does not hold"),
                ({"std": {**GOOD["std"], "q": 0.1}}, "std of q is not a list"),  # type: ignore[dict-item]
                ({"std": {**GOOD["std"], "o": [0.1, -0.2]}}, "std of o is not a list"),  # type: ignore[dict-item]
                ({"std": {**GOOD["std"], "o": [0.1, "x"]}}, "std of o is not"),  # type: ignore[dict-item]
                ({"std": {**GOOD["std"], "o": [0.1, 1e301]}}, "std of o is not"),  # type: ignore[dict-item]
            ]
        ),
        (json.dumps(NULL_FILE).replace("0.2", "NaN", 1), "not valid JSON"),
    ],
)
def test_a_file_that_is_none_is_refused_in_a_line(text: str, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(LlmfpError) as caught:
        null.load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_holds_one_fingerprint_a_family(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    with pytest.raises(LlmfpError, match="no fingerprints"):
        null.load(tmp_path)
    for n in range(3):
        (tmp_path / f"sub{n}").mkdir()
        tower = tower_of(std=curves(rng))
        kind = "encoder" if n == 2 else "decoder"
        fingerprint_of(tower, f"m{n}", str(n) * 64, kind).save(tmp_path / f"sub{n}" / "x.fp.safetensors")
    (tmp_path / "notes.txt").write_text("no fingerprint")
    found = null.load(tmp_path)[len(null.load()) :]
    assert [(each.name, each.kind, each.decimals) for each in found] == [
        ("m0", "decoder", None), ("m1", "decoder", None), ("m2", "encoder", None),
    ]  # fmt: skip
    assert all(each.tower is not None for each in found)
    (tmp_path / "sub0" / "y.fp.safetensors").write_bytes((tmp_path / "sub1" / "x.fp.safetensors").read_bytes())
    with pytest.raises(LlmfpError, match=r"sub1.*: the same weights as .*y\.fp"):
        null.load(tmp_path)
    (tmp_path / "sub0" / "y.fp.safetensors").write_bytes(b"not one")
    with pytest.raises(LlmfpError, match=r"y\.fp\.safetensors"):
        null.load(tmp_path)
    with pytest.raises(LlmfpError, match="nowhere"):
        null.load(tmp_path / "nowhere")


# --- what is shipped -------------------------------------------------------------------------------------------------


def test_what_is_shipped_says_where_it_comes_from() -> None:
    shipped = json.loads(script.NULL.read_text())
    assert "github" in shipped["source"].lower() or "PaddlePaddle/GraphNet" in shipped["source"]
    assert set(shipped["n"]) == {each["family"] for each in shipped["models"]}
    assert all(count >= 1 for count in shipped["n"].values())
    found = null.load()
    assert len(found) == len(shipped["models"]), "one model a family"
    assert all(each.decimals == 3 and each.tower is None for each in found)


def test_what_is_shipped_is_what_the_script_makes(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "NULL", tmp_path / "null.json")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(script, "measure", lambda *_: {})  # takes half a minute; its figures are kept in bench/results
    shipped = Path(null.__file__).with_name("null.json").read_text()
    assert script.main([str(shared_data / "sigma_bank.json")]) == 0
    assert (tmp_path / "null.json").read_text() == shipped
    assert capsys.readouterr().out == "{}\n"
    assert script.main([]) == 2


def test_the_bank_knows_every_model_the_script_names(shared_data: Path) -> None:
    bank = json.loads((shared_data / "sigma_bank.json").read_text())["models"]
    named = {name for _, members in script.FAMILIES.values() for name in members}
    assert named | set(script.UNTRAINED) <= set(bank)
    assert all(name.startswith(script.OPUS) for name in set(bank) - named - set(script.UNTRAINED))
