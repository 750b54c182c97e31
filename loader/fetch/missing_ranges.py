"""Which bytes are still to be fetched. Pure: no I/O, no clock."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loader.fetch.crc import combine_crc64nvme

_MOST_RANGES = 8  # of one request: what the last bytes of a large file wait for


@dataclass(frozen=True, slots=True)
class Range:
    """The bytes ``[start, end)`` of a file."""

    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """The count of its bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class DoneRange:
    """Bytes ``[start, end)`` that lie on disk, and their CRC64NVME."""

    start: int
    end: int
    crc: int


def sound_ranges(done: Iterable[DoneRange], size_bytes: int) -> tuple[DoneRange, ...]:
    """Return the ranges sorted, without those that overlap an earlier one or leave the file."""
    kept: list[DoneRange] = []
    for entry in sorted(done, key=lambda r: (r.start, -r.end)):
        place = kept[-1].end if kept else 0
        if place <= entry.start < entry.end <= size_bytes:
            kept.append(entry)
    return tuple(kept)


def missing_ranges(done: Sequence[DoneRange], size_bytes: int) -> tuple[Range, ...]:
    """Return the holes that *done* (sorted, disjoint) leaves in a file."""
    missing: list[Range] = []
    place = 0
    ends = [(entry.start, entry.end) for entry in done]
    for start, end in [*ends, (size_bytes, size_bytes)]:
        if place < start:
            missing.append(Range(place, start))
        place = end
    return tuple(missing)


def guided_bytes(hole_bytes: int, left_bytes: int, workers: int, range_bytes: int) -> int:
    """Return how much of a hole to ask for at once, in whole ranges where there is more.

    One worker's share of all that is left: each request costs its latency, so few large ones come
    first and small ones at the end. Source: Polychronopoulos and Kuck, "Guided self-scheduling",
    1987.
    """
    ranges = left_bytes // (workers * range_bytes)
    size = max(1, min(ranges, _MOST_RANGES)) * range_bytes
    # A rest that is not worth a request of its own goes with it.
    return size if size + range_bytes // 4 < hole_bytes else hole_bytes


def unit_end(start: int, end: int, unit_bytes: int) -> int:
    """Return the last end of a unit up to *end*, or the first one behind *start* if that is later.

    Units lie one behind the other from the file's first byte; the last one may be shorter.
    """
    return max(end - end % unit_bytes, start - start % unit_bytes + unit_bytes)


def combine(done: Sequence[DoneRange]) -> str:
    """Return ``crc64nvme:<base64>`` of the file that *done* (sorted, without holes) makes up.

    The text is what S3 calls ``x-amz-checksum-crc64nvme``: big-endian, base64.
    """
    crc = done[0].crc if done else 0
    for entry in done[1:]:
        crc = combine_crc64nvme(crc, entry.crc, entry.end - entry.start)
    return digest_text(crc)


def digest_text(crc: int) -> str:
    """Return how records write a CRC64NVME."""
    return "crc64nvme:" + base64.b64encode(crc.to_bytes(8, "big")).decode()
