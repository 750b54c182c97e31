"""Sockets against real peers that are fast, slow, silent or gone; TLS in both ways to read it."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import trustme

from loader.config.settings import Settings
from loader.errors import TransientError
from loader.http import openssl, sockets
from loader.http.client import HttpClient, HttpOptions
from loader.http.sockets import BufferedTlsSocket, PlainSocket, TlsSocket, shake_hands
from tests.http.raw import answering

CONTENT = os.urandom(1 << 20) * 8
MEBIBYTE = 1 << 20
Talk = Callable[[socket.socket], None]


@pytest.mark.parametrize(("threads", "size"), [(16, 256 << 10), (128, 64 << 10), (5000, 16 << 10)])
def test_many_threads_share_a_bound(
    monkeypatch: pytest.MonkeyPatch, threads: int, size: int
) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: threads)
    assert len(sockets._ciphertext_buffer()) == size


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class Peer:
    """Connects to a server that says *talk* to whoever comes."""

    def __init__(self, kind: str, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind = kind
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE  # as most servers' default
        authority.issue_cert("127.0.0.1").configure_cert(self._context)
        self._trusting = ssl.create_default_context()
        authority.configure_trust(self._trusting)
        self._ends = contextlib.ExitStack()
        if kind == "buffered":
            monkeypatch.setattr(openssl, "attach", lambda *_: None)

    def connect(self, talk: Talk, timeout_s: float = 5.0) -> PlainSocket:
        """Return the socket of a client whom the server greets with *talk*."""
        listener = self._ends.enter_context(socket.create_server(("127.0.0.1", 0)))
        thread = threading.Thread(target=self._serve, args=(listener, talk), daemon=True)
        thread.start()
        address = listener.getsockname()
        plain = socket.create_connection(address, timeout=timeout_s)
        if self.kind == "plain":
            sock = PlainSocket(plain)
        else:
            sock = shake_hands(plain, self._trusting, "127.0.0.1")
            assert isinstance(sock, TlsSocket if self.kind == "tls" else BufferedTlsSocket)
        self._ends.callback(sock.close)
        return sock

    def close(self) -> None:
        """Close all."""
        self._ends.close()

    def _serve(self, listener: socket.socket, talk: Talk) -> None:
        with contextlib.suppress(OSError):
            accepted, _ = listener.accept()
            if self.kind == "plain":
                spoken: socket.socket = accepted
            else:
                spoken = self._context.wrap_socket(accepted, server_side=True)
            with spoken:
                talk(spoken)


@pytest.fixture(params=["plain", "tls", "buffered"])
def peer(
    request: pytest.FixtureRequest, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Peer]:
    made = Peer(request.param, authority, monkeypatch)
    yield made
    made.close()


@pytest.fixture
def tls_peer(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    made = Peer("tls", authority, monkeypatch)
    yield made
    made.close()


def receive(sock: PlainSocket, count: int, buffer: memoryview) -> list[int]:
    """Return how many bytes each read put into *buffer*, up to *count* or the end."""
    reads: list[int] = []
    digest = hashlib.sha256()
    while sum(reads) < count and (got := sock.recv_into(buffer[: count - sum(reads)])):
        digest.update(buffer[:got])
        reads.append(got)
    assert digest.digest() == hashlib.sha256(CONTENT[: sum(reads)]).digest()
    return reads


def test_a_fast_peers_bytes_come_in_whole_buffers(peer: Peer) -> None:
    def talk(end: socket.socket) -> None:
        for place in range(0, len(CONTENT), 128 << 10):
            end.sendall(CONTENT[place : place + (128 << 10)])
            time.sleep(0.001)

    sock = peer.connect(talk)
    reads = receive(sock, len(CONTENT), memoryview(bytearray(MEBIBYTE)))
    assert sum(reads) == len(CONTENT)
    if peer.kind != "buffered":
        whole = MEBIBYTE if peer.kind == "plain" else MEBIBYTE // 2
        assert sum(1 for count in reads if count == whole) >= 3, reads


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel counts a thread's pauses")
def test_a_thread_sleeps_until_a_whole_buffer_has_come(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    def talk(end: socket.socket) -> None:
        for place in range(0, len(CONTENT), 16 << 10):
            end.sendall(CONTENT[place : place + (16 << 10)])
            time.sleep(0.0002)

    peer = Peer("plain", authority, monkeypatch)
    sock = peer.connect(talk)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    receive(sock, len(CONTENT), memoryview(bytearray(MEBIBYTE)))
    pauses = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before
    assert pauses < len(CONTENT) // (16 << 10) // 4
    peer.close()


def test_a_slow_peers_bytes_are_taken_as_they_come(peer: Peer) -> None:
    def talk(end: socket.socket) -> None:
        end.sendall(CONTENT[: 4 * MEBIBYTE])
        for piece in range(10):
            time.sleep(0.7 if piece < 2 else 0.15)
            end.sendall(CONTENT[:100])

    sock = peer.connect(talk)
    buffer = memoryview(bytearray(MEBIBYTE))
    receive(sock, 4 * MEBIBYTE, buffer)
    counts = [sock.recv_into(buffer)]  # the one that found out how slow it is now
    while sum(counts) < 1000:
        counts.append(sock.recv_into(buffer))
    assert len(counts) >= 7, counts


def test_what_came_before_a_silence_is_not_lost(peer: Peer) -> None:
    release = threading.Event()

    def talk(end: socket.socket) -> None:
        end.sendall(CONTENT[: 5 * MEBIBYTE + 12345])
        release.wait(10)

    sock = peer.connect(talk)
    sock.settimeout(0.8)
    buffer = memoryview(bytearray(MEBIBYTE))
    receive(sock, 5 * MEBIBYTE + 12345, buffer)
    with pytest.raises(TimeoutError):
        sock.recv_into(buffer)
    release.set()


def test_a_short_message_behind_a_read_that_waited_for_more(peer: Peer) -> None:
    """A threshold that stays would keep heads and ends of bodies from waking anybody."""

    def talk(end: socket.socket) -> None:
        end.sendall(CONTENT[:100_000])
        time.sleep(0.3)
        end.sendall(b"head")

    sock = peer.connect(talk)
    buffer = memoryview(bytearray(MEBIBYTE))
    came = sock.recv_into(buffer[:1])
    while came < 100_000:
        sock._due_bytes = MEBIBYTE  # as behind a fast body
        came += sock.recv_into(buffer)
    assert sock._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
    assert sock.recv_some(buffer) == 4


def test_a_silence_is_waited_out(peer: Peer) -> None:
    def talk(end: socket.socket) -> None:
        end.sendall(CONTENT[: 5 * MEBIBYTE + 12345])
        time.sleep(1.5)
        end.sendall(CONTENT[5 * MEBIBYTE + 12345 :])

    sock = peer.connect(talk)
    reads = receive(sock, len(CONTENT), memoryview(bytearray(MEBIBYTE)))
    assert sum(reads) == len(CONTENT)


def test_a_read_that_waits_for_a_whole_buffer_is_ended_from_outside(peer: Peer) -> None:
    release = threading.Event()

    def talk(end: socket.socket) -> None:
        end.sendall(CONTENT[: 5 * MEBIBYTE + 12345])
        release.wait(10)

    sock = peer.connect(talk, timeout_s=60)
    timer = threading.Timer(0.5, sock.shutdown, (socket.SHUT_RDWR,))
    timer.start()
    began = time.monotonic()
    reads = receive(sock, len(CONTENT), memoryview(bytearray(MEBIBYTE)))
    assert sum(reads) == 5 * MEBIBYTE + 12345
    assert time.monotonic() - began < 5
    release.set()


def test_a_reset_in_the_midst(peer: Peer) -> None:
    def talk(end: socket.socket) -> None:
        end.sendall(CONTENT[: 3 * MEBIBYTE])
        time.sleep(0.5)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.socket.close(end)

    sock = peer.connect(talk)
    reads: list[int] = []
    with contextlib.suppress(ConnectionResetError):  # or an end that comes too early
        reads += receive(sock, len(CONTENT), memoryview(bytearray(MEBIBYTE)))
    assert sum(reads) <= 3 * MEBIBYTE


def test_a_peer_that_does_not_shake_hands(authority: trustme.CA) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        plain = socket.create_connection(listener.getsockname(), timeout=0.3)
        with plain, pytest.raises(TimeoutError):
            shake_hands(plain, ssl.create_default_context(), "127.0.0.1")


def test_the_cheapest_of_the_allowed_ciphers_comes_first(tls_peer: Peer) -> None:
    sock = tls_peer.connect(lambda end: end.sendall(CONTENT))
    assert isinstance(sock, TlsSocket)
    cipher = sock._tls.cipher()
    assert cipher is not None
    assert cipher[0] == "TLS_AES_128_GCM_SHA256"


def test_a_closed_connection_writes_nothing_more(tls_peer: Peer) -> None:
    sock = tls_peer.connect(lambda end: end.sendall(CONTENT))
    receive(sock, MEBIBYTE, memoryview(bytearray(MEBIBYTE)))
    fd = sock._sock.fileno()
    sock.close()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert fd in (ours.fileno(), theirs.fileno()), "the descriptor is taken again"
        del sock
        tls_peer.close()
        gc.collect()
        for end in (ours, theirs):
            end.setblocking(False)
            with pytest.raises(BlockingIOError):
                end.recv(1)


@pytest.mark.parametrize("field", ["_PYTHONS", "_HEAD_BYTES", "OPENSSL_VERSION_NUMBER"])
def test_what_is_not_as_known_is_left_alone(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    openssl._library.cache_clear()
    if field == "OPENSSL_VERSION_NUMBER":
        monkeypatch.setattr(ssl, field, 0x10101000)
    else:
        monkeypatch.setattr(openssl, field, {"_PYTHONS": ((2, 7), (3, 0))}.get(field, 24))
    ends = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(*ends, server_hostname="127.0.0.1")
    with socket.socket() as sock:
        assert openssl.attach(tls, *ends, sock.fileno()) is None
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
    openssl._library.cache_clear()


@pytest.mark.parametrize("offset", range(0, 400, 8))
@pytest.mark.parametrize("field", ["_SSL_FIELD", "_BIO_FIELD"])
def test_a_field_elsewhere_is_no_connection_and_no_crash(
    monkeypatch: pytest.MonkeyPatch, field: str, offset: int
) -> None:
    ends = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(*ends, server_hostname="127.0.0.1")
    right = getattr(openssl, field)
    monkeypatch.setattr(openssl, field, offset)
    with socket.socket() as sock:
        found = openssl.attach(tls, *ends, sock.fileno())
        assert (found is not None) == (offset == right)


def test_another_connections_ends_prove_nothing() -> None:
    ends, others = [(ssl.MemoryBIO(), ssl.MemoryBIO()) for _ in range(2)]
    tls = ssl.create_default_context().wrap_bio(*ends, server_hostname="127.0.0.1")
    with socket.socket() as sock:
        assert openssl.attach(tls, *others, sock.fileno()) is None
        assert openssl.attach(tls, ends[1], ends[0], sock.fileno()) is None
        assert openssl.attach(tls, *ends, sock.fileno()) is not None


def test_memory_that_is_not_there_is_no_bytes() -> None:
    assert openssl.copy_memory(8, 512) == b""
    assert openssl.copy_memory(2**63, 512) == b""
    assert openssl.copy_memory(id(ssl), 16) != b""


def test_the_setting_leaves_reading_to_python(authority: trustme.CA) -> None:
    assert Settings.without_config({"openssl_reads": False}).openssl_reads is False
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        plain = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
        thread = threading.Thread(target=lambda: server.wrap_socket(peer, server_side=True).close())
        thread.start()
        with contextlib.closing(
            shake_hands(plain, trusting, "127.0.0.1", openssl_reads=False)
        ) as sock:
            assert isinstance(sock, BufferedTlsSocket)
        thread.join()


def test_what_was_closed_is_not_read_any_more() -> None:
    """Its descriptor's number may be another connection's by then."""
    here, there = socket.socketpair()
    with here, there:
        sock = PlainSocket(here)
        sock.hold()
        sock.close()
        sock.hold()  # who still reads may go on
        sock.let_go()
        assert here.fileno() >= 0
        sock.let_go()
        assert here.fileno() < 0
        with pytest.raises(ConnectionAbortedError):
            sock.hold()


def test_an_answer_that_another_thread_has_given_up() -> None:
    def talk(sock: socket.socket, request: bytes) -> None:
        sock.sendall(b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-0/1\r\nContent-Length: 1\r\n\r\nx")

    with answering(talk) as origin, closing(HttpClient(HttpOptions())) as client:
        sent = client.send(origin.url, span=(0, 1))
        sent.close()
        with pytest.raises(TransientError):
            client.receive(sent, origin.url, span=(0, 1))
