"""Digests of files that are not ours, kept beside what tells that a file is still the same one.

::

    <folder>/<digest of the file's path>.json    {"path", "stamp": [size, mtime_ns, ctime_ns, inode,
                                                 device], "sums": {"<algorithm>": "<hex>"}}

A large model is read once for its digest, not at every start. ``ctime_ns`` is nobody's to set back.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from loader.errors import ChangedError, DiskError
from loader.fetch.crc import combine_crc64nvme
from loader.fetch.progress import LogProgress, Working, add_up
from loader.fetch.sums import Hasher, new_hasher
from loader.json_text import parse_json
from loader.threads import map_on_threads
from loader.types import Algorithm
from loader.weights.publishing import replace_file

_CHUNK_BYTES = 1 << 20
_Out = TypeVar("_Out")
_THREADS = 4
_LARGE_BYTES = 16 << 20
_PART_BYTES = 64 << 20
_TICK_NS = 50_000_000  # file systems' clocks are coarse: a newer file may change without a trace


class Digests:
    """The digests of files on this disk. Every method may be called from any thread.

    *working* is told of files that have to be read.
    """

    def __init__(self, folder: Path, working: Working | None = None) -> None:
        self.folder = folder
        self._working = working or LogProgress().working

    def of(self, path: Path, algorithm: Algorithm) -> bytes:
        """Return the digest of *path*, read where it has changed since the last time.

        Raises:
            ChangedError: it was written to meanwhile.
            DiskError: it cannot be read.
        """
        try:
            place = path.resolve(strict=True)
            entry = self.folder / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.json"
            with place.open("rb", buffering=0) as file:
                stamp = _stamp(file.fileno())
                known = _read(entry, stamp)
                if algorithm in known:
                    return known[algorithm]
                is_young = time.time_ns() - max(stamp[1], stamp[2]) < _TICK_NS
                if is_young and stamp[0] >= _LARGE_BYTES:
                    time.sleep(_TICK_NS / 1e9)
                    is_young = False
                with self._working(f"summed up {path.name}:") as report:
                    tell = add_up(report, stamp[0])
                    found = _digest(file.fileno(), stamp[0], algorithm, tell)
                if _stamp(file.fileno()) != stamp:
                    raise ChangedError(
                        "a file changed while it was being read",
                        where=str(path),
                        next_step="run again once nothing writes to it any more",
                    )
        except OSError as error:
            raise DiskError(
                "a file cannot be read", where=str(path), got=error.strerror or ""
            ) from None
        if not is_young:  # a small file is sooner read again
            _write(entry, str(place), stamp, known | {algorithm: found})
        return found

    def of_all(self, paths: Iterable[Path], algorithm: Algorithm) -> dict[Path, bytes]:
        """Return the digest of each of *paths*. Raises as ``of`` does."""
        return self.each(paths, lambda path: self.of(path, algorithm))

    def each(self, paths: Iterable[Path], read: Callable[[Path], _Out]) -> dict[Path, _Out]:
        """Return what *read* makes of each of *paths*, several at a time."""
        files = tuple(paths)
        return dict(zip(files, map_on_threads(read, files, _THREADS), strict=True))


def is_stale(entry: Path) -> bool:
    """Return whether *entry* is of a file that is gone or has changed, or is none."""
    try:
        fields = parse_json(entry.read_bytes())
        with Path(fields["path"]).open("rb") as file:
            return bool(_stamp(file.fileno()) != fields["stamp"])
    except (OSError, ValueError, TypeError, KeyError):
        return True


def read_digest(path: Path, algorithms: Iterable[Algorithm]) -> dict[Algorithm, bytes]:
    """Return digests of *path* by one read of it, nothing being kept.

    Raises:
        OSError: it cannot be read.
    """
    hashers = {algorithm: new_hasher(algorithm) for algorithm in algorithms}
    with path.open("rb", buffering=0) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        _put_through(file.fileno(), 0, size_bytes, lambda count: None, *hashers.values())
    return {algorithm: hasher.digest() for algorithm, hasher in hashers.items()}


def _digest(fd: int, size_bytes: int, algorithm: Algorithm, tell: Callable[[int], None]) -> bytes:
    """Return the digest of an open file; a CRC of parts of it on several threads."""
    step = _PART_BYTES if algorithm == "crc64nvme" else max(size_bytes, 1)
    spans = [(start, min(start + step, size_bytes)) for start in range(0, size_bytes, step)]

    def part(span: tuple[int, int]) -> bytes:
        hasher = new_hasher(algorithm)
        _put_through(fd, *span, tell, hasher)
        return hasher.digest()

    digests = map_on_threads(part, spans or [(0, 0)], _THREADS)
    if len(digests) == 1:
        return digests[0]
    crc = 0
    for (start, end), digest in zip(spans, digests, strict=True):
        crc = combine_crc64nvme(crc, int.from_bytes(digest, "big"), end - start)
    return crc.to_bytes(8, "big")


def _put_through(
    fd: int, place: int, end: int, tell: Callable[[int], None], *hashers: Hasher
) -> None:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while place < end and (count := os.preadv(fd, [buffer[: end - place]], place)):
        for hasher in hashers:
            hasher.update(buffer[:count])
        place += count
        tell(count)


def _stamp(fd: int) -> list[int]:
    found = os.fstat(fd)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _read(entry: Path, stamp: list[int]) -> dict[str, bytes]:
    with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
        fields = parse_json(entry.read_bytes())
        if fields["stamp"] == stamp:
            return {name: bytes.fromhex(text) for name, text in fields["sums"].items()}
    return {}


def _write(entry: Path, path: str, stamp: list[int], sums: Mapping[str, bytes]) -> None:
    """Keep it where that can be: else the file is read again the next time."""
    fields = {
        "path": path,
        "stamp": stamp,
        "sums": {name: sum_.hex() for name, sum_ in sums.items()},
    }
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        replace_file(entry, json.dumps(fields).encode())
