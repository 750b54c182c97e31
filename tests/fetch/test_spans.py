"""What a fetch leaves on the timeline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader import boot
from loader.config.settings import Settings
from loader.errors import FetchError
from loader.fetch.progress import Progress, Report
from loader.fetch.spans import SpanProgress
from loader.timeline import Timeline
from tests import origin as faults
from tests.origin import FaultyOrigin, serving, write_listing


def settings(origin: FaultyOrigin, tmp_path: Path, **fields: object) -> Settings:
    """Return settings that fetch everything of ``job1``."""
    listing = write_listing(origin, tmp_path / "listing.json")
    document = {
        "training_checkpoints": {
            "download_folder": str(tmp_path / "models"),
            "artifact_references": [{"training_job_id": "job1", "paths": ["rank-0/c/"]}],
        },
        "model_metadata": {"podloader": {"artifacts": [str(listing)], **fields}},
    }
    return Settings.load(document)


def test_files_lie_within_the_download_and_retries_are_counted(tmp_path: Path) -> None:
    timeline = Timeline(quiet=True)
    with serving(tmp_path / "origin") as origin:
        origin.put("c/a.txt", b"a" * 1000)
        origin.put("c/b.txt", b"b" * 2000)
        origin.fail("a.txt", faults.status(503), faults.cut(10))
        boot.fetch_files(settings(origin, tmp_path), timeline=timeline)
    stages = {span.name: span for span in timeline.stages}
    assert list(stages) == ["listing", "resolve", "verify", "download"]
    files = [span for span in timeline.spans if span.kind == "file"]
    assert {span.name for span in files} == {"job1/rank-0/c/a.txt", "job1/rank-0/c/b.txt"}
    download = stages["download"]
    for span in files:
        assert download.start_s <= span.start_s <= span.end_s <= download.end_s
        assert not span.failed
    assert timeline.counts == {"retries": 2}
    assert timeline.running == ()


def test_files_that_are_here_are_cache_hits_and_no_spans(tmp_path: Path) -> None:
    with serving(tmp_path / "origin") as origin:
        origin.put("c/a.txt", b"a" * 1000)
        boot.fetch_files(settings(origin, tmp_path), timeline=Timeline(quiet=True))
        timeline = Timeline(quiet=True)
        boot.fetch_files(settings(origin, tmp_path), timeline=timeline)
    assert timeline.counts == {"cache_hits": 1}
    assert all(span.kind == "stage" for span in timeline.spans)


def test_files_that_are_here_are_told_of_as_they_are_proved(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []

    class Told(Progress):
        @contextlib.contextmanager
        def working(self, what: str) -> Iterator[Report]:
            yield lambda done, total: told.append((what, done, total))

    with serving(tmp_path / "origin") as origin:
        for name in "ab":
            origin.put(f"c/{name}.bin", b"a" * 3_000_000)
        fields = {"range_size": "1MiB", "verify": "full"}
        for _ in range(2):
            boot.fetch_files(settings(origin, tmp_path, **fields), Told(), Timeline(quiet=True))
    what = "proved files that are here:"
    assert [one for one in told if one[0] == what][-1] == (what, 6_000_000, 6_000_000)
    assert len(told) == 6


def test_a_wait_is_a_stage(tmp_path: Path) -> None:
    timeline = Timeline(quiet=True)
    with SpanProgress(Progress(), timeline) as watched:
        for _ in range(2):
            watched.wait_for("another process, which fetches job1/rank-0/a.bin")
        running = [span.name for span in timeline.running]
        assert running == ["verify", "wait for another process"]
        watched.wait_for("")
        watched.wait_for("another machine")
    assert [span.name for span in timeline.stages][:1] == ["wait for another process"]
    assert timeline.running == ()


def test_a_fetch_that_fails_leaves_nothing_running(tmp_path: Path) -> None:
    timeline = Timeline(quiet=True)
    with serving(tmp_path / "origin") as origin:
        origin.put("c/a.txt", b"a" * 20_000)
        origin.fail("a.txt", lambda _: False, *[faults.status(404)] * 9)
        with pytest.raises(FetchError):
            boot.fetch_files(settings(origin, tmp_path, retries=0), timeline=timeline)
    assert timeline.running == ()
    failed = {span.name for span in timeline.spans if span.failed}
    assert {"download", "job1/rank-0/c/a.txt"} <= failed
