"""Many pods with one model, each a process with a folder of its own; one origin, held to a rate.

    python -m benchmarks.pods [--pods 1,8,24] [--size-mb 96] [--rate-mb-s 40] [--alone] [--harm]

Prints how long it took until all had every byte, how many copies the origin sent, and processor
time. ``--alone``: the same without peers. ``--harm``: every tenth pod is killed midway, and every
tenth uploads slowly. Every file is compared with the origin's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.overlap import ThrottledHandler, ThrottledOrigin
from loader.demo.origin import PROJECT
from tests.peers.conftest import free_ports

_JOB = "job1"
_SLOW_BYTES_S = 2 << 20


class CountingHandler(ThrottledHandler):
    """Counts what it has sent, a piece at a time."""

    server: CountingOrigin

    def send_bytes(self, fd: int, start: int, end: int) -> None:
        """Send the bytes, and count them."""
        for place in range(start, end, 64 << 10):
            piece_end = min(end, place + (64 << 10))
            super().send_bytes(fd, place, piece_end)
            with self.server.counting:
                self.server.sent_bytes += piece_end - place


class CountingOrigin(ThrottledOrigin):
    """A throttled origin that knows how much it has sent."""

    def __init__(self, root: Path, rate_bytes_s: float) -> None:
        import threading

        self.counting = threading.Lock()
        self.sent_bytes = 0
        super().__init__(root, rate_bytes_s)
        self.RequestHandlerClass = CountingHandler


def make_origin(folder: Path, size_bytes: int, rate_bytes_s: float) -> tuple[CountingOrigin, Path]:
    """Return an origin of one job, and its listing; the weights are random."""
    root = folder / "origin"
    model = root / "training_projects" / PROJECT / "jobs" / _JOB / "rank-0" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    with (model / "weights.bin").open("wb") as file:
        for _ in range(size_bytes >> 20):
            file.write(random.randbytes(1 << 20))
    origin = CountingOrigin(root, rate_bytes_s)
    origin.start()
    listing = folder / "listing.json"
    listing.write_text(json.dumps(origin.listing(_JOB, with_sizes=True)))
    return origin, listing


def start_pod(
    listing: Path, folder: Path, port: int, ports: Sequence[int], *, slow: bool
) -> subprocess.Popen[bytes]:
    """Return a pod that has begun to fetch."""
    peers = json.dumps([f"127.0.0.1:{other}" for other in ports])
    command = [sys.executable, "-m", "loader", "fetch", str(listing), "--output", str(folder)]
    if len(ports) > 1:
        command += ["--set", f"peers={peers}", "--set", f"peers_port={port}"]
        command += ["--set", "peers_linger_s=600"]
    if slow:
        command += ["--set", f"peers_upload_rate={_SLOW_BYTES_S}"]
    environment = {**os.environ, "PODLOADER_PEERS_TOKEN": "only here"}
    log = folder.with_suffix(".log").open("wb")
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def wait_for_all(
    running: dict[int, subprocess.Popen[bytes]],
    killed: set[int],
    folder: Path,
    origin: CountingOrigin,
    kill_after_bytes: int,
    began: float,
) -> dict[int, float]:
    """Return when each pod had its file; *killed* are killed when the origin has sent so much."""
    waiting, done_at = set(running) - killed, {}
    while waiting:
        for number in list(waiting):
            if next((folder / f"pod-{number}" / _JOB).rglob("weights.bin"), None):
                done_at[number] = time.monotonic() - began
                waiting.discard(number)
            elif running[number].poll() not in (None, 0):
                text = (folder / f"pod-{number}.log").read_text()
                raise SystemExit(f"pod {number} failed:\n{text[-2000:]}")
        if origin.sent_bytes > kill_after_bytes:
            for number in killed:
                running[number].kill()
        time.sleep(0.05)
    return done_at


def run(pods: int, size_mb: int, rate_mb_s: float, *, alone: bool, harm: bool) -> dict[str, float]:
    """Return the figures of one round."""
    folder = Path(tempfile.mkdtemp(prefix="pods-"))
    origin, listing = make_origin(folder, size_mb << 20, rate_mb_s * 1e6)
    source = next((folder / "origin").rglob("weights.bin"))
    ports = free_ports(pods)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    running: dict[int, subprocess.Popen[bytes]] = {}
    for number, port in enumerate(ports):
        named = [port] if alone else ports
        slow = harm and number % 10 == 5
        running[number] = start_pod(listing, folder / f"pod-{number}", port, named, slow=slow)
    killed = {number for number in running if harm and number % 10 == 1}
    try:
        done_at = wait_for_all(running, killed, folder, origin, size_mb << 19, began)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wrong = 0
        for number in done_at:
            found = next((folder / f"pod-{number}" / _JOB).rglob("weights.bin"))
            wrong += subprocess.run(["cmp", "-s", found, source], check=False).returncode != 0
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {
            "seconds": max(done_at.values()),
            "copies": origin.sent_bytes / (size_mb << 20),
            "cpu_s": cpu_s,
            "cpu_s_per_gb": cpu_s / (pods * size_mb / 1000),
            "wrong": wrong,
        }
    finally:
        for process in running.values():
            process.kill()
        origin.stop()
        if "KEEP" not in os.environ:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(folder)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pods", default="1,8,24")
    parser.add_argument("--size-mb", type=int, default=96)
    parser.add_argument("--rate-mb-s", type=float, default=40)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--harm", action="store_true")
    options = parser.parse_args()
    print(f"{'pods':>5} {'seconds':>8} {'copies':>7} {'CPU s':>7} {'CPU s/GB':>9} {'wrong':>6}")
    for pods in map(int, options.pods.split(",")):
        found = run(
            pods, options.size_mb, options.rate_mb_s, alone=options.alone, harm=options.harm
        )
        print(
            f"{pods:5} {found['seconds']:8.1f} {found['copies']:7.2f} {found['cpu_s']:7.1f} "
            f"{found['cpu_s_per_gb']:9.1f} {found['wrong']:6.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
