"""Several processes on one folder, and signals: nothing is fetched twice, nothing is lost."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.origin import FaultyOrigin, act, pause, slow, stall, write_listing

CONTENT = random.Random(7).randbytes(6 << 20)
CAME = 700_001  # less than one range of the journal
FIRST_BYTES = 2 * (16 << 10)  # by which the versions are asked for


class Command:
    """``podloader fetch`` over an origin, as processes."""

    def __init__(self, origin: FaultyOrigin, folder: Path) -> None:
        self.root = folder / "down"
        listing = write_listing(origin, folder / "listing.json")
        config = {
            "training_checkpoints": {
                "download_folder": str(self.root),
                "artifact_references": [{"training_job_id": "job1", "paths": ["rank-0/*"]}],
            },
            "model_metadata": {
                "podloader": {"artifacts": str(listing), "range_size": "1MiB", "concurrency": 2}
            },
        }
        self._config = folder / "config.yaml"
        self._config.write_text(yaml.safe_dump(config))

    def start(self) -> subprocess.Popen[str]:
        """Start one."""
        command = [sys.executable, "-m", "loader", "fetch", str(self._config)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def command(origin: FaultyOrigin, tmp_path: Path) -> Command:
    for name in ("a.bin", "b.bin"):
        origin.put(name, CONTENT)
    return Command(origin, tmp_path)


def until(condition: Callable[[], object]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to that")


def check(origin: FaultyOrigin, command: Command) -> None:
    for name in ("a.bin", "b.bin"):
        assert (command.root / "job1/rank-0" / name).read_bytes() == CONTENT


def test_two_processes_share_the_work(origin: FaultyOrigin, command: Command) -> None:
    origin.fail(".bin", *[slow(0.01)] * 100)
    both = [command.start(), command.start()]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    check(origin, command)
    assert origin.bytes_sent < 2 * len(CONTENT) + (96 << 10), "a byte came twice"


def test_a_dead_owner_is_succeeded(origin: FaultyOrigin, command: Command) -> None:
    origin.fail("a.bin", act(lambda: None), *[slow(0.2)] * 100)
    owner = command.start()
    until(lambda: origin.bytes_sent or list(command.root.rglob("*.part")))
    heir = command.start()
    assert heir.stderr is not None
    wait = "waiting for another process, which fetches job1/rank-0/a.bin"
    assert any(wait in line for line in heir.stderr)
    time.sleep(0.5)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    origin.faults.clear()
    assert "waiting" not in heir.communicate()[1], "said more than once"
    assert heir.returncode == 0
    check(origin, command)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_at_once_and_keeps_what_came(
    origin: FaultyOrigin, command: Command, number: signal.Signals, code: int
) -> None:
    # All that is asked for stalls, but for the versions and a part of the first range.
    origin.fail(".bin", *[act(lambda: None)] * 2, pause(CAME, 60), *[stall(60)] * 50)
    process = command.start()
    until(lambda: len(origin.requests) > 3)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == code
    assert time.monotonic() - began < 2
    assert f"ended by {number.name}; what has been fetched is kept" in said
    entries = [
        json.loads(line)
        for journal in command.root.rglob("*.journal")
        for line in journal.read_text().splitlines()[1:]
    ]
    assert sum(end - start for start, end, _ in entries) >= CAME
    origin.faults.clear()
    sent = origin.bytes_sent
    again = command.start()
    again.communicate()
    assert again.returncode == 0
    check(origin, command)
    assert origin.bytes_sent - sent <= 2 * len(CONTENT) - CAME + FIRST_BYTES
