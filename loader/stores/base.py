"""What a store owes to the rooms above: sizes and byte streams, and errors of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from loader.http.objects import ObjectInfo
from loader.types import Artifact


class ByteStream(Protocol):
    """The bytes of one range, in order. Close it, read to its end or not.

    One that can has ``abort()``, which makes a read that waits in another thread fail at once, and
    ``is_ending(wanted)``: whether it is time for ``Store.ask_next``, where all that is still to be
    read are *wanted* bytes.
    """

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


class Asked(Protocol):
    """A request whose answer is taken later. Take it or close it."""

    @property
    def stream(self) -> Callable[[], ByteStream]:
        """What waits for the answer and returns its body."""

    def abort(self) -> None:
        """Make a wait for the answer, in another thread, fail at once where that can be done."""

    def close(self) -> None:
        """Let go of it: its answer is not wanted any more."""


@dataclass(frozen=True, slots=True)
class Unasked:
    """A request that is sent when its answer is taken: not every driver can do both apart."""

    stream: Callable[[], ByteStream]

    def abort(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A stream that is there, in the place of a request for it."""

    body: ByteStream

    def stream(self) -> ByteStream:
        """Return it."""
        return self.body

    def abort(self) -> None:
        """Do nothing: nobody waits for it."""

    def close(self) -> None:
        """Close it."""
        self.body.close()


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

    def ask_first(self, artifact: Artifact, end: int) -> Asked:
        """Ask what ``open_first`` asks, and leave the answer for later. Raises as it does."""

    def ask_next(
        self,
        stream: ByteStream,
        artifact: Artifact,
        start: int,
        end: int,
        version: ObjectInfo | None,
    ) -> Asked | None:
        """Ask for what is to be read when *stream* has ended, on its connection.

        That is what ``open_range`` returns, or ``open_first`` where *version* is None. None where
        it cannot be asked for so soon. Its answer may be taken as soon as *stream* is closed.
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

    def listed_size(self, artifact: Artifact) -> int | None:
        """Return the size that its listing has now, read again; None where that cannot be, or has
        none.

        Raises:
            LoaderError: the listing cannot be read now.
        """

    def close(self) -> None:
        """Drop every connection."""
