"""A LoRA merged into its base while the base is downloaded, against the download alone.

    python -m benchmarks.overlap [--folder DIR] [--layers 22] [--rate 100] [--runs 2]
                                 [--shard 500MB 50GB]

The model and adapter are those of ``merge.py``; the base is saved in files of ``--shard`` at the
most, one base after the other. A server process sends both, all connections
together held to ``--rate`` MB/s. Two processes do what a pod would, each on an empty folder and
imports included: ``podloader fetch``, and ``podloader prepare``, which merges while it fetches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import yaml

from benchmarks.models import make_base_and_adapter
from loader.demo.origin import PROJECT, Handler, Origin

_PIECE_BYTES = 256 << 10


class ThrottledHandler(Handler):
    """Sends no faster than the server allows."""

    server: ThrottledOrigin

    def send_bytes(self, fd: int, start: int, end: int) -> None:
        """Send a piece at a time, each when its moment has come."""
        for place in range(start, end, _PIECE_BYTES):
            piece_end = min(end, place + _PIECE_BYTES)
            self.server.wait(piece_end - place)
            super().send_bytes(fd, place, piece_end)


class ThrottledOrigin(Origin):
    """An origin whose connections share one rate."""

    def __init__(self, root: Path, rate_bytes_s: float) -> None:
        self._rate = rate_bytes_s
        self._next = time.monotonic()
        self._lock = threading.Lock()
        super().__init__(root, handler=ThrottledHandler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: the last ranges are taken over from slower connections."""

    def wait(self, count: int) -> None:
        """Return when *count* more bytes may be sent."""
        with self._lock:
            self._next = max(self._next, time.monotonic() - 0.05) + count / self._rate
            pause = self._next - time.monotonic()
        if pause > 0:
            time.sleep(pause)


def serve(root: Path, folder: Path, rate_mb_s: float, pipe: Connection) -> None:
    """Serve until the pipe is closed; the listings are written first."""
    origin = ThrottledOrigin(root, rate_mb_s * 1e6)
    origin.start()
    for job in ("base", "tuned"):
        origin.write_listing(job, folder / f"{job}.json")
    pipe.send("ready")
    pipe.recv()


def publish(folder: Path, base: Path, adapter: Path) -> Path:
    """Return an origin's root with both models in it."""
    root = folder / "origin"
    for job, source in (("base", base), ("tuned", adapter)):
        place = root / "training_projects" / PROJECT / "jobs" / job / "rank-0" / "checkpoint-1"
        place.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if not (place / path.name).exists():
                os.link(path, place / path.name)
    return root


def write_config(folder: Path) -> Path:
    """Return a Truss config that asks for the adapter over the base."""
    path = folder / "config.yaml"
    references = [{"training_job_id": "tuned", "paths": ["rank-0/checkpoint-1/"]}]
    settings = {
        "artifacts": [str(folder / "base.json"), str(folder / "tuned.json")],
        "base_model": "checkpoint:base/rank-0/checkpoint-1/",
        "adapter_policy": "merge",
    }
    config = {
        "training_checkpoints": {
            "download_folder": str(folder / "down"),
            "artifact_references": references,
        },
        "model_metadata": {"podloader": settings},
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def measure(command: str, config: Path, down: Path) -> float:
    """Return the seconds of one process, started on an empty folder."""
    shutil.rmtree(down, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "loader", command, str(config)], check=True, capture_output=True
    )
    return time.perf_counter() - began


def main() -> None:
    """Print the best of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "merge-bench")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rate", type=float, default=100.0, help="MB/s")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--shard", nargs="+", default=["500MB", "50GB"])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for shard in options.shard:
        compare(options.folder, options.layers, shard, options.rate, options.runs)


def compare(folder: Path, layers: int, shard: str, rate_mb_s: float, runs: int) -> None:
    """Print the figures over a base in files of *shard* bytes at the most."""
    base, adapter = make_base_and_adapter(folder, layers, shard)
    if not (base / "tokenizer.json").exists():
        (base / "tokenizer.json").write_text(json.dumps({}))
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        place = Path(temporary)
        root = publish(place, base, adapter)
        config = write_config(place)
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(root, place, rate_mb_s, theirs), daemon=True
        )
        server.start()
        ours.recv()
        best: dict[str, float] = {}
        for _ in range(runs):
            for command in ("fetch", "prepare"):
                seconds = measure(command, config, place / "down")
                best[command] = min(seconds, best.get(command, seconds))
        ours.send("stop")
        server.join()
    files = list(base.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    print(f"base: {size / 1e9:.2f} GB in {len(files)} files")
    for command, seconds in best.items():
        print(f"{command:8} {seconds:6.2f} s  {seconds / best['fetch']:5.2f} x fetch")


if __name__ == "__main__":
    main()
