"""`python -m bench.lineage.report DIR`: compares the specimens of DIR (manifest.json and fingerprints/) and writes
bench/results/lineage-*.json and lineage.md.

lineage-relations.json   per relation and statistic: AUC, true positives at 1e-3 false positives, verdicts
lineage-strangers.json   per group of strangers: verdicts, and p-values against the uniform
lineage-tokens.json      how statistics fade with training, among them Wasserstein-1 and Kullback–Leibler
lineage-edits.json       what noise and near-free edits cost a model, and what they take from the tests
lineage-pairs.json       every pair's numbers
lineage-qq.svg           Q–Q plot of strangers' p-values

The published score (mean Pearson of σ profiles) stands beside the tests on the same pairs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import llmfp
from bench.lineage.pairs import Pair, pairs
from bench.lineage.plot import qq_plot
from bench.lineage.statistics import FALSE_POSITIVES, auc, distribution, threshold, uniformity
from llmfp.fingerprint import SUFFIX, Fingerprint

RESULTS = Path(__file__).parents[1] / "results"
ALPHA = 1e-3
PERMUTATIONS = 20_000
"""A fifth of what `compare` draws: p goes down to 5e-5, which Holm's correction of ALPHA over four tests allows for."""
SCORES = (
    "published score", "published score, detrended", "Wasserstein", "KL", "residual z", "heads z", "coherence score",
    "coherence excess",
)  # fmt: skip
DISTANCES = ("Wasserstein", "KL")
"""Small for kin, where the others are large."""
TESTS = ("residual p", "heads p", "coherence p")
FEWEST = 20
"""p-values of which a distribution is given."""
WORDS = ("related", "none_detected", "inconclusive")


@dataclass(frozen=True, slots=True)
class Found:
    """One pair's numbers, None where a statistic has none."""

    pair: Pair
    verdict: str
    rests_on: tuple[str, ...]
    basis: str | None
    numbers: dict[str, float | None]

    def score(self, name: str) -> float | None:
        number = self.numbers[name]
        return -number if number is not None and name in DISTANCES else number


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lineage.report", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each (2)")
    options = parser.parse_args(arguments)
    manifest = json.loads((options.directory / "manifest.json").read_text())
    folder = options.directory / "fingerprints"
    records = {each["name"]: each for each in manifest["specimens"] if (folder / f"{each['name']}{SUFFIX}").exists()}
    shapes = {name: _shape(_load(folder, name)) for name in records}
    wanted = pairs(records, shapes)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), initializer=_one_thread) as pool:
        found = list(pool.map(_compare, wanted, [folder] * len(wanted), chunksize=16))
    made = tables(found, records, shapes)
    for name, content in made.items():
        (RESULTS / f"lineage-{name}.json").write_text(_json(content))
    (RESULTS / "lineage.md").write_text(markdown(made))
    (RESULTS / "lineage-qq.svg").write_text(qq_plot(_same_shape_p_values(found)))


