"""Bars or lines, whichever standard error can show."""

from __future__ import annotations

import logging
import sys

from loader.fetch.progress import LogProgress, Progress


def choose_progress() -> Progress:
    """Return bars where standard error is a terminal, else lines, which ``-q`` leaves out."""
    if not (sys.stderr.isatty() and logging.getLogger("podloader").isEnabledFor(logging.INFO)):
        return LogProgress()
    from loader.cli.bars import BarProgress  # rich, which lines in a log do without

    return BarProgress()
