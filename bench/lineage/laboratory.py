"""Makes specimens once, keeps them in a directory, and says what each one is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmfp
from bench.lineage import models, quantise, rewrites
from bench.lineage.specimens import Specimen
from bench.lineage.text import CORPORA, corpus, windows
from bench.lineage.train import evaluate, second_moments
from llmfp.fingerprint import SUFFIX

SAME_FUNCTION = 1e-9
"""How far logits in float64 may differ, relative to the largest, where a rewrite changes nothing."""


class Laboratory:
    """A table of specimens and the directory they live in; what exists there is never made again."""

    def __init__(self, out: Path, table: Mapping[str, Specimen]) -> None:
        self.out, self.table = out, table

    def with_ancestors(self, names: Iterable[str]) -> list[str]:
        wanted = set(names)
        for name in reversed(list(self.table)):  # parents come before children
            if name in wanted:
                wanted.update(self.table[name].parents)
        return [name for name in self.table if name in wanted]

    def make(self, name: str) -> str:
        """Makes, evaluates and stores a specimen unless it is there, and says in a line what it is."""
        record_file = self.out / "records" / f"{name}.json"
        if record_file.exists():
            return f"{name}: there"
        specimen = self.table[name]
        parents = [models.load(self.out / "exact" / parent) for parent in specimen.parents]
        start = time.process_time()
        made = specimen.make(*parents)
        difference = (
            rewrites.same_logits(parents[0], made, self._some_text(specimen)) if specimen.same_function else None
        )
        if difference is not None and not difference < SAME_FUNCTION:
            raise AssertionError(f"{name} computes something else: logits differ by {difference}")
        model, stored = made.to(torch.float32), self.out / "models" / name
        models.save(model, self.out / "exact" / name)
        if specimen.stored == "bf16":
            models.save(model.to(torch.bfloat16), stored)
        else:
            model = quantise.write(model, specimen.stored, stored, second_moments(model, specimen.corpus))
        record: dict[str, Any] = {"loss": round(evaluate(model, specimen.corpus), 4)}
        if difference is not None:
            record["logits_difference"] = difference
        record["core_seconds"] = round(time.process_time() - start, 1)
        record_file.parent.mkdir(parents=True, exist_ok=True)
        partial = record_file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(record_file)  # last: a specimen with a record is whole
        return f"{name}: {specimen.relation}, loss {record['loss']}, {record['core_seconds']} s"

    def _some_text(self, specimen: Specimen) -> Tensor:
        return windows(corpus(specimen.corpus).validation, 2, 64)

    def fingerprint(self, name: str) -> str:
        """Scans what is stored of a specimen, and says in a line what came of it."""
        kept = self.out / "fingerprints" / f"{name}{SUFFIX}"
        if kept.exists():
            return f"{name}: fingerprint there"
        kept.parent.mkdir(parents=True, exist_ok=True)
        llmfp.scan(self.out / "models" / name, deep=True, threads=1).save(kept)
        return f"{name}: fingerprint of {kept.stat().st_size} bytes"

    def write_manifest(self, names: Iterable[str]) -> None:
        texts = {
            name: {"sha256": corpus(name).digest, "unigram_loss": round(corpus(name).unigram_loss, 4)}
            for name in CORPORA
        }
        manifest = {"corpora": texts, "specimens": [self._described(name) for name in names]}
        (self.out / "manifest.json").write_text(json.dumps(manifest, indent=1))

    def _described(self, name: str) -> dict[str, Any]:
        specimen = self.table[name]
        return {
            "name": name,
            "relation": specimen.relation,
            "parents": list(specimen.parents),
            "roots": sorted(self.roots(name)),
            "seed": specimen.seed,
            "stored": specimen.stored,
            "corpus": specimen.corpus,
            "tokens": specimen.tokens,
            **json.loads((self.out / "records" / f"{name}.json").read_text()),
        }

    def roots(self, name: str) -> set[str]:
        """The independently initialised models that its weights come from."""
        specimen = self.table[name]
        if not (specimen.parents and specimen.inherits):
            return {name}
        return set().union(*(self.roots(parent) for parent in specimen.parents))
