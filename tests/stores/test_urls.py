"""Signed URLs that end in the middle of things, each sort renewed from where it came."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loader.config.settings import Settings
from loader.errors import ExpiredError, FetchError, ListingError, TransientError
from loader.fetch.snapshot import FetchOptions, fetch
from loader.stores.base import ByteStream
from loader.stores.registry import Stores
from loader.stores.urls import ReadSource, SignedUrls
from loader.types import Artifact, Listing, Manifest
from tests.origin import Fault, FaultyHandler, FaultyOrigin, act, answer, status, write_listing
from tests.stores.api import KEY, Api

EXPIRED = b"<Error><Code>ExpiredToken</Code></Error>"


@pytest.fixture
def stores() -> Iterator[Stores]:
    found = Stores(Settings.without_config({"retries": 0}))
    yield found
    found.close()


def write_expired(origin: FaultyOrigin, path: Path) -> None:
    """Write a listing whose URLs ended a minute after 1970 began."""
    listing = origin.listing("job1")
    entries = listing["checkpoint_artifacts"]
    assert isinstance(entries, list)
    folder = origin.folder("job1").relative_to(origin.root).as_posix()
    for entry in entries:
        entry["url"] = origin.sign(f"{folder}/{entry['relative_file_name']}", expires=60)
    path.write_text(json.dumps(listing))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A place for a listing file."""
    return tmp_path / "listing.json"


@pytest.fixture
def ended(origin: FaultyOrigin, stores: Stores, path: Path) -> Artifact:
    """The file x, as a listing file at *path* names it whose URLs have ended."""
    origin.put("x", b"123")
    write_expired(origin, path)
    return read_one(stores, str(path))


def read_one(stores: Stores, source: str) -> Artifact:
    """Return the only artifact at *source*."""
    (listing,) = stores.read_listings(source)
    (artifact,) = listing.artifacts
    return artifact


def publish(origin: FaultyOrigin, lifetime_s: float) -> str:
    """Put the file x and a listing behind the URL that is returned; x's URL ends in time."""
    origin.put("x", b"123")
    url = origin.sign("listing.json")
    republish(origin, lifetime_s)
    return url


def republish(origin: FaultyOrigin, lifetime_s: float) -> None:
    """Sign what lies in the listing anew."""
    origin.lifetime_s = lifetime_s
    write_listing(origin, origin.root / "listing.json")


def test_a_listing_file_that_has_ended_says_when_and_what_to_do(
    origin: FaultyOrigin, stores: Stores, path: Path, ended: Artifact
) -> None:
    with pytest.raises(ExpiredError, match="1970-01-01 00:01:00 UTC") as caught:
        stores.stat(ended)
    assert "truss train get_checkpoint_urls" in caught.value.next_step
    write_listing(origin, path)
    assert stores.stat(ended).size_bytes == 3


def test_a_listing_file_that_was_spoilt_meanwhile(
    stores: Stores, path: Path, ended: Artifact
) -> None:
    path.write_text("{")
    with pytest.raises(ExpiredError) as caught:
        stores.stat(ended)
    assert "not JSON" in str(caught.value)


def test_a_listing_url_is_read_again_in_the_middle_of_a_transfer(
    origin: FaultyOrigin, stores: Stores, tmp_path: Path
) -> None:
    content = bytes(range(256)) * 4096
    origin.put("big.bin", content)
    origin.put("other.bin", content)
    path = write_listing(origin, origin.root / "listing.json")
    (listing,) = stores.read_listings(origin.sign(path.name))
    asked = len(origin.requests)

    def end_all() -> None:
        for name in ("big.bin", "other.bin"):
            origin.fail(name, *[only_old(answer(400, EXPIRED))] * 30)

    old = {a.url for a in listing.artifacts}

    def only_old(fault: Fault) -> Fault:
        def check(handler: FaultyHandler) -> bool:
            return any(url.endswith(handler.path) for url in old) and fault(handler)

        return check

    origin.lifetime_s += 5  # another signature
    write_listing(origin, path)
    origin.fail("big.bin", act(lambda: None), act(lambda: None), act(end_all))
    options = FetchOptions(range_bytes=1 << 16, concurrency=4, retries=0)
    snapshot = fetch(Manifest(listing.artifacts), tmp_path / "down", stores, options)
    assert snapshot.fetched_bytes == 2 * len(content)
    for file in snapshot.files:
        assert (snapshot.root / file.path).read_bytes() == content
    again = [p for p, _ in origin.requests[asked:] if p.endswith("listing.json")]
    assert len(again) == 1, "every thread read the listing for itself"


@pytest.mark.parametrize("known", [True, False], ids=["a range", "a first request"])
def test_a_request_whose_url_has_ended_is_asked_of_a_newer_one(
    origin: FaultyOrigin, stores: Stores, known: bool
) -> None:
    content = bytes(range(256)) * 8192
    path = origin.put("x", content).relative_to(origin.root).as_posix()
    artifact = read_one(stores, origin.sign(write_listing(origin, origin.root / "l.json").name))
    info = stores.stat(artifact)
    origin.lifetime_s += 5  # another signature
    write_listing(origin, origin.root / "l.json")
    origin.fail("/x", answer(400, EXPIRED))
    if known:
        stream = stores.open_range(artifact, 0, 1_500_000, info)
    else:
        stream = stores.send_first(artifact, 1_500_000).receive()
    assert read_all(stream) == content[:1_500_000]
    spans = [span for _, span in origin.requests[-3:]]
    assert spans == ["bytes=0-1499999", "", "bytes=0-1499999"]
    assert origin.requests[-2][0].endswith("l.json")
    newest = stores._signed._urls.current(artifact)
    assert newest != artifact.url
    assert path in newest


