"""What a fetch tells about itself in a log."""

from __future__ import annotations

import logging
import re
import time

import pytest

from loader.fetch.progress import LogProgress, add_up, log_work
from loader.stores.base import count_up


def test_each_fetch_counts_its_own_files(caplog: pytest.LogCaptureFixture) -> None:
    progress = LogProgress()
    with caplog.at_level(logging.INFO, "podloader"):
        for files in (2, 1):
            progress.start(files, 100 * files, 0)
            for name in ("a", "b")[:files]:
                progress.advance(100, name)
                progress.finish_file(name)
            progress.finish()
    told = [record.getMessage().partition(",")[0] for record in caplog.records]
    assert told == ["fetching 2 files", "2/2 files", "fetching 1 files", "1/1 files"]


def test_retries_are_told_at_once_or_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    told = LogProgress()
    with caplog.at_level(logging.INFO, logger="podloader"):
        told.start(1, 1, 0)
        for _ in range(3):
            told.retry("job1/rank-0/x", "HTTP 503")
        assert caplog.messages[1:] == ["asked for again: job1/rank-0/x: HTTP 503"]
        told.finish()
        assert caplog.messages[2] == "asked for again: 2 others"
        told.finish()
    assert "again" not in caplog.messages[-1]
    assert len(caplog.messages) == 5


def test_no_rate_tells_no_time(caplog: pytest.LogCaptureFixture) -> None:
    progress = LogProgress()
    with caplog.at_level(logging.INFO, "podloader"):
        progress.start(1, 100, 40)
        progress.finish()
    assert caplog.messages[-1] == "0/1 files, 40 B of 100 B, 0 B/s"


def test_work_is_told_every_few_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="podloader")
    clock = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr("loader.fetch.progress.time.monotonic", lambda: next(clock))
    report = log_work("merged", every_s=5)
    for done in (1000, 2000, 3000, 4000):
        report(done, 4000)
    assert caplog.messages == [
        "merged 2.0 kB of 4.0 kB, 6.0 s left",
        "merged 4.0 kB of 4.0 kB, 0.00 s left",
    ]


def test_a_wait_is_told_at_once_and_every_half_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="podloader")
    progress = LogProgress()
    now = iter([10.0, 11.0, 39.0, 40.0, 41.0, 70.0, 75.0, 76.0, 77.0, 101.0])
    monkeypatch.setattr("loader.fetch.progress.time.monotonic", lambda: next(now))
    for what in ("x", "y", "x", "x", "x", "x", "", "x", "x", "x"):
        progress.wait_for(what)
    assert caplog.messages == [
        "waiting for x",
        "waiting for x, for 30.0 s now",
        "waiting for x, for 1 min 00 s now",
        "waiting for x, for 25.0 s now",
    ]


def test_work_of_many_threads_is_one_sum(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="podloader")
    clock = iter([0.0, 6.0, 12.0])
    progress = LogProgress()
    monkeypatch.setattr("loader.fetch.progress.time.monotonic", lambda: next(clock))
    with progress.working("proved files that are here:") as report:
        tell = add_up(report, 4000)
        for _ in range(2):
            tell(1000)
    assert caplog.messages == [
        "proved files that are here: 1.0 kB of 4.0 kB, 18.0 s left",
        "proved files that are here: 2.0 kB of 4.0 kB, 12.0 s left",
    ]


def test_a_step_is_told_every_few_seconds_while_nothing_is_heard_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="podloader")
    with LogProgress(0.05).step("listing") as tell:
        while len(caplog.messages) < 2:
            time.sleep(0.01)
        count = count_up(tell, "files")
        count(1000)
        count(11_000)
        while "12,000" not in caplog.messages[-1]:
            time.sleep(0.01)
    assert re.fullmatch(r"listing, [0-9.]+ s", caplog.messages[0])
    assert re.fullmatch(r"listing: 12,000 files, [0-9.]+ s", caplog.messages[-1])
    told = len(caplog.messages)
    time.sleep(0.15)
    assert len(caplog.messages) <= told + 1
