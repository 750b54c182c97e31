"""The beginning of an HTTP/1.1 exchange: the request's head, and the answer's.

Bodies are http.client's. Its heads are not: they go through the standard library's parser of mail,
which costs several times as much.
"""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator, Mapping

_LONGEST_LINE = 65536
_MOST_HEADERS = 100
_UNSAFE = re.compile(r"[^\x21-\x7e]")  # in a request's target


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


class Answer(http.client.HTTPResponse):
    """An HTTPResponse whose headers are a dict by their names in lower case.

    A header that comes more than once has its values joined by commas (RFC 9110, 5.3).
    """

    fields: dict[str, str]

    def begin(self) -> None:
        """Read status and headers.

        Raises:
            http.client.HTTPException: they are not what HTTP/1 has there.
        """
        status = 100
        while status == 100:  # an interim answer comes before the real one
            lines = self._lines()
            version, status, self.reason = _status_line(next(lines, ""))
            self.fields = _fields(lines)
        self.code = self.status = status
        self.version = 10 if version == "HTTP/1.0" else 11
        self.chunked = self.fields.get("transfer-encoding", "").lower() == "chunked"
        self.chunk_left = None
        self.length = self._body_length()
        connection = self.fields.get("connection", "").lower()
        self.will_close = (
            "close" in connection
            or (self.version == 10 and "keep-alive" not in connection)
            or (not self.chunked and self.length is None)
        )

    def _body_length(self) -> int | None:
        """Return the body's length, None where its end tells it."""
        if self.status in (204, 304) or self._method == "HEAD":  # type: ignore[attr-defined]
            return 0
        length = self.fields.get("content-length", "")
        return int(length) if length.isdecimal() and not self.chunked else None

    def _lines(self) -> Iterator[str]:
        """Return the lines of the head, which most often has come whole."""
        head, end, _ = self.fp.peek().partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        if end and not any("\n" in line for line in lines):
            self.fp.read(len(head) + len(end))
            return iter(lines)
        return iter(self._next_line, "")

    def _next_line(self) -> str:
        line = self.fp.readline(_LONGEST_LINE + 1)
        if len(line) > _LONGEST_LINE:
            raise http.client.LineTooLong("header")
        if not line:
            raise http.client.RemoteDisconnected("closed without an answer")
        return line.decode("latin-1").rstrip("\r\n")


def _status_line(line: str) -> tuple[str, int, str]:
    version, _, rest = line.partition(" ")
    code, _, reason = rest.strip().partition(" ")
    if not version.startswith("HTTP/1.") or len(code) != 3 or not code.isdecimal():
        raise http.client.BadStatusLine("no HTTP/1 answer")
    return version, int(code), reason.strip()


def _fields(lines: Iterator[str]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for count, line in enumerate(lines):
        name, colon, value = line.partition(":")
        if not colon:
            raise http.client.HTTPException("a header without a name")
        if count >= _MOST_HEADERS:
            raise http.client.HTTPException("more headers than anybody needs")
        name, value = name.lower(), value.strip()
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields
