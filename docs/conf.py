"""How the documentation is built: `make docs`. Pictures and the command line's reference are made from the code."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pictures
from sphinx.application import Sphinx

import llmfp

project = "llmfp"
author = "the llmfp authors"
copyright = "2026, the llmfp authors"  # noqa: A001 (Sphinx's name)
version = release = llmfp.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_pictures"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "llmfp"
html_static_path = ["_static"]
html_css_files = ["llmfp.css"]
html_copy_source = False
html_show_sphinx = False


def setup(app: Sphinx) -> None:
    pictures.draw(Path(__file__).parent / "_pictures")
    app.connect("autodoc-process-docstring", as_written)
    app.connect("sphinx-click-process-options", without_markup)


def as_written(_app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Docstrings are set as they are written: the first paragraph as text, aligned lists and the rest verbatim."""
    first = lines.index("") if "" in lines else len(lines)
    head = " ".join(lines[:first]).replace("\\", "\\\\").replace("`", "``").replace("*", "\\*").replace("|", "\\|")
    rest = lines[first:]
    lines[:] = [head, "", *(["::", "", *(f"    {line}" for line in rest), ""] if any(rest) else [])]


def without_markup(_app: Sphinx, _context: object, lines: list[str]) -> None:
    """Help is plain text, where a star is a star."""
    lines[:] = [line.replace(" *", " \\*") for line in lines]
