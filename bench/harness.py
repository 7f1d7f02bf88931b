"""Interleaved measurement: all variants of one comparison take turns, and claims are ratios within a round.

One pytest-benchmark round is one sample of every variant: A B C, then C B A, and so on, so that a drift of the machine
meets all of them alike. What pytest-benchmark stores for us is `extra_info`; its own times are those of whole rounds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    seconds: float
    peak_rss_bytes: int | None = None


Measure = Callable[[], Sample]
"""Prepares, does the work once, checks the answer, and returns what the work alone took."""


class Benchmark(Protocol):
    """The part of pytest-benchmark's fixture that is used here."""

    extra_info: dict[str, Any]

    def pedantic(self, target: Callable[[], None], *, rounds: int, warmup_rounds: int) -> None: ...


def timed(work: Callable[[], T], check: Callable[[T], None]) -> Measure:
    """Measures a call in this process; the check is not timed."""

    def measure() -> Sample:
        start = time.perf_counter()
        answer = work()
        seconds = time.perf_counter() - start
        check(answer)
        return Sample(seconds)

    return measure


def after(prepare: Callable[[], None], measure: Measure) -> Measure:
    """The measure with something done before it, untimed."""

    def prepared() -> Sample:
        prepare()
        return measure()

    return prepared


def rounds(default: int) -> int:
    return int(os.environ.get("LLMFP_BENCH_ROUNDS") or default)


@dataclass(slots=True)
class Variant:
    name: str
    measure: Measure
    facts: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)


class Comparison:
    """Variants of the same work, and what is claimed of them. `cache`: where the bytes are, and how that is known."""

    def __init__(self, suite: str, title: str, cache: str) -> None:
        self.suite, self.title, self.cache = suite, title, cache
        self._variants: dict[str, Variant] = {}
        self._claims: list[Callable[[], dict[str, Any]]] = []
        self._left_out: dict[str, str] = {}
        self._backwards = False

    def add(self, name: str, measure: Measure, *, nbytes: int | None, threads: int | None, **facts: Any) -> None:
        """nbytes: useful stored bytes, for GB/s; facts: what else a reader of the row should know."""
        assert name not in self._variants, name
        self._variants[name] = Variant(name, measure, {"bytes": nbytes, "threads": threads, **facts})

    def leave_out(self, name: str, reason: str) -> None:
        """Says in the table why a variant is not there."""
        self._left_out[name] = reason

    def at_least(
        self, claim: str, name: str, against: Sequence[str], wanted: float, *, counting: str = "bytes"
    ) -> None:
        """Claims that `name` is at least `wanted` times as fast as the fastest of `against`, in bytes a second.

        counting: another fact of the rows to count instead of bytes.
        """

        def ratio(n: int) -> float:
            return self._rate(name, n, counting) / max(self._rate(other, n, counting) for other in against)

        self._claim(claim, name, against, wanted, "at least", ratio)

    def at_most(self, claim: str, name: str, against: Sequence[str], wanted: float) -> None:
        """Claims that `name` takes at most `wanted` times as long as the fastest of `against`."""

        def ratio(n: int) -> float:
            variants = self._variants
            return variants[name].samples[n].seconds / min(variants[other].samples[n].seconds for other in against)

        self._claim(claim, name, against, wanted, "at most", ratio)

    def within(self, claim: str, name: str, baseline: str, budget_bytes: int) -> None:
        """Claims that `name` has at most `budget_bytes` more resident at its peak than `baseline`, as a share."""

        def share(n: int) -> float:
            peaks = [self._variants[each].samples[n].peak_rss_bytes for each in (name, baseline)]
            return ((peaks[0] or 0) - (peaks[1] or 0)) / budget_bytes

        self._claim(claim, name, [baseline], 1.0, "at most", share)

    def run(self, benchmark: Benchmark, rounds: int, warmup_rounds: int = 1) -> None:
        """Measures all variants `rounds` times after unrecorded rounds, and hands the rows to pytest-benchmark."""
        benchmark.pedantic(self._round, rounds=rounds, warmup_rounds=warmup_rounds)
        for variant in self._variants.values():
            variant.samples = variant.samples[warmup_rounds:] or variant.samples
        benchmark.extra_info["comparison"] = {
            "suite": self.suite,
            "title": self.title,
            "cache": self.cache,
            "rows": [_row(variant) for variant in self._variants.values()],
            "claims": [claim() for claim in self._claims],
            "left_out": self._left_out,
        }

    def _round(self) -> None:
        variants = list(self._variants.values())
        for variant in reversed(variants) if self._backwards else variants:
            variant.samples.append(variant.measure())
        self._backwards = not self._backwards

    def _rate(self, name: str, n: int, counting: str) -> float:
        variant = self._variants[name]
        return float(variant.facts[counting]) / variant.samples[n].seconds

    def _claim(
        self, claim: str, name: str, against: Sequence[str], wanted: float, sense: str, ratio: Callable[[int], float]
    ) -> None:
        def evaluate() -> dict[str, Any]:
            ratios = [ratio(n) for n in range(len(self._variants[name].samples))]
            median = statistics.median(ratios)
            met = median >= wanted if sense == "at least" else median <= wanted
            return {
                "claim": claim, "variant": name, "against": list(against), "sense": sense, "wanted": wanted,
                "median": median, "min": min(ratios), "max": max(ratios), "met": met,
            }  # fmt: skip

        missing = {name, *against} - self._variants.keys()
        if missing:
            self._left_out[claim] = f"not measured: {', '.join(sorted(missing))}"
        else:
            self._claims.append(evaluate)


def in_threads(threads: int, work: Callable[[], T]) -> list[T]:
    """Runs `work` in that many threads at once and returns all answers."""
    if threads == 1:
        return [work()]
    with ThreadPoolExecutor(threads) as pool:
        return [future.result() for future in [pool.submit(work) for _ in range(threads)]]


def _row(variant: Variant) -> dict[str, Any]:
    seconds = [sample.seconds for sample in variant.samples]
    peaks = [sample.peak_rss_bytes for sample in variant.samples if sample.peak_rss_bytes is not None]
    row: dict[str, Any] = {
        "variant": variant.name,
        **variant.facts,
        "unit": "s",
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "samples": seconds,
    }
    if variant.facts["bytes"]:
        row["gbps"] = variant.facts["bytes"] / row["median"] / 1e9
    if peaks:
        row["peak_rss_bytes"] = max(peaks)
    return row
