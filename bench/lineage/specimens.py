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


def specimens(layers: int = 12, tokens: int = 320_000) -> dict[str, Specimen]:
    """By name, parents before children. tokens: that a parent is trained on; all other amounts are shares of it."""
    llama, opt = llama_config(layers), opt_config(layers)
    roots = _roots(llama, opt, tokens)
    table = [roots.pop("p0"), *_strangers("s", llama, range(12), tokens * 3 // 8, seed=300), *_continued("p0", tokens)]
    table += [*_strangers("s", llama, range(12, 24), tokens * 3 // 8, seed=300)]
    table += [
        roots.pop("o0"),
        *_strangers("t", opt, range(8), tokens * 3 // 10, seed=500),
        *_continued("o0", tokens * 3 // 4),
    ]
    table += [*_same_seed(llama, tokens), *roots.values()]
    deeper = {**llama, "num_hidden_layers": layers * 3 // 2}
    table += [*_strangers("deep", deeper, range(4), tokens // 4, seed=400)]
    table += [each for root in roots.values() for each in _continued(root.name, root.tokens)]
    return {each.name: each for each in table}


def pretrain(config: Config, seed: int, recipe: Recipe) -> Model:
    return train(initialise(config, seed), recipe)


def _root(name: str, relation: str, config: Config, corpus: str, tokens: int, seed: int, order: int = 0) -> Specimen:
    recipe = Recipe(corpus, tokens, seed=seed + order, cosine=True)
    return Specimen(name, relation, (), partial(pretrain, config, seed, recipe), corpus, tokens, seed)


def _roots(llama: Config, opt: Config, tokens: int) -> dict[str, Specimen]:
    llamas = (
        _root(name, "base", llama, corpus, tokens, seed=100 + index)
        for index, (name, corpus) in enumerate(PARENTS.items())
    )
    opts = (
        _root(name, "base", opt, corpus, tokens * 3 // 4, seed=200 + index)
        for index, (name, corpus) in enumerate(OPT_PARENTS.items())
    )
    return {each.name: each for each in (*llamas, *opts)}


def _strangers(stem: str, config: Config, indices: range, tokens: int, seed: int) -> Iterator[Specimen]:
    for index in indices:
        corpus = ("python", "python", "c", "prose")[index % 4]
        yield _root(f"{stem}{index:02}", "other seed", config, corpus, tokens, seed + index)


def _same_seed(llama: Config, tokens: int) -> Iterator[Specimen]:
    for index, (name, corpus) in enumerate(PARENTS.items()):
        for share, amount in (("2of5", tokens * 2 // 5), ("1", tokens)):
            if share == "2of5" or name == "p0":
                relation = "same seed, other data"
                yield _root(f"{name}-same-seed-{share}", relation, llama, OTHER[corpus], amount, 100 + index, order=50)


STAGES = ("1of16", "1of8", "1of4", "1of2", "1", "2")
"""How long training goes on, as a share of pre-training; doubled from stage to stage."""
LAST_STAGE = {"p0": "2", "p1": "1", "o0": "1"}


def _continued(root: str, tokens: int) -> Iterator[Specimen]:
    """A chain: each goes on from the one before, with a new optimiser, at the highest rate of pre-training."""
    corpus = OTHER[(PARENTS | OPT_PARENTS)[root]]
    before, done = root, 0
    for stage, share in enumerate(STAGES[: STAGES.index(LAST_STAGE.get(root, "1of2")) + 1]):
        amount = tokens * (2**stage - done) // 16
        recipe = Recipe(corpus, amount, seed=1000 + 100 * list(PARENTS | OPT_PARENTS).index(root) + stage)
        name = f"{root}-continued-{share}"
        yield Specimen(name, "continued training", (before,), partial(train, recipe=recipe), corpus, amount)
        before, done = name, 2**stage
