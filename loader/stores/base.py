"""What a store owes to the rooms above: sizes and byte streams, and errors of our own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from loader.types import Artifact


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """The version of an object. ``version`` is a strong ETag or a Last-Modified date, if any.

    ``ranges`` is False where the origin sends the whole object whatever range is asked for.
    """

    size_bytes: int
    version: str | None = None
    ranges: bool = True


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

    def close(self) -> None:
        """Give the connection back, or drop it where bytes are left."""


class Store(Protocol):
    """An origin of artifacts. Safe to use from many threads at once."""

    def stat(self, artifact: Artifact) -> ObjectInfo:
        """Return size and version.

        Raises:
            FetchError: not there, refused, or expired.
            TransientError: asking again may help.
        """

    def open_range(
        self, artifact: Artifact, start: int, end: int, version: ObjectInfo
    ) -> ByteStream:
        """Return the bytes ``[start, end)`` of exactly *version* of the object.

        Raises:
            ChangedError: the object is no longer that version.
            FetchError: not there, refused, or expired.
            TransientError: asking again may help.
        """

    def close(self) -> None:
        """Drop every connection."""
