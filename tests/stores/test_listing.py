"""Listings as the platform writes them, and every way in which they are wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loader.config.settings import Settings
from loader.errors import ListingError
from loader.stores.listing import parse_listings
from loader.stores.registry import Stores
from tests.origin import FaultyOrigin, status, write_listing

ENTRY = {"url": "https://h/x?Signature=S3CR3T", "relative_file_name": "a b+c.txt", "node_rank": 1}


def document(**fields: Any) -> dict[str, Any]:
    return {"timestamp": "t", "job": {"id": "job1"}, "checkpoint_artifacts": [ENTRY]} | fields


def parse(value: object) -> Any:
    return parse_listings(json.dumps(value).encode(), "listing.json")


def test_an_entry_as_the_platform_writes_it() -> None:
    (listing,) = parse(document())
    assert listing.job == "job1"
    assert listing.total_count is None
    assert listing.artifacts[0].path == "job1/rank-1/a b+c.txt"
    assert listing.artifacts[0].size_bytes is None


def test_sizes_counts_and_several_jobs() -> None:
    page = {"presigned_urls": [ENTRY | {"size_bytes": 0}], "training_job_id": "job2"}
    first, second = parse([document(total_count=1), page | {"total_count": 1}])
    assert (first.job, second.job, first.total_count) == ("job1", "job2", 1)
    assert second.artifacts[0].size_bytes == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"url": 5}, "url"),
        ({"url": "file:///etc/passwd"}, "url"),
        ({"relative_file_name": ""}, "relative_file_name"),
        ({"relative_file_name": "\ud800"}, "Unicode"),
        ({"node_rank": -1}, "node_rank"),
        ({"node_rank": True}, "node_rank"),
        ({"node_rank": "0"}, "node_rank"),
        ({"node_rank": 10**4000}, "node_rank"),
        ({"size_bytes": 1.5}, "size_bytes"),
        ({"size_bytes": 1e308}, "size_bytes"),
        ({"size_bytes": 1 << 63}, "size_bytes"),
        ({"size_bytes": 10**4000}, "size_bytes"),
    ],
)
def test_wrong_entries_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ListingError) as caught:
        parse(document(checkpoint_artifacts=[ENTRY, ENTRY | change, 7]))
    (line,) = [p for p in caught.value.problems if "checkpoint_artifacts[1]" in p]
    assert said in line
    assert "checkpoint_artifacts[2]" in str(caught.value)
    assert "S3CR3T" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [[], {}, 5, {"job": {"id": 5}, "checkpoint_artifacts": []}, {"job": {"id": "j"}}]
)
def test_what_is_no_listing(value: object) -> None:
    with pytest.raises(ListingError, match="not an artifact listing"):
        parse(value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json(text: bytes) -> None:
    with pytest.raises(ListingError, match="not JSON"):
        parse_listings(text, "listing.json")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"total_count": -1}, "total_count"),
        ({"total_count": 10**4000}, "total_count"),
        ({"next_page_token": 1000}, "next_page_token"),
        ({"job": {"id": "../x"}}, "job.id"),
    ],
)
def test_wrong_fields(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ListingError) as caught:
        parse(document(**fields))
    assert said in str(caught.value)


@pytest.fixture
def stores() -> Iterator[Stores]:
    found = Stores(Settings.without_config({"retries": 0}))
    yield found
    found.close()


def test_from_a_file_and_from_a_url(origin: FaultyOrigin, stores: Stores) -> None:
    origin.put("x", b"1")
    path = write_listing(origin, origin.folder() / "listing.json")
    relative = path.relative_to(origin.root).as_posix()
    listings = stores.read_listings(str(path))
    assert listings == stores.read_listings(origin.sign(relative))
    assert listings == stores.read_listings(origin.sign(relative).replace("http:", "HTTP:"))
    assert listings[0].artifacts


def test_a_listing_that_cannot_be_read(
    origin: FaultyOrigin, stores: Stores, tmp_path: Path
) -> None:
    with pytest.raises(ListingError, match="cannot be read"):
        stores.read_listings(str(tmp_path / "none.json"))
    with pytest.raises(ListingError, match="cannot be fetched"):
        stores.read_listings(origin.sign("none.json"))
    path = write_listing(origin, origin.folder() / "listing.json")
    relative = path.relative_to(origin.root).as_posix()
    with pytest.raises(ListingError, match="expired") as caught:
        stores.read_listings(origin.sign(relative, expires=1))
    assert "Signature" not in str(caught.value)
    origin.fail("listing.json", status(500))
    with pytest.raises(ListingError, match="HTTP 500"):
        stores.read_listings(origin.sign(relative))


def test_a_listing_behind_a_url_is_asked_for_again(origin: FaultyOrigin) -> None:
    origin.put("x", b"1")
    path = write_listing(origin, origin.folder() / "listing.json")
    origin.fail("listing.json", status(503))
    stores = Stores(Settings.without_config())
    (listing,) = stores.read_listings(origin.sign(path.relative_to(origin.root).as_posix()))
    stores.close()
    assert listing.job == "job1"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "http://169.254.169.254/latest/meta-data/",
        "http://[fe80::1]:80/x",
        "https://0xA9FEA9FE/x",
        "http://a@169.254.169.254?x=//h/",
        "http://METADATA.google.internal/x",
    ],
)
def test_urls_that_lead_to_this_machine_have_to_be_allowed(url: str) -> None:
    with pytest.raises(ListingError) as caught:
        parse(document(checkpoint_artifacts=[ENTRY | {"url": url}]))
    assert "allow_local_urls" in str(caught.value)
    text = json.dumps(document(checkpoint_artifacts=[ENTRY | {"url": url}])).encode()
    (listing,) = parse_listings(text, "listing.json", local_urls=True)
    assert listing.artifacts[0].url == url
    loopback = document(checkpoint_artifacts=[ENTRY | {"url": "http://127.0.0.1:1/x"}])
    assert parse(loopback)[0].artifacts
