"""Signed listings over https: the system's certificates, a bundle beside them, a CONNECT proxy."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme

from loader.config.settings import Settings
from loader.errors import FetchError
from loader.fetch.snapshot import FetchOptions, fetch
from loader.stores.registry import Stores
from loader.types import Manifest
from tests.origin import FaultyHandler, FaultyOrigin
from tests.stores import moto
from tests.stores.proxy import Proxy, TlsFront

CONTENT = bytes(range(256)) * 1000
SCRIPT = """
import sys
from loader.config.settings import Settings
from loader.stores.registry import Stores
stores = Stores(Settings.without_config({"retries": 0}))
(listing,) = stores.read_listings(sys.argv[1])
print(stores.stat(listing.artifacts[0]).size_bytes)
"""


class SecureHandler(FaultyHandler):
    """Sends bytes through TLS, which sendfile would go around."""

    def send_bytes(self, fd: int, start: int, end: int) -> None:
        self.wfile.write(os.pread(fd, end - start, start))


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def bundle(authority: trustme.CA, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


@pytest.fixture
def secure(origin: FaultyOrigin, authority: trustme.CA, tmp_path: Path) -> FaultyOrigin:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "storage.test").configure_cert(context)
    origin.socket = context.wrap_socket(origin.socket, server_side=True)
    origin.RequestHandlerClass = SecureHandler
    origin.put("x", CONTENT)
    return origin


def write(origin: FaultyOrigin, path: Path, host: str) -> str:
    """Write a listing of https URLs at *host* and return its path."""
    text = json.dumps(origin.listing("job1"))
    path.write_text(text.replace("http://127.0.0.1", f"https://{host}"))
    return str(path)


@pytest.fixture
def proxy(secure: FaultyOrigin) -> Iterator[Proxy]:
    found = Proxy(secure.server_port)
    yield found
    found.stop()


def test_an_authority_that_nobody_trusts(secure: FaultyOrigin, tmp_path: Path) -> None:
    source = write(secure, tmp_path / "l.json", "127.0.0.1")
    with closing(Stores(Settings.without_config())) as stores:
        (listing,) = stores.read_listings(source)
        with pytest.raises(FetchError, match="certificate") as caught:
            stores.stat(listing.artifacts[0])
    assert not caught.value.retryable


def test_the_systems_certificates_are_trusted(
    secure: FaultyOrigin, bundle: Path, tmp_path: Path
) -> None:
    source = write(secure, tmp_path / "l.json", "127.0.0.1")
    done = subprocess.run(  # OpenSSL's own variable stands for the system's store
        [sys.executable, "-c", SCRIPT, source],
        env={**os.environ, "SSL_CERT_FILE": str(bundle)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(len(CONTENT)), done.stderr


def test_a_whole_fetch_through_a_connect_proxy(
    secure: FaultyOrigin,
    proxy: Proxy,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", f"http://user:S3CR3T@{proxy.address}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    source = write(secure, tmp_path / "l.json", "storage.test")
    with closing(Stores(Settings.without_config({"ca_bundle": str(bundle)}))) as stores:
        (listing,) = stores.read_listings(source)
        options = FetchOptions(range_bytes=1 << 16, concurrency=2)
        snapshot = fetch(Manifest(listing.artifacts), tmp_path / "down", stores, options)
    assert (snapshot.root / snapshot.files[0].path).read_bytes() == CONTENT
    assert {host for host, _ in proxy.asked} == {f"storage.test:{secure.server_port}"}
    assert {given for _, given in proxy.asked} == {"Basic dXNlcjpTM0NSM1Q="}


def test_hosts_that_are_not_for_the_proxy(
    secure: FaultyOrigin,
    proxy: Proxy,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", f"http://{proxy.address}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    source = write(secure, tmp_path / "l.json", "127.0.0.1")
    with closing(Stores(Settings.without_config({"ca_bundle": str(bundle)}))) as stores:
        (listing,) = stores.read_listings(source)
        assert stores.stat(listing.artifacts[0]).size_bytes == len(CONTENT)
    assert proxy.asked == []


@pytest.mark.parametrize("said", [b"HTTP/1.1 407 Who are you?\r\n\r\n", b"SSH-2.0\r\n\r\n", b""])
def test_a_proxy_that_makes_no_tunnel(
    secure: FaultyOrigin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    def serve() -> None:
        taken, _ = listener.accept()
        with taken:
            taken.recv(1 << 16)
            taken.sendall(said)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        threading.Thread(target=serve, daemon=True).start()
        source = write(secure, tmp_path / "l.json", "storage.test")
        with closing(Stores(Settings.without_config())) as stores:
            (listing,) = stores.read_listings(source)
            with pytest.raises(FetchError, match=r"407 Who|not a whole|without an answer"):
                stores.stat(listing.artifacts[0])


def test_a_proxy_that_refuses(
    secure: FaultyOrigin, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://user:S3CR3T@127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    source = write(secure, tmp_path / "l.json", "storage.test")
    with closing(Stores(Settings.without_config())) as stores:
        (listing,) = stores.read_listings(source)
        with pytest.raises(FetchError) as caught:
            stores.stat(listing.artifacts[0])
    assert "S3CR3T" not in str(caught.value)


def test_s3_behind_a_private_authority(
    s3_url: str, authority: trustme.CA, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = f"bucket-{uuid.uuid4().hex}"
    s3 = moto.client(s3_url)
    s3.create_bucket(Bucket=bucket)
    s3.put_object(Bucket=bucket, Key="job1/rank-0/x", Body=b"123")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    front = TlsFront(urlsplit(s3_url).port or 0, context)
    own = {"s3_endpoint_url": f"https://127.0.0.1:{front.server_port}", "retries": 0}
    secrets = {"aws_access_key_id": moto.ACCESS_KEY, "aws_secret_access_key": moto.SECRET_KEY}
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    untrusting = closing(Stores(Settings.without_config(own, secrets=secrets)))
    with untrusting as stores, pytest.raises(FetchError, match="certificate"):
        stores.read_listings(f"s3://{bucket}", ("job1",))
    own["ca_bundle"] = str(bundle)
    with closing(Stores(Settings.without_config(own, secrets=secrets))) as stores:
        (listing,) = stores.read_listings(f"s3://{bucket}", ("job1",))
        assert stores.stat(listing.artifacts[0]).size_bytes == 3
    front.stop()
