"""How far behind the last byte an engine is that loads weights while they arrive.

    python -m benchmarks.ready_table [--folder DIR] [--downloads 0 10 30] [--layers 16 80]

Of each size of model: ``vllm serve`` on its files tells how long the engine takes up to its
weights and behind them, with cold and with warm caches, and how much memory (PSS) its processes
have when it is ready. Then ``podloader serve`` fetches the same model from a local server, which
sends it in so many seconds (0: as fast as it goes), and streams it into the engine. Compilation is
on. The bounds:

    behind    last byte to all weights in the engine: at most 1 s
    ready     at most max(download, start up to weights) + what comes behind them + 1 s
    PSS       at most 128 MiB more than ``vllm serve`` has

A machine that does other things makes seconds longer, and it is told if it does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.ready import ThrottledOrigin, free_port, is_ready, publish, write_config

_LIMIT_S = 600
_QUIET_LOAD = 0.5  # processes that want to run, before anything is started
_MOST_BEHIND_S, _MOST_PSS = 1.0, 128 << 20
_ENGINE = ["--max-model-len", "256"]
_LOADED = re.compile(r"Loading weights took ([\d.]+) seconds")


@dataclass(frozen=True)
class Start:
    """A start: when it was ready, and what its processes had then."""

    ready_s: float
    pss_bytes: int
    lines: Sequence[tuple[float, str]]

    def before_and_behind(self) -> tuple[float, float]:
        """Return the seconds up to the weights and behind them, by vLLM's own lines."""
        at, took = next((at, m) for at, line in self.lines if (m := _LOADED.search(line)))
        return at - float(took[1]), self.ready_s - at


def run(command: Sequence[str], port: int, caches: Path) -> Start:
    """Return how *command* starts, and end it."""
    lines: list[tuple[float, str]] = []
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"VLLM_CACHE_ROOT": str(caches)},
    )

    def read() -> None:
        assert process.stdout is not None
        lines.extend((time.monotonic() - began, line) for line in process.stdout)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    try:
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() - began > _LIMIT_S:
                text = "".join(line for _, line in lines[-40:])
                raise SystemExit(f"{command[:4]} did not become ready:\n{text}")
            time.sleep(0.02)
        ready_s = time.monotonic() - began
        return Start(ready_s, pss_of(psutil.Process(process.pid)), lines)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reading.join()


def pss_of(process: psutil.Process) -> int:
    """Return the memory of *process* and all that it started; what they share counts once."""
    family = [process, *process.children(recursive=True)]
    return sum(int(one.memory_full_info().pss) for one in family)


def plain_start(model: Path, caches: Path) -> Start:
    """Return how ``vllm serve`` starts on *model*."""
    port = free_port()
    # What `vllm serve` does; the command itself does not know the CPU build's name.
    vllm = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    return run([*vllm, "--model", str(model), "--port", str(port), *_ENGINE], port, caches)


def streamed_start(
    origin: ThrottledOrigin, folder: Path, caches: Path
) -> tuple[Start, Mapping[str, tuple[float, float]]]:
    """Return how ``podloader serve`` starts in *folder*, and when its stages began and ended."""
    shutil.rmtree(folder, ignore_errors=True)  # the same path each time: it is in the caches' keys
    config = write_config(origin, folder, adapter=False, engine_start="stream")
    port, trace = free_port(), folder / "boot.json"
    command = [sys.executable, "-m", "loader", "serve", str(config), "--timeline", str(trace)]
    found = run([*command, "--", "--port", str(port), *_ENGINE], port, caches)
    spans = {
        event["name"]: (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in json.loads(trace.read_text())["traceEvents"]
        if event["ph"] == "X" and event["cat"] == "stage"
    }
    return found, spans


def measure(folder: Path, layers: int, downloads_s: Sequence[float]) -> None:
    """Print the rows of one size of model."""
    size = publish(folder / f"layers {layers}", layers, adapter=False)
    root = folder / f"layers {layers}"
    model = root / "model"
    plain = {heat: plain_start(model, root / "plain caches") for heat in ("cold", "warm")}
    for heat, start in plain.items():
        before, behind = start.before_and_behind()
        print(
            f"{size / 1e9:.2f} GB  vllm serve on files, {heat}: ready after {start.ready_s:.1f} s: "
            f"{before:.1f} up to weights, {behind:.1f} behind them; {start.pss_bytes / 1e9:.2f} GB"
        )
    for number, download_s in enumerate(downloads_s):
        for heat in ("cold", "warm"):
            caches = root / f"caches {number}"
            rate = size / download_s if download_s else float("inf")
            origin = ThrottledOrigin(root / "origin", rate)
            origin.start()
            try:
                found, spans = streamed_start(origin, root / "pod", caches)
            finally:
                origin.stop()
            show(size, heat, found, spans, plain[heat])
        shutil.rmtree(caches)


def show(
    size: int,
    heat: str,
    found: Start,
    spans: Mapping[str, tuple[float, float]],
    plain: Start,
) -> None:
    """Print one row, each figure beside its bound."""
    last_byte = spans["download"][1]
    behind = spans["weights"][1] - last_byte
    before_s, after_s = plain.before_and_behind()
    bound = max(last_byte, before_s) + after_s + 1
    pss = plain.pss_bytes + _MOST_PSS
    # Where the engine comes to its weights later than the last byte does, it is not behind it.
    allowed = max(_MOST_BEHIND_S, before_s + _MOST_BEHIND_S - last_byte)
    print(
        f"{size / 1e9:.2f} GB  streamed, {heat}: last byte {last_byte:.1f} s, all weights in the "
        f"engine {behind:+.1f} s ({_mark(behind, allowed)} {allowed:.1f}), ready "
        f"{found.ready_s:.1f} s ({_mark(found.ready_s, bound)} {bound:.1f}), "
        f"{found.pss_bytes / 1e9:.2f} GB ({_mark(found.pss_bytes, pss)} {pss / 1e9:.2f})",
        flush=True,
    )


def _mark(value: float, bound: float) -> str:
    return "within" if value <= bound else "OVER"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, help="keep the models there for another run")
    parser.add_argument("--downloads", type=float, nargs="+", default=[0, 10, 30, 60, 120])
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 86], help="0.4 and 2 GB")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    load = os.getloadavg()[0]
    told = "quiet" if load <= _QUIET_LOAD else "not quiet: the seconds are longer than they are"
    print(f"load {load:.1f} before the start: {told}")
    with tempfile.TemporaryDirectory(prefix="ready-") as made:
        for layers in given.layers:
            measure(given.folder or Path(made), layers, given.downloads)


if __name__ == "__main__":
    main()
