"""What a batch says: a line when an item is settled, a table at the end."""

from __future__ import annotations

from llmfp.batch.run import STATUSES, Report, Result
from llmfp.report import printable
from llmfp.report.registry import short
from llmfp.report.terminal import size


def result_line(result: Result) -> str:
    """One result while the batch runs."""
    name = f"{result.status:<7} {result.repo}@{short(result.revision)}"
    if result.reason is not None:
        return f"{name}: {result.reason}"
    return f"{name}: {size(result.bytes_read)} in {result.seconds:.1f} s"


def batch_table(report: Report) -> str:
    """What failed and why, what was skipped and why, what was done; then how many of each."""
    lines = [result_line(result) for status in STATUSES for result in report.of(status)]
    counts = ", ".join(f"{len(report.of(status))} {status}" for status in STATUSES)
    lines += ["", f"{counts}; {report.registry} has digest {report.digest}"]
    return "\n".join(map(printable, lines))
