"""The table of all models of the laboratory: how each is made, of which parents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.lineage import derive, edits, models, quantise, rewrites, train
from bench.lineage.models import Config, Model, initialise, llama_config, opt_config
from bench.lineage.train import Recipe


@dataclass(frozen=True, slots=True)
class Specimen:
    """`make` takes the parents' models in order. Two specimens are related where they share a root.

    corpus         what it is evaluated on, and trained on where `tokens` is not 0
    seed           that its weights were initialised from, where it is a root
    stored         how what is fingerprinted is stored: bf16, or a format of `quantise`
    inherits       False where it has learned of its parents and none of its weights come from them
    same_function  whether it must compute what its parent computes
    """

    name: str
    relation: str
    parents: tuple[str, ...]
    make: Callable[..., Model]
    corpus: str
    tokens: int = 0
    seed: int | None = None
    stored: str = "bf16"
    inherits: bool = True
    same_function: bool = False


OTHER = {"python": "c", "c": "python", "prose": "python"}
"""The corpus that a child goes on with."""
PARENTS = {"p0": "python", "p1": "python", "p2": "c", "p3": "prose"}
OPT_PARENTS = {"o0": "python", "o1": "prose"}
ZOO = {"A0-py": "A0-py-ct-c", "A1-py": "A1-py-ct-c", "A2-py": None, "B0-py": "B0-py-ct-txt", "B1-py": None}
"""Trained elsewhere: a base and its child, continued for as long."""
STAGES = ("1of16", "1of8", "1of4", "1of2", "1", "2")
"""How long training goes on, as a share of pre-training; doubled from stage to stage."""
LAST_STAGE = {"p0": "2", "p1": "1", "o0": "1"}
NOISE = (0.1, 0.25, 0.5, 1.0, 2.0)
SOME_FORMATS = ("fp8 per tensor", "bitsandbytes nf4", "GPTQ 2 bits", "GPTQ 3 bits", "MXFP4", "HQQ 2 bits", "GGUF Q4_0")
"""For more than one model: what rounds most."""


def specimens(layers: int = 12, tokens: int = 320_000, zoo: Path | None = None) -> dict[str, Specimen]:
    """By name, parents before children, what matters most first.

    tokens  that a parent is trained on; all other amounts are shares of it
    zoo     a directory of further models, trained elsewhere
    """
    llama, opt = llama_config(layers), opt_config(layers)
    deeper = {**llama, "num_hidden_layers": layers * 3 // 2}
    roots = _roots(llama, opt, tokens)
    table = [roots["p0"], *_strangers("s", llama, range(12), tokens * 3 // 8, seed=300), *_continued(roots["p0"])]
    table += [*_strangers("s", llama, range(12, 24), tokens * 3 // 8, seed=300), *_trained(roots["p0"])]
    table += [*_distilled(roots["p0"], llama), *_grown(roots["p0"], layers), *_untrained("p0", "p0-continued-1", "c")]
    if zoo is not None:
        table += _zoo(zoo)
    table += [roots["o0"], *_strangers("t", opt, range(8), tokens * 3 // 10, seed=500), *_continued(roots["o0"])]
    table += [*_trained(roots["o0"]), *_opt_rewrites("o0-continued-1", "c"), *_edited("o0", "python")]
    twins = list(_same_seed(llama, tokens))
    table += [*twins[:2], roots["p1"], *_continued(roots["p1"]), *_trained(roots["p1"])]
    table += [*_grown(roots["p1"], layers), *_untrained("p1", "p1-continued-1", "c"), *_distilled(roots["p1"], llama)]
    table += [*_strangers("deep", deeper, range(4), tokens // 4, seed=400)]
    for name in ("p2", "p3", "o1"):
        table += [roots[name], *_continued(roots[name]), *_trained(roots[name])]
    table += [*_quantised(["p2"], PARENTS, SOME_FORMATS), *twins[2:]]
    table += [*_strangers("s", llama, range(24, 46), tokens * 3 // 8, seed=300)]
    return {each.name: each for each in table}


def pretrain(config: Config, seed: int, recipe: Recipe) -> Model:
    return train.train(initialise(config, seed), recipe)


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


def _seed(root: Specimen, number: int) -> int:
    return 1000 + 100 * list(PARENTS | OPT_PARENTS).index(root.name) + number


def _continued(root: Specimen) -> Iterator[Specimen]:
    """A chain: each goes on from the one before, with a new optimiser, at the highest rate of pre-training."""
    before, done = root.name, 0
    for stage, share in enumerate(STAGES[: STAGES.index(LAST_STAGE.get(root.name, "1of2")) + 1]):
        amount = root.tokens * (2**stage - done) // 16
        corpus = OTHER[root.corpus]
        recipe = Recipe(corpus, amount, seed=_seed(root, stage))
        name = f"{root.name}-continued-{share}"
        relation = f"continued training, {share.replace('of', '/')} of pre-training"
        yield Specimen(name, relation, (before,), partial(train.train, recipe=recipe), corpus, amount)
        before, done = name, 2**stage


def _trained(root: Specimen) -> Iterator[Specimen]:
    """Fine-tuned on two corpora, LoRA merged, children averaged, layers dropped and recovered."""
    name, other = root.name, OTHER[root.corpus]
    third = next(corpus for corpus in ("prose", "python", "c") if corpus not in (root.corpus, other))
    short, longer = root.tokens // 16, root.tokens // 8

    def child(suffix: str, relation: str, make: Callable[..., Model], corpus: str, tokens: int) -> Specimen:
        return Specimen(f"{name}-{suffix}", relation, (name,), make, corpus, tokens)

    for number, (suffix, corpus) in enumerate((("tuned", other), ("tuned-third", third))):
        recipe = Recipe(corpus, short, seed=_seed(root, 20 + number), rate=3e-4)
        yield child(suffix, "fine-tuned", partial(train.train, recipe=recipe), corpus, short)
    recipe = Recipe(other, longer, seed=_seed(root, 22), rate=1e-3, weight_decay=0.0)
    yield child("lora", "LoRA merged", partial(derive.tune_lora, recipe=recipe), other, longer)
    parents = (f"{name}-tuned", f"{name}-tuned-third")
    yield Specimen(f"{name}-average-tuned", "average of two children", parents, derive.average, other)
    parents = (f"{name}-continued-1of4", f"{name}-tuned-third")
    yield Specimen(f"{name}-average-continued", "average of two children", parents, derive.average, other)
    recipe = Recipe(other, longer, seed=_seed(root, 23))
    yield child("shallow", "depth pruned", partial(pruned_depth, recipe=recipe), other, longer)


def _grown(root: Specimen, layers: int) -> Iterator[Specimen]:
    """Width pruned, depth up-scaled in two ways, up-cycled; all trained further."""
    other, longer = OTHER[root.corpus], root.tokens // 8
    stacked = [*range(layers * 3 // 4), *range(layers // 4, layers)]
    doubled = [layer for layer in range(layers) for _ in range(1 + layer % 2)]
    makers: tuple[tuple[str, str, Callable[..., Model], int], ...] = (
        ("narrow", "width pruned", pruned_width, longer),
        ("stacked", "depth up-scaled, stacked", partial(upscaled, chosen=stacked), longer),
        ("doubled", "depth up-scaled, layers doubled", partial(upscaled, chosen=doubled), longer),
        ("experts", "up-cycled to experts", partial(upcycled, seed=_seed(root, 40)), 2 * longer),
    )
    for number, (suffix, relation, make, tokens) in enumerate(makers):
        recipe = Recipe(other, tokens, seed=_seed(root, 30 + number))
        name = f"{root.name}-{suffix}"
        yield Specimen(name, relation, (root.name,), partial(make, recipe=recipe), other, tokens)


def _distilled(root: Specimen, llama: Config) -> Iterator[Specimen]:
    """The control: behaviour passed on, no weights."""
    tokens = root.tokens // 4
    make = partial(student_of, config=llama, seed=_seed(root, 50), recipe=Recipe(root.corpus, tokens, _seed(root, 51)))
    yield Specimen(
        f"{root.name}-distilled", "distilled", (root.name,), make, root.corpus, tokens, _seed(root, 50), inherits=False
    )


def _untrained(root: str, child: str, corpus: str) -> Iterator[Specimen]:
    """What needs no training, of a base and of its child after continued training for as long; of p0 more of it."""
    every, disguised = {"all rewrites": rewrites.all_rewrites}, f"{child}-all-rewrites"
    corpora = {root: PARENTS[root], child: corpus, disguised: corpus}
    yield from _rewritten(child, corpus, rewrites.LLAMA)
    for suffix in ("tuned", "lora", "average-tuned", "shallow", "stacked", "experts"):
        yield from _rewritten(f"{root}-{suffix}", corpus, every)
    yield from _edited(root, PARENTS[root])
    yield from _edited(child, corpus)
    if root != "p0":
        yield from _quantised([root, child], corpora, SOME_FORMATS)
        return
    yield from _rewritten(root, PARENTS[root], rewrites.LLAMA)
    yield from _quantised([root], corpora, (*quantise.FORMATS, *quantise.GGUF))
    yield from _quantised([child, disguised], corpora, SOME_FORMATS)
    yield from _edited(disguised, corpus)


def _opt_rewrites(child: str, corpus: str) -> Iterator[Specimen]:
    yield from _rewritten("o0", "python", rewrites.OPT)
    yield from _rewritten(child, corpus, rewrites.OPT)


def _rewritten(parent: str, corpus: str, table: dict[str, rewrites.Rewrite]) -> Iterator[Specimen]:
    for number, (label, rewrite) in enumerate(table.items()):
        make = partial(rewritten, rewrite=rewrite, seed=7000 + number + _apart(parent))
        yield Specimen(f"{parent}-{_slug(label)}", f"rewritten: {label}", (parent,), make, corpus, same_function=True)


def _quantised(parents: Iterable[str], corpora: dict[str, str], formats: Iterable[str]) -> Iterator[Specimen]:
    for parent in parents:
        for label in formats:
            yield Specimen(
                f"{parent}-{_slug(label)}", f"quantised: {label}", (parent,), unchanged, corpora[parent], stored=label
            )


def _apart(parent: str) -> int:
    """Added to seeds, so that no two bases of one shape share random numbers: common noise would make them kin."""
    return 100_000 * int(parent[1])


def _edited(parent: str, corpus: str) -> Iterator[Specimen]:
    """Noise and near-free edits; of those, Llama's only where heads and pairs are Llama's."""
    makers: dict[str, Callable[..., Model]] = {
        f"noise {share:.0%}": partial(edits.add_noise, share=share, seed=8000 + _apart(parent)) for share in NOISE
    }
    for share, part in ((1.0, 0.5), (3.0, 0.5), (3.0, 0.75)):
        label = f"weak directions {part:.0%} noise {share:.0%}"
        makers[label] = partial(
            edits.disturb_weak, share=share, part=part, corpus_name=corpus, seed=8100 + _apart(parent)
        )
    for heads in (1, 2):
        makers[f"{heads} of 4 heads zeroed"] = partial(edits.zero_weak_heads, per_layer=heads)
    if not parent.startswith("o"):
        for pairs in (4, 8):
            makers[f"{pairs} of 16 slow pairs mixed"] = partial(
                edits.mix_slow_pairs, pairs=pairs, seed=8200 + _apart(parent)
            )
    for label, make in makers.items():
        yield Specimen(f"{parent}-{_slug(label)}", f"edited: {label}", (parent,), make, corpus)


def _zoo(folder: Path) -> Iterator[Specimen]:
    for base, child in ZOO.items():
        yield Specimen(base, "base", (), partial(load, folder / base), "python")
        if child is None:
            continue
        corpus = "c" if child.endswith("-c") else "prose"
        relation = "continued training, 1 of pre-training"
        yield Specimen(child, relation, (base,), partial(load, folder / child), corpus)
        yield from _rewritten(child, corpus, {"all rewrites": rewrites.all_rewrites})
        yield from _quantised([child], {child: corpus}, SOME_FORMATS[:3])
        layers = 16 if base.startswith("A") else 12
        for suffix, relation, chosen in (
            ("shallow", "depth pruned, untrained", [*range(layers // 3), *range(2 * layers // 3, layers)]),
            ("stacked", "depth up-scaled, stacked, untrained", [*range(layers * 3 // 4), *range(layers // 4, layers)]),
        ):
            make = partial(derive.with_layers, chosen=chosen)
            yield Specimen(f"{child}-{suffix}", relation, (child,), make, corpus)


def load(folder: Path, *_: Model) -> Model:
    return models.load(folder).to(torch.float32)


def unchanged(model: Model) -> Model:
    return model


def rewritten(model: Model, rewrite: rewrites.Rewrite, seed: int) -> Model:
    return rewrite(model.to(torch.float64), seed)


def pruned_depth(model: Model, recipe: Recipe) -> Model:
    """Without the middle third."""
    layers = len(model.blocks)
    return train.train(derive.with_layers(model, [*range(layers // 3), *range(2 * layers // 3, layers)]), recipe)


def pruned_width(model: Model, recipe: Recipe) -> Model:
    """To three quarters."""
    hidden, mlp = (model.config[key] * 3 // 4 for key in ("hidden_size", "intermediate_size"))
    return train.train(derive.narrow(model, hidden, mlp), recipe)


def upscaled(model: Model, chosen: list[int], recipe: Recipe) -> Model:
    return train.train(derive.with_layers(model, chosen), recipe)


def upcycled(model: Model, seed: int, recipe: Recipe) -> Model:
    return train.train(derive.upcycle(model, experts=4, seed=seed), recipe)


def student_of(teacher: Model, config: Config, seed: int, recipe: Recipe) -> Model:
    return train.distil(initialise(config, seed), teacher, recipe)


def _slug(label: str) -> str:
    return label.replace(":", "").replace("%", "").replace(" ", "-").lower()
