"""What ends the threads of a fetch that is told to stop."""

from __future__ import annotations

import threading


class StoppedError(Exception):
    """Another thread failed, or the user asked to stop."""


def check_stop(stop: threading.Event) -> None:
    """Raise StoppedError where *stop* is set."""
    if stop.is_set():
        raise StoppedError("the fetch was stopped; what has arrived is kept")
