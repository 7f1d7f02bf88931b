"""Pages that stand alone: one HTML file that asks no network for anything, filled from a command's JSON alone.

Everything shown comes from the object that `--json` prints, which the page carries whole. Templates escape what they
are given: names of models, tensors and families are strangers' texts. The page's policy allows its own style and its
own script, by their hashes, and nothing else; data never becomes script.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from llmfp.architecture.specs import ROLES
from llmfp.errors import LlmfpError
from llmfp.report import charts, tables, words
from llmfp.report.lineage import lineage

if TYPE_CHECKING:
    from jinja2 import Environment

Json = Mapping[str, Any]
Cell = str | int | float | None

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing of a figure. way: which of the figure's switchable ways of looking it belongs to."""

    title: str
    svg: str
    way: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """Drawings, what they say in words, and their numbers as a table.

    ways     names of ways of looking, one of which is shown at a time, all in print
    summary  the text equivalent in one sentence
    matrix   the data's name in the page's JSON, where the script finds a heat map's numbers
    """

    id: str
    title: str
    summary: str
    panels: Sequence[Panel]
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    ways: Sequence[str] = ()
    legend: Sequence[str] = ()
    matrix: str = ""
    wide: bool = field(default=False)

    @property
    def csv(self) -> str:
        """The table as a link's target."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([_harmless(each) for each in self.columns])
        writer.writerows([_harmless(each) for each in row] for row in self.rows)
        return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(text.getvalue().encode()).decode()}"


def ready() -> None:
    """Raises LlmfpError where the library that draws is not installed; so before the work, not after it."""
    if importlib.util.find_spec("vl_convert") is None:
        raise LlmfpError("a report needs vl-convert-python, which draws its charts", hint="pip install 'llmfp[report]'")


def comparison(found: Json) -> str:
    """The report on a comparison, from the object that `compare --json` prints."""
    ready()
    figures = [_curves(_sides(found)), *_null(found), *_permuted(found), *_coherence(found)]
    return _rendered("comparison.html.jinja", found, figures, found=found, tests=tests(found))


def fingerprint(found: Json) -> str:
    """The report on a model, from the object that `scan --json` prints."""
    ready()
    figures = [_curves({"A": (found["layers"], found["std"])})]
    return _rendered("fingerprint.html.jinja", found, figures, found=found)


def atlas(found: Json) -> str:
    """The atlas of a registry, from the object that `atlas --json` prints."""
    return _rendered(
        "atlas.html.jinja",
        found,
        [],
        script_name="atlas.js",
        found=found,
        families=lineage(found),
        relatives=_relatives(found),
    )


def _relatives(found: Json) -> list[int]:
    """How many relations each model has, declared or detected."""
    counts = [0] * len(found["models"])
    for edge in found["edges"]:
        counts[edge["a"]] += 1
        counts[edge["b"]] += 1
    return counts


def fragment(template: str, found: Json, **more: Any) -> str:
    """A piece of a page for a notebook, without drawings."""
    return _environment().get_template(template).render(found=found, **more)


def tests(found: Json) -> list[dict[str, Any]]:
    """The rows of `tables.tests`, each with its test's title."""
    columns = tables.tests(found)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [{**row, "title": words.TITLES[row["test"]]} for row in rows]


# --- figures


Curves = Mapping[str, tuple[Sequence[int], Mapping[str, Sequence[float | None]]]]
"""By letter, A or B: layer numbers, and σ by role."""


def _sides(found: Json) -> Curves:
    return {letter: (found[key]["layer_numbers"], found[key]["std"]) for letter, key in (("A", "a"), ("B", "b"))}


def _curves(models: Curves) -> Figure:
    alike = len({tuple(layers) for layers, _ in models.values()}) == 1
    x_title = "layer" if alike else "relative depth"
    panels = []
    rows: list[list[Cell]] = []
    for role in map(str, ROLES):
        if not any(s is not None for _, std in models.values() for s in std[role]):
            continue
        for way, y_title, scaled in (("raw", "σ", lambda std: std), ("normalised", "z of σ", standardised)):
            points = {
                letter: list(_points(letter, role, layers, scaled(std[role]), y_title, alike))
                for letter, (layers, std) in models.items()
            }
            panels.append(Panel(role.upper(), charts.curves(points, x_title, y_title), way))
        for letter, (layers, std) in models.items():
            both = zip(layers, std[role], standardised(std[role]), strict=True)
            rows += [[letter, role.upper(), layer, raw, z] for layer, raw, z in both]
    return Figure(
        "curves",
        "σ of the attention matrices, layer by layer",
        "Population standard deviation of all elements of the query, key, value and output projections. Raw: as it is. "
        "Normalised: less its mean over layers, divided by its standard deviation over layers, so that only the course "
        "shows, as in the published score.",
        panels,
        ("model", "role", "layer", "σ", "normalised"),
        rows,
        ways=("raw", "normalised"),
        legend=tuple(models) if len(models) > 1 else (),
    )


def standardised(stds: Sequence[float | None]) -> list[float | None]:
    """Less the mean, divided by the population standard deviation, over the layers that have a σ."""
    known = [s for s in stds if s is not None]
    spread = pstdev(known) if known else 0.0
    if not spread:
        return [None] * len(stds)
    centre = fmean(known)
    return [None if s is None else (s - centre) / spread for s in stds]


def _points(
    letter: str, role: str, layers: Sequence[int], values: Sequence[float | None], what: str, alike: bool
) -> Iterator[dict[str, Any]]:
    for i, (layer, value) in enumerate(zip(layers, values, strict=True)):
        x = layer if alike else i / max(len(layers) - 1, 1)
        yield {"x": x, "y": value, "says": f"{letter}, {role.upper()}, layer {layer}: {what} = {number(value)}"}


