"""The grammar of answers, which is llhttp's, and their framing, which is decided here.

llhttp reads one head at a time, and chunks. What frames a body is read by RFC 9112, 6: llhttp
refuses equal repeats of Content-Length, which RFC 9110, 8.6 permits, and hands over the body of a
coding that it does not know. So it reads a head that it refuses once more, with the two headers
that frame under names of no meaning to it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import httptools

_MOST_HEADERS = 100
_MOST_IDLE_BYTES = 64 << 10  # of chunk sizes, their extensions and trailers, without a body's byte
_FRAMING = re.compile(rb"\n(?=-*(?:content-length|transfer-encoding):)", re.IGNORECASE)
_MASKED = re.compile(r"-+(?:content-length|transfer-encoding)")
_FOLD = re.compile(rb"\r\n[ \t]+")  # obsolete, and one blank to whom it is sent: RFC 9112, 5.2
_LENGTH = re.compile(r"[0-9]{1,19}")
_CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
_END = b"\r\n\r\n"
_CR, _CR_BYTE = "\r", b"\r"  # which is in no name and no value
_BLANKS = ("\r ", " \r", "\t")


class AnswerError(Exception):
    """What came is not what HTTP/1 has there."""


class FramingError(AnswerError):
    """Nobody can say where the body ends; asking again brings the same."""


class Head(NamedTuple):
    """A head; ``fields`` are its headers by their names in lower case.

    One that comes more than once has its values joined by commas (RFC 9110, 5.3).
    """

    version: str
    status: int
    reason: str
    fields: dict[str, str]

    def tokens(self, name: str) -> list[str]:
        """Return the members of a list, in lower case."""
        parts = self.fields.get(name, "").lower().split(",")
        return [token for part in parts if (token := part.strip(" \t"))]


class Asking(NamedTuple):
    """A request's head; of headers with one name, in lower case in ``fields``, the last counts."""

    method: str
    target: str
    fields: dict[str, str]

    @property
    def has_body(self) -> bool:
        """Whether something comes behind the head."""
        return bool(self.fields.keys() & {"content-length", "transfer-encoding", "upgrade"})


class Framing(NamedTuple):
    """Where a body ends: after ``length`` bytes, by its chunks, or (None) with the connection.

    ``will_close``: the connection bears no other request.
    """

    length: int | None
    is_chunked: bool
    will_close: bool


class _Callbacks:
    """What llhttp calls for a head. *on_header* takes a name and a value."""

    def __init__(self, on_header: Callable[[bytes, bytes], object]) -> None:
        self.on_header = on_header
        self.reason = b""

    def on_status(self, reason: bytes) -> None:
        """Take the reason, or a part of it."""
        self.reason += reason


def read_request(text: bytes) -> Asking:
    """Return the request's head that *text* is, up to the empty line that ends it.

    Raises:
        AnswerError: it is no head of HTTP/1.1.
    """
    found: dict[str, str] = {}
    target = bytearray()

    class Callbacks:
        def on_url(self, part: bytes) -> None:
            target.extend(part)

        def on_header(self, name: bytes, value: bytes) -> None:
            found[name.decode("latin-1").lower()] = value.decode("latin-1").strip(" \t")

    parser = httptools.HttpRequestParser(Callbacks())
    try:
        parser.feed_data(text)
    except httptools.HttpParserUpgrade:
        found["upgrade"] = ""
    except httptools.HttpParserError as error:
        raise AnswerError(str(error)) from None
    if text.count(b"\n") - 2 > _MOST_HEADERS or parser.get_http_version() != "1.1":
        raise AnswerError("no head of HTTP/1.1")
    return Asking(parser.get_method().decode("latin-1"), target.decode("latin-1"), found)


def read_head(text: bytes) -> Head:
    """Return the head that *text* is, up to the empty line that ends it.

    Raises:
        AnswerError: it is none of HTTP/1.0 or 1.1.
    """
    count = text.count(b"\n") - 2
    if count > _MOST_HEADERS:
        raise AnswerError("more headers than anybody needs")
    found: dict[bytes, bytes] = {}  # so that nothing of ours is called between the headers
    try:
        head = _parse(text, found.__setitem__)
    except AnswerError:
        return _read_again(text)
    if found:
        values = _CR_BYTE.join(found.values()).decode("latin-1")
        if values != values.strip(" ") or any(blank in values for blank in _BLANKS):
            values = _CR.join(value.strip(" \t") for value in values.split(_CR))
        names = _names(_CR_BYTE.join(found))  # a server's answers have all the same
        head.fields.update(zip(names, values.split(_CR), strict=True))
    return head if len(head.fields) == count else _read_again(text)


@functools.lru_cache(64)
def _names(joined: bytes) -> tuple[str, ...]:
    return tuple(joined.decode("latin-1").lower().split(_CR))


