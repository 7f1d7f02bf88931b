"""Charts as SVG, drawn by Vega-Lite on this machine: a page needs no script and no network to show them.

Colours are CSS variables of the page (light, dark, print); a mark carries its own words, which hovering and screen
readers read. Text in a chart is fixed or a number, but for families' names, which Vega escapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]
Spec = dict[str, Any]

_WIDTH, _HEIGHT, _WIDE = 270, 150, 310
_SIDE = 290
_CONFIG: Spec = {
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)", "titleColor": "var(--muted)", "labelFontSize": 11, "titleFontSize": 11,
        "titleFontWeight": "normal", "gridColor": "var(--grid)", "domainColor": "var(--axis)",
        "tickColor": "var(--axis)", "labelPadding": 4, "titlePadding": 7,
    },
}  # fmt: skip
_CONFIG["axisX"] = {"grid": False}
_CONFIG["axisY"] = {"domain": False, "ticks": False}
_COLOURS = {"A": "var(--a)", "B": "var(--b)"}
STEPS = (-0.8, -0.6, -0.4, -0.2, 0.2, 0.4, 0.6, 0.8)
"""Where the heat map's colours change; between the middle two a cell stays empty."""


def curves(models: Mapping[str, Sequence[Json]], x_title: str, y_title: str) -> str:
    """A line and a mark per layer for each model: points {x, y, says}, in order; y None where there is none."""
    names = list(models)
    rows = [{**point, "model": name} for name, points in models.items() for point in points]
    colour = {"field": "model", "scale": {"domain": names, "range": [_COLOURS[n] for n in names]}, "legend": None}
    x = {"field": "x", "type": "quantitative", "title": x_title, "scale": {"nice": False, "padding": 4}}
    x["axis"] = {"tickCount": 6, **({"tickMinStep": 1} if x_title == "layer" else {})}
    y = {"field": "y", "type": "quantitative", "title": y_title, "scale": {"zero": False}, "axis": {"tickCount": 5}}
    line = {
        "mark": {"type": "line", "strokeWidth": 1.75, "invalid": "break-paths-show-domains", "aria": False},
        "encoding": {
            "strokeDash": {"field": "model", "scale": {"domain": names, "range": [[1, 0], [5, 3]]}, "legend": None}
        },
    }
    point = {
        "transform": [{"filter": "isValid(datum.y)"}],
        "mark": {"type": "point", "filled": True, "size": 26, "opacity": 1},
        "encoding": {
            "shape": {"field": "model", "scale": {"domain": names, "range": ["circle", "square"]}, "legend": None},
            "description": {"field": "says"},
        },
    }
    return _svg(
        {
            "width": _WIDTH, "height": _HEIGHT, "data": {"values": rows}, "encoding": {"x": x, "y": y, "color": colour},
            "layer": [line, point],
        }
    )  # fmt: skip


def strip(rows: Sequence[Json], titles: Sequence[str], x_title: str, marked: float, marked_says: str) -> str:
    """Dots {row, x, own, says} in a line per title, a rule at `marked`; those that are not `own` are hollow."""
    x = {"field": "x", "type": "quantitative", "title": x_title, "scale": {"nice": False, "zero": False, "padding": 8}}
    x["axis"] = {"tickCount": 6, "labelOverlap": True}
    y = {"field": "row", "type": "nominal", "title": None, "sort": list(titles), "axis": {"domain": False}}
    dots = {
        "data": {"values": list(rows)},
        "mark": {"type": "point", "size": 45, "strokeWidth": 1.2, "opacity": 1},
        "encoding": {
            "x": x, "y": y, "stroke": {"value": "var(--ink)"}, "description": {"field": "says"},
            "fill": {"condition": {"test": "datum.own", "value": "var(--ink)"}, "value": "var(--paper)"},
        },
    }  # fmt: skip
    return _svg({"width": _WIDE, "height": 30 * len(titles), "layer": [dots, *_rule(marked, marked_says)]})


