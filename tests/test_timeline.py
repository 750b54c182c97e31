"""Spans: what is over, what runs, what failed."""

from __future__ import annotations

import threading
import time

import pytest

from loader.timeline import Open, Span, Timeline


class Heard:
    """A listener that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, begun: Open, span: Span | None) -> None:
        """Keep it as a line."""
        assert span is None or begun.name == span.name
        ended = f"ended {begun.name} {span.note}".rstrip() if span is not None else ""
        self.lines.append(ended or f"begun {begun.name}")


def test_a_stage_runs_and_then_is_over() -> None:
    timeline = Timeline(quiet=True)
    with timeline.stage("one"):
        assert [span.name for span in timeline.running] == ["one"]
        assert not timeline.stages
    assert timeline.running == ()
    (one,) = timeline.stages
    assert (one.name, one.kind, one.failed) == ("one", "stage", "")
    assert 0 <= one.start_s <= one.end_s <= timeline.now_s


def test_a_stage_that_fails_says_how() -> None:
    timeline, heard = Timeline(quiet=True), Heard()
    timeline.listen(heard)
    with pytest.raises(KeyError), timeline.stage("one"):
        raise KeyError("no")
    assert [(s.name, s.failed) for s in timeline.stages] == [("one", "KeyError")]
    assert heard.lines == ["begun one", "ended one failed: KeyError"]


def test_who_listens_late_hears_of_all_in_its_order() -> None:
    timeline, heard = Timeline(quiet=True), Heard()
    running = timeline.begin("import", lane="engine")
    with timeline.stage("listing"):
        pass
    with pytest.raises(KeyError), timeline.stage("verify"):
        raise KeyError("no")
    timeline.listen(heard)
    timeline.end(running)
    assert heard.lines == [
        *("begun import", "begun listing", "ended listing"),
        *("begun verify", "ended verify failed: KeyError", "ended import"),
    ]


def test_who_listens_meanwhile_misses_nothing() -> None:
    timeline, heard = Timeline(quiet=True), Heard()

    def work() -> None:
        for number in range(2000):
            timeline.end(timeline.begin(f"{number}", kind="file"))

    thread = threading.Thread(target=work)
    thread.start()
    timeline.listen(heard)
    thread.join()
    assert sorted(heard.lines) == sorted(
        f"{what} {number}" for what in ("begun", "ended") for number in range(2000)
    )


def test_a_signal_is_no_failure() -> None:
    timeline = Timeline(quiet=True)
    with pytest.raises(KeyboardInterrupt), timeline.stage("one"):
        raise KeyboardInterrupt
    assert [s.note for s in timeline.stages] == ["stopped"]


def test_what_runs_when_it_is_closed_was_stopped() -> None:
    timeline, heard = Timeline(quiet=True), Heard()
    timeline.listen(heard)
    running = timeline.begin("import", lane="engine")
    with pytest.raises(KeyError), timeline.stage("one"):
        raise KeyError("no")
    timeline.close()
    timeline.end(timeline.begin("late"))
    timeline.end(running, failed="ended")
    assert [(s.name, s.note) for s in timeline.stages] == [
        ("one", "failed: KeyError"),
        ("import", "stopped"),
    ]
    assert timeline.running == ()
    assert heard.lines[2:] == ["ended one failed: KeyError", "ended import stopped"]


def test_files_are_spans_and_no_stages() -> None:
    timeline = Timeline(quiet=True)
    begun = timeline.begin("job/rank-0/a", kind="file")
    timeline.end(begun, attributes={"size_bytes": 3})
    assert timeline.stages == ()
    assert [(s.name, s.attributes) for s in timeline.spans] == [("job/rank-0/a", {"size_bytes": 3})]


def test_another_process_gives_its_own_times() -> None:
    timeline = Timeline(quiet=True)
    at = time.monotonic()
    span = timeline.end(timeline.begin("import", lane="engine", at=at), at=at + 2)
    assert span.lane == "engine"
    assert span.seconds == pytest.approx(2)
    assert span.start_s == pytest.approx(at - timeline.began)


def test_counts_and_spans_come_from_many_threads() -> None:
    timeline = Timeline(quiet=True)

    def work() -> None:
        for _ in range(200):
            timeline.count("retries")
            timeline.end(timeline.begin("f", kind="file"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timeline.counts == {"retries": 1600}
    assert len(timeline.spans) == 1600
    assert timeline.running == ()
