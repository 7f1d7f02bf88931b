"""The pictures of method.md, drawn by the same code as a report's.

The σ curves and scores are of real models, those of the null that is shipped; permutations and coherence are of
simulated models, since no weights come with the project.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from llmfp.evidence import null as nulls
from llmfp.evidence.alignment import align, similarity
from llmfp.evidence.null import NullModel
from llmfp.evidence.permutation import histogram, matched, permuted
from llmfp.evidence.profile import pearson_mean
from llmfp.report import charts

ROLES = ("q", "k", "v", "o")


def draw(folder: Path) -> None:
    """Writes every picture into the folder, as SVG."""
    folder.mkdir(exist_ok=True)
    made = {"unrelated": unrelated, "strangers": strangers, "permutations": permutations, "coherence": coherence}
    for name, picture in made.items():
        (folder / f"{name}.svg").write_text(picture(), "utf-8")


def pairs() -> list[tuple[float, NullModel, NullModel]]:
    """Every pair of unrelated encoders in the null, by score."""
    models = [model for model in nulls.load() if model.kind == "encoder"]
    scored = [
        (score, a, b)
        for i, a in enumerate(models)
        for b in models[i + 1 :]
        if (score := pearson_mean(a.std, b.std, ROLES)) is not None
    ]
    return sorted(scored, key=lambda pair: pair[0])


def unrelated() -> str:
    """σ of V in the two unrelated encoders that look most alike."""
    _, *both = pairs()[-1]
    points = {}
    for letter, model in zip("AB", both, strict=True):
        stds = model.std["v"]
        points[letter] = [
            {"x": i / (len(stds) - 1), "y": std, "says": f"{model.name}, layer {i}: σ = {std}"}
            for i, std in enumerate(stds)
        ]
    return charts.curves(points, "relative depth", "σ of V")


def strangers() -> str:
    """Scores of all pairs of unrelated encoders."""
    scored = pairs()
    rows = [
        {"row": "pairs", "x": score, "own": True, "says": f"{a.name} with {b.name}: {score:.2f}"}
        for score, a, b in scored
    ]
    top = scored[-1][0]
    return charts.strip(rows, ["pairs"], "mean Pearson correlation of σ curves", top, f"the highest: {top:.2f}")


def permutations() -> str:
    """Residual symmetry of a simulated parent and child: 32 profiles over 256 coordinates."""
    rng = np.random.default_rng(1)
    parent = rng.standard_normal((32, 256))
    child = parent + 6 * rng.standard_normal((32, 256))
    blocks = []
    for start in range(0, 256, 32):
        a, b = (each[:, start : start + 32] for each in (parent, child))
        blocks.append((a - a.mean(axis=1, keepdims=True)).T @ (b - b.mean(axis=1, keepdims=True)))
    deviation = np.sqrt(sum(float(np.square(block).sum()) / (len(block) - 1) for block in blocks))
    totals = permuted(blocks, matched, 100_000, rng) / deviation
    z = float(totals[0])
    return charts.histogram(asdict(histogram(totals[1:])), "z", z, f"observed: z = {z:+.1f}")


def coherence() -> str:
    """Layers of a simulated child that left out the parent's layers 5 and 9."""
    rng = np.random.default_rng(2)
    parent = rng.standard_normal((16, 60))
    kept = [layer for layer in range(16) if layer not in (5, 9)]
    child = parent[kept] + 0.8 * rng.standard_normal((14, 60))
    matrix = similarity(parent, child)
    assert matrix is not None
    return charts.heat_map(matrix.tolist(), range(16), range(14), align(matrix))