def _read_again(text: bytes) -> Head:
    """Return the head where there is something about it that is not seen every day."""
    pairs: list[tuple[bytes, bytes]] = []
    text = _FRAMING.sub(b"\n-", _FOLD.sub(b" ", text))
    head = _parse(text, lambda name, value: pairs.append((name, value)))
    for name, value in pairs:
        key, said = name.decode("latin-1").lower(), value.decode("latin-1").strip(" \t")
        key = key[1:] if _MASKED.fullmatch(key) else key
        known = head.fields.get(key)
        head.fields[key] = said if known is None else f"{known}, {said}"
    return head


def _parse(text: bytes, on_header: Callable[[bytes, bytes], object]) -> Head:
    """Return the head without its fields, of which *on_header* is told."""
    callbacks = _Callbacks(on_header)
    parser = httptools.HttpResponseParser(callbacks)
    try:
        parser.feed_data(text)
    except httptools.HttpParserUpgrade:
        raise AnswerError("another protocol, which nobody asked for") from None
    except httptools.HttpParserError as error:
        raise AnswerError(str(error)) from None
    version, status = parser.get_http_version(), parser.get_status_code()
    is_http = text.lstrip(b"\r\n").startswith(b"HTTP/")  # the parser knows RTSP and ICE, too
    if not is_http or version not in ("1.0", "1.1") or status < 100:
        raise AnswerError(f"HTTP/{version} {status:03}" if is_http else "no HTTP")
    return Head(version, status, callbacks.reason.decode("latin-1"), {})


def frame(head: Head, method: str) -> Framing:
    """Return where the body of the answer to a *method* ends, by RFC 9112, 6.3.

    Raises:
        FramingError: the head says so in two ways, or in one that is not known.
    """
    fields, is_old = head.fields, head.version == "1.0"
    will_close = is_old
    if fields.get("connection", "keep-alive") != "keep-alive" or is_old:
        options = head.tokens("connection")
        will_close = "close" in options or (is_old and "keep-alive" not in options)
    length = read_length(fields)
    if head.status in (204, 304) or method in ("HEAD", "CONNECT"):
        return Framing(0, is_chunked=False, will_close=will_close)
    coded = fields.get("transfer-encoding")
    if coded is None:
        return Framing(length, is_chunked=False, will_close=will_close or length is None)
    if head.tokens("transfer-encoding") != ["chunked"] or is_old:
        raise FramingError(f"Transfer-Encoding: {coded[:80]} in HTTP/{head.version}")
    # A length beside it may be an attack on a proxy in between (RFC 9112, 6.1).
    return Framing(None, is_chunked=True, will_close=will_close or length is not None)


def read_length(fields: Mapping[str, str]) -> int | None:
    """Return what Content-Length says, None where that is nothing.

    Raises:
        FramingError: it says two things, or no number.
    """
    text = fields.get("content-length")
    if text is None:
        return None
    if "," in text and len(said := {part.strip(" \t") for part in text.split(",")}) == 1:
        text = said.pop()
    if not _LENGTH.fullmatch(text):
        raise FramingError(f"Content-Length: {fields['content-length'][:80]}")
    return int(text)


class Chunks:
    """A chunked body, as it comes in.

    ``content`` is what was decoded and not taken yet, ``is_whole`` whether the last chunk and the
    trailers, which mean nothing here, were there.
    """

    def __init__(self) -> None:
        self.content = bytearray()
        self.is_whole = False
        self._trailers = self._idle_bytes = 0
        self._before = b""  # the last bytes that came
        self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(_CHUNKED_HEAD)
        self._trailers = 0

    def feed(self, data: memoryview) -> int:
        """Decode *data* and return how much of it is of this body.

        Raises:
            AnswerError: it is not what chunks are.
        """
        text, place = self._before + bytes(data), len(self._before)
        known = len(self.content)
        try:
            while place < len(text) and not self.is_whole:
                # llhttp goes on with what is behind a body: it is never given both at once.
                found = text.find(_END, max(place - len(_END) + 1, 0))
                end = found + len(_END) if found >= 0 else len(text)
                self._parser.feed_data(memoryview(text)[place:end])
                place = end
        except httptools.HttpParserError as error:
            raise AnswerError(f"chunks: {error}") from None
        self._idle_bytes = 0 if len(self.content) > known else self._idle_bytes + len(data)
        if self._idle_bytes > _MOST_IDLE_BYTES or self._trailers > _MOST_HEADERS:
            raise AnswerError("chunks of nothing")
        taken = place - len(self._before)
        self._before = text[-len(_END) + 1 :]
        return taken

    def take(self, buffer: memoryview) -> int:
        """Put what was decoded into *buffer*, as much as there is room for."""
        count = min(len(self.content), len(buffer))
        buffer[:count] = self.content[:count]
        del self.content[:count]
        return count

    def on_header(self, _name: bytes, _value: bytes) -> None:
        """Count trailers."""
        self._trailers += 1

    def on_body(self, data: bytes) -> None:
        """Take what llhttp has decoded."""
        self.content += data

    def on_message_complete(self) -> None:
        """Note the end."""
        self.is_whole = True
