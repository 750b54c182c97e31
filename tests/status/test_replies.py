"""Health, metrics and the page, for starts that run, are over, or have failed."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loader.status.replies import reply
from loader.status.state import Boot
from loader.timeline import Open, Span

RUNNING = Boot(
    phase="starting",
    stage="engine import, download",
    now_s=4.0,
    files=3,
    files_done=1,
    bytes=4_000_000,
    bytes_done=1_000_000,
    bytes_per_s=500_000.0,
    left_s=6.0,
    counts={"retries": 2, "refreshes": 1},
    spans=(Span("resolve", 0.0, 0.5), Span("j/rank-0/<b>.txt", 0.6, 1.0, "file")),
    running=(Open("download", 0.5), Open("engine import", 0.1, lane="engine")),
)
READY = Boot(
    phase="ready",
    stage="",
    now_s=9.0,
    ready_s=9.0,
    spans=(Span("download", 0.0, 5.0), Span("engine load", 5.0, 9.0, lane="engine")),
)
FAILED = Boot(
    phase="failed",
    stage="",
    now_s=1.0,
    error={
        "error": "ResolveError",
        "what": "patterns that match <nothing>",
        "problems": ["rank-0/x/"],
        "next_step": "correct the paths",
    },
)


class Tags(HTMLParser):
    """Checks that tags nest, and keeps the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """Nothing is open."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_health_of_a_start_that_runs() -> None:
    answer = reply("/health", RUNNING)
    assert (answer.status, answer.content_type) == (503, "application/json")
    assert json.loads(answer.body) == {
        "status": "starting",
        "stage": "engine import, download",
        "seconds": 4.0,
        "files": {"done": 1, "total": 3},
        "bytes": {"done": 1_000_000, "total": 4_000_000},
        "bytes_per_s": 500_000,
        "left_s": 6.0,
    }


def test_health_of_a_start_that_failed_gives_the_reason() -> None:
    answer = reply("/health", FAILED)
    assert answer.status == 503
    assert json.loads(answer.body)["error"]["what"] == "patterns that match <nothing>"
    assert reply("/health", READY).status == 200


def test_metrics_are_prometheus_text() -> None:
    answer = reply("/metrics", RUNNING)
    assert answer.status == 200
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }
    assert samples["podloader_bytes",] == 4_000_000
    assert samples["podloader_bytes_done",] == 1_000_000
    assert samples["podloader_retries_total",] == 2
    assert samples["podloader_refreshes_total",] == 1
    assert samples["podloader_cache_hits_total",] == 0
    assert samples["podloader_stage_seconds", "resolve"] == 0.5
    assert samples["podloader_stage_seconds", "download"] == 3.5
    assert samples["podloader_ready",] == 0
    assert ("podloader_ready_seconds",) not in samples
    assert b"podloader_ready_seconds 9.0" in reply("/metrics", READY).body


@pytest.mark.parametrize(
    ("boot", "told"),
    [
        (
            RUNNING,
            ["Starting: engine import, download", "1 of 3 files", "500.0 kB/s", "retries: 2"],
        ),
        (READY, ["Ready after 9.0 s", "engine load"]),
        (FAILED, ["The start failed", "patterns that match <nothing>", "next: correct the paths"]),
    ],
)
def test_the_page_is_sound_and_tells(boot: Boot, told: list[str]) -> None:
    answer = reply("/status", boot)
    assert (answer.status, answer.content_type) == (200, "text/html; charset=utf-8")
    text = Tags(answer.body.decode()).text
    for words in told:
        assert words in text
    assert "<b>.txt" not in answer.body.decode()
    moving = reply("/status?part", boot).body.decode()
    assert moving.startswith(f'<div class="{boot.phase}">')
    assert moving in answer.body.decode()


def test_the_page_names_what_is_served_and_from_where() -> None:
    facts = {"model": "/m/<b>", "adapters": ["a", "b"], "versions": {"vllm": "0.33.0"}, "none": []}
    body = reply("/status", replace(RUNNING, facts=facts)).body.decode()
    text = Tags(body).text
    for words in ("/m/<b>", "a, b", "vllm 0.33.0", "waits for", "download, for"):
        assert words in text
    assert "none" not in text
    assert "waits for" not in reply("/status", replace(READY, facts=facts)).body.decode()


def test_the_same_as_json() -> None:
    answer = reply("/status.json", RUNNING)
    assert Boot.from_json(json.loads(answer.body)) == RUNNING


def test_the_models_paths_say_that_it_is_too_early() -> None:
    answer = reply("/v1/chat/completions", RUNNING)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
    error = json.loads(answer.body)["error"]
    assert error["code"] == 503
    assert "download" in error["message"]
    assert "did not start" in json.loads(reply("/v1/models", FAILED).body)["error"]["message"]
