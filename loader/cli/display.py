"""Bars or lines, whichever standard error can show."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from loader.fetch.progress import LogProgress, Progress, Report, log_work


def choose_progress() -> Progress:
    """Return bars where standard error is a terminal, else lines, which ``-q`` leaves out."""
    if not _has_bars():
        return LogProgress()
    from loader.cli.bars import BarProgress  # rich, which lines in a log do without

    return BarProgress()


@contextlib.contextmanager
def work_shown(what: str) -> Iterator[Report]:
    """Give what is told of bytes of *what*, a participle: a bar, or lines, if it takes a while."""
    if not _has_bars():
        yield log_work(what)
        return
    from loader.cli.bars import WorkBar

    with WorkBar(what) as bar:
        yield bar.report


def _has_bars() -> bool:
    return sys.stderr.isatty() and logging.getLogger("podloader").isEnabledFor(logging.INFO)
