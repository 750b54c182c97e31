"""What a store owes to the rooms above: sizes and byte streams, and errors of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from loader.http.objects import ObjectInfo
from loader.types import Artifact

SMALL_BYTES = 256 << 10  # of a file that comes whole with its first request


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
