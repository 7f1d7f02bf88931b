"""`python -m bench.lineage --out DIR`: makes what DIR lacks of all specimens, fingerprints them, writes the manifest.

DIR/exact/NAME/         config.json and float32 weights: what children are made from
DIR/models/NAME/        the same in bfloat16 or quantised: what is fingerprinted
DIR/records/NAME.json   what was measured while it was made: loss, logits difference, seconds
DIR/fingerprints/       NAME.fp.safetensors
DIR/manifest.json       what every specimen is, its record, and the corpora
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from graphlib import TopologicalSorter
from multiprocessing import get_context
from pathlib import Path

from bench.lineage.laboratory import Laboratory
from bench.lineage.specimens import specimens
from bench.lineage.train import be_modest


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lineage", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each (2)")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these specimens and their ancestors")
    parser.add_argument("--zoo", type=Path, metavar="DIR", help="further models, trained elsewhere")
    options = parser.parse_args(arguments)
    run(Laboratory(options.out, specimens(zoo=options.zoo)), options.jobs, options.only)


def run(laboratory: Laboratory, jobs: int, only: Sequence[str] | None = None) -> None:
    """Every specimen after its parents, else in the table's order, `jobs` at a time."""
    wanted = laboratory.with_ancestors(only or laboratory.table)
    order = {name: place for place, name in enumerate(laboratory.table)}
    sorter = TopologicalSorter({name: laboratory.table[name].parents for name in wanted})
    sorter.prepare()
    ready: list[str] = []
    running: dict[Future[str], str] = {}
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=be_modest) as pool:
        while sorter.is_active():
            ready = sorted({*ready, *sorter.get_ready()}, key=order.__getitem__)
            while ready and len(running) < jobs:  # no more: what becomes ready meanwhile may come earlier in the table
                name = ready.pop(0)
                running[pool.submit(laboratory.make, name)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                print(future.result(), flush=True)
                sorter.done(running.pop(future))
        for line in pool.map(laboratory.fingerprint, wanted):
            print(line, flush=True)
    laboratory.write_manifest(wanted)


if __name__ == "__main__":
    main()
