"""`llmfp-fast` and `python -m llmfp`: runs a command and turns what happens into the documented exit code.

0 done, whatever the verdict; 1 the answer contradicts --expect; 2 bad usage or unreadable input; 3 finished with some
items failed; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Never lets a traceback through unless --debug asks for it."""
    try:
        return _run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: list[str]) -> int:
    import click

    from llmfp.cli import cli
    from llmfp.errors import LlmfpError

    try:
        code = cli.main(args=arguments, prog_name="llmfp-fast", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return 2
    except click.Abort:
        raise KeyboardInterrupt from None
    except BrokenPipeError:
        # The reader of our output has seen enough; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except LlmfpError as error:
        if "--debug" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if "--debug" in arguments:
            raise
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        print("hint: this is a bug in llmfp; run again with --debug and report what it prints", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
