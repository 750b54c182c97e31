"""Pods of one model on several nodes, whose engines load nothing: how they begin and end."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import yaml

from tests.pod.pods import RunningPod, free_port, master_port

Start = Callable[..., RunningPod]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start the pod of node *rank* of two; keyword arguments are variables."""
    port = master_port()
    with ExitStack() as stack:

        def started(rank: int, on_failure: str = "exit", **variables: str) -> RunningPod:
            folder = tmp_path / str(rank)
            folder.mkdir()
            references = [{"training_job_id": "job", "paths": ["rank-0/"]}]
            training = {
                "download_folder": str(folder / "models"),
                "artifact_references": references,
            }
            own = {"artifacts": "x.json", "drain_timeout_s": 3, "on_failure": on_failure}
            document = {"training_checkpoints": training, "model_metadata": {"podloader": own}}
            config = folder / "config.yaml"
            config.write_text(yaml.safe_dump(document), encoding="utf-8")
            own_port = free_port()
            command = [sys.executable, "-m", "tests.pod.spread_pod", "serve", str(config), "--"]
            command += ["--host", "127.0.0.1", "--port", str(own_port), "-n", "2", "-r", str(rank)]
            command += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
            # The engine's process looks for modules in no folder of the working directory.
            root = str(Path(__file__).parents[2])
            environment = {"FILE": "crc64nvme:1", "PYTHONPATH": root} | variables
            pod = RunningPod(command, folder, own_port, as_pid_1=False, environment=environment)
            stack.callback(pod.close)
            return pod

        yield started


@pytest.fixture
def serving(start: Start) -> list[RunningPod]:
    """Two nodes that serve: node 0's own engine has its port."""
    pods = [start(0), start(1)]
    pods[0].stop_probing()
    pods[1].wait_ready(60)
    pods[1].stop_probing()
    return pods


def test_a_node_that_is_led_tells_so(serving: list[RunningPod]) -> None:
    refused = serving[1].get("/v1/models")
    assert refused.status_code == 503
    assert "node 0" in refused.json()["error"]["message"]
    assert serving[1].get("/status.json").json()["phase"] == "ready"


@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_either_one_that_is_asked_to_end_ends_both_well(
    serving: list[RunningPod], asked: int, number: int
) -> None:
    serving[asked].signal(number)
    assert [pod.wait(20) for pod in serving] == [0, 0]


def test_both_are_asked_at_once(serving: list[RunningPod]) -> None:
    for pod in serving:
        pod.signal(signal.SIGTERM)
    assert [pod.wait(20) for pod in serving] == [0, 0]


@pytest.mark.parametrize("killed", [0, 1])
def test_one_that_is_killed_ends_the_other_by_its_name(
    serving: list[RunningPod], killed: int
) -> None:
    serving[killed].signal(signal.SIGKILL)
    other = serving[1 - killed]
    assert other.wait(20) == 6
    assert re.search(rf"error: node {killed} \(.+\) is gone", other.text())


@pytest.mark.parametrize("killed", [0, 1])
def test_an_engine_that_is_killed_is_the_error_of_both(
    serving: list[RunningPod], killed: int
) -> None:
    (engine,) = serving[killed].pod.children()
    psutil.Process(engine.pid).kill()
    assert [pod.wait(20) for pod in serving] == [6, 6]
    assert "error: the engine ended while it served" in serving[killed].text()
    named = rf"error: node {killed} \(.+\): the engine ended while it served"
    assert re.search(named, serving[1 - killed].text())


@pytest.mark.parametrize("failing", [0, 1])
def test_one_that_cannot_prepare_ends_both_with_its_error(start: Start, failing: int) -> None:
    variables: list[dict[str, str]] = [{}, {}]
    variables[failing]["FAILS"] = "a file is missing"
    pods = [start(rank, **variables[rank]) for rank in (0, 1)]
    assert [pod.wait(60) for pod in pods] == [4, 4]
    assert "error: a file is missing" in pods[failing].text()
    assert re.search(rf"error: node {failing} \(.+\): a file is missing", pods[1 - failing].text())
    assert all("Traceback" not in pod.text() for pod in pods)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_engine_that_crashes_while_it_loads(start: Start, failing: int) -> None:
    variables: list[dict[str, str]] = [{}, {}]
    variables[failing]["CRASHES"] = "1"
    pods = [start(rank, **variables[rank]) for rank in (0, 1)]
    assert [pod.wait(60) for pod in pods] == [6, 6]
    named = rf"error: node {failing} \(.+\): the engine('s process)? ended"
    assert re.search(named, pods[1 - failing].text())


def test_what_was_prepared_is_compared(start: Start) -> None:
    pods = start(0), start(1, FILE="crc64nvme:2")
    assert [pod.wait(60) for pod in pods] == [6, 6]
    assert all("different models" in pod.text() for pod in pods)


@pytest.mark.parametrize("asked", [0, 1])
def test_one_that_is_asked_to_end_while_it_waits(start: Start, asked: int) -> None:
    pod = start(asked)
    waited = "node 1, which has not come" if asked == 0 else "node 0"
    pod.wait_answer(60)
    ends = time.monotonic() + 30
    while waited not in str(pod.get("/status.json").json()["waiting_for"]):
        assert time.monotonic() < ends, pod.text()
        time.sleep(0.1)
    pod.signal(signal.SIGTERM)
    assert pod.wait(20) == 143


def test_a_failure_is_held_on_both(start: Start) -> None:
    pods = start(0, on_failure="hold", FAILS="a file is missing"), start(1, on_failure="hold")
    for pod in pods:
        body = pod.wait_for(lambda body: body.get("status") == "failed", 60)
        assert "a file is missing" in str(body["error"])
        pod.signal(signal.SIGTERM)
        assert pod.wait(20) == 4
