"""Which bytes are still to be fetched. Pure: no I/O, no clock."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from awscrt.checksums import combine_crc64nvme


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


def missing_ranges(
    done: Sequence[DoneRange], size_bytes: int, range_bytes: int
) -> tuple[Range, ...]:
    """Return what *done* (sorted, disjoint) leaves of a file, in pieces of *range_bytes*."""
    missing: list[Range] = []
    place = 0
    ends = [(entry.start, entry.end) for entry in done]
    for start, end in [*ends, (size_bytes, size_bytes)]:
        cuts = range(place, start, range_bytes)
        missing += [Range(cut, min(cut + range_bytes, start)) for cut in cuts]
        place = end
    return tuple(missing)


def combine(done: Sequence[DoneRange]) -> str:
    """Return ``crc64nvme:<base64>`` of the file that *done* (sorted, without holes) makes up.

    The text is what S3 calls ``x-amz-checksum-crc64nvme``: big-endian, base64.
    """
    crc = 0
    for entry in done:
        crc = combine_crc64nvme(crc, entry.crc, entry.end - entry.start)
    return digest_text(crc)


def digest_text(crc: int) -> str:
    """Return how records write a CRC64NVME."""
    return "crc64nvme:" + base64.b64encode(crc.to_bytes(8, "big")).decode()
