"""A table of nodes for a terminal: one row each, its bar that of what the node does just now."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID

from loader.cli.bars import bars_for, show_above
from loader.fetch.progress import Progress, Report, Retries, Waits


class NodeBars:
    """The table, in a block."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = bars_for(console or Console(stderr=True))

    def __enter__(self) -> NodeBars:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def row(self, node: str) -> Progress:
        """Return what moves the row of *node*; without a name, what says lines above the table."""
        return _Row(self._bars, node)


class _Row(Progress):
    """One node's row. Retries and waits are lines above the table, with the node's name."""

    def __init__(self, bars: Bars, node: str) -> None:
        super().__init__()
        self._bars, self._node = bars, node
        self._retries, self._waits = Retries(1.0), Waits()
        self._files = self._all_files = 0
        self._task: TaskID | None = bars.add_task(node, total=None) if node else None

    def start(self, files: int, size_bytes: int, have_bytes: int) -> None:
        """Show what is to come."""
        self._files, self._all_files = 0, files
        self._update(self._label(), have_bytes, size_bytes)

    def advance(self, count_bytes: int, path: str) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.advance(self._task, count_bytes)

    def finish_file(self, path: str) -> None:
        """Count it."""
        self._files += 1
        if self._task is not None:
            self._bars.update(self._task, description=self._label())

    def retry(self, path: str, reason: str) -> None:
        """Say it, with those that came within the same second in one line."""
        self._show(self._retries.tell(path, reason))

    def finish(self) -> None:
        """Leave the row as it stands."""
        self._show(self._retries.tell_rest())

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[Report]:
        """Give what makes this work the row's, as soon as it is told of."""

        def report(done: int, total: int) -> None:
            self._update(f"{self._node} {what.partition(' ')[0].rstrip(':')}", done, total)

        yield report

    def wait_for(self, what: str) -> None:
        """Say it at once, and now and then for how long."""
        self._show(self._waits.tell(what))

    def _label(self) -> str:
        return f"{self._node} {self._files}/{self._all_files} files"

    def _update(self, label: str, done: int, total: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, description=label, completed=done, total=total)

    def _show(self, line: str) -> None:
        show_above(self._bars, f"{self._node}: {line}" if line and self._node else line)
