"""The actor: prepares on its node, and says what happened since it was asked before."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from loader import __version__
from loader.config.settings import Settings
from loader.errors import LoaderError
from loader.log_lines import shown
from loader.stores.base import Progress, Report
from loader.timeline import Span, Timeline
from loader.types import ReadyModel

_LOOK_S = 0.25
Event = tuple[Any, ...]
"""The name of a ``Progress`` method and its arguments; ``log``, a level and a line; and of work
``work``, a number and what it is, ``report`` with that number, ``worked`` with it.
"""


@dataclass(frozen=True, slots=True)
class Look:
    """What happened on a node since the one before; the last has a result or an error."""

    events: tuple[Event, ...]
    ready: ReadyModel | None = None
    error: LoaderError | None = None
    fault: str = ""
    """The traceback of what is no ``LoaderError``."""
    spans: tuple[Span, ...] = ()

    @property
    def is_last(self) -> bool:
        """Whether the node is done, well or not."""
        return bool(self.ready or self.error or self.fault)


class Events(Progress):
    """Keeps what it is told until somebody takes it; bytes of one file are added up."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._bytes: dict[str, int] = {}
        self._reports: dict[int, tuple[int, int]] = {}
        self._works = itertools.count()

    def put(self, *event: Any) -> None:
        """Add an event, behind the bytes that were counted before it."""
        with self._lock:
            self._events += [*self._counted(), event]

    def take(self) -> tuple[Event, ...]:
        """Return what was told, and forget it."""
        with self._lock:
            found, self._events = (*self._events, *self._counted()), []
            return found

    def start(self, files: int, size_bytes: int, have_bytes: int) -> None:
        """Keep it."""
        self.put("start", files, size_bytes, have_bytes)

    def advance(self, count_bytes: int, path: str) -> None:
        """Add it up."""
        with self._lock:
            self._bytes[path] = self._bytes.get(path, 0) + count_bytes

    def begin_file(self, path: str, size_bytes: int, have_bytes: int) -> None:
        """Keep it."""
        self.put("begin_file", path, size_bytes, have_bytes)

    def finish_file(self, path: str) -> None:
        """Keep it."""
        self.put("finish_file", path)

    def retry(self, path: str, reason: str) -> None:
        """Keep it."""
        self.put("retry", path, reason)

    def finish(self) -> None:
        """Keep it."""
        self.put("finish")

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[Report]:
        """Give what keeps how far it is."""
        work = next(self._works)
        self.put("work", work, what)

        def report(done: int, total: int) -> None:
            with self._lock:
                self._reports[work] = (done, total)

        try:
            yield report
        finally:
            self.put("worked", work)

    def wait_for(self, what: str) -> None:
        """Keep it."""
        self.put("wait_for", what)

    def _counted(self) -> list[Event]:
        """Return the bytes and the reports that were counted; they are locked."""
        found: list[Event] = [("advance", count, path) for path, count in self._bytes.items()]
        found += [("report", work, *done) for work, done in self._reports.items()]
        self._bytes, self._reports = {}, {}
        return found


class NodePreparer:
    """Prepares in a thread of its own.

    SAFETY: Ray keeps a constructor's arguments in the cluster's store, which secrets have no place
    in; those of a method go from process to process alone. So there are none of the former.
    """

    def __init__(self) -> None:
        self._events = Events()
        self._timeline = Timeline(quiet=True)
        self._over = threading.Event()
        self._last = Look(())

    def begin(self, settings: Settings, version: str) -> str:
        """Return this node's version of podloader; begin, where that is *version*."""
        if __version__ == version:
            logger = logging.getLogger("podloader")
            logger.handlers[:] = [_Relay(self._events)]
            logger.propagate = False
            threading.Thread(target=self._prepare, args=(settings,), daemon=True).start()
        return __version__

    def look(self) -> Look:
        """Return what happened, a moment from now or when it is over."""
        is_over = self._over.wait(_LOOK_S)
        events = self._events.take()
        return replace(self._last, events=events) if is_over else Look(events)

    def _prepare(self, settings: Settings) -> None:
        from loader import boot  # the node says its version without it

        try:
            ready = boot.prepare(settings, self._events, self._timeline)
            self._last = Look((), ready, spans=self._timeline.spans)
        except LoaderError as error:
            error.__cause__ = error.__context__ = None  # which may not pickle
            self._last = Look((), error=error.with_traceback(None))
        except BaseException:
            self._last = Look((), fault=shown(traceback.format_exc()))
        self._over.set()


class _Relay(logging.Handler):
    """Warnings and errors, to who prepares; Ray's own logs get no line of them."""

    def __init__(self, events: Events) -> None:
        super().__init__(logging.WARNING)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self._events.put("log", record.levelno, shown(record.getMessage()))
