"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llmfp.architecture.families import TOWERS
from llmfp.kernels import BACKENDS
from llmfp.plan import parse_size
from llmfp.reader import READERS
from llmfp.sample import parse_share

Command = Callable[..., Any]
SOURCE = click.Path(path_type=str, readable=False)
"""A path or an address: as written, since a path would fold the slashes of an address."""


def _size(_context: click.Context, _option: click.Parameter, value: str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, help="On an error, print the Python traceback."
)
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Say on stderr what is being done.")


def _share(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else parse_share(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def deep_option(default: bool | None, help_text: str) -> Callable[[Command], Command]:
    """--deep/--no-deep, with what this command does when neither is given."""
    return click.option("--deep/--no-deep", default=default, help=help_text)


def reading_options(command: Command) -> Command:
    """What to read and how: base, tower, back end, reader, threads, memory, sample."""
    for option in reversed(
        (
            click.option(
                "--base", type=click.Path(path_type=Path, readable=False),
                help="The model below SOURCE, where that is an adapter (LoRA).",
            ),
            click.option(
                "--tower", type=click.Choice(TOWERS), help="Read this tower alone; default: the language model's.",
            ),
            click.option(
                "--backend", type=click.Choice(["auto", *BACKENDS]), default="auto", show_default=True,
                help="What computes; llmfp-fast backends says which can run here.",
            ),
            click.option(
                "--reader", type=click.Choice(READERS), default="auto", show_default=True,
                help="How bytes arrive; auto maps what is in the page cache and reads the rest.",
            ),
            click.option("--threads", type=click.IntRange(1, 1024), help="Threads; default: one per core."),
            click.option(
                "--memory", "memory_bytes", metavar="SIZE", callback=_size, default="512MiB", show_default=True,
                help="Bound on resident memory, beyond what planning takes.",
            ),
            click.option(
                "--sample", metavar="SHARE", callback=_share,
                help="Read blocks of rows, 10% of them for example; every σ then has a 95 % interval.",
            ),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def device_options(command: Command) -> Command:
    """Where the arithmetic is done."""
    command = click.option(
        "--device-memory", "device_memory_bytes", metavar="SIZE", callback=_size, default="512MiB", show_default=True,
        help="Bound on the memory of each device.",
    )(command)  # fmt: skip
    return click.option(
        "--device", metavar="cpu|cuda[:N]|mps|auto", default="cpu", show_default=True,
        help="What reduces the weights; auto compares rates measured here.",
    )(command)  # fmt: skip
