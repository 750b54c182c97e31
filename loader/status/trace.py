"""A timeline as a Chrome trace, which ``chrome://tracing`` and ui.perfetto.dev show.

Format: "Trace Event Format", complete events (``ph: X``), times in microseconds.
"""

from __future__ import annotations

import json
from pathlib import Path

from loader.status.gantt import gantt_svg
from loader.timeline import Span, Timeline
from loader.weights.publishing import replace_file

_US = 1_000_000


def write_timeline(timeline: Timeline, path: Path) -> tuple[Path, Path]:
    """Write the trace to *path* and the picture beside it; return both paths.

    Raises:
        OSError: the folder is not there or may not be written to.
    """
    picture = path.with_suffix(".svg")
    if picture == path:
        path = path.with_suffix(".json")
    replace_file(path, json.dumps(chrome_trace(timeline)).encode())
    drawn = gantt_svg(timeline.spans, timeline.running, timeline.now_s)
    replace_file(picture, drawn.encode())
    return path, picture


def chrome_trace(timeline: Timeline) -> dict[str, object]:
    """Return the trace: a process for each lane, a row for stages, rows for files as they overlap.

    Files that are fetched at the same time stand on different rows: events of one row must nest.
    """
    lanes = list(dict.fromkeys(span.lane for span in timeline.spans))
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": lane}}
        for pid, lane in enumerate(lanes, 1)
    ]
    free_at: dict[tuple[str, str], list[float]] = {}
    for span in sorted(timeline.spans, key=lambda span: (span.start_s, -span.end_s)):
        rows = free_at.setdefault((span.lane, span.kind), [])
        row = next((i for i, free in enumerate(rows) if free <= span.start_s), len(rows))
        rows[row:] = [span.end_s, *rows[row + 1 :]]
        thread = row + (1 if span.kind == "stage" else 100)
        events.append(_event(span, lanes.index(span.lane) + 1, thread))
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"began_epoch_s": timeline.began_epoch, **timeline.counts},
    }


def _event(span: Span, process: int, thread: int) -> dict[str, object]:
    outcome = {"failed": span.failed} if span.failed else {"stopped": True} if span.stopped else {}
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.kind,
        "pid": process,
        "tid": thread,
        "ts": round(span.start_s * _US),
        "dur": round(span.seconds * _US),
        "args": {**span.attributes, **outcome},
    }
