"""Sizes that the listing lacks, and those that are another than what comes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader.config.settings import Settings
from loader.errors import FetchError
from loader.fetch.sizes import ask_sizes, ask_version
from loader.fetch.snapshot import FetchOptions, fetch, read_artifact
from loader.stores.presigned import PresignedStore
from loader.stores.registry import Stores
from loader.types import Artifact, Manifest
from tests.origin import FaultyOrigin, answer, status

COUNT = 40


@pytest.fixture
def manifest(origin: FaultyOrigin) -> Manifest:
    paths = [origin.put(f"{i}.bin", b"x" * i) for i in range(COUNT)]
    urls = [origin.sign(path.relative_to(origin.root).as_posix()) for path in paths]
    files = [Artifact("job1", 0, f"{i}.bin", url) for i, url in enumerate(urls)]
    known = Artifact("job1", 0, "known.bin", "http://127.0.0.1:9/", 7)
    return Manifest((*files[:30], known), left_out=tuple(files[30:]))


def told(manifest: Manifest) -> list[int | None]:
    return [a.size_bytes for a in (*manifest.files, *manifest.left_out)]


WHOLE = [*range(30), 7, *range(30, COUNT)]


def test_one_byte_of_each_is_asked_for(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest
) -> None:
    found = ask_sizes(manifest, store, 4)
    assert told(found) == WHOLE
    assert not found.warnings
    assert [span for _, span in origin.requests] == ["bytes=0-0"] * COUNT


def test_a_passing_failure_is_asked_again(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest
) -> None:
    origin.fail("/7.bin", status(503), status(503))
    assert told(ask_sizes(manifest, store, 4)) == WHOLE


def test_one_that_is_not_told_leaves_the_others(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest
) -> None:
    origin.fail("/7.bin", status(404))
    origin.fail("/35.bin", status(404))
    found = ask_sizes(manifest, store, 1)
    lacking = {7, WHOLE.index(35)}
    assert told(found) == [None if i in lacking else WHOLE[i] for i in range(len(WHOLE))]
    assert found.warnings == (
        "the sizes of 2 of 40 files are unknown, such as that of job1/rank-0/7.bin: "
        "the object is not there (HTTP 404 Not Found, Fault)",
    )


def test_an_origin_that_does_not_answer_is_not_asked_for_each(
    origin: FaultyOrigin, store: PresignedStore, manifest: Manifest
) -> None:
    origin.fail(".bin", *[status(503)] * 100)
    found = ask_sizes(manifest, store, 1)
    assert len(origin.requests) == 3
    assert told(found) == [None] * 30 + [7] + [None] * 10
    assert found.warnings[0].startswith("the sizes of 40 of 40 files are unknown, such as")


PAGE = b"<html>sign in</html>"


@pytest.fixture
def stores() -> Iterator[Stores]:
    found = Stores(Settings.without_config({"retries": 0}))
    yield found
    found.close()


def write(origin: FaultyOrigin, path: Path, size: int) -> Path:
    """Write a listing that says of each file that it has so many bytes."""
    listing = origin.listing("job1")
    entries = listing["checkpoint_artifacts"]
    assert isinstance(entries, list)
    path.write_text(
        json.dumps(
            listing | {"checkpoint_artifacts": [entry | {"size_bytes": size} for entry in entries]}
        )
    )
    return path


@pytest.mark.parametrize("verify", ["sample", "full"])
@pytest.mark.parametrize("size", [5 << 30, 5 << 20, 100, len(PAGE) - 1, 0])
def test_a_page_in_the_place_of_a_file(
    origin: FaultyOrigin, stores: Stores, tmp_path: Path, size: int, verify: str
) -> None:
    origin.put("model.bin", b"")
    origin.fail("model.bin", *[answer(200, PAGE)] * 9)
    (listing,) = stores.read_listings(str(write(origin, tmp_path / "listing.json", size)))
    options = FetchOptions(verify=verify)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(FetchError, match="not of the size that the listing says") as caught:
            fetch(Manifest(listing.artifacts), tmp_path / "files", stores, options)
        assert caught.value.expected == f"{size} bytes, by the listing"
        assert caught.value.got == f"{len(PAGE)} bytes, by the origin"
        assert "get the listing again" in caught.value.next_step
        assert not (tmp_path / "files/job1/rank-0/model.bin").exists()
    for read in (lambda a: read_artifact(a, tmp_path, stores), lambda a: ask_version(a, stores, 0)):
        with pytest.raises(FetchError, match="not of the size"):
            read(listing.artifacts[0])


def test_a_listing_that_is_older_than_its_files_is_read_once_more(
    origin: FaultyOrigin, stores: Stores, tmp_path: Path
) -> None:
    for i in range(20):
        origin.put(f"{i}.bin", bytes(300))
    path = write(origin, tmp_path / "listing.json", 100)
    (listing,) = stores.read_listings(str(path))
    write(origin, path, 300)
    fetch(Manifest(listing.artifacts), tmp_path / "files", stores)
    assert (tmp_path / "files/job1/rank-0/7.bin").stat().st_size == 300
    write(origin, path, 200)  # it is read again once
    origin.put("7.bin", bytes(200))
    with pytest.raises(FetchError, match="not of the size") as caught:
        fetch(Manifest(listing.artifacts), tmp_path / "files", stores)
    assert caught.value.expected == "300 bytes, by the listing, read again"
    assert "again" not in caught.value.next_step


def test_a_listing_that_stays_wrong_or_is_gone(
    origin: FaultyOrigin, stores: Stores, tmp_path: Path
) -> None:
    origin.put("a.bin", bytes(300))
    path = write(origin, tmp_path / "listing.json", 100)
    (listing,) = stores.read_listings(str(path))
    path.write_text("{}")
    with pytest.raises(FetchError, match="not of the size") as caught:
        fetch(Manifest(listing.artifacts), tmp_path / "files", stores)
    assert caught.value.problems == ("reading the listing again failed: not an artifact listing",)


def test_folders_are_listed_again_too(stores: Stores, tmp_path: Path) -> None:
    file = tmp_path / "place/job1/rank-0/a.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"123")
    (listing,) = stores.read_listings((tmp_path / "place").as_uri())
    file.write_bytes(b"12345")
    fetch(Manifest(listing.artifacts), tmp_path / "files", stores)
    assert (tmp_path / "files/job1/rank-0/a.bin").read_bytes() == b"12345"
