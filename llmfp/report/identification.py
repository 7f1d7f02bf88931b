"""The page that `identify` prints: the card against the weights, then the nearest, one line each."""

from __future__ import annotations

import textwrap

from llmfp.identification import Candidate, Finding, Identification
from llmfp.report import printable
from llmfp.report.registry import short

_WIDTH = 80
_STATUS = {
    "confirmed": "declared and confirmed",
    "contradicted": "declared, but contradicted",
    "undetected": "declared, not detected",
    "untested": "declared, could not be tested",
    "unknown": "declared, not in the registry",
    "undeclared": "undeclared relative",
}
_VERDICT = {"related": "related", "none_detected": "none detected", "inconclusive": "inconclusive"}


def identification_page(found: Identification) -> str:
    """All of an identification, for a terminal of 80 columns; names may be longer."""
    lines = [*_wrapped(_summary(found)), ""]
    lines += [line for finding in found.findings for line in _finding(finding)] or ["the card declares no base model"]
    lines += ["", f"{'rank':>5} {'profile':>7} {'coher.':>6} {'res. z':>6} {'p':>8}  {'verdict':<13}  repo@revision"]
    lines += [_row(each) for each in found.candidates] or ["  no fingerprint of this kind"]
    lines += [""] + [line for caveat in found.caveats for line in _wrapped(caveat, "caveat: ")]
    return "\n".join(map(printable, lines)).rstrip()


def _summary(found: Identification) -> str:
    related = sum(each.verdict == "related" for each in found.candidates)
    chance = f"The chance that any stranger is among them is at most {found.alpha:g}, over the whole search."
    searched = f"{found.name} against {found.rows:,} fingerprints, {found.tests} tests of the nearest: "
    if related:
        return f"{searched}weights of {related} have a common origin with its own. {chance}"
    if found.tests:
        return f"{searched}no common origin detected. That does not show that there is none."
    return f"{searched}inconclusive, no test could be made."


def _finding(finding: Finding) -> list[str]:
    return _wrapped(f"{_STATUS[finding.status]}: {finding.repo} ({finding.reason})")


def _row(each: Candidate) -> str:
    score = each.evidence.profile.pearson["mean"]
    residual = each.evidence.residual
    profile = "-" if score is None else f"{score:.3f}"
    z = "-" if residual is None else f"{residual.z:+.1f}"
    p = "-" if each.p_value is None else f"{each.p_value:.2g}"
    coherence = "-" if each.evidence.coherence is None else f"{each.evidence.coherence.score:.2f}"
    name = f"{each.repo}@{short(each.revision)}"
    return f"{each.rank:>5} {profile:>7} {coherence:>6} {z:>6} {p:>8}  {_VERDICT[each.verdict]:<13}  {name}"


def _wrapped(text: str, head: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
