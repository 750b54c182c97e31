"""What other tools leave beside files, and how their mounts look."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loader import boot
from loader.errors import CheckpointError, ConfigError, ListingError, ResolveError, TransientError
from loader.fetch.missing_ranges import Range
from loader.fetch.scan import allocated_only
from tests.fetch.test_adoption import (
    WEIGHTS,
    at_origin,
    end_urls,
    fetch_read_only,
    files_settle_soon,
    job,
    lay,
    spoil_sparse,
    spoil_with_written_zeros,
    without_origin,
)
from tests.fetch.test_adoption_layouts import NAMES, all_taken, reused
from tests.test_boot import Job

__all__ = ["files_settle_soon", "job"]


@pytest.mark.parametrize(
    "name",
    [
        ".cache/huggingface/download/x.incomplete",
        f"{WEIGHTS}.part",
        f"{WEIGHTS}.partial",
        f"{WEIGHTS}.crdownload",
    ],
)
def test_a_transfer_that_has_not_ended_is_no_file(
    job: Job, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    left = lay(job).parent / name
    left.parent.mkdir(parents=True, exist_ok=True)
    with left.open("wb") as file:
        file.truncate(1 << 20)
    assert all_taken(boot.fetch_files(without_origin(job)))
    assert f"{left} is left out" in caplog.text
    assert left.exists()


def test_only_what_has_not_ended_lies_there(job: Job) -> None:
    path = lay(job)
    path.with_name("config.json").unlink()
    path.rename(path.with_name(f"{WEIGHTS}.incomplete"))
    with pytest.raises(ResolveError, match="match no file"):
        boot.fetch_files(without_origin(job))


@pytest.mark.parametrize(
    ("text", "is_whole"),
    [
        ('{"a": [1, 2], "b": "c"}', True),
        ('{"a": 1}\n{"a": 2}\n', True),
        ('{"a": NaN}', True),
        ("9" * 5000, True),
        ("[" * 100_000, True),
        ("", False),
        ('{"a": [1, 2], "b": "c', False),
        ('{"a": [1, 2]', False),
        ('{"a": [1, 2], "b": tr', False),
    ],
)
def test_a_json_that_breaks_off(job: Job, text: str, is_whole: bool) -> None:
    path = lay(job).with_name("config.json")
    path.write_text(text)
    if is_whole:
        assert all_taken(boot.fetch_files(without_origin(job)))
        return
    with pytest.raises(CheckpointError, match="no whole JSON") as found:
        boot.fetch_files(without_origin(job))
    assert str(path) in str(found.value)


def test_the_origin_decides_what_its_json_is(job: Job) -> None:
    at_origin(job, "config.json").write_text('{"a": ')
    lay(job)
    assert all_taken(boot.fetch_files(job.settings("rank-0/checkpoint-1/")))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
@pytest.mark.parametrize(("user", "mode"), [(12345, 0o644), (0, 0o777), (12345, 0o777)])
@pytest.mark.parametrize("named", [True, False])
def test_owners_on_a_read_only_mount(
    job: Job, tmp_path: Path, user: int, mode: int, named: bool
) -> None:
    for path in lay(job).parent.iterdir():
        path.chmod(mode)
        os.chown(path, user, user)
    own: dict[str, object] = {} if named else {"artifacts": []}
    for _ in range(2):
        for _, real, taken in fetch_read_only(job, tmp_path / "cache", **own):
            assert real.startswith(str(job.root))
            assert taken == "True"


@pytest.mark.parametrize("damage", [None, spoil_with_written_zeros, Path.unlink])
def test_an_origin_that_falls_silent_after_the_urls_had_ended(
    job: Job, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    path = lay(job)
    settings = end_urls(job)
    assert all_taken(boot.fetch_files(settings))
    job.origin.stop()
    if damage is None:
        assert all_taken(boot.fetch_files(settings))
        assert "an earlier run completed all files" in caplog.text
        return
    damage(path)  # type: ignore[operator]
    with pytest.raises(TransientError):
        boot.fetch_files(settings)


def test_an_origin_that_is_silent_from_the_first(job: Job) -> None:
    lay(job)
    settings = job.settings("rank-0/checkpoint-1/", retries=0, connect_timeout_s=1)
    job.origin.stop()
    for _ in range(2):
        with pytest.raises(TransientError):
            boot.fetch_files(settings)
    assert all_taken(boot.fetch_files(without_origin(job)))
    with pytest.raises(TransientError):  # what another config completed
        boot.fetch_files(settings)


def test_a_rank_that_is_no_folder(job: Job) -> None:
    lay(job)
    (job.root / "job1/rank-1").write_text("")
    (job.root / "job1/rank-2").symlink_to("nowhere")
    assert all_taken(boot.fetch_files(without_origin(job)))


@pytest.mark.parametrize(
    "place", ["job2/rank-0/checkpoint-1", "checkpoint-1", "job1/checkpoint-1", "job1/job1/rank-0"]
)
def test_another_layout_than_the_documents(job: Job, place: str) -> None:
    folder = lay(job).parent
    shutil.move(folder, job.folder / "aside")
    shutil.rmtree(job.root)
    (job.root / place).parent.mkdir(parents=True)
    shutil.move(job.folder / "aside", job.root / place)
    with pytest.raises(ConfigError, match="not said where the artifacts are") as untold:
        boot.fetch_files(without_origin(job))
    with pytest.raises(ListingError, match="nothing of the jobs lies") as local:
        boot.fetch_files(without_origin(job, artifacts=["local"]))
    for error in (untold.value, local.value):
        assert place.partition("/")[0] in (error.got or "")
        assert "rank-<N>" in (error.expected or "")


def test_a_folder_where_a_file_is_needed(job: Job) -> None:
    path = lay(job)
    path.unlink()
    path.mkdir()
    with pytest.raises(ResolveError, match="a folder, where a file is needed"):
        boot.fetch_files(job.settings("rank-0/checkpoint-1/"))


def test_zero_rows_that_a_copy_left_as_holes(job: Job) -> None:
    path = lay(job)
    content = path.read_bytes()
    start = content.index(bytes(1 << 20))
    start += -start % 4096
    with path.open("r+b") as file:
        file.truncate(start)
        file.seek(start + (1 << 19))
        file.write(content[start + (1 << 19) :])
    assert path.stat().st_blocks * 512 < len(content)
    with pytest.raises(CheckpointError, match="accept_unwritten: true"):
        boot.fetch_files(without_origin(job))
    assert all_taken(boot.fetch_files(without_origin(job, accept_unwritten=True)))
    shutil.rmtree(job.root / ".podloader")
    assert all_taken(boot.fetch_files(job.settings("rank-0/checkpoint-1/")))


def test_zeros_on_their_way_to_the_disk_were_written(tmp_path: Path) -> None:
    size_bytes, path = 32 << 20, tmp_path / "zeros"
    for _ in range(5):
        with path.open("w+b") as file:
            file.write(bytes(size_bytes))
            file.flush()
            begin_writing_back(file.fileno())
            assert allocated_only(file.fileno(), [Range(0, size_bytes)]) == []


def begin_writing_back(fd: int) -> None:
    whole = (ctypes.c_long(0), ctypes.c_long(0))
    ctypes.CDLL(None).sync_file_range(fd, *whole, 2)  # SYNC_FILE_RANGE_WRITE


def test_a_trusted_symlink_beside_a_listing(job: Job, tmp_path: Path) -> None:
    path, mount = lay(job), tmp_path / "mount"
    mount.mkdir()
    shutil.move(path, mount)
    path.symlink_to(mount / WEIGHTS)
    trusting = job.settings("rank-0/checkpoint-1/", trusted_folders=[str(mount)])
    assert all_taken(boot.fetch_files(trusting))
    spoil_sparse(mount / WEIGHTS)
    found = reused(boot.fetch_files(trusting))
    assert found == {NAMES[0]: True, NAMES[1]: False}
    assert path.read_bytes() == at_origin(job).read_bytes()
    assert (mount / WEIGHTS).read_bytes() != at_origin(job).read_bytes()


def test_the_presence_of_what_no_origin_has_seen(job: Job) -> None:
    lay(job)
    listed = end_urls(job)
    boot.fetch_files(listed)
    assert set(boot.plan(listed).presence.values()) == {"unproved"}
    boot.fetch_files(without_origin(job))
    assert set(boot.plan(without_origin(job)).presence.values()) == {"proved"}


_LOOK = """
import json, sys
from loader import boot
from loader.config.settings import Settings
from loader.errors import LoaderError
try:
    boot.fetch_files(Settings.load(json.loads(sys.argv[1])))
