"""Files that other tools laid into the download folder: taken where they are proved, else named."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loader import boot
from loader.config.settings import Settings
from loader.errors import CheckpointError, ConfigError, ExpiredError, LoaderError, ResolveError
from loader.fetch import adoption
from loader.fetch.crc import crc64nvme
from tests.models import tiny_llama
from tests.origin import FaultyOrigin, write_listing
from tests.test_boot import Job

WEIGHTS = "model.safetensors"
ROWS = 1 << 12  # of 512 bytes: 2 MiB a tensor


@pytest.fixture(autouse=True)
def files_settle_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written a moment ago is not waited for so long."""
    monkeypatch.setattr(adoption, "_RECENT_S", 0.2)
    monkeypatch.setattr(adoption, "_LOOK_S", 0.05)


@pytest.fixture
def job(origin: FaultyOrigin, tmp_path: Path) -> Job:
    """A checkpoint of three tensors, one of them with many rows of zeros."""
    found = Job(origin, tmp_path)
    generator = torch.Generator().manual_seed(1)
    tensors = {f"t{i}": torch.randn(ROWS, 128, generator=generator) for i in range(3)}
    tensors["t1"][ROWS // 2 :] = 0
    folder = origin.folder() / "checkpoint-1"
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text("{}")
    return found


def at_origin(job: Job, name: str = WEIGHTS) -> Path:
    return job.origin.folder() / "checkpoint-1" / name


def lay(job: Job, *, flat: bool = False) -> Path:
    """Copy the checkpoint as another tool would, and return where its weights lie."""
    folder = job.root / ("rank-0" if flat else "job1/rank-0")
    shutil.copytree(job.origin.folder() / "checkpoint-1", folder / "checkpoint-1")
    return folder / "checkpoint-1" / WEIGHTS


def without_origin(job: Job, **own: Any) -> Settings:
    return job.settings("rank-0/checkpoint-1/", **{"artifacts": []} | own)


def end_urls(job: Job) -> Settings:
    """Settings with a listing whose URLs have ended."""
    settings = job.settings("rank-0/checkpoint-1/")
    (listing,) = map(Path, settings.artifacts)
    job.origin.lifetime_s = -60
    write_listing(job.origin, listing)
    return Settings.load(
        {
            "training_checkpoints": {
                "download_folder": str(job.root),
                "artifact_references": [
                    {"training_job_id": "job1", "paths": ["rank-0/checkpoint-1/"]}
                ],
            },
            "model_metadata": {"podloader": {"artifacts": [str(listing)]}},
        }
    )


def test_complete_files_are_taken_and_stay_taken(job: Job) -> None:
    path = lay(job)
    inode = path.stat().st_ino
    snapshot = boot.fetch_files(job.settings("rank-0/checkpoint-1/"))
    assert snapshot.fetched_bytes == 0
    assert all(file.reused for file in snapshot.files)
    assert path.stat().st_ino == inode
    # Samples and zeros are compared, not the whole.
    zeros = ROWS // 2 * 512
    assert job.origin.bytes_sent < zeros + 12 * (1 << 16) < path.stat().st_size
    sent = job.origin.bytes_sent
    assert boot.fetch_files(job.settings("rank-0/checkpoint-1/")).fetched_bytes == 0
    assert job.origin.bytes_sent - sent < 100  # no second proof


def spoil_sparse(path: Path) -> None:
    """Leave the header, and no weights: as a tool that was killed does."""
    size, header = path.stat().st_size, path.read_bytes()[:4096]
    path.write_bytes(header)
    os.truncate(path, size)


def spoil_allocated(path: Path) -> None:
    size, header = path.stat().st_size, path.read_bytes()[:4096]
    path.write_bytes(header)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def spoil_all_but_the_last_range(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096])
    with path.open("r+b") as file:
        file.seek(len(content) - (1 << 20))
        file.write(content[-(1 << 20) :])


def spoil_with_written_zeros(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1 << 20)
        file.write(bytes(1 << 18))


