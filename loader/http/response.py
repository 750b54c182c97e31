"""An HTTP/1.1 exchange on one connection: the request's head, the answer's, and its body.

Not http.client's: its heads go through the standard library's parser of mail, and each answer gets
a buffered reader of its own, which costs a small file more than its bytes do. The grammar is
llhttp's, see ``grammar``; a body of known length goes straight from the socket to its buffer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from loader.http.grammar import AnswerError, Chunks, Head, frame, read_head
from loader.http.sockets import PlainSocket

_BYTES = 20 << 10  # of a first read: an answer's head, and a small file behind it
_MOST_BYTES = 64 << 10  # of a head
_MOST_INTERIM = 16  # answers of status 1xx before the real one
_SAMPLE_BYTES = 4 << 10
_UNSAFE = re.compile(r"[^\x21-\x7e]")  # in a request's target
_END = re.compile(rb"\n\r?\n")  # of a head, with the last line's


class UnansweredError(ConnectionResetError):
    """The connection was closed without an answer."""


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
    """What comes in on a connection: with a head comes some of what is behind it, and is kept.

    ``sample`` is what the last head's body began with.
    """

    def __init__(self, sock: PlainSocket) -> None:
        self.sock = sock
        self.sample = b""
        self._buffer = bytearray(_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0  # of what is held

    @property
    def held_bytes(self) -> int:
        """How many bytes have come and were not read yet."""
        return self._end - self._start

    def take_head(self) -> bytes:
        """Return a head, with the empty line that ends it.

        Raises:
            AnswerError: it is longer than any.
            UnansweredError: the connection ended before it did.
        """
        while (match := _END.search(self._buffer, self._start, self._end)) is None:
            if not self._receive():
                raise UnansweredError("closed without an answer")
        head = self._view[self._start : match.end()].tobytes()
        self._start = match.end()
        self.sample = b""
        return head

    def begins_with(self, sample: bytes) -> bool:
        """Return whether *sample* comes next; wait until that is certain."""
        while (held := self._view[self._start : self._end][: len(sample)].tobytes()) != sample:
            if not sample.startswith(held) or not self._receive():
                return False
        return True

    def decode(self, chunks: Chunks) -> None:
        """Give *chunks* what comes next.

        Raises:
            AnswerError: it is none of theirs, or the connection ended before they did.
        """
        if not self.held_bytes and not self._receive():
            raise AnswerError("ended early")
        held = self._view[self._start : self._end]
        self.sample = self.sample or held[:_SAMPLE_BYTES].tobytes()
        self._start += chunks.feed(held)

    def readinto(self, buffer: memoryview) -> int:
        """Put into *buffer* what is held, or what comes next; 0 at the connection's end."""
        if count := min(self._end - self._start, len(buffer)):
            buffer[:count] = self._view[self._start : self._start + count]
            self._start += count
        else:
            count = self.sock.recv_into(buffer)
        if not self.sample:
            self.sample = buffer[: min(count, _SAMPLE_BYTES)].tobytes()
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

    The head, and interim ones before it, have to be there within the time of one wait. ``fields``
    are its headers, see ``Head``. ``length``: of the body, None where its end tells it; ``left``:
    of that, what has still to be read. ``will_close``: the connection bears no other request.

    Raises:
        AnswerError: the head is not what HTTP/1 has there.
        UnansweredError: the connection ended before the head did.
    """

    def __init__(self, inbox: Inbox, method: str) -> None:
        self._inbox = inbox
        self._is_open = True
        inbox.sock.hold()
        try:
            head = self._take_head()
            framing = frame(head, method)
        except BaseException:
            self.close()
            raise
        self.status, self.reason, self.fields = head.status, head.reason, head.fields
        self.length = self.left = framing.length
        self.will_close = framing.will_close
        self._chunks = Chunks() if framing.is_chunked else None

    def _take_head(self) -> Head:
        sock = self._inbox.sock
        sock.begin_time()
        try:
            for _ in range(_MOST_INTERIM):
                head = read_head(self._inbox.take_head())
                if head.status >= 200:
                    return head
        finally:
            sock.deadline = math.inf
        raise AnswerError("interim answers without an end")

    def begins_with(self, sample: bytes) -> bool:
        """Return whether the body begins with *sample*, or is shorter, as it comes in."""
        if self.length is not None:
            sample = sample[: self.length]
        sock = self._inbox.sock
        sock.begin_time()
        try:
            return self._inbox.begins_with(sample)
        finally:
            sock.deadline = math.inf

    @property
    def is_ahead(self) -> bool:
        """Whether more has come than was read."""
        return self._inbox.held_bytes > 0

    @property
    def is_chunked(self) -> bool:
        """Whether the body says itself where it ends."""
        return self._chunks is not None

    def readinto(self, buffer: memoryview) -> int:
        """Put what has come of the body into *buffer*; 0 at its end, or the connection's.

        Raises:
            AnswerError: the body is not what the head says.
        """
        if self.left == 0:
            return 0
        if self._chunks is not None:
            return self._read_chunks(self._chunks, buffer)
        count = self._inbox.readinto(buffer[: self.left])
        if self.left is not None:
            self.left -= count
        elif not count:
            self.left = 0
        return count

    def read(self, most_bytes: int) -> bytes:
        """Return the body, or so much of it, or what comes within the time of one wait.

        Raises as ``readinto`` does.
        """
        found = bytearray()
        buffer = memoryview(bytearray(most_bytes))
        self._inbox.sock.begin_time()
        while count := self.readinto(buffer[len(found) :]):
            found += buffer[len(found) : len(found) + count]
        return bytes(found)

    def close(self) -> None:
        """Let go of the connection."""
        if self._is_open:
            self._is_open = False
            self._inbox.sock.let_go()

    def _read_chunks(self, chunks: Chunks, buffer: memoryview) -> int:
        while not chunks.content and not chunks.is_whole:
            self._inbox.decode(chunks)
        count = chunks.take(buffer)
        if not count and buffer:
            self.left = 0
        return count