except LoaderError as error:
    print(type(error).__name__, *str(error).splitlines())
"""
_AS_OTHERS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]  # rights count for root


@pytest.mark.skipif(os.geteuid() != 0, reason="giving rights up takes root")
@pytest.mark.parametrize(
    ("place", "says"),
    [
        (NAMES[0], "CheckpointError"),
        (NAMES[1], "CheckpointError"),
        ("job1/rank-0/checkpoint-1", "DiskError"),
        ("job1/rank-0", "DiskError"),
        ("job1", "DiskError"),
        (".", "DiskError"),
    ],
)
def test_what_may_not_be_read(job: Job, place: str, says: str) -> None:
    lay(job)
    (job.root / place).chmod(0)
    references = [{"training_job_id": "job1", "paths": ["rank-0/checkpoint-1/"]}]
    checkpoints = {"download_folder": str(job.root), "artifact_references": references}
    config = json.dumps({"training_checkpoints": checkpoints})
    command = [*_AS_OTHERS, sys.executable, "-c", _LOOK, config]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (job.root / place).chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(says)
    assert str(job.root / place) in done.stdout
    assert "Permission denied" in done.stdout


def test_the_presence_of_what_has_not_ended(job: Job) -> None:
    path = lay(job)
    path.rename(path.with_name(f"{WEIGHTS}.part"))
    found = boot.plan(job.settings("rank-0/checkpoint-1/")).presence
    assert json.dumps(dict(found)) == json.dumps({NAMES[0]: "unproved", NAMES[1]: "missing"})
