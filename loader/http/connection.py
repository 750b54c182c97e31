"""Connections to an origin: plain or TLS, through a proxy's tunnel where one is needed."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from loader.http.grammar import AnswerError
from loader.http.request import Wanted
from loader.http.response import Answer, Inbox
from loader.http.sockets import PlainSocket

_OF_BODIES = ("content-length", "content-range", "etag", "last-modified", "content-encoding")


class DoubtError(AnswerError):
    """An answer that may be to something else than what was asked."""


class Connection:
    """A socket, and what has come on it."""

    def __init__(self, sock: PlainSocket) -> None:
        self.sock = sock
        self.inbox = Inbox(sock)
        # What was asked for, and what the answer said of its body.
        self._last: tuple[str, tuple[int | str | None, ...]] = ("", (0,))

    def peek(self) -> bytes | None:
        """Return what has come that nobody asked for, b"" at the end, None where that is nothing.

        After the former two the connection is of no use any more.
        """
        return b"\0" if self.inbox.held_bytes else self.sock.peek()

    def take_answer(self, method: str, url: str, wanted: Wanted) -> Answer:
        """Return the next answer, which is to *url*.

        Something may come on a connection before this is asked for. The answer before, once more,
        says the same of its body, which begins alike; two files may do so as well, and nobody can
        tell the difference. All of an object, from an origin that has just sent a range, may be all
        of another one. Both are left to a new connection to tell.

        Raises:
            AnswerError: it is none.
            DoubtError: it may be an answer to something else.
            OSError: it did not come.
        """
        (asked, before), sample = self._last, self.inbox.sample
        answer = Answer(self.inbox, method)
        said = (answer.status, *map(answer.fields.get, _OF_BODIES))
        self._last = (url, said)
        try:
            if answer.status == 200 and before[0] == 206 and wanted.span and not wanted.version:
                raise DoubtError("all of what was asked for a range of")
            if said == before and asked != url and answer.begins_with(sample):
                raise DoubtError("the answer before, once more")
        except BaseException:
            answer.close()
            raise
        return answer

    def close(self) -> None:
        """Close it, once no answer is read from it any more."""
        self.sock.close()


def connect(
    host: str,
    port: int,
    timeout_s: float,
    tunnel: Callable[[socket.socket], None] | None = None,
    secure: Callable[[socket.socket], PlainSocket] = PlainSocket,
) -> Connection:
    """Return a connection, within *timeout_s*; *secure* makes it what the origin speaks.

    *tunnel* makes a proxy at *host* pass on all that comes behind it, or raises.

    Raises:
        OSError: that cannot be.
    """
    until = time.monotonic() + timeout_s

    def left_s() -> float:
        return max(until - time.monotonic(), 0.001)

    plain = socket.create_connection((host, port), timeout_s)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tunnel is not None:
            plain.settimeout(left_s())
            tunnel(plain)
        plain.settimeout(left_s())
        return Connection(secure(plain))
    except BaseException:
        plain.close()
        raise