def spoil_the_head(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(20)
        file.write(b"\x00\x00")


def spoil_the_size(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


SPOILT = [
    spoil_sparse,
    spoil_allocated,
    spoil_all_but_the_last_range,
    spoil_with_written_zeros,
    spoil_the_head,
    spoil_the_size,
]


@pytest.mark.parametrize("spoil", SPOILT)
def test_what_is_not_the_origins_is_named_and_fetched(
    job: Job, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = lay(job)
    spoil(path)
    snapshot = boot.fetch_files(job.settings("rank-0/checkpoint-1/"))
    assert path.read_bytes() == at_origin(job).read_bytes()
    assert [file.path for file in snapshot.files if not file.reused] == [
        f"job1/rank-0/checkpoint-1/{WEIGHTS}"
    ]
    assert f"{path} is not taken: " in caplog.text


@pytest.mark.parametrize("spoil", [spoil_sparse, spoil_allocated, spoil_all_but_the_last_range])
def test_unwritten_ranges_are_refused_where_no_origin_can_be_asked(job: Job, spoil: Any) -> None:
    path = lay(job)
    spoil(path)
    with pytest.raises(CheckpointError) as found:
        boot.fetch_files(without_origin(job))
    assert str(path) in str(found.value)
    assert "never written" in str(found.value)
    assert "accept_unwritten: true" in str(found.value)
    taken = boot.fetch_files(without_origin(job, accept_unwritten=True))
    assert all(file.reused for file in taken.files)


def test_a_sum_of_the_origin_finds_one_wrong_bit(job: Job) -> None:
    path = lay(job)
    content = bytearray(at_origin(job).read_bytes())
    sum_ = base64.b64encode(crc64nvme(bytes(content)).to_bytes(8, "big")).decode()
    told = {"x-amz-checksum-crc64nvme": sum_}
    job.origin.headers = lambda path: told if path.endswith(WEIGHTS) else {}
    boot.fetch_files(job.settings("rank-0/checkpoint-1/"))
    assert job.origin.bytes_sent < 1000  # the sum is proof enough

    shutil.rmtree(job.root)
    path = lay(job)
    content[(1 << 20) + 1] ^= 1
    path.write_bytes(content)
    boot.fetch_files(job.settings("rank-0/checkpoint-1/"))
    assert path.read_bytes() == at_origin(job).read_bytes()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("named", [[], ["local"]])
def test_without_artifacts_the_folder_is_the_listing(
    job: Job, flat: bool, named: list[str]
) -> None:
    lay(job, flat=flat)
    snapshot = boot.fetch_files(without_origin(job, artifacts=named))
    assert [file.path for file in snapshot.files] == [
        f"job1/rank-0/checkpoint-1/{name}" for name in ("config.json", WEIGHTS)
    ]
    for file in snapshot.files:
        name = Path(file.path).name
        assert (snapshot.root / file.path).read_bytes() == at_origin(job, name).read_bytes()
    assert not job.origin.requests


def test_a_model_that_lies_there_is_prepared_without_any_network(job: Job, tmp_path: Path) -> None:
    tiny_llama(job.root / "rank-0/checkpoint-1")
    ready = boot.prepare(without_origin(job))
    assert (ready.path / "config.json").is_file()
    assert ready.path == job.root / "job1/rank-0/checkpoint-1"


def test_what_lies_there_is_hashed_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(job)
    boot.fetch_files(without_origin(job))
    monkeypatch.setattr(adoption, "scan_file", None)
    boot.fetch_files(without_origin(job))


def test_what_was_changed_since_is_proved_anew(job: Job) -> None:
    path = lay(job)
    first = boot.fetch_files(without_origin(job))
    other = random.Random(1).randbytes(100)
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(other)
    second = boot.fetch_files(without_origin(job))
    assert first.files[1].digest != second.files[1].digest
    spoil_sparse(path)
    with pytest.raises(CheckpointError):
        boot.fetch_files(without_origin(job))


def test_the_same_refusals_as_of_any_listing(job: Job) -> None:
    path = lay(job)
    with pytest.raises(ResolveError, match="match no file"):
        boot.fetch_files(job.settings("rank-1/", artifacts=[]))
    path.rename(path.with_name("model-00001-of-00002.safetensors"))
    with pytest.raises(ResolveError, match="shards that the listing lacks"):
        boot.fetch_files(without_origin(job))


def test_an_index_that_names_more_than_lies_there(job: Job) -> None:
    path = lay(job)
    path.with_name("model.safetensors.index.json").write_text(
        '{"weight_map": {"t0": "model.safetensors", "t9": "more.safetensors"}}'
    )
    with pytest.raises(ResolveError, match="shards that the listing lacks"):
        boot.fetch_files(without_origin(job))


def test_a_broken_header_that_lies_there(job: Job) -> None:
    spoil_the_head(lay(job))
    with pytest.raises(CheckpointError, match="cannot be taken"):
        boot.fetch_files(without_origin(job))


def test_nothing_there_and_nothing_named(job: Job) -> None:
    with pytest.raises(ConfigError, match="not said where the artifacts are") as found:
        boot.fetch_files(without_origin(job))
    assert str(job.root) in str(found.value)
    with pytest.raises(LoaderError, match="nothing of the jobs lies in the download folder"):
        boot.fetch_files(without_origin(job, artifacts=["local"]))


def test_a_listing_whose_urls_have_ended_is_still_a_listing(job: Job) -> None:
    path = lay(job)
    settings = end_urls(job)
    snapshot = boot.fetch_files(settings)
    assert all(file.reused for file in snapshot.files)
    assert boot.fetch_files(settings).files == snapshot.files
    path.with_name("config.json").unlink()
    with pytest.raises(ExpiredError):
        boot.fetch_files(settings)


def test_ended_urls_and_a_hole(job: Job) -> None:
    path = lay(job)
    spoil_sparse(path)
    with pytest.raises(CheckpointError, match="never written"):
        boot.fetch_files(end_urls(job))


def test_what_no_origin_has_seen_is_compared_when_one_answers(job: Job) -> None:
    path = lay(job)
    content = path.read_bytes()
    path.write_bytes(content[: -(1 << 16)] + bytes(1 << 16))  # written: taken without an origin
    boot.fetch_files(end_urls(job))
    assert path.read_bytes() != content
    job.origin.lifetime_s = 3600
    boot.fetch_files(job.settings("rank-0/checkpoint-1/"))
    assert path.read_bytes() == content


def test_an_origin_that_does_not_answer(job: Job, origin: FaultyOrigin) -> None:
    write_listing(origin, origin.root / "listing.json")
    source = origin.sign("listing.json")

    def settings(pattern: str) -> Settings:
        own: dict[str, Any] = {"artifacts": [source], "retries": 0, "connect_timeout_s": 1}
        return job.settings(pattern, **own)

    first = boot.fetch_files(settings("rank-0/checkpoint-1/"))
    origin.stop()
    again = boot.fetch_files(settings("rank-0/checkpoint-1/"))
    assert [file.digest for file in again.files] == [file.digest for file in first.files]
    assert all(file.reused for file in again.files)
    with pytest.raises(LoaderError):  # complete for that config alone
        boot.fetch_files(settings("rank-0/*/config.json"))
    (job.root / first.files[0].path).unlink()
    with pytest.raises(LoaderError):
        boot.fetch_files(settings("rank-0/checkpoint-1/"))


def test_a_file_that_grows_is_waited_for(job: Job) -> None:
    path = lay(job)
    content = path.read_bytes()
    path.write_bytes(content[: 1 << 20])

    def write_the_rest() -> None:
        with path.open("ab") as file:
            for start in range(1 << 20, len(content), 1 << 20):
                time.sleep(0.1)
                file.write(content[start : start + (1 << 20)])
                file.flush()

    writer = threading.Thread(target=write_the_rest)
    writer.start()
    try:
        snapshot = boot.fetch_files(job.settings("rank-0/checkpoint-1/"))
    finally:
        writer.join()
    assert all(file.reused for file in snapshot.files)


def test_a_file_that_grows_for_too_long(job: Job) -> None:
    path = lay(job)
    over = threading.Event()

    def write() -> None:
        with path.open("ab") as file:
            while not over.wait(0.05):
                file.write(b"\x00")
                file.flush()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with pytest.raises(CheckpointError, match="still is"):
            boot.fetch_files(without_origin(job, stall_timeout_s=1))
    finally:
        over.set()
        writer.join()


def test_symlinks_end_below_the_download_folder(job: Job, tmp_path: Path) -> None:
    path = lay(job)
    real = job.root / "store" / "blob"
    real.parent.mkdir()
    path.rename(real)
    path.symlink_to("../../../store/blob")
    assert all(file.reused for file in boot.fetch_files(without_origin(job)).files)
    assert all(file.reused for file in boot.fetch_files(without_origin(job)).files)

    outside = tmp_path / "outside"
    shutil.move(real, outside)
    path.unlink()
    path.symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out of the download folder"):
        boot.fetch_files(without_origin(job))
    mount = tmp_path / "mount"
    mount.mkdir()
    shutil.move(outside, mount)
    path.unlink()
    path.symlink_to(mount / "outside")
    trusting = without_origin(job, trusted_folders=[str(mount)])
    assert all(file.reused for file in boot.fetch_files(trusting).files)


def test_a_folder_of_a_mount_that_is_trusted(job: Job, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    lay(job)
    shutil.move(job.root / "job1/rank-0", mount)
    (job.root / "job1/rank-0").symlink_to(mount)
    with pytest.raises(ResolveError):
        boot.fetch_files(without_origin(job))
    trusting = without_origin(job, trusted_folders=[str(mount)])
    assert len(boot.fetch_files(trusting).files) == 2


def test_what_others_may_write_to(job: Job) -> None:
    lay(job).chmod(0o666)
    with pytest.raises(CheckpointError, match="everybody may write to it"):
        boot.fetch_files(without_origin(job))


def test_a_fifo_is_no_file(job: Job) -> None:
    path = lay(job)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(LoaderError):
        boot.fetch_files(without_origin(job, stall_timeout_s=1))


_FETCH = """
import json, sys
from loader import boot
from loader.config.settings import Settings
snapshot = boot.fetch_files(Settings.load(json.loads(sys.argv[1])))
for file in snapshot.files:
    print(snapshot.root / file.path, (snapshot.root / file.path).resolve(), file.reused)
"""
_READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_read_only_download_folder(job: Job, tmp_path: Path) -> None:
    lay(job, flat=True)
    cache = tmp_path / "cache"
    references = [{"training_job_id": "job1", "paths": ["rank-0/"]}]
    checkpoints = {"download_folder": str(job.root), "artifact_references": references}
    config = {
        "training_checkpoints": checkpoints,
        "model_metadata": {"podloader": {"cache_folder": str(cache)}},
    }
    fetch = [sys.executable, "-c", _FETCH, json.dumps(config)]
    mounted = ["unshare", "--mount", "sh", "-c", _READ_ONLY, "sh", str(job.root), *fetch]
    done = subprocess.run(mounted, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for path, real, reused in lines:
        assert path.startswith(str(cache))
        assert real.startswith(str(job.root / "rank-0"))
        assert reused == "True"


def fetch_read_only(job: Job, cache: Path, **own: Any) -> list[list[str]]:
    """Fetch with the download folder mounted read-only; return path, where it leads, reused."""
    settings = job.settings("rank-0/checkpoint-1/")
    references = [{"training_job_id": "job1", "paths": ["rank-0/checkpoint-1/"]}]
    checkpoints = {"download_folder": str(job.root), "artifact_references": references}
    own = {"cache_folder": str(cache), "artifacts": list(settings.artifacts)} | own
    config = {"training_checkpoints": checkpoints, "model_metadata": {"podloader": own}}
    fetch = [sys.executable, "-c", _FETCH, json.dumps(config)]
    mounted = ["unshare", "--mount", "sh", "-c", _READ_ONLY, "sh", str(job.root), *fetch]
    done = subprocess.run(mounted, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_what_podloader_fetched_itself_is_known_in_a_read_only_folder(
    job: Job, tmp_path: Path
) -> None:
    boot.fetch_files(job.settings("rank-0/checkpoint-1/"))
    sent, cache = job.origin.bytes_sent, tmp_path / "cache"
    for _, real, reused in fetch_read_only(job, cache):
        assert real.startswith(str(job.root))
        assert reused == "True"
    assert job.origin.bytes_sent - sent < 100
    weights = job.root / "job1/rank-0/checkpoint-1" / WEIGHTS
    weights.unlink()  # the symlink to it leads nowhere now
    (_, _, kept), (path, real, reused) = fetch_read_only(job, cache)
    assert (kept, reused, path) == ("True", "False", real)
    assert Path(path).read_bytes() == at_origin(job).read_bytes()
    shutil.copy(at_origin(job), weights)
    spoil_sparse(weights)
    assert fetch_read_only(job, cache)[1][0] == path
    assert Path(path).read_bytes() == at_origin(job).read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
@pytest.mark.parametrize("text", ["", "{", "null", '{"size_bytes": 1, "ranges": []}'])
def test_a_record_that_is_none_in_a_read_only_folder(job: Job, tmp_path: Path, text: str) -> None:
    boot.fetch_files(job.settings("rank-0/checkpoint-1/"))
    for record in (job.root / ".podloader").rglob("*.record"):
        record.write_text(text)
    for _, real, reused in fetch_read_only(job, tmp_path / "cache"):
        assert real.startswith(str(job.root))
        assert reused == "True"


def test_the_plan_says_what_is_here(job: Job) -> None:
    settings = job.settings("rank-0/checkpoint-1/")
    names = [f"job1/rank-0/checkpoint-1/{name}" for name in ("config.json", WEIGHTS)]
    assert [boot.plan(settings).presence[name] for name in names] == ["missing", "missing"]
    path = lay(job)
    path.with_name("config.json").unlink()
    assert [boot.plan(settings).presence[name] for name in names] == ["missing", "unproved"]
    boot.fetch_files(settings)
    assert [boot.plan(settings).presence[name] for name in names] == ["proved", "proved"]
