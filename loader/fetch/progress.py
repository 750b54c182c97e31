"""How a fetch tells that it moves; plain lines for logs. Bars are the command line's."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from loader.stores.base import Progress, Report, Tell, Working
from loader.units import show_bytes, show_rate, show_seconds

__all__ = [
    "LogProgress",
    "Progress",
    "Report",
    "Retries",
    "Tell",
    "Waits",
    "Working",
    "add_up",
    "log_work",
    "say_nothing",
]

_log = logging.getLogger("podloader")
_EVERY_S = 5.0
_WAIT_EVERY_S = 30.0

say_nothing: Working = Progress().working
"""Gives what tells nobody of work."""


class _Before(logging.LoggerAdapter[logging.Logger]):
    """Log lines with some words in front."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, Any]:
        """Return the line with them."""
        return str((self.extra or {})["before"]).replace("%", "%%") + msg, kwargs


class LogProgress(Progress):
    """One line every few seconds: files done, bytes, rate, time left; each with *before*."""

    def __init__(self, every_s: float = _EVERY_S, before: str = "") -> None:
        super().__init__()
        self._log = _Before(_log, {"before": before})
        self._every_s = every_s
        self._lock = threading.Lock()
        self._files = self._total_files = 0
        self._bytes = self._total_bytes = self._had_bytes = 0
        self._began = self._told = time.monotonic()
        self._retries = Retries(every_s)
        self._waits = Waits()

    def start(self, files: int, size_bytes: int, have_bytes: int) -> None:
        """Say what is to come."""
        self._files, self._total_files, self._total_bytes = 0, files, size_bytes
        self._bytes = self._had_bytes = have_bytes
        self._began = self._told = time.monotonic()
        here = f", {show_bytes(have_bytes)} of it here already" if have_bytes else ""
        self._log.info("fetching %d files, %s%s", files, show_bytes(size_bytes), here)

    def advance(self, count_bytes: int, path: str) -> None:
        """Count, and tell now and then."""
        with self._lock:
            self._bytes += count_bytes
            now = time.monotonic()
            if now - self._told < self._every_s:
                return
            self._told = now
        self._tell()

    def finish_file(self, path: str) -> None:
        """Count."""
        with self._lock:
            self._files += 1

    def retry(self, path: str, reason: str) -> None:
        """Say it, with those that came within the same seconds in one line."""
        if line := self._retries.tell(path, reason):
            self._log.info("%s", line)

    def finish(self) -> None:
        """Say how far it came."""
        if line := self._retries.tell_rest():
            self._log.info("%s", line)
        self._tell()

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[Report]:
        """Give what logs a line every few seconds."""
        yield log_work(what, every_s=self._every_s, log=self._log)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[Tell]:
        """Give what is told how far it is; a thread logs that every few seconds."""
        over, began, reached = threading.Event(), time.monotonic(), ""

        def tell(how_far: str) -> None:
            nonlocal reached
            reached = f": {how_far}"

        def log() -> None:
            while not over.wait(self._every_s):
                _log.info("%s%s, %s", what, reached, show_seconds(time.monotonic() - began))

        threading.Thread(target=log, name="step", daemon=True).start()
        try:
            yield tell
        finally:
            over.set()

    def wait_for(self, what: str) -> None:
        """Say it at once, and now and then for how long."""
        if line := self._waits.tell(what):
            self._log.info("%s", line)

    def _tell(self) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (self._bytes - self._had_bytes) / seconds
        left_bytes = self._total_bytes - self._bytes
        left = ""
        if rate > 0 or not left_bytes:
            left = f", {show_seconds(left_bytes / max(rate, 1e-9))} left"
        self._log.info(
            "%d/%d files, %s of %s, %s%s",
            self._files,
            self._total_files,
            show_bytes(self._bytes),
            show_bytes(self._total_bytes),
            show_rate(rate),
            left,
        )


class Retries:
    """Lines about passing failures, no more than one in every few seconds."""

    def __init__(self, every_s: float = _EVERY_S) -> None:
        self._every_s = every_s
        self._lock = threading.Lock()
        self._told: float | None = None
        self._untold = 0

    def tell(self, path: str, reason: str) -> str:
        """Return the line to be shown now, empty where it is too soon for one."""
        now = time.monotonic()
        with self._lock:
            if self._told is not None and now - self._told < self._every_s:
                self._untold += 1
                return ""
            more = f", and {self._untold} others before it" if self._untold else ""
            self._told, self._untold = now, 0
        return f"asked for again: {path}: {reason}{more}"

    def tell_rest(self) -> str:
        """Return the line for those that no line was shown for, empty where there are none."""
        with self._lock:
            untold, self._untold, self._told = self._untold, 0, None
        return f"asked for again: {untold} others" if untold else ""


class Waits:
    """Lines about waits: one as the first begins, and no more than one every so often."""

    def __init__(self, every_s: float = _WAIT_EVERY_S) -> None:
        self._every_s = every_s
        self._lock = threading.Lock()
        self._since: float | None = None
        self._told: float | None = None

    def tell(self, what: str) -> str:
        """Return the line to be shown now, empty where it is too soon for one."""
        now = time.monotonic()
        with self._lock:
            if not what:
                self._since = None
                return ""
            self._since = self._since or now
            if self._told is not None and now - self._told < self._every_s:
                return ""
            self._told = now
            for_s = now - self._since
        return f"waiting for {what}" + (f", for {show_seconds(for_s)} now" if for_s else "")


def add_up(report: Report, total: int) -> Callable[[int], None]:
    """Return what adds up counts, from any thread, and reports how much of *total* they are."""
    lock, done = threading.Lock(), 0

    def add(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            report(done, total)

    return add


def log_work(
    what: str,
    show: Callable[[float], str] = show_bytes,
    every_s: float = _EVERY_S,
    log: logging.Logger | logging.LoggerAdapter[logging.Logger] = _log,
) -> Report:
    """Return what logs a line every few seconds: done, all, and the time that is left."""
    began = told = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= every_s:
            told = now
            left = show_seconds((total - done) * (now - began) / max(done, 1))
            log.info("%s %s of %s, %s left", what, show(done), show(total), left)

    return report
