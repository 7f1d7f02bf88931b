"""Questions to the Hub and its storage, asked again where that can help, with every answer bounded and checked.

The token goes to the endpoint's own origin and to no other. A redirect is followed to https alone (to http only between
local hosts, where the endpoint or the address asked for is one itself), and one that leaves the origin is a place to
read ranges from, not to ask again.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qs, urljoin, urlsplit

from llmfp import __version__
from llmfp.errors import HubError
from llmfp.hub.settings import Settings, is_local
from llmfp.hub.throttle import Throttle, seconds_to_wait
from llmfp.hub.transport import Answer, ConnectionLostError, Transport

T = TypeVar("T")

STALL_SECONDS = 30.0
SLOWEST_BYTES_A_SECOND = 50_000
_GRACE_SECONDS = 60.0
_MOST_TRIES = 6
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
_LONGEST_REFUSAL = 900.0
_MOST_REDIRECTS = 5
_SMALL_BODY = 64 << 10
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)
_RANGE = re.compile(r"bytes (?P<first>\d{1,19})-(?P<last>\d{1,19})/(?P<total>\d{1,19})$")


@dataclass(frozen=True, slots=True)
class Clock:
    """now: seconds on a clock that never goes back; sleep: waits, and may return early; jitter: from 0.5 to 1."""

    now: Callable[[], float]
    sleep: Callable[[float], None]
    jitter: Callable[[], float]


@dataclass(frozen=True, slots=True)
class Location:
    """Where a file's bytes are, for now. fresh_until: by the clock, None when it does not say.

    etag, nbytes, commit: what the Hub says of the file itself (X-Linked-Etag, X-Linked-Size, X-Repo-Commit)
    """

    url: str
    fresh_until: float | None
    etag: str | None
    nbytes: int | None
    commit: str | None


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a file where it is stored: its size, its ETag there, and whether any part of it has come."""

    nbytes: int | None = None
    etag: str | None = None
    begun: bool = False


@dataclass(frozen=True, slots=True)
class Received:
    """How many bytes came, why no more ("" when all did), and what the answer says of the file."""

    nbytes: int
    problem: str
    known: Known


class StaleLocationError(Exception):
    """A signed address that its storage does not honour, or no longer."""


class TryAgainError(Exception):
    """What failed may well succeed later; `seconds` is how long the server said to wait.

    got: whether something was received that need not be asked for again
    """

    def __init__(self, problem: str, *, seconds: float | None = None, got: bool = False) -> None:
        super().__init__(problem)
        self.seconds = seconds
        self.got = got


