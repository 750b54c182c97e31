"""Small files take one request each, and are as whole as any other."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import pytest

from loader.errors import FetchError, TransientError
from loader.fetch import request_thread
from loader.fetch.files import lock_part, places
from loader.fetch.snapshot import FetchOptions, fetch
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest
from tests.fetch.test_transfer import Noted, silent_after
from tests.origin import FaultyHandler, FaultyOrigin, cut, ignore_range, status

CONTENT = random.Random(3).randbytes(700_000)
SIZES = (0, 1, 8192, 16 << 10)
OPTIONS = FetchOptions(concurrency=4, retries=3)


def manifest_of(origin: FaultyOrigin, *sizes: int, told: bool = False) -> Manifest:
    """Return files of *sizes*, which the listing has where they are *told*."""
    artifacts = []
    for size in sizes:
        path = origin.put(f"{size}.bin", CONTENT[:size]).relative_to(origin.root).as_posix()
        known = size if told else None
        artifacts.append(Artifact("job1", 0, f"{size}.bin", origin.sign(path), known))
    return Manifest(tuple(artifacts))


def several(origin: FaultyOrigin, count: int, size: int, *, told: bool = False) -> Manifest:
    """Return so many files of one size."""
    artifacts = []
    for i in range(count):
        path = origin.put(f"{i:03d}.bin", CONTENT[:size]).relative_to(origin.root).as_posix()
        known = size if told else None
        artifacts.append(Artifact("job1", 0, f"{i:03d}.bin", origin.sign(path), known))
    return Manifest(tuple(artifacts))


class Crowd:
    """A fault: how many requests meet at the origin, each of which takes a while."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._here = 0
        self.most = 0

    def __call__(self, handler: FaultyHandler) -> bool:
        """Take the while."""
        with self._lock:
            self._here += 1
            self.most = max(self.most, self._here)
        time.sleep(self._seconds)
        with self._lock:
            self._here -= 1
        return False


def check(root: Path, *sizes: int) -> None:
    for size in sizes:
        assert (root / f"job1/rank-0/{size}.bin").read_bytes() == CONTENT[:size]
    assert not [p for p in root.rglob("*") if p.suffix in (".part", ".journal", ".new")]


