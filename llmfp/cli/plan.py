"""llmfp-fast plan: what a scan would read, without reading it."""

from __future__ import annotations

import json
from typing import Any

import click

from llmfp import api
from llmfp.cli.options import SOURCE, debug_option, deep_option, json_option, reading_options
from llmfp.report import terminal


@click.command("plan", short_help="Say what a scan would read and skip, without reading a weight.")
@click.argument("source", type=SOURCE)
@deep_option(False, "Plan a scan that looks at what heads compute.")
@json_option
@reading_options
@debug_option
def command(source: str, as_json: bool, **reading: Any) -> None:
    """Reads the headers of SOURCE and prints what a scan would read, in which order, and what it skips and why."""
    plan = api.plan(source, **reading)
    click.echo(json.dumps(plan.to_json(), indent=2) if as_json else terminal.plan_table(plan))
