"""SIGKILL at any moment: the next run completes what the killed one began."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.origin import FaultyOrigin, act, slow, write_listing

SIZES = {"checkpoint-1/model.bin": 24 << 20, "checkpoint-1/optimizer.bin": 5 << 20, "a/b c+.txt": 9}
KILLS = 10


def test_killed_ten_times(origin: FaultyOrigin, tmp_path: Path) -> None:
    chance = random.Random(time.time_ns())
    for name, size in SIZES.items():
        origin.put(name, chance.randbytes(size))
    listing = write_listing(origin, tmp_path / "listing.json")
    root = tmp_path / "down"
    config = {
        "training_checkpoints": {
            "download_folder": str(root),
            "artifact_references": [{"training_job_id": "job1", "paths": ["rank-0/*"]}],
        },
        "model_metadata": {
            "podloader": {"artifacts": str(listing), "range_size": "256KiB", "concurrency": 4}
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    # Slow enough that a kill within the second finds it at work.
    origin.fail("model.bin", act(lambda: None), *[slow(0.15)] * 10_000)
    command = [sys.executable, "-m", "loader", "fetch", str(path)]
    killed = 0
    for _ in range(KILLS):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.4, 1.4))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        for name in SIZES:
            final = root / "job1" / "rank-0" / name
            assert not final.exists() or _sha256(final) == _sha256(origin.folder() / name)
    assert killed == KILLS, "the fetch was over before the last kill: make the origin slower"
    origin.faults.clear()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    for name in SIZES:
        assert _sha256(root / "job1" / "rank-0" / name) == _sha256(origin.folder() / name)
    # A finished range is not asked for again; ranges in flight are, four at a time.
    whole = [r for r in origin.ranges_of("model.bin") if r != "bytes=0-0"]
    assert len(set(whole)) <= len(whole) <= len(set(whole)) + KILLS * 4


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
