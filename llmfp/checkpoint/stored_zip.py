"""A zip archive whose members are stored, not compressed, so that their bytes can be mapped where they lie.

zipfile accepts much that contradicts itself: overlapping members, text before the archive, two ends to choose from.
Here there is one reading or none: members, directory and end records follow each other from the first byte to the last,
and a member that is used has a local header that says what the directory says and ends where the next one starts.
Format: PKWARE APPNOTE 6.3.10, sections 4.3.7, 4.3.9, 4.3.12 to 4.3.16 and 4.5.3 (ZIP64). PyTorch has
written it the same way since miniz 2.0.8 (2019; read there, tried with torch 2.13): descriptors after members, ZIP64
fields from 4 GiB on.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from llmfp.checkpoint.stored_file import StoredFile
from llmfp.errors import CheckpointError

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ZIP64_EXTRA = 1
_STORED = 0
_ENCRYPTED = 0x2041
_SIZES_FOLLOW = 0x0008
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_MAX_DIRECTORY_BYTES = 32 << 20
_MAX_MEMBERS = 1 << 18
_TRUNCATED = "the file is truncated or was changed; fetch it again"


@dataclass(frozen=True, slots=True)
class _Member:
    """A directory entry. `after` its bytes come those of its data descriptor, then, at `limit`, the next member."""

    name: bytes
    flags: int
    method: int
    crc32: int
    stored_bytes: int
    nbytes: int
    header_offset: int
    after: int
    limit: int


class StoredZip:
    """The members of an open file by name. `bytes_read` counts what was read of the file so far.

    Raises CheckpointError, naming the file and the member, for whatever contradicts itself; OSError.
    """

    def __init__(self, file: StoredFile) -> None:
        self.bytes_read = 0
        self._file, self._nbytes, self._path = file, file.nbytes, file.path
        self._members = self._read_directory()

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def locate(self, name: str) -> tuple[int, int]:
        """The absolute offset and the size of a member's bytes."""
        member = self._members[name]
        if member.flags & _ENCRYPTED:
            raise self._error(name, "is encrypted")
        if member.method != _STORED:
            raise self._error(name, "is compressed and so cannot be mapped", hint="save the model with torch.save")
        if member.stored_bytes != member.nbytes:
            raise self._error(name, f"is stored in {member.stored_bytes} bytes but holds {member.nbytes}")
        header = self._read(member.header_offset, _LOCAL.size + len(member.name))
        signature, _, flags, method, _, _, _, stored, size, name_length, extra_length = _LOCAL.unpack_from(header)
        expected = b"PK\3\4", member.flags, member.method, len(member.name), member.name
        if (signature, flags, method, name_length, header[_LOCAL.size :]) != expected:
            raise self._error(name, "has a local header that contradicts the directory")
        for value in (stored, size):  # torch writes zeros; 0xFFFFFFFF says that the extra field holds the size
            if value not in (member.nbytes, _FULL32) and (value or not flags & _SIZES_FOLLOW):
                raise self._error(name, f"has {value} bytes by its local header, {member.nbytes} by the directory")
        start = member.header_offset + _LOCAL.size + name_length + extra_length
        if start + member.nbytes + member.after != member.limit:
            raise self._error(name, "does not end where the next one starts")
        return start, member.nbytes

    def read(self, name: str, max_bytes: int) -> bytes:
        """A small member's bytes. The checksum is checked where there is one; torch can be told to write zeros."""
        offset, nbytes = self.locate(name)
        if nbytes > max_bytes:
            raise self._error(name, f"has {nbytes} bytes, over the limit of {max_bytes}")
        content = self._read(offset, nbytes)
        if self._members[name].crc32 not in (0, zlib.crc32(content)):
            raise self._error(name, "does not match its checksum", hint=_TRUNCATED)
        return content

    def _read_directory(self) -> dict[str, _Member]:
        offset, nbytes, count = self._read_end()
        if nbytes > _MAX_DIRECTORY_BYTES or count > _MAX_MEMBERS:
            raise self._broken(f"a directory of {count} members in {nbytes} bytes is over the limit")
        directory = self._read(offset, nbytes)
        entries: list[_Member] = []
        position = 0
        for _ in range(count):
            if position + _ENTRY.size > nbytes:
                raise self._broken("the directory ends before its last member")
            (
                signature, _, _, flags, method, _, _, crc32, stored, size, name_length, extra_length, comment_length,
                disk, _, _, header_offset,
            ) = _ENTRY.unpack_from(directory, position)  # fmt: skip
            after_name = position + _ENTRY.size + name_length
            after_extra = after_name + extra_length
            name = directory[position + _ENTRY.size : after_name]
            position = after_extra + comment_length
            if signature != b"PK\1\2" or position > nbytes:
                raise self._broken("the directory is malformed")
            narrow = size, stored, header_offset
            size, stored, header_offset = self._widened(narrow, directory[after_name:after_extra])
            if disk not in (0, _FULL16):
                raise self._broken("the archive is split over several disks")
            after = 0 if not flags & _SIZES_FOLLOW else 24 if _FULL32 in narrow else 16
            entries.append(_Member(name, flags, method, crc32, stored, size, header_offset, after, offset))
        if position != nbytes:
            raise self._broken(f"{nbytes - position} bytes of the directory belong to no member")
        return self._without_overlap(entries)

    def _without_overlap(self, entries: list[_Member]) -> dict[str, _Member]:
        """The members by name, each with the limit up to which its bytes may reach."""
        entries.sort(key=lambda member: member.header_offset)
        ends = [member.header_offset for member in entries[1:]] + [member.limit for member in entries[-1:]]
        if entries and (first := entries[0].header_offset):
            raise self._broken(f"{first} bytes before the first member belong to none")
        members: dict[str, _Member] = {}
        for member, limit in zip(entries, ends, strict=True):
            name = self._name(member.name)
            if name in members:
                raise self._error(name, "is there twice")
            if member.header_offset + _LOCAL.size + len(member.name) + member.stored_bytes > limit:
                raise self._error(name, "overlaps what follows it, or ends beyond the directory", hint=_TRUNCATED)
            members[name] = replace(member, limit=limit)
        return members

    def _name(self, name: bytes) -> str:
        try:
            text = name.decode("utf-8")
        except UnicodeDecodeError:
            raise self._broken(f"member {name[:80]!r} has a name that is not UTF-8") from None
        pure = PurePosixPath(text)
        if not text or pure.is_absolute() or ".." in pure.parts or "\\" in text or ":" in text or "\0" in text:
            raise self._broken(f"member {text[:80]!r} has a name that leaves the archive")
        return text

    def _widened(self, narrow: tuple[int, int, int], extra: bytes) -> tuple[int, int, int]:
        """Sizes and offset of an entry, those of 0xFFFFFFFF replaced from its ZIP64 field, which holds only those."""
        if _FULL32 not in narrow:
            return narrow
        position = 0
        while position + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, position)
            position += 4
            if kind == _ZIP64_EXTRA:
                wanted = 8 * narrow.count(_FULL32)
                if wanted <= length <= len(extra) - position:
                    wide = iter(struct.unpack_from(f"<{wanted // 8}Q", extra, position))
                    size, stored, offset = (next(wide) if value == _FULL32 else value for value in narrow)
                    return size, stored, offset
                break
            position += length
        raise self._broken("a member of ZIP64 size lacks its ZIP64 field")

    def _read_end(self) -> tuple[int, int, int]:
        """Offset, size and number of members of the central directory, which must end where the end records start."""
        length = min(self._nbytes, _END64.size + _LOCATOR.size + _END.size)
        tail = self._read(self._nbytes - length, length)
        if length < _END.size or tail[-_END.size :][:4] != b"PK\5\6":
            raise self._broken("the file does not end in a zip directory", hint=_TRUNCATED)
        _, *narrow, comment_length = _END.unpack(tail[-_END.size :])
        disk, directory_disk, here, count, nbytes, offset = narrow
        end = self._nbytes - _END.size
        if length >= _END.size + _LOCATOR.size and tail[-_END.size - _LOCATOR.size :][:4] == b"PK\6\7":
            if length < _END64.size + _LOCATOR.size + _END.size:
                raise self._broken("the ZIP64 end record is missing", hint=_TRUNCATED)
            end -= _LOCATOR.size + _END64.size
            _, end64_disk, end64_offset, disks = _LOCATOR.unpack(tail[_END64.size : -_END.size])
            signature, size, _, _, *wide = _END64.unpack(tail[: _END64.size])
            full = (*[_FULL16] * 4, *[_FULL32] * 2)
            agree = all(n in (w, f) for n, w, f in zip(narrow, wide, full, strict=True))
            if (signature, size, end64_offset) != (b"PK\6\6", _END64.size - 12, end) or not agree:
                raise self._broken("the end records contradict each other")
            if end64_disk or disks > 1:
                raise self._broken("the archive is split over several disks")
            disk, directory_disk, here, count, nbytes, offset = wide
        if disk or directory_disk or here != count or comment_length:
            raise self._broken("the end record is malformed")
        if offset + nbytes != end:
            raise self._broken(f"a directory of {nbytes} bytes at {offset} does not end at {end}", hint=_TRUNCATED)
        return offset, nbytes, count

    def _read(self, offset: int, nbytes: int) -> bytes:
        if not 0 <= offset <= offset + nbytes <= self._nbytes:
            raise self._broken(f"bytes {offset} to {offset + nbytes} lie outside the file", hint=_TRUNCATED)
        content = self._file.read_at(offset, nbytes)
        if len(content) != nbytes:
            raise self._broken("the file became shorter while it was read")
        self.bytes_read += nbytes
        return content

    def _error(self, member: str, problem: str, *, hint: str = "") -> CheckpointError:
        return self._broken(f"member {member[:200]!r} {problem}", hint=hint)

    def _broken(self, problem: str, *, hint: str = "") -> CheckpointError:
        return CheckpointError(f"{self._path}: {problem}", hint=hint)
