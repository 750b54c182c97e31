"""Bars or lines, whichever standard error can show."""

from __future__ import annotations

import sys

from loader.fetch.progress import LogProgress, Progress


def choose_progress() -> Progress:
    """Return bars where standard error is a terminal, else lines."""
    if not sys.stderr.isatty():
        return LogProgress()
    from loader.cli.bars import BarProgress  # rich, which lines in a log do without

    return BarProgress()
