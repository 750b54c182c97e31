"""How far a start is, as a value."""

from __future__ import annotations

import json

import pytest

from loader.errors import FetchError
from loader.fetch.progress import LogProgress
from loader.status.state import Boot, BootState
from loader.timeline import Timeline


def test_two_fetches_add_up() -> None:
    state = BootState(Timeline(quiet=True), LogProgress())
    state.start(2, 100, 10)
    state.advance(40, "a")
    state.finish_file("a")
    boot = state.boot()
    assert (boot.files, boot.files_done, boot.bytes, boot.bytes_done) == (2, 1, 100, 50)
    assert boot.bytes_per_s > 0
    assert boot.left_s is not None
    state.finish()
    state.start(1, 1000, 0)
    boot = state.boot()
    assert (boot.files, boot.files_done, boot.bytes, boot.bytes_done) == (3, 1, 1100, 50)
    state.finish()
    assert state.boot().bytes_per_s == 0
    assert state.boot().left_s is None


def test_the_stage_is_what_runs_in_both_processes() -> None:
    timeline = Timeline(quiet=True)
    state = BootState(timeline)
    assert state.boot().stage == ""
    timeline.begin("engine import", lane="engine")
    with timeline.stage("download"):
        timeline.begin("job/rank-0/a", kind="file")
        assert state.boot().stage == "engine import, download"


def test_what_a_start_waits_for() -> None:
    timeline = Timeline(quiet=True)
    state = BootState(timeline)
    assert state.boot().waiting_for == []
    state.start(5, 100, 0)
    timeline.begin("download")
    for name in "abcde":
        timeline.begin(f"job/rank-0/{name}", kind="file")
    state.retry("job/rank-0/a", "503 from https://host/a?Signature=SECRET")
    assert state.boot().to_json()["waiting_for"] == [
        "download, for 0.00 s",
        "job/rank-0/a, job/rank-0/b, job/rank-0/c and 2 more",
        "asked for again: job/rank-0/a: 503 from https://host/a?…",
    ]
    state.finish()
    assert not any("again" in wait for wait in state.boot().waiting_for)


def test_work_and_waits_are_told_while_they_last() -> None:
    state = BootState(Timeline(quiet=True))
    with state.working("proved files that are here:") as report:
        report(1_000_000, 3_000_000)
        state.wait_for("another process, which fetches job/rank-0/a")
        boot = state.boot()
        assert boot.waiting_for == [
            "proved files that are here: 1.0 MB of 3.0 MB",
            "waiting for another process, which fetches job/rank-0/a",
        ]
        assert Boot.from_json(json.loads(json.dumps(boot.to_json()))) == boot
    state.wait_for("")
    assert state.boot().waiting_for == []


def test_a_failure_is_told_without_signatures() -> None:
    state = BootState(Timeline(quiet=True))
    error = FetchError("refused", where="https://host/a?Signature=SECRET", next_step="ask")
    boot = state.fail(error)
    assert boot.phase == "failed"
    assert boot.error is not None
    assert boot.error["error"] == "FetchError"
    assert "SECRET" not in json.dumps(boot.to_json())
    boot = state.fail(OSError("https://host/b?Signature=SECRET"))
    assert "SECRET" not in json.dumps(boot.to_json())


def test_it_comes_back_from_json() -> None:
    timeline = Timeline(quiet=True)
    state = BootState(timeline)
    state.start(1, 5, 0)
    with timeline.stage("merge"):
        timeline.count("retries", 2)
    timeline.begin("engine load", lane="engine")
    boot = state.ready()
    assert boot.phase == "ready"
    assert boot.ready_s == pytest.approx(boot.now_s, abs=0.1)
    assert Boot.from_json(json.loads(json.dumps(boot.to_json()))) == boot


def test_how_far_a_step_is() -> None:
    state = BootState(Timeline(quiet=True))
    with state.step("listing") as tell:
        tell("12,000 files")
        assert state.boot().waiting_for == ["listing: 12,000 files"]
    assert state.boot().waiting_for == []
