"""A start in Prometheus's format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from loader.status.state import Boot

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import CollectorRegistry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_COUNTS = {
    "retries": "Requests that were made again after a passing failure.",
    "refreshes": "Listings that were read again because signed URLs had ended.",
    "cache_hits": "Files that an earlier start had left here whole.",
}


class BootCollector:
    """Gives a start's metrics to a registry of prometheus_client, afresh at each scrape."""

    def __init__(self, boot: Callable[[], Boot]) -> None:
        self._boot = boot

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they stand."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        boot = self._boot()
        for name, value, text in (
            ("bytes", boot.bytes, "Bytes of all files of the checkpoints."),
            ("bytes_done", boot.bytes_done, "Bytes that are on this disk."),
            ("bytes_per_second", boot.bytes_per_s, "Bytes a second over the last ten seconds."),
            ("files", boot.files, "Files of the checkpoints."),
            ("files_done", boot.files_done, "Files that are whole."),
            ("ready", int(boot.phase == "ready"), "1 when requests are answered."),
            ("failed", int(boot.phase == "failed"), "1 when the start has failed."),
        ):
            yield GaugeMetricFamily(f"podloader_{name}", text, value=value)
        if boot.ready_s is not None:
            text = "Seconds from the start of podloader until requests are answered."
            yield GaugeMetricFamily("podloader_ready_seconds", text, value=boot.ready_s)
        for name, text in _COUNTS.items():
            yield CounterMetricFamily(f"podloader_{name}", text, value=boot.counts.get(name, 0))
        yield self._stages(boot, GaugeMetricFamily)

    def register(self, registry: CollectorRegistry | None = None) -> None:
        """Give the metrics to *registry*, by default the one of this process."""
        from prometheus_client import REGISTRY

        (registry or REGISTRY).register(self)

    def _stages(self, boot: Boot, family: type[Any]) -> Metric:
        stages: Metric = family(
            "podloader_stage_seconds",
            "Seconds of each stage; of one that runs, so far.",
            labels=["stage"],
        )
        seconds: dict[str, float] = {}
        for span in boot.stages:
            seconds[span.name] = seconds.get(span.name, 0.0) + span.seconds
        for begun in boot.running:
            if begun.kind == "stage":
                seconds[begun.name] = seconds.get(begun.name, 0.0) + boot.now_s - begun.start_s
        for name, value in seconds.items():
            stages.add_metric([name], value)  # type: ignore[attr-defined]
        return stages


def exposition(boot: Boot) -> bytes:
    """Return the metrics of *boot* alone, as text."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    BootCollector(lambda: boot).register(registry)
    return generate_latest(registry)