def test_a_small_file_is_one_request(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    noted, manifest = Noted(), manifest_of(origin, *SIZES)
    snapshot = fetch(manifest, tmp_path, store, OPTIONS, noted)
    check(tmp_path, *SIZES)
    assert len(origin.requests) == len(SIZES)
    assert snapshot.fetched_bytes == noted.bytes == sum(SIZES)
    again = fetch(manifest, tmp_path, store, OPTIONS)
    assert [f.digest for f in again.files] == [f.digest for f in snapshot.files]
    assert all(f.reused for f in again.files)


def test_what_a_first_request_is_for_depends_on_what_the_listing_tells(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    for told, requests in ((False, 2), (True, 1)):
        origin.requests.clear()
        fetch(manifest_of(origin, 60_000, told=told), tmp_path / str(told), store, OPTIONS)
        check(tmp_path / str(told), 60_000)
        assert len(origin.requests) == requests


@pytest.mark.parametrize("concurrency", [256, 20_000])
@pytest.mark.parametrize("told", [True, False])
def test_however_many_connections_are_allowed(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path, concurrency: int, told: bool
) -> None:
    sizes = (0, 1, 16_384, 60_000, 100_000)
    options = FetchOptions(concurrency=concurrency)
    fetch(manifest_of(origin, *sizes, told=told), tmp_path, store, options)
    check(tmp_path, *sizes)


def test_faults_are_cured_and_told(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    noted = Noted()
    origin.fail("8192.bin", cut(100), status(503), cut(8191), ignore_range)
    fetch(manifest_of(origin, *SIZES), tmp_path, store, OPTIONS, noted)
    check(tmp_path, *SIZES)
    assert len(noted.retries) == 3


def test_what_does_not_pass_is_raised_and_leaves_no_lock(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    manifest = manifest_of(origin, 8192)
    for fault, kind in ((status(404), FetchError), (cut(9), TransientError)):
        origin.fail("8192.bin", *[fault] * 4)
        with pytest.raises(kind):
            fetch(manifest, tmp_path, store, OPTIONS)
        assert not (tmp_path / "job1/rank-0/8192.bin").exists()
        origin.faults.clear()
    fetch(manifest, tmp_path, store, OPTIONS)
    check(tmp_path, 8192)


def test_a_connection_that_goes_silent_is_not_waited_for(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_thread, "_STALLED_S", 0.1)
    released, noted = threading.Event(), Noted()
    origin.fail("8192.bin", silent_after(10, released), silent_after(0, released))
    fetch(manifest_of(origin, 8192), tmp_path, store, OPTIONS, noted)
    check(tmp_path, 8192)
    assert len(noted.retries) == 2
    released.set()


def test_a_file_that_another_one_is_fetching_is_waited_for(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    manifest = manifest_of(origin, 1, 8192)
    held = lock_part(places(tmp_path, manifest.files[1]))
    assert held is not None
    done: list[object] = []
    thread = threading.Thread(
        target=lambda: done.append(fetch(manifest, tmp_path, store, OPTIONS)), daemon=True
    )
    thread.start()
    thread.join(0.5)
    assert not done
    assert (tmp_path / "job1/rank-0/1.bin").exists()
    assert not (tmp_path / "job1/rank-0/8192.bin").exists()
    os.close(held[0])
    thread.join(20)
    assert done
    check(tmp_path, 1, 8192)


def test_a_far_origin_is_asked_for_as_much_as_is_allowed(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    crowd = Crowd(0.15)
    origin.fail(".bin", *[crowd] * 24)
    fetch(several(origin, 24, 5000), tmp_path, store, FetchOptions(concurrency=6))
    assert crowd.most == 6


def test_a_busy_origin_is_asked_for_half(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    before, after, noted = Crowd(0.5), Crowd(0.1), Noted()
    busy = [lambda handler: before(handler) or status(503)(handler)] * 8
    origin.fail(".bin", *busy, *[after] * 24)
    options = FetchOptions(concurrency=8, retries=3)
    fetch(several(origin, 24, 5000), tmp_path, store, options, noted)
    assert before.most == 8
    assert len(noted.retries) == 8
    assert after.most <= 4


def test_a_passing_failure_of_one_file_does_not_hold_others_back(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    manifest = several(origin, 20, 5000)
    origin.fail("000.bin", status(503, Retry_After="2"))
    fetch(manifest, tmp_path, store, OPTIONS)
    assert origin.requests[-1][0].endswith("000.bin")
    assert len(origin.requests) == 21


def test_the_first_request_for_a_large_file_goes_on(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    noted = Noted()
    snapshot = fetch(manifest_of(origin, 700_000, told=True), tmp_path, store, OPTIONS, noted)
    check(tmp_path, 700_000)
    assert origin.ranges_of(".bin") == ["bytes=0-699999"]
    assert snapshot.fetched_bytes == noted.bytes == 700_000


def test_large_files_that_are_begun_later_are_one_request_too(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    manifest, noted = several(origin, 7, 300_000, told=True), Noted()
    origin.fail("005.bin", status(503))
    fetch(manifest, tmp_path, store, FetchOptions(concurrency=2, retries=3), noted)
    for file in manifest.files:
        assert (tmp_path / file.path).read_bytes() == CONTENT[:300_000]
    assert len(origin.requests) == 8
    assert noted.bytes == 7 * 300_000
    assert len(noted.retries) == 1


def test_a_busy_origin_of_large_files(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    manifest, crowd, noted = several(origin, 9, 300_000, told=True), Crowd(0.1), Noted()
    origin.fail(".bin", *[lambda handler: crowd(handler) or status(503)(handler)] * 4)
    fetch(manifest, tmp_path, store, FetchOptions(concurrency=4, retries=3), noted)
    for file in manifest.files:
        assert (tmp_path / file.path).read_bytes() == CONTENT[:300_000]
    assert len(noted.retries) == 4


def test_a_large_file_that_others_have_begun_goes_on_where_they_ended(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    options = FetchOptions(concurrency=1, retries=0, range_bytes=100_000)
    origin.fail(".bin", cut(250_000), status(500))
    manifest = manifest_of(origin, 700_000, told=True)
    with pytest.raises(TransientError):
        fetch(manifest, tmp_path, store, options)
    found = fetch(manifest, tmp_path, store, options)
    check(tmp_path, 700_000)
    assert found.fetched_bytes < 700_000