def test_a_first_request_that_nobody_can_renew(
    origin: FaultyOrigin, stores: Stores, path: Path
) -> None:
    origin.put("x", bytes(2_000_000))
    artifact = read_one(stores, str(write_listing(origin, path)))
    origin.fail("/x", answer(400, EXPIRED))
    pending = stores.send_first(artifact, 1_000_000)
    with pytest.raises(ExpiredError, match="expired") as caught:
        pending.receive()
    assert "truss train get_checkpoint_urls" in caught.value.next_step


def read_all(stream: ByteStream) -> bytes:
    content, buffer = bytearray(), memoryview(bytearray(1 << 20))
    while count := stream.readinto(buffer):
        content += buffer[:count]
    stream.close()
    return bytes(content)


def test_the_api_is_asked_again(origin: FaultyOrigin) -> None:
    origin.put("x", b"123")
    origin.lifetime_s = -10
    api = Api(origin)
    own = {"api_url": api.url, "retries": 0}
    stores = Stores(Settings.without_config(own, secrets={"baseten_api_key": KEY}))
    (listing,) = stores.read_listings("baseten", ("job1",))
    with pytest.raises(ExpiredError):
        stores.stat(listing.artifacts[0])
    origin.lifetime_s = 3600
    assert stores.stat(listing.artifacts[0]).size_bytes == 3
    stores.close()
    api.stop()


def test_a_url_that_ends_soon_is_renewed_before_it_is_used(
    origin: FaultyOrigin, stores: Stores
) -> None:
    artifact = read_one(stores, publish(origin, 30))
    republish(origin, 3600)
    for _ in range(3):
        stores.stat(artifact)
    names = [p.rpartition("/")[2] for p, _ in origin.requests]
    assert names == ["listing.json", "listing.json", "x", "x", "x"]


def test_what_cannot_be_renewed_yet_is_used_until_it_ends(
    origin: FaultyOrigin, stores: Stores
) -> None:
    artifact = read_one(stores, publish(origin, 30))
    origin.fail("listing.json", status(404))
    for _ in range(3):
        assert stores.stat(artifact).size_bytes == 3


def test_a_refusal_is_asked_about_once_and_then_told(origin: FaultyOrigin, stores: Stores) -> None:
    artifact = read_one(stores, publish(origin, 3600))
    origin.fail("/x", *[status(403)] * 10)
    with pytest.raises(FetchError, match="access"):
        stores.stat(artifact)
    assert len(origin.ranges_of("listing.json")) == 2
    assert len(origin.ranges_of("/x")) <= 2


def test_a_source_that_is_busy_is_worth_another_try(origin: FaultyOrigin, stores: Stores) -> None:
    artifact = read_one(stores, publish(origin, -10))
    republish(origin, 3600)
    origin.fail("listing.json", status(503), status(503))
    with pytest.raises(TransientError):
        stores.stat(artifact)
    assert stores.stat(artifact).size_bytes == 3


def test_one_thread_renews_for_all() -> None:
    old = Artifact("job1", 0, "x", "http://h/x?Expires=60")
    new = Artifact("job1", 0, "x", "http://h/x?Expires=99999999999")
    count = 0

    class Source:
        def read(self) -> tuple[Listing, ...]:
            nonlocal count
            count += 1
            return (Listing("job1", (new,)),)

        def has_news(self) -> bool:
            return True

    told: list[int] = []
    source = ReadSource(Source(), (Listing("job1", (old,)),))
    urls = SignedUrls([source], on_renewal=lambda: told.append(count))
    together = threading.Barrier(8)

    def renew(_: int) -> str | None:
        together.wait()
        return urls.renewed(old, old.url)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(renew, range(8))) == {new.url}
    assert count == 1
    assert told == [1]
    assert urls.current(old) == new.url


def test_a_file_that_the_new_listing_lacks(
    origin: FaultyOrigin, stores: Stores, path: Path, ended: Artifact
) -> None:
    origin.put("y", b"123")
    (origin.folder() / "x").unlink()
    write_listing(origin, path)
    with pytest.raises(ExpiredError):
        stores.stat(ended)
    path.unlink()
    with pytest.raises(ListingError):
        stores.read_listings(str(path))


def test_only_sources_of_the_job_that_may_have_news_are_read() -> None:
    old = Artifact("job1", 0, "x", "http://h/x?Expires=60")
    reads: list[str] = []

    class Source:
        def __init__(self, name: str, news: bool) -> None:
            self._name, self._news = name, news

        def read(self) -> tuple[Listing, ...]:
            reads.append(self._name)
            return (Listing("job1", (old,)),)

        def has_news(self) -> bool:
            return self._news

    urls = SignedUrls(
        [
            ReadSource(Source("static", news=False), (Listing("job1", (old,)),)),
            ReadSource(Source("of another job", news=True), (Listing("job2", ()),)),
            ReadSource(Source("fresh", news=True), (Listing("job1", (old,)),)),
        ]
    )
    assert urls.renewed(old, old.url) is None
    assert reads == ["fresh"]
