"""A timeline's spans as OpenTelemetry spans, exported as the usual ``OTEL_*`` variables ask.

OpenTelemetry is imported only then. Its SDK and exporters read their own variables: endpoint,
headers, service name, sampler, batch sizes.
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from loader import __version__
from loader.status.state import fact_text
from loader.timeline import Open, Span, Timeline

_GROUP = "opentelemetry_traces_exporter"  # the SDK's own entry points
_ROOT = "podloader"
_FLUSH_S, _STOPPED_S = 2.0, 0.5
_NS = 1_000_000_000
_log = logging.getLogger("podloader")


@contextlib.contextmanager
def exporting(timeline: Timeline, exporter: str | None) -> Iterator[None]:
    """Export *timeline*'s spans through the exporter of that name; None exports nothing.

    One span is the whole start, the stages are its children, files are children of the stage that
    fetches them. A start never fails or waits for want of telemetry: what is missing is logged, and
    what a collector does not take within seconds is left, at once after a signal.
    """
    provider = _provider(exporter, timeline.trace_id) if exporter else None
    if provider is None:
        yield
        return
    spans = _Spans(timeline, provider.get_tracer("podloader"))
    timeline.listen(spans.note)
    wait_s = _FLUSH_S
    try:
        yield
    except BaseException as error:
        spans.close(type(error).__name__)
        if not isinstance(error, Exception):
            wait_s = _STOPPED_S
        raise
    else:
        spans.close("")
    finally:
        # Its own limits are for each try; a daemon thread holds up no end of the process.
        flushing = threading.Thread(target=provider.shutdown, name="telemetry", daemon=True)
        flushing.start()
        flushing.join(wait_s)


def _provider(exporter: str, trace_id: str) -> Any:
    """Return OpenTelemetry's tracer provider, or None where its packages are not installed."""
    try:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

        class Ids(RandomIdGenerator):
            """Log lines have borne the trace's id since before there was a provider."""

            def generate_trace_id(self) -> int:
                return int(trace_id, 16)

        found = next(iter(entry_points(group=_GROUP, name=exporter)), None)
        if found is None:
            raise ImportError(f"no exporter is called {exporter!r}")
        own = Resource({"service.name": _ROOT, "service.version": __version__})
        provider = TracerProvider(
            resource=own.merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
            id_generator=Ids(),
        )
        provider.add_span_processor(BatchSpanProcessor(found.load()()))
    except Exception as error:
        _log.warning(
            "OTEL_* variables ask for traces, and none are sent: %s; install "
            "opentelemetry-sdk and opentelemetry-exporter-otlp",
            error,
        )
        return None
    return provider


class _Spans:
    """Begins and ends an OpenTelemetry span for each of the timeline's."""

    def __init__(self, timeline: Timeline, tracer: Any) -> None:
        self._timeline = timeline
        self._tracer = tracer
        self._lock = threading.Lock()
        self._root = tracer.start_span(_ROOT, start_time=self._ns(0.0))
        self._open: dict[int, Any] = {}
        self._stage = self._root

    def note(self, begun: Open, span: Span | None) -> None:
        """Note that a span has begun, or what it has become."""
        if span is None:
            self._begin(begun)
        else:
            self._end(begun, span)

    def _begin(self, span: Open) -> None:
        from opentelemetry.trace import set_span_in_context

        with self._lock:
            parent = self._stage if span.kind == "file" else self._root
            started = self._tracer.start_span(
                span.name,
                context=set_span_in_context(parent),
                start_time=self._ns(span.start_s),
                attributes={"podloader.kind": span.kind, "podloader.lane": span.lane},
            )
            self._open[id(span)] = started
            if span.kind == "stage" and span.lane == _ROOT:
                self._stage = started

    def _end(self, begun: Open, span: Span) -> None:
        with self._lock:
            started = self._open.pop(id(begun), None)
        if started is None:  # begun after the root has ended
            return
        for name, value in span.attributes.items():
            started.set_attribute(f"podloader.{name}", value)
        if span.stopped:
            started.set_attribute("podloader.stopped", True)
        _fail(started, span.failed)
        started.end(self._ns(span.end_s))

    def close(self, failed: str) -> None:
        """End the span of the whole start, which says what it was about."""
        for name, fact in self._timeline.facts.items():
            self._root.set_attribute(f"podloader.{name}", fact_text(fact))
        for name, number in self._timeline.counts.items():
            self._root.set_attribute(f"podloader.{name}", number)
        _fail(self._root, failed)
        self._root.end(self._ns(self._timeline.now_s))

    def _ns(self, seconds: float) -> int:
        return int((self._timeline.began_epoch + seconds) * _NS)


def _fail(span: Any, failed: str) -> None:
    if failed:
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR, failed))
        span.set_attribute("error.type", failed)