def tables(found: list[Found], records: dict[str, Any], shapes: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    strangers = defaultdict[str, list[Found]](list)
    for each in found:
        if each.pair.kind == "strangers":
            strangers[each.pair.label].append(each)
    return {
        "relations": {
            "in brief": _relations(found, strangers, shapes, _in_brief),
            "one by one": _relations(found, strangers, shapes, lambda pair: pair.label),
        },
        "strangers": {label: _strangers(some) for label, some in sorted(strangers.items())},
        "tokens": _tokens(found, records, strangers),
        "edits": _edits(found, records),
        "pairs": [
            {"kind": each.pair.kind, "label": each.pair.label, "a": each.pair.a, "b": each.pair.b}
            | {"verdict": each.verdict, "rests on": list(each.rests_on), **each.numbers}
            for each in found
        ],
    }  # fmt: skip


def _relations(
    found: list[Found],
    strangers: dict[str, list[Found]],
    shapes: dict[str, tuple[Any, ...]],
    named: Callable[[Pair], str | None],
) -> list[dict[str, Any]]:
    """Kin, cousins and controls by what they are, each against strangers whose shapes differ as theirs do."""
    groups = defaultdict[tuple[str, str, str, str], list[Found]](list)
    for each in found:
        label = named(each.pair)
        if each.pair.kind != "strangers" and label is not None:
            a, b = shapes[each.pair.a], shapes[each.pair.b]
            groups[each.pair.kind, label, a[0], _likeness(a, b)].append(each)
    rows = []
    for (kind, label, architecture, alike), some in groups.items():
        group = f"{architecture}, {alike}"
        against = strangers.get(group) or strangers[f"{architecture}, same shape"]
        rows.append(
            {
                "kind": kind,
                "relation": label,
                "architecture": architecture,
                "shapes": alike,
                "pairs": len(some),
                "verdicts": _verdicts(some),
                "rests on": dict(Counter(test for each in some if each.verdict == "related" for test in each.rests_on)),
                "strangers": f"{group}: {len(against)} pairs",
                "statistics": {name: _told_apart(name, some, against) for name in SCORES},
            }
        )
    return rows


def _in_brief(pair: Pair) -> str | None:
    """Formats as one; None for edits, which have a table of their own."""
    steps = pair.label.split(", then ")
    if any(step.startswith("edited") for step in steps):
        return None
    short = ["continued training" if len(steps) > 1 and step.startswith("continued") else step for step in steps]
    return ", then ".join(step.split(":")[0] if "quantised" in step else step for step in short)


def _likeness(a: tuple[Any, ...], b: tuple[Any, ...]) -> str:
    if a[2] != b[2]:
        return "other width"
    return "same shape" if a[1] == b[1] else "other depth"


def _told_apart(name: str, kin: list[Found], strangers: list[Found]) -> dict[str, float] | None:
    ours, theirs = ([score for each in some if (score := each.score(name)) is not None] for some in (kin, strangers))
    if not ours or not theirs:
        return None
    least = threshold(theirs)
    return {
        "pairs": len(ours),
        "AUC": round(auc(ours, theirs), 4),
        "true positives": round(sum(score > least for score in ours) / len(ours), 3),
        "median": round(_signed(name, median(ours)), 3),
        "weakest": round(_signed(name, min(ours)), 3),
    }


def _signed(name: str, score: float) -> float:
    return -score if name in DISTANCES else score


def _strangers(some: list[Found]) -> dict[str, Any]:
    models = sorted({name for each in some for name in (each.pair.a, each.pair.b)})
    row: dict[str, Any] = {"pairs": len(some), "models": len(models), "verdicts": _verdicts(some)}
    row["scores"] = {}
    for name in SCORES:
        scores = [number for each in some if (number := each.numbers[name]) is not None]
        if scores:
            ordered = sorted(scores)
            row["scores"][name] = {
                "median": round(median(scores), 3),
                "5 %": round(ordered[len(ordered) // 20], 3),
                "95 %": round(ordered[-1 - len(ordered) // 20], 3),
                "largest": round(ordered[-1], 3),
            }
    row["p-values"] = {}
    for name in TESTS:
        p_values = {
            frozenset((each.pair.a, each.pair.b)): number for each in some if (number := each.numbers[name]) is not None
        }
        if len(p_values) < FEWEST:
            continue
        row["p-values"][name] = distribution(list(p_values.values()))
        counted = Counter(name for pair in p_values for name in pair)
        complete = sorted(name for name, count in counted.items() if count == max(counted.values()))
        among = {frozenset(pair): p_values.get(frozenset(pair)) for pair in itertools.combinations(complete, 2)}
        known = {pair: p for pair, p in among.items() if p is not None}
        if len(known) == len(among) >= FEWEST:  # all pairs of these models, most of all pairs or all
            row["p-values"][name] |= uniformity(complete, known)
    return row


def _same_shape_p_values(found: list[Found]) -> dict[str, list[float]]:
    series = defaultdict[str, list[float]](list)
    for each in found:
        if each.pair.kind == "strangers" and each.pair.label.endswith("same shape"):
            for name in TESTS:
                if (p := each.numbers[name]) is not None:
                    series[f"{each.pair.label}: {name.removesuffix(' p')}"].append(p)
    return dict(sorted(series.items()))


def _tokens(found: list[Found], records: dict[str, Any], strangers: dict[str, list[Found]]) -> list[dict[str, Any]]:
    """Medians over models by how long training went on, and strangers' beside them."""
    stages = defaultdict[tuple[str, str], list[Found]](list)
    for each in found:
        if each.pair.kind == "kin" and each.pair.label.startswith("continued") and ", then" not in each.pair.label:
            architecture = "opt" if each.pair.a.startswith("o") else "llama"
            stages[architecture, each.pair.label].append(each)
    for architecture in ("llama", "opt"):
        stages[architecture, "strangers"] = strangers.get(f"{architecture}, same shape", [])
    rows = []
    for (architecture, label), some in sorted(stages.items(), key=lambda stage: (stage[0][0], _share(stage[0][1]))):
        if not some:
            continue
        row: dict[str, Any] = {"architecture": architecture, "training": label, "pairs": len(some)}
        if label != "strangers":
            row["models"] = {each.pair.b: records[each.pair.b]["loss"] for each in some}
        for name in SCORES:
            numbers = [number for each in some if (number := each.numbers[name]) is not None]
            row[name] = None if not numbers else {
                "median": round(median(numbers), 4), "least": round(min(numbers), 4), "largest": round(max(numbers), 4)
            }  # fmt: skip
        rows.append(row)
    return rows


def _share(label: str) -> float:
    """Of pre-training: "continued training, 1/4 of pre-training" is 0.25; strangers come last."""
    if not label.startswith("continued"):
        return float("inf")
    number, _, divisor = label.split(", ")[1].split(" ")[0].partition("/")
    return float(number) / float(divisor or 1)


def _edits(found: list[Found], records: dict[str, Any]) -> list[dict[str, Any]]:
    """What was edited last, the loss before and after, and what is left of the evidence against the root."""
    rows = []
    for each in found:
        record = records[each.pair.b]
        if each.pair.kind == "kin" and record["relation"].startswith("edited"):
            before = records[record["parents"][0]]["loss"]
            rows.append(
                {
                    "root": each.pair.a,
                    "edited": record["parents"][0],
                    "edit": record["relation"].removeprefix("edited: "),
                    "loss before": before,
                    "loss paid": round(record["loss"] - before, 4),
                    "verdict": each.verdict,
                    "rests on": list(each.rests_on) if each.verdict == "related" else [],
                    **{name: each.numbers[name] for name in SCORES},
                }
            )
    return rows


def _verdicts(some: Iterable[Found]) -> dict[str, int]:
    counts = Counter(each.verdict for each in some)
    return {word: counts[word] for word in WORDS}


def markdown(found: dict[str, Any]) -> str:
    """The tables in short: one line a relation."""
    lines = ["# Lineage: relations, tests, rivals", "", "`python -m bench.lineage.report DIR` wrote this.", ""]
    lines += [
        f"Share of kin above all but {FALSE_POSITIVES:g} of strangers (fewer than 1000: above all), AUC in brackets.",
        "",
    ]
    lines += [
        "| relation | pairs | related | published score | residual | heads | coherence |",
        "|---|--:|--:|---|---|---|---|",
    ]
    for row in sorted(found["relations"]["in brief"], key=lambda row: (row["architecture"], row["kind"] != "kin")):
        cells = [
            "" if (cell := row["statistics"][name]) is None else f"{cell['true positives']:g} ({cell['AUC']:.3f})"
            for name in ("published score", "residual z", "heads z", "coherence excess")
        ]
        label = f"{row['architecture']}: {row['relation']}"
        label += "" if row["shapes"] == "same shape" else f" ({row['shapes']})"
        lines.append(f"| {label} | {row['pairs']} | {row['verdicts']['related']} | {' | '.join(cells)} |")
    lines += ["", "## Strangers", "", "| pairs of | pairs | related | residual p: KS | heads p: KS | coherence p: KS |"]
    lines += ["|---|--:|--:|---|---|---|"]
    for label, row in found["strangers"].items():
        cells = []
        for name in TESTS:
            cell = row["p-values"].get(name)
            if cell is None:
                cells.append("")
            elif "distance" in cell:
                cells.append(f"{cell['distance']:.3f} (p {cell['p, models drawn with replacement']:g})")
            else:
                cells.append(f"{cell['share at or below']['0.05']:.3f} ≤ 0.05")
        lines.append(f"| {label} | {row['pairs']} | {row['verdicts']['related']} | {' | '.join(cells)} |")
    lines += ["", "## Training goes on", "", f"| | {' | '.join(SCORES)} |", f"|---|{'--:|' * len(SCORES)}"]
    for row in found["tokens"]:
        cells = ["" if row[name] is None else f"{row[name]['median']:.3f}" for name in SCORES]
        lines.append(f"| {row['architecture']}: {row['training']} | {' | '.join(cells)} |")
    lines += ["", "## Edits", "", "| of | edit | loss paid | verdict | residual z | heads z | coherence excess |"]
    lines += ["|---|---|--:|---|--:|--:|--:|"]
    for row in found["edits"]:
        cells = [
            "" if (z := row[name]) is None else f"{z:.1f}" for name in ("residual z", "heads z", "coherence excess")
        ]
        lines.append(
            f"| {row['edited']} | {row['edit']} | {row['loss paid']:+.3f} | {row['verdict']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def _compare(pair: Pair, folder: Path) -> Found:
    comparison = llmfp.compare(_load(folder, pair.a), _load(folder, pair.b), alpha=ALPHA, permutations=PERMUTATIONS)
    residual, heads, coherence = comparison.residual, comparison.heads, comparison.coherence
    profile = comparison.profile
    numbers = {
        "published score": profile.pearson["mean"],
        "published score, detrended": profile.detrended["mean"],
        "Wasserstein": profile.wasserstein["mean"],
        "KL": profile.kl["mean"],
        "residual z": None if residual is None else residual.z,
        "residual p": None if residual is None else residual.p_value,
        "heads z": None if heads is None else heads.z,
        "heads p": None if heads is None else heads.p_value,
        "coherence score": None if coherence is None else coherence.score,
        "coherence excess": None if coherence is None else coherence.excess,
        "coherence p": None if coherence is None else coherence.p_value,
    }
    rounded = {name: None if number is None else float(f"{number:.4g}") for name, number in numbers.items()}
    return Found(pair, comparison.verdict, comparison.decision.rests_on, comparison.basis, rounded)


def _shape(fingerprint: Fingerprint) -> tuple[Any, ...]:
    """A rotary tower, whatever its file calls it, is a Llama's here."""
    tower = fingerprint.main
    return ("opt" if tower.rotary is None else "llama", len(tower.layers), tower.hidden_size, tower.heads)


@cache
def _load(folder: Path, name: str) -> Fingerprint:
    return llmfp.load(folder / f"{name}{SUFFIX}")


def _one_thread() -> None:
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ[f"{library}_NUM_THREADS"] = "1"


def _json(content: Any) -> str:
    """Indented, but what holds no container stands on one line."""
    if isinstance(content, list) and content and all(isinstance(each, dict) for each in content):
        return "[\n" + ",\n".join(json.dumps(each, ensure_ascii=False) for each in content) + "\n]\n"
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
