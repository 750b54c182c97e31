"""Manifests of sums that lie beside a checkpoint: written, found in a listing, compared."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loader import boot
from loader.config.settings import Settings
from loader.errors import CheckpointError, FetchError, FormatError, LoaderError
from loader.fetch.sum_manifests import sum_folder
from loader.types import Snapshot
from tests.origin import FaultyOrigin, flip, status, write_listing

CONTENTS = {
    "ck/model.bin": random.Random(1).randbytes(3 << 20),
    "ck/config.json": b"{}",
    "ck/empty": b"",
    "ck/deep/x.txt": b"x",
}


@pytest.fixture(params=["podloader.sums", "SHA256SUMS"])
def manifest(request: pytest.FixtureRequest, origin: FaultyOrigin) -> Path:
    """The manifest of a checkpoint at the origin: ours, or the plain one that anybody writes."""
    for name, content in CONTENTS.items():
        origin.put(name, content)
    path, _ = sum_folder(origin.folder() / "ck")
    if request.param == path.name:
        return path
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    path.unlink()
    plain = path.with_name(request.param)
    plain.write_text("\n".join(lines) + "\n")
    return plain


def fetch(origin: FaultyOrigin, tmp_path: Path, pattern: str = "*/*.*", **own: object) -> Snapshot:
    listing = write_listing(origin, tmp_path / "listing.json")
    config = tmp_path / "config.yaml"
    folder = tmp_path / "files"
    config.write_text(
        f"training_checkpoints: {{download_folder: {folder}, artifact_references: "
        f"[{{training_job_id: job1, paths: ['rank-0/{pattern}']}}]}}"
    )
    overrides = {"artifacts": (str(listing),), "retries": 0, "range_size": 1 << 20} | own
    return boot.fetch_files(Settings.load(config, overrides=overrides))


def test_it_is_what_sha256sum_reads(manifest: Path) -> None:
    tool = shutil.which("sha256sum")
    assert tool is not None
    found = subprocess.run(
        [tool, "-c", "--strict", manifest.name], cwd=manifest.parent, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(": OK\n") == len(CONTENTS)
    (manifest.parent / "config.json").write_bytes(b"[]")
    again = subprocess.run([tool, "-c", manifest.name], cwd=manifest.parent, capture_output=True)
    assert again.returncode == 1


@pytest.mark.parametrize("verify", ["size", "sample", "full"])
def test_a_bit_that_turns_over_refuses(
    origin: FaultyOrigin,
    manifest: Path,
    tmp_path: Path,
    verify: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loader.fetch.sums._MOST_UNIT_BYTES", 1 << 20)  # the model is a large file
    origin.fail("model.bin", *[flip(2 << 20)] * 9)
    with pytest.raises(FetchError, match="do not sum up") as caught:
        fetch(origin, tmp_path, verify=verify)
    assert f"what job1/rank-0/ck/{manifest.name} says" in str(caught.value)
    assert not (tmp_path / "files/job1/rank-0/ck/model.bin").exists()
    origin.faults.clear()
    fetch(origin, tmp_path, verify=verify)
    for name in CONTENTS:
        if "." in name:
            found = (tmp_path / "files/job1/rank-0" / name).read_bytes()
            assert found == CONTENTS[name]


def test_it_need_not_be_among_the_files_that_are_asked_for(
    origin: FaultyOrigin, manifest: Path, tmp_path: Path
) -> None:
    manifest.write_text(f"{hashlib.sha256(b'other').hexdigest()}  deep/x.txt\n")
    with pytest.raises(FetchError, match="another version of it"):
        fetch(origin, tmp_path, "ck/deep/x.txt")


def test_what_is_here_already_is_held_to_it(
    origin: FaultyOrigin, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = manifest.read_bytes()
    manifest.unlink()
    fetch(origin, tmp_path)
    time.sleep(0.1)  # what is younger may change without a trace
    manifest.write_bytes(text)
    assert all(file.reused for file in fetch(origin, tmp_path).files if ".sums" not in file.path)
    with monkeypatch.context() as patch:  # it is known by now, and not read once more
        patch.setattr("loader.fetch.digests._digest", None)
        fetch(origin, tmp_path)
    whole, _ = sum_folder(origin.folder() / "ck")
    (origin.folder() / "ck/config.json").write_bytes(b"[]")
    whole.unlink()
    manifest.unlink(missing_ok=True)
    manifest.write_text(f"{hashlib.sha256(b'[]').hexdigest()}  config.json\n")
    os.utime(origin.folder() / "ck/config.json", ns=(1, 1))
    found = {file.path: file.reused for file in fetch(origin, tmp_path).files}
    assert not found["job1/rank-0/ck/config.json"]
    assert found["job1/rank-0/ck/model.bin"]


def test_one_that_cannot_be_read(
    origin: FaultyOrigin, manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    origin.fail(manifest.name, *[status(403)] * 2)
    with pytest.raises(LoaderError, match="refuse"):
        fetch(origin, tmp_path, "ck/deep/x.txt")
    origin.faults.clear()
    fetch(origin, tmp_path, "ck/deep/x.txt")
    origin.fail(manifest.name, *[status(403)] * 2)
    fetch(origin, tmp_path, "ck/deep/x.txt")
    assert f"{manifest.name} cannot be read" in caplog.text
    origin.faults.clear()
    manifest.write_text("<html>")
    with pytest.raises(FormatError, match="manifest of sums"):
        fetch(origin, tmp_path, "ck/deep/x.txt")


def test_nothing_is_declared_against_another_manifest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    theirs = tmp_path / "SHA256SUMS"
    theirs.write_text(f"{hashlib.sha256(b'b').hexdigest()}  a\n")
    with pytest.raises(FormatError, match="not what SHA256SUMS says") as caught:
        sum_folder(tmp_path)
    assert caught.value.problems == ("a",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SHA256SUMS", "a"]
    theirs.unlink()
    (tmp_path / ".podloader").mkdir()
    (tmp_path / ".podloader/state").write_bytes(b"")
    _, sums = sum_folder(tmp_path)
    assert list(sums) == ["a"]
    for folder in (tmp_path / "none", tmp_path / "a"):
        with pytest.raises(CheckpointError):
            sum_folder(folder)


@pytest.mark.parametrize("name", ["SHA256SUMS", "model.safetensors"])
@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_not_passed_over(
    name: str, put: Callable[[Path], None], tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    put(tmp_path / name)
    with pytest.raises(FormatError, match="is none") as caught:
        sum_folder(tmp_path)
    assert name in caught.value.problems[0]
    assert not (tmp_path / "podloader.sums").exists()


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    command = [sys.executable, "-m", "loader", "sums", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert document["path"] == str(tmp_path / "podloader.sums")
    (file,) = document["files"]
    assert file["sha256"] == hashlib.sha256(b"a").hexdigest()
    assert "1 files" in done.stderr


def test_a_version_that_tells_nothing_of_new_bytes(origin: FaultyOrigin, tmp_path: Path) -> None:
    path = origin.put("ck/deep/x.txt", b"x")
    fetch(origin, tmp_path)
    stamp = path.stat().st_mtime_ns
    path.write_bytes(b"y")
    os.utime(path, ns=(stamp, stamp))  # the origin's ETag is made of this
    assert fetch(origin, tmp_path).files[0].reused
    sum_folder(origin.folder() / "ck")
    (file,) = fetch(origin, tmp_path, "ck/deep/x.txt").files
    assert not file.reused
    assert (tmp_path / "files" / file.path).read_bytes() == b"y"
