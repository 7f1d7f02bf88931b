"""One weight file on a server: resolved once, read by range, and the same file from the first byte to the last.

Every request through the Hub's /resolve/ counts against its limit, one to the signed address does not: the address is
kept, used for every range by all threads, and replaced when it is about to expire or is refused.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from llmfp.checkpoint.specs import Shard
from llmfp.errors import HubError
from llmfp.hub.client import Client, Known, Location, StaleLocationError, TryAgainError

PREFIX_BYTES = 100_000
"""The first read of a file: holds 97 % of all safetensors headers on the Hub."""
_SOON_SECONDS = 30.0
_PROGRESS_BYTES = 256 << 10
_MOST_RESOLVES_IN_VAIN = 2


class RemoteFile:
    """A file at an address, of known size, ETag or hash where the Hub says them. Raises HubError; threads may share it.

    path          what errors call it
    commit        what X-Repo-Commit must say, None where no commit is pinned
    sha256        of the content, None where it is not known
    bytes_read, requests    so far; the header's share is what a plan calls header bytes
    """

    def __init__(
        self,
        client: Client,
        path: Path,
        url: str,
        *,
        nbytes: int | None = None,
        commit: str | None = None,
        sha256: str | None = None,
    ) -> None:
        self.path, self.commit, self.sha256 = path, commit, sha256
        self.bytes_read = self.requests = self.resolves = 0
        self._client, self._url = client, url
        self._known = Known(nbytes)
        self._linked_etag: str | None = None
        self._location: Location | None = None
        self._lock = threading.Lock()
        self._resolving = threading.Lock()
        self._prefix = b""

    @property
    def nbytes(self) -> int:
        if self._known.nbytes is None:
            self._current(None)
        if self._known.nbytes is None:
            self.read_into(0, memoryview(bytearray(1)))
        assert self._known.nbytes is not None
        return self._known.nbytes

    @property
    def etag(self) -> str | None:
        """What names the content: the Hub's own word for it, else the storage's."""
        return self._linked_etag or self._known.etag

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Bytes of a header; fewer only where the file ends. The file's first 100,000 are fetched at once and kept."""
        nbytes = max(0, min(nbytes, self.nbytes - offset))
        if not self._prefix and offset + nbytes <= PREFIX_BYTES:
            self.prefetch()
        kept = self._prefix[offset : offset + nbytes]
        if len(kept) == nbytes:
            return kept
        content = bytearray(nbytes)
        content[: len(kept)] = kept
        self.read_into(offset + len(kept), memoryview(content)[len(kept) :])
        return bytes(content)

    def prefetch(self) -> None:
        """Fetches the file's beginning, unless that was done."""
        if not self._prefix:
            prefix = bytearray(min(PREFIX_BYTES, self.nbytes))
            self.read_into(0, memoryview(prefix))
            self._prefix = bytes(prefix)

    def shard(self, header_bytes: int) -> Shard:  # noqa: ARG002
        """The file as it was when its header was read; its beginning is let go. What was fetched counts as header."""
        self._prefix = b""
        return Shard(self.path, self.nbytes, self.bytes_read, (0, 0, 0), self.sha256, self)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fills the buffer with the bytes from `offset` on. A connection that drops is taken up where it ended."""
        done = refused = 0

        def ask() -> None:
            nonlocal done, refused
            while done < len(view):
                location = self._current(None)
                try:
                    with self._lock:
                        self.requests += 1
                    got = self._client.receive(location, str(self.path), view[done:], offset + done, self._known)
                except StaleLocationError as error:
                    refused += 1
                    if refused > _MOST_RESOLVES_IN_VAIN:
                        raise HubError(f"{self.path}: {error}", hint="is the clock right, and the token?") from None
                    self._current(location)
                    continue
                refused = 0
                self._learn(got.known)
                done += got.nbytes
                with self._lock:
                    self.bytes_read += got.nbytes
                if got.problem:
                    raise TryAgainError(got.problem, got=got.nbytes >= min(_PROGRESS_BYTES, len(view) // 8 + 1))

        self._client.retrying(str(self.path), ask)

    def _learn(self, known: Known) -> None:
        """Size and ETag are those of the first part; of two first parts at once the later is held against the other."""
        with self._lock:
            if not self._known.begun:
                if known.etag is None and self._linked_etag is None:
                    raise HubError(f"{self.path}: the server names no ETag, so a change under way could not be seen")
                self._known = known
            elif self._known != known:
                raise HubError(f"{self.path}: the file changed while it was read (its ETag or size is another)")

    def _current(self, stale: Location | None) -> Location:
        """Where the bytes are: what is known, or, where that is `stale` or about to expire, a new answer."""
        with self._resolving:
            now, location = self._client.clock.now(), self._location
            fresh = location is not None and (
                location.fresh_until is None or now < location.fresh_until - _SOON_SECONDS
            )
            if location is not None and location is not stale and fresh:
                return location
            self.resolves += 1
            found = self._client.locate(self._url, str(self.path))
            self._check(found)
            self._location = found
            return found

    def _check(self, found: Location) -> None:
        if self.commit is not None and found.commit not in (None, self.commit):
            raise HubError(f"{self.path}: comes from commit {found.commit}, asked for was {self.commit}")
        for etag in (self._linked_etag, self.sha256):
            if etag is not None and found.etag is not None and len(found.etag) == len(etag) and found.etag != etag:
                raise HubError(
                    f"{self.path}: the Hub names another content than before (its ETag is another)", hint="scan again"
                )
        if found.nbytes is not None and self._known.nbytes is not None and found.nbytes != self._known.nbytes:
            raise HubError(
                f"{self.path}: has {self._known.nbytes} bytes by the Hub's listing, {found.nbytes} by its answer",
                hint="was it replaced? scan again",
            )
        with self._lock:
            self._linked_etag = self._linked_etag or found.etag
            if found.nbytes is not None and self._known.nbytes is None:
                self._known = Known(found.nbytes)


class SmallRemoteFile:
    """A configuration or index, fetched whole when first read and held against its hash where the Hub gives one."""

    def __init__(
        self, client: Client, path: Path, url: str, max_bytes: int, *, oid: str | None, sha256: str | None
    ) -> None:
        self.path = path
        self._client, self._url, self._max_bytes, self._oid, self._sha256 = client, url, max_bytes, oid, sha256
        self._content: bytes | None = None

    @property
    def nbytes(self) -> int:
        return len(self._fetched())

    def read_at(self, offset: int, nbytes: int) -> bytes:
        return self._fetched()[offset : offset + nbytes]

    def shard(self, header_bytes: int) -> Shard:
        raise NotImplementedError(f"{self.path} is no weight file of {header_bytes} header bytes")

    def _fetched(self) -> bytes:
        if self._content is None:
            content, _ = self._client.content(self._url, str(self.path), self._max_bytes, "resolvers")
            git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
            lfs = hashlib.sha256(content).hexdigest()
            right = lfs == self._sha256 if self._sha256 is not None else self._oid in (None, git)
            if not right:
                raise HubError(f"{self.path}: does not match the hash that the Hub lists", hint="scan again")
            self._content = content
        return self._content
