"""What an origin refuses, or does in an odd way, in the midst of a fetch."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader.config.settings import Settings
from loader.errors import ChangedError, DeniedError, ExpiredError, FetchError
from loader.fetch.snapshot import FetchOptions, fetch
from loader.stores.presigned import PresignedStore
from loader.stores.registry import Stores
from loader.types import Artifact, Manifest
from tests.origin import (
    Fault,
    FaultyHandler,
    FaultyOrigin,
    act,
    answer,
    cut,
    ignore_range,
    redirect,
    status,
    write_listing,
)

KIB = 1 << 10
CONTENT = random.Random(29).randbytes(500 * KIB + 7)
OPTIONS = FetchOptions(concurrency=2, retries=2, range_bytes=64 * KIB)
NOTHING = act(lambda: None)
EXPIRED = b"<Error><Code>ExpiredToken</Code></Error>"


@pytest.fixture
def stores() -> Iterator[Stores]:
    found = Stores(Settings.without_config({"retries": 0}))
    yield found
    found.close()


@pytest.fixture
def published(origin: FaultyOrigin, stores: Stores) -> Manifest:
    """The file big.bin, in a listing behind a URL, which signs anew each time that it is read."""
    origin.put("big.bin", CONTENT)
    path = write_listing(origin, origin.root / "listing.json")
    (listing,) = stores.read_listings(origin.sign(path.name))
    return Manifest(listing.artifacts)


@pytest.fixture
def manifest(origin: FaultyOrigin) -> Manifest:
    path = origin.put("big.bin", CONTENT).relative_to(origin.root).as_posix()
    return Manifest((Artifact("job1", 0, "big.bin", origin.sign(path)),))


def only_for(url: str, fault: Fault) -> Fault:
    """Let the fault meet requests for *url* alone."""

    def check(handler: FaultyHandler) -> bool:
        return url.endswith(handler.path) and fault(handler)

    return check


def sign_anew(origin: FaultyOrigin) -> None:
    """Let the listing's URL answer with other signatures from now on."""
    origin.lifetime_s += 5
    write_listing(origin, origin.root / "listing.json")


def read_anew(origin: FaultyOrigin) -> int:
    """Return how often the listing was read since the first time."""
    return len(origin.ranges_of("listing.json")) - 1


def test_a_url_that_ends_midway_is_renewed(
    origin: FaultyOrigin, stores: Stores, published: Manifest, tmp_path: Path
) -> None:
    ended = only_for(published.files[0].url, answer(400, EXPIRED))
    origin.fail("big.bin", NOTHING, NOTHING, *[ended] * 30)
    sign_anew(origin)
    found = fetch(published, tmp_path / "down", stores, OPTIONS)
    assert (found.root / "job1/rank-0/big.bin").read_bytes() == CONTENT
    assert read_anew(origin) == 1


def test_a_listing_that_has_ended_says_when(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest, tmp_path: Path
) -> None:
    path = origin.put("big.bin", CONTENT).relative_to(origin.root).as_posix()
    over = Manifest((Artifact("job1", 0, "big.bin", origin.sign(path, expires=60)),))
    with pytest.raises(ExpiredError, match="1970-01-01 00:01:00 UTC") as caught:
        fetch(over, tmp_path / "down", store, OPTIONS)
    assert "get_checkpoint_urls" in caught.value.next_step
    assert len(origin.ranges_of("big.bin")) == 0, "the origin's own check refused it"


def test_a_refused_url_is_renewed_once(
    origin: FaultyOrigin, stores: Stores, published: Manifest, tmp_path: Path
) -> None:
    refused = only_for(published.files[0].url, status(403))
    origin.fail("big.bin", NOTHING, NOTHING, *[refused] * 30)
    sign_anew(origin)
    found = fetch(published, tmp_path / "down", stores, OPTIONS)
    assert (found.root / "job1/rank-0/big.bin").read_bytes() == CONTENT
    assert read_anew(origin) == 1


@pytest.mark.parametrize("code", [401, 403])
def test_a_refusal_that_stays_is_an_error_at_once(
    origin: FaultyOrigin, stores: Stores, published: Manifest, tmp_path: Path, code: int
) -> None:
    options = FetchOptions(concurrency=1, retries=5, range_bytes=64 * KIB)
    origin.fail("big.bin", NOTHING, NOTHING, *[status(code)] * 30)
    sign_anew(origin)
    with pytest.raises(DeniedError):
        fetch(published, tmp_path / "down", stores, options)
    assert read_anew(origin) == 1
    assert len(origin.ranges_of("big.bin")) == 4, "the new URL was tried once"
    origin.faults.clear()
    assert fetch(published, tmp_path / "down", stores, options).fetched_bytes < len(CONTENT)


