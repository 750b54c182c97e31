"""What a store owes to the rooms above: sizes, byte streams, word of how it moves, our errors."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loader.http.objects import ObjectInfo
from loader.types import Artifact

SMALL_BYTES = 256 << 10  # of a file that comes whole with its first request
Report = Callable[[int, int], None]
"""Told how much is done, and of how much."""
Working = Callable[[str], AbstractContextManager[Report]]
"""As ``Progress.working``."""
Tell = Callable[[str], None]
"""Told how far it is, in words such as ``12,000 files``."""


class ByteStream(Protocol):
    """The bytes of one range, in order. Close it, read to its end or not."""

    @property
    def info(self) -> ObjectInfo:
        """The version of the object that these bytes belong to."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Put what has arrived into *buffer* and return the count, 0 at the range's end.

        Raises:
            TransientError: the connection broke, stalled, or the body ended early.
        """

    def abort(self) -> None:
        """Make a read that waits in another thread fail at once, where that can be done."""

    def close(self) -> None:
        """Give the connection back, or drop it where bytes are left."""


class Progress:
    """Told of downloads, other work and waits, from many threads; tells *inner* the same.

    Whoever shows or counts some of it overrides that.
    """

    def __init__(self, inner: Progress | None = None) -> None:
        self._inner = inner

    def start(self, files: int, size_bytes: int, have_bytes: int) -> None:
        """So many files and bytes in all, of which *have_bytes* are here."""
        if self._inner:
            self._inner.start(files, size_bytes, have_bytes)

    def advance(self, count_bytes: int, path: str) -> None:
        """So many bytes more of a file; fewer, when it starts over."""
        if self._inner:
            self._inner.advance(count_bytes, path)

    def begin_file(self, path: str, size_bytes: int, have_bytes: int) -> None:
        """Bytes of this file are asked for; told at every request."""
        if self._inner:
            self._inner.begin_file(path, size_bytes, have_bytes)

    def finish_file(self, path: str) -> None:
        """One file more is whole."""
        if self._inner:
            self._inner.finish_file(path)

    def found_config(self, config: Path) -> None:
        """A model's ``config.json`` is here, outside the download folder, before its weights."""
        if self._inner:
            self._inner.found_config(config)

    def retry(self, path: str, reason: str) -> None:
        """Bytes of this file are asked for again after a passing failure."""
        if self._inner:
            self._inner.retry(path, reason)

    def finish(self) -> None:
        """The download is over, well or not."""
        if self._inner:
            self._inner.finish()

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[Report]:
        """Give what is told of bytes that are *what*, such as ``proved a.bin:``, in the block."""
        if self._inner is None:
            yield lambda done, total: None
            return
        with self._inner.working(what) as report:
            yield report

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[Tell]:
        """Give what is told how far *what* has come, whose end nobody knows, in the block."""
        if self._inner is None:
            yield lambda how_far: None
            return
        with self._inner.step(what) as tell:
            yield tell

    def wait_for(self, what: str) -> None:
        """Nothing moves but for *what*; told again and again meanwhile, empty when it is over."""
        if self._inner:
            self._inner.wait_for(what)


def count_up(tell: Tell, noun: str) -> Callable[[int], None]:
    """Return what adds up counts, from any thread, and tells their sum of *noun*."""
    lock, done = threading.Lock(), 0

    def add(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            tell(f"{done:,} {noun}")

    return add


@dataclass(frozen=True, slots=True)
class PendingResponse:
    """A request whose response is read later. Read it or close it, on any thread.

    ``receive`` waits for it and returns its body; ``abort`` makes a wait in another thread fail at
    once; ``close`` drops it. A driver that cannot send first and read later does both in
    ``receive``, and has nothing to abort.
    """

    receive: Callable[[], ByteStream]
    abort: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None


class Store(Protocol):
    """An origin of artifacts. Safe to use from many threads at once."""

    def stat(self, artifact: Artifact) -> ObjectInfo:
        """Return size and version.

        Raises:
            FetchError: not there, refused, or expired.
            TransientError: asking again may help.
        """

    def open_first(self, artifact: Artifact, end: int) -> ByteStream:
        """Return the bytes ``[0, end)`` of whatever version there is now; its ``info`` says which.

        For a small file this is one request where ``stat`` and ``open_range`` are two. An object
        that is shorter ends before *end*; an origin without ranges sends all of it.

        Raises:
            FetchError: not there, refused, or expired.
            TransientError: asking again may help.
        """

    def send_first(self, artifact: Artifact, end: int) -> PendingResponse:
        """Send what ``open_first`` sends, and leave its response for later. Raises as it does."""

    def open_range(
        self, artifact: Artifact, start: int, end: int, version: ObjectInfo
    ) -> ByteStream:
        """Return the bytes ``[start, end)`` of exactly *version* of the object.

        Raises:
            ChangedError: the object is no longer that version.
            FetchError: not there, refused, or expired.
            TransientError: asking again may help.
        """

    def listed_size(self, artifact: Artifact) -> int | None:
        """Return the size that its listing has now, read again; None where that cannot be, or has
        none.

        Raises:
            LoaderError: the listing cannot be read now.
        """

    def close(self) -> None:
        """Drop every connection."""
