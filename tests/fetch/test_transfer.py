"""Slow and busy connections: their rest goes to others, and nothing comes twice or not at all."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from loader.errors import DiskError, TransientError
from loader.fetch import schedule
from loader.fetch.events import Limits
from loader.fetch.progress import Progress
from loader.fetch.snapshot import FetchOptions, fetch
from loader.fetch.stopping import StoppedError
from loader.fetch.transfer import first_of
from loader.http import pool
from loader.http.client import HttpClient, HttpOptions
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest, Snapshot
from tests.origin import Fault, FaultyHandler, FaultyOrigin, act, slow, status

MIB = 1 << 20
CONTENT = random.Random(11).randbytes(12 * MIB + 5)
OPTIONS = FetchOptions(concurrency=4, retries=3, range_bytes=MIB)


class Noted(Progress):
    """A progress that remembers the retries."""

    def __init__(self) -> None:
        super().__init__()
        self.retries: list[str] = []
        self.bytes = 0
        self._lock = threading.Lock()

    def advance(self, count_bytes: int, path: str) -> None:
        """Count."""
        with self._lock:
            self.bytes += count_bytes

    def retry(self, path: str, reason: str) -> None:
        """Remember."""
        self.retries.append(reason)


@pytest.fixture
def patient() -> Iterator[PresignedStore]:
    """A store that waits for ever: nothing but other workers ends a stalled connection."""
    client = HttpClient(HttpOptions(stall_timeout_s=300))
    yield PresignedStore(client)
    client.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_STALLED_S", 0.2)
    monkeypatch.setattr(schedule, "_SLOW_S", 0.2)


@pytest.fixture
def manifest(origin: FaultyOrigin) -> Manifest:
    path = origin.put("big.bin", CONTENT).relative_to(origin.root).as_posix()
    return Manifest((Artifact("job1", 0, "big.bin", origin.sign(path)),))


def run(
    manifest: Manifest, root: Path, store: PresignedStore, options: FetchOptions = OPTIONS
) -> tuple[Snapshot, Noted]:
    noted = Noted()
    snapshot = fetch(manifest, root, store, options, noted)
    assert (root / "job1/rank-0/big.bin").read_bytes() == CONTENT
    assert snapshot.fetched_bytes == noted.bytes == len(CONTENT)
    return snapshot, noted


def silent_after(count: int, released: threading.Event) -> Fault:
    """Return a fault: so many bytes, then nothing until *released*."""

    def fault(handler: FaultyHandler) -> bool:
        send = handler.copy

        def held(fd: int, start: int, end: int) -> None:
            send(fd, start, min(end, start + count))
            released.wait(60)
            handler.close_connection = True

        handler.copy = held  # type: ignore[method-assign]
        return False

    return fault


def ended_after(count: int) -> Fault:
    """Return a fault: so many bytes, then the end of the connection."""

    def fault(handler: FaultyHandler) -> bool:
        send = handler.copy

        def ended(fd: int, start: int, end: int) -> None:
            send(fd, start, min(end, start + count))
            handler.close_connection = True

        handler.copy = ended  # type: ignore[method-assign]
        return False

    return fault


@pytest.mark.parametrize("count", [0, 200_000])
def test_what_a_stalled_connection_owes_is_asked_for_elsewhere(
    origin: FaultyOrigin, patient: PresignedStore, manifest: Manifest, tmp_path: Path, count: int
) -> None:
    released = threading.Event()
    origin.fail("big.bin", act(lambda: None), silent_after(count, released))
    try:
        _, noted = run(manifest, tmp_path, patient)
    finally:
        released.set()
    assert noted.retries == []


def test_two_that_stall_one_after_the_other(
    origin: FaultyOrigin, patient: PresignedStore, manifest: Manifest, tmp_path: Path
) -> None:
    released = threading.Event()
    faults = [silent_after(0, released)] * 3
    origin.fail("big.bin", act(lambda: None), *faults)
    try:
        run(manifest, tmp_path, patient)
    finally:
        released.set()


def test_a_pause_does_not_hold_the_end_back(
    origin: FaultyOrigin, patient: PresignedStore, manifest: Manifest, tmp_path: Path
) -> None:
    origin.fail("big.bin", act(lambda: None), status(503, Retry_After="50"))
    snapshot, noted = run(manifest, tmp_path, patient)
    assert len(noted.retries) == 1
    assert snapshot.seconds < 25, "somebody else has brought it"


def test_a_slow_connection_does_not_hold_the_end_back(
    origin: FaultyOrigin, patient: PresignedStore, manifest: Manifest, tmp_path: Path
) -> None:
    # 64 KiB in 0.3 s: alone it would take a minute for its first request.
    origin.fail("big.bin", act(lambda: None), slow(0.3))
    run(manifest, tmp_path, patient)
    slow_one = origin.ranges_of("big.bin")[1]
    start, last = map(int, slow_one.removeprefix("bytes=").split("-"))
    spans = [r.removeprefix("bytes=").split("-") for r in origin.ranges_of("big.bin")[2:]]
    assert any(start < int(first) <= last for first, _ in spans), "its rest was asked for again"


def test_a_slow_connection_that_is_the_last_one_gives_way(
    origin: FaultyOrigin, patient: PresignedStore, manifest: Manifest, tmp_path: Path
) -> None:
    """Its rest is too little to be shared, and no other is left to compare it with."""
    path = origin.put("last.bin", CONTENT[: MIB + 1]).relative_to(origin.root).as_posix()
    last = Artifact("job1", 0, "last.bin", origin.sign(path))
    origin.fail("last.bin", act(lambda: None), slow(0.1))
    snapshot = fetch(Manifest((*manifest.files, last)), tmp_path, patient, OPTIONS, Noted())
    assert snapshot.fetched_bytes == len(CONTENT) + MIB + 1
    assert (tmp_path / "job1/rank-0/last.bin").read_bytes() == CONTENT[: MIB + 1]
    _, slow_one, *others = origin.ranges_of("last.bin")
    assert slow_one == f"bytes=0-{MIB}"
    assert others, "its rest was asked for again"


def test_next_to_nothing_is_cut(
    origin: FaultyOrigin,
    patient: PresignedStore,
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "_PATIENCE_S", 0.3)
    demanding = PresignedStore(HttpClient(HttpOptions(least_bytes_per_s=4 * MIB)))
    origin.fail("big.bin", act(lambda: None), slow(0.1))
    options = FetchOptions(concurrency=1, range_bytes=MIB)
    with closing(demanding):
        _, noted = run(manifest, tmp_path, demanding, options)
    assert "the connection brings next to nothing" in noted.retries


def test_a_busy_origin_is_asked_by_fewer(
    origin: FaultyOrigin,
    patient: PresignedStore,
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[float] = []
    monkeypatch.setattr("loader.fetch.pace.Pace.slow_down", lambda _, now: told.append(now))
    origin.fail("big.bin", act(lambda: None), status(503), status(429), status(500))
    _, noted = run(manifest, tmp_path, patient)
    assert len(noted.retries) == 3
    assert len(told) == 2


def test_a_range_that_never_comes_ends_at_the_deadline(
    origin: FaultyOrigin, patient: PresignedStore, manifest: Manifest, tmp_path: Path
) -> None:
    origin.fail("big.bin", act(lambda: None), *[status(500)] * 10_000)
    options = FetchOptions(concurrency=1, retries=1_000_000, deadline_s=0.3, range_bytes=MIB)
    with pytest.raises(TransientError, match="500"):
        fetch(manifest, tmp_path, patient, options)
    assert not (tmp_path / "job1/rank-0/big.bin").exists()


def test_what_came_before_a_failure_is_kept_to_the_byte(
    origin: FaultyOrigin, patient: PresignedStore, manifest: Manifest, tmp_path: Path
) -> None:
    options = FetchOptions(concurrency=1, retries=0, range_bytes=4 * MIB)
    origin.fail("big.bin", act(lambda: None), ended_after(3 * MIB + 17), status(500))
    with pytest.raises(TransientError):
        fetch(manifest, tmp_path, patient, options)
    found = fetch(manifest, tmp_path, patient, options)
    assert found.fetched_bytes == len(CONTENT) - 3 * MIB - 17
    assert (tmp_path / "job1/rank-0/big.bin").read_bytes() == CONTENT


def test_what_else_failed_is_told_once() -> None:
    failures = [DiskError("full", where=where) for where in ("a", "a", "b", "b")]
    first = first_of([*failures, StoppedError()])
    assert first is failures[0]
    assert first.problems == ("also: full: b",)


@pytest.mark.parametrize("most", [1, 8, 9, 16, 64, 256, 1000])
def test_memory_does_not_grow_with_the_connections(most: int) -> None:
    limits = Limits(most, 0, 0.0, 1)
    sizes = [limits.buffer_bytes(place) for place in range(most)]
    assert sum(sizes) <= (24 << 20) + most * (64 << 10)
    assert set(sizes[:16] if most <= 16 else sizes[:8]) == {3 << 19}
    assert limits.least_buffer_bytes <= 3 << 19  # beside one that has gone silent
