"""Which ranges a remote scan asks for: whole tensors' rows, gains, biases and scales, neighbours in one request.

Within a file one layer's attention tensors are neighbours in name order. What lies between two of them is fetched along
where that is little: at most 1 MiB, and at most 1 % of all bytes wanted, smallest gaps first. So bytes fetched stay
within that of the bytes wanted by construction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from llmfp.checkpoint import TensorSpec
from llmfp.plan import Plan

FETCH_BYTES = 8 << 20
MOST_GAP_BYTES = 1 << 20
_GAP_SHARE = 0.01

Want = tuple[int, int, int]
"""Shard, offset, bytes: what the engine will ask the reader for."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """One request: a range of a shard, and the reads that it serves, in the order of their first use."""

    shard: int
    offset_bytes: int
    nbytes: int
    wants: tuple[Want, ...]


def fetches(plan: Plan) -> list[Fetch]:
    """The requests of a scan, in the order in which their first bytes are needed."""
    groups = _wants(plan)
    allowed = _allowed_gaps(groups)
    found: list[tuple[int, Fetch]] = []
    for group in groups:
        for run in _runs(group, allowed):
            start = min(want[1] for _, want in run)
            stop = max(want[1] + want[2] for _, want in run)
            served = tuple(want for _, want in sorted(run))
            found.append((min(run)[0], Fetch(run[0][1][0], start, stop - start, served)))
    return [fetch for _, fetch in sorted(found, key=lambda each: each[0])]


def _wants(plan: Plan) -> list[list[tuple[int, Want]]]:
    """What the engine reads, numbered in order; in groups, one a layer and pass, that may share requests."""
    groups: defaultdict[tuple[str, int, bool], list[tuple[int, Want]]] = defaultdict(list)
    seen: set[object] = set()
    begun: set[int] = set()
    number = 0
    for step in plan.steps:
        task = plan.tasks[step.task]
        whole: list[TensorSpec] = []
        for gain in task.gains:
            if gain not in seen:
                seen.add(gain)
                whole.append(gain.tensor)
        if step.task not in begun and not step.second:
            begun.add(step.task)
            whole += task.biases
        if task.tensor not in seen:
            seen.add(task.tensor)
            if (encoding := task.tensor.encoding) is not None:
                whole += [part for _, part in encoding.parts]
            if (lora := task.tensor.lora) is not None:
                whole += [lora.a, lora.b]
        wants = [(spec.shard, spec.offset_bytes, spec.nbytes) for spec in whole]
        for want in (*wants, (step.shard, step.offset_bytes, step.nbytes)):
            groups[task.tower, task.layer, step.second].append((number, want))
            number += 1
    return list(groups.values())


def _ordered(group: Iterable[tuple[int, Want]]) -> list[tuple[int, Want]]:
    return sorted(group, key=lambda each: (each[1], each[0]))


def _allowed_gaps(groups: list[list[tuple[int, Want]]]) -> int:
    """The largest gap that is fetched along: of all gaps, the smallest that together are within the share."""
    gaps: list[int] = []
    for group in groups:
        shard, end = -1, 0
        for _, (number, offset, nbytes) in _ordered(group):
            if number == shard and 0 < offset - end <= MOST_GAP_BYTES:
                gaps.append(offset - end)
            shard, end = number, max(end, offset + nbytes) if number == shard else offset + nbytes
    left = int(_GAP_SHARE * sum(want[2] for group in groups for _, want in group))
    allowed = 0
    gaps.sort()
    for i, gap in enumerate(gaps):
        left -= gap
        if left < 0:
            return min(allowed, gap - 1)
        if i + 1 == len(gaps) or gaps[i + 1] != gap:
            allowed = gap
    return allowed


def _runs(group: list[tuple[int, Want]], allowed: int) -> list[list[tuple[int, Want]]]:
    """Neighbours that one request serves."""
    runs: list[list[tuple[int, Want]]] = []
    shard, start, end = -1, 0, 0
    for each in _ordered(group):
        number, offset, nbytes = each[1]
        if number == shard and offset - end <= allowed and max(end, offset + nbytes) - start <= FETCH_BYTES:
            runs[-1].append(each)
            end = max(end, offset + nbytes)
        else:
            runs.append([each])
            shard, start, end = number, offset, offset + nbytes
    return runs
