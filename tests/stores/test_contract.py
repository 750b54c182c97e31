"""What every store owes, asked of each of them through the sources that users name."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loader.errors import ChangedError, FetchError, LoaderError, TransientError
from loader.http.objects import Checksum, ObjectInfo
from loader.resolve.manifest import resolve
from loader.stores.registry import Stores
from loader.types import Artifact, ArtifactReference, TrainingCheckpoints
from tests.origin import FaultyOrigin
from tests.stores.api import Api
from tests.stores.places import (
    Bucket,
    FileSystem,
    ListingUrl,
    Memory,
    Place,
    PlainBucket,
    RestApi,
    SignedListing,
    SigV4Listing,
)

CONTENT = bytes(range(256)) * 40
NAMES = ["checkpoint-1/model.safetensors", "checkpoint-1/a b+c%20é.txt", "config.json"]
PLACES = [
    "signed", "listing-url", "sigv4", "baseten", "s3", "s3-plain", "file", "memory",
]  # fmt: skip


@pytest.fixture(params=PLACES)
def place(
    request: pytest.FixtureRequest, origin: FaultyOrigin, s3_url: str, tmp_path: Path
) -> Iterator[Place]:
    api = Api(origin)
    found: dict[str, Place] = {
        "signed": SignedListing(origin, tmp_path),
        "listing-url": ListingUrl(origin, tmp_path),
        "baseten": RestApi(origin, api, tmp_path),
        "file": FileSystem(f"{tmp_path}/bucket"),
        "memory": Memory(f"/{tmp_path.name}"),
    }
    if request.param not in found:
        found["s3"], found["s3-plain"] = Bucket(s3_url), PlainBucket(s3_url)
        found["sigv4"] = SigV4Listing(s3_url, tmp_path)
    yield found[request.param]
    api.stop()


@pytest.fixture
def stores(place: Place) -> Iterator[Stores]:
    found = place.stores()
    yield found
    found.close()
    found.close()


def read(stores: Stores, artifact: Artifact, start: int, end: int, info: ObjectInfo) -> bytes:
    stream = stores.open_range(artifact, start, end, info)
    content = bytearray(end - start)
    rest = memoryview(content)
    try:
        while rest and (count := stream.readinto(rest)):
            rest = rest[count:]
        assert stream.readinto(memoryview(bytearray(8))) == 0
    finally:
        stream.close()
    assert not rest
    return bytes(content)


def test_the_listing_has_every_file_of_every_rank(place: Place, stores: Stores) -> None:
    for name in NAMES:
        place.put(name, CONTENT)
    place.put("config.json", b"{}", rank=1)
    listing = place.listing(stores)
    assert listing.job == "job1"
    assert {a.name for a in listing.artifacts} == {f"rank-0/{n}" for n in NAMES} | {
        "rank-1/config.json"
    }
    sizes = {a.name: a.size_bytes for a in listing.artifacts}
    assert sizes["rank-1/config.json"] in (2, None)
    assert listing.total_count in (4, None)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_ranges(place: Place, stores: Stores, name: str) -> None:
    place.put(name, CONTENT)
    artifact = place.artifact(stores, name)
    info = stores.stat(artifact)
    assert (info.size_bytes, info.ranges) == (len(CONTENT), True)
    for start, end in [(0, 1), (0, len(CONTENT)), (100, 5000), (len(CONTENT) - 1, len(CONTENT))]:
        assert read(stores, artifact, start, end, info) == CONTENT[start:end]


def test_an_empty_file(place: Place, stores: Stores) -> None:
    place.put("empty", b"")
    assert stores.stat(place.artifact(stores, "empty")).size_bytes == 0


@pytest.mark.parametrize("size", [0, 1, 5000, len(CONTENT)])
def test_the_first_bytes_tell_what_the_object_is(place: Place, stores: Stores, size: int) -> None:
    place.put("x", CONTENT[:size])
    artifact = place.artifact(stores, "x")
    stream = stores.open_first(artifact, 5000)
    found = bytearray(5000)
    assert stream.info.size_bytes == size
    assert stream.info.version == stores.stat(artifact).version
    wanted = min(size, 5000)
    filled = 0
    while filled < wanted and (count := stream.readinto(memoryview(found)[filled:wanted])):
        filled += count
    stream.close()
    assert found[:filled] == CONTENT[:wanted]
    assert read(stores, artifact, 0, size, stream.info) == CONTENT[:size] if size else not filled


def test_a_version_stays_while_nothing_changes(place: Place, stores: Stores) -> None:
    place.put("x", CONTENT)
    artifact = place.artifact(stores, "x")
    first, second = stores.stat(artifact), stores.stat(artifact)
    assert first == second
    assert first.version


def test_a_changed_object_is_never_mixed(place: Place, stores: Stores) -> None:
    place.put("x", CONTENT)
    artifact = place.artifact(stores, "x")
    info = stores.stat(artifact)
    read(stores, artifact, 0, 100, info)
    place.put("x", CONTENT[::-1])  # of the same size
    assert stores.stat(artifact).version != info.version
    with pytest.raises(ChangedError):
        read(stores, artifact, 100, 200, info)
    place.put("x", CONTENT[:50])
    with pytest.raises(ChangedError):
        read(stores, artifact, 100, 200, info)


def test_an_object_that_went_away(place: Place, stores: Stores) -> None:
    place.put("x", CONTENT)
    place.put("y", CONTENT)
    artifact = place.artifact(stores, "x")
    info = stores.stat(artifact)
    place.remove("x")
    for ask in (lambda: stores.stat(artifact), lambda: read(stores, artifact, 0, 9, info)):
        with pytest.raises(FetchError) as caught:
            ask()
        assert not isinstance(caught.value, TransientError | ChangedError)
        assert "rank-0/x" in str(caught.value)
        assert_no_secret(caught.value)


def test_many_threads_at_once(place: Place, stores: Stores) -> None:
    for i in range(6):
        place.put(f"f{i}", CONTENT + bytes([i]))
    artifacts = {a.relative_file_name: a for a in place.listing(stores).artifacts}
    together = threading.Barrier(6)

    def ask(i: int) -> bool:
        together.wait()
        artifact = artifacts[f"f{i}"]
        info = stores.stat(artifact)
        whole = read(stores, artifact, 0, info.size_bytes, info)
        return whole == CONTENT + bytes([i])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(6)))


def test_a_stream_that_is_left_in_the_middle(place: Place, stores: Stores) -> None:
    place.put("x", CONTENT)
    artifact = place.artifact(stores, "x")
    info = stores.stat(artifact)
    stream = stores.open_range(artifact, 0, len(CONTENT), info)
    assert stream.readinto(memoryview(bytearray(10))) > 0
    assert stream.info.size_bytes == len(CONTENT)
    stream.close()
    assert read(stores, artifact, 0, 10, info) == CONTENT[:10]


def test_sums_that_the_origin_tells_are_of_the_bytes(place: Place, stores: Stores) -> None:
    place.put("x", CONTENT)
    sums = stores.stat(place.artifact(stores, "x")).checksums
    assert {c.algorithm for c in sums} >= ({"md5", "crc32c"} if place.tells_sums else set())
    assert all(
        c == Checksum("md5", hashlib.md5(CONTENT).digest()) for c in sums if c.algorithm == "md5"
    )


def test_a_job_that_is_not_there(place: Place, stores: Stores) -> None:
    place.put("config.json", b"{}")
    if isinstance(place, PlainBucket):
        place.remove("config.json")  # a folder of ranks alone is taken for the one job asked for
    with pytest.raises(LoaderError) as caught:
        resolve(asks_for("another"), stores.read_listings(place.source(), ("another",)))
    assert not caught.value.retryable
    assert_no_secret(caught.value)


def asks_for(job: str) -> TrainingCheckpoints:
    return TrainingCheckpoints(Path("down"), (ArtifactReference(job, ("rank-0/",)),))


def assert_no_secret(error: LoaderError) -> None:
    for secret in ("S3CR3T", "Signature", "X-Amz"):
        assert secret not in f"{error!s}{error!r}{error.to_json()}"
