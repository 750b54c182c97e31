"""``podloader serve`` as a container runs it: PID 1 of its own PID namespace, probed all along."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.origin import FaultyOrigin, write_listing

_PROBE_EVERY_S = 0.02
_PATIENCE_S = 550  # a bit less than a test has: then the log is told
AS_PID_1 = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"]
ENGINE_ARGS = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}


def write_config(
    origin: FaultyOrigin, folder: Path, *jobs: str, later: Sequence[str] = (), **settings: object
) -> Path:
    """Write a config that serves the adapters of *jobs* over the checkpoint ``base/base/``.

    There are listings of the jobs *later* as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = (*jobs, *later, "base")
    listings = [str(write_listing(origin, folder / f"{job}.json", job)) for job in listed]
    own: dict[str, object] = {
        "artifacts": listings,
        "base_model": "checkpoint:base/rank-0/base/",
        "served_model_name": "base",
        "engine_args": ENGINE_ARGS,
    }
    document = {
        "training_checkpoints": {
            "download_folder": str(folder / "models"),
            "artifact_references": [{"training_job_id": job, "paths": ["rank-0/"]} for job in jobs],
        },
        "model_metadata": {"podloader": own | settings},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


class RunningPod:
    """A pod's process and what its ``/health`` answered, from the first connection on."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        port: int,
        *,
        as_pid_1: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.folder = folder
        self.log = folder / "pod.log"
        self.answers: list[tuple[float, int, dict[str, Any]]] = []
        self.refused: list[str] = []
        self.began = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*AS_PID_1, *command] if as_pid_1 else command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
            )
        self._nested = as_pid_1
        self._over = threading.Event()
        self._probing = threading.Thread(target=self._probe, daemon=True)
        self._probing.start()

    @property
    def pod(self) -> psutil.Process:
        """podloader's own process."""
        own = psutil.Process(self._process.pid)
        return own.children()[0] if self._nested else own

    def engine_core(self) -> psutil.Process:
        """Return the process of vLLM's engine core."""
        for child in self.pod.children(recursive=True):
            if "EngineCore" in " ".join(child.cmdline()):
                return child
        raise AssertionError("no engine core")

    def get(self, path: str) -> httpx.Response:
        """Ask the pod."""
        return httpx.get(self.url + path, timeout=30)

    def wait_answer(self, timeout_s: float = _PATIENCE_S) -> dict[str, Any]:
        """Return the first answer of ``/health``."""
        return self.wait_for(lambda _: True, timeout_s)

    def wait_for(self, wanted: Any, timeout_s: float = _PATIENCE_S) -> dict[str, Any]:
        """Return the first body of ``/health`` that *wanted* takes."""
        seen = 0
        ends = time.monotonic() + timeout_s
        while time.monotonic() < ends:
            for _, _, body in self.answers[seen:]:
                seen += 1
                if wanted(body):
                    return body
            if self._process.poll() is not None:
                break
            time.sleep(_PROBE_EVERY_S)
        raise AssertionError(f"it never came; the pod's log:\n{self.text()}")

    def wait_ready(self, timeout_s: float = _PATIENCE_S) -> None:
        """Return when requests are answered."""
        self.wait_for(lambda body: body.get("status") == "ready", timeout_s)

    def stop_probing(self) -> None:
        """Ask no more: what follows may be refused."""
        self._over.set()
        self._probing.join()

    def signal(self, number: int) -> None:
        """Send a signal to podloader."""
        self.pod.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        """Return the exit code."""
        self.stop_probing()
        return self._process.wait(timeout_s)

    def text(self) -> str:
        """Return all that the pod has logged."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        """End what is left of it."""
        self.stop_probing()
        if self._process.poll() is None:
            own = psutil.Process(self._process.pid)
            family = [*own.children(recursive=True), own]
            for process in family:
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue
        self._process.wait(30)

    def _probe(self) -> None:
        while not self._over.is_set():
            try:
                answer = self.get("/health")
            except httpx.HTTPError as error:
                if self.answers:
                    self.refused.append(repr(error))
                time.sleep(_PROBE_EVERY_S)
                continue
            body = answer.json() if answer.content else {"status": "ready"}
            self.answers.append((time.monotonic() - self.began, answer.status_code, body))
            time.sleep(_PROBE_EVERY_S)


def start_pod(
    config: Path,
    *arguments: str,
    as_pid_1: bool = True,
    environment: Mapping[str, str] | None = None,
) -> RunningPod:
    """Run ``podloader serve`` on *config*, with more arguments for vLLM."""
    folder, port = config.parent, free_port()
    command = [sys.executable, "-m", "loader", "serve", str(config)]
    command += ["--timeline", str(folder / "boot.json")]
    command += ["--", "--host", "127.0.0.1", "--port", str(port), *arguments]
    return RunningPod(command, folder, port, as_pid_1=as_pid_1, environment=environment)


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def master_port() -> int:
    """Return a port that is free now, as is the one behind it."""
    while True:
        port = free_port()
        with contextlib.suppress(OSError), socket.create_server(("", port + 1)):
            return port


def render(chromium: str, url: str) -> str:
    """Return the document that a headless browser has of *url* after three seconds of its time."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
    command = [chromium, *flags, "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def needs_namespaces() -> None:
    """Skip the test where no PID namespace can be made."""
    if shutil.which(AS_PID_1[0]) is None:
        pytest.skip("unshare is not installed")
    if subprocess.run([*AS_PID_1, "true"], capture_output=True, check=False).returncode:
        pytest.skip("making a PID namespace is not permitted here")
