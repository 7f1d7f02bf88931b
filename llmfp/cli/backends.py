"""llmfp-fast backends: what can compute here."""

from __future__ import annotations

import json

import click

from llmfp import kernels
from llmfp.cli.options import debug_option, json_option


@click.command("backends", short_help="List the back ends: usable, or why not.")
@json_option
@debug_option
def command(as_json: bool) -> None:
    """Lists every back end with its variant (SIMD level, device) or the reason why it cannot run here."""
    rows = []
    for name in kernels.BACKENDS:
        backend = kernels.load(name)
        reason = backend.why_unavailable()
        rows.append(
            {
                "name": name,
                "usable": reason is None,
                "reason": reason,
                "variant": backend.describe() if reason is None else None,
                "dtypes": sorted(backend.dtypes),
            }
        )
    if as_json:
        click.echo(json.dumps({"schema": "llmfp.backends/1", "backends": rows}, indent=2))
        return
    for row in rows:
        state = f"usable, {row['variant']}" if row["usable"] else f"not usable: {row['reason']}"
        click.echo(f"{row['name']:<15} {state}")
    if not rows[0]["usable"]:
        click.echo("warning: without native_cpu every scan runs on NumPy, some fifty times slower", err=True)
