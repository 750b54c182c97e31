"""A connection to a far origin asks for its next range before the one it brings has ended."""

from __future__ import annotations

import os
import random
import select
import threading
import time
from pathlib import Path

import pytest

from loader.errors import ChangedError
from loader.fetch import schedule
from loader.fetch.files import lock_part, places
from loader.fetch.part import PartFile
from loader.fetch.snapshot import FetchOptions, fetch
from loader.http import body as bodies
from loader.http.objects import ObjectInfo
from loader.stores.base import Unasked
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest
from tests.origin import FaultyHandler, FaultyOrigin, act, status

MIB = 1 << 20
CONTENT = random.Random(17).randbytes(6 * MIB + 5)
OPTIONS = FetchOptions(concurrency=2, retries=3, range_bytes=MIB)


class FarHandler(FaultyHandler):
    """Answers late, sends slowly, and sees whether the next request is there already."""

    early: list[str]

    def send_bytes(self, fd: int, start: int, end: int) -> None:
        """Send in pieces; look for a request behind the last but one."""
        last = max(start, end - (128 << 10))
        super().send_bytes(fd, start, last)
        time.sleep(0.03)
        super().send_bytes(fd, last, end)
        if select.select([self.connection], [], [], 0)[0]:
            self.early.append(self.path)


@pytest.fixture
def early(origin: FaultyOrigin, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests behind whose bodies there was another one at once."""
    monkeypatch.setattr(bodies, "_FAR_S", 0.0)
    monkeypatch.setattr(bodies, "_READ_S", 1.0)  # so that it is soon time
    monkeypatch.setattr(schedule, "_STALLED_S", 0.2)
    monkeypatch.setattr("loader.retry._FIRST_WAIT_S", 0.01)
    found: list[str] = []
    monkeypatch.setattr(FarHandler, "early", found, raising=False)
    monkeypatch.setattr(origin, "RequestHandlerClass", FarHandler)
    return found


def put(origin: FaultyOrigin, name: str, content: bytes) -> Artifact:
    path = origin.put(name, content).relative_to(origin.root).as_posix()
    return Artifact("job1", 0, name, origin.sign(path), len(content))


def bring(store: PresignedStore, root: Path, *files: Artifact) -> None:
    found = fetch(Manifest(files), root, store, OPTIONS)
    assert found.fetched_bytes == sum(file.size_bytes or 0 for file in files)
    for file in files:
        content = (root / file.path).read_bytes()
        assert content == CONTENT[: len(content)]
        assert len(content) == file.size_bytes


def test_the_ranges_of_a_file(
    origin: FaultyOrigin, store: PresignedStore, early: list[str], tmp_path: Path
) -> None:
    bring(store, tmp_path / "down", put(origin, "big.bin", CONTENT))
    assert early


def test_files_that_are_not_begun(
    origin: FaultyOrigin, store: PresignedStore, early: list[str], tmp_path: Path
) -> None:
    files = [put(origin, f"{i}.bin", CONTENT[: MIB + 1]) for i in range(8)]
    bring(store, tmp_path / "down", *files)
    assert early
    assert len(origin.requests) == 8, "one request each"


def test_a_busy_origin(
    origin: FaultyOrigin, store: PresignedStore, early: list[str], tmp_path: Path
) -> None:
    nothing = act(lambda: None)
    origin.fail("big.bin", nothing, nothing, status(503), nothing, status(503))
    bring(store, tmp_path / "down", put(origin, "big.bin", CONTENT))
    assert early


def test_another_version_is_no_mixture(
    origin: FaultyOrigin, store: PresignedStore, early: list[str], tmp_path: Path
) -> None:
    file = put(origin, "big.bin", CONTENT)
    nothing = act(lambda: None)
    change = act(lambda: origin.put("big.bin", CONTENT[::-1]))
    origin.fail("big.bin", nothing, nothing, nothing, change)
    with pytest.raises(ChangedError):
        bring(store, tmp_path / "down", file)
    assert not (tmp_path / "down" / file.path).exists()


def test_what_a_slow_connection_has_asked_for_goes_to_another(tmp_path: Path) -> None:
    artifact = Artifact("job1", 0, "big.bin", "http://127.0.0.1/big.bin", 2 * MIB)
    info = ObjectInfo(2 * MIB, '"1"')
    part = PartFile(artifact, info, places(tmp_path, artifact), "")

    def begin(part: PartFile) -> bool:
        locked = part.lock()
        part.resume()
        return locked

    dealt = schedule.Schedule([part], begin, MIB)
    dealt.set_limit(2)
    threading.Timer(5, dealt.stop).start()
    slow = dealt.take()
    assert slow is not None
    ahead = dealt.look_ahead(slow)
    assert ahead is not None
    dealt.note_asked(slow, ahead, Unasked(lambda: pytest.fail("its connection is slow")))
    taken = dealt.take()
    part.close()
    assert taken is not None, "it waits for the slow one"
    assert (taken.start, taken.end, taken.asked) == (MIB, 2 * MIB, None)
    assert slow.ahead is None


def test_a_file_that_another_process_has(
    origin: FaultyOrigin, store: PresignedStore, early: list[str], tmp_path: Path
) -> None:
    files = [put(origin, f"{i}.bin", CONTENT[: MIB + 1]) for i in range(6)]
    held = lock_part(places(tmp_path / "down", files[4]))
    assert held is not None
    threading.Timer(0.6, os.close, (held[0],)).start()
    bring(store, tmp_path / "down", *files)
