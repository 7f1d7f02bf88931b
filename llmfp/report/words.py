"""Findings in words, from the JSON that says them: the terminal, the report and the notebook speak alike."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]

TITLES = {
    "residual": "residual symmetry",
    "heads": "head symmetry",
    "coherence": "rotary coherence",
    "profile": "profile",
    "digest": "equal digests",
}
"""The tests, by their names in JSON."""
VERDICTS = {"related": "Related", "none_detected": "None detected", "inconclusive": "Inconclusive"}
NOT_SHOWN = (
    "Which of the two models came first: nothing here shows the direction of descent.",
    "How weights were passed on, by whom, or whether a licence allowed it.",
    "That two models are independent: a relation that was disguised well enough looks like none.",
    "Relations without shared weights, such as distillation. A merge is related to each of its parents.",
)
"""What no comparison shows, whatever its verdict."""


def verdict(found: Json) -> str:
    """The verdict of a comparison's JSON, with what it rests on."""
    rests_on = found["rests_on"]
    *others, last = [TITLES[name] for name in rests_on] or [""]
    names = f"{', '.join(others)} and {last}" if others else last
    match found["verdict"]:
        case "related" if "digest" in rests_on:
            return "related: the attention weights of A and B are the same to the bit."
        case "related":
            return (
                "related: weights of A and B have a common origin. Two models that began from separate random values "
                f"would agree this well with probability {p(found['p_value'])} at most ({found['basis']}), by {names}. "
                "A common initial seed alone can have the same effect, weakly; which model came first is not shown."
            )
        case "none_detected":
            return (
                f"none detected: {names} could have shown a common origin at {found['alpha']:g} and did not "
                f"(p = {p(found['p_value'])}, {found['basis']}). That does not show that there is none."
            )
        case _:
            return f"inconclusive: no test could be made here that decides at {found['alpha']:g}; see what is missing."


def p(value: float | None) -> str:
    """A probability in two digits."""
    return "-" if value is None else f"{value:.2g}"


def ranges(layer_map: Sequence[Sequence[int]]) -> str:
    """Pairs of layers, runs of consecutive ones as one: 0-7 with 0-7, 9-11 with 8-10."""
    runs: list[list[Sequence[int]]] = []
    for pair in layer_map:
        if runs and [each + 1 for each in runs[-1][-1]] == list(pair):
            runs[-1].append(pair)
        else:
            runs.append([pair])
    return ", ".join(" with ".join(_run(run[0][side], run[-1][side]) for side in (0, 1)) for run in runs)


def _run(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def compare_command(found: Json) -> str:
    """What repeats a comparison where A and B are at hand; their names stand for their places."""
    a, b = found["a"], found["b"]
    tower = f" --tower {a['tower']}" if a["tower"] == b["tower"] else ""
    return (
        f"llmfp-fast compare {shlex.quote(a['name'])} {shlex.quote(b['name'])}{tower} --alpha {found['alpha']:g} "
        f"--permutations {found['permutations']} --seed {found['seed']}"
    )


def scan_command(fingerprint: Json) -> str:
    """What repeats a scan where the model is at hand."""
    source = fingerprint["source"]
    base = f" --base {shlex.quote(source['base'])}" if source.get("base") else ""
    return f"llmfp-fast scan {shlex.quote(source['name'])}{base}"
