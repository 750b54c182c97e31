"""Progress bars for a terminal."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    Task,
    TaskID,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from loader.errors import one_line, redact
from loader.fetch.progress import Progress, Report, Retries, Tell, Waits
from loader.units import show_seconds

_BIG_BYTES = 64 << 20
_LONGEST = 40
_NARROW = 50  # columns, which a bar has no room in
_BARS = 6  # of files at a time; all others move only the bar of the whole


class _OfBytes(ProgressColumn):
    """A column of what has an end, empty beside other work; *otherwise* stands there then."""

    def __init__(
        self, column: ProgressColumn, otherwise: Callable[[Task], str] = lambda task: ""
    ) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._column = column
        self._otherwise = otherwise

    def render(self, task: Task) -> RenderableType:
        """Return what stands in the line of *task*."""
        return self._otherwise(task) if task.total is None else self._column.render(task)


class _Label(ProgressColumn):
    """The column of what each line is about; names in it come from listings."""

    def render(self, task: Task) -> Text:
        """Return what stands in the line of *task*."""
        return Text(one_line(redact(task.description)))


class BarProgress(Progress):
    """One bar of all bytes, with the files counted before it, and one of each big file under way.

    Work beside downloads has one once that has taken *after_s*. Retries and waits are lines above
    them.
    """

    def __init__(self, console: Console | None = None, after_s: float = 1.0) -> None:
        super().__init__()
        self._bars = bars_for(console or Console(stderr=True))
        self._after_s = after_s
        self._is_fetching = False
        self._works = 0
        self._waits = Waits()
        self._task = TaskID(0)
        self._lock = threading.Lock()
        self._files: dict[str, TaskID] = {}
        self._retries = Retries(1.0)
        self._count = 0
        self._total = 0

    def start(self, files: int, size_bytes: int, have_bytes: int) -> None:
        """Show the bars."""
        self._is_fetching = True
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
                    self._short(path), total=size_bytes, completed=have_bytes
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
        self._is_fetching = False
        self._stop()
        self._bars.update(self._task, visible=False)

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[Report]:
        """Give what moves a bar of its own."""
        with self._shown(self._work_label(what)) as update:
            yield lambda done, total: update(completed=done, total=total)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[Tell]:
        """Give what tells how far it is, in a line of its own."""
        with self._shown(what, stays=False) as update:
            yield lambda how_far: update(description=f"{what}  {how_far}")

    @contextlib.contextmanager
    def _shown(self, label: str, *, stays: bool = True) -> Iterator[Callable[..., None]]:
        """Give what changes a line of its own, shown after a while; at the end it *stays*."""
        task = self._bars.add_task(label, total=None, visible=False)
        from_s = time.monotonic() + self._after_s
        is_over = False

        def update(**changes: Any) -> None:
            with self._lock:
                if is_over:  # a thread that nobody waits for any more
                    return
                shown = time.monotonic() >= from_s
                self._bars.update(task, visible=shown, **changes)
                if shown:
                    self._bars.start()

        timer = threading.Timer(self._after_s, update)
        timer.daemon = True
        with self._lock:
            is_alone = not self._works and not self._is_fetching
            self._works += 1
        if is_alone:  # else there is something to see already, and these may be thousands
            timer.start()
        try:
            yield update
        finally:
            timer.cancel()
            with self._lock:
                is_over = True
                self._works -= 1
            self._stop(stays=stays)
            self._bars.remove_task(task)

    def wait_for(self, what: str) -> None:
        """Say it at once, and now and then for how long."""
        self._show(self._waits.tell(what))

    def _stop(self, *, stays: bool = True) -> None:
        """Leave the bars as they stand, or take them away, unless others move."""
        if not self._is_fetching and not self._works:
            self._bars.live.transient = not stays
            self._bars.stop()

    def _short(self, path: str, before: str = "") -> str:
        """Return *before* and the end of a path, which tells files apart; narrow terminals have
        room for less of it.
        """
        most = max(8, min(_LONGEST, self._bars.console.width * 2 // 5) - len(before))
        return before + (path if len(path) <= most else "…" + path[1 - most :])

    def _work_label(self, what: str) -> str:
        done, _, of = what.rstrip(":").partition(" ")
        return self._short(of, f"{done} ") if of else done

    def _show(self, line: str) -> None:
        show_above(self._bars, line)

    def _label(self) -> str:
        return f"{self._count}/{self._total} files"


def show_above(bars: Bars, line: str) -> None:
    """Print *line* above *bars* as a log line is shown: one, without secrets. Empty, it is none."""
    if line:
        bars.console.print(one_line(redact(line)), markup=False, highlight=False)


def bars_for(console: Console) -> Bars:
    """Return bars with what *console* has room for: figures before the bar, the rate last."""
    width = console.width
    columns: list[ProgressColumn] = [
        _Label(Column(no_wrap=True)),
        _OfBytes(DownloadColumn()),
        _OfBytes(TimeRemainingColumn(), lambda task: show_seconds(task.elapsed or 0)),
    ]
    if width >= _NARROW:
        columns.insert(1, BarColumn(min(40, width // 5)))
    if width >= 2 * _NARROW:
        columns.insert(3, _OfBytes(TransferSpeedColumn()))
    return Bars(*columns, console=console)
