"""Options that several commands share."""

from __future__ import annotations

import os
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
plain_option = click.option(
    "--plain", is_flag=True, help="Print lines of fields with a tab between, numbers in full, for pipes."
)
debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, help="On an error, print the Python traceback."
)
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Say on stderr what is being done.")


def _share(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else parse_share(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _page(_context: click.Context, option: click.Parameter, value: Path | None) -> Path | None:
    """A page that can be made and written: asked before the work, not after it."""
    if value is not None:
        from llmfp.report import page

        check_writable(value, f"--{option.name}")
        page.ready()
    return value


report_option = click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_page,
    metavar="FILE.html",
    help="Write a page that stands alone, for people who were not there.",
)


def check_writable(out: Path, hint: str) -> None:
    """Fails before the work, not after it."""
    if not out.parent.is_dir():
        raise click.BadParameter(f"{out.parent} is not a directory", param_hint=hint)
    if not os.access(out.parent, os.W_OK):
        raise click.BadParameter(f"{out.parent} is not writable", param_hint=hint)


permutations_option = click.option(
    "--permutations",
    type=click.IntRange(1, 10_000_000),
    default=100_000,
    show_default=True,
    help="Drawn for each permutation test.",
)
seed_option = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the permutations drawn."
)


def alpha_option(help_text: str) -> Callable[[Command], Command]:
    """--alpha, with what is held to that level."""
    return click.option(
        "--alpha",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        default=1e-3,
        show_default=True,
        help=help_text,
    )


def deep_option(default: bool | None, help_text: str) -> Callable[[Command], Command]:
    """--deep/--no-deep, with what this command does when neither is given."""
    return click.option("--deep/--no-deep", default=default, help=help_text)


registry_option = click.option(
    "--registry", required=True, metavar="DIR", help="The registry: a directory, or a URL that fsspec knows."
)


def machine_options(command: Command) -> Command:
    """What reads and computes: back end, reader, threads, memory."""
    for option in reversed(
        (
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
        )
    ):  # fmt: skip
        command = option(command)
    return command


def reading_options(command: Command) -> Command:
    """What to read and how: base, tower, sample, and the machine's options."""
    command = machine_options(command)
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
