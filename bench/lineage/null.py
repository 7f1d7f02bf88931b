"""The null of the profile: `python -m bench.lineage.null SIGMA_BANK` writes llmfp/evidence/null.json, and what fixed
thresholds and p-values really get wrong on the same models to bench/results/lineage-null.json.

SIGMA_BANK is a JSON file {source, models: {name: {std: {q, k, v, o}}}} of σ per layer to 3 decimals.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmfp.evidence.null import SCHEMA
from llmfp.evidence.profile import pearson_mean

ROOT = Path(__file__).parents[2]
NULL = ROOT / "llmfp" / "evidence" / "null.json"
RESULTS = ROOT / "bench" / "results" / "lineage-null.json"
DECIMALS = 3
ROLES = ("q", "k", "v", "o")
OPUS = "opus-mt"

FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bert": (
        "encoder",
        (
            "bert-base-uncased", "google-bert_bert-large-uncased", "distilbert-base-uncased",
            "microsoft_layoutlm-base-uncased", "google_mobilebert-uncased", "nreimers_MiniLM-L6-H384-uncased",
        ),
    ),
    "roberta": ("encoder", ("TrustSafeAI_RADAR_Vicuna_7B", "microsoft_xlm-align-base", "multilingual-e5-large")),
    "electra": (
        "encoder",
        (
            "google_electra-base-discriminator", "google_electra-small-discriminator", "ms-marco-electra-base",
            "monoelectra-large",
        ),
    ),
    "deberta-v3": ("encoder", ("nli-deberta-v3-base", "nli-deberta-v3-small", "nli-deberta-v3-xsmall")),
    "mpnet": ("encoder", ("all-mpnet-base-v2",)),
    "convbert": ("encoder", ("YituTech_conv-bert-base",)),
    "qwen1.5": ("decoder", ("Qwen1.5-0.5B",)),
    "xglm": ("decoder", ("facebook_xglm-564M",)),
    "pegasus": ("seq2seq encoder", ("google_pegasus-xsum",)),
    "detr": ("vision", ("detr-resnet-101-panoptic", "detr-resnet-50-dc5-panoptic")),
}  # fmt: skip
"""Kind and models, the first of which stands for the family. Drawn too large rather than too small: one family is what
was initialised from one model, distilled from it, or trained by its authors with much of its recipe. So BERT has
LayoutLM (initialised from it), DistilBERT, MobileBERT and MiniLM (distilled); RoBERTa has XLM-R and what was tuned from
either (RADAR's detector is a RoBERTa-large). All opus-mt models are one family, though each was trained from scratch:
130 draws of one recipe are one witness against a model of another."""
UNTRAINED = ("Manojb_CLIP-ViT-L-14-DataComp.XL-s13B-b90K", "laion_CLIP-ViT-H-14-laion2B-s32B-b79K")
"""Left out: their σ are those of CLIP's initialisation, (2·d·layers)^-½ and d^-½, alike in all layers of a tower."""

Matrix = NDArray[np.float64]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m bench.lineage.null SIGMA_BANK", file=sys.stderr)
        return 2
    bank = json.loads(Path(arguments[0]).read_text())
    stds = {name: model["std"] for name, model in bank["models"].items() if name not in UNTRAINED}
    families = FAMILIES | {OPUS: ("seq2seq encoder", tuple(sorted(name for name in stds if name.startswith(OPUS))))}
    assert sorted(stds) == sorted(name for _, members in families.values() for name in members)
    models = [
        {"name": members[0], "family": family, "kind": kind, "decimals": DECIMALS, "std": stds[members[0]]}
        for family, (kind, members) in families.items()
    ]
    head = {"schema": SCHEMA, "source": bank["source"], "n": {name: len(each) for name, (_, each) in families.items()}}
    lines = ",\n".join(json.dumps(model) for model in models)
    NULL.write_text(json.dumps(head)[:-1] + ', "models": [\n' + lines + "\n]}\n")
    found = measure(stds, families)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0


def measure(stds: dict[str, Any], families: dict[str, tuple[str, tuple[str, ...]]]) -> dict[str, Any]:
    names = [name for _, members in families.values() for name in members]
    family_of = {name: family for family, (_, members) in families.items() for name in members}
    kind_of = {name: families[family_of[name]][0] for name in names}
    scores = np.full((len(names), len(names)), np.nan)
    for (i, x), (j, y) in itertools.combinations(enumerate(names), 2):
        score = pearson_mean(stds[x], stds[y], ROLES)
        scores[i, j] = scores[j, i] = np.nan if score is None else score
    index = {name: i for i, name in enumerate(names)}
    opus = [index[name] for name in names if family_of[name] == OPUS]
    others = [index[name] for name in names if family_of[name] != OPUS]
    pairs = list(itertools.combinations(others, 2))
    strangers = [(i, j) for i, j in pairs if family_of[names[i]] != family_of[names[j]]]
    alike = [(i, j) for i, j in strangers if kind_of[names[i]] == kind_of[names[j]]]
    mixed = list(itertools.product(others, opus))
    kin = [(i, j) for i, j in pairs if family_of[names[i]] == family_of[names[j]]]
    return {
        "schema": "llmfp.bench.lineage/1",
        "statistic": "mean Pearson of Q, K, V, O",
        "share above a fixed threshold": {
            "strangers, one recipe: opus-mt": above(scores, list(itertools.combinations(opus, 2))),
            "strangers, other families": above(scores, strangers),
            "strangers, other families of the same kind": above(scores, alike),
            "strangers, opus-mt against all others": above(scores, mixed),
            "same family": above(scores, kin),
        },
        "true error of p": {
            "one recipe, halves of opus-mt": halves(scores, opus),
            "another recipe: base and other model from families, every opus-mt model taken for a family": borrowed(
                scores, strangers, opus
            ),
            "one model per family of the same kind": per_family(scores, names, families, kind_of, family_of),
        },
    }


def above(scores: Matrix, pairs: list[tuple[int, int]]) -> dict[str, float]:
    found = np.array([scores[pair] for pair in pairs])
    found = found[~np.isnan(found)]
    return {
        "pairs": len(found),
        "above 0.7": round(float((found > 0.7).mean()), 4),
        "above 0.9": round(float((found > 0.9).mean()), 4),
        "95th percentile": round(float(np.quantile(found, 0.95)), 3),
        "largest": round(float(found.max()), 3),
    }


def halves(scores: Matrix, members: list[int], rounds: int = 400) -> dict[str, Any]:
    """Error over all pairs, and over those of the base that is served worst; every model is in either half in turn.

    base-fixed  null: the base against one half; tested: the base against the other
    pooled      null: all pairs of one half; tested: the same
    """
    rng = np.random.default_rng(0)
    levels = (0.02, 0.05, 0.1, 0.2)
    rejected = {name: np.zeros((len(scores), len(levels))) for name in ("base-fixed", "pooled")}
    tests = np.zeros((len(scores), 1))
    for _ in range(rounds):
        shuffled = rng.permutation(members)
        calibration, tested = shuffled[: len(members) // 2], shuffled[len(members) // 2 :]
        pool = scores[np.ix_(calibration, calibration)][np.triu_indices(len(calibration), 1)]
        for base in tested:
            others = tested[tested != base]
            tests[base] += len(others)
            for name, null in (("base-fixed", scores[base, calibration]), ("pooled", pool)):
                p = p_values(null, scores[base, others])
                rejected[name][base] += [np.count_nonzero(p <= level) for level in levels]
    return {
        name: {
            str(level): {
                "error": round(float(counts[:, n].sum() / tests.sum()), 4),
                "worst base": round(float(np.max(counts[members, n] / tests[members, 0])), 4),
            }
            for n, level in enumerate(levels)
        }
        for name, counts in rejected.items()
    }


def borrowed(scores: Matrix, pairs: list[tuple[int, int]], null: list[int]) -> dict[str, float]:
    """What happens where models of one recipe are counted as so many families."""
    ordered = [*pairs, *((j, i) for i, j in pairs)]
    p = np.array([p_values(scores[i, null], scores[i, [j]])[0] for i, j in ordered if not np.isnan(scores[i, j])])
    return {str(level): round(float((p <= level).mean()), 4) for level in (0.01, 0.02, 0.05, 0.1, 0.2)}


def per_family(
    scores: Matrix,
    names: list[str],
    families: dict[str, tuple[str, tuple[str, ...]]],
    kind_of: dict[str, str],
    family_of: dict[str, str],
) -> dict[str, Any]:
    """As shipped: encoders, each base against the first model of every family but its own and the tested one's."""
    index = {name: i for i, name in enumerate(names)}
    encoders = [name for name in names if kind_of[name] == "encoder"]
    tested, p = 0, []
    for base, other in itertools.permutations(encoders, 2):
        if family_of[base] == family_of[other]:
            continue
        null = [
            index[members[0]]
            for family, (kind, members) in families.items()
            if kind == "encoder" and family not in (family_of[base], family_of[other])
        ]
        tested += 1
        p.append(p_values(scores[index[base], null], scores[index[base], [index[other]]])[0])
    found = np.array(p)
    return {"pairs": tested, **{str(level): round(float((found <= level).mean()), 4) for level in (0.2, 0.4, 0.6, 0.8)}}


def p_values(null: Matrix, scores: Matrix) -> Matrix:
    ordered = np.sort(null)
    at_least = len(ordered) - np.searchsorted(ordered, scores, side="left")
    p: Matrix = (1 + at_least) / (1 + len(ordered))
    return p


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
