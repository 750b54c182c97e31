"""``podloader serve``: a pod with its timeline, and its failures as exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loader.cli.report import say, say_error
from loader.errors import LoaderError
from loader.log_lines import name_trace
from loader.pod.pod import Pod
from loader.pod.signals import StopSignal
from loader.timeline import Timeline
from loader.units import show_seconds

if TYPE_CHECKING:
    from loader.config.settings import Settings


def run_pod(
    config: Path | None,
    settings: Settings,
    arguments: Sequence[str],
    timeline_file: Path | None,
) -> int:
    """Return the pod's exit code when it is over. *config* is the file that *settings* are from.

    A download that nobody waits for any more is not waited for either: the process ends here then.
    """
    timeline = Timeline()
    name_trace(timeline.trace_id)
    with Pod(settings, arguments, timeline) as pod:
        code = _run(pod, config, timeline, timeline_file)
    if pod.is_preparing:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(pod: Pod, config: Path | None, timeline: Timeline, timeline_file: Path | None) -> int:
    # Not before the port answers: these import rich.
    from loader.cli.display import choose_progress
    from loader.cli.timelines import timeline_kept
    from loader.status.state import fact_text

    try:
        with timeline_kept(timeline_file, timeline):
            pod.start(config, choose_progress())
    except StopSignal as stop:
        say(f"{stop} while starting; what has been fetched is kept")
        return stop.exit_code
    except LoaderError as error:
        say_error(f"error: {error}")
        if pod.holds:
            say("/health answers with this until a signal comes")
            pod.hold()
        return error.exit_code
    names = fact_text(timeline.facts.get("served_as", ()))
    say(f"ready after {show_seconds(timeline.now_s)}{names and f', as {names}'}")
    return pod.serve()
