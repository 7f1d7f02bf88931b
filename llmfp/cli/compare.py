"""llmfp-fast compare: what two models' attention weights say about shared ancestry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from llmfp import api
from llmfp.checkpoint.adapter import is_adapter
from llmfp.cli.options import (
    SOURCE,
    alpha_option,
    debug_option,
    deep_option,
    device_options,
    json_option,
    permutations_option,
    plain_option,
    reading_options,
    report_option,
    seed_option,
    verbose_option,
)
from llmfp.cli.progress import ProgressBar, say_plan
from llmfp.fingerprint import Fingerprint, write_whole
from llmfp.report import printable, tables

EXPECTED = {"related": "related", "none": "none_detected"}


@click.command("compare", short_help="Weigh the evidence that two models share ancestry.")
@click.argument("a", type=SOURCE)
@click.argument("b", type=SOURCE)
@alpha_option("Level of the verdict, over all tests together.")
@click.option("--expect", type=click.Choice(list(EXPECTED)), help="Exit with 1 where the verdict is another.")
@permutations_option
@click.option(
    "--null",
    type=click.Path(path_type=Path, readable=False),
    help="Further unrelated models: σ in JSON, or a directory of fingerprints, each its own family.",
)
@seed_option
@deep_option(None, "Look at what heads compute; without it, or of a sample, only profile and residual test are left.")
@report_option
@plain_option
@json_option
@reading_options
@device_options
@verbose_option
@debug_option
def command(
    a: str,
    b: str,
    expect: str | None,
    report: Path | None,
    plain: bool,
    as_json: bool,
    verbose: bool,
    tower: str | None,
    base: Path | None,
    **more: Any,
) -> int:
    """Compares A and B, each a model's directory, a weight file, a saved fingerprint or a model of the Hub, and says
    whether their attention weights share ancestry, by which tests, and what those cannot see.

    The verdict is related, none_detected or inconclusive; it never says that there is no relation, and never which
    of the two came first.
    """
    weighing = {name: more.pop(name) for name in ("alpha", "permutations", "null", "seed")}
    if base is not None and not (is_adapter(Path(a)) or is_adapter(Path(b))):
        raise click.BadParameter("neither A nor B is an adapter", param_hint="--base")
    if more["deep"] is None:
        more["deep"] = more["sample"] is None
    reading = {**more, "tower": tower if tower == "vision" else None, "planned": say_plan if verbose else None}
    found = api.compare(_scan(a, base, reading), _scan(b, base, reading), tower=tower, **weighing)
    if report is not None:
        from llmfp.report import page

        write_whole(report, page.comparison(found.to_json()).encode())
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
    elif plain:
        click.echo(tables.plain(tables.tests(found.to_json())))
    else:
        from llmfp.report.comparison import comparison_page

        click.echo(comparison_page(found))
        if report is not None:
            click.echo(f"\nreport in {printable(str(report))} ({report.stat().st_size:,} bytes)")
    if expect is None or found.verdict == EXPECTED[expect]:
        return 0
    click.echo(f"expected {EXPECTED[expect]}, found {found.verdict}", err=True)
    return 1


def _scan(source: str, base: Path | None, reading: dict[str, Any]) -> Fingerprint:
    with ProgressBar() as bar:
        return api.scan(source, base=base if is_adapter(Path(source)) else None, progress=bar, **reading)
