"""The Chrome trace and the picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from loader.status.gantt import MOST_FILES, gantt_svg
from loader.status.table import timeline_lines
from loader.status.trace import chrome_trace, write_timeline
from loader.timeline import Open, Span, Timeline


@pytest.fixture
def timeline() -> Timeline:
    """A start with two files at once, an engine beside them, and a merge that failed."""
    timeline = Timeline(quiet=True)
    at = timeline.began
    for name, kind, lane, start, end, failed in (
        ("resolve", "stage", "podloader", 0.0, 0.1, ""),
        ("download", "stage", "podloader", 0.1, 5.0, ""),
        ("j/rank-0/a<b>&.safetensors", "file", "podloader", 0.1, 4.0, ""),
        ("j/rank-0/b.safetensors", "file", "podloader", 0.2, 5.0, ""),
        ("engine import", "stage", "engine", 0.05, 4.5, ""),
        ("merge", "stage", "podloader", 5.0, 6.0, "AdapterError"),
    ):
        begun = timeline.begin(name, kind=kind, lane=lane, at=at + start)  # type: ignore[arg-type]
        timeline.end(begun, at=at + end, failed=failed)
    return timeline


def test_events_of_one_row_never_overlap(timeline: Timeline) -> None:
    trace = json.loads(json.dumps(chrome_trace(timeline)))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {event["name"] for event in events} == {span.name for span in timeline.spans}
    rows: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for event in events:
        row = rows.setdefault((event["pid"], event["tid"]), [])
        row.append((event["ts"], event["ts"] + event["dur"]))
    for row in rows.values():
        row.sort()
        assert all(row[i][1] <= row[i + 1][0] for i in range(len(row) - 1))
    download = next(event for event in events if event["name"] == "download")
    assert (download["ts"], download["dur"]) == (100_000, 4_900_000)
    merge = next(event for event in events if event["name"] == "merge")
    assert merge["args"] == {"failed": "AdapterError"}


def test_both_files_are_written(timeline: Timeline, tmp_path: Path) -> None:
    trace, picture = write_timeline(timeline, tmp_path / "boot.json")
    assert (trace.name, picture.name) == ("boot.json", "boot.svg")
    assert json.loads(trace.read_text())["displayTimeUnit"] == "ms"
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    assert {path.name for path in tmp_path.iterdir()} == {"boot.json", "boot.svg"}


def test_a_picture_asked_for_comes_with_its_trace(timeline: Timeline, tmp_path: Path) -> None:
    trace, picture = write_timeline(timeline, tmp_path / "boot.svg")
    assert (trace.name, picture.name) == ("boot.json", "boot.svg")


def test_bars_stand_where_their_times_are(timeline: Timeline) -> None:
    root = ElementTree.fromstring(gantt_svg(timeline.spans, (), 6.0))
    space = "{http://www.w3.org/2000/svg}"
    bars = {}
    for group in root.findall(f"{space}g"):
        rect, title = group.find(f"{space}rect"), group.find(f"{space}title")
        assert rect is not None
        assert title is not None
        bars[str(title.text).rpartition(":")[0]] = rect.attrib
    assert list(bars)[:2] == ["resolve", "engine import"]
    assert "j/rank-0/a<b>&.safetensors" in bars
    left = {name: float(bar["x"]) for name, bar in bars.items()}
    right = {name: left[name] + float(bar["width"]) for name, bar in bars.items()}
    assert right["download"] == pytest.approx(left["merge"], abs=0.2)
    assert left["download"] < right["engine import"] < right["download"]
    assert bars["merge"]["fill"] != bars["download"]["fill"] != bars["engine import"]["fill"]
    assert max(right.values()) < float(root.attrib["width"])


def test_what_runs_reaches_to_now_and_only_the_longest_files_are_drawn() -> None:
    files = [Span(f"f{i}", 0, 1 + i, "file") for i in range(MOST_FILES + 5)]
    svg = gantt_svg(files, [Open("download", 0.0)], 20.0)
    assert "download: 0.00 s to 20.0 s" in svg
    assert svg.count("<g>") == MOST_FILES + 1
    assert "f0:" not in svg


def test_files_that_took_no_time_to_speak_of_are_left_out() -> None:
    svg = gantt_svg([Span("long", 0, 100, "file"), Span("short", 0, 0.5, "file")], [], 100.0)
    assert "long:" in svg
    assert "short:" not in svg


def test_what_was_stopped_does_not_look_failed() -> None:
    timeline = Timeline(quiet=True)
    timeline.begin("engine import", lane="engine")
    with pytest.raises(KeyError), timeline.stage("merge"):
        raise KeyError
    timeline.close()
    outcomes = {
        event["name"]: event["args"]
        for event in json.loads(json.dumps(chrome_trace(timeline)))["traceEvents"]
        if event["ph"] == "X"
    }
    assert outcomes == {"engine import": {"stopped": True}, "merge": {"failed": "KeyError"}}
    svg = gantt_svg(timeline.spans, (), 6.0)
    assert all(f">{name}</text>" in svg for name in ("failed", "stopped"))
    assert svg.count("#c0392b") == 2  # the bar and its meaning
    lines = timeline_lines(timeline)
    assert [line.split("  ")[-1] for line in lines[1:3]] == ["stopped", "failed: KeyError"]


def test_an_empty_timeline_has_a_picture_too() -> None:
    ElementTree.fromstring(gantt_svg((), (), 0.0))


def test_no_note_is_cut_at_the_edge() -> None:
    spans = [
        Span("long", 0, 100, failed="AMuchLongerNameOfAnErrorThanMost"),
        Span("short", 99, 100, failed="AMuchLongerNameOfAnErrorThanMost"),
    ]
    root = ElementTree.fromstring(gantt_svg(spans, (), 100.0))
    for group in root.findall("{http://www.w3.org/2000/svg}g"):
        note = group.findall("{http://www.w3.org/2000/svg}text")[-1]
        assert note.text is not None
        assert note.text.endswith("AMuchLongerNameOfAnErrorThanMost")
        assert note.get("text-anchor") == "end"
        assert float(note.get("x", 0)) < 960


def test_colours_are_explained_where_they_are_used(timeline: Timeline) -> None:
    svg = gantt_svg(timeline.spans, (), 6.0)
    assert all(f">{name}</text>" in svg for name in ("podloader", "engine", "a file", "failed"))
    assert ">failed</text>" not in gantt_svg([Span("all is well", 0, 1)], (), 1.0)
