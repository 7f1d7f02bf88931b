"""How many requests may be under way, and when the next may start: what servers say in their answers, obeyed.

The Hub counts requests in windows of five minutes and says in RateLimit headers what is left; the storage says 429 or
503 when it has had enough. So the number under way never exceeds what is left; after a refusal nothing starts until the
time that the server named; and whoever refuses without a number gets half as many at once, and one more after every so
many that went well (additive increase, multiplicative decrease). Headers: draft-ietf-httpapi-ratelimit-headers-09.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

MOST_AT_ONCE = 8
_LONGEST_WAIT = 1.0
_LIMIT = re.compile(r'"(?P<pool>\w{1,40})"\s*;\s*r=(?P<left>\d{1,9})\s*;\s*t=(?P<seconds>\d{1,6})')


@dataclass(slots=True)
class _Pool:
    under_way: int = 0
    allowed: float = MOST_AT_ONCE
    not_before: float = 0.0
    changed: threading.Condition = field(default_factory=threading.Condition)


class Throttle:
    """One server's pools, by name: "api", "resolvers", "storage". now: a monotonic clock, in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._pools: dict[str, _Pool] = {}
        self._lock = threading.Lock()

    def enter(self, name: str) -> bool:
        """Waits until fewer requests of that pool are under way than may be, and starts one; `leave` ends it.

        False where none may start before a certain time (`seconds_left`), or after waiting a second.
        """
        pool = self._pool(name)
        with pool.changed:
            room = pool.changed.wait_for(lambda: pool.under_way < max(1, int(pool.allowed)), _LONGEST_WAIT)
            if not room or pool.not_before > self._now():
                return False
            pool.under_way += 1
            return True

    def leave(self, name: str) -> None:
        pool = self._pool(name)
        with pool.changed:
            pool.under_way -= 1
            pool.changed.notify_all()

    def seconds_left(self, name: str) -> float:
        """Until a request of that pool may start, as far as servers have said."""
        pool = self._pool(name)
        with pool.changed:
            return max(0.0, pool.not_before - self._now())

    def heard(self, name: str, status: int, headers: Mapping[str, str]) -> None:
        """Takes note of an answer."""
        pool = self._pool(name)
        said = _LIMIT.search(headers.get("ratelimit", ""))
        with pool.changed:
            if said is not None:
                left = int(said["left"])
                pool.allowed = max(1, min(MOST_AT_ONCE, left))
                if left == 0:
                    pool.not_before = max(pool.not_before, self._now() + int(said["seconds"]))
            elif status in (429, 503):
                pool.allowed = max(1.0, pool.allowed / 2)
            else:
                pool.allowed = min(MOST_AT_ONCE, pool.allowed + 1 / pool.allowed)
            pool.changed.notify_all()

    def wait_for(self, name: str, seconds: float) -> None:
        """Lets nothing of that pool start for so long."""
        pool = self._pool(name)
        with pool.changed:
            pool.not_before = max(pool.not_before, self._now() + seconds)

    def _pool(self, name: str) -> _Pool:
        with self._lock:
            return self._pools.setdefault(name, _Pool())


def seconds_to_wait(headers: Mapping[str, str]) -> float | None:
    """How long a refusal says to wait: what RateLimit says when nothing is left, else Retry-After in seconds."""
    said = _LIMIT.search(headers.get("ratelimit", ""))
    if said is not None and int(said["left"]) == 0:
        return float(said["seconds"])
    after = headers.get("retry-after", "").strip()
    return float(after) if after.isdigit() and len(after) < 7 else None
