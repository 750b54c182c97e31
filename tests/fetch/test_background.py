"""Work that begins with the first files while the last ones are still on their way."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from loader.errors import FetchError
from loader.fetch.background import fetching
from loader.fetch.snapshot import FetchOptions
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest
from tests.origin import FaultyOrigin, act, status

BIG = bytes(range(256)) * 16384  # 4 MiB
OPTIONS = FetchOptions(concurrency=2, retries=0, range_bytes=1 << 20)


def manifest(origin: FaultyOrigin) -> Manifest:
    entries = origin.listing("job1")["checkpoint_artifacts"]
    assert isinstance(entries, list)
    files = (Artifact("job1", e["node_rank"], e["relative_file_name"], e["url"]) for e in entries)
    return Manifest(tuple(sorted(files, key=lambda a: a.path)))


def test_small_files_are_here_before_the_large_ones(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    origin.put("a.bin", BIG)
    origin.put("config.json", b"{}")
    read = threading.Event()
    # The first request asks for the version; the body waits until the config has been read.
    origin.fail("a.bin", act(lambda: None), act(lambda: read.wait(30)))
    with fetching(manifest(origin), tmp_path, store, OPTIONS) as arrivals:
        assert arrivals.wait("job1/rank-0/config.json").read_bytes() == b"{}"
        assert not arrivals.is_here("job1/rank-0/a.bin")
        read.set()
        assert arrivals.wait("job1/rank-0/a.bin").read_bytes() == BIG
        assert arrivals.wait_all().fetched_bytes == len(BIG) + 2


def test_files_of_an_earlier_fetch_are_here_at_once(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    origin.put("config.json", b"{}")
    for _ in range(2):
        with fetching(manifest(origin), tmp_path, store, OPTIONS) as arrivals:
            assert arrivals.wait("job1/rank-0/config.json").read_bytes() == b"{}"
    assert arrivals.wait_all().files[0].reused


def test_whoever_waits_gets_the_error_of_the_fetch(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    origin.put("a.bin", BIG)
    origin.put("config.json", b"{}")
    origin.fail("a.bin", act(lambda: None), *[status(404)] * 9)
    with (
        pytest.raises(FetchError, match="not there"),
        fetching(manifest(origin), tmp_path, store, OPTIONS) as arrivals,
    ):
        arrivals.wait("job1/rank-0/a.bin")
    with (
        pytest.raises(FetchError, match="not there"),
        fetching(manifest(origin), tmp_path, store, OPTIONS),
    ):
        pass  # nobody asked, and it is raised all the same


def test_a_file_that_is_not_fetched_is_not_waited_for(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    with (
        pytest.raises(FetchError, match="not being fetched"),
        fetching(manifest(origin), tmp_path, store, OPTIONS) as arrivals,
    ):
        arrivals.wait("job1/rank-0/other")


def test_a_block_that_fails_stops_the_fetch(
    origin: FaultyOrigin, store: PresignedStore, tmp_path: Path
) -> None:
    origin.put("a.bin", BIG)
    began, left = threading.Event(), threading.Event()
    origin.fail("a.bin", act(began.set), *[act(lambda: left.wait(30))] * 8)

    def work() -> None:
        with fetching(manifest(origin), tmp_path, store, OPTIONS):
            assert began.wait(30)
            threading.Timer(0.2, left.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert not (tmp_path / "job1/rank-0/a.bin").exists()
    assert origin.bytes_sent <= 3 << 20
