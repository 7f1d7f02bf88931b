"""The table of all models of the laboratory: how each is made, of which parents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from bench.lineage.models import Config, Model, initialise, llama_config, opt_config
from bench.lineage.train import Recipe, train


@dataclass(frozen=True, slots=True)
class Specimen:
    """`make` takes the parents' models in order. Two specimens are related where they share a root.

    corpus       what it is evaluated on, and trained on where `tokens` is not 0
    seed         that its weights were initialised from, where it is a root
    """

    name: str
    relation: str
    parents: tuple[str, ...]
    make: Callable[..., Model]
    corpus: str
    tokens: int = 0
    seed: int | None = None


OTHER = {"python": "c", "c": "python", "prose": "python"}
"""The corpus that a child goes on with."""
PARENTS = {"p0": "python", "p1": "python", "p2": "c", "p3": "prose"}
OPT_PARENTS = {"o0": "python", "o1": "prose"}


def specimens(layers: int = 12, tokens: int = 400_000) -> dict[str, Specimen]:
    """By name, parents before children. tokens: that a parent is trained on; all other amounts are shares of it."""
    llama, opt = llama_config(layers), opt_config(layers)
    table = [*_roots(llama, opt, tokens), *_continued(tokens)]
    return {each.name: each for each in table}


def pretrain(config: Config, seed: int, recipe: Recipe) -> Model:
    return train(initialise(config, seed), recipe)


def _root(name: str, relation: str, config: Config, corpus: str, tokens: int, seed: int, order: int = 0) -> Specimen:
    recipe = Recipe(corpus, tokens, seed=seed + order, cosine=True)
    return Specimen(name, relation, (), partial(pretrain, config, seed, recipe), corpus, tokens, seed)


def _roots(llama: Config, opt: Config, tokens: int) -> Iterator[Specimen]:
    for index, (name, corpus) in enumerate(PARENTS.items()):
        yield _root(name, "base", llama, corpus, tokens, seed=100 + index)
    for index, (name, corpus) in enumerate(OPT_PARENTS.items()):
        yield _root(name, "base", opt, corpus, tokens * 3 // 4, seed=200 + index)
    for index in range(24):
        corpus = ("python", "python", "c", "prose")[index % 4]
        yield _root(f"s{index:02}", "other seed", llama, corpus, tokens * 2 // 5, seed=300 + index)
    for index in range(4):
        deeper = {**llama, "num_hidden_layers": llama["num_hidden_layers"] * 3 // 2}
        yield _root(f"deep{index}", "other seed, deeper", deeper, "python", tokens // 4, seed=400 + index)
    for index in range(8):
        corpus = ("python", "prose")[index % 2]
        yield _root(f"t{index}", "other seed", opt, corpus, tokens * 3 // 10, seed=500 + index)
    for index, (name, corpus) in enumerate(PARENTS.items()):
        for share, part in (("2/5", tokens * 2 // 5), ("1", tokens)):
            if share == "2/5" or index < 2:
                seed = 100 + index
                relation = "same seed, other data"
                yield _root(
                    f"{name}-same-seed-{share.replace('/', 'of')}", relation, llama, OTHER[corpus], part, seed, 50
                )


def _continued(tokens: int) -> Iterator[Specimen]:
    """A chain: each goes on from the one before, with a new optimiser, at the highest rate of pre-training."""
    parents = PARENTS | OPT_PARENTS
    for index, (root, corpus) in enumerate(parents.items()):
        before, done = root, 0
        for stage, (share, label) in enumerate(
            ((1, "1of16"), (2, "1of8"), (4, "1of4"), (8, "1of2"), (16, "1"), (32, "2"))
        ):
            if label == "2" and root not in ("p0", "o0"):
                continue
            amount = tokens * (share - done) // 16
            name = f"{root}-continued-{label}"
            recipe = Recipe(OTHER[corpus], amount, seed=1000 + 10 * index + stage)
            yield Specimen(name, "continued training", (before,), partial(train, recipe=recipe), OTHER[corpus], amount)
            before, done = name, share
