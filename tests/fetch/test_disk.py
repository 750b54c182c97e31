"""Disks that refuse, for real: a file system of its own that fills up, a limit of the system's.

A disk that fails to write (EIO) takes a device to make: ``test_faults`` puts that into ``pwrite``.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.origin import FaultyOrigin, act, slow, write_listing

CONTENT = random.Random(31).randbytes(2 << 20)
# A small file system in a mount namespace of its own, where another program takes all the room as
# soon as some ranges have come.
_FILLS_UP = """
set -e
down=$1/down python=$2
mkdir $down
mount -t tmpfs -o size=80m none $down || exit 77
part=$down/.podloader/files/job1/rank-0/big.bin
fetch() { $python -m loader fetch $1/config.yaml --json > $1/$2.json 2> $1/$2.txt; }
fetch $1 first & pid=$!
while [ $(wc -l < $part.journal 2>/dev/null || echo 0) -lt 4 ]; do sleep 0.02; done
dd if=/dev/zero of=$down/other bs=64k 2> /dev/null || true
code=0; wait $pid || code=$?
test -e $down/job1/rank-0/big.bin && exit 78
rm $down/other
fetch $1 second
cp $down/job1/rank-0/big.bin $1/copy
exit $code
"""

# A file system that is read-only from some time on.
_READ_ONLY = """
set -e
down=$1/down python=$2
mkdir $down
mount -t tmpfs none $down || exit 77
export PODLOADER_CACHE_FOLDER=$down/cache
run() { $python -m loader $1 $down/../config.yaml --json > $down/../$2.json 2> /dev/null; }
run fetch first
mount -o remount,ro $down
run plan plan
run fetch whole
mount -o remount,rw $down
rm $down/job1/rank-0/big.bin
mount -o remount,ro $down
run fetch refused
"""


@pytest.fixture
def config(origin: FaultyOrigin, tmp_path: Path) -> Path:
    origin.put("big.bin", CONTENT)
    listing = write_listing(origin, tmp_path / "listing.json")
    references = [{"training_job_id": "job1", "paths": ["rank-0/big.bin"]}]
    document = {
        "training_checkpoints": {
            "download_folder": str(tmp_path / "down"),
            "artifact_references": references,
        },
        "model_metadata": {
            "podloader": {"artifacts": [str(listing)], "range_size": "64KiB", "concurrency": 1}
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def read(path: Path) -> dict[str, Any]:
    """Return the document of a command."""
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def run_with_mounts(script: str, folder: Path) -> None:
    """Run a script of the shell that mounts what it likes, and ends as its last fetch does."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system allows no mount namespaces")
    words = ["sh", "-c", script, "sh", str(folder), sys.executable]
    done = subprocess.run([*unshare, *words], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip(f"this system allows no mounts: {done.stderr}")
    assert done.returncode == 4, done.stderr


def test_a_disk_that_fills_up_midway(origin: FaultyOrigin, config: Path, tmp_path: Path) -> None:
    origin.fail("big.bin", act(lambda: None), *[slow(0.05)] * 999)
    run_with_mounts(_FILLS_UP, tmp_path)
    error = read(tmp_path / "first.json")["error"]
    assert (error["error"], error["what"]) == ("DiskError", "the disk is full")
    assert "what has been fetched is kept" in error["next_step"]
    assert read(tmp_path / "second.json")["fetched_bytes"] <= len(CONTENT) - 3 * 64 * 1024
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_where_nothing_may_be_written_what_is_there_is_taken(config: Path, tmp_path: Path) -> None:
    run_with_mounts(_READ_ONLY, tmp_path)
    assert read(tmp_path / "plan.json")["total_bytes"] == len(CONTENT)
    assert read(tmp_path / "whole.json")["files"][0]["reused"]
    error = read(tmp_path / "refused.json")["error"]
    assert (error["error"], error["what"]) == (
        "DiskError",
        "the disk refuses: Read-only file system",
    )


@pytest.mark.parametrize("kind", ["file", "link to nowhere"])
def test_no_folder_where_the_download_goes(config: Path, tmp_path: Path, kind: str) -> None:
    down = tmp_path / "down"
    if kind == "file":
        down.write_text("a file")
    else:
        down.symlink_to(tmp_path / "nowhere")
    command = [sys.executable, "-m", "loader", "fetch", str(config), "--json"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 4
    error = json.loads(done.stdout)["error"]
    assert (error["error"], error["where"]) == ("DiskError", str(down))
    assert "remove what lies in a folder's place" in error["next_step"]


def test_a_file_that_may_not_become_so_large(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loader", "fetch", str(config), "--json"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(command, capture_output=True, preexec_fn=limit, check=False)
    assert done.returncode == 4
    error = json.loads(done.stdout)["error"]
    assert (error["error"], error["what"]) == ("DiskError", "the disk refuses: File too large")
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert (tmp_path / "down/job1/rank-0/big.bin").read_bytes() == CONTENT
