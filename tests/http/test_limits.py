"""Peers that never fall silent for long, and never come to an end either."""

from __future__ import annotations

import itertools
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from loader.errors import FetchError, ListingError, TransientError
from loader.fetch.range_read import read_range
from loader.fetch.snapshot import FetchOptions, fetch, read_artifact
from loader.http import openssl, pool
from loader.http.client import HttpClient, HttpOptions
from loader.http.objects import ObjectInfo
from loader.stores.presigned import PresignedStore, UrlListing
from loader.types import Artifact, Manifest
from tests.http.raw import Talk, answering

SOON = HttpOptions(connect_timeout_s=0.4, stall_timeout_s=0.4)
GENEROUS_S = 8.0  # far from what an endless peer takes


def trickle(sock: socket.socket, pieces: Iterable[bytes], pause_s: float = 0.02) -> None:
    """Send a piece every now and then, without an end."""
    for piece in pieces:
        sock.sendall(piece)
        time.sleep(pause_s)


def cut_off(client: HttpClient, url: str) -> float:
    """Return how long it took to find out that nothing will come of it."""
    began = time.monotonic()
    with pytest.raises(FetchError), closing(client.get(url)) as stream:
        stream.read_all(1 << 20)
    return time.monotonic() - began


HEADS = {
    "a head": (b"HTTP/1.1 200 OK\r\nA: ", [b"b"]),
    "100 Continue": (b"", [b"HTTP/1.1 100 Continue\r\n\r\n"]),
    "100 Continue at once": (b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, [b"HTTP/1.1 100 C\r\n\r\n"]),
    "a listing's body": (b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n", [b"x"]),
    "a body without a length": (b"HTTP/1.1 200 OK\r\n\r\n", [b"x"]),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", [b"1\r\nx\r\n"]),
    "an extension of a chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;",
        [b"x"],
    ),
    "a refusal's body": (b"HTTP/1.1 403 No\r\nContent-Length: 60000\r\n\r\n", [b"x"]),
    "a redirect's head": (b"HTTP/1.1 302 Found\r\nLocation: /", [b"x"]),
}


