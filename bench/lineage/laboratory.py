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

from bench.lineage import models, quantise, rewrites
from bench.lineage.models import Model
from bench.lineage.specimens import Specimen
from bench.lineage.text import CORPORA, corpus, windows
from bench.lineage.train import evaluate, second_moments

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
        record = self._record(specimen, model)
        record |= {} if difference is None else {"logits_difference": difference}
        record["core_seconds"] = round(time.process_time() - start, 1)
        record_file.parent.mkdir(parents=True, exist_ok=True)
        partial = record_file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(record_file)  # last: a specimen with a record is whole
        return f"{name}: {specimen.relation}, loss {record['loss']}, {record['core_seconds']} s"

    def _some_text(self, specimen: Specimen) -> Tensor:
        return windows(corpus(specimen.corpus).validation, 2, 64)

    def _record(self, specimen: Specimen, model: Model) -> dict[str, Any]:
        above = [json.loads((self.out / "records" / f"{parent}.json").read_text()) for parent in specimen.parents]
        return {
            "name": specimen.name,
            "relation": specimen.relation,
            "parents": list(specimen.parents),
            "roots": sorted({root for each in above for root in each["roots"]})
            if specimen.inherits
            else [specimen.name],
            "seed": specimen.seed,
            "stored": specimen.stored,
            "corpus": specimen.corpus,
            "tokens": specimen.tokens,
            "loss": round(evaluate(model, specimen.corpus), 4),
        }

    def fingerprint(self, name: str) -> str:
        return f"{name}: later"

    def write_manifest(self, names: Iterable[str]) -> None:
        records = [json.loads((self.out / "records" / f"{name}.json").read_text()) for name in names]
        texts = {
            name: {"sha256": corpus(name).digest, "unigram_loss": round(corpus(name).unigram_loss, 4)}
            for name in CORPORA
        }
        manifest = {"corpora": texts, "specimens": records}
        (self.out / "manifest.json").write_text(json.dumps(manifest, indent=1))
