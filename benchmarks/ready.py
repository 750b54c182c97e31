"""Time until a pod answers: ``podloader serve`` against one step after the other.

    python -m benchmarks.ready [--folder DIR] [--download-s 60] [--layers 16] [--truss]

One step after the other is what a start script does: ``curl --parallel`` fetches a base and an
adapter, PEFT merges them in a process of its own, ``vllm serve`` starts on the result, each as fast
as it goes. Both ways fetch from the same local server, which sends all connections together no
faster than a download of ``--download-s`` allows, and both end with the first 200 of ``/health``.

The bound to hold is 1.1 x max(download, engine start) + merge tail: curl's time, the time of
``vllm serve`` alone, and what of podloader's merge came after its last byte.

``--truss`` measures ``TrussModel.load()`` instead, over the same download.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import yaml

from loader.demo.origin import Handler, Origin

_CHUNK_BYTES = 1 << 16
_LIMIT_S = 280
_PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
AutoTokenizer.from_pretrained(base).save_pretrained(output)
"""
_TRUSS = """
import logging, os, sys
import yaml
from loader import TrussModel
logging.basicConfig(level=logging.INFO, format="%(message)s")
TrussModel(yaml.safe_load(open(sys.argv[1]))).load()
os._exit(0)
"""
_TRUSS_ENGINE = {"max_model_len": 256, "enforce_eager": True}
_ENGINE = ["--max-model-len", "256", "--enforce-eager"]