def part_of(size: int, **headers: str) -> Fault:
    """Answer with the bytes that are asked for, of an object of *size* bytes with these headers."""

    def fault(handler: FaultyHandler) -> bool:
        start, last = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        del handler.headers["If-Match"]
        span = f"bytes {start}-{last}/{size}"
        return answer(206, CONTENT[start : last + 1], Content_Range=span, **headers)(handler)

    return fault


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (part_of(len(CONTENT), ETag='"a"'), part_of(len(CONTENT), ETag='"b"')),
        (part_of(len(CONTENT), ETag='"a"'), part_of(len(CONTENT) + 1, ETag='"a"')),
        (part_of(len(CONTENT), Last_Modified="x"), part_of(len(CONTENT), Last_Modified="y")),
        (part_of(len(CONTENT), ETag='W/"a"'), part_of(len(CONTENT), ETag='W/"b"')),
    ],
    ids=["ETag", "size", "date", "weak ETag"],
)
def test_another_object_midway_is_an_error_at_once(
    origin: FaultyOrigin,
    store: PresignedStore,
    manifest: Manifest,
    tmp_path: Path,
    first: Fault,
    later: Fault,
) -> None:
    origin.fail("big.bin", first, first, first, *[later] * 30)
    with pytest.raises(ChangedError):
        fetch(manifest, tmp_path / "down", store, OPTIONS)
    assert not (tmp_path / "down/job1/rank-0/big.bin").exists()
    assert len(origin.ranges_of("big.bin")) <= 3 + OPTIONS.concurrency
    origin.faults.clear()
    fetch(manifest, tmp_path / "down", store, OPTIONS)
    assert (tmp_path / "down/job1/rank-0/big.bin").read_bytes() == CONTENT


def test_a_tag_is_the_same_where_it_is_told_as_a_weak_one(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest, tmp_path: Path
) -> None:
    weak, strong = (part_of(len(CONTENT), ETag=tag) for tag in ('W/"a"', '"a"'))
    for name, first, later in [("down", weak, strong), ("there", strong, weak)]:
        origin.faults.clear()
        origin.fail("big.bin", first, *[later] * 30)
        fetch(manifest, tmp_path / name, store, OPTIONS)
        assert (tmp_path / name / "job1/rank-0/big.bin").read_bytes() == CONTENT
        origin.faults.clear()
        origin.fail("big.bin", later)
        assert fetch(manifest, tmp_path / name, store, OPTIONS).fetched_bytes == 0


def test_what_has_no_version_comes_in_one_request(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest, tmp_path: Path
) -> None:
    def whole(handler: FaultyHandler) -> bool:
        return answer(200, CONTENT)(handler)

    origin.fail("big.bin", part_of(len(CONTENT)), cut(100), whole, part_of(len(CONTENT)))
    fetch(manifest, tmp_path / "down", store, OPTIONS)
    assert (tmp_path / "down/job1/rank-0/big.bin").read_bytes() == CONTENT
    assert origin.ranges_of("big.bin")[1:] == ["", ""]


def test_the_pause_that_the_origin_asks_for(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest, tmp_path: Path
) -> None:
    at: list[float] = []
    options = FetchOptions(concurrency=1, retries=2, range_bytes=1 << 20)
    note = act(lambda: at.append(time.monotonic()))

    def busy(handler: FaultyHandler) -> bool:
        return note(handler) or status(503, Retry_After="1")(handler)

    origin.fail("big.bin", NOTHING, busy, note)
    fetch(manifest, tmp_path / "down", store, options)
    assert at[1] - at[0] >= 1.0


def test_without_ranges_it_starts_over_after_a_break(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest, tmp_path: Path
) -> None:
    def breaks(handler: FaultyHandler) -> bool:
        return ignore_range(handler) or cut(300 * KIB)(handler)

    origin.fail("big.bin", ignore_range, breaks, *[ignore_range] * 9)
    found = fetch(manifest, tmp_path / "down", store, OPTIONS)
    assert (found.root / "job1/rank-0/big.bin").read_bytes() == CONTENT
    assert len(origin.ranges_of("big.bin")) == 3


def test_a_circle_of_redirects_is_an_error(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest, tmp_path: Path
) -> None:
    origin.fail("big.bin", NOTHING, *[redirect(manifest.files[0].url)] * 99)
    options = FetchOptions(concurrency=1, retries=3, range_bytes=1 << 20)
    with pytest.raises(FetchError, match="5 redirects"):
        fetch(manifest, tmp_path / "down", store, options)
    assert len(origin.ranges_of("big.bin")) == 1 + 6


def test_every_range_is_tied_to_the_version(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest, tmp_path: Path
) -> None:
    tags: list[str | None] = []

    def note(handler: FaultyHandler) -> bool:
        tags.append(handler.headers.get("If-Match"))
        return False

    origin.fail("big.bin", *[note] * 99)
    fetch(manifest, tmp_path / "down", store, OPTIONS)
    assert tags[0] is None
    assert len(tags) > 2
    assert len(set(tags[1:])) == 1
    assert str(tags[1]).startswith('"')
