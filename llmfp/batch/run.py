"""The driver: decides about every item, keeps score, and never reads a weight.

Nothing about a run is kept but in the registry: what is there is done, what failed is noted with its reason, everything
else is still to do. So a run that is killed at any moment is taken up again by starting it again.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from llmfp import api
from llmfp.batch.work import Outcome
from llmfp.errors import LlmfpError
from llmfp.registry import Failure, Registry
from llmfp.sources import Source, ask, config_of

if TYPE_CHECKING:
    from llmfp.hub.client import Client

SCHEMA = "llmfp.batch/1"
STATUSES = ("done", "skipped", "failed")
_COMPACT_FROM = 256
"""Files of the index; each costs every reader about a millisecond."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of an item: done, skipped or failed; why, for the last two."""

    status: str
    repo: str
    revision: str
    reason: str | None
    seconds: float = 0.0
    bytes_read: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """All results in the order in which they became known, and the registry's digest after the last."""

    registry: str
    digest: str
    results: tuple[Result, ...]

    def of(self, status: str) -> list[Result]:
        return [result for result in self.results if result.status == status]

    def to_json(self) -> dict[str, Any]:
        """The object that `batch --json` prints."""

        def shown(result: Result) -> dict[str, Any]:
            return {
                "repo": result.repo, "revision": result.revision, "reason": result.reason,
                "seconds": result.seconds, "bytes_read": result.bytes_read,
            }  # fmt: skip

        listed = {status: [shown(result) for result in self.of(status)] for status in STATUSES}
        return {"schema": SCHEMA, "registry": self.registry, "digest": self.digest, **listed}


class Executor(Protocol):
    """Where items are worked on: `submit` while there is room, `collect` waits for at least one that is in work."""

    def __enter__(self) -> Executor: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    @property
    def in_work(self) -> int: ...

    @property
    def has_room(self) -> bool: ...

    def submit(self, item: Source) -> None: ...

    def collect(self) -> list[tuple[Source, Outcome]]: ...


def run(
    items: Iterable[Source],
    registry: Registry,
    executor: Executor,
    *,
    client: Client | None = None,
    retry_failed: bool = False,
    tell: Callable[[Result], None] = lambda _: None,
) -> Report:
    """Brings all items into the registry.

    client        asks the Hub about items; one from the environment when None
    retry_failed  also what failed in an earlier run
    tell          called with every result as soon as it is known

    Raises RegistryError where the registry cannot be written, and whatever interrupts it; what was finished is kept.
    """
    with executor:
        batch = _Batch(registry, executor, client, retry_failed, tell)
        for item in items:
            while not executor.has_room:
                batch.collect()
            batch.take(item)
        while executor.in_work or batch.released:
            while batch.released and executor.has_room:
                batch.take(batch.released.popleft())
            batch.collect()
    registry.compact()
    return Report(registry.where, registry.digest(), tuple(batch.results))


