"""Proofs that bytes on this disk are the ones that were fetched."""

from __future__ import annotations

import json
import os
import random
import stat
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from loader.errors import FormatError
from loader.fetch.crc import crc64nvme
from loader.fetch.files import WHOLE, Places, Record, whole_place
from loader.fetch.missing_ranges import DoneRange, combine, missing_ranges
from loader.fetch.progress import Working, add_up, say_nothing
from loader.fetch.sums import Sum, Tally
from loader.json_text import parse_json
from loader.weights.header import header_length, parse_header

Verify = Literal["size", "sample", "full"]
_CHUNK_BYTES = 1 << 20
_SAMPLES = 4


def proved_ranges(
    place: Places,
    kind: str,
    claimed: Iterable[DoneRange],
    total: Sum | None = None,
    tell: Callable[[int], None] = lambda count: None,
) -> tuple[DoneRange, ...]:
    """Return those of the *claimed* ranges whose bytes in the file of *kind* have their CRC.

    They are put into *total*, too, the sum of the whole file; *tell* is told of bytes as they are
    read.
    """
    try:
        fd = place.open(kind)
    except OSError:
        return ()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    try:
        return tuple(r for r in claimed if _is_proved(fd, r, buffer, total, tell))
    except OSError:  # unreadable sectors prove nothing
        return ()
    finally:
        os.close(fd)


def is_intact(
    place: Places, record: Record, verify: Verify, boot_id: str, working: Working = say_nothing
) -> bool:
    """Return whether the whole file is still what *record* says, as far as *verify* looks."""
    wanted = ranges_to_prove(place, record, verify, boot_id)
    if not wanted:
        return wanted is not None
    with working(f"proved {place.path}:") as report:
        tell = add_up(report, sum(r.end - r.start for r in wanted))
        return has_ranges(place, record, wanted, tell)


def has_ranges(
    place: Places, record: Record, wanted: Sequence[DoneRange], tell: Callable[[int], None]
) -> bool:
    """Return whether the whole file of *record* has the *wanted* ranges; *tell* takes counts."""
    return len(proved_ranges(whole_place(place, record), WHOLE, wanted, tell=tell)) == len(wanted)


def ranges_to_prove(
    place: Places, record: Record, verify: Verify, boot_id: str
) -> Sequence[DoneRange] | None:
    """Return what of a whole file has to be read yet; None where it is not what *record* says.

    That is everything where the time stamp has changed, or the machine went down since. A record
    whose ranges do not make up the file and its digest proves nothing.
    """
    if missing_ranges(record.ranges, record.size_bytes) or combine(record.ranges) != record.digest:
        return None
    place = whole_place(place, record)
    try:
        found = place.stat(WHOLE)
    except OSError:
        return None
    if found is None or not stat.S_ISREG(found.st_mode) or found.st_size != record.size_bytes:
        return None
    if not place.folders.is_ours(found):
        return None
    touched = found.st_mtime_ns != record.mtime_ns
    if touched or verify == "full" or (verify == "sample" and record.boot_id != boot_id):
        return record.ranges
    return _sample(record.ranges) if verify == "sample" else ()


def check_structure(fd: int, named: str) -> None:
    """Raise FormatError where a file *named* ``.safetensors`` is not a whole one."""
    if named.endswith(".safetensors"):
        size_bytes = os.fstat(fd).st_size
        length = 8 + header_length(os.pread(fd, 8, 0), size_bytes, named)
        parse_header(os.pread(fd, length, 0), size_bytes, named)


def check_json(fd: int, named: str) -> None:
    """Raise FormatError where a file *named* ``.json`` breaks off. Lines of JSON are whole, too."""
    if not named.endswith(".json"):
        return
    try:
        parse_json(os.pread(fd, os.fstat(fd).st_size, 0))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise FormatError("no whole JSON", where=named, got=str(error)) from None
    except ValueError:
        pass  # not for us to judge


def _sample(ranges: Sequence[DoneRange]) -> list[DoneRange]:
    """Return the first and the last range, and some between them."""
    inner = list(ranges[1:-1])
    chosen = random.sample(inner, min(_SAMPLES - 2, len(inner)))
    return list(dict.fromkeys([*ranges[:1], *chosen, *ranges[-1:]]))


def _is_proved(
    fd: int,
    claimed: DoneRange,
    buffer: memoryview,
    total: Sum | None,
    tell: Callable[[int], None],
) -> bool:
    tally = total.tally(claimed.start) if total is not None else None
    crc = _range_crc(fd, claimed, buffer, tally)
    tell(claimed.end - claimed.start)
    if crc != claimed.crc:
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
