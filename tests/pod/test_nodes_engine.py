"""One model over two nodes, on one machine: each a pod of vLLM's real engine."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.models import tiny_llama
from tests.origin import FaultyOrigin, serving, write_listing
from tests.pod.pods import ENGINE_ARGS, RunningPod, master_port, start_pod

pytestmark = pytest.mark.engine
Start = Callable[..., RunningPod]
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
}
_BODY = {"model": "base", "prompt": "the quick brown", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyOrigin]:
    with serving(tmp_path_factory.mktemp("origin")) as found:
        base = tiny_llama(tmp_path_factory.mktemp("base") / "model")
        shutil.copytree(base, found.folder("job") / "model")
        yield found


@pytest.fixture
def start(origin: FaultyOrigin, tmp_path: Path) -> Iterator[Start]:
    """Start the node *rank* of *count*; keyword arguments are settings."""
    port = master_port()
    with ExitStack() as stack:

        def started(
            rank: int, count: int = 2, spread: str = "tensor", **settings: Any
        ) -> RunningPod:
            folder = tmp_path / f"node-{rank}-of-{count}"
            folder.mkdir()
            listing = write_listing(origin, folder / "job.json", "job")
            own = {
                "artifacts": str(listing),
                "served_model_name": "base",
                "engine_args": ENGINE_ARGS,
                "drain_timeout_s": 8,
            }
            references = [{"training_job_id": "job", "paths": ["rank-0/"]}]
            document = {
                "training_checkpoints": {
                    "download_folder": str(folder / "models"),
                    "artifact_references": references,
                },
                "model_metadata": {"podloader": own | settings},
            }
            config = folder / "config.yaml"
            config.write_text(yaml.safe_dump(document), encoding="utf-8")
            given = [f"--{spread}-parallel-size", str(count)] if count > 1 else []
            if count > 1:
                given += ["--nnodes", str(count), "--node-rank", str(rank)]
                given += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
            pod = start_pod(config, *given, as_pid_1=False, environment=_ENVIRONMENT)
            stack.callback(pod.close)
            return pod

        yield started


def _ask(pod: RunningPod) -> str:
    answer = httpx.post(f"{pod.url}/v1/completions", json=_BODY, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_two_nodes_answer_as_one_and_end_together(start: Start) -> None:
    first, second = start(0), start(1)
    first.wait_ready()
    second.wait_ready(10)
    answered = _ask(first)
    assert answered
    refused = second.get("/v1/models")
    assert refused.status_code == 503
    assert "node 0" in refused.json()["error"]["message"]
    told = second.get("/status.json").json()
    assert told["phase"] == "ready"
    assert second.get("/metrics").status_code == 200
    first.signal(signal.SIGTERM)
    assert first.wait(40) == 0
    assert second.wait(20) == 0
    alone = start(0, 1)
    alone.wait_ready()
    assert _ask(alone) == answered


def test_each_node_of_a_pipeline_loads_its_own_stage_and_they_answer_as_one(
    start: Start, tmp_path: Path
) -> None:
    # The CPU build makes the buffers between stages as it warms up what it compiles.
    compiled = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    own: dict[str, Any] = {"engine_args": ENGINE_ARGS | compiled}
    pods = [start(rank, spread="pipeline", **own) for rank in (0, 1)]
    pods[0].wait_ready()
    answered = _ask(pods[0])
    for rank, pod in enumerate(pods):
        (share,) = (tmp_path / f"node-{rank}-of-2").rglob("podloader_share.json")
        assert f"pipeline stage {rank + 1} of 2: layers {rank} to {rank} of 2" in share.read_text()
        assert f"this node takes pipeline stage {rank + 1}" in pod.text()
    pods[0].signal(signal.SIGTERM)
    assert [pod.wait(40) for pod in pods] == [0, 0]
    alone = start(0, 1, **own)
    alone.wait_ready()
    assert _ask(alone) == answered


@pytest.mark.parametrize("killed", [0, 1])
def test_a_node_that_is_killed_ends_the_others_by_its_name(start: Start, killed: int) -> None:
    pods = start(0), start(1)
    for pod in pods:
        pod.wait_ready()
        pod.stop_probing()
    pods[killed].signal(signal.SIGKILL)
    began = time.monotonic()
    other = pods[1 - killed]
    assert other.wait(30) == 6
    assert time.monotonic() - began < 20
    assert re.search(rf"error: node {killed} \(.+\) is gone", other.text())


def test_a_request_to_end_of_the_second_node_drains_the_first(start: Start) -> None:
    pods = start(0), start(1)
    for pod in pods:
        pod.wait_ready()
        pod.stop_probing()
    pods[1].signal(signal.SIGTERM)
    assert [pod.wait(40) for pod in pods] == [0, 0]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_node_that_cannot_prepare_ends_all_with_its_error(
    start: Start, origin: FaultyOrigin, broken: int
) -> None:
    lacks = {"artifacts": "/nowhere/listing.json"}
    settings: list[dict[str, str]] = [{}, {}]
    settings[broken] = lacks
    pods = [start(rank, **settings[rank]) for rank in (0, 1)]
    codes = [pod.wait(90) for pod in pods]
    assert codes == [3, 3]
    assert re.search(rf"error: node {broken} \(", pods[1 - broken].text())
