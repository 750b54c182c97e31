"""A pod whose base comes from the Hub: the download is told of, the model looked at meanwhile."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin
from tests.pod.pods import RunningPod, render, start_pod, write_config
from tests.stores.hub import Hub

_LARGE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
}
_JOB = "tuned"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub with a base of 100 MB, which it gives in no less than 50 s."""
    found = Hub(tiny_llama(tmp_path / "repo", **_LARGE))
    found.pause_s = 0.5
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def pod(hub: Hub, origin: FaultyOrigin, tmp_path: Path) -> Iterator[RunningPod]:
    """A pod over that base."""
    lora = train_or_draw_lora(hub.folder, tmp_path / _JOB)
    if not (origin.folder(_JOB) / "checkpoint-1").exists():
        shutil.copytree(lora, origin.folder(_JOB) / "checkpoint-1")
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    config = write_config(origin, tmp_path / "pod", _JOB, base_model="org/base")
    running = start_pod(config, as_pid_1=False, environment=environment)
    try:
        yield running
    finally:
        running.close()


def test_health_tells_of_the_bases_download(pod: RunningPod) -> None:
    body = pod.wait_for(
        lambda body: "download of the base" in body["stage"] and body["bytes_per_s"] > 0
    )
    assert 0 < body["bytes"]["done"] < body["bytes"]["total"]
    left = body["bytes"]["total"] - body["bytes"]["done"]
    assert body["left_s"] == pytest.approx(left / body["bytes_per_s"], abs=0.1)
    assert body["files"] == {"done": body["files"]["total"] - 1, "total": body["files"]["total"]}
    page = rendered(pod)
    assert "<title>podloader: starting</title>" in page
    assert "of download left" in page
    assert "org/base/model.safetensors" in page
    pod.stop_probing()
    pod.signal(signal.SIGTERM)
    assert pod.wait(20) == 143
    trace = json.loads((pod.folder / "boot.json").read_text())
    spans = {event["name"]: event for event in trace["traceEvents"] if event["ph"] == "X"}
    assert spans["org/base/model.safetensors"]["args"] == {"stopped": True}
    assert spans["org/base/config.json"]["args"] == {}


def rendered(pod: RunningPod) -> str:
    """Return ``/status`` as a browser shows it, or as it is sent where there is no browser."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return pod.get("/status").text
    return render(chromium, f"{pod.url}/status")


@pytest.mark.engine
def test_the_models_class_is_looked_at_while_its_weights_come(hub: Hub, pod: RunningPod) -> None:
    hub.pause_s = 3  # of a hundred: vLLM may be imported for long on a machine with other work
    pod.wait_for(lambda _: "model class: " in pod.text())
    assert "download of the base: " not in pod.text()
    pod.stop_probing()
    pod.signal(signal.SIGTERM)
    assert pod.wait(20) == 143
