"""The client against a real server that does what servers do."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trustme

from loader.errors import ChangedError, ExpiredError, FetchError, TransientError
from loader.http.body import HttpStream
from loader.http.client import HttpClient, HttpOptions
from loader.http.objects import Checksum, ObjectInfo
from loader.http.statuses import retry_after_s
from loader.stores.presigned import PresignedStore
from loader.types import Artifact
from tests.http.raw import answering
from tests.origin import (
    Fault,
    FaultyHandler,
    FaultyOrigin,
    answer,
    cut,
    ignore_range,
    redirect,
    reset,
    stall,
    status,
)

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def artifact(origin: FaultyOrigin) -> Artifact:
    path = origin.put("big file+.bin", CONTENT)
    return Artifact("job1", 0, "x", origin.sign(path.relative_to(origin.root).as_posix()))


def fill(stream: HttpStream, buffer: bytearray) -> None:
    rest = memoryview(buffer)
    while rest:
        count = stream.readinto(rest)
        assert count
        rest = rest[count:]


def read(store: PresignedStore, artifact: Artifact, start: int, end: int) -> bytes:
    stream = store.open_range(artifact, start, end, store.stat(artifact))
    buffer = bytearray(end - start)
    try:
        fill(stream, buffer)
        assert stream.readinto(memoryview(bytearray(8))) == 0
    finally:
        stream.close()
    return bytes(buffer)


def test_ranges_on_one_connection(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact
) -> None:
    before = set(threading.enumerate())  # other tests' servers may still be asleep
    assert store.stat(artifact).size_bytes == len(CONTENT)
    assert read(store, artifact, 0, 10) == CONTENT[:10]
    assert read(store, artifact, 1000, len(CONTENT)) == CONTENT[1000:]
    mine = [t for t in set(threading.enumerate()) - before if "process_request" in t.name]
    assert len(mine) == 1, "each request opened a connection of its own"


def test_an_empty_object(origin: FaultyOrigin, store: PresignedStore) -> None:
    path = origin.put("empty", b"")
    info = store.stat(Artifact("j", 0, "x", origin.sign(path.relative_to(origin.root).as_posix())))
    assert info.size_bytes == 0


def test_a_changed_object_is_no_mixture(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact
) -> None:
    before = store.stat(artifact)
    origin.put("big file+.bin", CONTENT[::-1])
    with pytest.raises(ChangedError):
        store.open_range(artifact, 0, 10, before)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Range": "bytes 0-9/999", "ETag": '"a"'},
        {"Content_Range": f"bytes 0-9/{len(CONTENT)}", "ETag": '"b"'},
    ],
)
def test_a_change_that_the_server_overlooks(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact, headers: dict[str, str]
) -> None:
    origin.fail("big file+.bin", answer(206, b"0123456789", **headers))
    with pytest.raises(ChangedError):
        store.open_range(artifact, 0, 10, ObjectInfo(len(CONTENT), '"a"'))


@pytest.mark.parametrize(
    "content_range", ["bytes 5-14/102400", "bytes 0-8/*", "items 0-9/102400", ""]
)
def test_a_range_that_was_not_asked_for(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact, content_range: str
) -> None:
    origin.fail("big file+.bin", answer(206, b"0123456789", Content_Range=content_range))
    with pytest.raises(FetchError):
        store.open_range(artifact, 0, 10, ObjectInfo(len(CONTENT)))


def test_a_server_without_ranges(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact
) -> None:
    origin.fail("big file+.bin", *[ignore_range] * 3)
    info = store.stat(artifact)
    assert info == ObjectInfo(len(CONTENT), info.version, ranges=False)
    stream = store.open_range(artifact, 0, len(CONTENT), info)
    buffer = bytearray(len(CONTENT))
    fill(stream, buffer)
    stream.close()
    assert buffer == CONTENT
    with pytest.raises(FetchError, match="ranges"):
        store.open_range(artifact, 5, 10, info)
    with pytest.raises(FetchError, match="ranges"):
        store.open_range(artifact, 0, 10, ObjectInfo(len(CONTENT), info.version))


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_statuses_that_pass(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact, code: int
) -> None:
    origin.fail("big file+.bin", status(code, Retry_After="7"))
    with pytest.raises(TransientError) as caught:
        store.stat(artifact)
    assert caught.value.retry_after_s == 7
    assert "Signature" not in str(caught.value) + repr(caught.value)


@pytest.mark.parametrize(
    ("ahead", "least_s", "most_s"),
    [(timedelta(minutes=10), 300, 601), (timedelta(days=-4000), 0, 0)],
)
def test_a_date_to_come_back(
    origin: FaultyOrigin,
    store: PresignedStore,
    artifact: Artifact,
    ahead: timedelta,
    least_s: float,
    most_s: float,
) -> None:
    date = format_datetime(datetime.now(UTC) + ahead, usegmt=True)
    origin.fail("big file+.bin", status(503, Retry_After=date))
    with pytest.raises(TransientError) as caught:
        store.stat(artifact)
    assert caught.value.retry_after_s is not None
    assert least_s <= caught.value.retry_after_s <= most_s


@pytest.mark.parametrize(
    ("value", "asked_s"),
    [
        ("7", 7),
        (" 7 ", 7),
        ("9" * 5000, float("inf")),
        ("Mon, 01 Jan 0001 00:00:00 GMT", 0),
        *(
            (value, None)
            for value in ("", "nan", "inf", "-5", "1e3", "²", "soon", "Thu, 99 Foo 99999 99:99:99")
        ),
        ("Fri, 31 Dec 9999 23:59:59 +99999999999999", None),
    ],
)
def test_what_may_be_a_time_to_come_back(value: str, asked_s: float | None) -> None:
    assert retry_after_s(value) == asked_s


@pytest.mark.parametrize(("code", "said"), [(403, "access"), (404, "not there"), (418, "refuses")])
def test_statuses_that_stay(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact, code: int, said: str
) -> None:
    origin.fail("big file+.bin", status(code))
    with pytest.raises(FetchError, match=said) as caught:
        store.stat(artifact)
    assert not caught.value.retryable
    assert "Signature" not in str(caught.value)


def test_an_expired_url(origin: FaultyOrigin, store: PresignedStore, artifact: Artifact) -> None:
    path = origin.put("x", b"1").relative_to(origin.root).as_posix()
    with pytest.raises(ExpiredError, match="1970-01-01 00:01:00 UTC"):
        store.stat(Artifact("j", 0, "x", origin.sign(path, expires=60)))


def test_a_range_past_the_end_is_a_change(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact
) -> None:
    with pytest.raises(ChangedError):
        store.open_range(artifact, 200_000, 200_010, ObjectInfo(300_000))


@pytest.mark.parametrize("fault", [reset, stall(1.0), cut(5)])
def test_broken_connections_pass(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact, fault: object
) -> None:
    info = store.stat(artifact)
    origin.fail("big file+.bin", fault, fault)  # type: ignore[arg-type]
    with pytest.raises(TransientError):
        read_with(store, artifact, info)


def read_with(store: PresignedStore, artifact: Artifact, info: ObjectInfo) -> None:
    stream = store.open_range(artifact, 0, 1000, info)
    try:
        fill(stream, bytearray(1000))
    finally:
        stream.close()


def test_an_idle_connection_that_died_is_no_failure(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact
) -> None:
    read(store, artifact, 0, 10)
    origin.fail("big file+.bin", reset)
    assert store.stat(artifact).size_bytes == len(CONTENT)


def test_redirects(origin: FaultyOrigin, store: PresignedStore, artifact: Artifact) -> None:
    elsewhere = origin.put("elsewhere", b"0123456789").relative_to(origin.root).as_posix()
    origin.fail("big file+.bin", redirect(origin.sign(elsewhere)))
    assert store.stat(artifact).size_bytes == 10
    origin.fail("big file+.bin", *[redirect(artifact.url)] * 10)
    with pytest.raises(FetchError, match="redirects"):
        store.stat(artifact)
    origin.faults.clear()
    origin.fail("big file+.bin", redirect("file:///etc/passwd"))
    with pytest.raises(FetchError, match="not an http"):
        store.stat(artifact)


NO_URLS = [
    "http://[bad/x?Signature=S3CR3T",
    "http://u:S3CR3T@a\u2100b/x",
    "http://h:99999/x",
    "http://a..b/x",
    f"http://{'x' * 300}/y",
    "ftp://u:S3CR3T@h/x",
]


@pytest.mark.parametrize("url", NO_URLS)
def test_what_is_no_url(client: HttpClient, url: str) -> None:
    with pytest.raises(FetchError) as caught:
        client.get(url)
    assert not caught.value.retryable
    assert "S3CR3T" not in str(caught.value)


@pytest.mark.parametrize("url", [url for url in NO_URLS if url.isascii()])
def test_a_redirect_to_what_is_no_url(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact, url: str
) -> None:
    origin.fail("big file+.bin", redirect(url))
    with pytest.raises(FetchError) as caught:
        store.stat(artifact)
    assert not caught.value.retryable
    assert "S3CR3T" not in str(caught.value)


@pytest.mark.parametrize("said", ["many", "9" * 5000, "-1", "5, 6"])
def test_counts_that_are_none(
    origin: FaultyOrigin, store: PresignedStore, artifact: Artifact, said: str
) -> None:
    for code, header in (
        (200, {"Content_Length": said}),
        (206, {"Content_Range": f"bytes 0-0/{said}"}),
    ):
        origin.fail("big file+.bin", only(code, **header))
        with pytest.raises(FetchError) as caught:
            store.stat(artifact)
        assert not caught.value.retryable


def only(code: int, **headers: str) -> Fault:
    """Answer with these headers and no body."""

    def fault(handler: FaultyHandler) -> bool:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.close_connection = True
        return True

    return fault


def test_nobody_there(client: HttpClient) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(TransientError):
        client.get(f"http://127.0.0.1:{port}/x?Signature=S3CR3T")
    with pytest.raises(FetchError, match="not an http"):
        client.get("http://h:notaport/x")


def test_tls_with_a_private_authority(origin: FaultyOrigin, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    origin.socket = context.wrap_socket(origin.socket, server_side=True)
    path = origin.put("x", b"0123456789").relative_to(origin.root).as_posix()
    url = origin.sign(path).replace("http:", "https:")
    origin.fail("x", answer(200, b"0123456789"))
    with pytest.raises(FetchError, match="certificate") as caught:
        HttpClient(HttpOptions()).get(url)
    assert not caught.value.retryable
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    client = HttpClient(HttpOptions(ca_bundle=tmp_path / "ca.pem"))
    stream = client.get(url)
    assert stream.read_all(100) == b"0123456789"
    stream.close()
    client.close()
    with pytest.raises(FetchError, match="CA bundle"):
        HttpClient(HttpOptions(ca_bundle=tmp_path / "none.pem")).get(url)


def test_through_a_proxy(
    origin: FaultyOrigin, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []
    proxy = socket.create_server(("127.0.0.1", 0))

    def forward() -> None:
        taken, _ = proxy.accept()
        with taken, socket.create_connection(("127.0.0.1", origin.server_port)) as behind:
            seen.append(taken.recv(65536))
            behind.sendall(seen[0].replace(b"http://storage.test", b"", 1))
            taken.sendall(behind.recv(65536))

    thread = threading.Thread(target=forward)
    thread.start()
    monkeypatch.setenv("http_proxy", f"http://user:pa%20ss@127.0.0.1:{proxy.getsockname()[1]}")
    monkeypatch.delenv("no_proxy", raising=False)
    url = artifact.url.replace(f"127.0.0.1:{origin.server_port}", "storage.test")
    stream = HttpClient(HttpOptions()).get(url, span=(0, 1))
    assert stream.info.size_bytes == len(CONTENT)
    stream.close()
    thread.join()
    proxy.close()
    assert b"Proxy-Authorization: Basic dXNlcjpwYSBzcw==" in seen[0]


def test_headers_stay_with_their_host(origin: FaultyOrigin, client: HttpClient) -> None:
    seen: list[tuple[str, str | None]] = []

    def note(handler: FaultyHandler) -> bool:
        seen.append((handler.headers["Host"], handler.headers["Authorization"]))
        return False

    def note_and(then: Fault) -> Fault:
        return lambda handler: note(handler) or then(handler)

    url = origin.sign(origin.put("x", b"1").relative_to(origin.root).as_posix())
    elsewhere = url.replace("127.0.0.1", "localhost")
    origin.fail(
        "x", note_and(redirect(url)), note_and(redirect(elsewhere)), note_and(redirect(url)), note
    )
    client.get(url, headers={"Authorization": "Api-Key S3CR3T"}).close()
    here, there = url.split("/")[2], elsewhere.split("/")[2]
    key = "Api-Key S3CR3T"
    assert seen == [(here, key), (here, key), (there, None), (here, None)]


def test_head_and_post(origin: FaultyOrigin, client: HttpClient) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "12")
            self.send_header("x-amz-checksum-crc32c", "AAECAw==")
            self.end_headers()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.headers["X-Name"].encode() + body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        sums = (Checksum("crc32c", bytes(range(4))),)
        assert client.head(url) == ObjectInfo(12, checksums=sums)
        stream = client.post(url, b"{}", headers={"X-Name": "n"})
        assert stream.read_all(10) == b"n{}"
        stream.close()
        server.shutdown()


def test_the_machines_own_link_is_refused(origin: FaultyOrigin, artifact: Artifact) -> None:
    client = HttpClient(HttpOptions(connect_timeout_s=0.2))
    with pytest.raises(FetchError, match="own link"):
        client.get("http://169.254.169.254/latest/meta-data/")
    origin.fail("big file+.bin", redirect("http://[fe80::1]/x"))
    with pytest.raises(FetchError, match="own link"):
        client.get(artifact.url)


def test_a_name_that_leads_to_the_machines_own_link(
    origin: FaultyOrigin, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loader.http.client.is_link_local", lambda host: host == "127.0.0.1")
    url = artifact.url.replace("127.0.0.1", "localhost")
    with pytest.raises(FetchError, match="own link"):
        HttpClient(HttpOptions()).get(url, span=(0, 1))
    assert origin.requests == []
    HttpClient(HttpOptions(link_local=True)).get(url, span=(0, 1)).close()


@pytest.mark.parametrize("allowed", [False, True])
def test_a_redirect_from_https_to_http(origin: FaultyOrigin, tmp_path: Path, allowed: bool) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    plain = origin.sign(origin.put("x", b"1").relative_to(origin.root).as_posix())
    said = f"HTTP/1.1 302 Found\r\nLocation: {plain}\r\nContent-Length: 0\r\n\r\n".encode()
    options = HttpOptions(ca_bundle=tmp_path / "ca.pem", insecure_redirects=allowed)
    with answering(said, context) as secure, closing(HttpClient(options)) as client:
        if allowed:
            with closing(client.get(secure.url, span=(0, 1))) as stream:
                assert stream.info.size_bytes == 1
            return
        with pytest.raises(FetchError, match="from https to http") as caught:
            client.get(secure.url, headers={"Authorization": "Api-Key S3CR3T"})
    assert not caught.value.retryable
    assert "Signature" not in str(caught.value)
    assert origin.requests == []


def test_a_redirect_to_https_and_back_to_http_is_one(origin: FaultyOrigin, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    url = origin.sign(origin.put("x", b"1").relative_to(origin.root).as_posix())
    said = f"HTTP/1.1 302 Found\r\nLocation: {url}\r\nContent-Length: 0\r\n\r\n".encode()
    client = HttpClient(HttpOptions(ca_bundle=tmp_path / "ca.pem"))
    with answering(said, context) as secure, closing(client):
        origin.fail("x", redirect(secure.url))
        with pytest.raises(FetchError, match="from https to http"):
            client.get(url)


def test_a_redirect_is_named_by_nobody(
    origin: FaultyOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who names the machine's own link may go there; who is sent there may not."""
    url = origin.sign(origin.put("x.bin", b"x").relative_to(origin.root).as_posix())
    named = HttpClient(HttpOptions(link_local=True))
    for target in ("http://169.254.169.254/latest/", "http://[64:ff9b::a9fe:a9fe]/", "//metadata/"):
        origin.fail("x.bin", redirect(target))
        with pytest.raises(FetchError, match="own link"):
            named.get(url)
    monkeypatch.setattr("loader.http.client.is_link_local", lambda host: host == "127.0.0.1")
    named.get(url).close()
    elsewhere = url.replace("127.0.0.1", "localhost")
    origin.fail("x.bin", redirect(elsewhere))
    with pytest.raises(FetchError):  # a name, and what is behind it
        named.get(url)
    options = HttpOptions(link_local=True, link_local_redirects=True)
    origin.fail("x.bin", redirect(elsewhere))
    HttpClient(options).get(url).close()
