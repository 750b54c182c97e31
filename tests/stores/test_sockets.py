"""Bodies come whole over plain and over TLS; silence, ends and aborts are seen in both."""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from loader.errors import TransientError
from loader.stores.http import HttpClient, HttpOptions, HttpStream
from tests.origin import FaultyOrigin, cut, slow

CONTENT = random.Random(5).randbytes((3 << 20) + 77)


@pytest.fixture(params=["plain", "tls"])
def url(request: pytest.FixtureRequest, origin: FaultyOrigin, tmp_path: Path) -> str:
    path = origin.put("x", CONTENT).relative_to(origin.root).as_posix()
    plain = origin.sign(path)
    if request.param == "plain":
        return plain
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    origin.socket = context.wrap_socket(
        origin.socket, server_side=True, do_handshake_on_connect=False
    )
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return plain.replace("http:", "https:")


@pytest.fixture
def client(tmp_path: Path, url: str) -> Iterator[HttpClient]:
    ca = tmp_path / "ca.pem"
    options = HttpOptions(stall_timeout_s=0.5, ca_bundle=ca if ca.exists() else None)
    found = HttpClient(options)
    yield found
    found.close()


def read(stream: HttpStream, buffer: memoryview) -> bytes:
    found = b""
    while count := stream.readinto(buffer):
        found += buffer[:count]
    return found


@pytest.mark.parametrize("buffer_bytes", [7777, 1 << 20])
def test_bodies_come_whole_on_one_connection(
    origin: FaultyOrigin, client: HttpClient, url: str, buffer_bytes: int
) -> None:
    for span in ((0, len(CONTENT)), (5, 6), (1 << 20, len(CONTENT))):
        stream = client.get(url, span=span)
        assert read(stream, memoryview(bytearray(buffer_bytes))) == CONTENT[span[0] : span[1]]
        stream.close()


def test_silence_is_cut(origin: FaultyOrigin, client: HttpClient, url: str) -> None:
    origin.fail("x", slow(3))
    stream = client.get(url, span=(0, len(CONTENT)))
    with pytest.raises(TransientError, match="nothing in time"):
        read(stream, memoryview(bytearray(1 << 20)))
    stream.close()


def test_an_end_before_the_length_is_seen(
    origin: FaultyOrigin, client: HttpClient, url: str
) -> None:
    origin.fail("x", cut(100_000))
    stream = client.get(url, span=(0, len(CONTENT)))
    with pytest.raises(TransientError):
        read(stream, memoryview(bytearray(1 << 20)))
    stream.close()


def test_an_abort_wakes_a_reader_at_once(origin: FaultyOrigin, url: str, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    client = HttpClient(
        HttpOptions(stall_timeout_s=60, ca_bundle=ca if ca.exists() else None)
    )  # a read that is not woken lasts longer than the test may
    origin.fail("x", slow(3))
    stream = client.get(url, span=(0, len(CONTENT)))
    began = time.monotonic()
    threading.Timer(0.2, stream.abort).start()
    with pytest.raises(TransientError):
        read(stream, memoryview(bytearray(1 << 20)))
    assert time.monotonic() - began < 2
    stream.close()
    client.close()
