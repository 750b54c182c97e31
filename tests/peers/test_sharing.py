"""Pods that share one object: real servers, real fetches, faults."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from loader.config.credentials import Secret
from loader.errors import ConfigError
from loader.peers import held
from loader.peers.access import ASK, Token
from loader.peers.chunks import CHUNK_BYTES, Chunk, SharedObject
from loader.peers.flights import Flight, Flights
from loader.peers.members import parse_peers
from loader.types import Artifact, Checksum
from tests.origin import FaultyOrigin, cut
from tests.peers.conftest import CONTENT, TOKEN, MakePod, TestPod, free_ports, sent_copies

# asyncio may leave a socket to the collector where its loop is stopped midway, as a pod's is here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _fetch_all(pods: list[TestPod], weights: Artifact) -> None:
    with ThreadPoolExecutor(len(pods)) as pool:
        for found in pool.map(lambda pod: pod.fetch(weights), pods):
            assert found == CONTENT


def _wait_for_all(pods: list[TestPod]) -> None:
    while any(len(pod.sharing._members.living()) < len(pods) for pod in pods):
        time.sleep(0.01)


def _get(port: int, target: str, headers: str = "") -> bytes:
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
        sock.shutdown(socket.SHUT_WR)
        data = b""
        while more := sock.recv(1 << 16):
            data += more
    return data


def test_pods_that_start_together_cost_the_origin_one_copy(
    make_pod: MakePod, origin: FaultyOrigin, weights: Artifact
) -> None:
    ports = free_ports(4)
    pods = [make_pod(port, ports) for port in ports]
    _wait_for_all(pods)
    _fetch_all(pods, weights)
    assert sent_copies(origin) < 1.05
    assert sum(pod.sharing.uploaded_bytes for pod in pods) >= 2.9 * len(CONTENT)


def test_a_pod_that_comes_later_takes_all_from_the_first(
    make_pod: MakePod, origin: FaultyOrigin, weights: Artifact
) -> None:
    ports = free_ports(2)
    first = make_pod(ports[0], ports)
    _fetch_all([first], weights)
    before = origin.bytes_sent
    second = make_pod(ports[1], ports)
    _wait_for_all([first, second])
    _fetch_all([second], weights)
    assert origin.bytes_sent - before < CHUNK_BYTES // 16
    assert second.sharing.counts.peer_bytes == len(CONTENT)


def test_dead_peers_and_one_with_another_token_are_done_without(
    make_pod: MakePod, weights: Artifact
) -> None:
    ports = free_ports(40)
    stranger = make_pod(ports[0], ports, token="another")
    _fetch_all([stranger], weights)
    pod = make_pod(ports[1], ports)
    _fetch_all([pod], weights)
    assert pod.sharing.counts.peer_bytes == 0
    assert stranger.sharing.uploaded_bytes == 0


def test_a_peer_that_does_not_answer_is_done_without(make_pod: MakePod, weights: Artifact) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (port,) = free_ports(1)
        pod = make_pod(port, [port, silent.getsockname()[1]])
        _fetch_all([pod], weights)


def test_a_peer_that_ends_midway_is_replaced(
    make_pod: MakePod, weights: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = free_ports(3)
    pods = [make_pod(port, ports) for port in ports]
    _wait_for_all(pods)
    _fetch_all(pods[:1], weights)
    pods[0].sharing._flights._found.clear()  # what it has is on its disk
    ended = threading.Event()

    def find_and_end(root: Path, chunk: object) -> held.Held | None:
        if root == pods[0].root and not ended.is_set():
            ended.set()
            threading.Thread(target=pods[0].sharing.close).start()
        return find_held(root, chunk)  # type: ignore[arg-type]

    find_held = held.find_held
    monkeypatch.setattr("loader.peers.sharing.find_held", find_and_end)
    _fetch_all(pods[1:], weights)
    assert ended.is_set()


def test_wrong_bytes_are_found_by_the_declared_sum_and_their_peer_is_shunned(
    make_pod: MakePod, origin: FaultyOrigin, weights: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    declared = Checksum("sha256", hashlib.sha256(CONTENT).digest(), said_by="SHA256SUMS")
    weights = replace(weights, checksums=(declared,))
    ports = free_ports(2)
    liar = make_pod(ports[0], ports)
    _fetch_all([liar], weights)
    liar.sharing._flights._found.clear()
    with (liar.root / weights.path).open("r+b") as file:
        place = file.seek(3 * CHUNK_BYTES + 100)
        stat = Path(file.name).stat()
        file.write(bytes([CONTENT[place] ^ 1]))
    os.utime(liar.root / weights.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    # It is a liar, not an accident: what it says of the chunk is of the wrong bytes.
    def lie(chunk: Chunk) -> held.Held:
        fd = os.open(liar.root / weights.path, os.O_RDONLY)
        return held.Held(fd, held._sum(fd, chunk.start, chunk.end))

    liar.sharing._server._find_held = lie
    pod = make_pod(ports[1], ports)
    _wait_for_all([liar, pod])
    _fetch_all([pod], weights)
    assert "other bytes" in caplog.text


def test_a_holder_that_lies_is_shunned_and_not_the_home_that_named_it(
    make_pod: MakePod, weights: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    declared = Checksum("sha256", hashlib.sha256(CONTENT).digest(), said_by="SHA256SUMS")
    weights = replace(weights, checksums=(declared,))
    ports = free_ports(3)
    home, liar = (make_pod(port, ports) for port in ports[:2])
    _fetch_all([home, liar], weights)
    (shared,) = (found.object for found in liar.sharing._objects.values())
    for chunk in shared.chunks(0, shared.size_bytes):
        home.sharing._server._holders[chunk.name] = deque([f"127.0.0.1:{ports[1]}"])
    home.sharing._server._uploads = 1000  # it is busy, and names who has the chunk
    liar.sharing._flights._found.clear()
    wrong = liar.root / weights.path
    wrong.write_bytes(bytes(len(CONTENT)))

    def lie(chunk: Chunk) -> held.Held:
        fd = os.open(wrong, os.O_RDONLY)
        return held.Held(fd, held._sum(fd, chunk.start, chunk.end))

    liar.sharing._server._find_held = lie
    pod = make_pod(ports[2], ports)
    _wait_for_all([home, liar, pod])
    _fetch_all([pod], weights)
    blamed = [message for message in caplog.messages if "other bytes" in message]
    assert blamed
    assert all(message.startswith(f"peers: 127.0.0.1:{ports[1]} ") for message in blamed)


def test_an_accident_on_the_way_is_found_by_the_homes_own_sum(
    make_pod: MakePod, origin: FaultyOrigin, weights: Artifact
) -> None:
    ports = free_ports(2)
    first = make_pod(ports[0], ports)
    _fetch_all([first], weights)
    first.sharing._flights._found.clear()
    path = first.root / weights.path
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(CHUNK_BYTES + 7)
        file.write(b"\0\0\0\0\0\0\0\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    pod = make_pod(ports[1], ports)
    _wait_for_all([first, pod])
    _fetch_all([pod], weights)
    assert pod.sharing.counts.origin_bytes >= CHUNK_BYTES


def test_an_origin_that_breaks_off_is_asked_for_the_rest(
    make_pod: MakePod, origin: FaultyOrigin, weights: Artifact
) -> None:
    ports = free_ports(2)
    pods = [make_pod(port, ports) for port in ports]
    origin.fail("weights.bin", *(cut(1 << 20) for _ in range(5)))
    _fetch_all(pods, weights)


def test_versions_that_stand_for_no_bytes_are_not_shared(
    make_pod: MakePod, origin: FaultyOrigin, weights: Artifact
) -> None:
    origin.headers = lambda path: {"ETag": 'W/"weak"'}
    ports = free_ports(2)
    pods = [make_pod(port, ports) for port in ports]
    _fetch_all(pods, weights)
    assert all(pod.sharing.uploaded_bytes == 0 for pod in pods)


def test_a_pod_that_knows_nobody_works_as_ever(make_pod: MakePod, weights: Artifact) -> None:
    (port,) = free_ports(1)
    _fetch_all([make_pod(port, [port])], weights)


def test_bytes_are_served_to_those_alone_who_hold_the_token(
    make_pod: MakePod, weights: Artifact
) -> None:
    (port,) = free_ports(1)
    pod = make_pod(port, [port])
    _fetch_all([pod], weights)
    (name,) = pod.sharing._objects
    target = f"/objects/{name}/0"
    assert b" 401 " in _get(port, target).splitlines()[0]
    nonce = _get(port, "/hello").rpartition(b'"nonce": "')[2].partition(b'"')[0].decode()
    for secret, signed in (("wrong", target), (TOKEN, f"/objects/{name}/1")):
        _, header = Token(Secret(secret)).ask(nonce, signed)
        assert b" 401 " in _get(port, target, f"{ASK}: {header}\r\n").splitlines()[0]
    _, header = Token(Secret(TOKEN)).ask(nonce, target)
    answer = _get(port, target, f"{ASK}: {header}\r\n")
    assert answer.partition(b"\r\n\r\n")[2] == CONTENT[:CHUNK_BYTES]


@pytest.mark.parametrize(
    "text",
    [
        b"\x16\x03\x01 no HTTP\r\n\r\n",
        b"POST /hello HTTP/1.1\r\nContent-Length: 5\r\n\r\nabcde",
        b"GET /hello HTTP/1.0\r\n\r\n",
        b"GET " + b"/x" * 9000 + b" HTTP/1.1\r\n\r\n",
        b"GET /objects/../../etc/passwd/0 HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_request_of_a_peer_gets_nothing(make_pod: MakePod, text: bytes) -> None:
    (port,) = free_ports(1)
    make_pod(port, [port])
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(text)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while more := sock.recv(1 << 16):
                answer += more
    assert b" 200 " not in answer
    assert b"nonce" in _get(port, "/hello")


def test_a_port_that_is_taken_is_one_error(make_pod: MakePod) -> None:
    (port,) = free_ports(1)
    make_pod(port, [port])
    with pytest.raises(ConfigError, match="port for peers"):
        make_pod(port, [port])


@pytest.mark.parametrize("text", ["http://a", "a:b", "", "dns://", "a/b", "u@h"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_peers([text], 1)


def test_addresses_get_the_port_of_all() -> None:
    assert parse_peers(["dns://pods.svc", "a", "b:2", "[::1]"], 7) == (
        "pods.svc:7",
        ("a:7", "b:2", "[::1]:7"),
    )


def test_two_pods_that_take_each_other_for_the_home_do_not_wait_for_ever() -> None:
    chunk = SharedObject("a", CHUNK_BYTES, '"1"').chunk(0)
    flights = Flights()
    flight, is_new = flights.join(chunk, always=True)
    assert flight is not None
    assert is_new
    assert not flight.is_coming
    flight.is_promoted = True
    again, is_new = flights.join(chunk, always=True)
    assert again is flight
    assert not is_new


def test_memory_is_bounded_and_what_was_used_makes_room() -> None:
    found = SharedObject("a", 10 * CHUNK_BYTES, '"1"')
    flights = Flights(most=2)
    first, _ = flights.join(found.chunk(0), always=False)
    assert isinstance(first, Flight)
    flights.join(found.chunk(1), always=False)
    assert flights.join(found.chunk(2), always=False) == (None, False)
    first.is_used = True
    first.advance(CHUNK_BYTES, 1)
    assert flights.join(found.chunk(2), always=False)[1]
    assert flights.find(found.chunk(0)) is None
