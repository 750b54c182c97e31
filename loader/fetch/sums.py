"""What the origin says that a file sums up to, compared with what was written: no second read.

CRC64NVME is there anyway. Of other sums one is taken up while the bytes are written. A CRC of the
whole combines from those of any ranges. A hash (MD5, SHA) goes on byte by byte: of a file of up to
64 MiB, or of each part of a multipart upload. Such a unit is brought by one connection; where
another one takes over its rest, or a later run goes on with it, the hash goes on as well. A hash
of a larger whole has to wait for all of its bytes in order, on one connection: it is compared where
every proof is asked for, and so is the hash of an upload's parts whose size can only be guessed.
Else such a file is as sure as its version and its transport make it. What a manifest beside the
files declares is always compared: where nothing cheaper is there, by a second read.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

from loader.errors import SumError
from loader.fetch.crc import (
    combine_crc32,
    combine_crc32c,
    combine_crc64nvme,
    crc32,
    crc32c,
    crc64nvme,
)
from loader.fetch.missing_ranges import DoneRange
from loader.http.objects import Algorithm, Checksum, ObjectInfo

_MOST_UNIT_BYTES = 64 << 20  # what one connection brings alone
_FEWEST_PARTS = 32  # by which the size of a part is known well enough
_MIB = 1 << 20
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

    def copy(self) -> Self:
        """Return one that goes on from here."""


class Tally(Protocol):
    """The sum of bytes that come one after the other, in one thread's hands."""

    def update(self, data: memoryview, /) -> None:
        """Take more bytes in."""

    def mark(self) -> None:
        """Say that the bytes up to here are written, and right as far as is known."""


class Sum(Protocol):
    """The sum of one file. Every method may be called from any thread."""

    def tally(self, place: int) -> Tally:
        """Return what the bytes from *place* on are put through."""

    def result(self, have: Sequence[DoneRange]) -> bytes | None:
        """Return what the ranges, the whole file, sum up to; None where that cannot be said."""


@dataclass(frozen=True, slots=True)
class Check:
    """One sum to be compared. ``unit_bytes`` come by one connection; None: by any ranges.

    ``guessed``: the origin did not tell how large the upload's parts were. ``rereads``: the sum is
    taken of the file when all of it is here.
    """

    checksum: Checksum
    unit_bytes: int | None
    guessed: bool = False
    rereads: bool = False

    def new_sum(self, size_bytes: int) -> Sum:
        """Return the sum of a file of which nothing is here."""
        algorithm = self.checksum.algorithm
        if self.unit_bytes is not None:
            return _Units(self.checksum, self.unit_bytes, size_bytes)
        if self.rereads:
            return _Later()
        return _Known(algorithm) if algorithm == "crc64nvme" else _Combined(algorithm)

    def sum_again(self, size_bytes: int) -> Sum:
        """Return the sum of a file that is read from its first byte to its last."""
        check = replace(self, unit_bytes=max(size_bytes, 1)) if self.rereads else self
        return check.new_sum(size_bytes)

    def differs(self, found: bytes, where: str) -> SumError:
        """Return the error for bytes that sum up to *found*, which is another sum."""
        wanted, is_it = self.checksum, "the origin's copy is damaged"
        of = f" of {wanted.parts} parts of {self.unit_bytes} bytes" if wanted.parts else ""
        if self.guessed:
            is_it += ", or was uploaded in parts of another size: verify: sample takes it as it is"
        says = wanted.said_by or "the origin"
        if wanted.said_by:
            is_it += f", or {says} is of another version of it"
        return SumError(
            f"the bytes do not sum up to what {says} says",
            where=where,
            expected=f"{wanted.algorithm} {wanted.digest.hex()}{of}",
            got=found.hex(),
            next_step=f"run again: the file is fetched anew; a second time means that {is_it}",
        )


