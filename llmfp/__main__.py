"""`llmfp-fast` and `python -m llmfp`: runs a command and turns what happens into the documented exit code.

0 done, whatever the verdict; 1 the answer contradicts --expect; 2 bad usage or unreadable input; 3 finished with some
items failed; 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

INTERRUPTED = 130
_LONGEST_MESSAGE = 2000


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Never lets a traceback through unless --debug asks for it."""
    if sys.stdout is None:  # closed by the caller: what is opened next must not become standard output
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: list[str]) -> int:
    import click

    from llmfp.cli import cli

    try:
        code = cli.main(args=arguments, prog_name="llmfp-fast", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except SystemExit:
        return 0  # click's answer to a closed pipe: whoever reads our output has seen enough
    except click.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        return _explain(error, debug="--debug" in arguments)


def _explain(error: Exception, *, debug: bool) -> int:
    """One line that says what went wrong, one that says what to do; returns the exit code."""
    import click

    from llmfp.errors import LlmfpError
    from llmfp.report import printable

    code = 2
    match error:
        case LlmfpError():
            message, hint, code = str(error), error.hint, error.exit_code
        case click.UsageError() if error.format_message().startswith("Usage:"):
            error.show()  # no command: the help
            return code
        case click.ClickException():
            context = getattr(error, "ctx", None)
            message, hint = error.format_message(), f"{context.command_path if context else 'llmfp-fast'} --help"
        case OSError():
            message, hint = f"{error.filename or 'standard output'}: {error.strerror or error}", ""
        case _:
            message = f"{type(error).__name__}: {error}"
            hint = "this is a bug in llmfp; run again with --debug and report what it prints"
    if debug:
        import traceback

        traceback.print_exception(error)
    print(f"error: {printable(message[:_LONGEST_MESSAGE])}", file=sys.stderr)
    if hint:
        print(f"hint: {printable(hint)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
