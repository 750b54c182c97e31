"""Chunks that lie on this disk already: of whole files by their records, of others by journals."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loader.fetch.crc import crc64nvme
from loader.fetch.files import WHOLE, Places, read_journal, read_record, whole_place
from loader.fetch.folders import Folders
from loader.fetch.missing_ranges import DoneRange
from loader.peers.chunks import Chunk

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Held:
    """A chunk on this disk: in the open file ``fd`` (close it) from its start on; ``crc`` of it."""

    fd: int
    crc: int


def find_held(root: Path, chunk: Chunk) -> Held | None:
    """Return *chunk* where a fetch into *root* has brought it, None where it has not.

    Its CRC is the one that was taken while it came, where that was of these very bytes; else it is
    of what lies there now, which is proved by the CRCs of the ranges that it came in.
    """
    place = Places(Folders(str(root)), chunk.of.path)
    key = {"size_bytes": chunk.of.size_bytes, "version": chunk.of.version}
    try:
        record = read_record(place)
        if record is not None and (record.size_bytes, record.version) == tuple(key.values()):
            found = whole_place(place, record)
            fd = found.open(WHOLE)
            if os.fstat(fd).st_mtime_ns == record.mtime_ns:
                return _held(fd, chunk, record.ranges)
            os.close(fd)
            return None
        fd = place.open("part")
        return _held(fd, chunk, read_journal(place, key))
    except OSError:
        return None


def _held(fd: int, chunk: Chunk, done: Sequence[DoneRange]) -> Held | None:
    try:
        for entry in done:
            if (entry.start, entry.end) == (chunk.start, chunk.end):
                return Held(fd, entry.crc)
        if _covers(done, chunk.start, chunk.end) and _are_proved(fd, chunk, done):
            return Held(fd, _sum(fd, chunk.start, chunk.end))
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _covers(done: Sequence[DoneRange], start: int, end: int) -> bool:
    for entry in sorted(done, key=lambda entry: entry.start):
        if entry.start <= start:
            start = max(start, entry.end)
    return start >= end


def _are_proved(fd: int, chunk: Chunk, done: Sequence[DoneRange]) -> bool:
    touched = [r for r in done if r.start < chunk.end and chunk.start < r.end]
    return all(_sum(fd, entry.start, entry.end) == entry.crc for entry in touched)


def _sum(fd: int, start: int, end: int) -> int:
    crc = 0
    while start < end:
        data = os.pread(fd, min(_READ_BYTES, end - start), start)
        if not data:
            raise OSError("a file that became shorter")
        crc, start = crc64nvme(data, crc), start + len(data)
    return crc
