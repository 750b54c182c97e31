"""What S3 refuses: a service in front of moto's words the errors."""

from __future__ import annotations

import random
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trustme

from loader.config.settings import Settings
from loader.errors import (
    ChangedError,
    ConfigError,
    DeniedError,
    ExpiredError,
    FetchError,
    TransientError,
)
from loader.fetch.snapshot import fetch
from loader.http import pool
from loader.stores.registry import Stores
from loader.types import Artifact, Manifest
from tests.http.raw import answering
from tests.stores import moto
from tests.stores.front import Front, Refusal
from tests.stores.proxy import TlsFront

CONTENT = random.Random(3).randbytes(3_000_001)
MIDDLE = 1_000_000
SECRETS = {"aws_access_key_id": moto.ACCESS_KEY, "aws_secret_access_key": moto.SECRET_KEY}


@pytest.fixture
def front(s3_url: str) -> Iterator[Front]:
    found = Front(s3_url)
    yield found
    found.stop()


@pytest.fixture
def bucket(s3_url: str) -> str:
    name = f"bucket-{uuid.uuid4().hex}"
    s3 = moto.client(s3_url)
    s3.create_bucket(Bucket=name)
    s3.put_object(Bucket=name, Key="job1/rank-0/x", Body=CONTENT)
    return name


@pytest.fixture
def stores(front: Front) -> Iterator[Stores]:
    own = {"s3_endpoint_url": front.url, "retries": 0}
    with closing(Stores(Settings.without_config(own, secrets=SECRETS))) as found:
        yield found


@pytest.fixture
def artifact(stores: Stores, bucket: str) -> Artifact:
    (listing,) = stores.read_listings(f"s3://{bucket}", ("job1",))
    return listing.artifacts[0]


def is_listing(target: str) -> bool:
    return "list-type" in target


@pytest.mark.parametrize(
    ("refusal", "kind", "next_step"),
    [
        ((400, "ExpiredToken"), ExpiredError, "give new ones"),
        ((403, "AccessDenied"), DeniedError, "check the credentials"),
        ((403, "RequestTimeTooSkewed"), FetchError, "set this machine's clock"),
        ((400, "AuthorizationHeaderMalformed"), FetchError, "name the bucket's region"),
        ((301, "PermanentRedirect"), FetchError, "name the bucket's region"),
        ((503, "SlowDown"), TransientError, ""),
    ],
)
def test_a_listing_that_is_refused(
    front: Front,
    stores: Stores,
    bucket: str,
    refusal: Refusal,
    kind: type[FetchError],
    next_step: str,
) -> None:
    front.refuse = lambda target, _: refusal if is_listing(target) else None
    with pytest.raises(FetchError) as caught:
        stores.read_listings(f"s3://{bucket}", ("job1",))
    assert type(caught.value) is kind
    assert caught.value.where == f"s3://{bucket}"
    assert caught.value.next_step.startswith(next_step)


@pytest.mark.parametrize(
    ("refusal", "kind", "next_step"),
    [
        ((400, "ExpiredToken"), ExpiredError, "give new ones"),
        ((403, "AccessDenied"), DeniedError, "check the credentials"),
    ],
)
def test_an_object_that_is_refused(
    front: Front,
    stores: Stores,
    artifact: Artifact,
    tmp_path: Path,
    refusal: Refusal,
    kind: type[FetchError],
    next_step: str,
) -> None:
    info = stores.stat(artifact)
    front.refuse = lambda target, _: refusal
    ways: list[Callable[[], object]] = [
        lambda: stores.stat(artifact),
        lambda: stores.open_first(artifact, len(CONTENT)),
        lambda: stores.open_first(artifact, 10),
        lambda: stores.open_range(artifact, 0, 10, info),
        lambda: fetch(Manifest((artifact,)), tmp_path, stores),
    ]
    for ask in ways:
        with pytest.raises(FetchError) as caught:
            ask()
        assert type(caught.value) is kind
        assert caught.value.where == artifact.url
        assert caught.value.next_step.startswith(next_step)


def test_a_name_that_is_no_bucket_is_not_shown_with_what_stands_in_it(stores: Stores) -> None:
    with pytest.raises(ConfigError, match="not a place in S3") as caught:
        stores.read_listings("s3://user:S3CR3T@bucket/x", ("job1",))
    assert "S3CR3T" not in str(caught.value)