class ThrottledOrigin(Origin):
    """Sends no more than *bytes_per_s* to all connections together."""

    def __init__(self, root: Path, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0
        super().__init__(root, handler=_ThrottledHandler)

    def wait_turn(self, count: int) -> None:
        """Return when *count* bytes may be sent."""
        with self._lock:
            at = max(self._free_at, time.monotonic())
            self._free_at = at + count / self._bytes_per_s
        time.sleep(max(at - time.monotonic(), 0.0))

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that asks another connection for its rest breaks the first off."""


class _ThrottledHandler(Handler):
    server: ThrottledOrigin

    def send_bytes(self, fd: int, start: int, end: int) -> None:
        for place in range(start, end, _CHUNK_BYTES):
            upto = min(place + _CHUNK_BYTES, end)
            self.server.wait_turn(upto - place)
            super().send_bytes(fd, place, upto)


def publish(folder: Path, layers: int, *, adapter: bool = True) -> int:
    """Lay a base, and an adapter, out below *folder* as an origin has them; return their bytes."""
    from tests.models import tiny_llama, train_or_draw_lora

    jobs = folder / "origin" / "training_projects" / "demo" / "jobs"
    if not jobs.exists():
        import torch

        base = tiny_llama(
            folder / "model",
            dtype=torch.bfloat16,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=4,
            max_shard_size="100MB",
        )
        if adapter:
            lora = folder / "lora"
            train_or_draw_lora(base, lora, spread=0.02, r=16, target_modules="all-linear")
            shutil.copytree(lora, jobs / "tune" / "rank-0" / "checkpoint-1")
        shutil.copytree(base, jobs / "base" / "rank-0" / "checkpoint-1")
    return sum(path.stat().st_size for path in jobs.rglob("*") if path.is_file())


def fetch_with_curl(origin: Origin, folder: Path) -> None:
    """Fetch every file of both jobs below *folder*."""
    lines = ["parallel", "silent", "no-progress-meter", "fail", "create-dirs"]
    for job in ("base", "tune"):
        artifacts = origin.listing(job)["checkpoint_artifacts"]
        assert isinstance(artifacts, list)
        for artifact in artifacts:
            path = folder / job / artifact["relative_file_name"]
            lines += [f'url = "{artifact["url"]}"', f'output = "{path}"']
    config = folder / "curl.txt"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("\n".join(lines))
    subprocess.run(["curl", "--config", str(config)], check=True)


def start_to_ready(command: Sequence[str], port: int, log: Path) -> float:
    """Return the seconds from the start of *command* until it is ready, then end it."""
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() - began > _LIMIT_S:
                raise SystemExit(f"{command[:4]} did not become ready:\n{log.read_text()[-3000:]}")
            time.sleep(0.05)
        return time.monotonic() - began
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def is_ready(port: int) -> bool:
    """Return whether requests are answered at *port*."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sequential(origin: Origin, folder: Path) -> dict[str, float]:
    """Return the seconds of each step, one after the other."""
    steps = {}
    began = time.monotonic()
    fetch_with_curl(origin, folder)
    steps["download (curl)"] = time.monotonic() - began
    began = time.monotonic()
    places = [str(folder / "base/checkpoint-1"), str(folder / "tune/checkpoint-1")]
    command = [sys.executable, "-c", _PEFT, *places, str(folder / "merged")]
    subprocess.run(command, check=True, capture_output=True)
    steps["merge (PEFT)"] = time.monotonic() - began
    port = free_port()
    # What `vllm serve` does; the command itself does not know the CPU build's name.
    vllm = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command = [*vllm, "--model", str(folder / "merged"), "--port", str(port), *_ENGINE]
    steps["start (vllm serve)"] = start_to_ready(command, port, folder / "vllm.log")
    return steps


def write_config(origin: Origin, folder: Path, *, adapter: bool = True, **settings: object) -> Path:
    """Return the config of a pod that fetches into *folder*: base and adapter, or the base."""
    folder.mkdir(parents=True)
    jobs = ("tune", "base") if adapter else ("base",)
    merged = {"base_model": "checkpoint:base/rank-0/checkpoint-1/", "adapter_policy": "merge"}
    own = {"artifacts": [str(origin.write_listing(j, folder / f"{j}.json")) for j in jobs]}
    references = [{"training_job_id": jobs[0], "paths": ["rank-0/"]}]
    config = {
        "training_checkpoints": {
            "download_folder": str(folder / "files"),
            "artifact_references": references,
        },
        "model_metadata": {"podloader": own | (merged if adapter else {}) | settings},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def in_a_truss(origin: Origin, folder: Path) -> None:
    """Load a Truss's model in a process of its own; print its seconds and its own table."""
    path = write_config(origin, folder, engine_args=_TRUSS_ENGINE)
    log = folder / "truss.log"
    began = time.monotonic()
    with log.open("wb") as out:
        command = [sys.executable, "-c", _TRUSS, str(path)]
        subprocess.run(command, stdout=out, stderr=out, check=True)
    seconds = time.monotonic() - began
    _, heading, table = log.read_text().partition("    start    seconds  stage\n")
    print(heading + table)
    print(f"{seconds:.1f} s from the start of the process until the model is loaded")


def at_once(origin: Origin, folder: Path) -> tuple[float, dict[str, tuple[float, float]]]:
    """Return the seconds of ``podloader serve``, and when each of its stages began and ended."""
    path, trace = write_config(origin, folder), folder / "boot.json"
    port = free_port()
    podloader = [sys.executable, "-m", "loader", "serve", str(path), "--timeline", str(trace)]
    command = [*podloader, "--", "--port", str(port), *_ENGINE]
    seconds = start_to_ready(command, port, folder / "podloader.log")
    events = json.loads(trace.read_text())["traceEvents"]
    spans = {
        event["name"]: (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in events
        if event["ph"] == "X" and event["cat"] == "stage"
    }
    return seconds, spans


def main() -> None:
    """Run both ways and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, help="keep the models there for another run")
    parser.add_argument("--download-s", type=float, default=60)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--truss", action="store_true")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory(prefix="ready-") as made:
        folder = given.folder or Path(made)
        size = publish(folder, given.layers)
        origin = ThrottledOrigin(folder / "origin", size / given.download_s)
        origin.start()
        runs = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
        try:
            if given.truss:
                in_a_truss(origin, runs / "truss")
                shutil.rmtree(runs)
                return
            ours, spans = at_once(origin, runs / "podloader")
            theirs = sequential(origin, runs / "sequential")
        finally:
            origin.stop()
        if given.folder:
            for name in ("boot.json", "boot.svg", "podloader.log"):
                shutil.copy(runs / "podloader" / name, given.folder / name)
        shutil.rmtree(runs)
    report(size, ours, spans, theirs)


def report(
    size: int,
    ours: float,
    spans: dict[str, tuple[float, float]],
    theirs: dict[str, float],
) -> None:
    """Print the seconds of both ways, and the bound."""
    print(f"model and adapter: {size / 1e6:.0f} MB")
    for name, seconds in theirs.items():
        print(f"{seconds:>8.1f} s  {name}")
    print(f"{sum(theirs.values()):>8.1f} s  one after the other")
    print(f"{ours:>8.1f} s  podloader serve, of which")
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        print(f"           {start:>6.1f} to {end:>6.1f} s  {name}")
    tail = max(spans["merge"][1] - spans["download"][1], 0.0)
    download, start = theirs["download (curl)"], theirs["start (vllm serve)"]
    bound = 1.1 * max(download, start) + tail
    print(f"bound: 1.1 x max({download:.1f}, {start:.1f}) + merge tail {tail:.1f} = {bound:.1f} s")
    print(f"{ours / bound:.2f} of the bound, {sum(theirs.values()) / ours:.2f} times as fast")


if __name__ == "__main__":
    main()
