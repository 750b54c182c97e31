"""Spans that reach a real OTLP receiver, as the usual variables ask."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from loader.config.settings import traces_exporter
from loader.status.tracing import exporting
from loader.timeline import Timeline


class Receiver(ThreadingHTTPServer):
    """Keeps what is exported to it."""

    daemon_threads = True

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    """Answers an export."""

    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@contextlib.contextmanager
def receiving() -> Iterator[Receiver]:
    """Give an OTLP receiver on the loopback interface."""
    server = Receiver()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as server:
        yield server


def start_that_fails(timeline: Timeline) -> None:
    """Import the engine, fetch a file, then fail to merge."""
    timeline.note(model="/models/m", adapters=["a", "b"], versions={"vllm": "0.33.0"})
    timeline.begin("engine import", lane="engine")  # before anybody exports
    with exporting(timeline, traces_exporter()):
        with timeline.stage("download"):
            begun = timeline.begin("job/rank-0/a", kind="file")
            timeline.end(begun, attributes={"size_bytes": 7})
        timeline.count("retries", 3)
        with contextlib.closing(timeline), timeline.stage("merge"):
            raise RuntimeError


def test_every_stage_and_file_arrives_in_one_trace(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.server_port}")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=pod-1")
    timeline = Timeline(quiet=True)
    with pytest.raises(RuntimeError):
        start_that_fails(timeline)
    (resource,) = [r for request in receiver.requests for r in request.resource_spans]
    names = {a.key: a.value.string_value for a in resource.resource.attributes}
    assert (names["service.name"], names["k8s.pod.name"]) == ("podloader", "pod-1")
    spans = {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert set(spans) == {"podloader", "download", "job/rank-0/a", "engine import", "merge"}
    assert {span.trace_id.hex() for span in spans.values()} == {timeline.trace_id}
    assert spans["job/rank-0/a"].parent_span_id == spans["download"].span_id
    assert spans["download"].parent_span_id == spans["podloader"].span_id
    assert (spans["merge"].status.code, spans["merge"].status.message) == (2, "RuntimeError")
    stopped = spans["engine import"]
    assert stopped.status.code == 0
    assert {a.key: a.value.bool_value for a in stopped.attributes}["podloader.stopped"]
    began = spans["podloader"].start_time_unix_nano / 1e9
    assert began == pytest.approx(timeline.began_epoch, abs=1e-3)
    told = {a.key: a.value for a in spans["podloader"].attributes}
    assert told["podloader.retries"].int_value == 3
    assert told["podloader.model"].string_value == "/models/m"
    assert told["podloader.adapters"].string_value == "a, b"
    assert told["podloader.versions"].string_value == "vllm 0.33.0"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, None),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, None),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, "otlp_proto_http"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "otlp_proto_grpc",
        ),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
    ],
)
def test_the_usual_variables_decide(
    variables: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert traces_exporter() == expected


def test_an_exporter_that_is_not_there_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    timeline = Timeline(quiet=True)
    with exporting(timeline, "nowhere"), timeline.stage("one"):
        pass
    assert "no exporter is called 'nowhere'" in caplog.text
    assert [stage.name for stage in timeline.stages] == ["one"]


@pytest.mark.parametrize(
    ("ends_with", "most_s"), [(None, 4), (RuntimeError, 4), (KeyboardInterrupt, 1.5)]
)
def test_a_collector_that_never_answers_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, ends_with: type[BaseException] | None, most_s: float
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        timeline = Timeline(quiet=True)
        began = time.monotonic()
        ended = contextlib.suppress(RuntimeError, KeyboardInterrupt)
        with ended, exporting(timeline, traces_exporter()), timeline.stage("download"):
            began = time.monotonic()
            if ends_with:
                raise ends_with
        assert time.monotonic() - began < most_s
