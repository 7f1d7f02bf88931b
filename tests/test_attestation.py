"""An ML-BOM that CycloneDX's own schema accepts, and an in-toto statement whose subject is the weights as they are:
digests are computed from the bytes, a detected relation has no direction, every file named is the file that is there.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llmfp
from llmfp import attestation
from llmfp.__main__ import main
from llmfp.checkpoint import open_checkpoint
from llmfp.errors import CheckpointError
from tests.checkpoints import build, write_model

pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib is not installed")

EVIL = '"><script>\u202e=cmd'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model in two shards with a name nobody should trust, and a relative of it."""
    folder = tmp_path_factory.mktemp("attest")
    model = build("llama", layers=12, heads=4, kv_heads=2, head_dim=16, hidden=96)
    a = model.write(folder / EVIL.replace("/", ""), shards=2)
    rng = np.random.default_rng(3)
    for name, tensor in model.tensors.items():
        assert isinstance(tensor, np.ndarray)
        model.tensors[name] = (tensor + 0.1 * tensor.std() * rng.standard_normal(tensor.shape)).astype(tensor.dtype)
    return a, model.write(folder / "child")


@pytest.fixture(scope="module")
def attested(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "evidence"
    a, b = models
    assert main(["attest", str(a), "--against", str(b), "--out", str(out)]) == 0
    return out


def bom_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "bom.cdx.json").read_text())
    return found


def properties(component: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in component["properties"]}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def invalid(bom: str) -> object:
    pytest.importorskip("jsonschema", reason="cyclonedx-python-lib[json-validation] is not installed")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom)


def test_the_bom_is_what_cyclonedx_accepts(attested: Path) -> None:
    text = (attested / "bom.cdx.json").read_text()
    assert invalid(text) is None
    assert invalid(text.replace('"machine-learning-model"', '"magic"')) is not None
    assert json.loads(text)["specVersion"] == "1.6"


def test_digests_are_those_of_the_bytes(attested: Path, models: tuple[Path, Path]) -> None:
    expected = {path.name: sha256(path) for path in models[0].glob("*.safetensors")}
    assert len(expected) == 2
    model = bom_of(attested)["metadata"]["component"]
    assert {each["name"]: each["hashes"][0]["content"] for each in model["components"]} == expected
    statement = json.loads((attested / "statement.intoto.json").read_text())
    assert {each["name"]: each["digest"]["sha256"] for each in statement["subject"]} == expected
    kept = llmfp.load(attested / "fingerprint.fp.safetensors")
    assert {file["name"]: file["sha256"] for file in kept.source["files"]} == expected


def test_the_statement_is_in_totos(attested: Path) -> None:
    """The fields, their types and the uniqueness of names that in-toto Statement v1 asks for."""
    statement = json.loads((attested / "statement.intoto.json").read_text())
    assert set(statement) == {"_type", "subject", "predicateType", "predicate"}
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://cyclonedx.org/bom"
    assert statement["predicate"] == bom_of(attested)
    names = [subject["name"] for subject in statement["subject"]]
    assert len(names) == len(set(names)) > 0
    assert all(re.fullmatch("[0-9a-f]{64}", subject["digest"]["sha256"]) for subject in statement["subject"])


def test_a_detected_relation_is_a_variant_with_its_evidence(attested: Path, models: tuple[Path, Path]) -> None:
    model = bom_of(attested)["metadata"]["component"]
    found = json.loads((attested / "comparison.json").read_text())
    assert model["name"] == EVIL
    assert found["verdict"] == "related"
    assert set(model["pedigree"]) == {"variants", "notes"}  # no ancestors, no descendants: who was first is not known
    assert [each["name"] for each in model["pedigree"]["variants"]] == ["child"]
    assert "Not shown: Which of the two models came first" in model["pedigree"]["notes"]
    named = properties(model)
    assert named["llmfp:comparison:verdict"] == "related"
    assert float(named["llmfp:comparison:p-value"]) == found["p_value"]
    assert float(named["llmfp:comparison:residual:z"]) == found["residual"]["z"]
    assert named["llmfp:fingerprint:digest"] == llmfp.scan(models[0]).digest
    beside = {each["url"]: each["hashes"][0]["content"] for each in model["externalReferences"]}
    assert beside == {name: sha256(attested / name) for name in ("comparison.json", "fingerprint.fp.safetensors")}


def test_a_stranger_is_no_variant(models: tuple[Path, Path], tmp_path: Path) -> None:
    stranger = build("llama", layers=12, heads=4, kv_heads=2, head_dim=16, hidden=96, seed=9).write(tmp_path / "other")
    assert main(["attest", str(models[0]), "--against", str(stranger), "--out", str(tmp_path / "out")]) == 0
    model = bom_of(tmp_path / "out")["metadata"]["component"]
    assert "variants" not in model["pedigree"]
    assert "does not show that there is none" in model["pedigree"]["notes"]
    assert invalid((tmp_path / "out" / "bom.cdx.json").read_text()) is None


def test_without_a_comparison_nothing_is_said_of_pedigree(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attest", str(models[1]), "--out", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["schema"] == "llmfp.attestation/1"
    assert said["verdict"] is None
    assert {each["name"]: each["sha256"] for each in said["written"]} == {
        path.name: sha256(path) for path in (tmp_path / "out").iterdir()
    }
    model = bom_of(tmp_path / "out")["metadata"]["component"]
    assert "pedigree" not in model
    assert model["hashes"][0]["content"] == sha256(models[1] / "model.safetensors")
    assert model["modelCard"]["modelParameters"]["architectureFamily"] == "llama"


def test_a_saved_fingerprint_can_be_attested_where_it_holds_digests(
    attested: Path, models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attest", str(attested / "fingerprint.fp.safetensors"), "--out", str(tmp_path / "again")]) == 0
    again = bom_of(tmp_path / "again")["metadata"]["component"]
    assert again["components"] == bom_of(attested)["metadata"]["component"]["components"]
    bare = tmp_path / "bare.fp.safetensors"
    llmfp.scan(models[1]).save(bare)
    capsys.readouterr()
    assert main(["attest", str(bare), "--out", str(tmp_path / "never")]) == 2
    assert "does not hold the digests" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_a_file_that_changed_since_its_header_was_read_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", {"x": np.ones((4, 4), np.float32)}, {})
    checkpoint = open_checkpoint(model)
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        attestation.weight_files(checkpoint)


def test_a_cache_that_keeps_another_content_under_a_hash_is_found_out(tmp_path: Path) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    model = write_model(tmp_path / "m", {"x": np.ones((4, 4), np.float32)}, {})
    snapshot.mkdir(parents=True)
    (blobs / ("f" * 64)).write_bytes((model / "model.safetensors").read_bytes())
    (snapshot / "model.safetensors").symlink_to(blobs / ("f" * 64))
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="but the cache keeps it as ffff"):
        attestation.weight_files(open_checkpoint(snapshot))


def test_progress_counts_every_byte_once(models: tuple[Path, Path]) -> None:
    seen: list[tuple[int, int]] = []
    files = attestation.weight_files(open_checkpoint(models[0]), lambda done, total: seen.append((done, total)))
    total = sum(file.nbytes for file in files)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
