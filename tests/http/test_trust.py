"""Where the system's certificates come from: a directory by hashes, and a file behind it."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import requests
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from loader.errors import FetchError
from loader.http import trust
from loader.http.client import HttpClient, HttpOptions
from tests.http.raw import answering
from tests.origin import FaultyOrigin
from tests.stores.proxy import TlsFront

CONTENT = b"what is behind TLS"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tmp_path / "ca.pem"


@pytest.fixture
def url(origin: FaultyOrigin, bundle: Path) -> Iterator[str]:
    """A file behind TLS, whose authority is in *bundle*."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(bundle)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    front = TlsFront(origin.server_port, context)
    path = origin.put("x", CONTENT).relative_to(origin.root).as_posix()
    signed = origin.sign(path).partition("/training_projects")[2]
    yield f"https://127.0.0.1:{front.server_port}/training_projects{signed}"
    front.stop()


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's directory of certificates, for one test."""
    folder = tmp_path / "certs"
    folder.mkdir()
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("SSL_CERT_DIR", str(folder))
    return folder


def size_of(url: str, bundle: Path | None = None) -> int:
    client = HttpClient(HttpOptions(ca_bundle=bundle))
    try:
        stream = client.get(url, span=(0, len(CONTENT)))
        stream.close()
        return stream.info.size_bytes
    finally:
        client.close()


def hashed(folder: Path, certificate: Path) -> None:
    """Put *certificate* where OpenSSL looks for it."""
    command = ["openssl", "x509", "-noout", "-hash", "-in", str(certificate)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    shutil.copy(certificate, folder / f"{name}.0")


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to hash a subject with")
def test_the_directory_is_asked_and_the_file_not_read(
    url: str, bundle: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed(directory, bundle)
    monkeypatch.setattr(trust.Trust, "widen", lambda _: pytest.fail("the file was read"))
    assert size_of(url) == len(CONTENT)


def test_what_the_directory_lacks_may_be_in_the_file(
    url: str, bundle: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "00000000.0").touch()
    with pytest.raises(FetchError, match="certificate"):
        size_of(url)
    assert size_of(url, bundle) == len(CONTENT)
    monkeypatch.setattr(trust, "_hashed_directory", lambda: str(directory))
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))  # stands for the system's
    assert size_of(url) == len(CONTENT)


def test_without_hashes_the_file_is_read_at_once(directory: Path) -> None:
    assert trust._hashed_directory() is None
    (directory / "0123abcd.0").touch()
    assert trust._hashed_directory() == str(directory)


def test_a_variable_that_names_a_file_is_heeded(
    directory: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "0123abcd.0").touch()
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    assert trust._hashed_directory() is None


def test_a_variable_that_names_no_file_is_told_of(
    directory: Path, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(directory / "none.pem"))
    with pytest.raises(FetchError, match="certificate"):
        size_of(url)
    assert f"SSL_CERT_FILE={directory / 'none.pem'} cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("host", "days", "got", "next_step"),
    [
        ("elsewhere.test", 1, "IP address mismatch", "correct the URL's host"),
        ("127.0.0.1", -1, "certificate has expired", "check this machine's clock"),
    ],
)
def test_a_certificate_that_is_wrong_by_itself(
    origin: FaultyOrigin, bundle: Path, host: str, days: int, got: str, next_step: str
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(bundle)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ends = datetime.now(UTC) + timedelta(days=days)
    issued = authority.issue_cert(host, not_before=ends - timedelta(days=9), not_after=ends)
    issued.configure_cert(context)
    front = TlsFront(origin.server_port, context)
    with pytest.raises(FetchError) as caught:
        size_of(f"https://127.0.0.1:{front.server_port}/x", bundle)
    front.stop()
    assert caught.value.got.startswith(got)
    assert caught.value.next_step.startswith(next_step)


def certificate_with_a_common_name(folder: Path, names: tuple[str, ...] = ()) -> ssl.SSLContext:
    """Return a server's context for localhost by its common name; ``ca.pem`` lies in *folder*."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    built = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    built = built.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    if names:
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        built = built.add_extension(alternatives, critical=False)
    pem = built.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "ca.pem").write_bytes(pem)
    (folder / "server.pem").write_bytes(private + pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return context


@pytest.mark.parametrize("names", [(), ("localhost",), ("other.test",)])
def test_a_common_name_does_not_count(names: tuple[str, ...], tmp_path: Path) -> None:
    context = certificate_with_a_common_name(tmp_path, names)
    said = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"
    with answering(said, context) as origin:
        url = origin.url.replace("127.0.0.1", "localhost")
        client = HttpClient(HttpOptions(ca_bundle=tmp_path / "ca.pem"))
        with closing(client):
            if "localhost" in names:
                client.get(url).close()
                return
            with pytest.raises(FetchError, match="certificate") as caught:
                client.get(url)
        assert "common name" in caught.value.next_step
        with requests.Session() as session:
            session.trust_env = False
            with pytest.raises(requests.exceptions.SSLError):
                session.get(url, verify=str(tmp_path / "ca.pem"), timeout=5)
