"""A pod that does not come up: what it answers, how it ends. No engine is loaded."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import origin as faults
from tests.origin import FaultyOrigin
from tests.pod.pods import RunningPod, free_port, needs_namespaces, start_pod, write_config
from tests.status.test_tracing import receiving

Start = Callable[..., RunningPod]


@pytest.fixture
def start(origin: FaultyOrigin, tmp_path: Path) -> Iterator[Start]:
    """Start a pod over ``joba``; keyword arguments are settings."""
    with ExitStack() as stack:

        def started(
            *arguments: str, environment: dict[str, str] | None = None, **settings: Any
        ) -> RunningPod:
            as_pid_1 = settings.pop("as_pid_1", False)
            config = write_config(origin, tmp_path, "joba", **settings)
            pod = start_pod(config, *arguments, as_pid_1=as_pid_1, environment=environment)
            stack.callback(pod.close)
            return pod

        yield started


def alive(family: list[psutil.Process]) -> list[psutil.Process]:
    """Return which still run; what ended is left for whoever is process 1 here."""
    return [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_download_at_once_and_keeps_its_bytes(
    start: Start, origin: FaultyOrigin, tmp_path: Path, number: int, code: int
) -> None:
    needs_namespaces()
    origin.fail("base/model.safetensors", *[faults.slow(0.5)] * 9)
    pod = start(as_pid_1=True)
    body = pod.wait_for(lambda body: body["bytes"]["done"] > 150_000)  # small files come first
    assert "download" in body["stage"].split(", ")
    assert body["bytes"]["total"] > body["bytes"]["done"]
    pod.stop_probing()
    pod.signal(number)
    assert pod.wait(20) == code
    assert "what has been fetched is kept" in pod.text()
    assert list((tmp_path / "models").rglob("*.part*"))
    origin.faults.clear()


def test_all_of_a_start_is_one_trace_that_the_log_lines_name(
    origin: FaultyOrigin, tmp_path: Path
) -> None:
    """The engine's import as well, which begins before anything is exported."""
    with receiving() as receiver:
        config, port = (
            write_config(origin, tmp_path, "joba", base_model="checkpoint:no/rank-0/no/"),
            free_port(),
        )
        command = [sys.executable, "-m", "loader", "--log-format", "json", "serve", str(config)]
        endpoint = f"http://127.0.0.1:{receiver.server_port}"
        pod = RunningPod(
            [*command, "--", "--host", "127.0.0.1", "--port", str(port)],
            tmp_path,
            port,
            as_pid_1=False,
            environment={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint},
        )
        try:
            assert pod.wait(60) == 3, pod.text()
        finally:
            pod.close()
        spans = [
            span
            for request in receiver.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
    assert {"podloader", "engine import"} <= {span.name for span in spans}
    (trace,) = {span.trace_id.hex() for span in spans}
    lines = [json.loads(line) for line in pod.text().splitlines() if line.startswith("{")]
    assert {line["trace_id"] for line in lines} == {trace}
    assert lines[-1]["level"] == "ERROR"


def test_the_first_answer_comes_before_anything_heavy(start: Start) -> None:
    pod = start(base_model="checkpoint:base/rank-0/nothing/")
    body = pod.wait_answer()
    assert body["status"] in ("starting", "failed")
    assert pod.wait() == 3


def test_a_failed_start_exits_with_the_documented_code(start: Start) -> None:
    pod = start(base_model="checkpoint:base/rank-0/nothing/")
    assert pod.wait() == 3
    assert "error: " in pod.text()


def test_a_failed_start_is_held_until_a_signal(start: Start) -> None:
    pod = start(base_model="checkpoint:base/rank-0/nothing/", on_failure="hold")
    body = pod.wait_for(lambda body: body["status"] == "failed")
    assert body["error"]["error"] == "ResolveError"
    assert "The start failed" in pod.get("/status").text
    assert "podloader_failed 1.0" in pod.get("/metrics").text
    notes = {
        s["name"]: (s["failed"], s["stopped"]) for s in pod.get("/status.json").json()["spans"]
    }
    assert notes["resolve"] == ("ResolveError", False)
    assert notes.get("engine import", ("", True)) == ("", True)  # it may not have begun
    assert pod.get("/v1/models").status_code == 503
    assert pod.pod.is_running()
    pod.stop_probing()
    pod.signal(signal.SIGTERM)
    assert pod.wait() == 3
    assert not pod.refused


def test_a_key_in_the_config_is_asked_for_from_the_first_second(start: Start) -> None:
    arguments = {"api_key": "sesame"}
    pod = start(
        base_model="checkpoint:base/rank-0/nothing/", on_failure="hold", engine_args=arguments
    )
    pod.wait_answer()
    assert pod.get("/v1/models").status_code == 401
    key = {"Authorization": "Bearer sesame"}
    assert httpx.get(f"{pod.url}/v1/models", headers=key, timeout=30).status_code == 503


def test_a_vllm_that_cannot_be_imported_ends_the_download(
    start: Start, origin: FaultyOrigin, tmp_path: Path
) -> None:
    broken = tmp_path / "broken" / "vllm"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.13 is not there')")
    origin.fail("base/model.safetensors", lambda _: False, faults.stall(60))
    pod = start(environment={"PYTHONPATH": str(broken.parent)}, stall_timeout_s=120)
    assert pod.wait(30) == 6
    assert "libcudart.so.13 is not there" in pod.text()
    origin.faults.clear()


@pytest.mark.engine
def test_a_way_to_serve_that_is_refused_ends_the_download(
    start: Start, origin: FaultyOrigin
) -> None:
    origin.fail("base/model.safetensors", lambda _: False, faults.stall(60))
    pod = start("--headless", stall_timeout_s=120)
    assert pod.wait(90) == 2
    assert "--headless" in pod.text()
    origin.faults.clear()


def test_a_taken_port_is_a_config_error(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        pod = start("--port", str(taken.getsockname()[1]))
        assert pod.wait() == 2
        assert "the serving port cannot be opened" in pod.text()


def test_another_engine_has_no_server(start: Start) -> None:
    pod = start(engine="transformers")
    assert pod.wait() == 2


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_ends_what_does_not_heed_it(start: Start, tmp_path: Path, signals: int) -> None:
    """An engine that is loading and deaf; nobody takes the spans either."""
    deaf = tmp_path / "deaf" / "vllm"
    deaf.mkdir(parents=True)
    (deaf / "__init__.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(100)"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {"PYTHONPATH": str(deaf.parent), "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        pod = start(environment=environment)
        pod.wait_for(lambda body: body["files"]["total"] and body["stage"] == "engine import")
        family = [pod.pod, *pod.pod.children(recursive=True)]
        pod.stop_probing()
        began = time.monotonic()
        for _ in range(signals):
            pod.signal(signal.SIGTERM)
            time.sleep(0.1)
        assert pod.wait(20) == 143
        assert time.monotonic() - began < 3  # two seconds, on a machine that is not busy
        assert not alive(family)


@pytest.mark.engine
def test_a_signal_ends_the_load_of_an_engine_at_once(start: Start) -> None:
    """Though nobody takes its spans."""
    needs_namespaces()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "VLLM_CPU_KVCACHE_SPACE": "1"}
        pod = start(as_pid_1=True, environment=environment)
        pod.wait_for(lambda body: "engine load" in body["stage"])
        family = [pod.pod, *pod.pod.children(recursive=True)]
        pod.stop_probing()
        began = time.monotonic()
        pod.signal(signal.SIGTERM)
        assert pod.wait(20) == 143
        assert time.monotonic() - began < 4  # two seconds, on a machine that is not busy
        assert not alive(family)