class _Batch:
    """What is known so far. waiting: items by the weights that another item, in work, is reading for them."""

    def __init__(
        self,
        registry: Registry,
        executor: Executor,
        client: Client | None,
        retry_failed: bool,
        tell: Callable[[Result], None],
    ) -> None:
        self._registry, self._executor, self._client = registry, executor, client
        self._retry, self._tell = retry_failed, tell
        self.results: list[Result] = []
        self.released: deque[Source] = deque()
        self._waiting: defaultdict[str, list[Source]] = defaultdict(list)
        self._reading: set[str] = set()
        self._in_work: set[tuple[str, str]] = set()
        self._kept: set[tuple[str, str]] = set()
        self._stamps: set[str] = set()
        self._by_weights: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        self._failed = {(each.repo, each.revision): each for each in registry.failures()}
        self._files = registry.index_files()
        for row in registry.table(["repo", "revision", "entry", "weights", "config", "stamp"]).to_pylist():
            self._know(row)

    def take(self, item: Source) -> None:
        """Skips an item, finds its numbers in the registry, lets it wait for an equal one, or has it read."""
        if self._settled(item):
            return
        try:
            item = ask(item, self._client)
        except LlmfpError as error:
            self._fail(item, f"{error}; {error.hint}" if error.hint else str(error))
            return
        if self._settled(item) or (item.weights is not None and self._copied(item)):
            return
        if item.weights is not None and item.weights in self._reading:
            self._waiting[item.weights].append(item)
            return
        if item.weights is not None:
            self._reading.add(item.weights)
        self._in_work.add((item.repo, item.asked))
        self._executor.submit(item)

    def collect(self) -> None:
        for item, outcome in self._executor.collect():
            if outcome.row is None:
                self._fail(item, outcome.reason or "", outcome.seconds)
            else:
                self._know(outcome.row)
                self._forgive(item)
                self._add("done", item, outcome.row["revision"], None, outcome.seconds, int(outcome.row["bytes_read"]))
            self._in_work.discard((item.repo, item.asked))
            if item.weights is not None:
                self._reading.discard(item.weights)
                self.released.extend(self._waiting.pop(item.weights, []))
            self._files += 1
            if self._files >= _COMPACT_FROM:
                self._registry.compact()
                self._files = 1

    def _settled(self, item: Source) -> bool:
        """Whether an item needs no reading because it was read, or failed, before."""
        identities = {(item.repo, each) for each in (item.revision, item.stamp, item.asked) if each}
        if identities & self._in_work:
            self._add("skipped", item, item.revision or item.asked, "listed twice")
            return True
        if identities & self._kept or item.stamp in self._stamps:
            self._add("skipped", item, item.revision or item.asked, "kept already")
            return True
        failures = [self._failed[each] for each in identities if each in self._failed]
        if failures and not self._retry:
            reason = f"{failures[0].reason} (before; --retry-failed tries again)"
            self._add("failed", item, item.revision or item.asked, reason)
            return True
        return False

    def _copied(self, item: Source) -> bool:
        """Keeps the fingerprint of the same weights under the item's name too, if there is one."""
        same = self._by_weights.get(item.weights or "")
        if not same:
            return False
        try:
            config = config_of(api.plan(item.text, client=self._client).checkpoint.config)
        except LlmfpError:
            return False  # reading it will say what is wrong
        row = next((row for row in same if row["config"] == config), None)
        if row is None:
            return False
        kept = self._registry.load(row)
        name = f"{row['repo']}@{row['revision']}"
        copy = replace(
            kept,
            source={**kept.source, "name": item.repo, "revision": item.revision},
            caveats=(*kept.caveats, f"the weight files are those of {name}, whose fingerprint this is"),
        )
        self._know(self._registry.add([(copy, item.origin(kept.digest, config))])[0])
        self._forgive(item)
        self._add("skipped", item, item.revision or item.asked, f"same weights as {name}")
        return True

    def _know(self, row: Mapping[str, Any]) -> None:
        self._kept.add((row["repo"], row["revision"]))
        if row["stamp"] is not None:
            self._stamps.add(row["stamp"])
        if row["weights"] is not None and row["config"] is not None:
            self._by_weights[row["weights"]].append(
                {name: row[name] for name in ("repo", "revision", "entry", "config")}
            )

    def _fail(self, item: Source, reason: str, seconds: float = 0.0) -> None:
        failure = Failure(item.repo, item.revision or item.asked, reason)
        self._registry.fail(failure)
        self._failed[failure.repo, failure.revision] = failure
        self._add("failed", item, failure.revision, reason, seconds)

    def _forgive(self, item: Source) -> None:
        for identity in {(item.repo, each) for each in (item.revision, item.stamp, item.asked) if each}:
            if self._failed.pop(identity, None) is not None:
                self._registry.forgive(*identity)

    def _add(
        self, status: str, item: Source, revision: str, reason: str | None, seconds: float = 0.0, nbytes: int = 0
    ) -> None:
        result = Result(status, item.repo, revision, reason, seconds, nbytes)
        self.results.append(result)
        self._tell(result)