def histogram(bars: Json, x_title: str, marked: float, marked_says: str) -> str:
    """The bars of evidence.permutation.Histogram, and a rule at `marked`."""
    width = bars["width"] or 0.1
    rows = [
        {
            "from": (low := bars["start"] + i * width),
            "to": low + width,
            "count": count,
            "says": f"{count:,} permutations with z from {low:.2f} to {low + width:.2f}",
        }
        for i, count in enumerate(bars["counts"])
        if count
    ]
    x = {"field": "from", "type": "quantitative", "title": x_title, "scale": {"nice": False, "padding": 6}}
    x["axis"] = {"tickCount": 8, "labelOverlap": True}
    shown = {
        "data": {"values": rows},
        "mark": {"type": "rect", "color": "var(--bar)"},
        "encoding": {
            "x": x, "x2": {"field": "to"}, "description": {"field": "says"},
            "y": {"field": "count", "type": "quantitative", "title": "permutations", "axis": {"tickCount": 4}},
            "y2": {"datum": 0},
        },
    }  # fmt: skip
    return _svg({"width": _WIDE, "height": _HEIGHT, "layer": [shown, *_rule(marked, marked_says)]})


def heat_map(
    matrix: Sequence[Sequence[float | None]], rows: Sequence[int], cols: Sequence[int], path: Sequence[Sequence[int]]
) -> str:
    """A cell per pair of layers, coloured in nine steps from −1 to 1, and a ring on every pair that was aligned.

    Empty cells are left out; the page's script finds numbers by place, so cells carry no words of their own.
    """
    cells = [
        {"r": rows[i], "c": cols[j], "v": value}
        for i, line in enumerate(matrix)
        for j, value in enumerate(line)
        if value is not None and not STEPS[3] <= value < STEPS[4]
    ]
    at = {(row, col): matrix[i][j] for i, row in enumerate(rows) for j, col in enumerate(cols)}
    rings = [
        {"r": row, "c": col, "says": f"layer {row} of A with layer {col} of B: r = {_signed(at.get((row, col)))}"}
        for row, col in path
    ]
    step = min(16.0, _SIDE / max(len(rows), len(cols)))
    axes = {
        side: {
            "field": field, "type": "ordinal", "title": title,
            "scale": {"domain": list(numbers), "padding": 0},
            "axis": {"values": list(numbers)[:: math.ceil(len(numbers) * 16 / (step * len(numbers)))],
                     "labelAngle": 0, "domain": False, "ticks": False},
        }
        for side, field, title, numbers in (("x", "c", "layer of B", cols), ("y", "r", "layer of A", rows))
    }  # fmt: skip
    colour = {
        "field": "v", "type": "quantitative", "legend": None,
        "scale": {"type": "threshold", "domain": list(STEPS), "range": [f"var(--h{i})" for i in range(9)]},
    }  # fmt: skip
    return _svg(
        {
            "width": step * len(cols), "height": step * len(rows),
            "view": {"fill": "var(--h4)", "stroke": "var(--axis)"},
            "layer": [
                {"data": {"values": cells}, "mark": {"type": "rect", "aria": False},
                 "encoding": {**axes, "fill": colour}},
                {"data": {"values": rings},
                 "mark": {"type": "point", "size": min(60.0, (0.6 * step) ** 2), "strokeWidth": 1.5, "opacity": 1},
                 "encoding": {**axes, "stroke": {"value": "var(--ink)"}, "fill": {"value": "var(--paper)"},
                              "description": {"field": "says"}}},
            ],
        }
    )  # fmt: skip


def _rule(at: float, says: str) -> list[Spec]:
    """A vertical line over the whole chart, which says what it marks."""
    data = {"values": [{"x": at, "says": says}]}
    x = {"field": "x", "type": "quantitative"}
    return [
        {
            "data": data,
            "mark": {"type": "rule", "color": "var(--mark)", "strokeWidth": 2},
            "encoding": {"x": x, "description": {"field": "says"}},
        }
    ]


def _signed(value: float | None) -> str:
    return "none" if value is None else f"{value:+.2f}"


def _svg(spec: Spec) -> str:
    import vl_convert

    drawn: str = vl_convert.vegalite_to_svg(
        {**spec, "background": None, "padding": {"left": 8, "right": 4, "top": 2, "bottom": 2}, "config": _CONFIG},
        "6.4",
    )
    return drawn
