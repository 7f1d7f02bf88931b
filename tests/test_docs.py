"""The documentation builds without a warning, names every command, option and key there is, and does what it says:
every command and every Python block in it is run, on the demo checkpoint.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import llmfp
from llmfp.cli import COMMANDS
from tests.test_demo import DEMO

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WORKFLOW = DOCS / "examples" / "lineage-gate.yml"
_FENCE = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the tutorial was worked through in: model, child and stranger lie there."""
    if not DEMO.exists():
        pytest.skip("the demo checkpoint is not here; make scan fetches it")
    if shutil.which("llmfp-fast", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("llmfp-fast is not installed beside this Python")
    folder = tmp_path_factory.mktemp("docs")
    (folder / "model").symlink_to(DEMO)
    for language, code in blocks(DOCS / "tutorial.md"):
        run(language, code, folder)
    return folder


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    for found in _FENCE.finditer(page.read_text("utf-8")):
        yield found[1], found[2]


def run(language: str, code: str, folder: Path) -> str:
    """What a block prints. Fails where it fails."""
    if language == "console":
        assert all(line.startswith("$ ") for line in code.splitlines()), code
        code = "\n".join(line[2:] for line in code.splitlines())
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "console" else [sys.executable, "-c", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="sphinx is not installed")
    copied = shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("_pictures"))
    build = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        str(copied),
        str(tmp_path / "html"),
    ]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    reference = re.sub("<[^>]*>", "", (tmp_path / "html" / "cli.html").read_text("utf-8"))
    for name in COMMANDS:
        command = importlib.import_module(f"llmfp.cli.{name}").command
        assert f"llmfp-fast {name}" in reference
        for option in command.params:
            if isinstance(option, click.Option):
                assert all(flag in reference for flag in option.opts), option.opts
    assert "<svg" in (tmp_path / "html" / "method.html").read_text("utf-8")


def test_the_tutorial_finds_what_it_says(workplace: Path) -> None:
    found = json.loads(run("console", "$ llmfp-fast compare model.fp.safetensors stranger --json", workplace))
    assert found["verdict"] == "none_detected"
    assert found["profile"]["pearson"]["mean"] > 0.99
    assert (workplace / "child.html").read_text("utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("page", sorted(path.name for path in (DOCS / "guides").glob("*.md")))
def test_a_guide_does_what_it_says(workplace: Path, page: str) -> None:
    ran = [run(language, code, workplace) for language, code in blocks(DOCS / "guides" / page)]
    assert ran


def test_the_workflow_is_valid_and_its_gates_close(workplace: Path) -> None:
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    steps = [step["run"] for step in workflow["jobs"]["gate"]["steps"] if "run" in step]
    gates = [step for step in steps if step.startswith("llmfp-fast")]
    assert len(gates) == 2
    folder = workplace / "gate"
    folder.mkdir()
    (folder / "base").symlink_to(workplace / "model")
    (folder / "release").symlink_to(workplace / "child")
    run("console", "$ llmfp-fast scan ../stranger --out forbidden.fp.safetensors", folder)
    for gate in gates:
        run("console", f"$ {gate}", folder)
    (folder / "forbidden.fp.safetensors").unlink()
    (folder / "forbidden.fp.safetensors").symlink_to(workplace / "model.fp.safetensors")
    assert run("console", f"$ {gates[1]} && exit 9 || test $? = 1", folder)


def keys(found: Any) -> set[str]:
    """Every key of a JSON object, but for those that are names of models' own things."""
    if isinstance(found, dict):
        return {*found, *(key for name, each in found.items() if name not in _FREE for key in keys(each))}
    return {key for each in found for key in keys(each)} if isinstance(found, list) else set()


_FREE = ("towers", "roles", "versions", "lost", "reasons")


def test_every_key_of_the_formats_is_written_down(workplace: Path) -> None:
    text = (DOCS / "formats.md").read_text("utf-8")
    scanned = json.loads(run("console", "$ llmfp-fast scan model --json", workplace))
    compared = llmfp.compare(workplace / "model.fp.safetensors", workplace / "child", permutations=10).to_json()
    zoo = [scanned, json.loads(json.dumps(compared))]
    assert {key for each in zoo for key in keys(each) if f"`{key}`" not in text} <= {"schema"}
