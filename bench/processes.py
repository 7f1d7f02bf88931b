"""Whole processes, from start to answer: timed by native/ceiling.c, which also reports their peak resident set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import ceilings
from bench.checkpoints import BenchCheckpoint
from bench.harness import Measure, Sample

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "bench" / "peers.py"


def llmfp_fast(*arguments: str) -> list[str]:
    """The command as installed beside this interpreter, else the module."""
    script = Path(sys.executable).parent / "llmfp-fast"
    program = [str(script)] if script.exists() else [sys.executable, "-m", "llmfp"]
    return [*program, *arguments]


def launched(
    command: Sequence[str],
    check: Callable[[str], None] | None = None,
    *,
    before: Callable[[], None] | None = None,
    stdin: bytes = b"",
) -> Measure:
    """Measures a process from exec to exit. `before` prepares, `check` gets what it printed; neither is timed."""

    def measure() -> Sample:
        if before is not None:
            before()
        with tempfile.NamedTemporaryFile("r") as report:
            done = subprocess.run(
                [ceilings.program(), "launch", report.name, *command],
                input=stdin,
                capture_output=True,
                check=True,
                cwd=ROOT,
                env=_environment(),
            )
            seconds, peak, status = report.read().split()
        assert status == "0", f"{command[:4]} ended with {status}: {done.stderr.decode()[-2000:]}"
        if check is not None:
            check(done.stdout.decode())
        return Sample(float(seconds), int(peak))

    return measure


def checks_scan(checkpoint: BenchCheckpoint, tolerance: float = 1e-6) -> Callable[[str], None]:
    """Checks what `scan --json` printed against the std of every tensor, known from writing them."""

    def check(printed: str) -> None:
        std = json.loads(printed)["std"]
        layers = range(checkpoint.layers)
        answer = {f"model.layers.{n}.self_attn.{role}_proj.weight": std[role][n] for role in "qkvo" for n in layers}
        checkpoint.check_std(answer, tolerance)

    return check


def checks_peer(checkpoint: BenchCheckpoint, tolerance: float) -> Callable[[str], None]:
    return lambda printed: checkpoint.check_std(json.loads(printed.splitlines()[-1]), tolerance)


def bare_read(checkpoint: BenchCheckpoint, method: str, threads: int, before: Callable[[], None]) -> Measure:
    """Measures `ceiling read` of the attention tensors, and checks the sum of their words."""

    def check(printed: str) -> None:
        assert int(printed) == checkpoint.words_sum

    command = [ceilings.program(), "read", method, str(threads)]
    return launched(command, check, before=before, stdin=ceilings.range_lines(checkpoint.ranges))


def _environment() -> dict[str, str]:
    """Compiled bytecode may be kept, as on a user's machine; an uninstalled llmfp is found in the repository."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
