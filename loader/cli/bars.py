"""Progress bars for a terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from loader.fetch.progress import LogProgress
from loader.fetch.progress import Progress as FetchProgress


class BarProgress:
    """One bar, of bytes, with the files counted before it."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = TaskID(0)
        self._count = 0
        self._total = 0

    def start(self, files: int, size_bytes: int, have_bytes: int) -> None:
        """Show the bars."""
        self._total = files
        self._task = self._bars.add_task(self._label(), total=size_bytes, completed=have_bytes)
        self._bars.start()

    def advance(self, count_bytes: int) -> None:
        """Move the bar."""
        self._bars.advance(self._task, count_bytes)

    def begin_file(self, path: str) -> None:
        """Change nothing: the bar is of all files."""

    def retry(self, path: str) -> None:
        """Change nothing."""

    def finish_file(self, path: str) -> None:
        """Count a file."""
        self._count += 1
        self._bars.update(self._task, description=self._label())

    def finish(self) -> None:
        """Leave the bar as it stands."""
        self._bars.stop()

    def _label(self) -> str:
        return f"{self._count}/{self._total} files"


def choose_progress() -> FetchProgress:
    """Return bars where standard error is a terminal, else lines."""
    return BarProgress() if sys.stderr.isatty() else LogProgress()