def test_tls_where_there_is_none_is_not_blamed_on_a_certificate(front: Front) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    secure = TlsFront(front.server_port, context)
    assert read_refused(front.server_port) == "S3 did not answer"
    assert read_refused(secure.server_port) == "the server's certificate is not trusted"
    secure.stop()


def read_refused(port: int) -> str:
    own = {"s3_endpoint_url": f"https://127.0.0.1:{port}", "retries": 0}
    stores = Stores(Settings.without_config(own, secrets=SECRETS))
    with closing(stores), pytest.raises(FetchError) as caught:
        stores.read_listings("s3://bucket", ("job1",))
    return caught.value.what


def read(stream: Any) -> bytes:
    content = bytearray(len(CONTENT))
    place = 0
    while count := stream.readinto(memoryview(content)[place:]):
        place += count
    stream.close()
    return bytes(content[:place])


def rest(stores: Stores, artifact: Artifact) -> bytes:
    """Return the rest of the object, behind its beginning."""
    info = stores.stat(artifact)
    assert read(stores.open_range(artifact, 0, MIDDLE, info)) == CONTENT[:MIDDLE]
    return read(stores.open_range(artifact, MIDDLE, len(CONTENT), info))


def test_a_range_whose_url_has_ended_is_signed_anew(
    front: Front, stores: Stores, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: set[str] = set()

    def refuse(target: str, span: str) -> Refusal | None:
        if span.startswith(f"bytes={MIDDLE}-") and not ended:
            ended.add(target)
            monkeypatch.setattr("loader.stores.s3._SIGNED_S", 901)  # another signature
        return (400, "ExpiredToken") if target in ended else None

    front.refuse = refuse
    assert rest(stores, artifact) == CONTENT[MIDDLE:]
    first, second = (t for t, span in front.asked if span.startswith(f"bytes={MIDDLE}-"))
    assert first in ended
    assert second not in ended


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        ((400, "ExpiredToken"), ExpiredError),
        ((403, "AccessDenied"), DeniedError),
        ((412, "PreconditionFailed"), ChangedError),
        ((503, "SlowDown"), TransientError),
    ],
)
def test_a_range_that_is_refused(
    front: Front, stores: Stores, artifact: Artifact, refusal: Refusal, kind: type[FetchError]
) -> None:
    front.refuse = lambda _, span: refusal if span.startswith(f"bytes={MIDDLE}-") else None
    with pytest.raises(kind) as caught:
        rest(stores, artifact)
    assert "Signature" not in str(caught.value)


SLOW = {
    "a head": (b"HTTP/1.1 200 OK\r\nA: ", b"b"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a page": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n<ListBucketResult>", b" "),
    "a page without a length": (b"HTTP/1.1 200 OK\r\n\r\n<ListBucketResult>", b" "),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "a refusal": (b"HTTP/1.1 403 No\r\nContent-Length: 99999\r\n\r\n<Error>", b" "),
}


@pytest.mark.parametrize("name", SLOW)
def test_what_boto3_asks_for_comes_by_the_rules_of_every_answer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 2 bytes a second its own client would read a page for a week."""
    monkeypatch.setattr(pool, "_PATIENCE_S", 0.3)
    first, piece = SLOW[name]

    def talk(sock: socket.socket, request: bytes) -> None:
        sock.sendall(first)
        while True:
            sock.sendall(piece)
            time.sleep(0.05)

    began = time.monotonic()
    with answering(talk) as origin:
        own = {"s3_endpoint_url": origin.url, "retries": 1, "stall_timeout_s": 0.5}
        stores = Stores(Settings.without_config(own, secrets=SECRETS))
        with closing(stores), pytest.raises(TransientError, match="S3 did not answer"):
            stores.read_listings("s3://bucket", ("job1",))
        assert len(origin.requests) >= 2  # asked once more
    assert time.monotonic() - began < 20


def test_a_page_longer_than_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loader.stores.s3._PAGE_BYTES", 1000)

    def talk(sock: socket.socket, request: bytes) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            sock.sendall(b" " * 1000)

    with answering(talk) as origin:
        own = {"s3_endpoint_url": origin.url, "retries": 0}
        stores = Stores(Settings.without_config(own, secrets=SECRETS))
        with closing(stores), pytest.raises(FetchError, match="too long"):
            stores.read_listings("s3://bucket", ("job1",))