@pytest.mark.parametrize("kind", ["plain", "tls", "buffered tls"])
@pytest.mark.parametrize("name", HEADS)
def test_an_endless(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, pieces = HEADS[name]

    def talk(sock: socket.socket, request: bytes) -> None:
        sock.sendall(first)
        trickle(sock, itertools.cycle(pieces))

    context, options = None, SOON
    if kind != "plain":
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        options = HttpOptions(2, 0.4, ca_bundle=tmp_path / "ca.pem")
    if kind == "buffered tls":
        monkeypatch.setattr(openssl, "attach", lambda *_: None)
    with answering(talk, context) as origin, closing(HttpClient(options)) as client:
        assert cut_off(client, origin.url) < GENEROUS_S


def in_silence(sock: socket.socket) -> None:
    time.sleep(60)


def in_small_pieces(sock: socket.socket) -> None:
    # The beginning of a TLS record of 16 KiB, which a client reads on and on.
    trickle(
        sock, itertools.chain([b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc"], itertools.cycle([b"x"]))
    )


@pytest.mark.parametrize("say", [in_silence, in_small_pieces])
@pytest.mark.parametrize("buffered", [False, True])
def test_a_handshake_without_an_end(
    say: Callable[[socket.socket], None], buffered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if buffered:
        monkeypatch.setattr(openssl, "attach", lambda *_: None)

    def serve() -> None:
        with suppress(OSError), listener.accept()[0] as taken:
            say(taken)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        with closing(HttpClient(SOON)) as client:
            assert cut_off(client, f"https://127.0.0.1:{listener.getsockname()[1]}/") < GENEROUS_S


CONTENT = bytes(range(256)) * 16


def slow_once(count: int = 1) -> Talk:
    """Let the first body, or so many, come at 2 bytes in a while."""
    left = itertools.count()

    def talk(sock: socket.socket, request: bytes) -> bool:
        start, end = 0, len(CONTENT)
        for line in request.split(b"\r\n"):
            if line.startswith(b"Range: bytes="):
                first, _, last = line.removeprefix(b"Range: bytes=").partition(b"-")
                start, end = int(first), min(int(last) + 1, end)
        head = b"HTTP/1.1 206 P\r\nContent-Range: bytes %d-%d/%d\r\n" % (
            start,
            end - 1,
            len(CONTENT),
        )
        head += b'ETag: "1"\r\nContent-Length: %d\r\n\r\n' % (end - start)
        sock.sendall(head)
        body = CONTENT[start:end]
        if end - start > 1 and next(left) < count:
            trickle(sock, (body[i : i + 2] for i in range(0, len(body), 2)), 0.1)
        sock.sendall(body)
        return True

    return talk


@pytest.mark.parametrize("way", ["fetch", "ranges", "small file"])
def test_every_way_cuts_a_slow_connection(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_PATIENCE_S", 0.3)
    began = time.monotonic()
    store = PresignedStore(HttpClient(HttpOptions()))
    with answering(slow_once()) as origin, closing(store):
        artifact = Artifact("j", 0, "x.json", f"{origin.url}/x.json")
        if way == "fetch":
            snapshot = fetch(Manifest((artifact,)), tmp_path, store, FetchOptions())
            assert (snapshot.root / snapshot.files[0].path).read_bytes() == CONTENT
        elif way == "small file":
            assert read_artifact(artifact, tmp_path, store) == CONTENT
        else:
            found = bytearray(len(CONTENT))
            read_range(artifact, store, ObjectInfo(len(CONTENT), '"1"'), 0, memoryview(found), 3)
            assert found == CONTENT
    assert time.monotonic() - began < GENEROUS_S


def test_more_patience_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_PATIENCE_S", 0.5)
    connections, waits = pool.Pool(1, 3.0), []
    for _ in range(4):
        waits.append(connections.patience_s("u"))
        connections.note_slow("u")
    assert waits == [0.5, 1.0, 2.0, 3.0]
    assert connections.patience_s("other") == 0.5


def test_the_least_rate_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_PATIENCE_S", 0.2)

    def talk(sock: socket.socket, request: bytes) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n")
        trickle(sock, [b"xx"] * 20, 0.05)

    def read(least: int) -> bytes:
        client = HttpClient(HttpOptions(least_bytes_per_s=least))
        with closing(client), closing(client.get(origin.url)) as stream:
            return stream.read_all(100)

    with answering(talk) as origin:
        assert read(4) == b"x" * 40
        with pytest.raises(TransientError) as caught:
            read(4000)
    assert caught.value.expected == "at least 4000 bytes a second"


def test_a_listing_is_not_waited_for_without_an_end() -> None:
    def talk(sock: socket.socket, request: bytes) -> None:
        text = json.dumps({"job": {"id": "j"}, "checkpoint_artifacts": []}).encode()
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(text) + 9999))
        trickle(sock, itertools.cycle([b" "]))

    with answering(talk) as origin, closing(HttpClient(SOON)) as client:
        listing = UrlListing(origin.url, client)
        with pytest.raises((FetchError, ListingError)):
            listing.read()


def test_giving_up_soon_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_PATIENCE_S", 0.3)
    with answering(slow_once(2)) as origin:
        store = PresignedStore(HttpClient(HttpOptions()))
        with closing(store):
            artifact, info = (
                Artifact("j", 0, "x", f"{origin.url}/x"),
                ObjectInfo(len(CONTENT), '"1"'),
            )
            found = bytearray(len(CONTENT))
            read_range(artifact, store, info, 0, memoryview(found), 0)
            assert found == CONTENT
    with answering(slow_once(9)) as origin:
        store = PresignedStore(HttpClient(HttpOptions(stall_timeout_s=0.5)))
        with closing(store):
            artifact = replace(artifact, url=f"{origin.url}/x")
            with pytest.raises(TransientError):
                read_range(artifact, store, info, 0, memoryview(bytearray(len(CONTENT))), 0)