def _null(found: Json) -> Iterator[Figure]:
    null, score = found["profile"]["null"], found["profile"]["pearson"]["mean"]
    if null is None or score is None:
        return
    titles = {"a": "A with", "b": "B with"}
    rows = [
        {
            "row": titles[side], "x": other[side], "own": other["kind"] == null["kind"],
            "says": f"{titles[side]} {other['family']} ({other['kind']}): {other[side]:.3f}",
        }
        for side in titles
        for other in null["strangers"]
    ]  # fmt: skip
    below = round(null["n"] * null["percentile"] / 100)
    yield Figure(
        "null",
        "The published score beside that of unrelated models",
        f"A with B: {score:.3f}, marked by the line. Each dot is one of the two beside a model of an unrelated family; "
        f"filled dots are of the same kind ({null['kind']}), from which p follows: the score is above {below} of "
        f"{null['n']}, p = {words.p(null['p_value'])}. With so few families p cannot become small: this score informs "
        "and rarely decides.",
        [Panel("", charts.strip(rows, list(titles.values()), "mean Pearson correlation of σ curves", score,
                                f"A with B: {score:.3f}"))],
        ("family", "kind", "with A", "with B"),
        [[other["family"], other["kind"], other["a"], other["b"]] for other in null["strangers"]],
        wide=True,
    )  # fmt: skip


_PERMUTED = {
    "residual": (
        "Residual symmetry: the same coordinates?",
        "If the two models began from separate random values, the numbering of residual coordinates in one says "
        "nothing about the other, and permuting it within blocks gives values like the observed one.",
    ),
    "heads": (
        "Head symmetry: the same heads?",
        "If the two models began from separate random values, the numbering of attention heads in one says nothing "
        "about the other, and permuting them gives values like the observed one.",
    ),
}


def _permuted(found: Json) -> Iterator[Figure]:
    for name, (title, idea) in _PERMUTED.items():
        if (made := found[name]) is None:
            continue
        bars = made["permuted"]
        rows = [
            [bars["start"] + i * bars["width"], bars["start"] + (i + 1) * bars["width"], count]
            for i, count in enumerate(bars["counts"])
        ]
        yield Figure(
            name,
            title,
            f"{idea} Observed: z = {made['z']:+.1f}, the line. Grey: {made['permutations']:,} permutations, from "
            f"{bars['start']:+.1f} to {bars['start'] + len(bars['counts']) * bars['width']:+.1f}. "
            f"p = {words.p(made['p_value'])}.",
            [Panel("", charts.histogram(bars, "z", made["z"], f"observed: z = {made['z']:+.2f}"))],
            ("z from", "z to", "permutations"),
            rows,
            wide=True,
        )


def _coherence(found: Json) -> Iterator[Figure]:
    if (made := found["coherence"]) is None:
        return
    rows, cols = found["a"]["layer_numbers"], found["b"]["layer_numbers"]
    yield Figure(
        "coherence",
        "Rotary coherence: which layer goes with which?",
        f"Correlation of every layer of A with every layer of B, in what the known function-preserving rewrites leave "
        f"of queries and keys. Rings: the {len(made['layer_map'])} layers that were aligned, "
        f"{words.ranges(made['layer_map'])} (A with B), with a mean correlation of {made['score']:+.2f}; "
        f"{made['excess']:+.1f} standard deviations above what alignment alone gives models of these depths. A line of "
        "dark cells along the rings is what a common origin looks like; strangers have none.",
        [Panel("", charts.heat_map(made["matrix"], rows, cols, made["layer_map"]))],
        ("layer of A \\ of B", *map(str, cols)),
        [[row, *line] for row, line in zip(rows, made["matrix"], strict=True)],
        matrix="coherence",
        wide=True,
    )


# --- rendering


def number(value: Any) -> str:
    """A number for people: four significant digits; what is missing, a dash."""
    if value is None:
        return "–"
    if isinstance(value, int) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 or not math.isfinite(value) else f"{value:.3e}"


def _without_word(verdict: str) -> str:
    """The words of a verdict that stands above them already."""
    rest = verdict.partition(": ")[2]
    return rest[:1].upper() + rest[1:]


def _one_in(odds: float) -> str:
    """To two digits: 50,000; beyond a million a power of ten is read more easily."""
    return f"{float(f'{odds:.2g}'):,.0f}" if odds < 1e6 else f"{odds:.1e}".replace("e+", " × 10^").replace("^0", "^")


def _harmless(cell: Cell) -> Cell:
    """Text that a spreadsheet would take for a formula gets an apostrophe in front."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def _rendered(
    template: str, data: Json, figures: Sequence[Figure], *, script_name: str = "page.js", **more: Any
) -> str:
    style, script = _asset("page.css"), _asset(script_name)
    return (
        _environment()
        .get_template(template)
        .render(data=data, figures=figures, style=style, script=script, style_hash=_hash(style),
                script_hash=_hash(script), **more)
    )  # fmt: skip


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("llmfp.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "p": words.p, "without_word": _without_word, "one_in": _one_in}
    environment.globals |= {
        "verdict_words": words.verdict, "verdict_names": words.VERDICTS, "titles": words.TITLES,
        "not_shown": words.NOT_SHOWN, "compare_command": words.compare_command, "scan_command": words.scan_command,
    }  # fmt: skip
    environment.policies["json.dumps_function"] = json.dumps
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": True}
    return environment


def _asset(name: str) -> str:
    from importlib.resources import files

    return (files("llmfp.report") / "templates" / name).read_text("utf-8")
