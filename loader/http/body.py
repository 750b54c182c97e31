"""Requests in flight, and the bodies of their answers."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from dataclasses import dataclass, field

from loader.errors import FetchError, TransientError
from loader.http.codings import check_name, content_coding, decode, too_long
from loader.http.connection import Connection
from loader.http.grammar import AnswerError
from loader.http.objects import ObjectInfo
from loader.http.pool import Pool
from loader.http.request import Origin, Wanted
from loader.http.response import Answer
from loader.http.sockets import PlainSocket
from loader.http.statuses import translate

_READ_BYTES = 64 << 10


@dataclass(slots=True)
class InFlight:
    """A request whose answer has not been read.

    ``is_kept``: it was sent on a connection that had borne another one.
    """

    connection: Connection
    origin: Origin
    url: str = field(repr=False)
    message: bytes = field(repr=False)
    is_kept: bool

    def abort(self) -> None:
        """Make a wait for the answer, in another thread, fail now."""
        shut(self.connection.sock)

    def close(self) -> None:
        """Drop the connection: the answer is not wanted any more."""
        self.connection.close()


class HttpStream:
    """One response body; see ``ByteStream``.

    It has to bring the *pool*'s least rate, of the time that is spent waiting for it. *sent* is
    what was asked, for what of an object that is *wanted*.
    """

    def __init__(
        self,
        pool: Pool,
        sent: InFlight,
        answer: Answer,
        info: ObjectInfo,
        wanted: Wanted,
        url: str,
    ) -> None:
        self._pool = pool
        self._origin = sent.origin
        self._connection = sent.connection
        self._is_first = not sent.is_kept
        self._answer = answer
        self._url = url
        self._began = time.monotonic()
        self._patience_s = pool.patience_s(url)
        self._waited_s, self._brought = 0.0, 0
        self._coding = content_coding(answer.fields)
        # Where no length is told, but the size of what all of this is.
        self._missing: int | None = None
        if answer.length is None and wanted.is_sized:
            self._missing = info.size_bytes
            if info.ranges and wanted.span is not None:
                self._missing = max(min(wanted.span[1], info.size_bytes) - wanted.span[0], 0)
        self.info = info
        self.fields = answer.fields

    def readinto(self, buffer: memoryview, /) -> int:
        """Put what has arrived into *buffer* and return the count, 0 at the body's end."""
        if self._coding:
            check_name(self._url, self._coding)
        count = self.read_coded(buffer[: self._missing])
        if self._missing is not None:
            self._missing -= count
            self._check_whole(count)
        return count

    def read_coded(self, buffer: memoryview) -> int:
        """Do the same for who decodes what is in a coding of ``Content-Encoding``."""
        answer, sock = self._answer, self._connection.sock
        began = time.monotonic()
        sock.deadline = began + self._patience_s
        try:
            count = answer.readinto(buffer)
        except (OSError, AnswerError) as error:
            known = translate(error, self._url)
            if isinstance(error, TimeoutError) and isinstance(known, TransientError):
                raise self._too_slow(known) from None
            raise known from None
        finally:
            sock.deadline = math.inf
        if not count and answer.left:
            raise TransientError(
                "the body ended before its length",
                where=self._url,
                got=f"{answer.left} bytes too few",
            )
        self._brought += count
        self._waited_s += time.monotonic() - began
        if self._waited_s > self._patience_s:
            self._check_rate()
        if answer.left == 0 and count and not self._is_first:
            self._check_end()
        return count

    def _check_rate(self) -> None:
        least, rate = self._pool.least_bytes_per_s, self._brought / self._waited_s
        if rate < least and self._answer.left != 0:
            raise self._too_slow(
                TransientError(
                    "the connection brings next to nothing",
                    where=self._url,
                    expected=f"at least {least} bytes a second",
                    got=f"{rate:.0f}",
                )
            )
        self._waited_s, self._brought = 0.0, 0

    def _too_slow(self, error: TransientError) -> TransientError:
        """Return *error*, and have more patience the next time; the first ones do not count."""
        error.hasty = self._patience_s < self._pool.longest_s
        self._pool.note_slow(self._url)
        return error

    def _check_end(self) -> None:
        """Raise TransientError where it is not sure that this was the answer to what was asked."""
        if self._answer.is_ahead:
            self._pool.isolate(self._origin)
            raise TransientError(
                "the origin sent more answers than it was asked for", where=self._url
            )

    def check_empty(self) -> None:
        """Raise FetchError where a body that should be empty is not, and nothing else tells."""
        if self._missing == 0:
            self._check_whole(0)

    def _check_whole(self, count: int) -> None:
        """Raise where a body whose end tells its length is not as long as is known otherwise."""
        if self._missing and not count:
            raise TransientError(
                "the body ended before its length",
                where=self._url,
                got=f"{self._missing} bytes too few",
            )
        if not self._missing and self.read_coded(memoryview(bytearray(1))):
            if self.info.ranges:
                raise TransientError("the answer is longer than its range", where=self._url)
            raise FetchError(
                "the object is longer than the listing says",
                where=self._url,
                expected=f"{self.info.size_bytes} bytes",
                got="more",
                next_step="get a new listing",
            )

    def count(self) -> int:
        """Read the whole body and return how long it is."""
        buffer, total = memoryview(bytearray(_READ_BYTES)), 0
        while count := self.read_coded(buffer):
            total += count
        return total

    def read_all(self, limit_bytes: int) -> bytes:
        """Return the whole body, decoded.

        Raises:
            FetchError: it is longer than *limit_bytes*, or in a coding that is not known.
            TransientError: it did not come to its end, or too slowly.
        """
        buffer, body = memoryview(bytearray(_READ_BYTES)), bytearray()
        while count := self.read_coded(buffer):
            body += buffer[:count]
            if len(body) > limit_bytes:
                raise too_long(self._url, limit_bytes)
        return decode(bytes(body), self._coding, limit_bytes, self._url)

    def close(self) -> None:
        """Give the connection back where the body was read to its end, else drop it."""
        answer, connection = self._answer, self._connection
        whole = answer.left == 0
        answer.close()
        if whole and not answer.is_ahead and not answer.will_close:
            self._pool.give_back(self._origin, connection)
        else:
            if whole and answer.is_ahead:
                self._pool.isolate(self._origin)
            connection.close()

    def abort(self) -> None:
        """Make a read that waits in another thread fail now."""
        shut(self._connection.sock)


def shut(sock: PlainSocket) -> None:
    """End a connection that another thread may wait in."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def drop(connection: Connection, answer: Answer) -> None:
    """Close both: the socket stays open as long as either is."""
    answer.close()
    connection.close()
