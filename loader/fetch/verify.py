"""Proofs that bytes on this disk are the ones that were fetched."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from loader.fetch.crc import crc64nvme
from loader.fetch.files import Record
from loader.fetch.missing_ranges import DoneRange, combine, missing_ranges
from loader.fetch.sums import Sum, Tally
from loader.weights.header import read_header

Verify = Literal["size", "sample", "full"]
_CHUNK_BYTES = 1 << 20
_SAMPLES = 4


def proved_ranges(
    path: str | Path, claimed: Iterable[DoneRange], total: Sum | None = None
) -> tuple[DoneRange, ...]:
    """Return those of the *claimed* ranges whose bytes in *path* have their CRC.

    They are put into *total*, too, the sum of the whole file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return ()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    try:
        return tuple(r for r in claimed if _is_proved(fd, r, buffer, total))
    except OSError:  # unreadable sectors prove nothing
        return ()
    finally:
        os.close(fd)


def is_intact(path: Path, record: Record, verify: Verify, boot_id: str) -> bool:
    """Return whether *path* is still what *record* says, as far as *verify* looks.

    Everything is read where the time stamp has changed, or the machine went down since. A record
    whose ranges do not make up the file and its digest proves nothing.
    """
    if missing_ranges(record.ranges, record.size_bytes) or combine(record.ranges) != record.digest:
        return False
    try:
        found = path.stat(follow_symlinks=False)
    except OSError:
        return False
    if found.st_size != record.size_bytes:
        return False
    touched = found.st_mtime_ns != record.mtime_ns
    if touched or verify == "full" or (verify == "sample" and record.boot_id != boot_id):
        wanted: Sequence[DoneRange] = record.ranges
    elif verify == "sample":
        wanted = _sample(record.ranges)
    else:
        wanted = ()
    return len(proved_ranges(path, wanted)) == len(wanted)


def check_structure(path: str, named: str) -> None:
    """Raise FormatError where a file *named* ``.safetensors`` is not a whole one."""
    if named.endswith(".safetensors"):
        read_header(Path(path))


def _sample(ranges: Sequence[DoneRange]) -> list[DoneRange]:
    """Return the first and the last range, and some between them."""
    inner = list(ranges[1:-1])
    chosen = random.sample(inner, min(_SAMPLES - 2, len(inner)))
    return list(dict.fromkeys([*ranges[:1], *chosen, *ranges[-1:]]))


def _is_proved(fd: int, claimed: DoneRange, buffer: memoryview, total: Sum | None) -> bool:
    tally = total.tally(claimed.start) if total is not None else None
    if _range_crc(fd, claimed, buffer, tally) != claimed.crc:
        return False
    if tally is not None:
        tally.mark()
    return True


def _range_crc(fd: int, claimed: DoneRange, buffer: memoryview, tally: Tally | None) -> int | None:
    """Return the CRC of the range's bytes, None where the file ends before them."""
    crc, place = 0, claimed.start
    while place < claimed.end:
        count = os.preadv(fd, [buffer[: claimed.end - place]], place)
        if not count:
            return None
        crc = crc64nvme(buffer[:count], crc)
        if tally is not None:
            tally.update(buffer[:count])
        place += count
    return crc
