"""Q–Q plots of p-values against the uniform, as SVG: −log₁₀ of what is expected across, of what was found up.

Valid p-values lie on the diagonal or below it; above it they claim too much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

SIZE, MARGIN, DECADES = 360, 44, 4
_APART = 0.02
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")


def qq_plot(series: Mapping[str, Sequence[float]]) -> str:
    """A dot per p-value, one colour a series; of dots that would lie on each other one is drawn."""
    drawn = [
        f'<line x1="{_across(0)}" y1="{_up(0)}" x2="{_across(DECADES)}" y2="{_up(DECADES)}" stroke="#999"/>',
        *(
            f'<text x="{_across(n)}" y="{_up(0) + 16}" text-anchor="middle">{n}</text>'
            f'<text x="{_across(0) - 8}" y="{_up(n) + 4}" text-anchor="end">{n}</text>'
            f'<path d="M{_across(n)} {_up(0)}v-4M{_across(0)} {_up(n)}h4" stroke="#000"/>'
            for n in range(DECADES + 1)
        ),
        f'<text x="{_across(DECADES / 2)}" y="{_up(0) + 34}" text-anchor="middle">−log₁₀ p, uniform</text>',
        f'<text transform="translate(12 {_up(DECADES / 2)}) rotate(-90)" text-anchor="middle">−log₁₀ p, found</text>',
        f'<path d="M{_across(0)} {_up(DECADES)}V{_up(0)}H{_across(DECADES)}" fill="none" stroke="#000"/>',
    ]
    for number, (label, p_values) in enumerate(series.items()):
        colour, ordered = COLOURS[number % len(COLOURS)], sorted(p_values)
        drawn.append(
            f'<text x="{_across(0.1)}" y="{MARGIN + 14 * number}" fill="{colour}">{label}, n = {len(ordered)}</text>'
        )
        last = math.inf
        for rank, p in enumerate(ordered):
            expected = -math.log10((rank + 0.5) / len(ordered))
            if last - expected >= _APART:
                x, y = _across(min(expected, DECADES)), _up(min(-math.log10(p), DECADES))
                drawn.append(f'<circle cx="{x}" cy="{y}" r="1.5" fill="{colour}"/>')
                last = expected
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE} {SIZE}" font-family="sans-serif" font-size="11">'
    )
    return "\n".join([head, f'<rect width="{SIZE}" height="{SIZE}" fill="#fff"/>', *drawn, "</svg>\n"])


def _across(decades: float) -> float:
    return round(MARGIN + decades * (SIZE - 1.5 * MARGIN) / DECADES, 1)


def _up(decades: float) -> float:
    return round(SIZE - _across(decades), 1)
