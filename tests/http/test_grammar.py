"""Answers by the RFCs' sections, each read by podloader, by curl and by requests.

``taken`` is what a body has to be, None where the answer has to be refused. Where curl or requests
do otherwise, what they do is written beside it, and why podloader does not.
"""

from __future__ import annotations

import shutil
import subprocess
from contextlib import closing
from dataclasses import dataclass

import pytest
import requests

from loader.errors import FetchError
from loader.http.client import HttpClient
from loader.http.grammar import AnswerError, Chunks
from tests.http.raw import answering

OK = b"HTTP/1.1 200 OK\r\n"
SIZED = OK + b"Content-Length: 3\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ABC = b"3\r\nabc\r\n0\r\n\r\n"
SAME = b"the same"


@dataclass(frozen=True, slots=True)
class Row:
    """An answer, and who makes what of it; *why* is the verdict where they differ."""

    section: str
    answer: bytes
    taken: bytes | None
    curl: bytes | None = SAME
    requests: bytes | None = SAME
    why: str = ""


ROWS = {
    # RFC 9112, 2 and 4: lines
    "a whole answer": Row("9112 2.1", SIZED + b"\r\nabc", b"abc"),
    "HTTP/1.0": Row("9112 2.3", b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"abc"),
    "no reason": Row("9112 4", b"HTTP/1.1 200 \r\nContent-Length: 3\r\n\r\nabc", b"abc"),
    "no blank before no reason": Row(
        "9112 4", b"HTTP/1.1 200\r\nContent-Length: 3\r\n\r\nabc", b"abc"
    ),
    "bare line feeds": Row(
        "9112 2.2", b"HTTP/1.1 200 OK\nContent-Length: 3\n\nabc", None, b"abc", b"abc",
        "a recipient MAY take them; whoever reads them otherwise sees other headers",
    ),
    "a bare carriage return": Row(
        "9112 2.2", OK + b"A: b\rContent-Length: 9\r\nContent-Length: 3\r\n\r\nabc", None,
        b"abc", why="invalid, or a blank; one line to some is two to others",
    ),
    "another protocol": Row("9112 4", b"SSH-2.0-OpenSSH\r\n\r\n", None),
    "RTSP": Row("9112 2.3", b"RTSP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", None),
    "HTTP/2 in words": Row(
        "9112 2.3", b"HTTP/2 200 OK\r\nContent-Length: 3\r\n\r\nabc", None, b"abc", None,
        "its answers are not written like this",
    ),
    "a status of four digits": Row("9112 4", b"HTTP/1.1 2000 OK\r\n\r\n", None),
    # RFC 9112, 5 and RFC 9110, 5: headers
    "a folded header": Row("9112 5.2", SIZED + b"A: b\r\n  c\r\n\r\nabc", b"abc"),
    "a blank before the colon": Row(
        "9112 5.1", OK + b"Content-Length : 3\r\n\r\nabc", None, b"abc", b"abc",
        "a proxy MUST take it away; which of the two names it is, is not certain",
    ),
    "a header without a name": Row(
        "9112 5", SIZED + b": b\r\n\r\nabc", None, b"abc", b"abc", "no grammar has it"
    ),
    "a line that is no header": Row(
        "9112 5", SIZED + b"no header\r\n\r\nabc", None, None, b"abc", "no grammar has it"
    ),
    "a zero byte in a header": Row(
        "9110 5.5", SIZED + b"A: b\0c\r\n\r\nabc", None, None, b"abc", "invalid and dangerous"
    ),
    "bytes above ASCII in a header": Row("9110 5.5", SIZED + b"A: b\xe4\r\n\r\nabc", b"abc"),
    # RFC 9110, 8.6 and RFC 9112, 6.3: lengths
    "a length twice alike": Row("9110 8.6", SIZED + b"Content-Length: 3\r\n\r\nabc", b"abc"),
    "a list of like lengths": Row(
        "9110 8.6", OK + b"Content-Length: 3, 3\r\n\r\nabc", b"abc"
    ),
    "two lengths": Row(
        "9112 6.3", SIZED + b"Content-Length: 5\r\n\r\nabcde", None, b"abcde",
        why="MUST be an error; curl takes the last",
    ),
    "a negative length": Row(
        "9112 6.3", OK + b"Content-Length: -3\r\n\r\nabc", None, None, b"abc", "MUST be an error"
    ),
    "a length with a sign": Row(
        "9112 6.3", OK + b"Content-Length: +3\r\n\r\nabc", None, b"abc", b"abc", "not its grammar"
    ),
    "a length in words": Row(
        "9112 6.3", OK + b"Content-Length: three\r\n\r\nabc", None, None, b"abc",
        "MUST be an error",
    ),
    "a length beyond counting": Row(
        "9110 8.6", OK + b"Content-Length: 99999999999999999999999\r\n\r\nabc", None, b"abc", None,
        "curl reads to the end of the connection",
    ),
    "too few bytes": Row("9112 8", OK + b"Content-Length: 5\r\n\r\nabc", None),
    "no length": Row("9112 6.3", OK + b"\r\nabc", b"abc"),
    # RFC 9112, 6.1 and 7: transfer codings
    "chunks": Row("9112 7.1", CHUNKED + ABC, b"abc"),
    "chunks, in capitals": Row(
        "9112 7", OK + b"Transfer-Encoding: Chunked\r\n\r\n" + ABC, b"abc"
    ),
    "chunks, said twice": Row(
        "9112 6.1", OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + ABC,
        None, b"abc", b"abc", "MUST NOT be applied twice",
    ),
    "gzip, then chunks": Row(
        "9112 6.1", OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + ABC, None, None, b"abc",
        "nobody asked for gzip; requests leaves it undone",
    ),
    "an unknown coding": Row(
        "9112 6.1", OK + b"Transfer-Encoding: sealed\r\n\r\nabc", None, None, b"abc",
        "the bytes are none of the object's",
    ),
    "chunks beside a length": Row(
        "9112 6.3", SIZED + b"Transfer-Encoding: chunked\r\n\r\n" + ABC, b"abc"
    ),
    "chunks in HTTP/1.0": Row(
        "9112 6.1", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + ABC, None,
        b"abc", b"abc", "MUST be treated as if the framing is faulty",
    ),
    "extensions and trailers": Row(
        "9112 7.1.1", CHUNKED + b'3;a=b;c="d"\r\nabc\r\n0\r\nSum: x\r\n\r\n', b"abc"
    ),
    "a chunk too short": Row(
        "9112 7.1", CHUNKED + b"4\r\nabc\r\n0\r\n\r\n", None, b"abc\r",
        why="curl takes the line feed alone for the chunk's end",
    ),
    "a chunk too long": Row(
        "9112 7.1", CHUNKED + b"2\r\nabc\r\n0\r\n\r\n", None, None, None
    ),
    "no last chunk": Row("9112 8", CHUNKED + b"3\r\nabc\r\n", None),
    "chunk sizes in bare lines": Row(
        "9112 7.1", CHUNKED + b"3\nabc\n0\n\n", None, b"abc", None, "as with bare line feeds"
    ),
    "a chunk of a negative size": Row(
        "9112 7.1", CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n", None, None, None
    ),
    "a chunk size with a prefix": Row(
        "9112 7.1", CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n", None, None, b"abc",
        "no grammar has it; Python's int() takes the prefix",
    ),
    "a chunk size beyond counting": Row(
        "9112 7.1", CHUNKED + b"f" * 17 + b"\r\nabc\r\n0\r\n\r\n", None
    ),
    # RFC 9110, 15.2: interim answers
    "100 before it": Row(
        "9110 15.2", b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED + b"\r\nabc", b"abc"
    ),
    "103 before it": Row(
        "9110 15.2", b"HTTP/1.1 103 Hints\r\nLink: </x>\r\n\r\n" + SIZED + b"\r\nabc", b"abc",
        requests=b"", why="http.client takes it for the answer",
    ),
    "an unknown one before it": Row(
        "9110 15.2", b"HTTP/1.1 199 Soon\r\n\r\n" + SIZED + b"\r\nabc", b"abc",
        requests=b"", why="http.client takes it for the answer",
    ),
    "a switch to what nobody asked for": Row(
        "9110 15.2.2", b"HTTP/1.1 101 On\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nabc", None,
        b"abc", b"", "a server MUST NOT",
    ),
}  # fmt: skip


