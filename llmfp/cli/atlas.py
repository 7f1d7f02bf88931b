"""llmfp-fast atlas: all models of a registry on one page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from llmfp.cli.options import (
    alpha_option,
    check_writable,
    debug_option,
    json_option,
    permutations_option,
    registry_option,
)
from llmfp.fingerprint import write_whole
from llmfp.report import printable


@click.command("atlas", short_help="Show a registry's families on one page.")
@registry_option
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.html", help="Where the page goes."
)
@alpha_option("Level of each pair that is tested.")
@permutations_option
@json_option
@debug_option
def command(registry: str, out: Path | None, alpha: float, permutations: int, as_json: bool) -> None:
    """Compares all models of the registry by their σ, tests each with its nearest and with the bases that its card
    declares, and writes one page: a table to sort and search, the similarity of all pairs with its tree, and lineage,
    declared and detected told apart.
    """
    if out is None and not as_json:
        raise click.UsageError("name --out FILE.html, or --json")
    if out is not None:
        check_writable(out, "--out")
    found = compared(registry, alpha, permutations)
    if out is not None:
        write_page(found, out)
    if as_json or out is None:
        click.echo(json.dumps(found, allow_nan=False))
        return
    detected = sum(edge["detected"] for edge in found["edges"])
    click.echo(
        f"{len(found['models']):,} models, {found['pairs_tested']:,} pairs tested, {detected:,} relations detected, "
        f"{sum(edge['declared'] is not None for edge in found['edges']):,} declared"
    )
    click.echo(f"atlas in {printable(str(out))} ({out.stat().st_size:,} bytes)")


def compared(registry: str, alpha: float = 1e-3, permutations: int = 100_000) -> dict[str, Any]:
    """The atlas of a registry, with a bar on a terminal while pairs are tested."""
    from llmfp.atlas import atlas
    from llmfp.registry import Registry

    with click.progressbar(length=1, label="testing pairs", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:

        def advance(_done: int, total: int) -> None:
            bar.length = total
            bar.update(1)

        return atlas(Registry.open(registry), alpha=alpha, permutations=permutations, progress=advance)


def write_page(found: dict[str, Any], out: Path) -> None:
    from llmfp.report import page

    write_whole(out, page.atlas(found).encode())
