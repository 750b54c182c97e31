"""Heads of requests and answers, and those that are none."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from loader.http.grammar import AnswerError
from loader.http.response import Answer, Inbox, UnansweredError, request_head
from loader.http.sockets import PlainSocket

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def answer_of(text: bytes, method: str = "GET") -> tuple[Answer, bytes]:
    """Return the answer, and its body."""
    here, there = socket.socketpair()
    with here, there:
        there.sendall(text)
        there.shutdown(socket.SHUT_WR)
        answer = Answer(Inbox(PlainSocket(here)), method)
        return answer, answer.read(1 << 20)


@pytest.mark.parametrize(
    ("text", "body", "closes"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab", b"ab", False),
        (b"HTTP/1.1 200\r\ncontent-length:2\r\nConnection: Close\r\n\r\nab", b"ab", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nab", b"ab", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nab", b"ab", False),
        (b"HTTP/1.1 200 OK\r\n\r\nto the end", b"to the end", True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", False),
        (b"HTTP/1.1 100 Go on\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", b"x", False),
        (CHUNKED + b"2\r\nab\r\n1;x=y\r\nc\r\n0\r\nSum: z\r\n\r\n", b"abc", False),
    ],
)
def test_bodies_end_where_the_head_says(text: bytes, body: bytes, closes: bool) -> None:
    answer, found = answer_of(text)
    assert found == body
    assert answer.will_close is closes


def test_an_answer_to_head_has_no_body() -> None:
    answer, _ = answer_of(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "HEAD")
    assert (answer.length, answer.fields) == (0, {"content-length": "9"})


def test_fields_that_come_twice_are_joined() -> None:
    answer, _ = answer_of(b"HTTP/1.1 204 -\r\nX-Sum: a=1\r\nx-sum:  b=2 \r\nEmpty:\r\n\r\n")
    assert answer.fields == {"x-sum": "a=1, b=2", "empty": ""}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno name\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\na: " + b"b" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nServer: x\r\n",
        CHUNKED + b"no size\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"-2\r\nab\r\n0\r\n\r\n",
        CHUNKED + b"2\r\nabc\r\n0\r\n\r\n",
        CHUNKED + b"4\r\nab",
        CHUNKED + b"2\r\nab\r\n",
        CHUNKED + b"0\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        CHUNKED + b"0" * 70_000,
    ],
)
def test_what_is_no_answer(text: bytes) -> None:
    with pytest.raises((AnswerError, UnansweredError)):
        answer_of(text)


@pytest.mark.parametrize(
    ("target", "headers"),
    [("/a b", {}), ("/a\r\nX: y", {}), ("/ä", {}), ("/", {"Range": "x\r\nHost: other"})],
)
def test_nothing_breaks_out_of_its_line(target: str, headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="control"):
        request_head("GET", target, headers)


def test_a_request() -> None:
    assert request_head("GET", "/x?y", {"Host": "h"}) == b"GET /x?y HTTP/1.1\r\nHost: h\r\n\r\n"


def test_a_head_may_come_in_pieces() -> None:
    here, there = socket.socketpair()
    with here, there:
        text = b"HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 2\r\n\r\nxy"

        def send() -> None:
            for place in range(0, len(text), 7):
                there.sendall(text[place : place + 7])
                time.sleep(0.005)

        thread = threading.Thread(target=send)
        thread.start()
        answer = Answer(Inbox(PlainSocket(here)), "GET")
        assert answer.fields == {"a": "b", "content-length": "2"}
        assert answer.read(9) == b"xy"
        thread.join()


def test_answers_that_come_at_once_are_read_one_by_one() -> None:
    here, there = socket.socketpair()
    with here, there:
        plain = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab"
        there.sendall(plain + CHUNKED + b"1\r\nc\r\n0\r\n\r\n" + plain)
        inbox = Inbox(PlainSocket(here))
        bodies = [Answer(inbox, "GET").read(9) for _ in range(3)]
        assert bodies == [b"ab", b"c", b"ab"]
        assert inbox.held_bytes == 0


def test_a_head_and_a_body_that_are_longer_than_one_read() -> None:
    head = b"HTTP/1.1 200 OK\r\nA: " + b"b" * 50_000 + b"\r\nContent-Length: 100000\r\n\r\n"
    answer, body = answer_of(head + b"x" * 100_000)
    assert (len(answer.fields["a"]), body) == (50_000, b"x" * 100_000)
