"""`python -m bench [SUITE …] [pytest options]`: measures, prints, keeps results; every suite of SUITES by default."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from bench.report import report

SUITES = ("kernels", "encodings", "readers", "scan", "deep", "hub", "sample", "registry")


def main(arguments: list[str]) -> int:
    suites = [argument for argument in arguments if argument in SUITES] or list(SUITES)
    options = [argument for argument in arguments if argument not in SUITES]
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as directory:
        measured = Path(directory) / "measured.json"
        files = [str(here / f"bench_{suite}.py") for suite in suites]
        code = pytest.main([*files, "--benchmark-only", "--benchmark-quiet", f"--benchmark-json={measured}", *options])
        if measured.exists():
            # Results are kept only where everything was measured and every answer was right.
            report(measured, keep=code == 0 and not options)
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
