"""An HTTP/1.1 exchange on one connection: the request's head, the answer's, and its body.

Not http.client's: its heads go through the standard library's parser of mail, and each answer gets
a buffered reader of its own, which costs a small file more than its bytes do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

_BYTES = 20 << 10  # of a first read: an answer's head, and a small file behind it
_MOST_BYTES = 64 << 10  # of a head
_MOST_HEADERS = 100
_LONGEST_LENGTH = 20
_UNSAFE = re.compile(r"[^\x21-\x7e]")  # in a request's target
_END = re.compile(rb"\n\r?\n")  # of a head, with the last line's


class AnswerError(Exception):
    """What came is not what HTTP/1 has there."""


class UnansweredError(ConnectionResetError):
    """The connection was closed without an answer."""


class Incoming(Protocol):
    """A socket, see ``sockets``. Who waits in it holds it: it is closed when nobody does."""

    def recv_some(self, buffer: memoryview, /) -> int:
        """Put into *buffer* what has come; wait where that is nothing. 0 at the end."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Do the same; what is about to come may be waited for as well."""

    def hold(self) -> None:
        """Keep it open until it is let go of, whoever closes it."""

    def let_go(self) -> None:
        """Note that it is not needed any more."""


def request_head(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    """Return the bytes of a request up to its body.

    Raises:
        ValueError: a header, or the target, would break out of its line.
    """
    lines = [f"{method} {target} HTTP/1.1", *map(": ".join, headers.items()), "", ""]
    head = "\r\n".join(lines)
    breaks = len(lines) - 1
    if _UNSAFE.search(target) or (head.count("\r"), head.count("\n")) != (breaks, breaks):
        raise ValueError("a control character in a request")
    return head.encode("latin-1")


class Inbox:
    """What comes in on a connection: with a head comes some of what is behind it, and is kept."""

    def __init__(self, sock: Incoming) -> None:
        self.sock = sock
        self._buffer = bytearray(_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # of what is held

    @property
    def held_bytes(self) -> int:
        """How many bytes have come and were not read yet."""
        return self._end - self._start

    def take_head(self) -> list[str]:
        """Return the lines of a head, up to the empty one that ends it.

        Raises:
            AnswerError: it is too long.
            UnansweredError: the connection ended before it did.
        """
        while not (match := _END.search(self._buffer, self._start, self._end)):
            if not self._receive():
                raise UnansweredError("closed without an answer")
        text = str(self._view[self._start : match.start()], "latin-1")
        self._start = match.end()
        return text.split("\n")

    def take_line(self) -> bytes:
        """Return the next line, without its end.

        Raises:
            AnswerError: it is too long, or the connection ended before it did.
        """
        while (end := self._buffer.find(b"\n", self._start, self._end)) < 0:
            if not self._receive():
                raise AnswerError("ended early")
        line = self._view[self._start : end].tobytes()
        self._start = end + 1
        return line.strip()

    def readinto(self, buffer: memoryview) -> int:
        """Put into *buffer* what is held, or what comes next; 0 at the connection's end."""
        count = min(self._end - self._start, len(buffer))
        if not count:
            return self.sock.recv_into(buffer)
        buffer[:count] = self._view[self._start : self._start + count]
        self._start += count
        return count

    def _receive(self) -> int:
        """Wait for more than is held; 0 at the connection's end."""
        held = self._end - self._start
        if not held:
            self._start = self._end = 0
        elif self._end == len(self._buffer):
            if held >= _MOST_BYTES:
                raise AnswerError("a head longer than any")
            grown = bytearray(min(max(2 * held, _BYTES), _MOST_BYTES))
            grown[:held] = self._view[self._start : self._end]
            self._buffer, self._view = grown, memoryview(grown)
            self._start, self._end = 0, held
        count = self.sock.recv_some(self._view[self._end :])
        self._end += count
        return count


class Answer:
    """An answer whose head has been read, and its body, which is read from here.

    ``fields`` are its headers by their names in lower case. One that comes more than once has its
    values joined by commas (RFC 9110, 5.3). ``length``: of the body, None where its end tells it;
    ``left``: of that, what has still to be read. ``will_close``: the connection bears no other
    request.

    Raises:
        AnswerError: the head is not what HTTP/1 has there.
        UnansweredError: the connection ended before the head did.
    """

    def __init__(self, inbox: Inbox, method: str) -> None:
        self._inbox = inbox
        self._is_open = True
        inbox.sock.hold()
        try:
            self._begin(method)
        except BaseException:
            self.close()
            raise

    def _begin(self, method: str) -> None:
        self.status = 100
        while self.status == 100:  # an interim answer comes before the real one
            lines = self._inbox.take_head()
            version, self.status, self.reason = _status_line(lines[0])
            self.fields = _fields(lines)
        fields = self.fields
        self._is_chunked = fields.get("transfer-encoding", "").lower() == "chunked"
        self.length: int | None = None
        if self.status in (204, 304) or method in ("HEAD", "CONNECT"):
            self.length = 0
        elif not self._is_chunked:
            self.length = read_length(fields)
        self.left = self.length
        connection = fields.get("connection", "").lower()
        self.will_close = (
            "close" in connection
            or (version == "HTTP/1.0" and "keep-alive" not in connection)
            or (not self._is_chunked and self.length is None)
        )
        self._chunk_bytes = 0  # left of the one that is being read

    @property
    def is_ahead(self) -> bool:
        """Whether more has come than was read."""
        return self._inbox.held_bytes > 0

    def readinto(self, buffer: memoryview) -> int:
        """Put what has come of the body into *buffer*; 0 at its end, or the connection's.

        Raises:
            AnswerError: the body is not what the head says.
        """
        if self.left == 0:
            return 0
        if self._is_chunked:
            return self._read_chunk(buffer)
        count = self._inbox.readinto(buffer[: self.left])
        if self.left is not None:
            self.left -= count
        elif not count:
            self.left = 0
        return count

    def read(self, most_bytes: int) -> bytes:
        """Return the body, or so much of it. Raises as ``readinto`` does."""
        found = bytearray()
        buffer = memoryview(bytearray(_MOST_BYTES))
        while count := self.readinto(buffer[: most_bytes - len(found)]):
            found += buffer[:count]
            if len(found) == most_bytes:
                break
        return bytes(found)

    def close(self) -> None:
        """Let go of the connection."""
        if self._is_open:
            self._is_open = False
            self._inbox.sock.let_go()

    def _read_chunk(self, buffer: memoryview) -> int:
        if not self._chunk_bytes and not self._begin_chunk():
            self.left = 0
            return 0
        count = self._inbox.readinto(buffer[: self._chunk_bytes])
        if not count:
            raise AnswerError("ended early")
        self._chunk_bytes -= count
        if not self._chunk_bytes and self._inbox.take_line():
            raise AnswerError("a chunk without an end")
        return count

    def _begin_chunk(self) -> int:
        """Return the next chunk's size; 0 at the end, behind which there may be more headers."""
        size = self._inbox.take_line().partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{1,15}", size):
            raise AnswerError("a chunk without a size")
        self._chunk_bytes = int(size, 16)
        if not self._chunk_bytes:
            for _ in range(_MOST_HEADERS):
                if not self._inbox.take_line():
                    break
            else:
                raise AnswerError("more headers than anybody needs")
        return self._chunk_bytes


def read_length(fields: Mapping[str, str]) -> int | None:
    """Return what Content-Length says, None where that is nothing, or no length."""
    text = fields.get("content-length", "")
    return int(text) if text.isdecimal() and len(text) < _LONGEST_LENGTH else None


def _status_line(line: str) -> tuple[str, int, str]:
    version, _, rest = line.partition(" ")
    code, _, reason = rest.strip().partition(" ")
    if not version.startswith("HTTP/1.") or len(code) != 3 or not code.isdecimal():
        raise AnswerError("no HTTP/1 answer")
    return version, int(code), reason.strip()


def _fields(lines: list[str]) -> dict[str, str]:
    """Return the headers of a head; its first line is none."""
    if len(lines) > _MOST_HEADERS + 1:
        raise AnswerError("more headers than anybody needs")
    fields: dict[str, str] = {}
    for place in range(1, len(lines)):
        name, colon, value = lines[place].partition(":")
        if not colon:
            raise AnswerError("a header without a name")
        name, value = name.lower(), value.strip()
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields
