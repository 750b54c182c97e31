"""Folders that several machines share: one fetches, the others follow."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loader.errors import FetchError
from loader.fetch import lease
from loader.fetch.lease import is_shared, leased
from loader.fetch.snapshot import fetch
from loader.fetch.stopping import StoppedError
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest
from tests.origin import FaultyOrigin, slow
from tests.shared_mount import mounted, why_not


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every folder count as shared, and little time be long."""
    monkeypatch.setattr(lease, "is_shared", lambda root: True)
    monkeypatch.setattr(lease, "_BEAT_S", 0.05)
    monkeypatch.setattr(lease, "_STALE_S", 0.5)


def test_a_disk_of_ones_own_has_no_lease(tmp_path: Path) -> None:
    assert not is_shared(tmp_path / "not" / "there")
    with leased(tmp_path, threading.Event()):
        assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("shared")
def test_one_after_the_other(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(_: int) -> None:
        with leased(tmp_path, threading.Event()):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.1)
            inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == [1, 1, 1, 1]
    assert not list((tmp_path / ".podloader").iterdir())


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("text", ["", "no JSON", '{"holder": "gone", "beat": 3}', "[]"])
def test_a_machine_that_is_gone_is_not_waited_for_for_ever(tmp_path: Path, text: str) -> None:
    path = tmp_path / ".podloader" / "lease"
    path.parent.mkdir()
    path.write_text(text)
    with leased(tmp_path, threading.Event()):
        assert json.loads(path.read_text())["holder"] != "gone"


@pytest.mark.usefixtures("shared")
def test_who_lost_it_says_so_and_leaves_the_others_alone(tmp_path: Path) -> None:
    path = tmp_path / ".podloader" / "lease"

    def lose() -> None:
        with leased(tmp_path, threading.Event()):
            path.write_text('{"holder": "another", "beat": 1}')
            time.sleep(0.3)

    with pytest.raises(FetchError, match="another machine"):
        lose()
    assert "another" in path.read_text()


@pytest.mark.usefixtures("shared")
def test_whoever_waits_can_be_stopped(tmp_path: Path) -> None:
    stop = threading.Event()
    told: list[str] = []
    with leased(tmp_path, threading.Event()):
        threading.Timer(0.1, stop.set).start()
        with pytest.raises(StoppedError), leased(tmp_path, stop, told.append):
            pass
    path = tmp_path / ".podloader" / "lease"
    assert told[0] == f"another machine, which fetches into this folder, {path}"
    assert len(told) > 2, "as long as it lasts"
    assert told[-1] == ""


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_two_mounts_without_common_locks_fetch_every_byte_once(
    tmp_path: Path, origin: FaultyOrigin, store: PresignedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_BEAT_S", 0.2)
    artifacts = []
    for number in range(3):
        path = origin.put(f"w{number}", bytes([number]) * 3_000_000)
        url = origin.sign(path.relative_to(origin.root).as_posix())
        artifacts.append(Artifact("job1", 0, f"w{number}", url, 3_000_000))
    origin.fail("w1", slow(0.02))
    (tmp_path / "volume").mkdir()
    with (
        mounted(tmp_path / "volume", tmp_path / "pod-0") as first,
        mounted(tmp_path / "volume", tmp_path / "pod-1") as second,
    ):
        assert is_shared(first)
        with ThreadPoolExecutor(2) as pool:
            manifest = Manifest(tuple(artifacts))
            found = list(pool.map(lambda root: fetch(manifest, root, store), (first, second)))
        for root in (first, second):
            for number in range(3):
                content = (root / f"job1/rank-0/w{number}").read_bytes()
                assert content == bytes([number]) * 3_000_000
    assert (
        sorted(f.reused for snapshot in found for f in snapshot.files) == [False] * 3 + [True] * 3
    )
    assert sum(len(origin.ranges_of(f"w{number}")) for number in range(3)) <= 8
