"""Fixtures that every test file may use: the command line, the back ends, and the data beside the project."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmfp.__main__ import main
from llmfp.kernels import BACKENDS, Backend, load
from tests import browser as browsers

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REQUIRE = "LLMFP_REQUIRE"
"""Back ends, and "chromium", comma-separated, whose absence is a failure and not a skip: a machine that has them must
test them."""
_CHROMIUM = "chromium"


def pytest_configure() -> None:
    if unknown := _required() - {*BACKENDS, _CHROMIUM}:
        raise pytest.UsageError(f"{REQUIRE} names unknown back ends: {', '.join(sorted(unknown))}")


@pytest.fixture
def run_main(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each back end in turn; one that cannot run here skips, saying why, unless LLMFP_REQUIRE names it."""
    name = request.param
    if importlib.util.find_spec(f"llmfp.kernels.{name}") is None:
        reason: str | None = "not written yet"
    else:
        chosen = load(name)
        if (reason := chosen.why_unavailable()) is None:
            return chosen
    if name in _required():
        pytest.fail(f"{REQUIRE} names {name}, which cannot run here: {reason}")
    pytest.skip(f"{name} cannot run here: {reason}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """../shared/data: real tensor names, slices of real checkpoints, small trained models. Not part of the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is not here")
    return SHARED_DATA


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browsers.Browser]:
    """Chromium without a screen, one for all tests."""
    if (reason := browsers.missing()) is not None:
        if _CHROMIUM in _required():
            pytest.fail(f"{REQUIRE} names chromium: {reason}")
        pytest.skip(reason)
    with browsers.started(tmp_path_factory.mktemp("browser") / "profile") as window:
        yield window


def _required() -> set[str]:
    return {name.strip() for name in os.environ.get(REQUIRE, "").split(",")} - {""}
