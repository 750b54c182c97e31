"""A command's timeline: exported while it runs, shown and written when it is over."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from loader.cli.report import say
from loader.cli.tables import show_timeline
from loader.config.settings import traces_exporter
from loader.log_lines import name_trace
from loader.status.trace import write_timeline
from loader.status.tracing import exporting
from loader.timeline import Timeline
from loader.units import show_seconds

_EVERY_S = 10.0
_log = logging.getLogger("podloader")


@contextlib.contextmanager
def timeline_kept(file: Path | None, timeline: Timeline | None = None) -> Iterator[Timeline]:
    """Give a timeline; at the end, well or not, show its table and write *file* and its picture."""
    timeline = timeline or Timeline()
    name_trace(timeline.trace_id)
    over = threading.Event()
    threading.Thread(target=tell_long, args=(timeline, over), name="long", daemon=True).start()
    with exporting(timeline, traces_exporter()):
        try:
            yield timeline
        finally:
            over.set()
            timeline.close()
            keep_timeline(timeline, file)


def tell_long(timeline: Timeline, over: threading.Event, every_s: float = _EVERY_S) -> None:
    """Log every so often what the engine is still at, until it is *over*: others tell themselves.

    Its process writes to the same terminal, where bars would not stay whole.
    """
    while not over.wait(every_s):
        for stage in timeline.running:
            since_s = timeline.now_s - stage.start_s
            if stage.kind == "stage" and stage.lane == "engine" and since_s >= every_s:
                _log.info("%s, for %s now", stage.name, show_seconds(since_s))


def keep_timeline(timeline: Timeline, file: Path | None) -> None:
    """Show the table of *timeline*, and write it to *file*.

    That it cannot be written is said and fails nothing: the model matters more.
    """
    if timeline.stages:
        show_timeline(timeline)
    if file is None:
        return
    try:
        trace, picture = write_timeline(timeline, file)
    except OSError as error:
        say(f"warning: the timeline is not written: {error}")
    else:
        say(f"timeline   {trace}, {picture}")
