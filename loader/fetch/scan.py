"""What one reading of a file finds: sums, zeros, holes; and which ranges are worth a comparison."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from loader.fetch.crc import crc64nvme
from loader.fetch.missing_ranges import DoneRange, Range
from loader.fetch.sums import Sum

_BLOCK_BYTES = 1 << 16
_ZEROS = bytes(_BLOCK_BYTES)
_CHUNK_BYTES = 1 << 20
_SAMPLES = 6
_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP = struct.Struct("=QQIII4x")  # start, length, flags, extents that there are, room for them
_EXTENT = struct.Struct("=Q8xQ16xI12x")  # logical start, length, flags
_EXTENTS = 64
_FLAG_SYNC = 1  # what waits is written back first: until then its extents are called unwritten
_UNWRITTEN = 0x800
Tell = Callable[[int], None]


@dataclass(slots=True)
class Scan:
    """What one reading of a file found: its ranges with their CRCs, and where there are zeros."""

    ranges: list[DoneRange] = field(default_factory=list)
    zeros: list[Range] = field(default_factory=list)


def scan_file(fd: int, size_bytes: int, sums: Sequence[Sum], range_bytes: int, tell: Tell) -> Scan:
    """Return what one reading of the file *fd* finds; *sums* take all of it in, *tell* the counts.

    Raises:
        EOFError: it became shorter meanwhile.
        OSError: it cannot be read.
    """
    found = Scan()
    tallies = [one.tally(0) for one in sums]
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    for start in range(0, size_bytes, range_bytes):
        end, place, crc = min(start + range_bytes, size_bytes), start, 0
        while place < end:
            count = os.preadv(fd, [buffer[: end - place]], place)
            if not count:
                raise EOFError
            data = buffer[:count]
            crc = crc64nvme(data, crc)
            for tally in tallies:
                tally.update(data)
            found.zeros += _zeros(data, place)
            place += count
            tell(count)
        for tally in tallies:
            tally.mark()
        found.ranges.append(DoneRange(start, end, crc))
    return found


def _zeros(data: memoryview, place: int) -> Iterator[Range]:
    """Yield those blocks of *data*, which begins at *place*, that are zeros alone."""
    for start in range(0, len(data) - _BLOCK_BYTES + 1, _BLOCK_BYTES):
        if not data[start] and bytes(data[start : start + _BLOCK_BYTES]) == _ZEROS:
            yield Range(place + start, place + start + _BLOCK_BYTES)


def find_holes(fd: int, size_bytes: int) -> list[Range]:
    """Return the holes of a sparse file, as far as its file system tells.

    Before it is read: what is in the page cache is no hole to some.
    """
    found, place = [], 0
    with contextlib.suppress(OSError):  # not every file system tells
        while place < size_bytes and (hole := os.lseek(fd, place, os.SEEK_HOLE)) < size_bytes:
            try:
                place = os.lseek(fd, hole, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but the hole is left
                place = size_bytes
            found.append(Range(hole, place))
    return found


def allocated_only(fd: int, zeros: Sequence[Range]) -> list[Range]:
    """Return those of *zeros* that lie in extents which were allocated and never written.

    Source: Linux, ``Documentation/filesystems/fiemap.rst``. Bytes that wait to be written back may
    lie in such extents as well, and so only zeros count.
    """
    found: list[Range] = []
    for zero in merge_ranges(zeros):
        place = zero.start
        while place < zero.end and (extents := _extents(fd, place, zero.end)):
            for start, end, flags in extents:
                if flags & _UNWRITTEN:
                    found.append(Range(max(start, zero.start), min(end, zero.end)))
                place = max(place, end)
    return found


def _extents(fd: int, start: int, end: int) -> list[tuple[int, int, int]]:
    """Return start, end and flags of the first extents there; none where nobody can tell."""
    buffer = bytearray(_FIEMAP.size + _EXTENTS * _EXTENT.size)
    _FIEMAP.pack_into(buffer, 0, start, end - start, _FLAG_SYNC, 0, _EXTENTS)
    try:
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, buffer)
    except OSError:
        return []
    count = _FIEMAP.unpack_from(buffer)[3]
    places = (_FIEMAP.size + i * _EXTENT.size for i in range(count))
    extents = (_EXTENT.unpack_from(buffer, place) for place in places)
    return [(first, first + length, flags) for first, length, flags in extents]


def sample_ranges(size_bytes: int) -> list[Range]:
    """Return the first and the last block, and some between them at random."""
    last = max(0, size_bytes - _BLOCK_BYTES)
    if last <= _CHUNK_BYTES:
        return [Range(0, size_bytes)]
    starts = [0, *(random.randrange(last) for _ in range(_SAMPLES)), last]
    return [Range(start, start + _BLOCK_BYTES) for start in starts]


def merge_ranges(spans: Sequence[Range]) -> Iterator[Range]:
    """Yield *spans* sorted, those that touch made one."""
    held: Range | None = None
    for span in sorted(spans, key=lambda s: s.start):
        if held is not None and span.start <= held.end:
            held = Range(held.start, max(held.end, span.end))
            continue
        if held is not None:
            yield held
        held = span
    if held is not None:
        yield held


def cut_range(span: Range, most_bytes: int) -> Iterator[Range]:
    """Yield *span* in pieces of at most so many bytes."""
    for start in range(span.start, span.end, most_bytes):
        yield Range(start, min(start + most_bytes, span.end))
