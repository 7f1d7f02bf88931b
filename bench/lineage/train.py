"""Training: AdamW on random windows of a corpus, everything seeded, one thread. What a model loses and reads."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bench.lineage import models
from bench.lineage.models import Model, Weights
from bench.lineage.text import corpus, windows

BATCH, CONTEXT = 4, 128
VALIDATION_WINDOWS = 64
CALIBRATION_WINDOWS = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """tokens: how many are seen; rate: AdamW's highest learning rate; cosine: down to a tenth of it, else constant."""

    corpus: str
    tokens: int
    seed: int
    rate: float = 3e-3
    cosine: bool = False
    weight_decay: float = 0.1

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (BATCH * CONTEXT)))

    def rate_at(self, step: int) -> float:
        """Warm-up over a twentieth of the steps, then the schedule."""
        warm = min(1.0, (step + 1) / max(1, self.steps // 20))
        decayed = 0.55 + 0.45 * math.cos(math.pi * step / self.steps) if self.cosine else 1.0
        return self.rate * warm * decayed


def train(model: Model, recipe: Recipe) -> Model:
    """The same model after further training of all its weights."""
    trained = _descend(model.weights, lambda weights, text: _loss(Model(model.config, weights), text), recipe)
    return Model(model.config, trained)


def train_lora(model: Model, recipe: Recipe, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Low-rank factors (B, A) of every attention projection: the tuned weight is W + B·A."""
    generator = torch.Generator().manual_seed(recipe.seed)
    adapted = [name for name, weight in model.weights.items() if "self_attn" in name and weight.dim() == 2]
    factors = {}
    for name in adapted:
        rows, cols = model.weights[name].shape
        factors[f"{name}/B"] = torch.zeros(rows, rank)
        factors[f"{name}/A"] = torch.randn(rank, cols, generator=generator) * cols**-0.5

    def loss(factors: Weights, text: Tensor) -> Tensor:
        tuned = {name: model.weights[name] + factors[f"{name}/B"] @ factors[f"{name}/A"] for name in adapted}
        return _loss(Model(model.config, model.weights | tuned), text)

    trained = _descend(factors, loss, recipe)
    return {name: (trained[f"{name}/B"], trained[f"{name}/A"]) for name in adapted}


def distil(student: Model, teacher: Model, recipe: Recipe) -> Model:
    """The student after learning the teacher's next-byte distribution: a descendant in behaviour, not in weights."""

    def loss(weights: Weights, text: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = models.logits(teacher, text[:, :-1]).flatten(0, 1).log_softmax(-1)
        given = models.logits(Model(student.config, weights), text[:, :-1]).flatten(0, 1).log_softmax(-1)
        return functional.kl_div(given, wanted, log_target=True, reduction="batchmean")

    return Model(student.config, _descend(student.weights, loss, recipe))


def evaluate(model: Model, corpus_name: str) -> float:
    """Nats per byte over fixed windows of the validation text."""
    text = windows(corpus(corpus_name).validation, VALIDATION_WINDOWS, CONTEXT + 1)
    with torch.inference_mode():
        return sum(float(_loss(model, batch)) for batch in text.split(16)) * 16 / len(text)


def second_moments(model: Model, corpus_name: str) -> Weights:
    """E[x·xᵀ], float64, of what every observed module (models.Observer) reads on training text."""
    moments: Weights = {}

    def observe(module: str, read: Tensor) -> None:
        flat = read.flatten(0, -2).double()
        moments[module] = moments.get(module, torch.zeros(())) + flat.T @ flat / (CALIBRATION_WINDOWS * CONTEXT)

    text = windows(corpus(corpus_name).training, CALIBRATION_WINDOWS, CONTEXT, seed=0)
    with torch.inference_mode():
        for batch in text.split(16):
            models.logits(model, batch, observe)
    return moments


def _loss(model: Model, text: Tensor) -> Tensor:
    given = models.logits(model, text[:, :-1])
    return functional.cross_entropy(given.flatten(0, 1), text[:, 1:].flatten())


def _descend(start: Weights, loss: Callable[[Weights, Tensor], Tensor], recipe: Recipe) -> Weights:
    weights = {name: tensor.float().clone().requires_grad_() for name, tensor in start.items()}
    matrices, vectors = ([each for each in weights.values() if (each.dim() == 1) is flat] for flat in (False, True))
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    text = corpus(recipe.corpus).training
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate_at(step)
        # A run that goes on where another stopped has another seed; within a run each step has its own.
        batch = windows(text, BATCH, CONTEXT + 1, seed=recipe.seed * 1_000_003 + step)
        optimiser.zero_grad()
        loss(weights, batch).backward()
        torch.nn.utils.clip_grad_norm_(itertools.chain(matrices, vectors), 1.0)
        optimiser.step()
    return {name: tensor.detach() for name, tensor in weights.items()}


def be_modest() -> None:
    """For a process that trains: it takes what nobody else needs, and one thread makes it repeatable."""
    os.nice(19)
    torch.set_num_threads(1)
