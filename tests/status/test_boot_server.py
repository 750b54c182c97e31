"""The small server on a real socket."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from loader.errors import ConfigError
from loader.status.boot_server import BootServer, listen, server_tls
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


def test_slow_and_silent_clients_hold_nobody_up(listening: socket.socket) -> None:
    server = BootServer(listening, lambda: BOOT)
    address = listening.getsockname()
    silent = [socket.create_connection(address) for _ in range(20)]
    assert httpx.get(f"{url(listening)}/health").status_code == 503
    server.stop()
    for client in silent:
        client.close()


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
    import ssl

    verified = ssl.create_default_context(cafile=str(roots))
    answer = httpx.get(f"{url(listening).replace('http', 'https')}/health", verify=verified)
    assert json.loads(answer.content)["stage"] == "download"
    server.stop()
    with pytest.raises(ConfigError):
        server_tls(tmp_path / "none.pem", key)
