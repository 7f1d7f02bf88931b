"""llmfp-fast show: a saved fingerprint."""

from __future__ import annotations

import json
from pathlib import Path

import click

import llmfp
from llmfp.cli.options import debug_option, json_option, plain_option
from llmfp.report import terminal


@click.command("show", short_help="Print a saved fingerprint.")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, readable=False))
@plain_option
@json_option
@debug_option
def command(file: Path, plain: bool, as_json: bool) -> None:
    """Prints the fingerprint in FILE, as scan --out wrote it."""
    fingerprint = llmfp.load(file)
    if as_json:
        click.echo(json.dumps(fingerprint.to_json(), indent=2, allow_nan=False))
    elif plain:
        from llmfp.report import tables

        click.echo(tables.plain(tables.statistics(fingerprint)))
    else:
        click.echo(terminal.fingerprint_table(fingerprint))
