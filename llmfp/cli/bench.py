"""llmfp-fast bench: what this machine can do, and what limits a scan on it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from llmfp.cli.options import debug_option


@click.command("bench", short_help="Measure this machine, and what limits a scan on it.")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Choice(["md", "json", "jsonl", "csv"]),
    default="md",
    show_default=True,
    help="A Markdown table, or records with every sample.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as -o json.")
@click.option("--submit-format", is_flag=True, help="One JSON object that says what it is, for --compare elsewhere.")
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Measure nothing; put two files of --submit-format side by side.",
)
@debug_option
def command(
    path: Path | None, output: str, as_json: bool, submit_format: bool, compare: tuple[Path, Path] | None
) -> None:
    """Measures storage, page cache, memory, GPUs, kernels and a whole scan, in at most two minutes, each against its
    ceiling in the same run.

    [PATH] is a checkpoint, which is read, or a directory to put one in for the time of measuring; default: the system's
    directory for temporary files.
    """
    from llmfp.hardware import machine, records

    output = "json" if as_json else output
    if compare is not None:
        a, b = (records.load(each) for each in compare)
        if output == "md":
            click.echo(records.comparison_table(a, b))
        else:
            click.echo(json.dumps(records.comparison(a, b), indent=2))
        return
    from llmfp.hardware import measures

    with _Progress() as say:
        found = measures.run(path, say)
    described, versions = machine.describe(), machine.versions()
    if submit_format:
        click.echo(json.dumps(records.submission(found, described, versions), indent=1, allow_nan=False))
    elif output == "md":
        click.echo(records.as_markdown(found, described, versions))
    else:
        rows = records.flat(found, described, versions)
        if output == "csv":
            click.echo(records.as_csv(rows))
        else:
            indent = 1 if output == "json" else None
            lines = [json.dumps(rows, indent=1)] if indent else [json.dumps(row) for row in rows]
            click.echo("\n".join(lines))


class _Progress:
    """One line on a terminal's stderr that says what is being measured."""

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, what: str) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r\033[K{what}" if _clears() else what, err=True, nl=not _clears())

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty() and _clears():
            click.echo("\r\033[K", err=True, nl=False)


def _clears() -> bool:
    import os

    return os.environ.get("TERM", "dumb") != "dumb"
