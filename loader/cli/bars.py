"""Progress bars for a terminal."""

from __future__ import annotations

import threading
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars

from loader.fetch.progress import Progress, Retries

_BIG_BYTES = 64 << 20
_LONGEST = 40
_BARS = 6  # of files at a time; all others move only the bar of the whole


class BarProgress(Progress):
    """One bar of all bytes, with the files counted before it, and one of each big file under way.

    Retries are lines above them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bars = _bars(Console(stderr=True))
        self._task = TaskID(0)
        self._lock = threading.Lock()
        self._files: dict[str, TaskID] = {}
        self._retries = Retries(1.0)
        self._count = 0
        self._total = 0

    def start(self, files: int, size_bytes: int, have_bytes: int) -> None:
        """Show the bars."""
        self._count, self._total = 0, files
        self._task = self._bars.add_task(self._label(), total=size_bytes, completed=have_bytes)
        self._bars.start()

    def begin_file(self, path: str, size_bytes: int, have_bytes: int) -> None:
        """Give a big file a bar, where there is room for one."""
        if size_bytes < _BIG_BYTES or path in self._files:
            return
        with self._lock:
            if path not in self._files and len(self._files) < _BARS:
                self._files[path] = self._bars.add_task(
                    _short(path), total=size_bytes, completed=have_bytes
                )

    def advance(self, count_bytes: int, path: str) -> None:
        """Move the bars."""
        self._bars.advance(self._task, count_bytes)
        if (task := self._files.get(path)) is not None:
            self._bars.advance(task, count_bytes)

    def retry(self, path: str, reason: str) -> None:
        """Say it, with those that came within the same second in one line."""
        self._show(self._retries.tell(path, reason))

    def finish_file(self, path: str) -> None:
        """Count a file and take its bar away."""
        with self._lock:
            self._count += 1
            task = self._files.pop(path, None)
        if task is not None:
            self._bars.remove_task(task)
        self._bars.update(self._task, description=self._label())

    def finish(self) -> None:
        """Leave the bars as they stand."""
        self._show(self._retries.tell_rest())
        self._bars.stop()

    def _show(self, line: str) -> None:
        if line:
            self._bars.console.print(line, markup=False, highlight=False)

    def _label(self) -> str:
        return f"{self._count}/{self._total} files"


class WorkBar:
    """A bar of one piece of work, shown once that has taken a while. A context manager."""

    def __init__(self, what: str, console: Console | None = None, after_s: float = 1.0) -> None:
        self._bars = _bars(console or Console(stderr=True))
        self._task = self._bars.add_task(what, total=None)
        self._from_s = time.monotonic() + after_s
        self._lock = threading.Lock()
        self._shown = False

    def __enter__(self) -> WorkBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._bars.stop()

    def report(self, done: int, total: int) -> None:
        """Move it. From any thread."""
        self._bars.update(self._task, completed=done, total=total)
        with self._lock:
            if not self._shown and time.monotonic() >= self._from_s:
                self._shown = True
                self._bars.start()


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _short(path: str) -> str:
    """Return the end of a path, which tells files apart."""
    return path if len(path) <= _LONGEST else "…" + path[1 - _LONGEST :]
