"""Time until a pod answers, with compilation on: kernels nowhere, on its disk, in a bucket.

    python -m benchmarks.kernels [--layers 16] [--runs 3]

The merged model is on the disk before. The first pod finds no kernels and publishes what it
compiled into moto's S3. Then, in turns, a pod that has them on its disk, and one that has to bring
them, which may take 1.1 times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.ready import ThrottledOrigin, free_port, publish, write_config
from tests.stores import moto

_LIMIT_S = 600
_BUCKET = "kernels"
_ARGUMENTS = ["--max-model-len", "256"]


def start(disk: Path, s3_url: str) -> tuple[float, dict[str, float]]:
    """Return the seconds of a pod on *disk* until it is ready, and of each of its stages.

    It ends when what it may publish is published.
    """
    trace, port = disk / "boot.json", free_port()
    config = str(disk / "config.yaml")
    command = [sys.executable, "-m", "loader", "serve", config, "--timeline", str(trace)]
    own = {
        "VLLM_CACHE_ROOT": str(disk / "vllm"),
        "AWS_ACCESS_KEY_ID": moto.ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": moto.SECRET_KEY,
    }
    began = time.monotonic()
    with (disk / "log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--", "--port", str(port), *_ARGUMENTS],
            stdout=log,
            stderr=log,
            env=os.environ | own,
            start_new_session=True,
        )
    try:
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() - began > _LIMIT_S:
                raise SystemExit(f"not ready:\n{(disk / 'log').read_text()[-3000:]}")
            time.sleep(0.05)
        seconds = time.monotonic() - began
        while not moto.client(s3_url).list_objects_v2(Bucket=_BUCKET).get("Contents"):
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    events = json.loads(trace.read_text())["traceEvents"]
    stages = [event for event in events if event["ph"] == "X" and event["cat"] == "stage"]
    return seconds, {event["name"]: event["dur"] / 1e6 for event in stages}


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main() -> None:
    """Start the pods and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    took: dict[str, list[float]] = {"cold": [], "warm": [], "travelled": []}
    with tempfile.TemporaryDirectory(prefix="kernels-") as made:
        folder = Path(made)
        publish(folder, given.layers)
        origin = ThrottledOrigin(folder / "origin", 1e12)
        origin.start()
        disk = folder / "disk"
        with moto.serving(folder) as s3_url:
            moto.client(s3_url).create_bucket(Bucket=_BUCKET)
            config = write_config(
                origin,
                disk,
                engine_start="files",
                kernel_cache=f"s3://{_BUCKET}",
                s3_endpoint_url=s3_url,
            )
            prepare = [sys.executable, "-m", "loader", "prepare", str(config), "-q"]
            subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
            for name in ("cold", *("warm", "travelled") * given.runs):
                if name == "travelled":
                    shutil.rmtree(disk / "vllm")
                seconds, stages = start(disk, s3_url)
                took[name].append(seconds)
                told = ", ".join(f"{stage} {s:.1f}" for stage, s in stages.items())
                print(f"{seconds:>8.1f} s  {name}: {told}", flush=True)
            (only,) = moto.client(s3_url).list_objects_v2(Bucket=_BUCKET)["Contents"]
            print(f"the archive: {only['Size'] / 1e6:.1f} MB")
        origin.stop()
    middle = {name: statistics.median(seconds) for name, seconds in took.items()}
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in middle.items()))
    print(f"travelled / warm: {middle['travelled'] / middle['warm']:.2f}")


if __name__ == "__main__":
    main()
