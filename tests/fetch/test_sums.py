"""What the origin says that the bytes sum up to is compared, without a second read."""

from __future__ import annotations

import hashlib
import random
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from awscrt.checksums import crc32c, crc64nvme

from loader.errors import FetchError
from loader.fetch.missing_ranges import DoneRange
from loader.fetch.snapshot import FetchOptions, fetch
from loader.fetch.sums import Check, choose_check, usual_part_bytes
from loader.http.body import HttpStream
from loader.http.client import HttpClient
from loader.http.objects import Algorithm, Checksum, ObjectInfo
from loader.stores.base import PendingResponse
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest
from tests.fetch.test_transfer import ended_after
from tests.origin import (
    FaultyHandler,
    FaultyOrigin,
    act,
    cut,
    flip,
    ignore_range,
    pause,
    slow,
    stall,
    status,
)

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

    def open_first(self, artifact: Artifact, end: int) -> HttpStream:
        """Return the beginning, with the sums."""
        stream = super().open_first(artifact, end)
        stream.info = replace(stream.info, checksums=self._sums)
        return stream

    def send_first(self, artifact: Artifact, end: int) -> PendingResponse:
        """Leave the beginning, with the sums, for later."""
        return PendingResponse(partial(self.open_first, artifact, end))


@pytest.fixture
def manifest(origin: FaultyOrigin) -> Manifest:
    path = origin.put("big.bin", CONTENT).relative_to(origin.root).as_posix()
    return Manifest((Artifact("job1", 0, "big.bin", origin.sign(path)),))


def multipart(algorithm: Algorithm, content: bytes = CONTENT) -> Checksum:
    """Return the sum of parts' sums, as an upload in parts gets it."""

    def one(data: bytes) -> bytes:
        if algorithm == "crc64nvme":
            return int(crc64nvme(data)).to_bytes(8, "big")
        if algorithm in ("crc32", "crc32c"):
            crc = zlib.crc32(data) if algorithm == "crc32" else int(crc32c(data))
            return crc.to_bytes(4, "big")
        return hashlib.new(algorithm, data).digest()

    parts = [content[i : i + PART] for i in range(0, len(content), PART)]
    return Checksum(algorithm, one(b"".join(map(one, parts))), len(parts), PART)


def whole(algorithm: Algorithm) -> Checksum:
    return Checksum(algorithm, SUMS[algorithm])


OPTIONS = FetchOptions(range_bytes=RANGE, concurrency=4)
KINDS = {f"{algorithm}, whole": whole(algorithm) for algorithm in SUMS} | {
    f"{algorithm} of parts": multipart(algorithm) for algorithm in SUMS
}


EACH_WAY = ["crc64nvme, whole", "crc32c, whole", "md5, whole", "md5 of parts", "crc32 of parts"]


@pytest.fixture(params=EACH_WAY)
def right(request: pytest.FixtureRequest) -> Checksum:
    return KINDS[request.param]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bit_that_turns_over_on_the_way_is_found(
    origin: FaultyOrigin, client: HttpClient, manifest: Manifest, tmp_path: Path, kind: str
) -> None:
    right = KINDS[kind]
    store = TellingStore(client, right)
    origin.fail("big.bin", *[flip(PART + RANGE + 5)] * 99)
    with pytest.raises(FetchError, match="sum up") as caught:
        fetch(manifest, tmp_path, store, OPTIONS)
    assert right.digest.hex() in caught.value.expected
    assert "Signature" not in str(caught.value)
    final = tmp_path / "job1/rank-0/big.bin"
    assert not final.exists()
    assert not list(tmp_path.rglob("*.part"))
    origin.faults.clear()
    fetch(manifest, tmp_path, store, OPTIONS)
    assert final.read_bytes() == CONTENT


def test_what_breaks_off_is_summed_up_all_the_same(
    origin: FaultyOrigin, client: HttpClient, manifest: Manifest, tmp_path: Path, right: Checksum
) -> None:
    origin.fail("big.bin", act(lambda: None), *[cut(RANGE - 1000)] * 5)
    wrong = replace(right, digest=right.digest[::-1])
    with pytest.raises(FetchError, match="sum up"):
        fetch(manifest, tmp_path, TellingStore(client, wrong), OPTIONS)


def test_what_an_earlier_run_left_is_summed_up_too(
    origin: FaultyOrigin, client: HttpClient, manifest: Manifest, tmp_path: Path, right: Checksum
) -> None:
    store = TellingStore(client, replace(right, digest=right.digest[::-1]))
    origin.fail("big.bin", act(lambda: None), ended_after(RANGE + 100), *[status(404)] * 9)
    with pytest.raises(FetchError, match="not there"):
        fetch(manifest, tmp_path, store, replace(OPTIONS, concurrency=1))
    origin.bytes_sent = 0
    origin.faults.clear()
    with pytest.raises(FetchError, match="sum up"):
        fetch(manifest, tmp_path, store, OPTIONS)
    assert origin.bytes_sent < len(CONTENT) - RANGE // 2  # the first request brings some again


