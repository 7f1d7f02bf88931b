"""The command line: one thin file per command, imported when it is called."""

from __future__ import annotations

import importlib

import click

import llmfp

COMMANDS = ("scan", "plan", "show", "compare", "identify", "batch", "registry", "atlas", "attest", "backends", "bench")


class LazyGroup(click.Group):
    """Knows its commands by name and imports only the one that runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"llmfp.cli.{cmd_name}").command
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(llmfp.__version__, prog_name="llmfp-fast")
def cli() -> None:
    """Tells where a language model came from by looking at its weights."""
