"""Figures for notebooks, drawn by Matplotlib from the JSON that the command line prints."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfp.architecture.specs import ROLES
from llmfp.errors import LlmfpError
from llmfp.report import words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Json = Mapping[str, Any]

_STYLES: dict[str, dict[str, Any]] = {
    "A": {"color": "#1f5a99", "marker": "o", "markersize": 3},
    "B": {"color": "#a8500a", "marker": "s", "markersize": 3, "linestyle": "--"},
}


def of_fingerprint(found: Json) -> Figure:
    """σ of Q, K, V and O over layers."""
    figure = _figure(10, 2.6)
    for axes, role in zip(figure.subplots(1, len(ROLES)), map(str, ROLES), strict=True):
        _curve(axes, found["layers"], found["std"][role], "A")
        axes.set_title(f"σ of {role.upper()}")
        axes.set_xlabel("layer")
    figure.suptitle(_plain(found["source"]["name"]))
    return figure


def of_comparison(found: Json) -> Figure:
    """σ of both models over relative depth; then what tests found: null, permutations, coherence."""
    figure = _figure(11, 5.4)
    above, below = figure.subplots(2, len(ROLES))
    for axes, role in zip(above, map(str, ROLES), strict=True):
        for letter, side in (("A", found["a"]), ("B", found["b"])):
            numbers = side["layer_numbers"]
            _curve(axes, np.linspace(0, 1, len(numbers)), side["std"][role], letter)
        axes.set_title(f"σ of {role.upper()}")
        axes.set_xlabel("relative depth")
    above[0].legend(frameon=False)
    _null(below[0], found)
    _permuted(below[1], found, "residual")
    _permuted(below[2], found, "heads")
    _coherence(below[3], found)
    names = " and ".join(_plain(f"{letter} = {found[key]['name']}") for letter, key in (("A", "a"), ("B", "b")))
    figure.suptitle(f"{names}: {words.VERDICTS[found['verdict']].lower()}, p = {words.p(found['p_value'])}")
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        importlib.import_module("matplotlib.pyplot")  # tells a notebook how to show what follows
        from matplotlib.figure import Figure
    except ImportError:
        raise LlmfpError("matplotlib is not installed", hint="pip install 'llmfp[notebook]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def _plain(text: str) -> str:
    """A stranger's name is no formula: Matplotlib would typeset what stands between dollars."""
    return text.replace("$", r"\$")


def _curve(axes: Axes, x: Any, stds: Any, letter: str) -> None:
    axes.plot(x, [np.nan if s is None else s for s in stds], label=letter, **_STYLES[letter])
    axes.spines[["top", "right"]].set_visible(False)


def _null(axes: Axes, found: Json) -> None:
    axes.set_title("score among strangers")
    null, score = found["profile"]["null"], found["profile"]["pearson"]["mean"]
    if null is None or score is None:
        return _absent(axes, found, "profile")
    for row, side in enumerate("ab"):
        axes.plot([other[side] for other in null["strangers"]], [row] * len(null["strangers"]), "k.", alpha=0.6)
    axes.axvline(score, color="#b3261e")
    axes.set_yticks([0, 1], ["A with", "B with"])
    axes.set_ylim(1.6, -0.6)
    axes.set_xlabel("mean Pearson")
    return None


def _permuted(axes: Axes, found: Json, test: str) -> None:
    axes.set_title(words.TITLES[test])
    if (made := found[test]) is None:
        return _absent(axes, found, test)
    bars = made["permuted"]
    left = bars["start"] + bars["width"] * np.arange(len(bars["counts"]))
    axes.bar(left, bars["counts"], bars["width"] or 0.1, align="edge", color="#9aa3ab")
    axes.axvline(made["z"], color="#b3261e")
    axes.set_xlabel(f"z; observed {made['z']:+.1f}")
    return None


def _coherence(axes: Axes, found: Json) -> None:
    axes.set_title(words.TITLES["coherence"])
    if (made := found["coherence"]) is None:
        return _absent(axes, found, "coherence")
    matrix = np.array(made["matrix"], np.float64)
    image = axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set_xlabel("layer of B")
    axes.set_ylabel("layer of A")
    return None


def _absent(axes: Axes, found: Json, test: str) -> None:
    reason = found["lost"].get(test, "not made")
    axes.text(
        0.5, 0.5, _plain(textwrap.fill(reason, 26)), ha="center", va="center", transform=axes.transAxes, wrap=True
    )
    axes.set_axis_off()