def choose_check(
    info: ObjectInfo,
    range_bytes: int,
    *,
    full: bool = False,
    declared: Sequence[Checksum] = (),
) -> Check | None:
    """Return the cheapest sum that can be taken of an object, None where there is none.

    *declared*: what a manifest says of it, which goes before what the origin says. *full*: one
    connection may bring a unit of any size, and parts may be of a size that is usual.
    """
    most_bytes = max(_MOST_UNIT_BYTES, range_bytes, info.size_bytes if full else 0)
    for algorithm in _CHEAPEST:
        for checksum in declared or info.checksums:
            if checksum.algorithm != algorithm:
                continue
            if not checksum.parts and algorithm in _COMBINE:
                return Check(checksum, None)
            whole = checksum.parts < 2
            unit_bytes = max(info.size_bytes, 1) if whole else checksum.part_bytes
            guessed = full and unit_bytes is None
            if guessed:
                unit_bytes = usual_part_bytes(info.size_bytes, checksum.parts)
            if unit_bytes and (unit_bytes <= most_bytes or not info.ranges):
                return Check(checksum, unit_bytes, guessed)
            if declared:
                return Check(checksum, None, rereads=True)
    return None


def usual_part_bytes(size_bytes: int, parts: int) -> int | None:
    """Return the one size that uploaders use by which *size_bytes* make so many *parts*.

    They count in MiB, in products of twos and fives: 5, 8, 16, 25, 50, 64, 100. Of few parts, other
    sizes, such as 8 MB, would give the same number.
    """
    if parts < _FEWEST_PARTS:
        return None
    least, most = -(-size_bytes // parts), (size_bytes - 1) // (parts - 1)
    usual = [n for n in range(-(-least // _MIB), most // _MIB + 1) if _is_usual(n)]
    return usual[0] * _MIB if len(usual) == 1 else None


def _is_usual(number: int) -> bool:
    for factor in (2, 5):
        while number and not number % factor:
            number //= factor
    return number == 1


class _Known:
    """CRC64NVME of the whole, which every range has."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm

    def tally(self, place: int) -> Tally:
        """Return one that does nothing."""
        return _NoTally()

    def result(self, have: Sequence[DoneRange]) -> bytes | None:
        """Return the ranges' CRCs combined."""
        return _combine(self._algorithm, [(entry, entry.crc) for entry in have])


class _NoTally:
    def update(self, data: memoryview, /) -> None:
        """Do nothing."""

    def mark(self) -> None:
        """Do nothing."""


class _Later:
    """A sum that has to wait until the whole file is here."""

    def tally(self, place: int) -> Tally:
        """Return one that does nothing."""
        return _NoTally()

    def result(self, have: Sequence[DoneRange]) -> None:
        """Return None."""


class _Combined:
    """Another CRC of the whole, from those of its ranges."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self._found: dict[tuple[int, int], int] = {}  # by start and end

    def tally(self, place: int) -> Tally:
        """Return what takes the CRC of each piece between two marks."""
        return _PieceTally(self._algorithm, self._found, place)

    def result(self, have: Sequence[DoneRange]) -> bytes | None:
        """Return the pieces' CRCs combined."""
        pieces = [(entry, self._found.get((entry.start, entry.end))) for entry in have]
        known = [(entry, crc) for entry, crc in pieces if crc is not None]
        return _combine(self._algorithm, known) if len(known) == len(pieces) else None


class _PieceTally:
    def __init__(self, algorithm: Algorithm, found: dict[tuple[int, int], int], place: int) -> None:
        self._algorithm = algorithm
        self._found = found
        self._start = self._place = place
        self._crc = _Crc(algorithm)

    def update(self, data: memoryview, /) -> None:
        """Take more bytes in."""
        self._crc.update(data)
        self._place += len(data)

    def mark(self) -> None:
        """Keep the piece since the last mark, and begin the next."""
        self._found[self._start, self._place] = self._crc.value
        self._start, self._crc = self._place, _Crc(self._algorithm)


class _Units:
    """The digest of the file, or of its parts' digests: each from its first byte to its last."""

    def __init__(self, checksum: Checksum, unit_bytes: int, size_bytes: int) -> None:
        self.algorithm = checksum.algorithm
        self.unit_bytes = unit_bytes
        self.size_bytes = size_bytes
        self._parts = checksum.parts
        self._lock = threading.Lock()
        self._digests: dict[int, bytes] = {}  # of whole units, by their start
        self._states: dict[int, Hasher] = {}  # of begun ones, by how far they are

    def tally(self, place: int) -> Tally:
        """Return what goes on where others ended; one that begins inside a unit finds nothing."""
        return _UnitTally(self, place)

    def state(self, place: int) -> Hasher | None:
        """Return the hash of the unit's bytes before *place*, None where it is not known."""
        if place % self.unit_bytes == 0:
            return new_hasher(self.algorithm)
        with self._lock:
            found = self._states.get(place)
            return found.copy() if found is not None else None

    def keep(self, digests: Mapping[int, bytes], place: int, state: Hasher | None) -> None:
        """Take whole units, and the state of the one that *place* is in."""
        with self._lock:
            self._digests |= digests
            if state is not None:
                self._states[place] = state.copy()

    def result(self, have: Sequence[DoneRange]) -> bytes | None:
        """Return the digest, None where a unit's is missing."""
        starts = range(0, max(self.size_bytes, 1), self.unit_bytes)
        digests = [self._digests[start] for start in starts if start in self._digests]
        if not self.size_bytes:  # no byte was ever put through a tally
            digests = [new_hasher(self.algorithm).digest()]
        if len(digests) != len(starts) or len(starts) != max(self._parts, 1):
            return None
        if not self._parts:
            return digests[0]
        whole = new_hasher(self.algorithm)
        whole.update(memoryview(b"".join(digests)))
        return whole.digest()


class _UnitTally:
    def __init__(self, units: _Units, place: int) -> None:
        self._units = units
        self._place = place
        self._state = units.state(place)
        self._whole: dict[int, bytes] = {}  # units that ended since the last mark

    def update(self, data: memoryview, /) -> None:
        """Take more bytes in."""
        unit_bytes = self._units.unit_bytes
        while data:
            start = self._place - self._place % unit_bytes
            end = min(start + unit_bytes, self._units.size_bytes)
            piece, data = data[: end - self._place], data[end - self._place :]
            self._place += len(piece)
            if self._state is not None:
                self._state.update(piece)
            if self._place == end:
                if self._state is not None:
                    self._whole[start] = self._state.digest()
                self._state = self._units.state(end)

    def mark(self) -> None:
        """Keep what is whole, and the state here for whoever goes on."""
        self._units.keep(self._whole, self._place, self._state)
        self._whole.clear()


class _Crc:
    """A CRC as a hasher."""

    def __init__(self, algorithm: Algorithm, value: int = 0) -> None:
        self._algorithm = algorithm
        self.value = value

    def update(self, data: memoryview, /) -> None:
        """Take more bytes in."""
        self.value = _CRCS[self._algorithm](data, self.value)

    def digest(self) -> bytes:
        """Return the sum so far, big-endian."""
        return self.value.to_bytes(_crc_bytes(self._algorithm), "big")

    def copy(self) -> _Crc:
        """Return one that goes on from here."""
        return _Crc(self._algorithm, self.value)


_CRCS: Mapping[str, Callable[[memoryview, int], int]] = {
    "crc32": crc32,
    "crc32c": crc32c,
    "crc64nvme": crc64nvme,
}


def _crc_bytes(algorithm: Algorithm) -> int:
    return 8 if algorithm == "crc64nvme" else 4


def new_hasher(algorithm: Algorithm) -> Hasher:
    """Return what sums up bytes in their order."""
    if algorithm in _CRCS:
        return _Crc(algorithm)
    return hashlib.new(algorithm, usedforsecurity=False)


def _combine(algorithm: Algorithm, pieces: Sequence[tuple[DoneRange, int]]) -> bytes:
    total = 0
    for entry, crc in pieces:
        total = _COMBINE[algorithm](total, crc, entry.end - entry.start)
    return total.to_bytes(_crc_bytes(algorithm), "big")
