"""An engine that loads while the weights arrive: what it answers, when it is ready, how it ends."""

from __future__ import annotations

import json
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.models import tiny_llama
from tests.pod.pods import ENGINE_ARGS, RunningPod, free_port

Start = Callable[..., RunningPod]
_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source") / "model", max_shard_size="300KB")


@pytest.fixture
def start(source: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a pod whose weights come as the keyword arguments say; see ``slow_pod``."""
    with ExitStack() as stack:

        def started(
            arguments: Sequence[str] = (),
            settings: dict[str, Any] | None = None,
            environment: dict[str, str] | None = None,
            **scenario: Any,
        ) -> RunningPod:
            config = tmp_path / "config.yaml"
            own = {"engine_start": "auto", "engine_args": ENGINE_ARGS, "served_model_name": "base"}
            references = [{"training_job_id": "job", "paths": ["rank-0/"]}]
            document = {
                "training_checkpoints": {
                    "download_folder": str(tmp_path / "models"),
                    "artifact_references": references,
                },
                "model_metadata": {"podloader": {"artifacts": "x.json"} | own | (settings or {})},
            }
            config.write_text(yaml.safe_dump(document), encoding="utf-8")
            port = free_port()
            command = [sys.executable, "-m", "tests.pod.slow_pod", str(source)]
            command += [json.dumps(scenario), "serve", str(config)]
            command += ["--timeline", str(tmp_path / "boot.json")]
            command += ["--", "--host", "127.0.0.1", "--port", str(port), *arguments]
            pod = RunningPod(
                command,
                tmp_path,
                port,
                as_pid_1=False,
                environment=_ENVIRONMENT | (environment or {}),
            )
            stack.callback(pod.close)
            return pod

        yield started


def ask(pod: RunningPod) -> Any:
    """Return the log-probabilities of an answer."""
    body = {"model": "base", "prompt": "what is", "max_tokens": 8, "logprobs": 3, "temperature": 0}
    answer = httpx.post(f"{pod.url}/v1/completions", json=body, timeout=60)
    answer.raise_for_status()
    return answer.json()["choices"][0]["logprobs"]


def link(tmp_path: Path) -> Path:
    """Return where the engine's path leads."""
    return next((tmp_path / "models").rglob(".engine-0/model")).resolve()


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """What the engine answers over files."""
    return {}


def is_waiting(body: dict[str, Any]) -> bool:
    """Return whether an engine has some of the weights and waits for the others."""
    weights = body.get("weights", {"done": 0, "total": 0})
    return bool(0 < weights["done"] < weights["total"])


@pytest.mark.engine
def test_over_files(start: Start, answers: dict[str, Any]) -> None:
    pod = start(settings={"engine_start": "files"})
    pod.wait_ready()
    answers["files"] = ask(pod)
    assert "engine start: files" in pod.text()


@pytest.mark.engine
def test_answers_are_those_of_files(
    start: Start, answers: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    """The engine's own limit is shorter than the origin's silence."""
    pod = start(order="shuffled", stall_s=45, environment={"VLLM_ENGINE_READY_TIMEOUT_S": "30"})
    waiting = pod.wait_for(is_waiting, 200)
    assert "weights" in waiting["stage"].split(", ")
    assert "waits for bytes" in pod.get("/status").text
    pod.wait_ready()
    assert ask(pod) == answers.get("files", ask(pod))
    assert "engine start: stream" in pod.text()
    assert link(tmp_path) == source
    events = json.loads((tmp_path / "boot.json").read_text())["traceEvents"]
    assert "weights" in {event["name"] for event in events}
    pod.stop_probing()
    pod.signal(signal.SIGTERM)
    assert pod.wait() == 0


@pytest.mark.engine
def test_a_sum_that_is_wrong_in_the_end_ends_the_engine_before_it_served(
    start: Start, tmp_path: Path
) -> None:
    pod = start(fails="proof", stall_s=1, proof_s=40)
    pod.wait_for(lambda body: body.get("weights") and not body["stage"], 300)  # it could serve
    assert pod.wait(60) == 4
    assert "first token" in pod.text()
    assert "the sum of the last file is wrong" in pod.text()
    assert {status for _, status, _ in pod.answers} == {503}
    assert not list((tmp_path / "models").rglob("*.safetensors"))


@pytest.mark.engine
def test_a_download_that_fails_midway_is_what_is_told(start: Start) -> None:
    pod = start(fails="midway", pause_s=5)
    assert pod.wait(300) == 4
    assert "error: the download failed midway" in pod.text()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("how", "told"), [("close", "the feed was closed"), ("cut", "the feed is gone")]
)
def test_where_the_feed_breaks_the_engine_starts_over_files(
    start: Start, answers: dict[str, Any], how: str, told: str
) -> None:
    pod = start(breaks=how)
    pod.wait_ready()
    assert pod.text().count(f"engine start: files, not streamed: {told}") == 1
    assert ask(pod) == answers.get("files", ask(pod))


@pytest.mark.engine
def test_another_model_than_was_announced_has_another_engine(start: Start) -> None:
    pod = start(another=True, settings={"served_model_name": None})
    pod.wait_ready()
    assert "the model is another than was announced" in pod.text()
    assert pod.get("/v1/models").json()["data"][0]["id"] == "b"


@pytest.mark.engine
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, 6), (signal.SIGTERM, 143)])
def test_an_end_while_the_engine_waits_for_weights(
    start: Start, tmp_path: Path, number: int, code: int
) -> None:
    """SIGKILL of the worker is the engine's failure, SIGTERM of the pod is its end."""
    pod = start(stall_s=100)
    pod.wait_for(is_waiting, 200)
    family = [pod.pod, *pod.pod.children(recursive=True)]
    pod.stop_probing()
    if number == signal.SIGKILL:
        worker = re.search(r"\(Worker pid=(\d+)\)", pod.text())
        assert worker is not None
        psutil.Process(int(worker[1])).kill()
    else:
        pod.signal(number)
    assert pod.wait(60) == code
    assert not [process for process in family if _lives(process)]
    assert not list((tmp_path / "models").rglob("*.safetensors"))


