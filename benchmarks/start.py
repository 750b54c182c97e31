"""How long a command takes from its start to its first request: podloader beside its peers.

    python -m benchmarks.start [--runs 15]

A server on the loopback interface notes when the first connection comes, measured from just before
the process is made, and ends the process then. ``python -c pass`` runs to its end: the least that a
command in Python can take. What is not installed is left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from loader.demo.origin import Origin

_LIMIT_S = 60.0
_FETCH = "from huggingface_hub import hf_hub_download; hf_hub_download('a/b', 'config.json')"
_BOTO3 = "import boto3; boto3.client('s3').download_file('bucket', 'key', '/dev/null')"


@dataclass(frozen=True)
class Command:
    """A command that asks the server for a file, or ends by itself where ``asks`` is False."""

    name: str
    words: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    asks: bool = True


def commands(port: int, folder: Path) -> list[Command]:
    """Return what is measured and installed; *folder* is for the config and the listing."""
    url = f"http://127.0.0.1:{port}"
    aws = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    hub = {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hub")}
    podloader = [sys.executable, "-m", "loader", "fetch", str(write_config(port, folder))]
    found = [
        Command("python -c pass", [sys.executable, "-c", "pass"], asks=False),
        Command("podloader --help", [*podloader[:3], "--help"], asks=False),
        Command("podloader fetch", podloader),
        Command("curl", ["curl", "-s", f"{url}/a"]),
        Command("s5cmd cp", ["s5cmd", "cp", "s3://bucket/key", "/dev/null"], aws),
        Command("huggingface-hub", [sys.executable, "-c", _FETCH], hub),
        Command("boto3", [sys.executable, "-c", _BOTO3], aws),
    ]
    return [one for one in found if shutil.which(one.words[0])]


def write_config(port: int, folder: Path) -> Path:
    """Return a Truss config that asks for one file of the server at *port*."""
    made = folder / "origin/training_projects/demo/jobs/job/rank-0/checkpoint-1/config.json"
    made.parent.mkdir(parents=True)
    made.write_text("{}")
    origin = Origin(folder / "origin")
    listing = origin.write_listing("job", folder / "listing.json")
    listing.write_text(listing.read_text().replace(f":{origin.server_port}/", f":{port}/"))
    origin.server_close()
    references = [{"training_job_id": "job", "paths": ["rank-0/checkpoint-1/"]}]
    config = {
        "training_checkpoints": {
            "download_folder": str(folder / "files"),
            "artifact_references": references,
        },
        "model_metadata": {"podloader": {"artifacts": [str(listing)]}},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def measure(command: Command, server: socket.socket) -> float:
    """Return the seconds from the process's start to its first connection, or to its end."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command.words,
        env={**os.environ, **command.variables, "PYTHONDONTWRITEBYTECODE": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        if command.asks:
            server.accept()[0].close()
        else:
            process.wait(_LIMIT_S)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()


def main() -> None:
    """Measure in turns, so that a busy moment of the machine meets all alike."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=15)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made, socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(_LIMIT_S)
        compared = commands(server.getsockname()[1], Path(made))
        seconds: dict[str, list[float]] = {command.name: [] for command in compared}
        for run in range(given.runs + 1):
            for command in compared:
                found = measure(command, server)
                if run:  # the first compiles what is not yet, and fills the page cache
                    seconds[command.name].append(found)
                drop_waiting(server)
    print(f"{'ms to the first request':<24} {'least':>7} {'median':>7}")
    for name, found_s in seconds.items():
        least, median = min(found_s) * 1e3, statistics.median(found_s) * 1e3
        print(f"{name:<24} {least:>7.0f} {median:>7.0f}")


def drop_waiting(server: socket.socket) -> None:
    """Close further connections of a process that is gone."""
    server.settimeout(0)
    try:
        while True:
            server.accept()[0].close()
    except BlockingIOError:
        server.settimeout(_LIMIT_S)


if __name__ == "__main__":
    main()