def test_a_connection_that_takes_over_goes_on_with_the_sum(
    origin: FaultyOrigin,
    client: HttpClient,
    manifest: Manifest,
    tmp_path: Path,
    right: Checksum,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loader.fetch.schedule._STALLED_S", 0.1)
    wrong = TellingStore(client, replace(right, digest=right.digest[::-1]))
    origin.fail("big.bin", act(lambda: None), pause(RANGE + 100, 0.6), pause(RANGE, 0.6))
    with pytest.raises(FetchError, match="sum up"):
        fetch(manifest, tmp_path, wrong, OPTIONS)
    assert any(int(place) % PART not in (0, RANGE) for place in starts(origin)), "nobody took over"


def starts(origin: FaultyOrigin) -> list[str]:
    """Return where each request for the file began."""
    return [r.removeprefix("bytes=").split("-")[0] for r in origin.ranges_of("big.bin")]


def test_an_origin_without_ranges_sends_the_whole_for_a_sum(
    origin: FaultyOrigin, client: HttpClient, manifest: Manifest, tmp_path: Path
) -> None:
    for right in KINDS.values():
        wrong = replace(right, digest=right.digest[::-1])
        origin.fail("big.bin", ignore_range, ignore_range, ignore_range)
        with pytest.raises(FetchError, match="sum up"):
            fetch(manifest, tmp_path, TellingStore(client, wrong), OPTIONS)
        origin.faults.clear()


def test_an_origin_without_ranges_starts_over_and_so_does_the_sum(
    origin: FaultyOrigin, client: HttpClient, manifest: Manifest, tmp_path: Path
) -> None:
    for algorithm in SUMS:

        def breaks(handler: FaultyHandler) -> bool:
            return ignore_range(handler) or ended_after(PART)(handler)

        origin.fail("big.bin", ignore_range, breaks, ignore_range)
        fetch(manifest, tmp_path / algorithm, TellingStore(client, whole(algorithm)), OPTIONS)


def test_what_is_hashed_as_one_is_not_shared_with_a_faster_connection(
    origin: FaultyOrigin, client: HttpClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loader.fetch.schedule._SLOW_S", 0.1)
    content = CONTENT * 8
    path = origin.put("big.bin", content).relative_to(origin.root).as_posix()
    manifest = Manifest((Artifact("job1", 0, "big.bin", origin.sign(path)),))
    origin.fail("big.bin", act(lambda: None), slow(0.02))
    wrong = TellingStore(client, Checksum("md5", b"w" * 16))
    with pytest.raises(FetchError, match="sum up"):
        fetch(manifest, tmp_path, wrong, OPTIONS)
    assert len(origin.ranges_of("big.bin")) == 2
    content_of_parts = multipart("md5", content)
    assert content_of_parts.parts > 30
    origin.fail("big.bin", act(lambda: None), *[slow(0.02)] * 3)
    fetch(manifest, tmp_path / "right", TellingStore(client, content_of_parts), OPTIONS)
    origin.fail("big.bin", act(lambda: None), *[slow(0.02)] * 3)
    off = replace(content_of_parts, digest=b"w" * 16)
    with pytest.raises(FetchError, match="sum up"):
        fetch(manifest, tmp_path / "wrong", TellingStore(client, off), OPTIONS)


FULL = replace(OPTIONS, verify="full")
MANY = random.Random(5).randbytes(33 << 20)


def md5_of_parts(content: bytes, part_bytes: int) -> Checksum:
    """Return an upload's ETag as a signed URL tells it: without the parts' size."""
    parts = [content[i : i + part_bytes] for i in range(0, len(content), part_bytes)]
    joined = b"".join(hashlib.md5(part).digest() for part in parts)
    return Checksum("md5", hashlib.md5(joined).digest(), len(parts))


@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_full_compares_what_takes_one_connection_or_a_guess(
    origin: FaultyOrigin,
    client: HttpClient,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loader.fetch.sums._MOST_UNIT_BYTES", 1 << 20)  # for a large file's sake
    path = origin.put("big.bin", MANY).relative_to(origin.root).as_posix()
    manifest = Manifest((Artifact("job1", 0, "big.bin", origin.sign(path)),))
    right = (
        md5_of_parts(MANY, 1 << 20)
        if kind == "parts"
        else Checksum("md5", hashlib.md5(MANY).digest())
    )
    fetch(manifest, tmp_path / "right", TellingStore(client, right), FULL)
    wrong = TellingStore(client, replace(right, digest=right.digest[::-1]))
    fetch(manifest, tmp_path / "unseen", wrong, OPTIONS)
    origin.requests.clear()
    with pytest.raises(FetchError, match="sum up") as caught:
        fetch(manifest, tmp_path / "wrong", wrong, FULL)
    assert ("another size" in caught.value.next_step) == (kind == "parts")
    if kind == "whole":
        assert starts(origin) == ["0", "0"]  # the first request is for the version
    else:
        assert all(int(start) % (1 << 20) == 0 for start in starts(origin))


def test_full_hashes_what_an_earlier_run_left_behind_a_hole(
    origin: FaultyOrigin,
    client: HttpClient,
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loader.fetch.sums._MOST_UNIT_BYTES", 1)
    wrong = TellingStore(client, replace(whole("md5"), digest=SUMS["md5"][::-1]))
    origin.fail("big.bin", act(lambda: None), stall(0.5), act(lambda: None), *[status(404)] * 99)
    with pytest.raises(FetchError, match="not there"):
        fetch(manifest, tmp_path, wrong, replace(OPTIONS, concurrency=2, retries=0))
    origin.faults.clear()
    origin.bytes_sent = 0
    with pytest.raises(FetchError, match="sum up"):
        fetch(manifest, tmp_path, wrong, FULL)
    assert origin.bytes_sent < len(CONTENT) - RANGE // 2


@pytest.mark.parametrize(
    ("size", "parts", "part"),
    [
        (5 << 30, 640, 8 << 20),
        ((5 << 30) + 1, 641, 8 << 20),
        (32 * (64 << 20) - 1, 32, 64 << 20),
        (10**9, 100, None),  # of 10 MB
        (40 * 8 * 10**6, 40, None),  # of 8 MB
        (31 * (8 << 20), 31, None),  # too few to be sure
        (33 * 250 * 10**6, 33, None),
        (100, 40, None),
    ],
)
def test_the_size_of_parts_that_is_usual(size: int, parts: int, part: int | None) -> None:
    assert usual_part_bytes(size, parts) == part


def test_a_count_of_parts_that_cannot_be_right_proves_nothing() -> None:
    check = Check(multipart("md5"), PART)
    found = check.new_sum(len(CONTENT) + PART)
    tally = found.tally(0)
    tally.update(memoryview(CONTENT + bytes(PART)))
    tally.mark()
    assert found.result(()) is None


@pytest.mark.parametrize("kind", KINDS)
def test_sums_go_on_from_a_mark_as_often_as_it_is_asked_for(kind: str) -> None:
    right, content = KINDS[kind], memoryview(CONTENT)
    found = Check(right, right.part_bytes if right.parts else unit_of(right)).new_sum(len(CONTENT))
    middle = PART + 1234
    ranges = []
    for start, end in [(0, middle), (middle, len(CONTENT)), (middle, len(CONTENT))]:
        tally = found.tally(start)
        tally.update(content[start:end])
        tally.mark()
        ranges.append(DoneRange(start, end, crc64nvme(content[start:end])))
    assert found.result(ranges[:2]) == right.digest


def unit_of(checksum: Checksum) -> int | None:
    return None if checksum.algorithm.startswith("crc") else len(CONTENT)


@pytest.mark.parametrize("algorithm", SUMS)
def test_the_parts_of_an_upload_are_what_is_asked_for(
    origin: FaultyOrigin,
    client: HttpClient,
    manifest: Manifest,
    tmp_path: Path,
    algorithm: Algorithm,
) -> None:
    fetch(manifest, tmp_path, TellingStore(client, multipart(algorithm)), OPTIONS)
    assert all(int(start) % PART == 0 for start in starts(origin))


def test_the_cheapest_sum_that_can_be_had_is_taken() -> None:
    md5, crc = Checksum("md5", b"m" * 16), Checksum("crc64nvme", b"c" * 8)
    small, large = ObjectInfo(10, checksums=(md5, crc)), ObjectInfo(10**9, checksums=(md5,))
    found = choose_check(small, RANGE)
    assert found is not None
    assert found.checksum is crc
    assert choose_check(replace(small, checksums=(md5,)), RANGE) is not None
    assert choose_check(large, RANGE) is None  # many connections bring it, out of order
    assert choose_check(replace(large, ranges=False), RANGE) is not None  # one has to bring it
    assert choose_check(replace(large, size_bytes=64 << 20), RANGE) is not None
    unknown = Checksum("md5", b"m" * 16, 12)  # into parts of what size?
    assert choose_check(replace(large, checksums=(unknown,)), RANGE) is None
