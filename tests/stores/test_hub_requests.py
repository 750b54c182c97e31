"""huggingface-hub's requests come by our own client: its limits, its trust, its rules of places."""

from __future__ import annotations

import gzip
import os
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trustme

from tests.http.raw import answering
from tests.http.test_trust import certificate_with_a_common_name
from tests.stores.hub import COMMIT

SCRIPT = """
import sys
from pathlib import Path
from loader.errors import LoaderError
from loader.fetch.progress import LogProgress
from loader.http import pool
from loader.http.client import HttpOptions
from loader.stores.hub import describe_model, fetch_model
from loader.stores.hub_requests import ask_as_we_do
pool._PATIENCE_S = 0.3
bundle = Path(sys.argv[2]) if sys.argv[2] else None
ask_as_we_do(HttpOptions(connect_timeout_s=2.0, stall_timeout_s=0.5, ca_bundle=bundle))
try:
    if sys.argv[1] == "fetch":
        fetch_model("org/base", None, progress=LogProgress())
    else:
        describe_model("org/base")
    print("well")
except LoaderError as error:
    print(type(error).__name__, error.what, "|", error.got)
"""


def ask(url: str, tmp_path: Path, act: str = "fetch", bundle: Path | str = "", **more: str) -> str:
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, act, str(bundle)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


SLOW = {
    "a head": (b"HTTP/1.1 200 OK\r\nA: ", b"b"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a body": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n{", b" "),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_hub_that_never_comes_to_an_end(name: str, tmp_path: Path) -> None:
    first, piece = SLOW[name]

    def talk(sock: socket.socket, request: bytes) -> None:
        sock.sendall(first)
        while True:
            sock.sendall(piece)
            time.sleep(0.05)

    with answering(talk) as origin:
        for act in ("fetch", "describe"):
            assert ask(origin.url, tmp_path, act).startswith("TransientError ")


def test_a_coded_description_is_decoded(tmp_path: Path) -> None:
    body = gzip.compress(b'{"id": "org/base", "sha": "%s", "siblings": []}' % COMMIT.encode())

    def talk(sock: socket.socket, request: bytes) -> bool:
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
        sock.sendall(head % len(body) + body)
        return True

    with answering(talk) as origin:
        told = ask(origin.url, tmp_path)
    assert told.startswith("FetchError the base model has no safetensors weights")


@pytest.mark.parametrize("act", ["fetch", "describe"])
def test_a_common_name_is_no_host(act: str, tmp_path: Path) -> None:
    """As in our own client, RFC 9110, 4.3.4."""
    context = certificate_with_a_common_name(tmp_path)

    def talk(sock: socket.socket, request: bytes) -> None:
        sock.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with answering(talk, context) as origin:
        url = origin.url.replace("127.0.0.1", "localhost")
        told = ask(url, tmp_path, act, tmp_path / "ca.pem")
        assert told.startswith("FetchError the server's certificate is not trusted")
        assert not origin.requests


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("http://169.254.169.254/latest", "an address of this machine's own link"),
        ("http://[::ffff:169.254.169.254]/latest", "an address of this machine's own link"),
        ("", "a redirect that leads nowhere"),
    ],
)
def test_where_a_redirect_may_not_lead(target: str, said: str, tmp_path: Path) -> None:
    def talk(sock: socket.socket, request: bytes) -> bool:
        place = f"Location: {target}\r\n" if target else ""
        sock.sendall(f"HTTP/1.1 302 Found\r\n{place}Content-Length: 0\r\n\r\n".encode())
        return True

    with answering(talk) as origin:
        assert said in ask(origin.url, tmp_path)


def test_a_redirect_from_https_to_http(tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    def talk(sock: socket.socket, request: bytes) -> None:
        sock.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://h.test/\r\nContent-Length: 0\r\n\r\n")

    with answering(talk, context) as origin:
        told = ask(origin.url, tmp_path, "fetch", tmp_path / "ca.pem")
    assert told.startswith("FetchError a redirect from https to http")


def test_offline_nobody_is_asked(tmp_path: Path) -> None:
    with answering(lambda *_: None) as origin:
        told = ask(origin.url, tmp_path, HF_HUB_OFFLINE="1")
        assert told.startswith("FetchError the base model is not in the cache")
        assert not origin.requests


def test_a_client_that_a_user_set_is_left(tmp_path: Path) -> None:
    code = (
        "import huggingface_hub.utils as library\n"
        "from loader.http.client import HttpOptions\n"
        "from loader.stores.hub_requests import ask_as_we_do\n"
        "before = library.get_session()\n"
        "kind = type(before)\n"
        "library.set_client_factory(lambda: kind(timeout=3))\n"
        "ask_as_we_do(HttpOptions())\n"
        "assert library.get_session().timeout.read == 3\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
