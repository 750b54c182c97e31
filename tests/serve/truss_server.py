"""The real Truss server in a process of its own, from what its image would hold."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from truss.base.truss_config import TrussConfig

from tests.images import Image, build_image, lay_out

_GRACE_S = 30


@dataclass(frozen=True, slots=True)
class TrussServer:
    """A server that has loaded its model."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def predict(self, body: object) -> httpx.Response:
        """POST to Truss's own path."""
        return httpx.post(f"{self.url}/v1/models/model:predict", json=body, timeout=120)


@contextmanager
def running(
    image: Image, environment: Mapping[str, str], ready_s: float = 300
) -> Iterator[TrussServer]:
    """Run *image*'s server until the block ends; its process tree must end with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = image.app / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [image.python, "main.py"],
            cwd=image.app,
            stdout=output,
            stderr=subprocess.STDOUT,
            # HOME: Truss notes a crash there.
            env={**os.environ, "HOME": str(image.app), "INFERENCE_SERVER_PORT": str(port)}
            | image.environment()
            | dict(environment),
        )
    server = TrussServer(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait_until_ready(server, ready_s)
        yield server
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if _lives(process) else []
        process.terminate()
        try:
            process.wait(_GRACE_S)
            left = _wait_until_gone(children)
        finally:
            process.kill()
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
    assert not left, f"processes that outlived the server: {left}"


def running_template(
    template: str,
    folder: Path,
    listing: Path,
    settings: Mapping[str, str],
    secrets: Mapping[str, str] | None = None,
) -> AbstractContextManager[TrussServer]:
    """Run *template* on the checkpoints of ``job1`` in *listing*, with more variables.

    Values of *secrets* stand in the config, from which only Truss's own secrets read them.
    """

    truss = lay_out(template, folder / "truss")
    config = TrussConfig.from_yaml(truss / "config.yaml")
    checkpoints = config.training_checkpoints
    assert checkpoints is not None
    checkpoints.download_folder = str(folder / "down")
    del checkpoints.artifact_references[1:]
    checkpoints.artifact_references[0].training_job_id = "job1"
    checkpoints.artifact_references[0].paths = ["rank-0/checkpoint-*/"]
    config.secrets.update(secrets or {})
    config.write_to_yaml_file(truss / "config.yaml")
    shutil.copy(listing, truss / "data" / "listing.json")
    image = build_image(truss, folder / "image")
    environment = {"PODLOADER_ARTIFACTS": "data/listing.json", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return running(image, environment | dict(settings))


def _wait_until_gone(children: list[psutil.Process]) -> list[psutil.Process]:
    """Return those that still run after a while; one that nobody reaps has ended, too."""
    ends = time.monotonic() + _GRACE_S
    left = children
    while left and time.monotonic() < ends:
        time.sleep(0.1)
        left = [c for c in left if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]
    return left


def _lives(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None


def _wait_until_ready(server: TrussServer, ready_s: float) -> None:
    ends = time.monotonic() + ready_s
    while time.monotonic() < ends and _lives(server.process):
        try:
            if httpx.get(f"{server.url}/v1/models/model", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"the Truss server is not ready:\n{server.log.read_text()[-8000:]}")
