"""llmfp-fast scan: the fingerprint of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from llmfp import api
from llmfp.cli.options import (
    SOURCE,
    check_writable,
    debug_option,
    deep_option,
    device_options,
    json_option,
    plain_option,
    reading_options,
    report_option,
    verbose_option,
)
from llmfp.cli.progress import ProgressBar, say_plan
from llmfp.fingerprint import SUFFIX, is_fingerprint, write_whole
from llmfp.report import printable, terminal


@click.command("scan", short_help="Fingerprint a checkpoint: σ of every attention matrix.")
@click.argument("source", type=SOURCE)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help=f"Keep the fingerprint, as *{SUFFIX}.")
@deep_option(None, "Look at what heads compute, as comparisons need; default: where the fingerprint is kept.")
@report_option
@plain_option
@json_option
@reading_options
@device_options
@verbose_option
@debug_option
def command(
    source: str,
    out: Path | None,
    deep: bool | None,
    report: Path | None,
    plain: bool,
    as_json: bool,
    verbose: bool,
    **reading: Any,
) -> None:
    """Reads the attention weights of SOURCE once and prints the standard deviation σ of Q, K, V and O in every layer.

    SOURCE is a model's directory, a single .safetensors, .gguf, .bin, .pt or .pth file, or a saved fingerprint; or a
    model of the Hugging Face Hub (ORG/NAME, ORG/NAME@REVISION, hf://ORG/NAME) or the https address of a weight file, of
    which only the attention weights are fetched and nothing is kept.
    """
    if out is not None:
        _check_writable(out)
    planned = say_plan if verbose else None
    with ProgressBar() as bar:
        deep = out is not None and reading["sample"] is None if deep is None else deep
        fingerprint = api.scan(source, deep=deep, planned=planned, progress=bar, **reading)
    if out is not None:
        fingerprint.save(out)
    if report is not None:
        from llmfp.report import page

        write_whole(report, page.fingerprint(fingerprint.to_json()).encode())
    if as_json:
        click.echo(json.dumps(fingerprint.to_json(), indent=2, allow_nan=False))
        return
    if plain:
        from llmfp.report import tables

        click.echo(tables.plain(tables.statistics(fingerprint)))
        return
    click.echo(terminal.fingerprint_table(fingerprint))
    if out is not None:
        click.echo(f"kept in {printable(str(out))} ({out.stat().st_size:,} bytes)")
    if report is not None:
        click.echo(f"report in {printable(str(report))} ({report.stat().st_size:,} bytes)")


def _check_writable(out: Path) -> None:
    """Fails before the work, not after it."""
    if not is_fingerprint(out):
        raise click.BadParameter(f"{out} does not end in {SUFFIX}", param_hint="--out")
    check_writable(out, "--out")
