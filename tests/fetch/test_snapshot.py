"""A fetch ends with whole files or with one error, whatever the origin and the disk do."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loader.errors import (
    ChangedError,
    DiskError,
    ExpiredError,
    FetchError,
    FormatError,
    ResolveError,
    TransientError,
)
from loader.fetch import snapshot as fetch_snapshot
from loader.fetch.files import places
from loader.fetch.part import PartFile
from loader.fetch.snapshot import FetchOptions, fetch, read_artifact
from loader.fetch.stopping import StoppedError
from loader.http.objects import ObjectInfo
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest, Snapshot
from tests.fetch.test_transfer import Noted, ended_after
from tests.origin import (
    FaultyOrigin,
    act,
    cut,
    ignore_range,
    reset,
    serving,
    slow,
    stall,
    status,
)

RANGE = 64 * 1024
BIG = random.Random(1).randbytes(10 * RANGE + 123)
OPTIONS = FetchOptions(concurrency=4, retries=3, range_bytes=RANGE)


class Setup:
    """An origin, a store, and a folder to fetch into."""

    def __init__(self, origin: FaultyOrigin, store: PresignedStore, root: Path) -> None:
        self.origin, self.store, self.root = origin, store, root

    def manifest(self) -> Manifest:
        entries = self.origin.listing("job1")["checkpoint_artifacts"]
        assert isinstance(entries, list)
        artifacts = (
            Artifact("job1", e["node_rank"], e["relative_file_name"], e["url"]) for e in entries
        )
        return Manifest(tuple(sorted(artifacts, key=lambda a: a.path)))

    def fetch(self, options: FetchOptions = OPTIONS) -> Snapshot:
        return fetch(self.manifest(), self.root, self.store, options)

    def check(self) -> None:
        """Every file is the origin's, and nothing but whole files is to be seen."""
        wanted = {a.path for a in self.manifest().files}
        seen = {p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file()}
        assert {s for s in seen if not s.startswith(".podloader")} == wanted
        assert not [s for s in seen if s.endswith((".part", ".journal", ".new"))]
        for path in wanted:
            source = self.origin.root / "training_projects/demo/jobs" / path
            assert (self.root / path).read_bytes() == source.read_bytes()

    def spans(self) -> list[tuple[int, int]]:
        """The ``[start, end)`` that were asked for, in turn."""
        found = [r.removeprefix("bytes=").split("-") for r in self.origin.ranges_of("big.bin")]
        return [(int(start), int(last) + 1) for start, last in found]

    @property
    def final(self) -> Path:
        return self.root / "job1" / "rank-0" / "big.bin"


@pytest.fixture
def setup(origin: FaultyOrigin, store: PresignedStore, tmp_path: Path) -> Setup:
    origin.put("big.bin", BIG)
    return Setup(origin, store, tmp_path / "down")


def test_many_files_of_every_size(setup: Setup) -> None:
    for rank in range(2):
        for size in (0, 1, RANGE - 1, RANGE, RANGE + 1):
            setup.origin.put(f"checkpoint 1/f+{size}.bin", BIG[:size], rank=rank)
    first = setup.fetch()
    setup.check()
    assert first.fetched_bytes == sum(file.size_bytes for file in first.files)
    assert not any(file.reused for file in first.files)
    second = setup.fetch()
    assert second.fetched_bytes == 0
    assert all(file.reused for file in second.files)
    assert [f.digest for f in first.files] == [f.digest for f in second.files]


def test_big_files_come_in_ranges(setup: Setup) -> None:
    setup.fetch()
    first, *spans = setup.spans()
    assert first == (0, 16 << 10)  # what it is, and a small file whole
    spans.sort()
    assert len(spans) > 3
    assert spans[0][0] == 0
    assert spans[-1][1] == len(BIG)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans)), "no byte twice"


