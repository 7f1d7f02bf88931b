"""llmfp-fast batch: many checkpoints into a registry."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from llmfp.cli.atlas import compared, write_page
from llmfp.cli.options import check_writable, debug_option, deep_option, json_option, machine_options, registry_option
from llmfp.report import printable

if TYPE_CHECKING:
    from llmfp.batch.run import Executor, Result
    from llmfp.sources import Source

FAILED = 3


@click.command("batch", short_help="Fingerprint many checkpoints into a registry.")
@registry_option
@click.option(
    "--list", "listed", type=click.File(errors="surrogateescape"),
    help="Checkpoints, one a line: paths, org/name[@revision] or https URLs; - is standard input.",
)  # fmt: skip
@click.option("--org", "--author", "author", help="All models of this organisation or user on the Hub.")
@click.option("--filter", "only", metavar="TAG", help="Of those, models with this tag: text-generation, for example.")
@click.option("--limit", type=click.IntRange(1), help="Of those, so many at most, the last changed first.")
@click.option("--since", type=click.DateTime(["%Y-%m-%d"]), help="Of those, models changed on this day or later.")
@click.option("--retry-failed", is_flag=True, help="Try again what failed before.")
@click.option(
    "--executor", type=click.Choice(["local", "ray"]), default="local", show_default=True,
    help="Where checkpoints are read: here one after the other, or one task each on a Ray cluster.",
)  # fmt: skip
@click.option("--address", help="Of the Ray cluster; default: RAY_ADDRESS, else Ray on this machine.")
@click.option(
    "--report", "report_file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.html",
    help="Afterwards show the whole registry on one page, as llmfp-fast atlas does.",
)  # fmt: skip
@deep_option(True, "Look at what heads compute, which identify ranks and tests by; default: yes.")
@json_option
@machine_options
@debug_option
def command(
    registry: str,
    listed: TextIO | None,
    author: str | None,
    only: str | None,
    limit: int | None,
    since: datetime | None,
    retry_failed: bool,
    executor: str,
    address: str | None,
    report_file: Path | None,
    as_json: bool,
    **reading: Any,
) -> int:
    """Fingerprints every checkpoint of a list or of an organisation on the Hub into a registry, and prints what was
    done, skipped and failed. Exits with 3 if any failed.

    May be stopped, or killed, at any moment and started again: what is in the registry is not read again, and neither
    are weights that are there under another name.
    """
    if listed is None and author is None:
        raise click.UsageError("nothing to do: give --list or --org")
    if author is None and (only or limit or since):
        raise click.UsageError("--filter, --limit and --since choose among the models of --org")
    if address is not None and executor != "ray":
        raise click.UsageError("--address is of the Ray cluster: give --executor ray")
    if report_file is not None:
        check_writable(report_file, "--report")
    from llmfp.batch.items import from_hub, from_list
    from llmfp.batch.run import run
    from llmfp.registry import Registry
    from llmfp.report.batch import batch_table, result_line

    items = list(from_list(listed)) if listed is not None else []
    opened = Registry.open(registry, create=True)

    def tell(result: Result) -> None:
        click.echo(printable(result_line(result)), err=True)
        sys.stderr.flush()

    with ExitStack() as stack:
        client = None
        of_author: Iterable[Source] = ()
        if author is not None or any(item.hub for item in items):
            from llmfp.hub.client import Client

            client = stack.enter_context(Client())
            if author is not None:
                after = since.date().isoformat() if since else None
                of_author = from_hub(client, author, tag=only, limit=limit, since=after)
        where = _executor(executor, registry, reading, address)
        report = run(chain(items, of_author), opened, where, client=client, retry_failed=retry_failed, tell=tell)
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else batch_table(report))
    if report_file is not None:
        write_page(compared(registry), report_file)
    return FAILED if report.of("failed") else 0


def _executor(name: str, registry: str, reading: dict[str, Any], address: str | None) -> Executor:
    if name == "ray":
        from llmfp.batch.ray_cluster import RayExecutor

        return RayExecutor(registry, reading, address)
    from llmfp.batch.local import LocalExecutor

    return LocalExecutor(registry, reading)
