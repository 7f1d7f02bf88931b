"""HTTP/1.1 connections, kept and used again, whose bodies are received straight into the caller's buffer.

On the standard library's http.client: its responses can be read into a buffer of ours, which no client that hands out
parts of its own can do; through httpx the same ranges arrive at half the speed (bench/bench_hub.py). Nothing is
followed, decoded or retried here.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import ssl
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from urllib.parse import SplitResult, unquote, urlsplit

_MOST_IDLE = 32
_PART_BYTES = 1 << 16


class ConnectionLostError(Exception):
    """The connection failed or ended early, or what arrived is no HTTP: worth another try."""


class Answer:
    """A response whose body is still to come. headers: by their names in lower case; of repeated ones the last."""

    def __init__(self, response: _Response) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = {key.lower(): value for key, value in response.headers.items()}
        self._response = response

    def into(self, view: memoryview) -> int:
        """Receives what is there into the buffer and says how much; 0 at the end of the body."""
        with _explained():
            return self._response.receive(view)

    def part(self) -> bytes:
        """Some of the body, whatever its framing; empty at the end."""
        with _explained():
            return self._response.read1(_PART_BYTES)

    @property
    def complete(self) -> bool:
        """Whether the body has been read to its end, so that the connection can be used again."""
        return self._response.isclosed()


class Transport:
    """Connections by origin. Raises ConnectionLostError wherever one fails.

    stall_seconds: how long any single wait for the network may take
    """

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._busy: dict[http.client.HTTPConnection, socket.socket | None] = {}
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def request(self, method: str, url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """Sends a request without a body; the connection is kept if the answer has been read to its end by then."""
        parts = urlsplit(url)
        origin = parts.scheme, parts.netloc
        connection, answer = self._ask(origin, parts, method, headers)
        try:
            yield answer
        finally:
            with self._lock:
                self._busy.pop(connection, None)
                idle = self._idle.setdefault(origin, [])
                keep = answer.complete and not self._closed and len(idle) < _MOST_IDLE
                if keep and connection.sock is not None:
                    idle.append(connection)
                else:
                    _end(connection)

    def close(self) -> None:
        """Ends every connection; requests under way fail."""
        with self._lock:
            self._closed = True
            for connected in self._busy.values():
                if connected is not None:
                    with contextlib.suppress(OSError):
                        connected.shutdown(socket.SHUT_RDWR)
            for idle in self._idle.values():
                for connection in idle:
                    _end(connection)
            self._idle.clear()

    def _ask(
        self, origin: tuple[str, str], parts: SplitResult, method: str, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPConnection, Answer]:
        """The answer's head. A kept connection that the server has closed meanwhile is replaced by a new one."""
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        while True:
            with self._lock:
                if self._closed:
                    raise ConnectionLostError("closed")
                idle = self._idle.get(origin)
                connection = idle.pop() if idle else None
                fresh = connection is None
                connection = connection or _connection(parts, self._stall_seconds)
                self._busy[connection] = connection.sock
            try:
                with _explained():
                    connection.request(method, target, headers=dict(headers))
                    with self._lock:
                        if self._closed:  # while it was connected: `close` could not end it
                            raise ConnectionLostError("closed")
                        self._busy[connection] = connection.sock  # which http.client forgets where it is not kept
                    response = connection.getresponse()
                assert isinstance(response, _Response)
                return connection, Answer(response)
            except BaseException as error:
                with self._lock:
                    self._busy.pop(connection, None)
                    _end(connection)
                if fresh or not isinstance(error, ConnectionLostError):
                    raise


class _Response(http.client.HTTPResponse):
    """A response that can hand out what has arrived, without waiting for a buffer to be full or copying it."""

    def receive(self, view: memoryview) -> int:
        if self.fp is None:
            return 0
        if self.chunked or self.length is None:
            raise http.client.HTTPException("the answer does not say how long it is")
        got: int = self.fp.readinto1(view[: self.length])
        self.length -= got
        if not self.length:
            self.read()  # nothing is left: closes the response, so that the connection can be used again
        return got


def _connection(parts: SplitResult, seconds: float) -> http.client.HTTPConnection:
    """A connection to an origin; to others than local ones, through the proxy that the environment names."""
    connection: http.client.HTTPConnection
    host = parts.hostname or ""
    if parts.scheme == "http":
        connection = http.client.HTTPConnection(host, parts.port or 80, timeout=seconds)
    else:
        connection = http.client.HTTPSConnection(host, parts.port or 443, timeout=seconds, context=_tls())
        proxy = urllib.request.getproxies().get("https")
        if proxy and not urllib.request.proxy_bypass(host):
            via = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            login = f"{unquote(via.username)}:{unquote(via.password or '')}" if via.username else ""
            headers = {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}
            connection = http.client.HTTPSConnection(
                via.hostname or "", via.port or 8080, timeout=seconds, context=_tls()
            )
            connection.set_tunnel(host, parts.port or 443, headers)
    connection.response_class = _Response
    return connection


@cache
def _tls() -> ssl.SSLContext:
    """The system's authorities and, for systems that have none, certifi's."""
    import certifi

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise ConnectionLostError("nothing came for too long") from None
    except ssl.SSLCertVerificationError as error:
        raise ConnectionLostError(f"its certificate is not trusted: {error.verify_message}") from None
    except http.client.RemoteDisconnected:
        raise ConnectionLostError("the connection was closed") from None
    except http.client.IncompleteRead:
        raise ConnectionLostError("the answer ended early") from None
    except http.client.HTTPException as error:
        raise ConnectionLostError(f"not an HTTP answer ({type(error).__name__})") from None
    except (OSError, ValueError) as error:
        raise ConnectionLostError(str(getattr(error, "strerror", "") or error)) from None


def _end(connection: http.client.HTTPConnection) -> None:
    with contextlib.suppress(OSError):
        connection.close()