def read(client: HttpClient, url: str) -> bytes:
    with closing(client.get(url)) as stream:
        return stream.read_all(1 << 20)


def by_requests(url: str) -> bytes | None:
    try:
        with requests.Session() as session:
            session.trust_env = False
            return session.get(url, timeout=5, headers={"Accept-Encoding": "identity"}).content
    except (requests.RequestException, ValueError):
        return None


def allowed(row: Row, other: bytes | None) -> set[bytes | None]:
    """Return what another client may make of it: its next version may be right."""
    return {row.taken} if other is SAME else {row.taken, other}


def by_curl(url: str) -> bytes | None:
    command = ["curl", "-sS", "--http1.1", "--noproxy", "*", "--max-time", "5", url]
    done = subprocess.run(command, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


@pytest.mark.parametrize("name", ROWS)
def test_an_answer(name: str, client: HttpClient) -> None:
    row = ROWS[name]
    with answering(row.answer) as origin:
        if row.taken is None:
            with pytest.raises(FetchError):
                read(client, origin.url)
        else:
            assert read(client, origin.url) == row.taken


@pytest.mark.parametrize("name", ROWS)
def test_the_same_by_requests(name: str) -> None:
    row = ROWS[name]
    with answering(row.answer) as origin:
        assert by_requests(origin.url) in allowed(row, row.requests)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("name", ROWS)
def test_the_same_by_curl(name: str) -> None:
    row = ROWS[name]
    with answering(row.answer) as origin:
        assert by_curl(origin.url) in allowed(row, row.curl)


@pytest.mark.parametrize("name", ROWS)
def test_whoever_differs_has_a_reason(name: str) -> None:
    row = ROWS[name]
    others = [other for other in (row.curl, row.requests) if other is not SAME]
    assert bool(row.why) == any(other != row.taken for other in others)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize(
    ("body", "decoded"),
    [
        (ABC, b"abc"),
        (b"6\r\n\r\n\r\n\r\n\r\n0\r\n\r\n", b"\r\n" * 3),
        (b"1\r\na\r\n2\r\nbc\r\n0\r\nA: b\r\nC: d\r\n\r\n", b"abc"),
    ],
)
def test_chunks_end_where_they_end(body: bytes, decoded: bytes, step: int) -> None:
    for behind in (b"", b"\r\n", b"\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"x"):
        chunks, taken, text = Chunks(), 0, body + behind
        while not chunks.is_whole:
            taken += chunks.feed(memoryview(text)[taken : taken + step])
        assert (bytes(chunks.content), text[taken:]) == (decoded, behind)


@pytest.mark.parametrize(
    "endless", [b"0;" + b"x" * 100_000, b"0\r\n" + b"a: b\r\n" * 200, b"0" * 100_000]
)
def test_chunks_of_nothing(endless: bytes) -> None:
    chunks, text = Chunks(), memoryview(endless)

    def feed() -> None:
        for place in range(0, len(endless), 1000):
            chunks.feed(text[place : place + 1000])

    with pytest.raises(AnswerError):
        feed()
