"""llmfp-fast identify: a model's nearest relatives in a registry."""

from __future__ import annotations

import json
from typing import Any

import click

from llmfp.cli.options import (
    alpha_option,
    debug_option,
    deep_option,
    json_option,
    machine_options,
    permutations_option,
    registry_option,
    seed_option,
)
from llmfp.cli.progress import ProgressBar


@click.command("identify", short_help="Find a model's relatives in a registry.")
@click.argument("source")
@registry_option
@click.option("--top", type=click.IntRange(1, 1000), default=10, show_default=True, help="So many nearest are tested.")
@alpha_option("Chance of calling any stranger related, over the whole search.")
@permutations_option
@seed_option
@deep_option(True, "Look at what heads compute, to rank and test by rotary coherence; default: yes.")
@json_option
@machine_options
@debug_option
def command(source: str, registry: str, as_json: bool, **more: Any) -> None:
    """Ranks the fingerprints of a registry by how near they are to SOURCE, tests the nearest for common origin, and
    holds the base models that SOURCE's model card declares against what the weights say.

    SOURCE is a model's directory, a weight file, a saved fingerprint, or org/name[@revision] on the Hub.
    """
    from llmfp.identification import identify

    with ProgressBar() as bar:
        found = identify(source, registry, progress=bar, **more)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
        return
    from llmfp.report.identification import identification_page

    click.echo(identification_page(found))
