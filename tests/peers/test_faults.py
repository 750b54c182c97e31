"""Peers that are dead, shut off, of another version or out of time: what is done about each."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from loader.peers.chunks import CHUNK_BYTES
from loader.types import Artifact, Checksum
from tests.origin import FaultyOrigin
from tests.peers.conftest import CONTENT, MakePod, TestPod, free_ports, sent_copies

# asyncio may leave a socket to the collector where its loop is stopped midway, as a pod's is here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def fetch_all(pods: list[TestPod], weights: Artifact) -> None:
    with ThreadPoolExecutor(len(pods)) as pool:
        for found in pool.map(lambda pod: pod.fetch(weights), pods):
            assert found == CONTENT


def wait_for(pods: list[TestPod], count: int) -> None:
    while any(len(pod.sharing._members.living()) < count for pod in pods):
        time.sleep(0.01)


@contextmanager
def firewalled() -> Iterator[int]:
    """Give a port whose connections are never made: what its queue has no room for is dropped."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(8):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        yield int(server.getsockname()[1])


class Muted:
    """A peer that says who it is, and from then on nothing: a firewall shut behind it."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.asked: list[float] = []
        self._is_shut = False
        self._open: list[socket.socket] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            self._open.append(sock)
            threading.Thread(target=self._answer, args=(sock,), daemon=True).start()

    def _answer(self, sock: socket.socket) -> None:
        try:
            asked = sock.recv(4096)
            if b" /hello " in asked and not self._is_shut:
                self._is_shut = True
                body = b'{"id": "%d", "nonce": "n"}\n' % self.port
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            elif b" /objects/" in asked:
                self.asked.append(time.monotonic())
        except OSError:
            return

    def close(self) -> None:
        for sock in (self._server, *self._open):
            sock.close()


def test_three_hundred_peers_of_which_all_but_ten_are_dead(
    make_pod: MakePod, origin: FaultyOrigin
) -> None:
    content = CONTENT[: CHUNK_BYTES + 1000]
    path = origin.put("model/small.bin", content)
    url = origin.sign(path.relative_to(origin.root).as_posix())
    artifact = Artifact("job1", 0, "model/small.bin", url, len(content))
    ports = free_ports(300)
    pods = [make_pod(port, ports) for port in ports[:10]]
    wait_for(pods, 10)
    with ThreadPoolExecutor(len(pods)) as pool:
        assert set(pool.map(lambda pod: pod.fetch(artifact), pods)) == {content}
    assert origin.bytes_sent < 1.1 * len(content)


def test_peers_behind_a_firewall_are_asked_for_nothing(
    make_pod: MakePod, origin: FaultyOrigin, weights: Artifact
) -> None:
    with ExitStack() as stack:
        ports = free_ports(2)
        shut = [stack.enter_context(firewalled()) for _ in range(20)]
        pods = [make_pod(port, [*ports, *shut]) for port in ports]
        wait_for(pods, 2)
        fetch_all(pods, weights)
        for pod in pods:
            assert set(pod.sharing._members.living()) == {f"127.0.0.1:{port}" for port in ports}
    assert sent_copies(origin) < 1.05


def test_peers_that_a_firewall_shuts_off_do_not_add_up(
    make_pod: MakePod, weights: Artifact
) -> None:
    """A chunk waits for one of them alone, and for that one once."""
    muted = [Muted() for _ in range(12)]
    (port,) = free_ports(1)
    pod = make_pod(port, [port, *(one.port for one in muted)])
    wait_for([pod], 13)
    began = time.monotonic()
    fetch_all([pod], weights)
    print(f"{time.monotonic() - began:.1f} s")  # noqa: T201
    chunks = -(-len(CONTENT) // CHUNK_BYTES)
    assert sum(len(one.asked) for one in muted) <= chunks
    for one in muted:
        one.close()


def test_another_version_of_the_object_is_not_taken_from_a_peer(
    make_pod: MakePod, origin: FaultyOrigin, weights: Artifact
) -> None:
    ports = free_ports(2)
    first, second = (make_pod(port, ports) for port in ports)
    fetch_all([first], weights)
    other = random.Random(8).randbytes(len(CONTENT))
    origin.put("model/weights.bin", other)
    wait_for([first, second], 2)
    assert second.fetch(weights) == other
    assert second.sharing.counts.peer_bytes == 0


def test_no_clock_is_asked(
    make_pod: MakePod,
    origin: FaultyOrigin,
    weights: Artifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Peers whose clocks differ by days trust each other's signatures."""
    signed = weights.url.partition("?")[0].split("/", 3)[3]
    url = origin.sign(signed, expires=1 << 40)  # the origin's own clock is the same
    weights = replace(weights, url=url)
    now = time.time
    monkeypatch.setattr("time.time", lambda: now() + random.uniform(-1e6, 1e6))
    ports = free_ports(2)
    pods = [make_pod(port, ports) for port in ports]
    wait_for(pods, 2)
    fetch_all(pods, weights)
    assert sent_copies(origin) < 1.05


def test_a_sample_finds_who_lies_where_nothing_is_declared(
    make_pod: MakePod,
    weights: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("loader.peers.courier._SAMPLED_ONE_IN", 1)
    ports = free_ports(2)
    liar, pod = (make_pod(port, ports) for port in ports)
    fetch_all([liar], weights)
    for flight in list(liar.sharing._flights._found.values()):
        flight.data[:] = bytes(len(flight.data))
        flight.crc = crc(flight.data)
    wait_for([liar, pod], 2)
    fetch_all([pod], weights)
    assert "other bytes" in caplog.text
    assert f"127.0.0.1:{ports[0]}" not in pod.sharing._members.living()


def crc(data: bytearray) -> int:
    from loader.fetch.crc import crc64nvme

    return int(crc64nvme(memoryview(data)))


@pytest.mark.parametrize("declared", [True, False])
def test_all_of_many_peers_lie(
    make_pod: MakePod, weights: Artifact, declared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, what is declared or sampled is right in the end."""
    monkeypatch.setattr("loader.peers.courier._SAMPLED_ONE_IN", 32 if declared else 1)
    if declared:
        told = Checksum("sha256", hashlib.sha256(CONTENT).digest(), said_by="SHA256SUMS")
        weights = replace(weights, checksums=(told,))
    ports = free_ports(4)
    *liars, pod = (make_pod(port, ports) for port in ports)
    fetch_all(liars, weights)
    for liar in liars:
        for flight in list(liar.sharing._flights._found.values()):
            flight.data[:] = bytes(len(flight.data))
            flight.crc = crc(flight.data)
    wait_for([pod], 4)
    fetch_all([pod], weights)
