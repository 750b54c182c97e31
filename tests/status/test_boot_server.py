"""The small server on a real socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import resource
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import trustme

from loader.errors import ConfigError
from loader.http.trust import server_tls
from loader.status import boot_server
from loader.status.boot_server import _MOST_CONNECTIONS, BootServer, listen
from loader.status.replies import bare_reply
from loader.status.state import Boot

BOOT = Boot(phase="starting", stage="download", now_s=1.0)


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A listening socket on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with listen("127.0.0.1", port) as found:
        yield found


def url(listening: socket.socket) -> str:
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE"])
def test_every_method_is_answered(listening: socket.socket, method: str) -> None:
    server = BootServer(listening, lambda: BOOT)
    body = b"x" * 300_000 if method == "POST" else None
    answer = httpx.request(method, f"{url(listening)}/v1/completions", content=body)
    assert (answer.status_code, answer.headers["Connection"]) == (503, "close")
    assert bool(answer.content) == (method != "HEAD")
    server.stop()
    server.stop()


@pytest.mark.parametrize("path", ["/", "/status", "/status.json", "/metrics", "/v1/models"])
def test_nothing_is_told_where_the_engine_alone_knows_whom_to_tell(
    listening: socket.socket, path: str
) -> None:
    failed = replace(BOOT, stage="a stage", error={"what": "a secret"})
    server = BootServer(listening, lambda: failed, tell=bare_reply)
    answer = httpx.get(f"{url(listening)}{path}")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert answer.json()["error"]["type"] == "ServiceUnavailableError"
    health = httpx.get(f"{url(listening)}/health")
    assert (health.status_code, health.json()) == (503, {"status": failed.phase})
    assert not {"a secret", "a stage"} & {*answer.text.split('"'), *health.text.split('"')}
    server.stop()


def test_slow_and_silent_clients_hold_nobody_up(listening: socket.socket) -> None:
    server = BootServer(listening, lambda: BOOT)
    address = listening.getsockname()
    silent = [socket.create_connection(address) for _ in range(20)]
    assert httpx.get(f"{url(listening)}/health").status_code == 503
    server.stop()
    for client in silent:
        client.close()


def test_health_answers_under_many_slow_connections(listening: socket.socket) -> None:
    """They take no thread, and no descriptor that anybody else needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    server = BootServer(listening, lambda: BOOT)
    threads = threading.active_count()
    address = listening.getsockname()
    slow: list[socket.socket] = []
    try:
        for number in range(1400):
            client = socket.create_connection(address, timeout=10)
            client.sendall((b"", b"GET /health HTTP/1.1\r\nX: ", b"\x16\x03\x01")[number % 3])
            slow.append(client)
            if number % 100 == 99:
                assert httpx.get(f"{url(listening)}/health", timeout=10).status_code == 503
        assert threading.active_count() <= threads
        assert len(server._loop._open) <= _MOST_CONNECTIONS
    finally:
        for client in slow:
            client.close()
        server.stop()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_who_says_nothing_is_not_waited_for(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor who says a byte a moment, or reads no answer."""
    monkeypatch.setattr(boot_server, "_CLIENT_TIMEOUT_S", 0.3)
    server = BootServer(listening, lambda: BOOT)
    with (
        socket.create_connection(listening.getsockname()) as silent,
        socket.create_connection(listening.getsockname()) as dripping,
    ):
        with contextlib.suppress(OSError):
            for _ in range(20):
                dripping.sendall(b"G")
                time.sleep(0.1)
        assert silent.recv(1) == b""
        assert not server._loop._open
    server.stop()


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"GET /health\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /health SMTP\r\n\r\n", 400),
        (b"\xff\xfe \x00 HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * (1 << 17), 431),
        (b"GET /health HTTP/1.1\n\n", 503),
        (b"GET //status.json HTTP/1.0\r\n\r\n", 200),
        (b"GET /status.json HTTP/1.1\r\nX: \xff\r\n\r\nand more", 200),
        (b"POST /x HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n", 503),
    ],
)
def test_heads_of_every_sort(listening: socket.socket, said: bytes, status: int) -> None:
    server = BootServer(listening, lambda: BOOT)
    with socket.create_connection(listening.getsockname(), timeout=10) as client:
        for at in range(0, len(said), 50_000):
            client.sendall(said[at : at + 50_000])
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.status == status
        assert answer.getheader("Connection") == "close"
        assert len(answer.read()) == int(answer.getheader("Content-Length", ""))
    server.stop()


def test_a_state_that_cannot_be_told_ends_one_connection(listening: socket.socket) -> None:
    states: list[Boot] = []

    def boot() -> Boot:
        states.append(BOOT)
        if len(states) == 1:
            raise ValueError("no")
        return BOOT

    server = BootServer(listening, boot)
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url(listening)}/health")
    assert httpx.get(f"{url(listening)}/health").status_code == 503
    server.stop()


def test_no_connection_is_refused_while_the_port_changes_hands(listening: socket.socket) -> None:
    """A client that connects between two servers is answered by the next one."""
    answers: list[int | str] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            host, port = listening.getsockname()[:2]
            connection = http.client.HTTPConnection(host, port, timeout=10)
            try:
                connection.request("GET", "/health")
                answers.append(connection.getresponse().status)
            except OSError as error:
                answers.append(repr(error))
            finally:
                connection.close()

    clients = [threading.Thread(target=ask) for _ in range(4)]
    server = BootServer(listening, lambda: BOOT)
    for client in clients:
        client.start()
    for phase in ("ready", "starting", "ready"):
        time.sleep(0.05)
        server.stop()
        time.sleep(0.1)  # nobody accepts
        server = BootServer(listening, lambda p=phase: Boot(phase=p, stage="", now_s=1.0))  # type: ignore[misc]
    time.sleep(0.05)
    over.set()
    for client in clients:
        client.join()
    server.stop()
    assert set(answers) == {200, 503}


def test_a_taken_port_is_one_clear_error(listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    with pytest.raises(ConfigError) as caught:
        listen("127.0.0.1", port)
    assert f"127.0.0.1:{port}" in str(caught.value)


def test_https_where_the_engine_will_speak_it(listening: socket.socket, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    certificate, key, roots = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem"
    certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    roots.write_bytes(authority.cert_pem.bytes())
    server = BootServer(listening, lambda: BOOT, server_tls(certificate, key))
    verified = ssl.create_default_context(cafile=str(roots))
    answer = httpx.get(f"{url(listening).replace('http', 'https')}/health", verify=verified)
    assert json.loads(answer.content)["stage"] == "download"
    server.stop()
    with pytest.raises(ConfigError):
        server_tls(tmp_path / "none.pem", key)


def test_a_client_needs_the_certificate_that_the_engine_will_ask_for(
    listening: socket.socket, tmp_path: Path
) -> None:
    authority = trustme.CA()
    certificate, roots = tmp_path / "both.pem", tmp_path / "ca.pem"
    issued = authority.issue_cert("127.0.0.1")
    certificate.write_bytes(issued.private_key_and_cert_chain_pem.bytes())
    roots.write_bytes(authority.cert_pem.bytes())
    tls = server_tls(certificate, None, roots, verify=ssl.CERT_REQUIRED)
    server = BootServer(listening, lambda: BOOT, tls)
    health = f"{url(listening).replace('http', 'https')}/health"
    client = ssl.create_default_context(cafile=str(roots))
    with pytest.raises(httpx.TransportError):
        httpx.get(health, verify=client)
    client.load_cert_chain(certificate)
    assert httpx.get(health, verify=client).status_code == 503
    stranger = ssl.create_default_context(cafile=str(roots))
    trustme.CA().issue_cert("127.0.0.1").configure_cert(stranger)
    with pytest.raises(httpx.TransportError):
        httpx.get(health, verify=stranger)
    server.stop()


def test_who_may_not_ask_is_told_so(listening: socket.socket) -> None:
    def allows(method: str, target: str, authorization: str) -> bool:
        return (method, target, authorization) != ("POST", "/v1/models?a", "Bearer wrong")

    server = BootServer(listening, lambda: BOOT, allows=allows)
    address = f"{url(listening)}/v1/models?a"
    refused = httpx.post(address, headers={"Authorization": "Bearer wrong"})
    assert (refused.status_code, refused.json()) == (401, {"error": "Unauthorized"})
    assert httpx.post(address, headers={"Authorization": "Bearer right"}).status_code == 503
    server.stop()
