"""What can be read, as README.md lists it: `python -m llmfp.report.supported` writes it there.

Every line comes from what does the reading: a format's from the first paragraph of its module, a family's from its
data file.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from llmfp.architecture.families import families
from llmfp.encoding import FLOATS, refused
from llmfp.encoding.blocks import NEVER_STORED
from llmfp.encoding.ggml import BLOCKS

FORMATS = ("scaled", "compressed", "gptq", "bitsandbytes", "mxfp4", "nvfp4", "mlx", "hqq")
"""Modules of llmfp.encoding that read a quantised format."""
BEGIN, END = "<!-- supported: begin -->\n", "<!-- supported: end -->\n"


def markdown() -> str:
    """The lists between README.md's two markers."""
    lines = ["| stored as | what is read |", "|---|---|", f"| plain floats | {', '.join(FLOATS)} |"]
    lines += [f"| {_form(name)} | {_described(name)} |" for name in FORMATS]
    blocks = ", ".join(sorted(set(BLOCKS) - set(NEVER_STORED)))
    lines.append(f"| GGUF | versions 2 and 3, split files; plain floats and {blocks} |")
    named = sorted({form for form, _ in (*refused.CODES.values(), *refused.BESIDE.values())})
    lines += ["", f"Refused by name: {', '.join(named)}.", "", "| family | model types |", "|---|---|"]
    for name, family in sorted(families().items()):
        types = ", ".join(sorted(each.removeprefix("gguf ") for each in family.model_types))
        lines.append(f"| {name} | {types or 'by its tensors alone'} |")
    return "\n".join(lines) + "\n"


def _form(name: str) -> str:
    return {"scaled": "FP8 and int8 with scales"}.get(name, _first_sentence(name).partition(":")[0])


def _described(name: str) -> str:
    head, colon, rest = _first_sentence(name).partition(": ")
    return rest if colon and name != "scaled" else f"{head}{colon}{rest}"


def _first_sentence(name: str) -> str:
    """Of the module's docstring, on one line."""
    doc = importlib.import_module(f"llmfp.encoding.{name}").__doc__ or ""
    return " ".join(doc.split("\n\n")[0].split()).rstrip(".")


def inserted(readme: str) -> str:
    """The text with what stands between the markers written anew."""
    before, _, rest = readme.partition(BEGIN)
    return before + BEGIN + markdown() + END + rest.partition(END)[2]


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    path.write_text(inserted(path.read_text()))
