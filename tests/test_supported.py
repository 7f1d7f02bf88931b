"""README.md lists what the code can read, no more and no less."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from llmfp import encoding
from llmfp.report import supported

README = Path(__file__).parents[1] / "README.md"


def test_the_readme_says_what_the_code_reads() -> None:
    text = README.read_text()
    assert text == supported.inserted(text), "write it anew: python -m llmfp.report.supported"


def test_every_format_is_in_the_list() -> None:
    modules = {info.name for info in pkgutil.iter_modules(encoding.__path__)}
    reading = {name for name in modules if hasattr(importlib.import_module(f"llmfp.encoding.{name}"), "encode")}
    assert reading == {*supported.FORMATS, "blocks", "refused"}
