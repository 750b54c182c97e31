"""Connections that bear more than one request, and bytes that nobody asked for on them."""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import trustme

from loader.fetch.snapshot import FetchOptions, fetch
from loader.http import openssl
from loader.http.client import HttpClient, HttpOptions
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest
from tests.http.raw import answering

FILES = {f"{i}.bin": bytes([65 + i]) * 3000 for i in range(8)}  # of one size
RANGE = re.compile(rb"Range: bytes=(\d+)-(\d+)")
Send = Callable[[socket.socket, bytes], None]
Transport = tuple[ssl.SSLContext | None, Path | None]


def twice(sock: socket.socket, answer: bytes) -> None:
    sock.sendall(answer + answer)


def twice_apart(sock: socket.socket, answer: bytes) -> None:
    sock.sendall(answer)
    time.sleep(0.02)
    sock.sendall(answer)


def with_an_error(sock: socket.socket, answer: bytes) -> None:
    sock.sendall(answer + b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def with_a_line(sock: socket.socket, answer: bytes) -> None:
    sock.sendall(answer + b"\r\n")


def with_some_bytes(sock: socket.socket, answer: bytes) -> None:
    sock.sendall(answer + b"xyz")


def with_half_an_answer(sock: socket.socket, answer: bytes) -> None:
    sock.sendall(answer + answer[:40])


def with_another(sock: socket.socket, answer: bytes) -> None:
    other = b"z" * 3000
    sock.sendall(answer + b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n" + other)


def once(sock: socket.socket, answer: bytes) -> None:
    sock.sendall(answer)


STRAYS = [
    twice,
    twice_apart,
    with_an_error,
    with_a_line,
    with_some_bytes,
    with_half_an_answer,
    with_another,
]


def object_of(request: bytes, extra: bytes = b"") -> bytes:
    """Return the answer that a request for one of the files should have."""
    name = request.split()[1].decode().partition("?")[0].rpartition("/")[2]
    content = FILES[name]
    found = RANGE.search(request)
    if found is None:
        head = b"HTTP/1.1 200 OK\r\n"
    else:
        start, end = int(found[1]), min(int(found[2]) + 1, len(content))
        head = b"HTTP/1.1 206 Partial Content\r\n"
        head += b"Content-Range: bytes %d-%d/%d\r\n" % (start, end - 1, len(content))
        content = content[start:end]
    return head + extra + b"Content-Length: %d\r\n\r\n" % len(content) + content


def chunked(answer: bytes) -> bytes:
    head, _, body = answer.partition(b"\r\n\r\n")
    head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
    return head + b"\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(params=["plain", "tls", "buffered tls"])
def transport(
    request: pytest.FixtureRequest,
    authority: trustme.CA,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Transport:
    """A server's context and a client's bundle, None where TLS is not spoken."""
    if request.param == "plain":
        return None, None
    if request.param == "buffered tls":
        monkeypatch.setattr(openssl, "attach", lambda *_: None)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(bundle)
    return context, bundle


@pytest.mark.parametrize("send", [once, *STRAYS])
@pytest.mark.parametrize(
    ("extra", "form"), [(b"", bytes), (b'ETag: "same"\r\n', bytes), (b"", chunked)]
)
def test_what_nobody_asked_for_is_no_answer(
    send: Send,
    extra: bytes,
    form: Callable[[bytes], bytes],
    transport: Transport,
    tmp_path: Path,
) -> None:
    context, bundle = transport

    def talk(sock: socket.socket, request: bytes) -> bool:
        send(sock, form(object_of(request, extra)))
        return True

    options = HttpOptions(stall_timeout_s=2, ca_bundle=bundle)
    with answering(talk, context) as origin, closing(PresignedStore(HttpClient(options))) as store:
        files = tuple(Artifact("j", 0, name, f"{origin.url}/{name}?s=1") for name in FILES)
        snapshot = fetch(Manifest(files), tmp_path / "d", store, FetchOptions(concurrency=2))
    folder = snapshot.root / "j/rank-0"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    if send is not once:
        assert origin.connections > 1


def test_one_connection_is_enough_for_who_answers_once() -> None:
    def talk(sock: socket.socket, request: bytes) -> bool:
        sock.sendall(object_of(request))
        return True

    with answering(talk) as origin, closing(HttpClient(HttpOptions())) as client:
        for name, content in FILES.items():
            with closing(client.get(f"{origin.url}/{name}")) as stream:
                assert stream.read_all(5000) == content
        assert origin.connections == 1


def test_files_alike_are_asked_for_on_their_own() -> None:
    def talk(sock: socket.socket, request: bytes) -> bool:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")
        return True

    with answering(talk) as origin, closing(HttpClient(HttpOptions())) as client:
        for name in FILES:
            with closing(client.get(f"{origin.url}/{name}")) as stream:
                assert stream.read_all(5000) == b"abc"
        assert len(origin.requests) < 2 * len(FILES)


def test_what_comes_to_an_idle_connection(transport: Transport) -> None:
    context, bundle = transport
    late = threading.Event()

    def talk(sock: socket.socket, request: bytes) -> bool:
        sock.sendall(object_of(request))
        time.sleep(0.05)
        with_another(sock, b"")
        late.set()
        return True

    options = HttpOptions(ca_bundle=bundle)
    with answering(talk, context) as origin, closing(HttpClient(options)) as client:
        for name, content in FILES.items():
            late.clear()
            with closing(client.get(f"{origin.url}/{name}")) as stream:
                assert stream.read_all(5000) == content
            assert late.wait(5)
        assert origin.connections == len(FILES)


@pytest.mark.parametrize("stray", ["a copy", "all of another object"])
def test_what_comes_just_when_the_next_is_asked_for(
    stray: str, transport: Transport, tmp_path: Path
) -> None:
    context, bundle = transport
    before: dict[socket.socket, bytes] = {}

    def talk(sock: socket.socket, request: bytes) -> bool:
        answer = object_of(request)
        if sock in before:
            other = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"
            sock.sendall(before[sock] if stray == "a copy" else other)
        before[sock] = answer
        sock.sendall(answer)
        return True

    options = HttpOptions(stall_timeout_s=2, ca_bundle=bundle)
    with answering(talk, context) as origin, closing(PresignedStore(HttpClient(options))) as store:
        files = tuple(Artifact("j", 0, name, f"{origin.url}/{name}?s=1") for name in FILES)
        snapshot = fetch(Manifest(files), tmp_path / "d", store, FetchOptions(concurrency=2))
    folder = snapshot.root / "j/rank-0"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


def test_an_answer_behind_a_tunnels_is_none() -> None:
    from loader.http.grammar import AnswerError
    from loader.http.proxies import Proxy, open_tunnel

    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")
        with pytest.raises(AnswerError):
            open_tunnel(here, Proxy("h", 1), "x:443")
