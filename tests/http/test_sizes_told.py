"""Objects whose size is told in a strange way, or not at all."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from loader.errors import FetchError, TransientError
from loader.fetch.snapshot import FetchOptions, fetch
from loader.http.client import HttpClient, HttpOptions
from loader.http.objects import ObjectInfo
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest
from tests.http.raw import RawOrigin, answering

CONTENT = bytes(range(256)) * 1200
RANGE = re.compile(rb"Range: bytes=(\d+)-(\d+)")


def bring(origin: RawOrigin, root: Path, size: int | None, retries: int = 2) -> bytes:
    store = PresignedStore(HttpClient(HttpOptions(stall_timeout_s=1)))
    with closing(store):
        file = Artifact("j", 0, "x", f"{origin.url}/x", size)
        options = FetchOptions(retries=retries, deadline_s=20)
        snapshot = fetch(Manifest((file,)), root, store, options)
    return (snapshot.root / snapshot.files[0].path).read_bytes()


def whole(content: bytes = CONTENT, *, chunked: bool) -> bytes:
    if not chunked:
        return b"HTTP/1.1 200 OK\r\n\r\n" + content
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    cuts = range(0, len(content), 5000)
    pieces = (content[i : i + 5000] for i in cuts)
    return head + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("content", [CONTENT, b"small"])
@pytest.mark.parametrize("listed", [True, False])
def test_no_length_and_no_ranges(
    content: bytes, chunked: bool, listed: bool, tmp_path: Path
) -> None:
    with answering(whole(content, chunked=chunked)) as origin:
        assert bring(origin, tmp_path, len(content) if listed else None) == content


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1, 10, 0])
def test_no_length_and_another_size_in_the_listing(
    size: int, chunked: bool, tmp_path: Path
) -> None:
    with answering(whole(chunked=chunked)) as origin, pytest.raises(FetchError):
        bring(origin, tmp_path, size)
    assert not (tmp_path / "j/rank-0/x").exists()


EMPTY = [
    b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-0/0\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-0/0\r\nContent-Length: 1\r\n\r\nx",
    b"HTTP/1.1 206 P\r\nContent-Range: bytes 0--1/0\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 206 P\r\nContent-Range: bytes */0\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 416 R\r\nContent-Range: bytes */0\r\nContent-Length: 3\r\n\r\nerr",
    b"HTTP/1.1 416 R\r\nContent-Range: Bytes */0\r\nContent-Length: 0\r\n\r\n",
]
REFUSED = [
    b"HTTP/1.1 416 R\r\nContent-Range: bytes */*\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 416 R\r\nContent-Range: bytes 0\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 416 R\r\nContent-Length: 0\r\n\r\n",
]


@pytest.mark.parametrize("said", EMPTY)
@pytest.mark.parametrize("size", [0, None])
def test_an_empty_object(said: bytes, size: int | None, tmp_path: Path) -> None:
    with answering(said) as origin:
        assert bring(origin, tmp_path, size) == b""


@pytest.mark.parametrize("said", REFUSED)
@pytest.mark.parametrize("content", [b"", b"small", CONTENT])
@pytest.mark.parametrize("listed", [True, False])
def test_ranges_that_are_refused(said: bytes, content: bytes, listed: bool, tmp_path: Path) -> None:
    def talk(sock: socket.socket, request: bytes) -> bool:
        whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content
        sock.sendall(said if RANGE.search(request) else whole)
        return True

    with answering(talk) as origin:
        assert bring(origin, tmp_path, len(content) if listed else None) == content


@pytest.mark.parametrize("held", [b"0-9/1024", b"1-10/11", b"0-9/9"])
def test_a_part_that_calls_itself_all(held: bytes, tmp_path: Path) -> None:
    said = b"HTTP/1.1 200 OK\r\nContent-Range: bytes %s\r\nContent-Length: 10\r\n\r\n" % held
    with answering(said + b"0123456789") as origin, pytest.raises(FetchError, match="which bytes"):
        bring(origin, tmp_path, None)


@pytest.mark.parametrize("held", [b"0-9/10", b"0-9/*", b"*/10"])
def test_all_that_calls_itself_a_range(held: bytes, tmp_path: Path) -> None:
    said = b"HTTP/1.1 200 OK\r\nContent-Range: bytes %s\r\nContent-Length: 10\r\n\r\n" % held
    with answering(said + b"0123456789") as origin:
        assert bring(origin, tmp_path, None) == b"0123456789"


def ranged(unit: bytes, total: bytes, *, tells_whole: bool = True) -> Callable[..., bool]:
    """Answer with ranges, in this unit and of this total."""

    def talk(sock: socket.socket, request: bytes) -> bool:
        found = RANGE.search(request)
        if found is None:
            assert tells_whole
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT)
            return True
        start, end = int(found[1]), min(int(found[2]) + 1, len(CONTENT))
        said = b"%s %d-%d/%s" % (unit, start, end - 1, total)
        head = b'HTTP/1.1 206 P\r\nETag: "1"\r\nContent-Range: ' + said
        sock.sendall(head + b"\r\nContent-Length: %d\r\n\r\n" % (end - start) + CONTENT[start:end])
        return True

    return talk


@pytest.mark.parametrize("unit", [b"bytes", b"Bytes", b"BYTES"])
@pytest.mark.parametrize("total", [b"%d" % len(CONTENT), b"*"])
@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_content_range(unit: bytes, total: bytes, size: int | None, tmp_path: Path) -> None:
    with answering(ranged(unit, total)) as origin:
        assert bring(origin, tmp_path, size) == CONTENT


@pytest.mark.parametrize(
    "said",
    [
        b"bytes 0-9",
        b"bytes=0-9/10",
        b"bytes 0-9/10/10",
        b"bytes 9-0/10",
        b"bytes 0 - 9/10",
        b"items 0-9/10",
        b"bytes 0-9/-1",
        "bytes 0-\N{SUPERSCRIPT TWO}/10".encode("latin-1"),
        b"bytes 0-9/10, bytes 0-9/10",
    ],
)
def test_what_is_no_content_range(said: bytes, client: HttpClient) -> None:
    head = b"HTTP/1.1 206 P\r\nContent-Length: 10\r\nContent-Range: " + said
    with answering(head + b"\r\n\r\n0123456789") as origin, pytest.raises(FetchError):
        client.get(f"{origin.url}/x", span=(0, 10))


def test_ranges_of_a_known_version_need_no_total(client: HttpClient) -> None:
    with answering(ranged(b"bytes", b"*")) as origin:
        version = ObjectInfo(len(CONTENT), '"1"')
        with closing(client.get(origin.url, span=(5, 10), version=version)) as stream:
            assert stream.read_all(100) == CONTENT[5:10]


def test_a_body_that_always_ends_early_is_not_asked_for_for_ever(tmp_path: Path) -> None:
    head = b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: %d\r\n\r\n' % len(CONTENT)
    with answering(head + CONTENT[:150_000]) as origin:
        with pytest.raises(TransientError):
            bring(origin, tmp_path, len(CONTENT), retries=3)
        assert len(origin.requests) <= 6


def test_a_body_that_comes_further_each_time_is_gone_on_with(tmp_path: Path) -> None:
    ends = iter(range(70_000, len(CONTENT) + 70_000, 70_000))

    def talk(sock: socket.socket, request: bytes) -> bool:
        head = b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: %d\r\n\r\n' % len(CONTENT)
        sock.sendall(head + CONTENT[: next(ends)])
        return False

    with answering(talk) as origin:
        assert bring(origin, tmp_path, len(CONTENT), retries=1) == CONTENT
        assert len(origin.requests) > 3


def test_an_object_that_is_asked_for_without_a_range(client: HttpClient) -> None:
    with answering(whole(chunked=True)) as origin:
        with closing(client.get(origin.url, is_object=True)) as stream:
            assert stream.info.size_bytes == len(CONTENT)
            assert stream.read_all(1 << 20) == CONTENT
        with pytest.raises(FetchError, match="does not tell"):
            client.head(origin.url)


def at_length(length: int, form: str) -> Callable[[socket.socket, bytes], bool]:
    """Answer a range with a body of another *length* than its Content-Range says."""

    def talk(sock: socket.socket, request: bytes) -> bool:
        found = RANGE.search(request)
        assert found is not None
        start, end = int(found[1]), min(int(found[2]) + 1, len(CONTENT))
        body = (CONTENT[start:end] + b"y" * length)[: end - start + length]
        head = b'HTTP/1.1 206 P\r\nETag: "1"\r\nContent-Range: bytes %d-%d/%d\r\n' % (
            start,
            end - 1,
            len(CONTENT),
        )
        if form == "length":
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        elif form == "chunks":
            sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body)
            sock.sendall(b"\r\n0\r\n\r\n")
        else:
            sock.sendall(head + b"\r\n" + body)
        return form != "end"

    return talk


@pytest.mark.parametrize("form", ["length", "chunks", "end"])
@pytest.mark.parametrize("length", [-1, 0, 1, 5000])
def test_a_range_is_as_long_as_it_says(form: str, length: int, tmp_path: Path) -> None:
    with answering(at_length(length, form)) as origin:
        if not length:
            assert bring(origin, tmp_path, len(CONTENT), retries=0) == CONTENT
            return
        with pytest.raises(FetchError):
            bring(origin, tmp_path, len(CONTENT), retries=0)
    assert not (tmp_path / "j/rank-0/x").exists()
