"""A Hub on loopback: the routes of the Hugging Face Hub over folders on disk, counted, with faults on request.

Two ports, as the Hub has two hosts: the endpoint (/api/models…, /{repo}/resolve/{revision}/{file}) and a storage that
only honours signed URLs that expire. Files of git LFS (weights, and whatever is over 10 KiB) are redirected (302) to
the storage, the others (307) to /api/resolve-cache on the endpoint itself. Checked against the real `huggingface_hub`
client in test_hub_server.py.

    with HubServer() as hub:
        hub.add("org/name", folder, base_models=("org/base",))
        hub.fail("drop", "model-00001", times=2, after=1000)
        ...                               # HF_ENDPOINT=hub.endpoint
        assert hub.count("resolve") == 3 and hub.bytes_sent("storage") < 1_000_000

`python -m tests.hub_server FOLDER` serves every FOLDER/org/name, unhashed, until it is interrupted, and prints the
endpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

FAULTS = {
    "drop": "closes the connection after `after` bytes of the body",
    "trickle": "sends `after` bytes of the body along with the head, the rest after them",
    "drip": "sends `after` bytes of the body, then nothing more, and keeps the connection open",
    "429": "too many requests; Retry-After says `seconds`",
    "500": "an internal error",
    "503": "unavailable",
    "403": "the storage no longer honours the URL, though it has not expired",
    "416": "range not satisfiable",
    "ignore_range": "sends the whole file, status 200",
    "wrong_range": "sends other bytes of the same number, and says so in Content-Range",
    "wrong_bounds": "sends the right bytes with a Content-Range that is not the one asked for",
    "no_content_range": "status 206 without Content-Range",
    "multipart": "status 206 as multipart/byteranges",
    "etag": "the storage names another ETag, as for a file that was replaced",
    "no_etag": "the storage names no ETag",
    "truncated": "a body shorter by `after` bytes, with a Content-Length that agrees",
    "total": "Content-Range gives a file longer by `after` bytes",
    "linked_size": "the resolve says that the file is longer by `after` bytes",
    "linked_etag": "the resolve names another ETag",
    "no_linked": "the resolve says neither size nor ETag",
    "garbage": "the answer is no HTTP",
    "encoded": "says Content-Encoding: gzip",
    "huge": "says Content-Length: 10 TB, and goes on sending zeros",
    "endless": "sends a chunked body that does not end",
    "html": "status 200 and a page, as captive portals do",
    "location": "redirects to `to`, whatever was asked for",
    "no_location": "a redirect that does not say where to",
    "unlike_revision": "X-Repo-Commit names another commit",
}
"""What `HubServer.fail` can do to a request, whichever of the two hosts it reaches where that makes sense."""

_LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".onnx", ".model", ".msgpack")
_LFS_FROM = 10 << 10
_PAGE = 100
_CHUNK = 1 << 20
_HUGE_BYTES = 64 << 20
_OTHER_ETAG = "0" * 64
_ANSWERED_SECONDS = 5.0


@dataclass(frozen=True)
class StoredFile:
    """A file of one commit. `oid`: its git SHA-1; `sha256`: of git LFS, or None."""

    name: str
    path: Path
    nbytes: int
    oid: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def sibling(self, *, blobs: bool) -> dict[str, Any]:
        if not blobs:
            return {"rfilename": self.name}
        lfs = {"lfs": {"sha256": self.sha256, "size": self.nbytes, "pointerSize": 134}} if self.sha256 else {}
        return {"rfilename": self.name, "size": self.nbytes, "blobId": self.oid, **lfs}


@dataclass
class Repo:
    """commits: sha → files by name, oldest first; refs: branch or tag → sha."""

    name: str
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: str | bool = False
    private: bool = False
    base_models: tuple[str, ...] = ()
    relation: str | None = None
    pipeline_tag: str | None = "text-generation"
    tags: tuple[str, ...] = ()
    last_modified: str = "2026-01-01T00:00:00.000Z"
    downloads: int = 0

    def files(self, revision: str) -> tuple[str, dict[str, StoredFile]] | None:
        """The commit that a branch, tag or full hash names, and its files."""
        sha = self.refs.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


@dataclass
class Fault:
    kind: str
    path: str
    host: str
    times: int
    after: int
    seconds: int
    to: str
    skip: int


@dataclass
class Request:
    """One request as it was answered. host: "api", "resolve", "cache" (small files on the endpoint) or "storage"."""

    host: str
    method: str
    path: str
    range: str | None
    authorized: bool
    status: int = 0
    nbytes: int = 0


class HubServer:
    """Both hosts, each on a thread of its own; closing ends every connection.

    clock        seconds, for expiry and rate limits; a test's own clock makes URLs expire without waiting
    token        what private and gated repos ask for
    lifetime     of signed URLs, in seconds
    limits       requests of "api" and of "resolvers" in `window` seconds; none when empty
    page         models on one page of a listing
    hash_files   False names huge files by path and time, not by content, for benchmarks on many gigabytes
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        token: str = "hf_right",
        lifetime: int = 3600,
        limits: dict[str, int] | None = None,
        window: int = 300,
        page: int = _PAGE,
        hash_files: bool = True,
    ) -> None:
        self.clock, self.token, self.lifetime, self.window, self.page = clock, token, lifetime, window, page
        self.hash_files = hash_files
        self.limits = dict(limits or {})
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._used: dict[str, tuple[float, int]] = {}
        self._blobs: dict[str, StoredFile] = {}
        self._hashes: dict[tuple[Path, int, int], tuple[str, str]] = {}
        self._key = b"signs the URLs of one test"
        self._lock = threading.RLock()
        self._answered = threading.Condition(self._lock)
        self._under_way = 0
        self.closed = threading.Event()
        self._endpoint, self._storage = _Listener(self, _EndpointHandler), _Listener(self, _StorageHandler)
        self.endpoint = f"http://127.0.0.1:{self._endpoint.server_port}"
        self.storage = f"http://127.0.0.1:{self._storage.server_port}"

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.closed.set()
        for listener in (self._endpoint, self._storage):
            listener.stop()

    # --- what is served

    def add(
        self,
        name: str,
        folder: Path,
        *,
        refs: Sequence[str] = ("main",),
        files: Iterable[Path] | None = None,
        **about: Any,
    ) -> str:
        """Commits the files of a folder (all of them, but for hidden ones) to a repo; returns the commit's hash.

        about: what `Repo` has, gated or base_models for example.
        """
        found = sorted(files or (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")))
        stored = {(each := self._store(path, path.relative_to(folder).as_posix())).name: each for path in found}
        listing = "".join(f"{each.name} {each.etag}\n" for each in stored.values())
        sha = hashlib.sha1(f"{name}\n{listing}".encode()).hexdigest()
        with self._lock:
            repo = self.repos.setdefault(name, Repo(name))
            for key, value in about.items():
                assert hasattr(repo, key), key
                setattr(repo, key, value)
            repo.commits[sha] = stored
            repo.refs |= dict.fromkeys(refs, sha)
        return sha

    def _store(self, path: Path, name: str) -> StoredFile:
        status = path.stat()
        key = path, status.st_size, status.st_mtime_ns
        hashed = self.hash_files or status.st_size < _HUGE_BYTES
        if key not in self._hashes:
            oid, sha256 = hashlib.sha1(f"blob {status.st_size}\0".encode()), hashlib.sha256()
            with path.open("rb") as file:
                while hashed and (part := file.read(_CHUNK)):
                    oid.update(part)
                    sha256.update(part)
            if not hashed:
                sha256.update(str(key).encode())
            self._hashes[key] = oid.hexdigest(), sha256.hexdigest()
        oid_hex, sha_hex = self._hashes[key]
        lfs = name.endswith(_LFS_SUFFIXES) or status.st_size > _LFS_FROM
        stored = StoredFile(name, path, status.st_size, oid_hex, sha_hex if lfs else None)
        self._blobs[stored.etag] = stored
        return stored

    # --- what goes wrong

    def fail(
        self,
        kind: str,
        path: str = "",
        *,
        host: str = "",
        times: int = 1,
        skip: int = 0,
        after: int = 1,
        seconds: int = 0,
        to: str = "",
    ) -> None:
        """The next `times` requests, after `skip` of them, whose path holds `path` (and, where it is given, that go to
        `host`) go wrong as FAULTS says."""
        assert kind in FAULTS, kind
        with self._lock:
            self._faults.append(Fault(kind, path, host, times, after, seconds, to, skip))

    def heal(self) -> None:
        """No more faults."""
        with self._lock:
            self._faults.clear()

    def fault(self, host: str, path: str, kinds: Sequence[str]) -> Fault | None:
        """The fault that this request meets, of these kinds, counted."""
        with self._lock:
            for each in self._faults:
                if each.kind in kinds and each.times and each.path in path and each.host in ("", host):
                    if each.skip:
                        each.skip -= 1
                        continue
                    each.times -= 1
                    return each
        return None

    # --- what was asked for

    def begin(self, request: Request) -> None:
        with self._answered:
            self.requests.append(request)
            self._under_way += 1

    def end(self) -> None:
        with self._answered:
            self._under_way -= 1
            self._answered.notify_all()

    def forget(self) -> None:
        """Counts from zero."""
        with self._lock:
            self.requests.clear()

    def count(self, host: str = "", path: str = "", method: str = "") -> int:
        return len(self.asked(host, path, method))

    def bytes_sent(self, host: str = "", path: str = "") -> int:
        """Bytes of bodies that left, headers not counted."""
        return sum(each.nbytes for each in self.asked(host, path))

    def asked(self, host: str = "", path: str = "", method: str = "") -> list[Request]:
        with self._answered:
            self._answered.wait_for(lambda: not self._under_way, _ANSWERED_SECONDS)
            return [
                each
                for each in self.requests
                if host in ("", each.host) and path in each.path and method in ("", each.method)
            ]

    def spend(self, pool: str) -> tuple[bool, dict[str, str]]:
        """Takes one request from a rate limit: whether there was one left, and the headers that say so."""
        with self._lock:
            if pool not in self.limits:
                return True, {}
            now, limit = self.clock(), self.limits[pool]
            start, used = self._used.get(pool, (now, 0))
            if now - start >= self.window:
                start, used = now, 0
            self._used[pool] = start, used + 1
            left, reset = max(0, limit - used - 1), max(1, round(start + self.window - now))
            headers = {
                "RateLimit": f'"{pool}";r={left};t={reset}',
                "RateLimit-Policy": f'"fixed window";"{pool}";q={limit};w={self.window}',
            }
            return used < limit, headers

    # --- signed URLs

    def sign(self, blob: str) -> str:
        expires = int(self.clock() + self.lifetime)
        query = urlencode({"Expires": expires, "Signature": self._signature(blob, expires)})
        return f"{self.storage}/blobs/{blob}?{query}"

    def signed_blob(self, path: str, query: dict[str, list[str]]) -> StoredFile | None:
        """The file that a storage URL names, if its signature is ours and it has not expired."""
        blob, expires = path.removeprefix("/blobs/"), int(query.get("Expires", ["0"])[0])
        if query.get("Signature", [""])[0] != self._signature(blob, expires) or self.clock() > expires:
            return None
        return self._blobs.get(blob)

    def public_file(self, path: str) -> StoredFile | None:
        """A file of a repo's main branch under /public/{org}/{name}/{file}, as any web server has files."""
        found = re.fullmatch(r"/public/([^/]+/[^/]+)/(.+)", path)
        repo = self.repos.get(found[1]) if found else None
        return repo.commits[repo.refs["main"]].get(found[2]) if repo and found else None

    def _signature(self, blob: str, expires: int) -> str:
        return hmac.new(self._key, f"{blob} {expires}".encode(), "sha256").hexdigest()


class _Listener(ThreadingHTTPServer):
    """One host. Keeps its connections, to end them when it stops."""

    daemon_threads = False  # joined when the server stops: none outlives a test
    block_on_close = True
    request_queue_size = 128

    def __init__(self, hub: HubServer, handler: type[_Handler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), name=handler.__name__)
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        with self._connections_lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._connections_lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._connections_lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours; anything else is, and says so."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener
    request_: Request

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(self.hub.clock() if timestamp is None else timestamp)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Says nothing: the requests are kept."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.request_ = Request(
            self.host_of(path), self.command, path, self.headers.get("Range"), "Authorization" in self.headers
        )
        self.hub.begin(self.request_)
        try:
            if not self.common_fault(path):
                self.answer(path, parse_qs(parts.query, keep_blank_values=True))
        finally:
            self.hub.end()

    def host_of(self, path: str) -> str:
        raise NotImplementedError

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        raise NotImplementedError

    def common_fault(self, path: str) -> bool:
        """Faults that any answer may have."""
        kinds = ("429", "500", "503", "garbage", "huge", "endless", "html", "location", "no_location")
        fault = self.hub.fault(self.request_.host, path, kinds)
        match fault and fault.kind:
            case None:
                return False
            case "429":
                headers = {"Retry-After": str(fault.seconds)} if fault and fault.seconds else {}
                self.send(429, b'{"error": "Too many requests"}', headers)
            case "500" | "503" as status:
                self.send(int(status), b"it is not you")
            case "garbage":
                self.request_.status = -1
                self.wfile.write(b"\x00\x01 this is no HTTP\r\n\r\n")
                self.close_connection = True
            case "huge":
                self.begin(206 if self.request_.range else 200, {"Content-Length": str(10**13)})
                self.pour(bytes(1 << 16), 1 << 10)
            case "endless":
                self.begin(200, {"Transfer-Encoding": "chunked", "Content-Type": "application/json"})
                self.pour(b"10000\r\n" + b" " * 0x10000 + b"\r\n", 1 << 14)
            case "html":
                self.send(200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
            case "location":
                self.send(302, b"", {"Location": fault.to if fault else ""})
            case "no_location":
                self.send(302, b"")
        return True

    def pour(self, part: bytes, times: int) -> None:
        """Sends until the client has had enough."""
        self.close_connection = True
        for _ in range(times):
            try:
                self.wfile.write(part)
            except OSError:
                return
            self.request_.nbytes += len(part)

    def begin(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.request_.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self._headers_buffer += [b"\r\n", body]  # in one piece
        self.flush_headers()
        self.request_.nbytes += len(body)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.begin(status, {"Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)
            self.request_.nbytes += len(body)

    def send_json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send_file(self, stored: StoredFile, headers: dict[str, str]) -> None:
        """The file or the range asked for, with whatever of it is to go wrong."""
        path, size = f"{self.request_.path} {stored.name}", stored.nbytes
        kinds = (
            "drop", "drip", "trickle", "403", "416", "ignore_range", "wrong_range", "wrong_bounds", "no_content_range",
            "multipart", "etag", "no_etag", "truncated", "total", "encoded",
        )  # fmt: skip
        fault = self.hub.fault(self.request_.host, path, kinds)
        kind = fault.kind if fault else ""
        after = fault.after if fault else 0
        if kind == "403":
            return self.send(403, b"<Error><Code>AccessDenied</Code></Error>")
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.request_.range or "")
        start, stop, status = 0, size, 200
        if asked and kind != "ignore_range":
            start, stop, status = int(asked[1]), min(int(asked[2] or size - 1) + 1, size), 206
            if start >= size or kind == "416":
                return self.send(416, b"", {"Content-Range": f"bytes */{size}"})
        if kind == "wrong_range":
            shift = after if stop + after <= size else -after
            start, stop = start + shift, stop + shift
        headers = {"ETag": f'"{stored.etag}"', "Accept-Ranges": "bytes", **headers}
        if status == 206:
            total = size + (after if kind == "total" else 0)
            first = start + (after if kind == "wrong_bounds" else 0)
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{total}"
        if kind == "no_content_range":
            del headers["Content-Range"]
        if kind == "multipart":
            del headers["Content-Range"]
            headers["Content-Type"] = "multipart/byteranges; boundary=x"
        if kind == "etag":
            headers["ETag"] = f'"{_OTHER_ETAG}"'
        if kind == "no_etag":
            del headers["ETag"]
        if kind == "encoded":
            headers["Content-Encoding"] = "gzip"
        if kind == "truncated":
            stop = max(start, stop - after)
        headers = {"Content-Length": str(stop - start), "Content-Type": "binary/octet-stream", **headers}
        with_head = b""
        if kind == "trickle":
            with stored.path.open("rb") as file:
                file.seek(start)
                with_head = file.read(min(after, stop - start))
                start += len(with_head)
        self.begin(status, headers, with_head)
        if self.command == "HEAD":
            return None
        if kind in ("drop", "drip"):
            stop = min(stop, start + after)
            self.close_connection = True
        with stored.path.open("rb") as file:
            self.wfile.flush()
            self.request_.nbytes += self.connection.sendfile(file, start, stop - start) if stop > start else 0
        if kind == "drip":
            self.connection.settimeout(None)
            with contextlib.suppress(OSError):
                self.connection.recv(1)  # until the client, or the server, ends the connection
        return None


class _EndpointHandler(_Handler):
    """The Hub itself: models, their files, and where those lie."""

    def host_of(self, path: str) -> str:
        if path.startswith("/api/resolve-cache/"):
            return "cache"
        return "api" if path.startswith("/api/") else "resolve"

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        pool = "api" if self.request_.host == "api" else "resolvers"
        allowed, limits = self.hub.spend(pool) if self.request_.host != "cache" else (True, {})
        if not allowed:
            self.send(429, b'{"error": "rate limited"}', limits)
            return
        if path == "/api/models":
            self._list(query, limits)
        elif found := re.fullmatch(r"/api/resolve-cache/models/(.+?)/([0-9a-f]{40})/(.+)", path):
            self._cached(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/(.+))?", path):
            self._about(found[1], found[2], found[3], query, limits)
        elif found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], found[2], found[3], limits)
        else:
            self._missing("EntryNotFound", "no such route", limits)

    def _allowed(self, repo: Repo, *, contents: bool, limits: dict[str, str]) -> bool:
        """Whether this client may see the repo or, for gated ones, its files; else the refusal was sent."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == self.hub.token or not (repo.private or (repo.gated and contents)):
            return True
        if repo.private:
            self._missing("RepoNotFound", "Repository not found", limits, status=401)
        else:
            status = 403 if token else 401
            headers = {
                "X-Error-Code": "GatedRepo",
                "X-Error-Message": f"Access to model {repo.name} is restricted.",
                **limits,
            }
            self.send(status, b'{"error": "Access to this model is restricted"}', headers)
        return False

    def _missing(self, code: str, message: str, limits: dict[str, str], *, status: int = 404) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, **limits}
        self.send(status, json.dumps({"error": message}).encode(), headers)

    def _list(self, query: dict[str, list[str]], limits: dict[str, str]) -> None:
        def one(key: str, default: str = "") -> str:
            return query.get(key, [default])[0]

        found = [repo for _, repo in sorted(self.hub.repos.items()) if not repo.private]
        if author := one("author"):
            found = [repo for repo in found if repo.name.partition("/")[0] == author]
        if search := one("search"):
            found = [repo for repo in found if search.lower() in repo.name.lower()]
        for wanted in [*query.get("filter", []), *query.get("pipeline_tag", [])]:
            found = [repo for repo in found if wanted in (*repo.tags, repo.pipeline_tag)]
        if sort := one("sort"):
            key = {"lastModified": lambda r: r.last_modified, "downloads": lambda r: r.downloads}.get(
                sort, lambda r: r.name
            )
            found.sort(key=key, reverse=True)
        start = int(one("cursor", "0"))
        size = min(self.hub.page, int(one("limit", str(self.hub.page))))
        page = found[start : start + size]
        headers = dict(limits)
        if start + size < len(found):
            rest = urlencode({**query, "cursor": start + size}, doseq=True)
            headers["Link"] = f'<{self.hub.endpoint}/api/models?{rest}>; rel="next"'
        expand = query.get("expand")
        self.send_json([self._model(repo, repo.refs["main"], expand, blobs=False) for repo in page], headers)

    def _model(self, repo: Repo, sha: str, expand: list[str] | None, *, blobs: bool) -> dict[str, Any]:
        card = {"base_model": list(repo.base_models), "base_model_relation": repo.relation, "license": "apache-2.0"}
        config = repo.commits[sha].get("config.json")
        model_type = json.loads(config.path.read_bytes()).get("model_type") if config else None
        everything: dict[str, Any] = {
            "sha": sha,
            "author": repo.name.partition("/")[0],
            "lastModified": repo.last_modified,
            "createdAt": repo.last_modified,
            "gated": repo.gated,
            "private": repo.private,
            "disabled": False,
            "downloads": repo.downloads,
            "likes": 0,
            "tags": [*repo.tags, *(f"base_model:{base}" for base in repo.base_models)],
            "pipeline_tag": repo.pipeline_tag,
            "library_name": "transformers",
            "config": {"model_type": model_type},
            "cardData": {key: value for key, value in card.items() if value},
            "siblings": [stored.sibling(blobs=blobs) for stored in repo.commits[sha].values()],
            "usedStorage": sum(stored.nbytes for stored in repo.commits[sha].values()),
            "baseModels": {
                "relation": repo.relation or "finetune",
                "models": [{"_id": "0" * 24, "id": base} for base in repo.base_models],
            }
            if repo.base_models
            else None,
        }
        kept = everything if expand is None else {key: everything[key] for key in expand if key in everything}
        if expand is None:
            del kept["usedStorage"], kept["baseModels"]
        return {"_id": hashlib.sha1(repo.name.encode()).hexdigest()[:24], "id": repo.name, "modelId": repo.name, **kept}

    def _about(
        self, name: str, what: str | None, rest: str | None, query: dict[str, list[str]], limits: dict[str, str]
    ) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:  # as the Hub does, which does not say what is private
            return self._missing("RepoNotFound", "Repository not found", limits, status=401)
        if not self._allowed(repo, contents=False, limits=limits):
            return None
        revision, _, below = (rest or "main").partition("/") if what == "tree" else (rest or "main", "", "")
        found = repo.files(revision)
        if found is None:
            return self._missing("RevisionNotFound", f"Invalid rev id: {revision}", limits)
        sha, files = found
        if what == "tree":
            return self._tree(files, below, recursive=query.get("recursive", ["False"])[0] in ("true", "True"))
        if fault := self.hub.fault("api", self.request_.path, ("linked_size",)):
            files = {k: StoredFile(f.name, f.path, f.nbytes + fault.after, f.oid, f.sha256) for k, f in files.items()}
            repo = Repo(**{**repo.__dict__, "commits": {sha: files}})
        blobs = query.get("blobs", [""])[0] in ("true", "True", "1")
        return self.send_json(self._model(repo, sha, query.get("expand"), blobs=blobs), limits)

    def _tree(self, files: dict[str, StoredFile], below: str, *, recursive: bool) -> None:
        entries: dict[str, dict[str, Any]] = {}
        prefix = f"{below}/" if below else ""
        for stored in files.values():
            if not stored.name.startswith(prefix):
                continue
            first, slash, _ = stored.name[len(prefix) :].partition("/")
            if slash and not recursive:
                entries[prefix + first] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": prefix + first}
                continue
            lfs = {"lfs": {"oid": stored.sha256, "size": stored.nbytes, "pointerSize": 134}} if stored.sha256 else {}
            entries[stored.name] = {
                "type": "file", "oid": stored.oid, "size": stored.nbytes, "path": stored.name, **lfs,
            }  # fmt: skip
        self.send_json(list(entries.values()))

    def _resolve(self, name: str, revision: str, file: str, limits: dict[str, str]) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._missing("RepoNotFound", "Repository not found", limits, status=401)
        if not self._allowed(repo, contents=True, limits=limits):
            return None
        found = repo.files(revision)
        if found is None:
            return self._missing("RevisionNotFound", f"Invalid rev id: {revision}", limits)
        sha, files = found
        stored = files.get(file)
        headers = {"X-Repo-Commit": sha, **limits}
        if stored is None:
            return self._missing("EntryNotFound", "Entry not found", headers)
        size, etag = stored.nbytes, stored.etag
        kinds = ("linked_size", "linked_etag", "no_linked", "unlike_revision")
        fault = self.hub.fault("resolve", self.request_.path, kinds)
        match fault and fault.kind:
            case "linked_size":
                size += fault.after if fault else 0
            case "linked_etag":
                etag = _OTHER_ETAG
            case "unlike_revision":
                headers["X-Repo-Commit"] = "0" * 40
        if stored.sha256 is None:
            headers |= {"Location": f"/api/resolve-cache/models/{name}/{sha}/{quote(file)}"}
            return self.send(307, b"Temporary Redirect", {**headers, "ETag": f'"{etag}"'})
        headers |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{etag}"', "Location": self.hub.sign(stored.etag)}
        if fault and fault.kind == "no_linked":
            del headers["X-Linked-Size"], headers["X-Linked-Etag"]
        return self.send(302, b"Found. Redirecting", headers)

    def _cached(self, name: str, sha: str, file: str) -> None:
        repo = self.hub.repos.get(name)
        stored = repo.commits.get(sha, {}).get(file) if repo else None
        if repo is None or stored is None:
            self._missing("EntryNotFound", "Entry not found", {})
        elif self._allowed(repo, contents=True, limits={}):
            self.send_file(stored, {"X-Repo-Commit": sha})


class _StorageHandler(_Handler):
    """The storage: signed URLs, ranges, and no idea of tokens; one that arrives here anyway is recorded. Beside them,
    files for everybody under /public."""

    def host_of(self, path: str) -> str:  # noqa: ARG002
        return "storage"

    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        stored = self.hub.public_file(path) or self.hub.signed_blob(path, query)
        if stored is None:
            self.send(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        else:
            self.send_file(stored, {})


if __name__ == "__main__":
    with HubServer(hash_files=False) as hub:
        top = Path(sys.argv[1])
        for folder in sorted(top.glob("*/*")):
            hub.add(folder.relative_to(top).as_posix(), folder)
        print(hub.endpoint, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