class Client:
    """One conversation with a Hub and its storage, from any number of threads; close it, or use it as a context.

    throttle: shared with other clients; clock, stall_seconds: for tests
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        clock: Clock | None = None,
        stall_seconds: float = STALL_SECONDS,
        throttle: Throttle | None = None,
    ) -> None:
        self.settings = Settings.from_environment() if settings is None else settings
        self._closed = threading.Event()
        self.clock = clock or Clock(time.monotonic, self._sleep, _jitter)
        self._stall_seconds, self._own_clock = stall_seconds, clock
        self._transport = Transport(stall_seconds)
        self._throttle = throttle or Throttle(self.clock.now)

    def branch(self) -> Client:
        """Another conversation that heeds the same limits, to be closed on its own."""
        return Client(self.settings, clock=self._own_clock, stall_seconds=self._stall_seconds, throttle=self._throttle)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every connection and every wait; what is under way fails."""
        self._closed.set()
        self._transport.close()

    # --- questions

    def json(self, url: str, name: str, max_bytes: int) -> tuple[Any, Mapping[str, str]]:
        """The JSON at an address of the endpoint, and the answer's headers. Raises HubError, naming `name`."""
        content, headers = self.content(url, name, max_bytes, "api")
        try:
            return json.loads(content), headers
        except (ValueError, RecursionError):
            raise HubError(f"{name}: {self._host(url)} answers with something that is not JSON") from None

    def content(self, url: str, name: str, max_bytes: int, pool: str) -> tuple[bytes, Mapping[str, str]]:
        """A small file or answer, whole. Redirects are followed. Raises HubError where it is over the limit."""

        def ask() -> tuple[bytes, Mapping[str, str]]:
            place = url
            for _ in range(_MOST_REDIRECTS):
                with self._turn(pool), self._transport.request("GET", place, self._headers(place)) as answer:
                    self._heard(pool, answer)
                    if answer.status in _REDIRECTS:
                        place = self._redirected(place, answer, name)
                        continue
                    self._check_status(answer, name, place)
                    if answer.status != 200 or answer.headers.get("content-encoding", "identity") != "identity":
                        raise HubError(f"{name}: {self._host(place)} answers with status {answer.status} or encoded")
                    return self._body(answer, name, max_bytes), answer.headers
            raise HubError(f"{name}: redirected more than {_MOST_REDIRECTS} times")

        return self.retrying(name, ask)

    def locate(self, url: str, name: str) -> Location:
        """Where the file at an address of the endpoint, or elsewhere, can be read by range: one resolve."""

        def ask() -> Location:
            place, etag, nbytes, commit = url, None, None, None
            for _ in range(_MOST_REDIRECTS):
                headers = self._headers(place)
                with self._turn("resolvers"), self._transport.request("HEAD", place, headers) as answer:
                    self._heard("resolvers", answer)
                    self._drain(answer)
                    if answer.status in (403, 405, 501) and not same_origin(place, self.settings.endpoint):
                        return Location(place, None, None, None, None)  # signed for GET, or HEAD is not known there
                    self._check_status(answer, name, place)
                    etag = etag or _etag(answer.headers.get("x-linked-etag"))
                    nbytes = nbytes if nbytes is not None else _number(answer.headers.get("x-linked-size"))
                    commit = commit or answer.headers.get("x-repo-commit")
                    if answer.status not in _REDIRECTS:
                        size = nbytes if nbytes is not None else _number(answer.headers.get("content-length"))
                        return Location(place, None, etag, size, commit)
                    target = self._redirected(place, answer, name)
                    if not same_origin(target, place):  # a signed address, which may be good for GET alone
                        return Location(target, self._fresh_until(target, answer.headers), etag, nbytes, commit)
                    place = target
            raise HubError(f"{name}: redirected more than {_MOST_REDIRECTS} times")

        return self.retrying(name, ask)

    def receive(self, location: Location, name: str, view: memoryview, offset: int, known: Known) -> Received:
        """Bytes from `offset` on into the buffer, as many as come. known: what earlier parts said of the file.

        Raises HubError for anything but these bytes of this file, TryAgainError and ConnectionLostError where nothing
        came that can be used, and StaleLocationError where the address is no longer honoured.
        """
        last = offset + len(view) - 1
        place = location.url
        for _ in range(_MOST_REDIRECTS):
            headers = {**self._headers(place), "Range": f"bytes={offset}-{last}"}
            with self._turn("storage"), self._transport.request("GET", place, headers) as answer:
                self._heard("storage", answer)
                if answer.status in _REDIRECTS:
                    place = self._redirected(place, answer, name)
                    continue
                if answer.status in (401, 403) and not same_origin(place, self.settings.endpoint):
                    self._drain(answer)
                    raise StaleLocationError(f"{self._host(place)} refuses with status {answer.status}")
                self._check_status(answer, name, place)
                total = self._check_range(answer, name, offset, last, known)
                return Received(*self._fill(answer, view), Known(total, _etag(answer.headers.get("etag")), begun=True))
        raise HubError(f"{name}: redirected more than {_MOST_REDIRECTS} times")

    def retrying(self, name: str, ask: Callable[[], T]) -> T:
        """Asks until there is an answer, at most six times without getting on. Raises HubError, naming `name`."""
        tries = 0
        while True:
            if self._closed.is_set():
                raise HubError(f"{name}: given up")
            try:
                return ask()
            except (ConnectionLostError, TryAgainError) as error:
                seconds = error.seconds if isinstance(error, TryAgainError) else None
                tries = 0 if isinstance(error, TryAgainError) and error.got else tries + 1
                if tries >= _MOST_TRIES or (seconds is not None and seconds > _LONGEST_REFUSAL):
                    asked = f", and to wait {seconds:.0f} s more" if seconds else ""
                    raise HubError(
                        f"{name}: {error}{asked}; given up after {tries} tries" if tries else f"{name}: {error}{asked}",
                        hint="try again later; with HF_TOKEN the Hub allows more" if seconds else "is the network up?",
                    ) from None
                if seconds is None:
                    seconds = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** max(0, tries - 1)) * self.clock.jitter()
                if tries:
                    self.clock.sleep(seconds)

    # --- what is checked of every answer

    def _check_range(self, answer: Answer, name: str, first: int, last: int, known: Known) -> int:
        """The file's size, if the answer is the range asked for, of the same file as before."""
        headers = answer.headers
        if answer.status == 416:
            raise HubError(f"{name}: the file ends before byte {last}, which its header or the Hub says it has")
        if answer.status == 200:
            raise HubError(f"{name}: the server ignores ranges and sends whole files", hint="download the file")
        if answer.status != 206:
            raise HubError(f"{name}: unexpected status {answer.status}")
        if headers.get("content-encoding", "identity") != "identity" or "transfer-encoding" in headers:
            raise HubError(f"{name}: the server encodes what it sends; bytes cannot be told apart")
        found = _RANGE.match(headers.get("content-range", ""))
        if found is None:
            raise HubError(f"{name}: a part of the file came without saying which (no valid Content-Range)")
        if (int(found["first"]), int(found["last"])) != (first, last):
            raise HubError(f"{name}: asked for bytes {first}-{last}, the server sent {found['first']}-{found['last']}")
        total = int(found["total"])
        if known.nbytes is not None and total != known.nbytes:
            raise HubError(
                f"{name}: has {total} bytes by the storage, {known.nbytes} by the Hub",
                hint="was it replaced? scan again",
            )
        if known.begun and _etag(headers.get("etag")) != known.etag:
            raise HubError(
                f"{name}: the file changed while it was read (its ETag is another)", hint="scan again from the start"
            )
        if _number(headers.get("content-length")) != last - first + 1:
            raise TryAgainError("the server sent less than it said")
        return total

    def _check_status(self, answer: Answer, name: str, place: str) -> None:
        """Nothing for what is an answer; TryAgainError for what may pass; HubError for what will not."""
        status, headers = answer.status, answer.headers
        if status < 400 or status == 416:
            return
        self._drain(answer)
        code, host = headers.get("x-error-code", ""), self._host(place)
        if status in _AGAIN:
            said = {429: "too many requests"}.get(status, f"status {status}")
            raise TryAgainError(f"{host} answers {said}", seconds=seconds_to_wait(headers))
        with_token = "the token is not allowed to" if self.settings.token else "HF_TOKEN is not set"
        if code == "GatedRepo":
            raise HubError(
                f"{name}: the model is gated, and {with_token}",
                hint=f"ask for access at {self.settings.endpoint}, then set HF_TOKEN or hf auth login",
            )
        if code == "RevisionNotFound":
            raise HubError(f"{name}: no such revision", hint="give a branch, a tag or a commit after @")
        if code == "EntryNotFound" or (status == 404 and code != "RepoNotFound"):
            raise HubError(f"{name}: no such file on {host}")
        if code == "RepoNotFound" or status in (401, 404):
            raise HubError(
                f"{name}: no such model on {host}, or it is private and {with_token}",
                hint="give a local path, or ORG/NAME as on the Hub; for a private one set HF_TOKEN",
            )
        raise HubError(f"{name}: {host} refuses with status {status}", hint="does HF_TOKEN allow it?")

    def _redirected(self, place: str, answer: Answer, name: str) -> str:
        """Where an answer sends us, if we may go there."""
        self._drain(answer)
        try:
            target = urljoin(place, answer.headers.get("location", ""))
            parts = urlsplit(target)
            valid = "location" in answer.headers and bool(parts.hostname) and target.isprintable()
            local = parts.scheme == "http" and is_local(parts.hostname) and urlsplit(place).scheme == "http"
        except ValueError:
            valid = local = False
        if not valid:
            raise HubError(f"{name}: {self._host(place)} redirects to no valid address")
        if parts.scheme != "https" and not local:
            raise HubError(f"{name}: {self._host(place)} redirects to {parts.scheme}, only https is followed")
        return target

    def _headers(self, place: str) -> dict[str, str]:
        headers = {"User-Agent": f"llmfp/{__version__}", "Accept-Encoding": "identity"}
        if self.settings.token and same_origin(place, self.settings.endpoint):
            headers["Authorization"] = f"Bearer {self.settings.token}"
        return headers

    @contextmanager
    def _turn(self, pool: str) -> Iterator[None]:
        """Waits until a request of that pool may start, or this client is closed."""
        while not self._throttle.enter(pool):
            if self._closed.is_set():
                raise ConnectionLostError("closed")
            self.clock.sleep(self._throttle.seconds_left(pool))
        try:
            yield
        finally:
            self._throttle.leave(pool)

    def _heard(self, pool: str, answer: Answer) -> None:
        self._throttle.heard(pool, answer.status, answer.headers)
        if answer.status in (429, 503) and (seconds := seconds_to_wait(answer.headers)) is not None:
            self._throttle.wait_for(pool, min(seconds, _LONGEST_REFUSAL))

    # --- bodies

    def _fill(self, answer: Answer, view: memoryview) -> tuple[int, str]:
        """Receives until the buffer is full or the connection ends: how much, and why no more."""
        deadline = self.clock.now() + _GRACE_SECONDS + len(view) / SLOWEST_BYTES_A_SECOND
        done = 0
        while done < len(view):
            try:
                got = answer.into(view[done:])
            except ConnectionLostError as error:
                return done, str(error)
            done += got
            if not got:
                return done, "the connection was closed"
            if self.clock.now() > deadline:
                return done, f"slower than {SLOWEST_BYTES_A_SECOND // 1000} kB/s"
        return done, ""

    def _body(self, answer: Answer, name: str, max_bytes: int) -> bytes:
        stated = _number(answer.headers.get("content-length"))
        if stated is not None and stated > max_bytes:
            raise HubError(f"{name}: {stated} bytes is over the limit of {max_bytes}")
        deadline = self.clock.now() + _GRACE_SECONDS + max_bytes / SLOWEST_BYTES_A_SECOND
        content = bytearray()
        while part := answer.part():
            content += part
            if len(content) > max_bytes:
                raise HubError(f"{name}: more than {max_bytes} bytes, which is the limit")
            if self.clock.now() > deadline:
                raise TryAgainError(f"slower than {SLOWEST_BYTES_A_SECOND // 1000} kB/s")
        if stated is not None and len(content) != stated:
            raise ConnectionLostError("the answer ended early")
        return bytes(content)

    def _drain(self, answer: Answer) -> None:
        """Reads what little comes with a refusal, so that the connection can be kept."""
        size = 0
        while size < _SMALL_BODY and (part := answer.part()):
            size += len(part)

    def _fresh_until(self, url: str, headers: Mapping[str, str]) -> float | None:
        """When a signed address ends, by its own word and the server's clock; None where that makes no sense."""
        try:
            query = parse_qs(urlsplit(url).query)
            if "X-Amz-Expires" in query:
                lifetime = float(query["X-Amz-Expires"][0])
            else:
                lifetime = float(query["Expires"][0]) - _date(headers.get("date"))
        except (KeyError, ValueError):
            return None
        return self.clock.now() + lifetime if lifetime > 0 else None

    def _host(self, url: str) -> str:
        return urlsplit(url).hostname or "the server"

    def _sleep(self, seconds: float) -> None:
        self._closed.wait(seconds)


def same_origin(a: str, b: str) -> bool:
    """Whether two addresses have scheme, host and port in common."""
    return _origin(a) == _origin(b)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def _etag(value: str | None) -> str | None:
    return value.removeprefix("W/").strip('"') if value else None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 19 else None


def _date(text: str | None) -> float:
    from email.utils import parsedate_to_datetime

    return time.time() if text is None else parsedate_to_datetime(text).timestamp()


def _jitter() -> float:
    return random.uniform(0.5, 1.0)