MOMENTS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "the first answer": lambda body: True,
    "imports": lambda body: "engine import" in body["stage"],
    "the engine loads": lambda body: "engine load" in body["stage"],
    "some weights": is_waiting,
    "all weights": lambda body: (
        body["status"] == "ready" or 0 < body["weights"]["done"] == body["weights"]["total"]
    ),
}


@pytest.mark.engine
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_ends_all_of_it(
    start: Start, tmp_path: Path, moment: str, number: int
) -> None:
    """A random while after each stage of a start has begun."""
    pod = start(pause_s=0.3, stall_s=5 if moment == "some weights" else 0)
    pod.wait_for(lambda body: MOMENTS[moment]({"weights": {"done": 0, "total": 0}} | body))
    time.sleep(random.Random(f"{moment} {number}").uniform(0, 3))
    family = [pod.pod, *pod.pod.children(recursive=True)]
    pod.stop_probing()
    is_ready = pod.answers[-1][2]["status"] == "ready"
    began = time.monotonic()
    pod.signal(signal.SIGTERM)
    code = pod.wait(30)
    # Two seconds, on a machine that is not busy.
    assert is_ready or time.monotonic() - began < 5
    assert code == (0 if is_ready else 143), pod.text()
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert not list((tmp_path / "models").rglob("*.safetensors"))


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.engine
def test_two_workers_follow_one_feed(start: Start, answers: dict[str, Any]) -> None:
    # Each would have a NUMA node of its own.
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    pod = start(["--tensor-parallel-size", "2"], stall_s=1, environment=binding)
    pod.wait_ready()
    assert "engine start: stream" in pod.text()
    found, wanted = (told["token_logprobs"] for told in (ask(pod), answers.get("files", ask(pod))))
    assert found == pytest.approx(wanted, abs=1e-4)
