"""Small files take one request each, and are as whole as any other."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from loader.errors import FetchError, TransientError
from loader.fetch import opening
from loader.fetch.files import places, try_lock
from loader.fetch.snapshot import FetchOptions, fetch
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest
from tests.fetch.test_transfer import Noted, silent_after
from tests.origin import FaultyOrigin, cut, ignore_range, status

CONTENT = random.Random(3).randbytes(100_000)
SIZES = (0, 1, 8192, 16 << 10)
OPTIONS = FetchOptions(concurrency=4, retries=3)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loader.retry._FIRST_WAIT_S", 0.01)


def manifest_of(origin: FaultyOrigin, *sizes: int, told: bool = False) -> Manifest:
    """Return files of *sizes*, which the listing has where they are *told*."""
    artifacts = []
    for size in sizes:
        path = origin.put(f"{size}.bin", CONTENT[:size]).relative_to(origin.root).as_posix()
        known = size if told else None
        artifacts.append(Artifact("job1", 0, f"{size}.bin", origin.sign(path), known))
    return Manifest(tuple(artifacts))


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


def test_a_listing_that_is_wrong_about_the_size_does_no_harm(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    manifest = manifest_of(origin, 1000, 8192, told=True)
    for name in ("1000.bin", "8192.bin"):
        origin.put(name, CONTENT[:5000])
    fetch(manifest, tmp_path, store, OPTIONS)
    for file in manifest.files:
        assert (tmp_path / file.path).read_bytes() == CONTENT[:5000]


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
    monkeypatch.setattr(opening, "_STALLED_S", 0.1)
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
    fd = try_lock(places(tmp_path, manifest.files[1]).lock)
    assert fd is not None
    done: list[object] = []
    thread = threading.Thread(
        target=lambda: done.append(fetch(manifest, tmp_path, store, OPTIONS)), daemon=True
    )
    thread.start()
    thread.join(0.5)
    assert not done
    check(tmp_path, 1)
    assert not (tmp_path / "job1/rank-0/8192.bin").exists()
    open(fd, "rb").close()  # noqa: PTH123
    thread.join(20)
    assert done
    check(tmp_path, 1, 8192)
