"""What the origin says that the bytes sum up to is compared, without a second read."""

from __future__ import annotations

import hashlib
import random
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from awscrt.checksums import crc32c, crc64nvme

from loader.errors import FetchError
from loader.fetch.snapshot import FetchOptions, fetch
from loader.fetch.sums import choose_check
from loader.stores.base import Algorithm, Checksum, ObjectInfo
from loader.stores.http import HttpClient
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest
from tests.origin import FaultyOrigin, act, status

RANGE = 64 << 10
PART = 80 << 10
CONTENT = random.Random(3).randbytes(5 * PART + 99)
SUMS: dict[Algorithm, bytes] = {
    "crc64nvme": crc64nvme(CONTENT).to_bytes(8, "big"),
    "crc32c": crc32c(CONTENT).to_bytes(4, "big"),
    "crc32": zlib.crc32(CONTENT).to_bytes(4, "big"),
    "md5": hashlib.md5(CONTENT).digest(),
    "sha1": hashlib.sha1(CONTENT).digest(),
    "sha256": hashlib.sha256(CONTENT).digest(),
}


class TellingStore(PresignedStore):
    """A store whose origin tells sums, as S3 does."""

    def __init__(self, client: HttpClient, *sums: Checksum) -> None:
        super().__init__(client)
        self._sums = sums

    def stat(self, artifact: Artifact) -> ObjectInfo:
        """Return what the origin says, with the sums."""
        return replace(super().stat(artifact), checksums=self._sums)


@pytest.fixture
def manifest(origin: FaultyOrigin) -> Manifest:
    path = origin.put("big.bin", CONTENT).relative_to(origin.root).as_posix()
    return Manifest((Artifact("job1", 0, "big.bin", origin.sign(path)),))


def multipart(algorithm: Algorithm) -> Checksum:
    """Return the sum of parts' sums, as an upload in parts gets it."""

    def one(data: bytes) -> bytes:
        if algorithm == "crc64nvme":
            return int(crc64nvme(data)).to_bytes(8, "big")
        if algorithm in ("crc32", "crc32c"):
            crc = zlib.crc32(data) if algorithm == "crc32" else int(crc32c(data))
            return crc.to_bytes(4, "big")
        return hashlib.new(algorithm, data).digest()

    parts = [CONTENT[i : i + PART] for i in range(0, len(CONTENT), PART)]
    return Checksum(algorithm, one(b"".join(map(one, parts))), len(parts), PART)


@pytest.mark.parametrize("algorithm", SUMS)
@pytest.mark.parametrize("whole", [True, False])
def test_a_wrong_sum_is_an_error_and_a_right_one_is_not(
    client: HttpClient, manifest: Manifest, tmp_path: Path, algorithm: Algorithm, whole: bool
) -> None:
    # A hash of the whole file needs the file in one request.
    combines = algorithm.startswith("crc")
    options = FetchOptions(range_bytes=RANGE if combines and not whole else 1 << 20, concurrency=4)
    right = Checksum(algorithm, SUMS[algorithm]) if whole or combines else multipart(algorithm)
    wrong = replace(right, digest=right.digest[::-1])
    with pytest.raises(FetchError, match="sum up") as caught:
        fetch(manifest, tmp_path, TellingStore(client, wrong), options)
    assert wrong.digest.hex() in caught.value.expected
    assert "Signature" not in str(caught.value)
    final = tmp_path / "job1/rank-0/big.bin"
    assert not final.exists()
    assert not list(tmp_path.rglob("*.part"))
    fetch(manifest, tmp_path, TellingStore(client, right), options)
    assert final.read_bytes() == CONTENT


@pytest.mark.parametrize("algorithm", SUMS)
def test_the_parts_of_an_upload_are_what_is_asked_for(
    origin: FaultyOrigin,
    client: HttpClient,
    manifest: Manifest,
    tmp_path: Path,
    algorithm: Algorithm,
) -> None:
    right, options = multipart(algorithm), FetchOptions(range_bytes=RANGE, concurrency=4)
    wrong = replace(right, digest=right.digest[::-1])
    with pytest.raises(FetchError, match="sum up"):
        fetch(manifest, tmp_path, TellingStore(client, wrong), options)
    fetch(manifest, tmp_path, TellingStore(client, right), options)
    starts = [int(r.removeprefix("bytes=").split("-")[0]) for r in origin.ranges_of("big.bin")]
    assert all(start % PART == 0 for start in starts)


def test_what_an_earlier_run_left_cannot_be_hashed_and_is_no_error(
    origin: FaultyOrigin, client: HttpClient, manifest: Manifest, tmp_path: Path
) -> None:
    options = FetchOptions(range_bytes=RANGE, concurrency=1, retries=0)
    store = TellingStore(client, multipart("md5"))
    origin.fail("big.bin", *[act(lambda: None)] * 2, status(404))
    with pytest.raises(FetchError, match="not there"):
        fetch(manifest, tmp_path, store, options)
    assert fetch(manifest, tmp_path, store, options).fetched_bytes < len(CONTENT)


def test_the_cheapest_sum_that_can_be_had_is_taken() -> None:
    md5, crc = Checksum("md5", b"m" * 16), Checksum("crc64nvme", b"c" * 8)
    small, large = ObjectInfo(10, checksums=(md5, crc)), ObjectInfo(10**9, checksums=(md5,))
    found = choose_check(small, RANGE)
    assert found is not None
    assert found.checksum is crc
    assert choose_check(replace(small, checksums=(md5,)), RANGE) is not None
    assert choose_check(large, RANGE) is None  # many requests bring it, out of order
    unknown = Checksum("md5", b"m" * 16, 12)  # into parts of what size?
    assert choose_check(replace(large, checksums=(unknown,)), RANGE) is None