@pytest.mark.parametrize(
    "fault", [reset, cut(1000), cut(RANGE // 2), status(503), status(429, Retry_After="0")]
)
def test_passing_faults_are_cured(setup: Setup, fault: Callable[[object], bool]) -> None:
    setup.origin.fail("big.bin", *[fault] * 3)
    setup.fetch()
    setup.check()


def test_a_stall_is_cut(setup: Setup) -> None:
    noted = Noted()
    setup.origin.fail("big.bin", act(lambda: None), stall(60))
    fetch(setup.manifest(), setup.root, setup.store, OPTIONS, noted)
    setup.check()
    assert "the connection brought nothing in time" in noted.retries


def test_a_cut_body_goes_on_where_it_ended(setup: Setup) -> None:
    setup.origin.fail("big.bin", act(lambda: None), cut(1000))
    setup.fetch(FetchOptions(concurrency=1, retries=3, range_bytes=1 << 30))
    setup.check()
    assert f"bytes=1000-{len(BIG) - 1}" in setup.origin.ranges_of("big.bin")


def test_what_does_not_pass_is_raised_and_nothing_lost(setup: Setup) -> None:
    setup.origin.put("other.bin", BIG[::-1])
    setup.origin.fail("big.bin", act(lambda: None), *[status(503)] * 100)
    with pytest.raises(TransientError, match="503"):
        setup.fetch()
    assert not setup.final.exists()
    setup.origin.faults.clear()
    setup.fetch()
    setup.check()


@pytest.mark.parametrize(("code", "kind"), [(404, FetchError), (403, FetchError)])
def test_a_refusal_ends_the_fetch_at_once(setup: Setup, code: int, kind: type) -> None:
    setup.origin.fail("big.bin", act(lambda: None), status(code))
    with pytest.raises(kind):
        setup.fetch()
    assert not setup.final.exists()


def test_an_expired_url_keeps_what_arrived(setup: Setup) -> None:
    setup.origin.fail("big.bin", act(lambda: None), ended_after(4 * RANGE), *[status(403)] * 4)
    with pytest.raises(FetchError):
        setup.fetch(FetchOptions(concurrency=1, retries=0, range_bytes=RANGE))
    setup.origin.requests.clear()
    setup.origin.faults.clear()
    assert setup.fetch(OPTIONS).fetched_bytes == len(BIG) - 4 * RANGE
    setup.check()
    assert all(start >= 4 * RANGE for start, _ in setup.spans()[1:])
    expired = setup.origin.sign("training_projects/demo/jobs/job1/rank-0/big.bin", expires=1)
    shutil.rmtree(setup.root)
    with pytest.raises(ExpiredError):
        fetch(Manifest((Artifact("job1", 0, "big.bin", expired),)), setup.root, setup.store)


def test_an_object_that_changes_midway_is_never_mixed(setup: Setup) -> None:
    change = act(lambda: setup.origin.put("big.bin", BIG[::-1]))
    setup.origin.fail("big.bin", act(lambda: None), ended_after(4 * RANGE), change)
    with pytest.raises(ChangedError):
        setup.fetch(FetchOptions(concurrency=1, retries=3, range_bytes=RANGE))
    assert not setup.final.exists()
    setup.fetch()
    setup.check()


def test_a_new_version_is_fetched_again(setup: Setup) -> None:
    setup.fetch()
    setup.origin.put("big.bin", BIG[::-1])
    assert setup.fetch().fetched_bytes == len(BIG)
    setup.check()


def test_the_same_version_at_another_place_is_kept(setup: Setup, store: PresignedStore) -> None:
    setup.fetch()
    with serving(setup.origin.root) as moved:
        found = Setup(moved, store, setup.root).fetch()
    assert found.files[0].reused


def test_an_interrupted_fetch_goes_on_at_another_place(setup: Setup, store: PresignedStore) -> None:
    interrupted(setup)
    with serving(setup.origin.root) as moved:
        found = Setup(moved, store, setup.root).fetch(OPTIONS)
    assert found.fetched_bytes == len(BIG) - 4 * RANGE
    setup.check()


def test_a_silent_origin_does_not_take_away_what_is_here(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    setup.fetch()
    setup.origin.fail("big.bin", status(503))
    with caplog.at_level(logging.WARNING, "podloader"):
        assert setup.fetch().files[0].reused
    assert "newest" in caplog.text


def test_what_came_from_elsewhere_is_no_proof_where_the_origin_is_silent(
    setup: Setup, store: PresignedStore
) -> None:
    setup.fetch()
    with serving(setup.origin.root) as moved:
        moved.fail("big.bin", *[status(503)] * 50)
        with pytest.raises(TransientError, match="503"):
            Setup(moved, store, setup.root).fetch()
        moved.faults.clear()
        assert Setup(moved, store, setup.root).fetch().files[0].reused


@pytest.mark.parametrize("place", [0, 3 * RANGE, len(BIG) - 1])
@pytest.mark.parametrize("keep_time", [True, False])
def test_a_corrupted_file_of_the_same_size_is_found(
    setup: Setup, place: int, keep_time: bool
) -> None:
    setup.fetch()
    times = setup.final.stat()
    with setup.final.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    if keep_time:
        os.utime(setup.final, ns=(times.st_atime_ns, times.st_mtime_ns))
    options = FetchOptions(range_bytes=RANGE, verify="full" if keep_time else "size")
    assert setup.fetch(options).fetched_bytes == len(BIG)
    setup.check()


def test_sampling_sees_the_ends(setup: Setup) -> None:
    setup.fetch()
    times = setup.final.stat()
    setup.final.write_bytes(BIG[:-1] + bytes([BIG[-1] ^ 1]))
    os.utime(setup.final, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert setup.fetch(FetchOptions(verify="sample", range_bytes=RANGE)).fetched_bytes == len(BIG)


def test_a_machine_that_went_down_proves_every_byte(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.fetch()
    times = setup.final.stat()
    middle = 5 * RANGE + 7
    setup.final.write_bytes(BIG[:middle] + bytes([BIG[middle] ^ 1]) + BIG[middle + 1 :])
    os.utime(setup.final, ns=(times.st_atime_ns, times.st_mtime_ns))
    monkeypatch.setattr(fetch_snapshot, "boot_id", lambda: "another")
    assert setup.fetch().fetched_bytes == len(BIG)
    setup.check()


@pytest.mark.parametrize(
    "damage",
    [
        lambda fields: "",
        lambda fields: "[" * 100_000,
        lambda fields: json.dumps(fields)[:-30],
        lambda fields: json.dumps([fields]),
        lambda fields: json.dumps(fields | {"version": ["x"]}),
        lambda fields: json.dumps(fields | {"ranges": []}),
        lambda fields: json.dumps(fields | {"ranges": fields["ranges"][::2]}),
        lambda fields: json.dumps(fields | {"digest": "crc64nvme:AAAAAAAAAAA="}),
        lambda fields: json.dumps(fields | {"size_bytes": None}),
        lambda fields: json.dumps(fields | {"ranges": [[0, len(BIG), -1]]}),
    ],
)
def test_a_record_that_is_damaged_proves_nothing(
    setup: Setup, damage: Callable[[dict[str, Any]], str]
) -> None:
    setup.fetch()
    record = setup.root / ".podloader/files/job1/rank-0/big.bin.record"
    record.write_text(damage(json.loads(record.read_text())))
    assert setup.fetch().fetched_bytes == len(BIG)
    setup.check()


def test_a_truncated_file_is_fetched_again(setup: Setup) -> None:
    setup.fetch()
    setup.final.write_bytes(BIG[:-1])
    assert setup.fetch().fetched_bytes == len(BIG)
    setup.check()


def interrupted(setup: Setup) -> Path:
    """Leave a part file with four whole ranges, of one request that broke off, and return it."""
    setup.origin.fail("big.bin", act(lambda: None), ended_after(4 * RANGE), status(404))
    with pytest.raises(FetchError):
        setup.fetch(FetchOptions(concurrency=1, retries=0, range_bytes=RANGE))
    return setup.root / ".podloader/files/job1/rank-0/big.bin.part"


def test_a_journal_that_lies_is_not_believed(setup: Setup) -> None:
    part = interrupted(setup)
    with part.open("r+b") as file:
        file.seek(RANGE + 5)
        file.write(b"rot")
    assert setup.fetch().fetched_bytes == len(BIG) - 3 * RANGE
    setup.check()


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]\n", '{"size_bytes": 1}\n[0, 1, 2]\n', "[" * 100_000]
)
def test_a_journal_that_is_damaged_costs_only_a_new_fetch(setup: Setup, text: str) -> None:
    interrupted(setup).with_suffix(".journal").write_text(text)
    assert setup.fetch().fetched_bytes == len(BIG)
    setup.check()


@pytest.mark.parametrize(
    "line", ["null", "[1e400, 2, 3]", "[0, 9]", "[0, 9, -1]", '["0", 9, 9]', "[" * 100_000]
)
def test_a_line_that_is_damaged_costs_no_more(setup: Setup, line: str) -> None:
    journal = interrupted(setup).with_suffix(".journal")
    journal.write_text(journal.read_text() + line + "\n")
    assert setup.fetch().fetched_bytes == len(BIG) - 4 * RANGE
    setup.check()


def test_a_torn_last_line_costs_one_range(setup: Setup) -> None:
    journal = interrupted(setup).with_suffix(".journal")
    journal.write_bytes(journal.read_bytes()[:-5])
    assert setup.fetch().fetched_bytes == len(BIG) - 3 * RANGE
    setup.check()


def test_another_range_size_goes_on_with_the_same_part(setup: Setup) -> None:
    interrupted(setup)
    options = FetchOptions(range_bytes=RANGE * 3 + 7)
    assert setup.fetch(options).fetched_bytes == len(BIG) - 4 * RANGE
    setup.check()


def test_killed_between_the_name_and_the_record(setup: Setup) -> None:
    part = interrupted(setup)
    kept = part.with_suffix(".journal").read_bytes()
    setup.fetch()
    record = json.loads(part.with_suffix(".record").read_bytes())
    lines = [json.dumps(entry).encode() for entry in record["ranges"]]
    part.with_suffix(".journal").write_bytes(
        kept.split(b"\n")[0] + b"\n" + b"\n".join(lines) + b"\n"
    )
    part.with_suffix(".record").unlink()
    assert setup.fetch().files[0].reused
    setup.check()


def test_a_server_without_ranges(setup: Setup) -> None:
    setup.origin.fail("big.bin", ignore_range, cut(100_000), *[ignore_range] * 3)
    setup.origin.faults["big.bin"][1] = lambda h: ignore_range(h) or cut(100_000)(h)
    setup.fetch()
    setup.check()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04pickle", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      x"]
)
def test_a_broken_safetensors_file_gets_no_name(setup: Setup, content: bytes) -> None:
    setup.origin.put("model.safetensors", content)
    with pytest.raises(FormatError, match="origin's file is broken") as caught:
        setup.fetch()
    assert caught.value.where == "job1/rank-0/model.safetensors"
    assert not setup.final.with_name("model.safetensors").exists()
    setup.origin.put("model.safetensors", b"\x08\0\0\0\0\0\0\0{}      ")
    setup.fetch()
    setup.check()


def test_symlinks_and_folders_in_the_way(setup: Setup, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (setup.root / "job1").mkdir(parents=True)
    (setup.root / "job1" / "rank-0").symlink_to(elsewhere)
    with pytest.raises(ResolveError, match="in the way") as caught:
        setup.fetch()
    assert "rank-0: a symlink" in str(caught.value)
    (setup.root / "job1" / "rank-0").unlink()
    setup.final.mkdir(parents=True)
    with pytest.raises(ResolveError, match="in the way"):
        setup.fetch()
    setup.final.rmdir()
    setup.final.symlink_to(elsewhere / "x")
    with pytest.raises(ResolveError, match="in the way"):
        setup.fetch()
    setup.final.unlink()
    state = setup.root / ".podloader" / "files"
    state.mkdir(parents=True)
    (state / "job1").symlink_to(elsewhere)
    with pytest.raises(ResolveError, match="in the way"):
        setup.fetch()
    assert not list(elsewhere.iterdir())
    assert setup.origin.requests == []


def test_no_room_is_said_before_a_large_file_begins(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(setup.root.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskError, match="free space") as caught:
        setup.fetch()
    assert "1.0 kB" in caught.value.got
    assert setup.origin.ranges_of("big.bin") == ["bytes=0-16383"]


def test_a_disk_that_fills_up(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskError, match="full"):
            setup.fetch()
    setup.fetch()
    setup.check()


def test_a_folder_that_cannot_be_written(setup: Setup) -> None:
    setup.root.parent.mkdir(exist_ok=True)
    setup.root.write_text("a file")
    with pytest.raises((ResolveError, DiskError)):
        setup.fetch()


def test_two_fetches_at_once_do_the_work_once(setup: Setup) -> None:
    setup.origin.fail("big.bin", *[slow(0.01)] * 30)
    found: list[Snapshot] = []
    threads = [threading.Thread(target=lambda: found.append(setup.fetch())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(s.fetched_bytes for s in found) == [0, len(BIG)]
    setup.check()


def test_small_files_are_read_from_where_they_are(setup: Setup) -> None:
    artifact = setup.manifest().files[0]
    assert read_artifact(artifact, setup.root, setup.store) == BIG
    setup.fetch()
    setup.origin.requests.clear()
    assert read_artifact(artifact, setup.root, setup.store) == BIG
    assert setup.origin.requests == []


def test_a_thread_that_comes_late_takes_no_lock(setup: Setup) -> None:
    artifact = setup.manifest().files[0]
    part = PartFile(artifact, ObjectInfo(len(BIG)), places(setup.root, artifact), "")
    part.close()
    with pytest.raises(StoppedError):
        part.lock()
    setup.fetch()
    setup.check()
