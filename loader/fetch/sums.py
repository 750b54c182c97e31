"""What the origin says that a file sums up to, compared with what was written: no second read.

CRC64NVME is there anyway. Of other sums one is computed while the bytes are written, where that
can be: the CRCs combine whatever the ranges are, a hash (MD5, SHA) needs the file, or each part of
a multipart upload, in one worker's hands from its first byte to its last. Where bytes came from an
earlier run, or a slow connection's rest was taken over, a hash stays unknown, and the file is as
sure as its version and its transport made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from loader.fetch.crc import (
    combine_crc32,
    combine_crc32c,
    combine_crc64nvme,
    crc32,
    crc32c,
    crc64nvme,
)
from loader.fetch.plan import DoneRange
from loader.stores.base import Algorithm, Checksum, ObjectInfo

_MOST_PART_BYTES = 64 << 20  # of parts that are fetched as the ranges they were uploaded in
_COMBINE: Mapping[str, Callable[[int, int, int], int]] = {
    "crc32": combine_crc32,
    "crc32c": combine_crc32c,
    "crc64nvme": combine_crc64nvme,
}
_CHEAPEST: Sequence[Algorithm] = ("crc64nvme", "crc32c", "crc32", "sha1", "sha256", "md5")


class Hasher(Protocol):
    """As hashlib's."""

    def update(self, data: memoryview, /) -> None:
        """Take more bytes in."""

    def digest(self) -> bytes:
        """Return the sum so far."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A range as it was written, and its sum by the check's algorithm where one was computed."""

    range: DoneRange
    digest: bytes | None


@dataclass(frozen=True, slots=True)
class Check:
    """One sum to be compared. ``unit_bytes``: pieces have to be cut at its multiples."""

    checksum: Checksum
    unit_bytes: int | None

    def new_hasher(self) -> Hasher | None:
        """Return what each piece is put through, None where its CRC64NVME is all it takes."""
        algorithm = self.checksum.algorithm
        return None if algorithm == "crc64nvme" else _hasher(algorithm)

    def compute(self, pieces: Sequence[Piece], size_bytes: int) -> bytes | None:
        """Return what *pieces*, sorted, sum up to; None where that cannot be said."""
        checksum = self.checksum
        if checksum.algorithm == "crc64nvme":
            pieces = [Piece(p.range, p.range.crc.to_bytes(8, "big")) for p in pieces]
        digests = [piece.digest for piece in pieces if piece.digest is not None]
        if len(digests) != len(pieces) or not pieces:
            return None
        if not checksum.parts:
            combine = _COMBINE.get(checksum.algorithm)
            if combine is None:
                return digests[0] if len(pieces) == 1 else None
            total = 0
            for piece, digest in zip(pieces, digests, strict=True):
                length = piece.range.end - piece.range.start
                total = combine(total, int.from_bytes(digest, "big"), length)
            return total.to_bytes(len(checksum.digest), "big")
        unit = self.unit_bytes or size_bytes
        starts = [piece.range.start for piece in pieces]
        if starts != list(range(0, size_bytes, unit)) or len(starts) != checksum.parts:
            return None
        whole = _hasher(checksum.algorithm)
        whole.update(memoryview(b"".join(digests)))
        return whole.digest()


def choose_check(info: ObjectInfo, range_bytes: int) -> Check | None:
    """Return the cheapest sum that can be computed for an object, None where there is none."""
    for algorithm in _CHEAPEST:
        for checksum in info.checksums:
            if checksum.algorithm != algorithm:
                continue
            if not checksum.parts:
                if algorithm in _COMBINE or (info.ranges and info.size_bytes <= range_bytes):
                    return Check(checksum, None)
            else:
                part_bytes = info.size_bytes if checksum.parts == 1 else checksum.part_bytes
                if part_bytes and info.ranges and part_bytes <= _MOST_PART_BYTES:
                    return Check(checksum, part_bytes)
    return None


def _hasher(algorithm: Algorithm) -> Hasher:
    crcs = {"crc32": _Crc(crc32, 4), "crc32c": _Crc(crc32c, 4), "crc64nvme": _Crc(crc64nvme, 8)}
    return crcs.get(algorithm) or hashlib.new(algorithm, usedforsecurity=False)


class _Crc:
    """A CRC as a hasher."""

    def __init__(self, function: Callable[[memoryview, int], int], size_bytes: int) -> None:
        self._function = function
        self._size_bytes = size_bytes
        self._value = 0

    def update(self, data: memoryview, /) -> None:
        """Take more bytes in."""
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        """Return the sum so far, big-endian."""
        return self._value.to_bytes(self._size_bytes, "big")
