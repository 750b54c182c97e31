"""A pod whose engine loads while an origin still sends: fetched as it is, and merged on the way."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from loader.serve.transformers import TransformersModel
from tests.fetch.test_faults import s3_says
from tests.origin import Fault, FaultyHandler, FaultyOrigin, cut, slow, status
from tests.pod.pods import RunningPod, start_pod, write_config

pytestmark = pytest.mark.engine
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_HEAD_BYTES = 1 << 18
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
_PATIENT: dict[str, Any] = {"engine_start": "stream", "retries": 100, "stall_timeout_s": 20}


class Gate:
    """Lets the weights' headers through, and the weights once it is open.

    With *then*, some of them: all requests after the first meet that.
    """

    def __init__(self) -> None:
        self.open = threading.Event()
        self.then: Fault | None = None
        self._meets = iter([cut(400_000)])

    def __call__(self, handler: FaultyHandler) -> bool:
        found = _RANGE.match(handler.headers.get("Range", ""))
        if handler.command == "HEAD" or (found and int(found[2]) - int(found[1]) < _HEAD_BYTES):
            return False
        self.open.wait(300)
        return self.then is not None and next(self._meets, self.then)(handler)


@pytest.fixture
def gate(origin: FaultyOrigin) -> Iterator[Gate]:
    made = Gate()
    origin.fail("base/model.safetensors", *[made] * 500)
    yield made
    made.open.set()
    origin.faults.clear()
    origin.headers = lambda path: {}


def wait_for_engine(pod: RunningPod) -> dict[str, Any]:
    """Return what ``/health`` says when the engine waits for the weights."""
    return pod.wait_for(lambda body: "weights" in body, 250)


def answer(pod: RunningPod, prompt: str) -> str:
    """Return what the model answers."""
    body = {"model": "base", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    found = httpx.post(f"{pod.url}/v1/completions", json=body, timeout=60)
    found.raise_for_status()
    return str(found.json()["choices"][0]["text"])


def expect(folder: Path, prompt: str) -> str:
    """Return what transformers answers over a folder."""
    model = TransformersModel(folder, engine_args={"dtype": "float32"}, served_model_name="base")
    model.load()
    body = {"model": "base", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    found = asyncio.run(model.predict(body))
    model.close()
    assert isinstance(found, dict)
    return str(found["choices"][0]["text"])


def wrong_sum(path: str) -> dict[str, str]:
    """Return what an origin tells that has another sum of the weights than they have."""
    is_weights = path.endswith("base/model.safetensors")
    return {"x-amz-checksum-crc64nvme": "AAAAAAAAAAA="} if is_weights else {}


@pytest.mark.parametrize(
    ("then", "told"),
    [
        pytest.param(s3_says(403, "ExpiredToken"), "expired", id="the URL ends midway"),
        pytest.param(status(412), "changed while it was being read", id="the object changes"),
        pytest.param(None, "do not sum up", id="the sum is wrong"),
        pytest.param(slow(0.2), "disk", id="the disk refuses"),
    ],
)
def test_weights_that_fail_end_an_engine_that_has_some_of_them(
    origin: FaultyOrigin, gate: Gate, tmp_path: Path, then: Fault | None, told: str
) -> None:
    """It never serves; what is proved stays, and nothing else bears a name of the model."""
    gate.then = then
    if then is None:
        origin.headers = wrong_sum
    config = write_config(origin, tmp_path, "joba", adapter_policy="attach", **_PATIENT)
    pod = start_pod(config, as_pid_1=False, environment=_ENVIRONMENT)
    try:
        wait_for_engine(pod)
        family = [pod.pod, *pod.pod.children(recursive=True)]
        if told == "disk":
            pod.pod.rlimit(psutil.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        gate.open.set()
        assert pod.wait(200) == 4, pod.text()
        assert told in pod.text()[pod.text().rindex("error: ") :]
        assert {status for _, status, _ in pod.answers} == {503}
        assert not psutil.wait_procs(family, timeout=60)[1]
        assert (tmp_path / "models/joba/rank-0/checkpoint-1/adapter_model.safetensors").is_file()
        assert not list(tmp_path.rglob("model.safetensors"))
    finally:
        pod.close()


def test_a_model_that_is_served_as_it_is_and_a_pod_that_was_killed(
    origin: FaultyOrigin, gate: Gate, tmp_path: Path
) -> None:
    config = write_config(origin, tmp_path, **_PATIENT)
    document = yaml.safe_load(config.read_text())
    references = [{"training_job_id": "base", "paths": ["rank-0/"]}]
    document["training_checkpoints"]["artifact_references"] = references
    del document["model_metadata"]["podloader"]["base_model"]
    config.write_text(yaml.safe_dump(document))
    killed = start_pod(config, as_pid_1=False, environment=_ENVIRONMENT)
    try:
        body = wait_for_engine(killed)
        assert body["weights"]["done"] == 0 < body["weights"]["total"]
        assert body["bytes"]["done"] < body["bytes"]["total"]
        killed.stop_probing()
        started = killed.pod.children(recursive=True)
        killed.signal(signal.SIGKILL)
        killed.wait()
        assert not psutil.wait_procs(started, timeout=60)[1]  # nothing goes on without it
    finally:
        killed.close()
    (stand_in,) = tmp_path.rglob("*.safetensors")  # none that bears the model's name
    assert ".engine-0" in str(stand_in)
    pod = start_pod(config, as_pid_1=False, environment=_ENVIRONMENT)
    try:
        wait_for_engine(pod)
        gate.open.set()
        pod.wait_ready()
        assert "engine start: stream" in pod.text()
        folder = next(tmp_path.rglob(".engine-0/model")).resolve()
        assert folder.name == "base"
        assert list(tmp_path.rglob("*.safetensors")) == [folder / "model.safetensors"]
        assert answer(pod, "the quick brown") == expect(folder, "the quick brown")
    finally:
        pod.close()


def test_a_model_that_is_merged_while_its_base_arrives(
    origin: FaultyOrigin, gate: Gate, tmp_path: Path
) -> None:
    config = write_config(origin, tmp_path, "joba", adapter_policy="merge", **_PATIENT)
    pod = start_pod(config, as_pid_1=False, environment=_ENVIRONMENT)
    try:
        body = wait_for_engine(pod)
        assert "merge" in body["stage"].split(", ")
        gate.open.set()
        pod.wait_ready()
        assert "engine start: stream" in pod.text()
        folder = next(tmp_path.rglob(".engine-0/model")).resolve()
        assert folder.name.startswith("merge-")
        found = answer(pod, "the quick brown")
        assert found == expect(folder, "the quick brown")
        base = next(tmp_path.rglob("rank-0/base"))
        assert found != expect(base, "the quick brown")
    finally:
        pod.close()
